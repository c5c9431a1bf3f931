"""Converting Meta's checkpoints: against answers of Meta's own code, an independent rearrangement, and bad input."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import (
    CHECKPOINTS,
    SPLIT,
    TOKENIZER,
    as_arrays,
    as_stored,
    by_library,
    random_tensors,
    resident_bytes,
    tree,
    write_checkpoint,
)

from jaxllm.config import PRESETS, ModelConfig, RopeScaling
from jaxllm.convert import __main__ as convert
from jaxllm.convert import checkpoint, meta, pth
from jaxllm.errors import InputError, ModelError
from jaxllm.loader import load
from jaxllm.model import forward
from jaxllm.pipeline import generate_tokens
from jaxllm.sampling import Sampling
from jaxllm.tensor import QTensor


def run(source, out, *options):
    convert.main([str(source), str(out), *map(str, options)])
    return out


def stored(out):
    return by_library((out / "model.safetensors").read_bytes())


def settings_of(folder):
    return json.loads((folder / "params.json").read_text())


def joined(folder):
    """The whole tensors of a fixture checkpoint, by its README's rules."""
    shards = [pth.read(file) for file in sorted(folder.glob("*.pth"))]
    axes = {name: 1 if name == "tok_embeddings.weight" else SPLIT[name.split(".")[-2]] for name in shards[0]}
    return {
        name: shards[0][name] if axis is None else np.concatenate([shard[name] for shard in shards], axis)
        for name, axis in axes.items()
    }


