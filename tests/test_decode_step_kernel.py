"""The kernel for a whole token against float64 numpy, on a GPU or emulated, and what it compiles to."""

import json
import re
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.config import preset

pytest.importorskip("triton", reason="kernels are written in Gluon, a part of Triton")
import gluon_emulator  # noqa: E402

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
EPS = 1e-5
# K, G, H, D, F, V, S, layers
SIZES = {
    "tiny": (2, 3, 16, 96, 80, 70, 64, 3),  # programs without a row, and rows shorter than a tile
    "one head": (1, 4, 32, 640, 1008, 1111, 96, 2),
    "wide heads": (8, 1, 128, 1040, 2832, 999, 640, 2),
    "split": (4, 8, 64, 2048, 5632, 3201, 1024, 2),  # the last slots are shared by four programs a query head
    "many heads": (35, 4, 64, 512, 1360, 300, 300, 2),  # more than there are programs
}
KINDS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8")]


def rounded(values, dtype):
    """float64, of what is stored in dtype."""
    return np.asarray(values, np.float64).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(float)


class Model:
    """Random weights of sizes as in SIZES, and a token's way through them in float64, rounded where it is stored.

    With rounds_inputs those of products are rounded, too, where they are normalized.  Weights are so small that numbers
    which are rounded to the other side do not grow from layer to layer.
    """

    def __init__(self, sizes, dtype, weights, rounds_inputs=False):
        self.dtype, self.rng, self.rounds_inputs = dtype, np.random.default_rng(0), rounds_inputs
        self.K, self.G, self.H, self.D, self.F, self.V, self.S, self.L = K, G, H, D, F, V, S, L = sizes
        shapes = [(K, G + 2, H, D), (D, K * G * H), (2, F, D), (D, F)]
        self.layers = [[self.matrix(shape, weights) for shape in shapes] for _ in range(L)]
        self.norms = [rounded(self.rng.uniform(0.5, 1.5, D), dtype) for _ in range(2 * L + 1)]
        self.output = self.matrix((V, D), weights)
        self.scaled = weights == "int8"

    def matrix(self, shape, weights):
        """A matrix as an array, its scales, and what both stand for in float64."""
        if weights == "int8":
            values = self.rng.integers(-127, 128, shape, np.int8)
            scale = self.rng.uniform(0.5, 1.5, shape[:-1]).astype(np.float32) / np.float32(128 * shape[-1] ** 0.5)
            return jnp.asarray(values), jnp.asarray(scale), values * scale[..., None].astype(float)
        values = jnp.asarray(self.rng.normal(size=shape) / 2 / shape[-1] ** 0.5, weights)
        return values, None, np.asarray(values, np.float64)

    def constants(self):
        """layers, without their caches, norm, output and output_scale of decode_step."""
        norms = [jnp.asarray(norm, self.dtype) for norm in self.norms]
        layers = []
        for number, matrices in enumerate(self.layers):
            wqkv, wo, w_gate_up, w_down = (values for values, _, _ in matrices)
            scales = tuple(scale for _, scale, _ in matrices) if self.scaled else None
            layers.append((norms[2 * number], wqkv, wo, norms[2 * number + 1], w_gate_up, w_down, scales))
        return layers, norms[-1], self.output[0], self.output[1]

    def cache(self, position):
        """Random L keys and L values [1, K, S, H], NaN from position on."""
        stored = np.where(np.arange(self.S) < position, 0, np.nan)[:, None]
        shape = 1, self.K, self.S, self.H
        made = [rounded(self.rng.normal(size=shape) + stored, self.dtype) for _ in range(2 * self.L)]
        return made[: self.L], made[self.L :]

    def normalized(self, x, norm):
        inputs = rounded(x * norm, self.dtype) if self.rounds_inputs else x * norm
        return inputs / np.sqrt(np.mean(x * x) + EPS)

    def step(self, x, cos, sin, position, keys, values):
        """Logits float64 [V] behind x [D]; its keys and values go into the caches, if there is room."""
        G, H, S = self.G, self.H, self.S
        for number, (wqkv, wo, w_gate_up, w_down) in enumerate(self.layers):
            k_cache, v_cache = keys[number][0], values[number][0]
            qkv = rounded(wqkv[2] @ self.normalized(x, self.norms[2 * number]), self.dtype)
            low, high = qkv[:, : G + 1, : H // 2], qkv[:, : G + 1, H // 2 :]
            turned = rounded(np.concatenate([low * cos - high * sin, high * cos + low * sin], -1), self.dtype)
            if position < S:
                k_cache[:, position], v_cache[:, position] = turned[:, G], qkv[:, G + 1]
            filled = min(position + 1, S)
            scores = np.einsum("kgh,ksh->kgs", turned[:, :G], k_cache[:, :filled]) / np.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            attended = rounded(np.einsum("kgs,ksh->kgh", weights, v_cache[:, :filled]).reshape(-1), self.dtype)
            x = rounded(x + wo[2] @ attended, self.dtype)
            gate, up = w_gate_up[2] @ self.normalized(x, self.norms[2 * number + 1])
            x = rounded(x + w_down[2] @ rounded(gate / (1 + np.exp(-gate)) * up, self.dtype), self.dtype)
        return self.output[2] @ self.normalized(x, self.norms[-1])


class Rows:
    """Tokens of several rows of a Model, and their caches; a row whose position is below 0 has ended."""

    def __init__(self, model, positions, tokens=1):
        self.model, self.positions = model, positions
        x = model.rng.normal(size=(tokens, len(positions), model.D)) * np.logspace(-1, 0, len(positions))[:, None]
        self.x = rounded(x, model.dtype)  # of each token
        angles = model.rng.uniform(-3, 3, (tokens, len(positions), model.H // 2)).astype(np.float32)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        caches = zip(*(model.cache(max(position, 0)) for position in positions), strict=True)
        self.keys, self.values = ([np.concatenate(rows) for rows in zip(*arrays, strict=True)] for arrays in caches)

    def check(self, logits, keys, values, bound):
        """Compare logits [tokens, B, V], and the caches after them, with those of each row by itself."""
        for row, start in enumerate(self.positions):
            mine = [[array[row : row + 1] for array in arrays] for arrays in (self.keys, self.values)]
            for number in range(len(self.x)):
                assert np.isfinite(np.asarray(logits[number][row], np.float64)).all()
                if start >= 0:
                    token = self.x[number, row], self.cos[number, row], self.sin[number, row], start + number
                    want = self.model.step(*token, *mine)  # this writes the caches
                    assert relative(logits[number][row], want) < bound, (row, number)
            filled = min(start + len(self.x), self.model.S) if start >= 0 else 0
            for got, want in zip((*keys, *values), (*mine[0], *mine[1]), strict=True):
                got = np.asarray(got[row : row + 1], np.float64)
                assert np.isnan(got[:, :, filled:]).all()
                if filled:
                    assert relative(got[:, :, :filled], want[:, :, :filled]) < bound


def relative(got, want):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape and np.isfinite(want).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, weights", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_steps(size, dtype, weights):
    """Some steps from several positions on, the cache of each given to the next one."""
    from jaxllm.kernels.decode_step import decode_step

    model = Model(SIZES[size], dtype, weights)

    @jax.jit
    def run(xs, cos, sin, start, keys, values, constants):
        def step(carry, given):
            (keys, values), position = carry
            layers, norm, output, scale = constants
            layers = [(*layer, k, v) for layer, k, v in zip(layers, keys, values, strict=True)]
            x, cos, sin = given
            positions = jnp.full((1, 1), position, jnp.int32)
            logits, keys, values = decode_step(x, cos, sin, positions, layers, norm, output, scale, EPS)
            return ((keys, values), position + 1), logits[0]

        carry, logits = jax.lax.scan(step, ((keys, values), start), (xs, cos, sin))
        return logits, *carry[0]

    for start in sorted({0, 5, model.S // 2, model.S - 2, model.S}):
        keys, values = model.cache(start)
        xs = rounded(model.rng.normal(size=(3, model.D)), dtype)
        angles = model.rng.uniform(-3, 3, (3, model.H // 2)).astype(np.float32)
        cos, sin = np.cos(angles), np.sin(angles)
        arguments = [jnp.asarray(xs[:, None, None], dtype), *(jnp.asarray(a[:, None, None]) for a in (cos, sin)), start]
        caches = [tuple(jnp.asarray(a, dtype) for a in arrays) for arrays in (keys, values)]
        runs = [jax.device_get(run(*arguments, *caches, model.constants())) for _ in range(3)]
        for again in runs[1:]:  # bit for bit: NaN is not equal to itself
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view("u1"), b.view("u1")), again, runs[0])
        logits, got_keys, got_values = runs[0]
        for number in range(3):
            want = model.step(xs[number], cos[number], sin[number], start + number, keys, values)
            assert relative(logits[number], want) < BOUND[dtype], (start, number)
        filled = min(start + 3, model.S)
        for got, want in zip((*got_keys, *got_values), (*keys, *values), strict=True):
            got = np.asarray(got, np.float64)
            assert np.isnan(got[:, :, filled:]).all()
            assert relative(got[:, :, :filled], want[:, :, :filled]) < BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [2, 3, 5, 8])
def test_steps_of_rows(size, batch, weights):
    """Some steps of rows at different positions, of which one has ended, and one is beyond its last slot."""
    from jaxllm.kernels.decode_step import decode_step

    if (size, batch) == ("many heads", 8):
        pytest.skip("too many inputs for shared memory")
    model = Model(SIZES[size], "bfloat16", weights, rounds_inputs=True)
    S = model.S
    rows = Rows(model, (S // 2, -1, 5, S, 0, S - 2, S // 3, S // 2 + 1)[:batch], tokens=3)
    start = jnp.array(rows.positions, jnp.int32)[:, None]

    @jax.jit
    def run(xs, cos, sin, keys, values, constants):
        def step(carry, given):
            (keys, values), positions = carry
            layers, norm, output, scale = constants
            layers = [(*layer, k, v) for layer, k, v in zip(layers, keys, values, strict=True)]
            x, cos, sin = given
            logits, keys, values = decode_step(x, cos, sin, positions, layers, norm, output, scale, EPS)
            return ((keys, values), jnp.where(positions < 0, positions, positions + 1)), logits

        carry, logits = jax.lax.scan(step, ((keys, values), start), (xs, cos, sin))
        return logits, *carry[0]

    caches = [tuple(jnp.asarray(a, "bfloat16") for a in arrays) for arrays in (rows.keys, rows.values)]
    arguments = jnp.asarray(rows.x, "bfloat16")[:, :, None], *(a[:, :, None] for a in (rows.cos, rows.sin))
    runs = [jax.device_get(run(*arguments, *caches, model.constants())) for _ in range(3)]
    for again in runs[1:]:  # bit for bit: NaN is not equal to itself
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view("u1"), b.view("u1")), again, runs[0])
    rows.check(*runs[0], BOUND["bfloat16"])


# sizes, types of activations and of weights, position, programs, other constants
EMULATED = {
    # a program has no row of w_gate_up or of the output matrix, and query heads are split in three, two, ...
    "three splits": ((1, 2, 16, 16, 8, 3, 32, 2), "bfloat16", "bfloat16", 20, 6, {"SPLIT": 8}),
    "two splits, last slot": ((1, 2, 16, 16, 16, 3, 32, 1), "float32", "int8", 31, 5, {"SPLIT": 8}),
    "two splits, no slot": ((1, 2, 16, 16, 16, 3, 32, 1), "bfloat16", "int8", 32, 5, {"SPLIT": 8}),
    "first slot": ((1, 2, 16, 16, 16, 3, 32, 1), "float32", "float32", 0, 4, {}),
    # ... more query heads than programs, and four slots of the ring for 25 tiles a layer
    "small ring": ((2, 3, 16, 96, 80, 70, 64, 2), "bfloat16", "bfloat16", 63, 3, {"SHARED_MEMORY": 95 << 10}),
    # ... rows of two tiles, the second one not full, logits in two pieces, and more slots than are attended at a time
    "wide head": ((1, 2, 128, 520, 24, 790, 40, 1), "float32", "float32", 37, 3, {}),
    "long rows": ((1, 1, 16, 48, 1032, 40, 16, 1), "bfloat16", "bfloat16", 15, 3, {}),
    "long int8 rows": ((1, 1, 16, 48, 2064, 40, 16, 1), "bfloat16", "int8", 16, 5, {}),
}
# of a vector of few numbers, one that is rounded to the other side is that much
EMULATED_BOUND = {"float32": 1e-5, "bfloat16": 2e-3}


# of several rows: sizes, type of weights, positions, programs, other constants
EMULATED_ROWS = {
    # more parts than programs, a program's logits in two pieces, and a ring of few slots
    "two rows": ((1, 2, 16, 16, 16, 520, 32, 1), "int8", (31, 5), 2, {"SHARED_MEMORY": 120 << 10}),
    # query heads are split; one row has ended, and one is beyond its slots; fewer numbers than programs
    "three rows": ((1, 2, 16, 16, 16, 3, 48, 2), "bfloat16", (47, -1, 48), 9, {"PART_SLOTS": 1}),
    # w_down in sections, the last one not full, and rows received two at a time
    "five rows": ((1, 2, 16, 80, 1040, 40, 16, 1), "bfloat16", (15, 2, 8, -1, 0), 5, {"WORDS_AT_A_TIME": 4}),
    "eight rows": ((1, 1, 16, 80, 2064, 71, 16, 1), "int8", (15, 16, -3, 2, 8, 9, 1, 0), 5, {}),
}


@pytest.mark.parametrize("name", EMULATED_ROWS)
def test_emulated_step_of_rows(name):
    sizes, weights, positions, programs, constants = EMULATED_ROWS[name]
    rows = Rows(Model(sizes, "bfloat16", weights, rounds_inputs=True), positions)
    logits, keys, values = emulate_rows(rows, programs, **constants)
    rows.check(logits[None], keys, values, 2 * EMULATED_BOUND["bfloat16"])


def emulate_rows(rows, programs, **constants):
    """Logits, keys and values of a step of the kernel in the emulator."""
    from jaxllm.kernels import decode_step as module

    layers, norm, output, scale = rows.model.constants()
    caches = ([jnp.asarray(array, "bfloat16") for array in arrays] for arrays in (rows.keys, rows.values))
    layers = [(*layer, k, v) for layer, k, v in zip(layers, *caches, strict=True)]
    kernels = gluon_emulator.load(module, programs, **constants)
    return kernels.decode_step(
        jnp.asarray(rows.x[0], "bfloat16")[:, None], jnp.asarray(rows.cos[0])[:, None],
        jnp.asarray(rows.sin[0])[:, None], jnp.array(rows.positions, jnp.int32)[:, None],
        layers, norm, output, scale, EPS,
    )  # fmt: skip


def emulate(model, x, cos, sin, position, keys, values, programs, **constants):
    """Logits, keys and values as float64, of a step of the kernel in the emulator."""
    from jaxllm.kernels import decode_step as module

    layers, norm, output, scale = model.constants()
    caches = ([jnp.asarray(array, model.dtype) for array in arrays] for arrays in (keys, values))
    layers = [(*layer, k, v) for layer, k, v in zip(layers, *caches, strict=True)]
    kernels = gluon_emulator.load(module, programs, **constants)
    logits, *caches = kernels.decode_step(
        jnp.asarray(x, model.dtype)[None, None], jnp.asarray(cos)[None, None], jnp.asarray(sin)[None, None],
        jnp.full((1, 1), position, jnp.int32), layers, norm, output, scale, EPS,
    )  # fmt: skip
    return logits[0].astype(np.float64), *([array.astype(np.float64) for array in arrays] for arrays in caches)


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_step(name):
    sizes, dtype, weights, position, programs, constants = EMULATED[name]
    model = Model(sizes, dtype, weights)
    keys, values = model.cache(position)
    x = rounded(model.rng.normal(size=model.D), dtype)
    angles = model.rng.uniform(-3, 3, model.H // 2).astype(np.float32)
    token = x, np.cos(angles), np.sin(angles), position, keys, values
    logits, got_keys, got_values = emulate(model, *token, programs, **constants)
    want = model.step(*token)  # this writes keys and values
    assert relative(logits, want) < EMULATED_BOUND[dtype]
    filled = min(position + 1, model.S)
    for got, want in zip((*got_keys, *got_values), (*keys, *values), strict=True):
        assert np.isnan(got[:, :, filled:]).all()
        assert relative(got[:, :, :filled], want[:, :, :filled]) < EMULATED_BOUND[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_emulated_zeros(dtype):
    """Zeros travel too: a program that waits for a word takes 0 for one that is not there."""
    model = Model((1, 1, 16, 16, 16, 5, 16, 1), dtype, dtype)
    zeros, keys, values = np.zeros(16), *model.cache(0)
    logits, got_keys, got_values = emulate(model, zeros, np.ones(8), np.zeros(8), 0, keys, values, 2)
    assert not logits.any() and not got_keys[0][:, :, 0].any() and not got_values[0][:, :, 0].any()


@pytest.mark.parametrize(
    "more, weights, message",
    [
        ({"F": 24}, "int8", "rows of weights must be a multiple of 16 bytes"),
        ({"F": 40960}, "bfloat16", "too much for 132 multiprocessors and their shared memory"),
        ({"PROGRAMS": 7}, "bfloat16", "too much for 7 multiprocessors"),
        ({"B": 9}, "bfloat16", "more than one must be at most 8, of bfloat16"),
        ({"B": 2, "PER_WORD": 1}, "bfloat16", "more than one must be at most 8, of bfloat16"),
        ({"B": 2}, "float32", "more than one must be at most 8, of bfloat16"),
        ({"B": 8, "D": 7168}, "int8", "too much for 132 multiprocessors and their shared memory"),
    ],
)
def test_what_does_not_fit(more, weights, message):
    from jaxllm.kernels.decode_step import make_plan

    sizes = dict(B=1, LAYERS=2, D=4096, K=8, G=4, H=128, F=14336, V=1000, S=512, PER_WORD=2, EPS=EPS)
    sizes |= dict(PROGRAMS=132, WEIGHT_BYTES=jnp.dtype(weights).itemsize, SCALED=weights == "int8")
    assert weights == "float32" or all(make_plan(**sizes | {"B": b}).SLOTS.value >= 4 for b in range(1, 9))
    with pytest.raises(ValueError, match=message):
        make_plan(**sizes | more)


# presets, types of activations and of weights, rows, bytes that may be spilled: none, but where a layer's 28672 inputs
# of a product are in registers at the same time, or for several rows; and then outside of loops
COMPILED = {
    "tinyllama-1.1b float32": ("tinyllama-1.1b", "float32", "float32", 1, 0),
    "tinyllama-1.1b bfloat16": ("tinyllama-1.1b", "bfloat16", "bfloat16", 1, 0),
    "tinyllama-1.1b int8": ("tinyllama-1.1b", "bfloat16", "int8", 1, 0),
    "llama2-7b bfloat16": ("llama2-7b", "bfloat16", "bfloat16", 1, 0),
    "llama2-7b int8": ("llama2-7b", "bfloat16", "int8", 1, 0),
    "llama2-70b int8": ("llama2-70b", "bfloat16", "int8", 1, 64),
    "tinyllama-1.1b bfloat16, 3 rows": ("tinyllama-1.1b", "bfloat16", "bfloat16", 3, 64),
    "llama2-7b bfloat16, 8 rows": ("llama2-7b", "bfloat16", "bfloat16", 8, 64),
    "llama2-7b int8, 8 rows": ("llama2-7b", "bfloat16", "int8", 8, 64),
    "llama2-70b int8, 6 rows": ("llama2-70b", "bfloat16", "int8", 6, 64),
}


def compile_all():
    """Print as JSON, for each of COMPILED: name, registers, spills, shared memory, the planned one, barriers, calls."""
    import compiler

    from jaxllm.kernels import decode_step as module

    jax.extend.backend.get_default_device = lambda: SimpleNamespace(compute_capability="9.0", core_count=132)
    plans, make_plan = [], module.make_plan
    module.make_plan = lambda **numbers: plans.append(make_plan(**numbers)) or plans[-1]
    array, found = jax.ShapeDtypeStruct, {}
    for key, (name, dtype, weights, b, _) in COMPILED.items():
        c = preset(name)
        k, g, h, d, f = c.n_kv_heads, c.group, c.head_dim, c.dim, c.ffn_dim
        matrices = [array(shape, weights) for shape in [(k, g + 2, h, d), (d, k * g * h), (2, f, d), (d, f)]]
        norm, cache, angles = array((d,), dtype), array((b, k, 4096, h), dtype), array((b, 1, h // 2), "float32")
        scales = tuple(array(w.shape[:-1], "float32") for w in matrices) if weights == "int8" else None
        wqkv, wo, w_gate_up, w_down = matrices
        layer = (norm, wqkv, wo, norm, w_gate_up, w_down, scales, cache, cache)
        arguments = [array((b, 1, d), dtype), angles, angles, array((b, 1), "int32"), [layer] * c.n_layers, norm]
        arguments += [array((c.vocab_size, d), weights), array((c.vocab_size,), "float32") if scales else None]
        (kernel,) = compiler.compile_for(90, module.decode_step, *arguments)
        barriers = re.findall(r"\bbar(?:rier)?\.\S*\s+0\s*[;,]", kernel.asm["ptx"])
        planned = plans[-1].MEMORY.value
        found[key] = kernel.name, kernel.registers, kernel.spills, kernel.shared, planned, len(barriers)
    print(json.dumps(found))


@pytest.mark.slow
def test_it_compiles_for_released_models(compiled_apart):
    found = compiled_apart("compile_all()")
    assert found.keys() == COMPILED.keys()
    for key, (_, registers, spills, shared, planned, barriers) in found.items():
        assert registers <= 128 and spills <= COMPILED[key][-1], key
        # the kernel takes it that its memory begins at address 0 of what is shared: it is all there is
        assert shared == planned <= 227 << 10, key
        # barriers that the compiler put there would wait for warps that do something else
        assert barriers == 0, key
