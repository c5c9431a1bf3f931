"""Model folders: against the safetensors library, in place in memory, and what is no model or a damaged one."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import CHECKPOINTS, as_arrays, as_stored, by_library, random_tensors, tree, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import loader, resources
from jaxllm.config import ModelConfig
from jaxllm.convert import __main__ as convert
from jaxllm.errors import InputError, ModelError
from jaxllm.loader import Weight, load, open_folder, parameter_shapes, read_safetensors, save
from jaxllm.model import MATRICES, abstract_params
from jaxllm.quantize import SCHEMES, quantize

LLAMA1, LLAMA2 = CHECKPOINTS


@pytest.fixture
def folder(converted, tmp_path):
    """A model folder that may be changed."""
    return shutil.copytree(converted(LLAMA2), tmp_path / "model")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A function: the model folder, not to be changed, of a small random model of a dtype."""
    root, made = tmp_path_factory.mktemp("random"), {}

    def get(dtype, *options):
        if (dtype, *options) not in made:
            source = write_checkpoint(root / f"source-{len(made)}", random_tensors(dtype))
            made[dtype, *options] = root / f"model-{len(made)}"
            convert.main([str(source), str(made[dtype, *options]), *options])
        return made[dtype, *options]

    return get


def named(params):
    """Every array of a Params, by its name in a file."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(str(getattr(key, "name", getattr(key, "idx", ""))) for key in keys): leaf for keys, leaf in leaves}


def stored_params(params):
    return {name: as_stored(np.asarray(array)) for name, array in named(params).items()}


def starts(content):
    """Where in the file each tensor of a safetensors file begins."""
    length = int.from_bytes(content[:8], "little")
    return {name: 8 + length + e["data_offsets"][0] for name, e in json.loads(content[8 : 8 + length]).items()}


# Whole folders


@pytest.mark.parametrize("options", [(), ("--quantize", "int8")])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_library_reads_our_file(converted, name, options):
    file = converted(name, *options) / "model.safetensors"
    content = file.read_bytes()
    library = by_library(content)
    assert {name: as_stored(array) for name, array in read_safetensors(file).items()} == library
    assert not [name for name, start in starts(content).items() if start % 64]
    assert stored_params(load(converted(name, *options), dtype="float32").params) == library


@pytest.mark.parametrize("parts", [1, 3])
def test_we_read_the_librarys_file(converted, folder, parts):
    arrays = list(as_arrays(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for i in range(parts):
        safetensors.numpy.save_file(dict(arrays[i::parts]), folder / f"part-{i}.safetensors", {"format": "np"})
    assert stored_params(load(folder).params) == stored_params(load(converted(LLAMA2)).params)


def test_sizes_that_are_no_multiple_of_64_bytes(tmp_path):
    tensors = random_tensors(dim=36, ffn_dim=27, vocab_size=512)
    expected = tensors["layers.1.feed_forward.w2.weight"]
    source = write_checkpoint(tmp_path / "source", tensors, n_heads=2)
    for options in (), ("--quantize", "int8"):
        out = tmp_path / f"out{len(options)}"
        convert.main([str(source), str(out), *options])
        content = (out / "model.safetensors").read_bytes()
        library = by_library(content)
        assert stored_params(load(out).params) == library
        whole = [name for name, (_, _, data) in library.items() if len(data) % 64 == 0]
        assert whole and not [name for name in whole if starts(content)[name] % 64]
        assert load(out).params.layers[1].w_down.shape == expected.shape


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("options", [(), ("--quantize", "int8")], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_cpu_the_arrays_are_the_map(random_model, dtype, options):
    if jax.default_backend() != "cpu":
        pytest.skip("needs JAX on a CPU")
    path = random_model(dtype, *options)
    model = load(path)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path / "model.safetensors")):
            ranges.append([int(bound, 16) for bound in line.split()[0].split("-")])
    arrays = named(model.params)
    assert len(arrays) == len(as_arrays(path / "model.safetensors"))
    for name, array in arrays.items():
        start = array.unsafe_buffer_pointer()
        assert any(low <= start and start + array.nbytes <= high for low, high in ranges), name


def assert_quantized_alike(ours, theirs, exact=True):
    """That params quantized by jax and by numpy are equal: on a CPU bit for bit, unless something was rotated.

    Numpy and jax rotate in another order of summation, and a GPU's quotients are off by a bit: a value in ten thousand
    rounds the other way.
    """
    if exact and jax.default_backend() == "cpu":
        assert stored_params(ours) == stored_params(theirs)
        return
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        other = np.asarray(theirs[name])
        if array.dtype == jnp.int8:
            difference = np.abs(np.asarray(array, np.int32) - other)
            assert difference.max() <= 1 and difference.mean() < 1e-3, name
        else:
            np.testing.assert_allclose(np.asarray(array, np.float32), np.asarray(other, np.float32), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantizing_at_load_is_what_conversion_does(random_model, dtype, monkeypatch):
    monkeypatch.setattr(loader, "PIECE_BYTES", 1 << 12)
    at_load, converted = load(random_model(dtype), quantize="int8"), load(random_model(dtype, "--quantize", "int8"))
    assert_quantized_alike(at_load.params, converted.params)
    assert at_load.config == converted.config
    again = load(random_model(dtype, "--quantize", "int8"), quantize="int8")
    assert stored_params(again.params) == stored_params(converted.params)


@pytest.mark.parametrize(
    ("stored", "asked", "backend", "config_dtype", "weights"),
    [
        ("float32", None, "cpu", "float32", "float32"),
        ("bfloat16", None, "cpu", "float32", "bfloat16"),
        ("float16", None, "cpu", "float32", "float16"),
        ("float32", None, "gpu", "float32", "float32"),
        ("bfloat16", None, "gpu", "bfloat16", "bfloat16"),
        ("float16", None, "gpu", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "cpu", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "cpu", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "gpu", "float32", "bfloat16"),
        ("float16", "float32", "gpu", "float32", "float16"),
    ],
)
def test_dtype(random_model, monkeypatch, stored, asked, backend, config_dtype, weights):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = load(random_model(stored), dtype=asked)
    assert model.config.dtype == config_dtype
    file = as_arrays(random_model(stored) / "model.safetensors")
    expected = {name: as_stored(array.astype(weights)) for name, array in file.items()}
    assert stored_params(model.params) == expected


def test_dtype_of_an_int8_model(random_model):
    model = load(random_model("float32", "--quantize", "int8"), dtype="bfloat16")
    assert {array.dtype.name for array in named(model.params).values() if array.ndim == 1} >= {"bfloat16"}
    assert model.params.norm.dtype == jnp.bfloat16
    assert (model.params.embed.values.dtype, model.params.embed.scale.dtype) == (jnp.int8, jnp.float32)


def test_save_writes_what_load_reads(tmp_path):
    config = ModelConfig(512, 24, 1, 2, 1, 12, 20, 64, tied=True, dtype="float16")
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(abstract_params(config))
    arrays = {name: rng.standard_normal(s.shape).astype(np.float32) for name, s in shapes.items()}
    counted = []

    def blocks(array):  # one row at a time
        rows = array.reshape(-1, array.shape[-1])
        return lambda: iter([array] if array.ndim == 1 else np.split(rows, len(rows)))

    weights = {name: Weight(array.shape, blocks(array)) for name, array in arrays.items()}
    save(
        tmp_path / "out",
        config,
        weights,
        {"tokenizer.model": CHECKPOINTS[LLAMA1] / "tokenizer.model"},
        progress=counted.append,
    )
    model = load(tmp_path / "out", dtype="float32")
    assert stored_params(model.params) == {name: as_stored(array.astype(np.float16)) for name, array in arrays.items()}
    assert sum(counted) == sum(array.size * 2 for array in arrays.values())
    assert model.config == replace(config, dtype="float32")
    assert model.tokenizer.decode(model.tokenizer.encode("Hello")) == "Hello"


# How the matrices are held


@pytest.mark.parametrize("keep", [(), ("embed", "output"), ("w_down",)], ids=lambda keep: "-".join(keep) or "all")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_at_conversion_and_at_load(random_model, scheme, keep):
    options = ["--quantize", scheme, *(["--keep-float", *keep] if keep else [])]
    path = random_model("bfloat16", *options)
    text = json.loads((path / "config.json").read_text())
    assert text["quantization"] == scheme and text["float"] == ["attn_norm", "ffn_norm", "norm", *keep]
    converted, at_load = load(path), load(random_model("bfloat16"), quantize=scheme, keep_float=keep)
    assert jax.tree.structure(converted.params) == jax.tree.structure(at_load.params)
    assert jax.tree.map(jnp.shape, converted.params) == jax.tree.map(
        jnp.shape, abstract_params(converted.config, scheme, keep)
    )
    assert_quantized_alike(at_load.params, converted.params, exact=scheme != "w8a8")
    assert {name for name in MATRICES if f"{name}.values" not in " ".join(named(at_load.params))} == {*keep}
    again = load(path, quantize=scheme, keep_float=keep[::-1])
    assert stored_params(again.params) == stored_params(converted.params)


@pytest.mark.parametrize("stored", ["int8", "w8a8"])
@pytest.mark.parametrize(
    "asked", [{"quantize": "int8-g128"}, {"keep_float": ["embed"]}, {"quantize": "int8", "keep_float": ["wo"]}]
)
def test_what_is_int8_cannot_be_made_something_else(random_model, stored, asked):
    with pytest.raises(InputError, match=f"is {stored} and cannot be made .*convert the checkpoint again"):
        load(random_model("float32", "--quantize", stored), **asked)


def test_kv_cache_is_a_setting_of_the_load(random_model):
    assert load(random_model("float32")).config.kv_cache is None
    assert load(random_model("float32"), kv_cache="int8").config.kv_cache == "int8"
    with pytest.raises(InputError, match="kv_cache is 'int4'; it must be int8"):
        load(random_model("float32"), kv_cache="int4")


@pytest.mark.parametrize("size", [1 << 8, 1 << 12, 1 << 30])
def test_uploads_in_pieces(random_model, monkeypatch, size):
    """The road to a GPU, on whatever device there is: each tensor in pieces from several threads."""
    monkeypatch.setattr(loader, "PIECE_BYTES", size)
    tensors = read_safetensors(random_model("float32") / "model.safetensors")
    before = {name: array.copy() for name, array in tensors.items()}
    changes = {
        None: lambda array: array,
        partial(loader._cast_on_device, dtype="bfloat16"): lambda array: array.astype(ml_dtypes.bfloat16),
        partial(loader._quantize, scheme="int8-g128"): partial(quantize, scheme="int8-g128"),
    }
    for change, expected in changes.items():
        names = [name for name in tensors if change is None or tensors[name].ndim > 1]
        sent = loader._upload([(tensors[name], change) for name in names], jax.devices()[0])
        for name, ours in zip(names, sent, strict=True):
            assert jax.tree.map(lambda a: as_stored(np.asarray(a)), ours) == jax.tree.map(
                as_stored, expected(before[name])
            )
    # the advice about pages leaves what they hold alone
    assert all((tensors[name] == before[name]).all() for name in tensors)


# Scales, files and memory that are not what they should be


def put(path, name, change):
    """Change a tensor inside a folder's file, in place."""
    raw = bytearray((path / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    array = np.frombuffer(raw, np.float32, (end - begin) // 4, 8 + length + begin)
    array[:] = change(array.copy())
    (path / "model.safetensors").write_bytes(raw)


def set_first(value):
    return lambda scale: np.concatenate([np.float32([value]), scale[1:]])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf, -1.0])
def test_impossible_scales(random_model, tmp_path, scheme, value):
    path = shutil.copytree(random_model("float32", "--quantize", scheme), tmp_path / "model")
    put(path, "layers.1.wo.scale", set_first(value))
    message = refusal(path)
    assert f"{path}: layers.1.wo.scale" in message and "convert" in message


def test_a_row_of_zeros_may_have_scale_0(tmp_path):
    tensors = random_tensors("float32")
    tensors["layers.0.attention.wo.weight"][3] = 0
    source = write_checkpoint(tmp_path / "source", tensors)
    for scheme in SCHEMES:
        convert.main([str(source), str(tmp_path / scheme), "--quantize", scheme])
        assert not np.asarray(load(tmp_path / scheme).params.layers[0].wo.scale)[3].any()


def test_missing_scales(random_model, tmp_path):
    path = shutil.copytree(random_model("float32", "--quantize", "int8"), tmp_path / "model")
    edit_tensors(lambda tensors: tensors.pop("layers.0.wo.scale"))(path)
    assert "'layers.0.wo.scale'" in refusal(path)


@pytest.mark.parametrize(
    "floats",
    ["norm", ["norm"], [], None, ["attn_norm", "ffn_norm", "norm", "bias"], ["attn_norm", "ffn_norm", "norm", 3]],
)
def test_impossible_lists_of_what_is_float(random_model, tmp_path, floats):
    path = shutil.copytree(random_model("float32", "--quantize", "int8"), tmp_path / "model")
    edit_config(float=floats)(path)
    assert "config.json has float=" in refusal(path) and "attn_norm, ffn_norm, norm" in refusal(path)


def test_the_list_of_what_is_float_must_be_true(random_model, tmp_path):
    path = shutil.copytree(random_model("float32", "--quantize", "int8"), tmp_path / "model")
    edit_config(float=["attn_norm", "ffn_norm", "norm", "wo"])(path)
    assert "layers.0.wo" in refusal(path)


CHANGES = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.open("ab").write(b"more"),
    "written to": lambda file: put(file.parent, "norm", lambda norm: norm + 1),
}


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="on other devices nothing is left in the file")
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_a_model(random_model, tmp_path, change):
    path = shutil.copytree(random_model("float32"), tmp_path / "model")
    model = load(path)
    run = iter(jaxllm.stream(model, "Hello", max_new_tokens=30))
    next(run)
    time.sleep(0.01)  # file systems tell times in steps
    CHANGES[change](path / "model.safetensors")
    file = str(path / "model.safetensors")
    for use in (lambda: jaxllm.generate(model, ["Hello"]), lambda: list(run)):
        with pytest.raises(ModelError, match=f"{file} was changed while it was in use"):
            use()


