"""Checkpoints and model folders to test with: the two fixtures, and random ones written as Meta's shards."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

with pytest.MonkeyPatch.context() as patch:  # tests run in several processes, which share a GPU
    patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    BACKEND = jax.default_backend()

if importlib.util.find_spec("triton") and BACKEND == "cpu":
    import interpreter  # noqa: F401  before any kernel is defined: with a GPU they run for real

from jaxllm.convert import __main__ as convert
from jaxllm.convert import pth
from jaxllm.loader import parameter_shapes
from jaxllm.model import abstract_params

DATA = Path(__file__).parent / "data"
CHECKPOINTS = {folder.name: folder for folder in sorted(DATA.glob("llama*"))}
TOKENIZER = DATA / "llama1-fp16-1shard" / "tokenizer.model"  # 512 pieces

# the last part but one of a tensor's name -> the axis that Meta's model parallelism splits (None: copies)
SPLIT = {
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None, "rope": None,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    if BACKEND != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory):
    """`load` turns on the compilation cache in the user's cache folder: not the one of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def compiled_apart(request):
    """A function: what a call of the test module's functions, like `compile_all(90)`, prints as JSON.

    In a process of its own: kernels that are to be compiled must not be defined for Triton's interpreter.
    """

    def run(call):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        module = request.module.__name__
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {module}; {module}.{call}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function: the model folder, not to be changed, that a fixture checkpoint converts to with these options."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def get(name, *options):
        if (name, *options) not in made:
            out = folder / "-".join((name, *(option.strip("-") for option in options)))
            convert.main([str(CHECKPOINTS[name]), str(out), *options])
            made[name, *options] = out
        return made[name, *options]

    return get


def random_tensors(
    dtype="bfloat16", dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=512, output="own"
):
    """Whole tensors by Meta's names; output is "own", "absent" or "embedding" (a copy of that)."""
    rng = np.random.default_rng(0)
    kv_rows = dim // n_heads * n_kv_heads

    def random(*shape):
        return (rng.standard_normal(shape) * 0.2).astype(dtype)

    tensors = {"tok_embeddings.weight": random(vocab_size, dim), "norm.weight": random(dim)}
    for i in range(n_layers):
        layer = {
            "attention.wq": random(dim, dim),
            "attention.wk": random(kv_rows, dim),
            "attention.wv": random(kv_rows, dim),
            "attention.wo": random(dim, dim),
            "feed_forward.w1": random(ffn_dim, dim),
            "feed_forward.w2": random(dim, ffn_dim),
            "feed_forward.w3": random(ffn_dim, dim),
            "attention_norm": random(dim),
            "ffn_norm": random(dim),
        }
        tensors |= {f"layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    if output != "absent":
        tensors["output.weight"] = random(vocab_size, dim) if output == "own" else tensors["tok_embeddings.weight"]
    return tensors | {"rope.freqs": np.ones(4, np.float32)}


def write_checkpoint(folder, tensors=None, shards=1, embed_axis=1, **settings):
    """Write whole tensors (by default random ones) as Meta's files, with more settings in params.json; the folder."""
    tensors = random_tensors() if tensors is None else tensors
    pieces = [{} for _ in range(shards)]
    for name, whole in tensors.items():
        axis = embed_axis if name == "tok_embeddings.weight" else SPLIT[name.split(".")[-2]]
        parts = [whole] * shards if axis is None else np.split(whole, shards, axis)
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part
    dim = tensors["norm.weight"].size
    layers = sum(name.endswith("wq.weight") for name in tensors)
    settings = {"dim": dim, "n_layers": layers, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1} | settings
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(settings))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    for n, piece in enumerate(pieces):
        pth.write(folder / f"consolidated.{n:02}.pth", piece)
    return folder


def by_library(content):
    """The safetensors library's reading of a file's bytes: {name: (dtype, shape, bytes)}."""
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(content)}


def as_stored(array):
    """An array as `by_library` gives it."""
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
    return codes[array.dtype.name], array.shape, array.tobytes()


def as_arrays(file):
    """A safetensors file as numpy arrays, by the safetensors library."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}
    tensors = by_library(Path(file).read_bytes()).items()
    return {name: np.frombuffer(data, dtypes[dtype]).reshape(shape) for name, (dtype, shape, data) in tensors}


def tree(folder):
    """Everything below a folder: {path: the file's bytes, or None for a folder}."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def arrays_of(checkpoint):
    """Every weight of an opened checkpoint, whole."""
    return {
        name: np.concatenate([block.reshape(-1) for block in weight.blocks()]).reshape(weight.shape)
        for name, weight in checkpoint.weights.items()
    }


def params_of(checkpoint, dtype):
    """The Params of an opened checkpoint, as arrays of dtype."""
    abstract, found = abstract_params(checkpoint.config), arrays_of(checkpoint)
    shapes = parameter_shapes(abstract)
    assert {name: array.shape for name, array in found.items()} == {name: leaf.shape for name, leaf in shapes.items()}
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name].astype(dtype) for name in shapes])


def resident_bytes(folder):
    """How much of the maps of files in a folder is in this process's memory (Linux)."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    return sum(int(re.search(r"Rss: +(\d+) kB", r)[1]) * 1024 for r in regions if str(folder) in r)
