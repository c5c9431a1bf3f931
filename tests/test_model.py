"""The forward pass against a second one in float64 numpy, and against itself taken in pieces."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import PRESETS, ModelConfig, RopeScaling, preset
from jaxllm.errors import InputError, ModelError
from jaxllm.model import (
    MATRICES,
    abstract_params,
    init_cache,
    init_params,
    matrix_scheme,
    quantize_params,
    rope_frequencies,
)
from jaxllm.model import forward as eager_forward
from jaxllm.quantize import SCHEMES, column_fill, column_gain, dequantize, divide_up, equalizes, quantize
from jaxllm.tensor import QTensor

forward = jax.jit(eager_forward, static_argnums=1)
SMALL = ModelConfig(
    vocab_size=97, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40, max_len=64, dtype="float32"
)
VARIANTS = {
    "gqa": SMALL,
    "mha": replace(SMALL, n_kv_heads=4),
    "mqa": replace(SMALL, n_kv_heads=1),
    "tied": replace(SMALL, tied=True),
    "wide heads": replace(SMALL, head_dim=10),
    "theta": replace(SMALL, rope_theta=500000.0, norm_eps=1e-3),
    "scaled rope": replace(SMALL, rope_scaling=RopeScaling(8.0, original_max_len=16), rope_theta=50.0),
    "biases": replace(SMALL, attention_bias=True),
    "q and k norms": replace(SMALL, qk_norm=True, norm_eps=1e-2),
    "window": replace(SMALL, sliding_window=4),
}
# weights of more than one group, and rotations of 64 (D), 8 (N*H) and 4 (F) inputs
WIDE = replace(SMALL, dim=192, n_layers=1, ffn_dim=300)


def random_params(config, seed=0):
    """Weights large enough that attention is far from flat, and norms that are not 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * 1.5 / math.sqrt(leaf.shape[-1]), leaf.dtype)

    return jax.tree.map(draw, abstract_params(config))


def to_int8_and_back(x):
    """What an int8 cache keeps of one head's key or value [H]."""
    scale = np.abs(x).max() / 127
    levels = x / scale
    assert (np.abs(levels - np.floor(levels) - 0.5) > 2e-4).all(), (
        "float32 may round it the other way: take another seed"
    )
    return np.rint(levels) * scale


def slow_forward(params, config, tokens):
    """Logits [T, V] of one row, in float64, one head and one position at a time."""
    keep = to_int8_and_back if config.kv_cache == "int8" else lambda x: x
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    heads, size = config.n_heads, config.head_dim

    def norm(x, w):
        return x / np.sqrt((x**2).mean() + config.norm_eps) * w

    def turn(x, position):  # as complex numbers
        angle = []
        for i in range(size // 2):
            f = config.rope_theta ** (-2 * i / size)
            if config.rope_scaling:  # Meta's three cases
                s, wave = config.rope_scaling, 2 * math.pi / f
                if wave > s.original_max_len / s.low_freq_factor:
                    f /= s.factor
                elif wave > s.original_max_len / s.high_freq_factor:
                    smooth = (s.original_max_len / wave - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                    f = (1 - smooth) * f / s.factor + smooth * f
            angle.append(position * f)
        z = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * np.array(angle))
        return np.concatenate([z.real, z.imag])

    xs = [p.embed[t] for t in tokens]
    for layer in p.layers:
        ks, vs, out = [], [], []
        bias = np.zeros(layer.wqkv.shape[:3]) if layer.qkv_bias is None else layer.qkv_bias

        def head_norm(x, w):
            return x if w is None else norm(x, w)

        for position, x in enumerate(xs):
            h = norm(x, layer.attn_norm)
            kv = range(config.n_kv_heads)
            ks.append([keep(turn(head_norm(layer.wqkv[k, -2] @ h + bias[k, -2], layer.k_norm), position)) for k in kv])
            vs.append([keep(layer.wqkv[k, -1] @ h + bias[k, -1]) for k in kv])
            first = max(0, position + 1 - (config.sliding_window or len(xs)))
            mixed = []
            for n in range(heads):
                k, g = divmod(n, config.group)
                q = turn(head_norm(layer.wqkv[k, g] @ h + bias[k, g], layer.q_norm), position)
                e = np.exp([q @ key[k] / math.sqrt(size) for key in ks[first:]])
                mixed.append(sum(w * value[k] for w, value in zip(e / e.sum(), vs[first:], strict=True)))
            x = x + layer.wo @ np.concatenate(mixed)
            h = norm(x, layer.ffn_norm)
            gate, up = layer.w_gate_up[0] @ h, layer.w_gate_up[1] @ h
            out.append(x + layer.w_down @ (gate / (1 + np.exp(-gate)) * up))
        xs = out
    output = p.embed if p.output is None else p.output
    return np.stack([output @ norm(x, p.norm) for x in xs])


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_float64(name):
    config = VARIANTS[name]
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 13))
    got, cache = forward(params, config, tokens)
    want = np.stack([slow_forward(params, config, row) for row in tokens])
    assert cache is None and got.dtype == jnp.float32
    assert want.std() > 1
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_of_ragged_rows_equal_one_forward(name):
    config = VARIANTS[name]
    params = random_params(config)
    rng = np.random.default_rng(2)
    lengths = np.array([3, 11, 1])
    tokens = rng.integers(0, config.vocab_size, (3, 20))
    full, _ = forward(params, config, tokens)

    cache = init_cache(config, 3, 20)
    padded = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 7)
    got, cache = forward(params, config, padded, cache, lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[row, :n], full[row, :n], atol=2e-4)
    for step in range(8):  # then one token at a time, each row at its own position
        at = lengths + step
        got, cache = forward(params, config, tokens[np.arange(3), at][:, None], cache)
        np.testing.assert_allclose(got[:, 0], np.asarray(full)[np.arange(3), at], atol=2e-4)
        np.testing.assert_array_equal(cache.length, at + 1)