def test_a_file_that_changes_during_the_load(random_model, tmp_path, monkeypatch):
    path = shutil.copytree(random_model("float32"), tmp_path / "model")
    place = loader._place

    def change_behind(*arguments):
        params = place(*arguments)
        os.truncate(path / "model.safetensors", 5)
        return params

    monkeypatch.setattr(loader, "_place", change_behind)
    assert "was changed while it was in use" in refusal(path)


def test_a_model_that_is_replaced_stays_as_it_was(random_model, tmp_path):
    path = shutil.copytree(random_model("float32"), tmp_path / "model")
    model = load(path)
    greedy = jaxllm.Sampling(temperature=0.0)
    before = jaxllm.generate(model, ["Hello"], greedy, max_new_tokens=10)[0].tokens
    tensors = {name: array[::-1].copy() for name, array in random_tensors("float32").items()}
    source = write_checkpoint(tmp_path / "source", tensors)
    convert.main([str(source), str(path), "--overwrite"])
    assert jaxllm.generate(model, ["Hello"], greedy, max_new_tokens=10)[0].tokens == before
    assert stored_params(load(path).params) != stored_params(model.params)


def test_close(random_model):
    gc.collect()
    before = resources.usage()[jax.devices()[0]].weights
    model, other = load(random_model("float32")), load(random_model("float32", "--quantize", "int8"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(m.params)) for m in (model, other)]
    assert resources.usage()[jax.devices()[0]].weights == before + sum(sizes)
    kept = model.params
    model.close()
    assert resources.usage()[jax.devices()[0]].weights == before + sizes[1] and kept.norm.is_deleted()
    with pytest.raises(InputError, match="the model was closed; load it again"):
        jaxllm.generate(model, ["Hello"])
    del other
    gc.collect()
    assert resources.usage()[jax.devices()[0]].weights == before


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(random_model, monkeypatch):
    path = random_model("float32")
    plan = resources.plan(open_folder(path).config, 1, 128)
    monkeypatch.setattr(loader, "_place", lambda *_: pytest.fail("was read all the same"))
    monkeypatch.setattr(resources, "free_memory", lambda device=None: plan.total - 1)
    with pytest.raises(InputError, match="this needs .* is free; it fits with --kv-cache int8"):
        load(path)
    with pytest.raises(InputError, match="prompt"):
        load(path, batch=10**6)
    # a context that was asked for may be shortened, too
    with pytest.raises(InputError, match="it fits with --max-len [0-9]+"):
        load(path, quantize="int8", kv_cache="int8", max_len=open_folder(path).config.max_len)


