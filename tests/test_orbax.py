"""Orbax checkpoints: Orbax restores what we write, we read what Orbax saves, and nothing that does not fit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import TOKENIZER, as_arrays, tree

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.convert import checkpoint as checkpoint_module
from jaxllm.convert import folder, hf, meta, orbax
from jaxllm.convert.checkpoint import model_tensors
from jaxllm.errors import InputError, ModelError
from jaxllm.loader import Weight, config_text, parameter_shapes, read_config, save
from jaxllm.model import abstract_params

ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
tensorstore = pytest.importorskip("tensorstore")

CONFIG = ModelConfig(
    vocab_size=512, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=136, max_len=64, dtype="bfloat16",
    rope_scaling=RopeScaling(8.0),
)  # fmt: skip
MODELS = {
    "plain": CONFIG,
    "float32, tied, biases": replace(CONFIG, dtype="float32", tied=True, attention_bias=True),
    "float16, norms of q and k": replace(CONFIG, dtype="float16", qk_norm=True, sliding_window=9),
}


def random_folder(path, config=CONFIG, quantize=None, keep_float=()):
    """A model folder of random weights."""
    rng = np.random.default_rng(0)

    def weight(shape):
        array = (rng.standard_normal(shape) * 0.2).astype(config.dtype)
        return Weight(shape, lambda: iter([array.reshape(-1, shape[-1])]))

    weights = {name: weight(leaf.shape) for name, leaf in parameter_shapes(abstract_params(config)).items()}
    save(path, config, weights, {"tokenizer.model": TOKENIZER}, quantize=quantize, keep_float=keep_float)
    return path


def to_folder(checkpoint, out):
    """A model folder of a checkpoint, as it is."""
    save(
        out, checkpoint.config, checkpoint.weights, checkpoint.files, checkpoint.quantized, checkpoint.keep_float
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder, not to be changed, and what `save_checkpoint` makes of it."""
    ours = random_folder(tmp_path_factory.mktemp("orbax") / "ours")
    out = ours.parent / "out"
    orbax.save_checkpoint(out, folder.open_checkpoint(ours))
    return ours, out


def restored(path, abstract):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), abstract)


def saved(path, params):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)


def beside(path, source):
    """A new folder with the files of a checkpoint that are not the params."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("params"))
    return path


@pytest.mark.parametrize("scheme", [None, "int8", "int8-g128", "w8a8"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(tmp_path, name, scheme):
    keep_float = ("embed", "wo") if scheme == "int8" else ()
    ours = random_folder(tmp_path / "ours", MODELS[name], scheme, keep_float)
    out = tmp_path / "out"
    opened, counts = folder.open_checkpoint(ours), []
    assert (opened.quantized, {*opened.keep_float}) == (scheme, {*keep_float})
    orbax.save_checkpoint(out, opened, progress=counts.append)
    assert tree(to_folder(orbax.open_checkpoint(out), tmp_path / "back")) == tree(ours)
    for (name, found), (also, expected) in zip(
        model_tensors(orbax.open_checkpoint(out)), model_tensors(opened), strict=True
    ):
        assert name == also and found.tobytes() == expected.tobytes()
    arrays = as_arrays(ours / "model.safetensors")
    assert sum(counts) == sum(array.nbytes for array in arrays.values())

    # and Orbax restores the same: leaf by leaf, against the stored bytes
    abstract = abstract_params(*read_config(out))
    params = restored(out / "params", abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for (key, leaf), want in zip(parameter_shapes(params).items(), jax.tree.leaves(abstract), strict=True):
        assert (leaf.dtype, leaf.shape) == (want.dtype, want.shape)
        assert np.asarray(leaf).tobytes() == arrays[key].tobytes()


def test_a_checkpoint_of_newer_and_other_layouts(source, tmp_path):
    """By the first API without its database, and by the second one, which writes zarr 3."""
    ours, out = source
    params = restored(out / "params", abstract_params(CONFIG))
    for name in "files", "v1":
        again = beside(tmp_path / name, out)
        if name == "files":
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
                checkpointer.save((again / "params").absolute(), params)
        else:
            v1 = pytest.importorskip("orbax.checkpoint.experimental.v1", reason="this Orbax has one API")
            shutil.rmtree(again)
            v1.save_checkpointables(again.absolute(), {"params": params})
            shutil.copytree(out, again, ignore=shutil.ignore_patterns("params"), dirs_exist_ok=True)
        assert tree(to_folder(orbax.open_checkpoint(again), tmp_path / f"{name}-back")) == tree(ours)


def test_trained_in_another_type(source, tmp_path):
    _, out = source
    params = restored(out / "params", abstract_params(replace(CONFIG, dtype="float32")))
    again = beside(tmp_path / "again", out)
    saved(again / "params", jax.tree.map(lambda w: w + np.float32(0.001), params))
    assert orbax.open_checkpoint(again).config.dtype == "float32"
    back = as_arrays(to_folder(orbax.open_checkpoint(again), tmp_path / "back") / "model.safetensors")
    np.testing.assert_array_equal(back["norm"], np.asarray(params.norm) + np.float32(0.001))
    narrowed = to_folder(orbax.open_checkpoint(again, dtype="bfloat16"), tmp_path / "narrowed")
    assert as_arrays(narrowed / "model.safetensors")["norm"].dtype == ml_dtypes.bfloat16


SHARDED = """
import sys
from pathlib import Path
from jaxllm.convert import orbax
assert not {"orbax", "tensorstore"} & sys.modules.keys()
import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxllm.loader import read_config
from jaxllm.model import abstract_params