def rearranged(tensors, n_heads, n_kv_heads):
    """Our tensors from Meta's whole ones, row by row: what conversion has to write, bit for bit."""
    embed = tensors["tok_embeddings.weight"]
    dim, group = embed.shape[1], n_heads // n_kv_heads
    size = dim // n_heads
    expected = {"embed": embed, "norm": tensors["norm.weight"]}
    output = tensors.get("output.weight")
    if output is not None and output.tobytes() != embed.tobytes():
        expected["output"] = output
    for i in range(sum(name.endswith("wq.weight") for name in tensors)):
        part = {name.split(".")[-2]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{i}.")}
        wqkv = np.zeros((n_kv_heads, group + 2, size, dim), embed.dtype)
        for kv in range(n_kv_heads):
            for row in range(size):
                wqkv[kv, group + 1, row] = part["wv"][kv * size + row]
            # Meta rotates rows 2p and 2p + 1 of a head together, jaxllm rows p and p + H/2
            for pair in range(size // 2):
                for half in (0, 1):
                    ours, metas = pair + half * (size // 2), 2 * pair + half
                    wqkv[kv, group, ours] = part["wk"][kv * size + metas]
                    for g in range(group):
                        wqkv[kv, g, ours] = part["wq"][(kv * group + g) * size + metas]
        expected |= {
            f"layers.{i}.attn_norm": part["attention_norm"],
            f"layers.{i}.wqkv": wqkv,
            f"layers.{i}.wo": part["wo"],
            f"layers.{i}.ffn_norm": part["ffn_norm"],
            f"layers.{i}.w_gate_up": np.stack([part["w1"], part["w3"]]),
            f"layers.{i}.w_down": part["w2"],
        }
    return expected


# Right input


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixture_against_metas_own_code(name, converted):
    model = load(converted(name), dtype="float32")
    oracle = np.load(CHECKPOINTS[name] / "oracle.npz")
    logits, _ = jax.jit(forward, static_argnums=1)(model.params, model.config, oracle["tokens"])
    np.testing.assert_allclose(logits, oracle["logits"], atol=2e-4, rtol=0)
    prompts = oracle["tokens"][:, :8].tolist()
    ids = np.concatenate(list(generate_tokens(model.params, model.config, prompts, Sampling(temperature=0.0), 16)), 1)
    np.testing.assert_array_equal(ids[:, :16], oracle["greedy_ids"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixture_bit_for_bit(name, converted):
    settings = settings_of(CHECKPOINTS[name])
    heads = settings["n_heads"], settings.get("n_kv_heads", settings["n_heads"])
    expected = rearranged(joined(CHECKPOINTS[name]), *heads)
    assert stored(converted(name)) == {name: as_stored(array) for name, array in expected.items()}
    assert (converted(name) / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "shards", "embed_axis", "kv_heads", "output"),
    [
        ("bfloat16", 2, 1, 8, "own"),  # LLaMA 1 and 2
        ("float16", 4, 1, 2, "own"),  # grouped-query attention, less kv heads than shards
        ("float32", 8, 1, 1, "own"),  # multi-query attention
        ("bfloat16", 8, 0, 8, "own"),  # LLaMA 3
        ("bfloat16", 4, 0, 4, "embedding"),
        ("float32", 4, 1, 4, "absent"),
    ],
)
def test_random_checkpoint_bit_for_bit(tmp_path, dtype, shards, embed_axis, kv_heads, output):
    tensors = random_tensors(dtype, dim=64, n_heads=8, n_kv_heads=kv_heads, ffn_dim=96, output=output)
    settings = {"n_heads": 8} if kv_heads == 8 else {"n_heads": 8, "n_kv_heads": kv_heads}
    one = run(write_checkpoint(tmp_path / "one", tensors, **settings), tmp_path / "out-one")
    many = run(write_checkpoint(tmp_path / "many", tensors, shards, embed_axis, **settings), tmp_path / "out-many")
    expected = {name: as_stored(array) for name, array in rearranged(tensors, 8, kv_heads).items()}
    assert stored(many) == expected
    assert ("output" in expected) == (output == "own")
    assert tree(one) == tree(many)
    config = json.loads((many / "config.json").read_text())
    assert (config["format"], config["format_version"], config["quantization"]) == ("jaxllm", 1, None)
    assert ModelConfig.from_json(config["config"]) == ModelConfig(
        vocab_size=512, dim=64, n_layers=2, n_heads=8, n_kv_heads=kv_heads, head_dim=8, ffn_dim=96, max_len=4096,
        tied=output != "own", dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("block", [1, 96, 1000])
def test_blocks_of_any_size_give_the_same(tmp_path, monkeypatch, block):
    source = write_checkpoint(tmp_path / "source", shards=4)
    whole = [run(source, tmp_path / "float"), run(source, tmp_path / "int8", "--quantize", "int8")]
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    parts = [run(source, tmp_path / "float-2"), run(source, tmp_path / "int8-2", "--quantize", "int8")]
    assert list(map(tree, whole)) == list(map(tree, parts))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_what_was_read_is_no_longer_held_in_memory(tmp_path):
    source = write_checkpoint(tmp_path / "source", random_tensors(dim=256, ffn_dim=1024), 2)
    checkpoint = meta.open_checkpoint(source)
    size = sum(file.stat().st_size for file in source.glob("*.pth"))

    peak = 0
    for weight in checkpoint.weights.values():
        for _ in weight.blocks():
            peak = max(peak, resident_bytes(source))
    assert size > 4e6 and peak < size / 8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tmp_path, dtype):
    tensors = random_tensors("float32")
    out = run(write_checkpoint(tmp_path / "source", tensors, 2), tmp_path / "out", "--dtype", dtype)
    expected = rearranged(tensors, 4, 4)
    assert stored(out) == {name: as_stored(array.astype(dtype)) for name, array in expected.items()}
    assert json.loads((out / "config.json").read_text())["config"]["dtype"] == dtype


def test_mixed_dtypes_need_dtype(tmp_path):
    tensors = random_tensors() | {"norm.weight": np.ones(32, np.float32)}
    source = write_checkpoint(tmp_path / "source", tensors)
    message = refusal(source, tmp_path / "work" / "out")
    assert "bfloat16, float32" in message and "--dtype" in message
    expected = {name: array.astype(np.float32) for name, array in rearranged(tensors, 4, 4).items()}
    out = run(source, tmp_path / "out", "--dtype", "float32")
    assert stored(out) == {name: as_stored(array) for name, array in expected.items()}


def test_numbers_that_are_not_finite_pass_where_nothing_is_lost(tmp_path):
    tensors = random_tensors("bfloat16")
    tensors["norm.weight"][:3] = np.nan, np.inf, -np.inf
    source = write_checkpoint(tmp_path / "source", tensors)
    for dtype in "bfloat16", "float32":
        norm = as_arrays(run(source, tmp_path / dtype, "--dtype", dtype) / "model.safetensors")["norm"]
        np.testing.assert_array_equal(norm.astype(np.float32), tensors["norm.weight"].astype(np.float32))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_int8(name, converted):
    floats = {tensor: array.astype(np.float64) if array.ndim > 1 else array
              for tensor, array in as_arrays(converted(name) / "model.safetensors").items()}  # fmt: skip
    for tensor in [tensor for tensor in floats if tensor.endswith("w_down")]:
        # a column grows until one of its weights is its row's largest, and what feeds it shrinks
        down = np.abs(floats[tensor])
        gain = 1 / (down / down.max(axis=1, keepdims=True)).max(axis=0)
        floats[tensor] = floats[tensor] * gain
        floats[tensor.replace("w_down", "w_gate_up")][1] /= gain[:, None]
    out = converted(name, "--quantize", "int8")
    int8 = as_arrays(out / "model.safetensors")
    for tensor, array in floats.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(int8.pop(tensor), array, strict=True)
            continue
        values, scale = int8.pop(f"{tensor}.values"), int8.pop(f"{tensor}.scale")
        assert values.dtype == np.int8 and scale.dtype == np.float32
        np.testing.assert_allclose(scale, np.abs(array).max(axis=-1) / 127, rtol=2**-21)
        levels = array / scale[..., None].astype(np.float64)
        clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
        np.testing.assert_array_equal(values[clear], np.rint(levels[clear]))
        assert np.abs(values - levels).max() < 0.5001
    assert not int8

    model = load(out, dtype="float32")
    oracle = np.load(CHECKPOINTS[name] / "oracle.npz")

    def dequantized(leaf):  # as int8 times scale in numpy, float32 like the rest
        return np.asarray(leaf.values) * np.asarray(leaf.scale)[..., None] if isinstance(leaf, QTensor) else leaf

    plain = jax.tree.map(dequantized, model.params, is_leaf=lambda node: isinstance(node, QTensor))
    run_forward = jax.jit(forward, static_argnums=1)
    ours, expected = (run_forward(params, model.config, oracle["tokens"])[0] for params in (model.params, plain))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    # and int8 is still that model: uncorrelated logits would be off by 1.7 standard deviations
    assert np.std(ours - oracle["logits"]) < 0.05 * np.std(oracle["logits"])


def test_tokenizer_elsewhere(tmp_path):
    source = write_checkpoint(tmp_path / "models" / "source")
    (source / "tokenizer.model").rename(tmp_path / "models" / "tokenizer.model")  # where Meta's download puts it
    above = run(source, tmp_path / "above")
    (tmp_path / "models" / "tokenizer.model").rename(tmp_path / "another.name")
    named = run(source, tmp_path / "named", "--tokenizer", tmp_path / "another.name")
    assert tree(above) == tree(named)
    (source / "tokenizer.model").write_bytes(b"not used")
    assert tree(run(source, tmp_path / "both", "--tokenizer", tmp_path / "another.name")) == tree(named)


def test_out_in_folders_that_are_new_and_files_like_any_other(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    old = os.umask(0o027)
    try:
        out = run(source, tmp_path / "a" / "b" / "out")
    finally:
        os.umask(old)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "tokenizer.model"], 0o640
    )
    assert set(tree(tmp_path / "a")) == {Path("b"), Path("b/out"), *(Path("b/out") / f.name for f in out.iterdir())}


def test_out_inside_source_leaves_the_rest_alone(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    before = tree(source)
    out = run(source, source / "converted")
    assert {path: data for path, data in tree(source).items() if "converted" not in path.parts} == before
    assert tree(out) == tree(run(source, tmp_path / "out"))


def test_overwrite_replaces_a_model_whole(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    other = write_checkpoint(tmp_path / "other", random_tensors("float32", n_layers=1))
    expected = tree(run(source, tmp_path / "expected"))
    out = run(other, tmp_path / "work" / "out")
    (out / "left.safetensors").write_bytes(b"of the old model")
    assert "--overwrite" in refusal(source, out)
    run(source, out, "--overwrite")
    assert tree(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    for path in (tmp_path / "work" / "new", tmp_path / "work" / "empty"):
        if path.name == "empty":
            path.mkdir()
        assert tree(run(source, path, "--overwrite")) == expected


def test_overwrite_of_a_link_replaces_the_link(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    kept = run(source, tmp_path / "kept")
    before = tree(kept)
    link = tmp_path / "link"
    link.symlink_to(kept)
    run(source, link, "--overwrite", "--dtype", "float32")
    assert not link.is_symlink() and (link / "config.json").is_file()
    assert tree(kept) == before


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta")
RELEASES = {  # params.json as Meta shipped it, in the order of SIZES, and use_scaled_rope
    "llama-7b": (4096, 32, 32, None, 256, None, 1e-6, None),
    "llama-13b": (5120, 40, 40, None, 256, None, 1e-6, None),
    "llama-33b": (6656, 60, 52, None, 256, None, 1e-6, None),
    "llama-65b": (8192, 80, 64, None, 256, None, 1e-5, None),
    "llama2-7b": (4096, 32, 32, None, 256, None, 1e-5, None),
    "llama2-13b": (5120, 40, 40, None, 256, None, 1e-5, None),
    "llama2-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5, None),
    "llama3-8b": (4096, 32, 32, 8, 1024, 1.3, 1e-5, 500000.0),
    "llama3-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5, 500000.0),
    "llama3.2-1b": (2048, 16, 32, 8, 256, 1.5, 1e-5, 500000.0),
    "llama3.2-3b": (3072, 28, 24, 8, 256, 1.0, 1e-5, 500000.0),
}


@pytest.mark.parametrize("name", RELEASES)
def test_what_params_json_leaves_unsaid(name):
    settings = {key: value for key, value in zip(SIZES, RELEASES[name], strict=True) if value is not None}
    settings |= {"use_scaled_rope": True} if "3.2" in name else {}
    config = PRESETS[name]
    assert meta._ffn_dim(settings) == config.ffn_dim
    assert meta._max_len(settings) == config.max_len
    scaling = meta._rope_scaling(settings)
    assert (scaling and RopeScaling(**scaling)) == config.rope_scaling


def test_rope_of_llama_3(tmp_path):
    source = write_checkpoint(tmp_path / "source", rope_theta=500000.0, use_scaled_rope=True, rope_scaling_factor=8.0)
    config = load(run(source, tmp_path / "out")).config
    assert (config.rope_theta, config.max_len) == (500000.0, 131072)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


# Bad input: one line that names the file and the remedy, and nothing left behind


def refusal(source, out, *options, error=ModelError):
    """The message with which conversion refuses; checks that nothing on the disk changed."""
    root = source.parent
    before = tree(root)
    start = time.monotonic()
    with pytest.raises(error) as info:
        run(source, out, *options)
    assert time.monotonic() - start < 5
    assert tree(root) == before
    message = str(info.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


def edit_params(folder, **changes):
    settings = {name: value for name, value in (settings_of(folder) | changes).items() if value != "absent"}
    (folder / "params.json").write_text(json.dumps(settings))


def params(**changes):
    return lambda folder: edit_params(folder, **changes)


def params_text(text):
    return lambda folder: (folder / "params.json").write_bytes(text)


def delete(name):
    return lambda folder: (folder / name).unlink()


def edit_shards(change, shards=slice(None)):
    def edit(folder):
        for file in sorted(folder.glob("*.pth"))[shards]:
            tensors = {name: np.array(array) for name, array in pth.read(file).items()}
            change(tensors)
            pth.write(file, tensors)

    return edit


def edit_tensor(name, change, shards=slice(None)):
    return edit_shards(lambda tensors: tensors.update({name: change(tensors[name])}), shards)


def cut(name, share):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return edit


def tokenizer(data):
    return lambda folder: (folder / "tokenizer.model").write_bytes(data)


def vocabulary(size):
    def edit(folder):
        tensors = random_tensors(vocab_size=size)
        shutil.rmtree(folder)
        write_checkpoint(folder, tensors, 4)

    return edit


class Call:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def call_something(folder):
    with zipfile.ZipFile(folder / "consolidated.02.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"tok_embeddings.weight": Call()}, 2))


WQ, WK, EMBED = "layers.1.attention.wq.weight", "layers.0.attention.wk.weight", "tok_embeddings.weight"
KV = "wk", "wv"
ONE = slice(2, 3)

Bad = namedtuple("Bad", "spoil says options", defaults=((),))
BAD = {
    "no shard 0": Bad(delete("consolidated.00.pth"), ["{source}/consolidated.00.pth is missing"]),
    "no shard 2": Bad(delete("consolidated.02.pth"), ["{source}/consolidated.02.pth is missing"]),
    "no last shard": Bad(delete("consolidated.03.pth"), ["{source}", "3 file(s)", "is a shard missing"]),
    "no shards": Bad(lambda folder: [f.unlink() for f in folder.glob("*.pth")], ["{source}", "consolidated.NN.pth"]),
    "shard number": Bad(
        lambda folder: (folder / "consolidated.02.pth").rename(folder / "consolidated.9999999.pth"),
        ["{source}/consolidated.02.pth is missing"],
    ),
    "shapes disagree": Bad(
        edit_tensor(WQ, lambda a: a[:-1], ONE), ["{source}/consolidated.02.pth", WQ, "[7, 32]", "[8, 32]"]
    ),
    "dtypes disagree": Bad(
        edit_tensor(WQ, lambda a: a.astype("float32"), ONE), ["{source}/consolidated.02.pth", WQ, "float32", "bfloat16"]
    ),
    "names disagree": Bad(
        edit_shards(lambda t: t.update(other=t.pop(WQ)), ONE), ["{source}/consolidated.0", "these shards"]
    ),
    "one shard lacks a tensor": Bad(
        edit_shards(lambda t: t.pop(WQ), ONE), ["{source}/consolidated.02.pth has no", WQ, "consolidated.00.pth has"]
    ),
    "one shard has more": Bad(
        edit_shards(lambda t: t.update(more=t[WQ]), ONE), ["{source}/consolidated.00.pth has no 'more'"]
    ),
    "no wq": Bad(edit_shards(lambda t: t.pop(WQ)), ["{source}/consolidated.00.pth has no", WQ]),
    "no embedding": Bad(edit_shards(lambda t: t.pop(EMBED)), ["{source}/consolidated.00.pth has no", EMBED]),
    "no norm": Bad(edit_shards(lambda t: t.pop("norm.weight")), ["{source}/consolidated.00.pth has no 'norm.weight'"]),
    "extra tensor": Bad(
        edit_shards(lambda t: t.update({"layers.1.attention.wq.bias": t["norm.weight"]})),
        ["{source}/consolidated.00.pth", "layers.1.attention.wq.bias", "another family"],
    ),
    "no tensors": Bad(edit_shards(lambda t: t.clear()), ["{source}/consolidated.00.pth", "0 layers"]),
    "embedding of no axes": Bad(edit_tensor(EMBED, lambda a: a[0, 0]), ["{source}/consolidated.00.pth", EMBED]),
    "embedding of no rows": Bad(edit_tensor(EMBED, lambda a: a[:0]), ["{source}", "output.weight", "[0, 32]"]),
    "no vocabulary": Bad(
        edit_shards(lambda t: t.update({name: t[name][:0] for name in (EMBED, "output.weight")})),
        ["{source}/params.json", "vocab_size=0"],
    ),
    "norm of two axes": Bad(
        edit_tensor("norm.weight", lambda a: a[None]), ["{source}/consolidated.00.pth", "norm.weight", "[1, 32]"]
    ),
    "integers": Bad(edit_tensor(WK, lambda a: a.astype(np.int8)), ["{source}/consolidated.00.pth", WK, "int8"]),
    "wk of other rows": Bad(edit_tensor(WK, lambda a: a[:4]), ["{source}", WK, "[16, 32]", "[32, 32]"]),
    "no params.json": Bad(delete("params.json"), ["{source}/params.json is missing"]),
    "params.json no JSON": Bad(params_text(b'{"dim": 32,'), ["{source}/params.json", "JSON"]),
    "params.json no UTF-8": Bad(params_text(b'{"dim\xff": 32}'), ["{source}/params.json", "JSON"]),
    "params.json a list": Bad(params_text(b"[1, 2]"), ["{source}/params.json", "JSON object"]),
    "params.json deep": Bad(params_text(b"[" * 100_000), ["{source}/params.json", "JSON"]),
    "params.json a folder": Bad(
        lambda folder: [(folder / "params.json").unlink(), (folder / "params.json").mkdir()], ["{source}/params.json"]
    ),
    **{
        f"{name} {str(value)[:9]}": Bad(params(**{name: value}), ["{source}/params.json", name])
        for name in ("dim", "n_layers", "n_heads", "norm_eps")
        for value in ("absent", None, "32", [32], {}, True, 0, -1, float("nan"), float("inf"), 10**400)
    },
    **{
        f"{name} {value!r}": Bad(params(**{name: value}), ["{source}/params.json", name])
        for name in ("n_kv_heads", "vocab_size", "multiple_of", "rope_theta", "ffn_dim_multiplier", "max_seq_len")
        for value in ("32", [32], False, 0, -2, float("nan"), float("inf"))
    },
    "dim 32.5": Bad(params(dim=32.5), ["{source}/params.json", "dim=32.5"]),
    "n_heads does not divide": Bad(params(n_heads=5), ["{source}/params.json", "n_heads=5", "dim=32"]),
    "n_heads makes an odd head": Bad(params(n_heads=32), ["{source}", "head_dim=1"]),
    "fewer layers": Bad(params(n_layers=1), ["{source}/consolidated.00.pth", "2 layers", "n_layers=1"]),
    "more layers": Bad(params(n_layers=3), ["{source}/consolidated.00.pth", "2 layers", "n_layers=3"]),
    "very many layers": Bad(params(n_layers=10**5), ["{source}/consolidated.00.pth", "2 layers", "n_layers=100000"]),
    "other dim": Bad(params(dim=64), ["{source}", "params.json", "[64"]),
    "very large dim": Bad(params(dim=2**39, multiple_of=2**38), ["{source}", "params.json", str(2**39)]),
    "other n_kv_heads": Bad(params(n_kv_heads=2), ["{source}", WK, "[32, 32]", "[16, 32]"]),
    "other vocab_size": Bad(params(vocab_size=500), ["{source}", EMBED, "[512, 32]", "[500, 32]"]),
    "other ffn": Bad(params(multiple_of=64), ["{source}", "w1", "[48, 32]", "[128, 32]"]),
    "kv heads that do not divide": Bad(
        lambda folder: [
            edit_params(folder, n_kv_heads=3),
            *[edit_tensor(f"layers.{i}.attention.{w}.weight", lambda a: a[:6])(folder) for i in (0, 1) for w in KV],
        ],
        ["{source}", "n_kv_heads=3"],
    ),
    "a pickle that calls": Bad(call_something, ["{source}/consolidated.02.pth", "mkdir", "nothing was executed"]),
    "half a shard": Bad(cut("consolidated.01.pth", 0.5), ["{source}/consolidated.01.pth", "truncated"]),
    "almost a shard": Bad(cut("consolidated.01.pth", 0.999), ["{source}/consolidated.01.pth", "truncated"]),
    "an empty shard": Bad(cut("consolidated.01.pth", 0), ["{source}/consolidated.01.pth", "empty"]),
    "no tokenizer": Bad(delete("tokenizer.model"), ["{source}/tokenizer.model is missing", "--tokenizer"]),
    "tokenizer of random bytes": Bad(tokenizer(bytes(range(256)) * 9), ["{source}/tokenizer.model", "SentencePiece"]),
    "tokenizer of LLaMA 3": Bad(tokenizer(b"IQ== 0\nIg== 1\n"), ["{source}/tokenizer.model", "tiktoken"]),
    "tokenizer of another size": Bad(vocabulary(500), ["{source}/tokenizer.model", "512", "500", "--tokenizer"]),
    "--tokenizer that is missing": Bad(lambda folder: None, ["/missing.model"], ("--tokenizer", "/missing.model")),
    "NaN in int8": Bad(
        edit_tensor(WK, lambda a: np.where(np.arange(32) == 9, np.nan, a).astype(a.dtype)),
        ["{out}", "layers.0.wqkv", "not finite", "int8"],
        ("--quantize", "int8"),
    ),
    "too large for float16": Bad(
        edit_tensor(EMBED, lambda a: a * a.dtype.type(1e6)),
        ["{out}", "embed", "float16", "--dtype"],
        ("--dtype", "float16"),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of four shards that converts."""
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "source", shards=4)


@pytest.fixture
def source(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "source")


def test_the_sound_checkpoint_converts(sound, tmp_path):
    run(sound, tmp_path / "out")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, source, tmp_path, capsys, monkeypatch):
    bad = BAD[name]
    bad.spoil(source)
    out = tmp_path / "new" / "out"
    monkeypatch.chdir(tmp_path)
    message = refusal(source, out, *bad.options)
    for text in bad.says:
        assert text.format(source=source, out=out) in message
    assert capsys.readouterr().out == ""


def test_source_and_out_that_cannot_be(source, tmp_path):
    out = tmp_path / "out"
    long = "x" * 300
    for wrong in tmp_path / "missing", source / "params.json", tmp_path / long:
        assert str(wrong) in refusal(wrong, out) and not out.exists()
    for wrong in source, tmp_path, source / "..", source / "." / "..":
        assert "choose another folder" in refusal(source, wrong, error=InputError)
        assert "choose another folder" in refusal(source, wrong, "--overwrite", error=InputError)
    assert "x cannot be written" in refusal(source, tmp_path / long)
    assert "out cannot be written" in refusal(source, source / "params.json" / "out")


def test_a_model_around_source_is_not_replaced(sound, tmp_path):
    out = run(sound, tmp_path / "out")
    source = shutil.copytree(sound, out / "source")
    for path in out, source / "..":
        assert f"OUT {path} is or contains SOURCE {source}" in refusal(source, path, "--overwrite", error=InputError)


@pytest.mark.parametrize("make", ["file", "folder", "config", "other JSON", "dangling link"])
def test_out_that_exists_and_is_no_model(source, tmp_path, make):
    out = tmp_path / "out"
    if make == "file":
        out.write_bytes(b"precious")
    elif make == "dangling link":
        out.symlink_to(tmp_path / "missing")
    else:
        out.mkdir()
        (out / "precious.txt").write_text("precious")
    if make == "config":  # Hugging Face's, for one
        (out / "config.json").write_text('{"model_type": "llama"}')
    elif make == "other JSON":
        (out / "config.json").write_text("[]")
    assert f"{out} exists" in refusal(source, out)
    assert f"{out} is not a model folder" in refusal(source, out, "--overwrite")
    assert out.is_symlink() == (make == "dangling link")


def test_command_line(source, tmp_path):
    out = tmp_path / "out"
    for options in (["--dtype", "int4"], ["--quantize", "int4"], ["--unknown"]):
        assert "--help" in refusal(source, out, *options, error=InputError)
    with pytest.raises(InputError, match="OUT"):
        convert.main([str(source)])


# Failures on the way


def failing(number, error):
    """A progress bar that fails in the middle."""

    class Bar:
        calls = 0

        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, _):
            self.calls += 1
            if self.calls == number:
                raise error

    return Bar


WHOLE = [(), ("--overwrite",)]


@pytest.fixture(params=WHOLE, ids=["new", "overwrite"])
def target(request, source, tmp_path):
    """An OUT and its options: none yet, in a folder that is new, or a model that must stay as it was."""
    if not request.param:
        return (tmp_path / "new" / "deep" / "out",)
    return run(source, tmp_path / "work" / "out", "--dtype", "float32"), "--overwrite"


def test_full_disk_is_seen_before(source, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10_000, 10_000))
    message = refusal(source, *target)
    assert str(target[0]) in message and "0.0 GB free" in message and "--quantize int8" in message


def test_full_disk_in_the_middle(source, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the file of weights has 119 kB
    try:
        message = refusal(source, *target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{target[0]} cannot be written: File too large" in message


@pytest.mark.parametrize("number", [1, 7, 15])
def test_interrupted(source, target, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(convert, "tqdm", failing(number, KeyboardInterrupt()))
        before = tree(source.parent)
        with pytest.raises(KeyboardInterrupt):
            run(source, *target)
        assert tree(source.parent) == before
    load(run(source, *target))


def test_failing_rename_keeps_the_old_model(source, target, monkeypatch):
    rename = Path.rename

    def fails(path, to):
        if path.name.startswith(".out.partial") and not path.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    assert f"{target[0]} cannot be written: Input/output error" in refusal(source, *target)


KILLED = """
import sys, time
from jaxllm.convert import __main__ as convert

class Bar(convert.tqdm):
    def update(self, count):
        super().update(count)
        if self.n == self.total:
            print("written", flush=True)
            time.sleep(60)

convert.tqdm = Bar
convert.main(sys.argv[1:])
"""


def command(*arguments, **options):
    # a platform that does not exist: conversion uses no device
    environment = os.environ | {"JAX_PLATFORMS": "none"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def test_processes(source, tmp_path):
    """The command itself, killed and not: exit status, one line of error, and what a kill leaves is no model."""
    killed = command("-c", KILLED, source, tmp_path / "work" / "killed")
    good = command("-m", "jaxllm.convert", source, tmp_path / "good")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "exists").mkdir()
    (tmp_path / "work" / "exists" / "file").touch()
    (source.parent / "random.model").write_bytes(bytes(range(256)))
    exists = command("-m", "jaxllm.convert", source, tmp_path / "work" / "exists")
    random = command("-m", "jaxllm.convert", source, tmp_path / "random", "--tokenizer", tmp_path / "random.model")

    assert killed.stdout.readline() == "written\n"
    killed.kill()
    killed.communicate()
    [left] = [path for path in (tmp_path / "work").iterdir() if path.name != "exists"]
    assert left.name.startswith(".killed.partial-") and (left / "model.safetensors").is_file()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(left)

    out, error = good.communicate()
    assert (good.returncode, out) == (0, "") and error.endswith("M parameters, bfloat16\n")
    load(tmp_path / "good")
    for process, text in (exists, "exists"), (random, "random.model"):
        out, error = process.communicate()
        assert (process.returncode, out) == (2, "")
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n") and text in error
        assert "\r" not in error
    assert not (tmp_path / "random").exists()