SHARING = """
import sys
import numpy as np
import jax
from jaxllm.loader import load

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

load()  # what a first load takes whatever the model
before = private()
model = load(sys.argv[1])
total = sum(int(np.asarray(leaf).view(np.uint8).max()) for leaf in jax.tree.leaves(model.params))  # reads every page
print("ready", flush=True)
sys.stdin.readline()  # until the other process has read them, too
counts = dict.fromkeys(("Rss", "Shared_Clean", "Shared_Dirty"), 0)
inside = False
for line in open("/proc/self/smaps"):
    if " " not in line.split(":")[0]:
        name = line.split(":")[0]
        if inside and name in counts:
            counts[name] += int(line.split()[1])
    else:
        inside = line.rstrip().endswith("model.safetensors") and sys.argv[1] in line
print(counts["Rss"], counts["Shared_Clean"] + counts["Shared_Dirty"], private() - before, flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="only a CPU works on the file itself")
def test_two_processes_share_the_weights(tmp_path):
    config = ModelConfig(512, 1024, 2, 8, 8, 128, 4096, 64, dtype="float32")
    rng = np.random.default_rng(0)

    def weight(shape):
        rows = int(np.prod(shape[:-1]))
        return Weight(
            shape, lambda: (rng.random((min(rows, 1024), shape[-1]), np.float32) for _ in range(0, rows, 1024))
        )

    shapes = parameter_shapes(abstract_params(config))
    norms = {
        name: Weight(s.shape, lambda s=s: iter([np.ones(s.shape, s.dtype)]))
        for name, s in shapes.items()
        if len(s.shape) == 1
    }
    weights = {name: norms.get(name) or weight(s.shape) for name, s in shapes.items()}
    save(tmp_path / "model", config, weights, {"tokenizer.model": CHECKPOINTS[LLAMA1] / "tokenizer.model"})
    size = (tmp_path / "model" / "model.safetensors").stat().st_size / 1024
    assert size > 100_000
    command = [sys.executable, "-c", SHARING, str(tmp_path / "model")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        for process in (one, two):
            assert process.stdout.readline() == "ready\n"
        found = []
        for process in (one, two):
            print(file=process.stdin, flush=True)
            found.append([int(number) for number in process.stdout.readline().split()])
        for process in (one, two):
            print(file=process.stdin, flush=True)
    for resident, shared, private in found:
        assert resident > 0.99 * size and shared > 0.99 * resident, found
        assert private < 0.05 * size, found


# What is no model


def refusal(*arguments, **options):
    with pytest.raises(ModelError) as info:
        load(*arguments, **options)
    message = str(info.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


def edit_config(**changes):
    def edit(folder):
        text = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            (text if name in text else text["config"])[name] = value
        (folder / "config.json").write_text(json.dumps(text))

    return edit


def edit_tensors(change):
    def edit(folder):
        arrays = as_arrays(folder / "model.safetensors")
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")

    return edit


def replace_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


WO = "layers.2.wo"
BAD = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ["{f} is not a model folder", "no config.json"]),
    "Meta's folder": (
        lambda f: [(f / "config.json").unlink(), (f / "consolidated.00.pth").touch()],
        ["{f} is not a model folder", "Meta's", "python -m jaxllm.convert {f} OUT"],
    ),
    "Hugging Face's config.json": (
        replace_file("config.json", b'{"model_type": "llama", "hidden_size": 128}'),
        ["{f}/config.json is not jaxllm's", "convert"],
    ),
    "config.json a list": (replace_file("config.json", b"[]"), ["{f}/config.json is not jaxllm's"]),
    "config.json no JSON": (replace_file("config.json", b'{"format"'), ["{f}/config.json", "JSON"]),
    "config.json no text": (replace_file("config.json", b"\xff\xfe\xfd"), ["{f}/config.json", "JSON"]),
    "config.json deep": (replace_file("config.json", b"[" * 100_000), ["{f}/config.json", "JSON"]),
    "format_version 2": (edit_config(format_version=2), ["{f}/config.json", "format_version=2", "reads 1"]),
    "format_version '1'": (edit_config(format_version="1"), ["{f}/config.json", "format_version='1'"]),
    "quantization int4": (edit_config(quantization="int4"), ["{f}/config.json", "quantization='int4'"]),
    "config a list": (edit_config(config=[]), ["{f}/config.json", "JSON object"]),
    "unknown key": (edit_config(window=5), ["{f}/config.json", "'window'"]),
    "missing key": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"dim": 128,', "")),
        ["{f}/config.json", "'dim'"],
    ),
    "rope_scaling a number": (edit_config(rope_scaling=8), ["{f}/config.json", "RopeScaling"]),
    "rope_scaling of other keys": (edit_config(rope_scaling={"type": "yarn"}), ["{f}/config.json", "'type'"]),
    "dim a string": (edit_config(dim="128"), ["{f}/config.json", "dim='128'"]),
    "n_layers 0": (edit_config(n_layers=0), ["{f}/config.json", "n_layers=0"]),
    "n_layers of another model": (edit_config(n_layers=2), ["{f}/model.safetensors", "layers.2.", "does not have"]),
    "a layer more": (edit_config(n_layers=4), ["{f}", "'layers.3.attn_norm'", "6 tensors"]),
    "very many layers": (edit_config(n_layers=10**5), ["{f}/config.json", "n_layers=100000", "21 tensors"]),
    "very large ffn": (edit_config(ffn_dim=10**30), ["{f}/model.safetensors", "w_gate_up", str(10**30)]),
    "another dim": (edit_config(dim=64), ["{f}/model.safetensors", "[512, 128]", "[512, 64]"]),
    "another dtype": (edit_config(dtype="float32"), ["{f}/model.safetensors", "bfloat16", "float32"]),
    "int8 that is float": (edit_config(quantization="int8"), ["{f}/model.safetensors", "'embed'", "does not have"]),
    "tied that is not": (edit_config(tied=True), ["{f}/model.safetensors", "'output'", "does not have"]),
    "another vocabulary": (edit_config(vocab_size=511), ["{f}/tokenizer.model", "512", "511"]),
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), ["{f}", "no *.safetensors"]),
    "cut short": (cut, ["{f}/model.safetensors", "damaged"]),
    "a folder": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()],
        ["{f}/model.safetensors", "Is a directory"],
    ),
    "a dangling link": (lambda f: (f / "a.safetensors").symlink_to("nowhere"), ["{f}/a.safetensors", "No such file"]),
    "missing tensor": (edit_tensors(lambda t: t.pop(WO)), ["{f}", f"'{WO}'", "1 tensors"]),
    "unknown tensor": (edit_tensors(lambda t: t.update(bias=t[WO])), ["{f}/model.safetensors", "'bias'"]),
    "unknown tensor of a long name": (edit_tensors(lambda t: t.update({"b" * 10**6: t[WO]})), ["model.safetensors"]),
    "wrong shape": (edit_tensors(lambda t: t.update({WO: t[WO][1:]})), ["{f}/model.safetensors", WO, "[127, 128]"]),
    "wrong dtype": (
        edit_tensors(lambda t: t.update({WO: t[WO].astype(np.float16)})),
        ["{f}/model.safetensors", WO, "float16", "bfloat16"],
    ),
    "a tensor twice": (
        lambda f: safetensors.numpy.save_file({"norm": np.ones(128, ml_dtypes.bfloat16)}, f / "more.safetensors"),
        ["{f}/more.safetensors", "'norm'", "second time"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), ["{f}/tokenizer.model", "cannot be read"]),
    "tokenizer of random bytes": (replace_file("tokenizer.model", bytes(range(256))), ["{f}/tokenizer.model"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(folder, name):
    spoil, says = BAD[name]
    spoil(folder)
    before = tree(folder)
    message = refusal(folder)
    for text in says:
        assert text.format(f=folder) in message
    assert tree(folder) == before


def test_paths_and_settings_that_cannot_be(folder, tmp_path):
    for path in (tmp_path / "missing", folder / "config.json"):
        assert f"{path}: no such folder" in refusal(path)
    assert "missing.model" in refusal(folder, tokenizer=tmp_path / "missing.model")
    for options in {"quantize": "int4"}, {"quantize": True}, {"dtype": "float16"}, {"dtype": 32}:
        with pytest.raises(InputError, match="int8" if "quantize" in options else "float32, bfloat16"):
            load(folder, **options)
    (folder / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    assert load(str(folder), tokenizer=str(tmp_path / "elsewhere.model")).tokenizer.vocab_size == 512


def test_int8_of_what_is_not_finite(folder):
    def spoil(tensors):
        tensors[WO] = tensors[WO].copy()
        tensors[WO][5, 7] = np.inf

    edit_tensors(spoil)(folder)
    load(folder)
    message = refusal(folder, quantize="int8")
    assert str(folder) in message and WO in message and "not finite" in message


# safetensors files that may be anything

FUZZ = settings(max_examples=500, derandomize=True, deadline=None, database=None)
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
OTHERS = ["U16", "F8_E4M3", "f32", "", "X", None, 4, ["F32"]]
NUMBERS = [-1, 0, 1, 2, 3, 4, 8, 16, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
NUMBERS += [1.0, -0.0, 4.5, 1e300, float("nan"), float("inf"), True, False, None, "4"]
JUNK = st.recursive(
    st.sampled_from([n for n in NUMBERS if not (isinstance(n, float) and not math.isfinite(n))]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "dtype"]), inner, max_size=2),
    max_leaves=6,
)
LIES = st.sampled_from(["entry", "field", "drop", "dtype", "shape", "offset", "shift", "twice", "name"])


def library_reads(content):
    try:
        return by_library(content)
    except safetensors.SafetensorError:
        return None


def we_read(path, content):
    """The tensors as `by_library` gives them, or the error's message."""
    path.write_bytes(content)
    try:
        tensors = read_safetensors(path)
    except ModelError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1 and len(message) < 1000
        return message
    codes = {"float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "uint8": "U8", "bool": "BOOL"}
    codes |= {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
    for array in tensors.values():
        assert not array.flags.writeable and array.nbytes <= len(content)
    return {name: (codes[a.dtype.name], a.shape, a.tobytes()) for name, a in tensors.items()}


def check_as_library(path, content):
    """What we read, the library reads, and the same; what we refuse, it refuses too, but for what we do not support."""
    ours, library = we_read(path, content), library_reads(content)
    if isinstance(ours, dict):
        assert ours == library
    elif library is not None:
        unsupported = [dtype for dtype, _, _ in library.values() if dtype not in SIZES]
        shapes = [shape for _, shape, _ in library.values()]
        large = [shape for shape in shapes if len(shape) > 8 or math.prod(n or 1 for n in shape) >= 2**59]
        assert unsupported or large or "a key occurs twice" in ours, ours
    return ours


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


def dumped(pairs):
    """JSON of an object with these pairs, of which several may have the same name."""
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"


def framed(header, body=b""):
    header = header if isinstance(header, bytes) else header.encode()
    return len(header).to_bytes(8, "little") + header + body


@st.composite
def layouts(draw):
    """The (name, entry) pairs of a right header, in any order, and the size of what it describes."""
    pairs, end = [], 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "", "é\n", "layers.0.wo"]), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(SIZES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        pairs.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
    return draw(st.permutations(pairs)), end


@settings(FUZZ, max_examples=200)
@given(layouts(), st.booleans(), st.integers(0, 9))
def test_right_files(path, layout, metadata, spaces):
    pairs, size = layout
    body = bytes(i % 2 for i in range(size))  # bytes that are also bools
    header = dumped([("__metadata__", {"a": "b"})] * metadata + pairs) + " " * spaces
    ours = check_as_library(path, framed(header, body))
    assert ours == {n: (e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])]) for n, e in pairs}