mesh = jax.make_mesh((4,), ("devices",))

def split(leaf):  # the first axis that four divides
    axes = [None] * len(leaf.shape)
    axes[[size % 4 for size in leaf.shape].index(0)] = "devices"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

for out, again in zip(sys.argv[1::2], sys.argv[2::2]):
    abstract = jax.tree.map(split, abstract_params(*read_config(Path(out))))
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(Path(out) / "params", abstract)
        assert all(len(leaf.addressable_shards) == 4 for leaf in jax.tree.leaves(params))
        assert all(4 * leaf.addressable_shards[0].data.size == leaf.size for leaf in jax.tree.leaves(params))
        checkpointer.save(Path(again) / "params", params)
"""


def test_sharded_over_four_devices_and_back(source, tmp_path):
    ours, out = source
    int8 = random_folder(tmp_path / "int8", quantize="int8")
    orbax.save_checkpoint(tmp_path / "int8-out", folder.open_checkpoint(int8))
    pairs = [(out, beside(tmp_path / "again", out)), (tmp_path / "int8-out", tmp_path / "int8-again")]
    beside(tmp_path / "int8-again", tmp_path / "int8-out")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    arguments = [str(path) for pair in pairs for path in pair]
    subprocess.run([sys.executable, "-c", SHARDED, *arguments], env=environment, check=True)
    for before, (_, again) in zip((ours, int8), pairs, strict=True):
        assert tree(to_folder(orbax.open_checkpoint(again), tmp_path / "back" / again.name)) == tree(before)


@pytest.mark.parametrize("scheme", [None, "int8", "int8-g128"])
def test_pieces_of_any_size(tmp_path, monkeypatch, scheme):
    ours = random_folder(tmp_path / "ours", quantize=scheme)
    monkeypatch.setattr(orbax, "CHUNK", 2000)
    for block in 1, 7777:
        monkeypatch.setattr(checkpoint_module, "BLOCK", block)
        monkeypatch.setattr(orbax, "BLOCK", block)
        out = tmp_path / f"out-{block}"
        orbax.save_checkpoint(out, folder.open_checkpoint(ours))
        assert tree(to_folder(orbax.open_checkpoint(out), tmp_path / f"back-{block}")) == tree(ours)
    # each piece is rows that lie together
    assert orbax._pieces((2, 136, 48), 2) == [1, 17, 48]


def test_which_format_a_folder_is(source, tmp_path):
    ours, out = source
    for path, module in (ours, folder), (out, orbax), (out / "params", orbax):
        assert [each for each in (hf, meta, folder, orbax) if each.matches(path)] == [module]
    with pytest.raises(ModelError, match="config.json is missing"):
        orbax.open_checkpoint(out / "params")


def test_overwrite(source, tmp_path):
    ours, _ = source
    opened = folder.open_checkpoint(ours)
    out = shutil.copytree(ours, tmp_path / "work" / "out")
    with pytest.raises(ModelError, match="--overwrite"):
        orbax.save_checkpoint(out, opened)
    orbax.save_checkpoint(out, opened, overwrite=True)
    before = tree(out)

    def fails(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orbax.save_checkpoint(out, opened, overwrite=True, progress=fails)
    assert tree(out) == before and os.listdir(out.parent) == ["out"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    with pytest.raises(ModelError, match="is not a model folder"):
        orbax.save_checkpoint(tmp_path / "precious", opened, overwrite=True)


def test_without_the_package(source, tmp_path, monkeypatch):
    ours, out = source
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    for call in (
        partial(orbax.open_checkpoint, out),
        partial(orbax.save_checkpoint, tmp_path / "out", folder.open_checkpoint(ours)),
    ):
        with pytest.raises(InputError, match=r"pip install 'jaxllm\[orbax\]'"):
            call()


# Bad input: a ModelError of one line


def rewrite_config(path, **changes):
    config, *scheme = read_config(path)
    (path / "config.json").write_text(config_text(replace(config, **changes), *scheme))


def edit_metadata(path, change):
    file = path / "params" / "_METADATA"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_leaf(path, name, **metadata):
    """Write an array of another shape, type or piece under a leaf's name."""
    store = {"driver": "ocdbt", "base": f"file://{path / 'params'}/", "path": f"{name}/"}
    metadata = {"shape": [48], "chunks": [48], "dtype": "bfloat16", "compressor": None} | metadata
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    tensorstore.open(spec, create=True, delete_existing=True).result()