def test_int8_cache_equals_float64():
    """Ragged rows in two pieces, then one token at a time, over the keys and values that int8 keeps."""
    config = replace(SMALL, kv_cache="int8")
    params = random_params(config)
    tokens = np.random.default_rng(9).integers(0, config.vocab_size, (2, 13))
    want = np.stack([slow_forward(params, config, row) for row in tokens])
    cache, lengths = init_cache(config, 2, 13), np.zeros(2, int)
    # in the second piece, the first row's padding reaches beyond the last slot, which holds a token of the same piece
    for piece in np.array([[7, 2], [6, 9], [0, 1], [0, 1]]):
        at = np.minimum(lengths[:, None] + np.arange(piece.max()), 12)
        padded = np.where(np.arange(piece.max()) < piece[:, None], tokens[np.arange(2)[:, None], at], 7)
        got, cache = forward(params, config, padded, cache, piece)
        for row, n in enumerate(piece):
            np.testing.assert_allclose(got[row, :n], want[row, lengths[row] :][:n], atol=5e-5)
        lengths += piece
        np.testing.assert_array_equal(cache.length, lengths)
    assert all(a.values.dtype == jnp.int8 and a.scale.dtype == jnp.float32 for a in cache.k + cache.v)
    without = np.stack([slow_forward(params, SMALL, row) for row in tokens])
    assert np.abs(want - without).max() > 1e-2  # which is not what a float cache keeps


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, kv_cache="int8")], ids=["float", "int8"])
@pytest.mark.parametrize("count", [1, 4])
def test_padding_leaves_the_cache_alone(config, count):
    params = random_params(config)
    tokens = np.random.default_rng(4).integers(0, 97, (3, 5))
    _, cache = forward(params, config, tokens, init_cache(config, 3, 9), np.array([5, 2, 1]))
    lengths = np.array([1, 0, count])
    _, after = forward(params, config, tokens[:, :count], cache, lengths)
    np.testing.assert_array_equal(after.length, [6, 2, 1 + count])
    same = (np.arange(9) < cache.length[:, None]) | (np.arange(9) >= after.length[:, None])
    for old, new in zip(*map(jax.tree.leaves, ((cache.k, cache.v), (after.k, after.v))), strict=True):
        changed = (np.asarray(old) != np.asarray(new)).any(axis=1)
        np.testing.assert_array_equal(changed.any(axis=-1) if old.ndim == 4 else changed, ~same)


def test_padding_beyond_the_last_slot_leaves_the_cache_alone():
    params = random_params(SMALL)
    tokens = np.random.default_rng(3).integers(0, 97, (1, 9))
    full, _ = forward(params, SMALL, tokens)
    _, cache = forward(params, SMALL, tokens[:, :7], init_cache(SMALL, 1, 9))
    padded = np.concatenate([tokens[:, 7:8], np.full((1, 5), 3)], axis=1)  # reaches to slot 12 of 9
    _, cache = forward(params, SMALL, padded, cache, np.array([1]))
    got, _ = forward(params, SMALL, tokens[:, 8:], cache)
    np.testing.assert_allclose(got[0, 0], full[0, 8], atol=2e-4)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, dtype="bfloat16", n_kv_heads=1)], ids=["gqa", "mqa"])
def test_bytes_of_an_int8_cache(config):
    cache = jax.eval_shape(lambda: init_cache(replace(config, kv_cache="int8"), 3, 20))
    heads = 2 * config.n_layers * 3 * config.n_kv_heads * 20  # of keys and values, in all slots
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == heads * (6 + 4) + 3 * 4