@pytest.mark.slow
@settings(FUZZ, max_examples=1500)
@given(st.data())
def test_lying_headers(path, data):
    pairs, size = data.draw(layouts())
    pairs = [(name, dict(entry)) for name, entry in pairs]
    for _ in range(data.draw(st.integers(0, 2))):
        if not pairs:
            break
        i = data.draw(st.integers(0, len(pairs) - 1))
        name, entry = pairs[i]
        if not isinstance(entry, dict):
            continue
        match data.draw(LIES):
            case "entry":
                pairs[i] = name, data.draw(JUNK)
            case "field":
                entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(JUNK)
            case "drop":
                entry.pop(data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
            case "dtype":
                entry["dtype"] = data.draw(st.sampled_from([*SIZES, *OTHERS]))
            case "shape":
                entry["shape"] = data.draw(st.lists(st.sampled_from(NUMBERS), max_size=10))
            case "offset":
                entry["data_offsets"] = data.draw(st.lists(st.sampled_from(NUMBERS) | st.integers(0, size), max_size=3))
            case "shift" if isinstance(entry.get("data_offsets"), list):
                step = data.draw(st.integers(-4, 4))
                entry["data_offsets"] = [n + step if type(n) is int else n for n in entry["data_offsets"]]
            case "twice":
                pairs.append(pairs[i])
            case "name":
                pairs[i] = data.draw(st.sampled_from(["\0", "\x85", "a" * 5000])), entry
    body = bytes(max(0, size + data.draw(st.sampled_from([0, 0, 0, 0, -1, 1, 64]))))
    check_as_library(path, framed(dumped(pairs), body))


@FUZZ
@given(st.binary(max_size=100), st.binary(max_size=100), st.sampled_from([-9, -1, 0, 0, 0, 1, 2**31, 2**63]))
def test_random_bytes(path, header, body, off):
    check_as_library(path, header + body)
    check_as_library(path, framed(header, body))
    check_as_library(path, (len(header) + off).to_bytes(9, "little", signed=True)[:8] + header + body)


@FUZZ
@given(st.data())
def test_mutated_bytes(path, data):
    pairs, size = data.draw(layouts())
    content = bytearray(framed(dumped(pairs), bytes(size)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "digit", "cut", "insert"])):
            case "flip":
                content[at] = data.draw(st.integers(0, 255))
            case "digit":
                content[at] = data.draw(st.sampled_from(b'0123456789"{}[],:'))
            case "cut" if len(content) > 9:
                del content[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=4))
    check_as_library(path, bytes(content))