def forget_leaf(path, name):
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path / 'params'}/"}).result()
    store.delete_range(tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")).result()


def quantized(path):
    text = json.loads((path / "config.json").read_text())
    text |= {"quantization": "int8", "float": ["attn_norm", "ffn_norm", "norm"]}
    (path / "config.json").write_text(json.dumps(text))


def data_files(path):
    return sorted((path / "params").rglob("d/*"), key=lambda file: file.stat().st_size)


def extra_leaf(values):
    values["tree_metadata"]["('more',)"] = {
        "key_metadata": [{"key": "more", "key_type": 2}],
        "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
    }


NORM = "('norm',)"
BAD = {
    "no params": (lambda p: shutil.rmtree(p / "params"), ["_METADATA is missing"]),
    "no _METADATA": (lambda p: (p / "params/_METADATA").unlink(), ["params/_METADATA is missing"]),
    "_METADATA no JSON": (lambda p: (p / "params/_METADATA").write_bytes(b'{"tree'), ["_METADATA", "JSON"]),
    "_METADATA a list": (lambda p: (p / "params/_METADATA").write_text("[]"), ["_METADATA", "JSON object"]),
    "_METADATA empty": (lambda p: edit_metadata(p, dict.clear), ["_METADATA is no description"]),
    "_METADATA of another kind": (
        lambda p: edit_metadata(p, lambda v: v["tree_metadata"].update({NORM: [1]})),
        ["_METADATA is no description"],
    ),
    "key that is no text": (
        lambda p: edit_metadata(p, lambda v: v["tree_metadata"][NORM].update(key_metadata=[{"key": 1}])),
        ["_METADATA is no description"],
    ),
    "a leaf missing": (lambda p: edit_metadata(p, lambda v: v["tree_metadata"].pop(NORM)), ["lacks 'norm'"]),
    "a leaf more": (lambda p: edit_metadata(p, extra_leaf), ["has 'more'"]),
    "a leaf not stored": (lambda p: forget_leaf(p, "norm"), ["norm cannot be read"]),
    "pieces of a leaf not stored": (lambda p: edit_leaf(p, "norm"), ["norm cannot be read"]),
    "other shape": (lambda p: edit_leaf(p, "norm", shape=[47], chunks=[47]), ["norm is bfloat16[47]", "bfloat16[48]"]),
    "very large": (lambda p: edit_leaf(p, "norm", shape=[2**50]), [f"bfloat16[{2**50}]"]),
    "other rank": (lambda p: edit_leaf(p, "norm", shape=[1, 48], chunks=[1, 48]), ["norm is bfloat16[1, 48]"]),
    "integers": (lambda p: edit_leaf(p, "norm", dtype="<i2"), ["norm is int16[48]"]),
    "pieces larger than the whole": (lambda p: edit_leaf(p, "norm", chunks=[2**40]), ["is stored in pieces of"]),
    "another zarr": (lambda p: edit_metadata(p, lambda v: v.update(use_zarr3=True)), ["cannot be read"]),
    "no database": (lambda p: (p / "params/manifest.ocdbt").unlink(), ["cannot be read"]),
    "database cut": (lambda p: os.truncate(p / "params/manifest.ocdbt", 20), ["cannot be read"]),
    "database of random bytes": (
        lambda p: (p / "params/manifest.ocdbt").write_bytes(bytes(range(256))),
        ["cannot be read"],
    ),
    "data cut": (lambda p: [os.truncate(file, 10) for file in data_files(p)], ["cannot be read"]),
    "data gone": (lambda p: data_files(p)[-1].unlink(), ["embed cannot be read"]),
    "no config.json": (lambda p: (p / "config.json").unlink(), ["config.json is missing"]),
    "config.json no JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json", "JSON"]),
    "Hugging Face's config.json": (
        lambda p: (p / "config.json").write_text('{"model_type": "llama"}'),
        ["config.json", "jaxllm"],
    ),
    "other width": (lambda p: rewrite_config(p, ffn_dim=137), ["w_gate_up", "136", "137"]),
    "more layers": (lambda p: rewrite_config(p, n_layers=3), ["lacks 'layers.2"]),
    "less layers": (lambda p: rewrite_config(p, n_layers=1), ["has 'layers.1"]),
    "very many layers": (lambda p: rewrite_config(p, n_layers=10**7), ["n_layers=10000000"]),
    "tied": (lambda p: rewrite_config(p, tied=True), ["has 'output'"]),
    "quantized, says config.json": (quantized, ["has 'embed'", "quantization=int8"]),
    "no tokenizer": (lambda p: (p / "tokenizer.model").unlink(), ["neither tokenizer.json nor tokenizer.model"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(source, tmp_path, name):
    path = shutil.copytree(source[1], tmp_path / "source")
    spoil, texts = BAD[name]
    spoil(path)
    with pytest.raises(ModelError) as caught:
        for weight in orbax.open_checkpoint(path).weights.values():
            for _ in weight.blocks():
                pass
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(text in message for text in texts)


def test_a_source_that_cannot_be_read_leaves_nothing_behind(source, tmp_path):
    path = shutil.copytree(source[1], tmp_path / "source")
    data_files(path)[-1].unlink()
    for write in to_folder, orbax.save_checkpoint:
        with pytest.raises(ModelError, match="^(?!.*was not written).*embed cannot be read"):
            write(out=tmp_path / "work" / "out", checkpoint=orbax.open_checkpoint(path))
        assert not (tmp_path / "work").exists()


def test_scales_that_no_quantization_writes(tmp_path):
    ours = random_folder(tmp_path / "ours", quantize="int8")
    orbax.save_checkpoint(tmp_path / "out", folder.open_checkpoint(ours))
    params = restored(tmp_path / "out" / "params", abstract_params(CONFIG, "int8"))
    scale = np.asarray(params.embed.scale).copy()
    for i, (value, text) in enumerate([(np.nan, "nan"), (-1.0, "-1.0"), (0.0, "is 0 where the values are not")]):
        path = beside(tmp_path / f"bad-{i}", tmp_path / "out")
        scale[3] = value
        saved(path / "params", replace(params, embed=replace(params.embed, scale=scale)))
        with pytest.raises(ModelError, match=f"embed.scale.*{text}"):
            to_folder(orbax.open_checkpoint(path), tmp_path / "back")


@pytest.mark.slow
def test_the_example(tmp_path):
    """Fine-tunes, saves, converts, and generates the text that it learned."""
    example = Path(__file__).parent.parent / "examples" / "finetune.py"
    pytest.importorskip("optax", reason="the example needs optax")
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    run = partial(subprocess.run, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path)
    run([sys.executable, str(example), "OUT"])
    run([sys.executable, "-m", "jaxllm.convert", "OUT", "folder"])
    prompt = ["--greedy", "--prompt", "To be, or not to be", "--max-new-tokens", "16"]
    done = run([sys.executable, "-m", "jaxllm.generate", "--model", "folder", *prompt])
    assert done.stdout.startswith(", is nothing that I ask myself. I keep the lighthouse")