def quantized(params, scheme):
    """Params as int8, by numpy: in JAX every shape would be compiled."""
    return jax.tree.map(jnp.asarray, quantize_params(jax.tree.map(np.asarray, params), scheme))


def widened(params):
    """Params with every QTensor as the float weight that it stands for."""

    def is_int8(a):
        return isinstance(a, QTensor)

    params = jax.tree.map(np.asarray, params)
    return jax.tree.map(lambda a: jnp.asarray(dequantize(a) if is_int8(a) else a), params, is_leaf=is_int8)


@pytest.mark.parametrize(
    "scheme, rows, bound",  # of w8a8, whose activations round too, 0.024 was measured
    [("int8", 1, 1e-5), ("int8", 12, 1e-5), ("int8-g128", 12, 1e-5), ("w8a8", 1, 0.04), ("w8a8", 12, 0.04)],
)
def test_int8_equals_its_dequantized_weights(scheme, rows, bound):
    params = random_params(WIDE)
    small = quantized(params, scheme)
    tokens = np.random.default_rng(4).integers(0, 97, (1, rows))
    got, want = forward(small, WIDE, tokens)[0], forward(widened(small), WIDE, tokens)[0]
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)
    assert np.linalg.norm(got - forward(params, WIDE, tokens)[0]) > 1e-4 * np.linalg.norm(want)  # it is another model


def test_a_row_of_w8a8_does_not_depend_on_its_mates():
    params = quantized(random_params(WIDE), "w8a8")
    params = replace(params, embed=replace(params.embed, scale=params.embed.scale.at[0].mul(1e4)))
    tokens = np.random.default_rng(8).integers(1, 97, (3, 4))
    others = np.zeros((3, 4), int)  # embedded ten thousand times as large
    others[1] = tokens[1]
    got, want = (forward(params, WIDE, t)[0][1] for t in (others, tokens))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("scheme, kv_cache, bound", [(None, None, 0.03), ("w8a8", "int8", 0.05)])
def test_bfloat16_is_close_and_stays_bfloat16(scheme, kv_cache, bound):
    config = replace(WIDE, dtype="bfloat16", kv_cache=kv_cache)
    params = random_params(config)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    if scheme:
        params, exact = quantized(params, scheme), widened(quantized(exact, scheme))
    tokens = np.random.default_rng(5).integers(0, 97, (2, 10))
    got, cache = forward(params, config, tokens, init_cache(config, 2, 16))
    want, _ = forward(exact, WIDE, tokens)
    assert got.dtype == jnp.float32 and params.norm.dtype == jnp.bfloat16
    assert cache.k[0].values.dtype == jnp.int8 if kv_cache else cache.k[0].dtype == jnp.bfloat16
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


def test_gradient_equals_finite_differences():
    params = random_params(SMALL)
    tokens = np.random.default_rng(6).integers(0, 97, (2, 8))

    def loss(params):
        scores = jax.nn.log_softmax(forward(params, SMALL, tokens[:, :-1])[0])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    gradient = jax.grad(loss)(params)
    direction = jax.tree.map(lambda g: g / jnp.linalg.norm(g), gradient)
    step = 1e-3
    loss = jax.jit(loss)
    ahead, behind = (loss(jax.tree.map(lambda p, d: p + s * d, params, direction)) for s in (step, -step))  # noqa: B023
    expected = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-2)


@pytest.mark.parametrize("scheme", ["int8", "int8-g128"])
def test_gradient_passes_through_int8_weights(scheme):
    small = quantized(random_params(WIDE), scheme)
    tokens = np.array([[1, 2, 3]])

    def gradient(params):
        def loss(norms):
            layers = tuple(replace(layer, attn_norm=norms[0], ffn_norm=norms[1]) for layer in params.layers)
            return jax.nn.log_softmax(forward(replace(params, layers=layers), WIDE, tokens)[0])[..., 5].sum()

        return jax.grad(loss)((params.layers[0].attn_norm, params.layers[0].ffn_norm))

    for got, want in zip(gradient(small), gradient(widened(small)), strict=True):
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) > 0


@pytest.mark.parametrize("scheme, kv_cache", [(None, None), ("w8a8", "int8")])
def test_vmap_equals_a_loop(scheme, kv_cache):
    config = replace(WIDE, kv_cache=kv_cache)
    params = [random_params(config, seed) for seed in range(3)]
    if scheme:
        params = [quantized(p, scheme) for p in params]
    tokens = np.random.default_rng(7).integers(0, 97, (3, 1, 6))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    run = lambda p, t: forward(p, config, t, init_cache(config, 1, 8))[0]  # noqa: E731
    got = jax.vmap(run)(stacked, tokens)
    for i in range(3):
        np.testing.assert_allclose(got[i], run(params[i], tokens[i]), atol=2e-5)