def test_every_shortened_file_is_refused(path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}
    whole = safetensors.numpy.save(arrays)
    assert isinstance(we_read(path, whole), dict)
    for length in range(len(whole)):
        assert isinstance(check_as_library(path, whole[:length]), str)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    "header",
    [
        dumped([("a", entry()), ("a", entry())]),
        dumped([("a", entry(shape="", offsets=[0, 4]))]),
        dumped([("a", entry(shape={}, offsets=[0, 4]))]),
        dumped([("a", entry(shape=[0, 2**62, 2**62], offsets=[0, 0]))]),
        dumped([("a", entry(shape=[2**62, 4], offsets=[0, 0]))]),  # 2**64 elements, which is 0 in 64 bits
        dumped([("a", entry(shape=[2**61], offsets=[0, 2**63]))]),
        dumped([("a", entry(offsets=[0, 8])), ("b", entry(offsets=[4, 12]))]),
        dumped([("a", entry(offsets=[4, 12]))]),
        dumped([("a", entry(offsets=[0, 8])), ("b", entry(offsets=[12, 20]))]),
        dumped([("b", entry(shape=[0], offsets=[4, 4])), ("a", entry(shape=[3], offsets=[0, 12]))]),
        dumped([("a", [entry()])]),
        dumped([("a", "dtype")]),
        "[]",
        "null",
        "",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
    ids=lambda header: str(header)[:60],
)
def test_headers_of_which_nothing_is_right(path, header):
    content = framed(header, bytes(20))
    assert isinstance(we_read(path, content), str)
    assert isinstance(check_as_library(path, framed(header, bytes(8))), str)


def test_claims_take_no_memory(path):
    claims = [
        (2**40).to_bytes(8, "little"),
        (10**8).to_bytes(8, "little") + bytes(100),
        framed(dumped([("a", entry("U8", [2**40], [0, 2**40]))])),
        framed(dumped([("a", entry("U8", [10**30], [0, 10**30]))])),
        framed(dumped([("a" * 10**5, entry("U8", [4], [0, 5]))])),
        framed(dumped([("a", entry("U8", [1] * 10**4, [0, 1]))]), b"1"),
    ]
    for content in claims:
        we_read(path, content)
        tracemalloc.start()
        assert isinstance(we_read(path, content), str)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.stop()


def test_many_numbers_become_float16_as_few_do():
    bits = np.random.default_rng(0).integers(0, 1 << 32, loader.MANY + 77, dtype=np.uint32)
    special = np.float32([65519.99, 6e-8, 2.9e-8, -0.0, np.inf, -np.inf, np.nan])
    block = np.concatenate([bits.view(np.float32), special])
    block[np.isfinite(block) & (np.abs(block) >= 65520)] = 1e-6  # these do not fit
    expected, found = block.astype(np.float16), loader.cast(block, "float16")
    is_nan = np.isnan(expected)
    assert is_nan.any() and np.array_equal(np.isnan(found), is_nan)
    assert np.array_equal(found.view(np.uint16)[~is_nan], expected.view(np.uint16)[~is_nan])
    block[77] = 65520
    with pytest.raises(ValueError, match="a number that float16 cannot express"):
        loader.cast(block, "float16")