def scheme_of(weight):
    if not isinstance(weight, QTensor):
        return None
    if weight.int8_inputs:
        return "w8a8"
    return "int8-g128" if weight.scale.ndim == weight.values.ndim else "int8"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied, keep_float", [(False, ()), (True, ()), (False, ("output", "wqkv")), (True, ["embed"])])
def test_abstract_params_are_what_quantize_params_makes(scheme, tied, keep_float):
    config = replace(WIDE, tied=tied, dtype="bfloat16")
    params = random_params(config)
    abstract = abstract_params(config, scheme, keep_float)
    in_jax = jax.eval_shape(lambda p: quantize_params(p, scheme, keep_float), params)
    params = jax.tree.map(np.asarray, params)
    in_numpy = quantize_params(params, scheme, keep_float)
    for made in (in_jax, in_numpy):
        assert jax.tree.structure(made) == jax.tree.structure(abstract)  # which holds int8_inputs
        for got, want in zip(*map(jax.tree.leaves, (made, abstract)), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)

    for part, before in ((in_numpy, params), (in_numpy.layers[0], params.layers[0])):
        for name in vars(part).keys() - {"layers"}:
            weight, expected = getattr(part, name), scheme if name in MATRICES and name not in keep_float else None
            if expected == "w8a8" and name in ("embed", "output"):
                expected = "int8"
            assert matrix_scheme(name, scheme, keep_float) == expected and matrix_scheme(name, None) is None
            assert weight is None or scheme_of(weight) == expected
            assert expected or weight is getattr(before, name)  # norms and what is kept float: untouched
            if isinstance(weight, QTensor):
                before_it = getattr(before, name)
                if name == "w_down" and equalizes(scheme, keep_float):
                    before_it = before_it.astype(np.float32) * column_gain(column_fill(before_it))
                want = quantize(before_it, expected)
                if name == "w_gate_up" and equalizes(scheme, keep_float):
                    want = divide_up(want, column_gain(column_fill(before.w_down)))
                np.testing.assert_array_equal(weight.values, want.values)
                np.testing.assert_array_equal(weight.scale, want.scale)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int4",), "'int4'.*int8, int8-g128, w8a8"),
        (("int8", ("norm",)), "'norm'.*embed, wqkv, wo, w_gate_up, w_down, output"),
        (("int8", ("embed", "w1")), "'w1'"),
        (("w8a8", ("output",)), "'output'.*w_down$"),  # of a tied model
        ((None, ("wqkv",)), "'wqkv'.*nothing is quantized"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        abstract_params(replace(SMALL, tied="output" in arguments[-1]), *arguments)
    assert "\n" not in str(caught.value)


# Published counts: each release's model card or paper, or the sum over its checkpoint's tensors
COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "tinyllama-1.1b": 1_100_048_384,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


def test_presets_have_the_published_parameter_counts():
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(abstract_params(c))) for name, c in PRESETS.items()}
    assert counts == COUNTS
    with pytest.raises(InputError, match="llama2-70b"):
        preset("llama-9000b")


def test_init_params_has_the_shapes_and_deviations_it_says():
    params = init_params(replace(SMALL, dim=96, vocab_size=500), jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(replace(SMALL, dim=96, vocab_size=500))
    )
    assert abs(params.embed.std() / 0.02 - 1) < 0.02
    assert abs(params.layers[1].w_down.std() / 0.01 - 1) < 0.05
    assert (params.layers[0].ffn_norm == 1).all()


def test_frequencies_of_llama31():
    """Values computed once by Meta's apply_scaling for head_dim 128, theta 500000, factor 8."""
    f = rope_frequencies(replace(preset("llama3-8b"), rope_scaling=RopeScaling(8.0)))
    plain = 500000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(f[:29], plain[:29], rtol=1e-6)
    np.testing.assert_allclose(f[36:], plain[36:] / 8, rtol=1e-6)
    assert (np.diff(f) < 0).all()


@pytest.mark.parametrize(
    "change",
    [
        dict(n_kv_heads=3),
        dict(head_dim=7),
        dict(dim=0),
        dict(dim=2.0),
        dict(norm_eps=math.nan),
        dict(dtype="int8"),
        dict(kv_cache="int4"),
        dict(qk_norm=1),
        dict(sliding_window=0),
    ],
)
def test_impossible_configs_are_refused(change):
    with pytest.raises(ModelError, match=next(iter(change))):
        replace(SMALL, **change)


def test_config_survives_json():
    for config in (*VARIANTS.values(), replace(SMALL, kv_cache="int8")):
        assert ModelConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelError, match="colour"):
        ModelConfig.from_json(SMALL.to_json() | {"colour": 3})
    with pytest.raises(ModelError, match="ffn_dim"):
        ModelConfig.from_json({k: v for k, v in SMALL.to_json().items() if k != "ffn_dim"})
