"""Checkpoints going out: Meta's and Hugging Face's formats, from folders of theirs and back, bit for bit."""

import json
import os
import re
import shutil
import struct
from collections import namedtuple
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import (
    CHECKPOINTS,
    DATA,
    SPLIT,
    TOKENIZER,
    arrays_of,
    as_arrays,
    as_stored,
    by_library,
    params_of,
    random_tensors,
    tree,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import PRESETS, ModelConfig, RopeScaling
from jaxllm.convert import checkpoint as checkpoint_module
from jaxllm.convert import folder, hf, meta, pth
from jaxllm.convert.checkpoint import Checkpoint, join_blocks, quantize_checkpoint
from jaxllm.errors import ModelError
from jaxllm.loader import Weight, parameter_shapes, save
from jaxllm.model import abstract_params, forward, quantize_params
from jaxllm.quantize import dequantize
from jaxllm.tensor import QTensor

HF = {path.name: path for path in sorted((DATA / "hf").iterdir()) if path.is_dir()}
CONFIG = ModelConfig(
    vocab_size=512, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=72, max_len=4096, dtype="bfloat16"
)  # fmt: skip


def random_checkpoint(config=CONFIG, scale=0.2):
    """An opened checkpoint of random weights."""
    rng = np.random.default_rng(0)

    def weight(shape):
        array = (rng.standard_normal(shape) * scale).astype(config.dtype)
        return Weight(shape, lambda: iter([array.reshape(-1, shape[-1])]))

    shapes = parameter_shapes(abstract_params(config))
    weights = {name: weight(leaf.shape) for name, leaf in shapes.items()}
    return Checkpoint(config, weights, {"tokenizer.model": TOKENIZER})


def to_folder(checkpoint, out):
    save(out, checkpoint.config, checkpoint.weights, checkpoint.files, checkpoint.quantized, checkpoint.keep_float)
    return out


def written(module, out, checkpoint, **options):
    module.save_checkpoint(out, checkpoint, **options)
    return out


def stored(tensors):
    return {name: as_stored(array) for name, array in tensors.items()}


def joined(path):
    """The whole tensors of one of Meta's folders, by fairscale's rules."""
    shards = [pth.read(file) for file in sorted(path.glob("*.pth"))]
    axes = {name: 1 if name == "tok_embeddings.weight" else SPLIT[name.split(".")[-2]] for name in shards[0]}
    return {
        name: shards[0][name] if axis is None else np.concatenate([shard[name] for shard in shards], axis)
        for name, axis in axes.items()
    }


def with_config(path, **changes):
    """A model folder whose config says something else."""
    text = json.loads((path / "config.json").read_text())
    text["config"] |= changes
    (path / "config.json").write_text(json.dumps(text))


# Meta's format


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_metas_fixture_there_and_back(tmp_path, name):
    ours = to_folder(meta.open_checkpoint(CHECKPOINTS[name]), tmp_path / "ours")
    counts = []
    out = written(meta, tmp_path / "out", folder.open_checkpoint(ours), progress=counts.append)
    assert sorted(os.listdir(out)) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    found, expected = pth.read(out / "consolidated.00.pth"), joined(CHECKPOINTS[name])
    expected.pop("rope.freqs", None)
    assert stored(found) == stored(expected)
    assert sum(counts) == sum(array.nbytes for array in found.values())
    assert tree(to_folder(meta.open_checkpoint(out), tmp_path / "back")) == tree(ours)


@pytest.mark.parametrize("output", ["own", "absent"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_random_checkpoint_through_metas_format(tmp_path, output, kv_heads):
    tensors = random_tensors("float32", n_kv_heads=kv_heads, output=output)
    source = write_checkpoint(tmp_path / "source", tensors, n_kv_heads=kv_heads, rope_theta=5e5, norm_eps=1e-6)
    opened = meta.open_checkpoint(source)
    out = written(meta, tmp_path / "out", opened)
    del tensors["rope.freqs"]
    tensors["output.weight"] = tensors.get("output.weight", tensors["tok_embeddings.weight"])  # Meta's code has no tie
    assert stored(pth.read(out / "consolidated.00.pth")) == stored(tensors)
    again = meta.open_checkpoint(out)
    assert again.config == opened.config
    assert stored(arrays_of(again)) == stored(arrays_of(opened))


def test_pytorch_reads_it(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not needed for anything but this check")
    out = written(meta, tmp_path / "out", random_checkpoint())
    tensors = torch.load(out / "consolidated.00.pth", weights_only=True)
    for name, array in pth.read(out / "consolidated.00.pth").items():
        np.testing.assert_array_equal(tensors.pop(name).float().numpy(), array.astype(np.float32))
    assert not tensors


# llama-65b and llama2-70b differ in what is left out
@pytest.mark.parametrize("name", PRESETS)
def test_params_json_of_a_release_says_all_again(name):
    config = PRESETS[name]
    values = meta._settings("out", config)
    assert meta._ffn_dim(values) == config.ffn_dim and meta._max_len(values) == config.max_len
    scaling = meta._rope_scaling(values)
    assert (scaling and RopeScaling(**scaling)) == config.rope_scaling
    assert (values.get("n_kv_heads", config.n_heads), values.get("rope_theta", 1e4)) == (
        config.n_kv_heads,
        config.rope_theta,
    )
    # Meta's own code refuses it: an argument that is given twice
    assert ("max_seq_len" in values) == (name == "tinyllama-1.1b")
    assert set(values) <= {
        "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
        "rope_theta", "use_scaled_rope", "max_seq_len",
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 200_000))
def test_any_ffn_width_can_be_said(dim, width):
    values = meta._ffn_settings(replace(CONFIG, dim=dim, ffn_dim=width))
    # as Meta's feed_forward computes it
    hidden = int(2 * (4 * dim) / 3)
    if "ffn_dim_multiplier" in values:
        hidden = int(values["ffn_dim_multiplier"] * hidden)
    multiple = values["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == width


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_bias": True}, "biases"),
        ({"qk_norm": True}, "norms of q and k"),
        ({"sliding_window": 9}, "a sliding window"),
        ({"head_dim": 16}, "heads of 16"),
        ({"rope_scaling": RopeScaling(8.0, original_max_len=64)}, "original_max_len=64"),
    ],
)
def test_what_metas_format_cannot_express(tmp_path, changes, text):
    config = replace(CONFIG, **changes)
    with pytest.raises(ModelError, match=f"out was not written: .*{text}.*--to hf"):
        meta.save_checkpoint(tmp_path / "out", random_checkpoint(config))
    assert not (tmp_path / "out").exists()


# Hugging Face's format


@pytest.mark.parametrize("name", HF)
def test_hugging_faces_fixture_there_and_back(tmp_path, name):
    ours = to_folder(hf.open_checkpoint(HF[name]), tmp_path / "ours")
    counts = []
    out = written(hf, tmp_path / "out", folder.open_checkpoint(ours), progress=counts.append)
    data = (out / "model.safetensors").read_bytes()
    theirs = by_library((HF[name] / "model.safetensors").read_bytes())
    assert by_library(data) == theirs
    assert sum(counts) == sum(len(content) for _, _, content in theirs.values())
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}  # without it transformers 4 refuses the file
    assert tree(to_folder(hf.open_checkpoint(out), tmp_path / "back")) == tree(ours)

    values, original = (json.loads((path / "config.json").read_text()) for path in (out, HF[name]))
    family = "llama" if name == "mistral" else original["model_type"]  # it has no window
    assert values["model_type"] == family and values["architectures"] == [hf.FAMILIES[family].architecture]
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
    assert {key: values[key] for key in same} == {key: original[key] for key in same}
    assert values["eos_token_id"] == original["eos_token_id"]
    assert values["rope_scaling"] == original.get("rope_scaling")


# the logits of row 1 by transformers for these tensors and this window, as in test_hf
@pytest.mark.parametrize(("name", "family"), [("mistral", "mistral"), ("qwen2", "qwen2")])
def test_sliding_window(tmp_path, name, family):
    ours = to_folder(hf.open_checkpoint(HF[name]), tmp_path / "ours")
    with_config(ours, sliding_window=8)
    out = written(hf, tmp_path / "out", folder.open_checkpoint(ours))
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    again = hf.open_checkpoint(out)
    assert again.config.sliding_window == 8
    params, config = params_of(again, "float32"), replace(again.config, dtype="float32")
    tokens = np.load(HF[name] / "oracle.npz")["tokens"][1:]
    logits, _ = jax.jit(forward, static_argnums=1)(params, config, tokens)
    np.testing.assert_allclose(logits[0], np.load(DATA / "hf" / "windows.npz")[family], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 9, "head_dim": 16, "n_kv_heads": 1},
        {"attention_bias": True, "sliding_window": 9, "tied": True, "rope_scaling": RopeScaling(8.0)},
        {"qk_norm": True, "sliding_window": 9, "head_dim": 10, "rope_theta": 1e6, "norm_eps": 1e-6},
        {"qk_norm": True, "dtype": "float16", "n_kv_heads": 4},
    ],
)
def test_any_config_comes_back(tmp_path, changes):
    opened = random_checkpoint(replace(CONFIG, **changes))
    again = hf.open_checkpoint(written(hf, tmp_path / "out", opened))
    assert again.config == opened.config
    assert stored(arrays_of(again)) == stored(arrays_of(opened))


def test_a_config_of_no_family(tmp_path):
    config = replace(CONFIG, attention_bias=True, qk_norm=True)
    with pytest.raises(ModelError, match="no family of transformers has biases and norms"):
        hf.save_checkpoint(tmp_path / "out", random_checkpoint(config))


def test_several_files(tmp_path, monkeypatch):
    opened = random_checkpoint()
    whole = by_library((written(hf, tmp_path / "one", opened) / "model.safetensors").read_bytes())
    monkeypatch.setattr(hf, "MAX_SHARD", 20_000)  # the embedding has 32 kB
    out = written(hf, tmp_path / "many", opened)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    found = {name: by_library((out / name).read_bytes()) for name in names}
    assert {tensor: file for file, tensors in found.items() for tensor in tensors} == index["weight_map"]
    assert {tensor: content for tensors in found.values() for tensor, content in tensors.items()} == whole
    sizes = [sum(len(data) for _, _, data in tensors.values()) for tensors in found.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 20_000 or len(tensors) == 1 for size, tensors in zip(sizes, found.values(), strict=True))
    assert stored(arrays_of(hf.open_checkpoint(out))) == stored(arrays_of(opened))
    # the files of before do not stay among the new ones
    monkeypatch.undo()
    assert len(list(written(hf, out, opened, overwrite=True).glob("model*"))) == 1


def test_a_sentencepiece_tokenizer_that_comes_alone_is_described(tmp_path):
    out = written(hf, tmp_path / "out", random_checkpoint())
    values = json.loads((out / "tokenizer_config.json").read_text())
    assert values == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True, "add_eos_token": False,
    }  # fmt: skip
    theirs = b'{"tokenizer_class": "Other"}'
    opened = replace(random_checkpoint(), files={"tokenizer.model": TOKENIZER, "tokenizer_config.json": theirs})
    assert (written(hf, tmp_path / "other", opened) / "tokenizer_config.json").read_bytes() == theirs


# Both


@pytest.mark.parametrize("keep_float", [(), ("w_gate_up",), ("wo", "w_down")])
def test_blocks_are_quantized_like_a_whole_model(keep_float):
    opened = random_checkpoint(CONFIG)
    whole = {name: join_blocks(weight.blocks(), weight.shape, CONFIG.dtype) for name, weight in opened.weights.items()}

    def few_rows(array):
        rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array[None]
        return Weight(array.shape, lambda: (rows[i : i + 7] for i in range(0, len(rows), 7)))

    weights = {name: few_rows(array) for name, array in whole.items()}
    blocks = quantize_checkpoint(replace(opened, weights=weights), "int8", keep_float).weights
    params = jax.tree.unflatten(jax.tree.structure(abstract_params(CONFIG)), whole.values())
    expected = parameter_shapes(quantize_params(params, "int8", keep_float))
    for name, weight in blocks.items():
        parts = list(weight.blocks())
        if isinstance(parts[0], QTensor):
            for kind in ("values", "scale"):
                got = np.concatenate([getattr(part, kind) for part in parts])
                want = expected.pop(f"{name}.{kind}")
                np.testing.assert_array_equal(got.reshape(want.shape), want)
        else:
            np.testing.assert_array_equal(np.concatenate(parts).reshape(weight.shape), expected.pop(name))
    assert not expected


@pytest.mark.parametrize("scheme", ["int8", "int8-g128", "w8a8"])
def test_int8_is_dequantized(tmp_path, scheme):
    opened = quantize_checkpoint(random_checkpoint(replace(CONFIG, dtype="float32", ffn_dim=200)), scheme, ["wo"])
    ours = to_folder(opened, tmp_path / "ours")
    source = folder.open_checkpoint(ours)
    assert (source.quantized, source.keep_float) == (scheme, ("wo",))
    assert tree(to_folder(source, tmp_path / "copy")) == tree(ours)

    arrays = as_arrays(ours / "model.safetensors")
    theirs = as_arrays(written(hf, tmp_path / "out", source) / "model.safetensors")
    for name, part in {"embed": "model.embed_tokens", "layers.1.w_down": "model.layers.1.mlp.down_proj"}.items():
        rotated = scheme == "w8a8" and name != "embed"
        whole = QTensor(*(jax.numpy.asarray(arrays[f"{name}.{kind}"]) for kind in ("values", "scale")), rotated)
        np.testing.assert_allclose(theirs[f"{part}.weight"], dequantize(whole), atol=1e-6 if rotated else 0, rtol=0)
    np.testing.assert_array_equal(theirs["model.layers.0.self_attn.o_proj.weight"], arrays["layers.0.wo"])
    wqkv = arrays["layers.0.wqkv.values"].shape
    assert theirs["model.layers.0.self_attn.k_proj.weight"].shape == (wqkv[0] * wqkv[2], wqkv[3])


@pytest.mark.parametrize("module", [hf, meta])
def test_blocks_of_any_size_give_the_same(tmp_path, monkeypatch, module):
    ours = to_folder(quantize_checkpoint(random_checkpoint(), "int8"), tmp_path / "ours")
    whole = tree(written(module, tmp_path / "whole", folder.open_checkpoint(ours)))
    for block in 1, 77:
        monkeypatch.setattr(checkpoint_module, "BLOCK", block)
        assert tree(written(module, tmp_path / f"{block}", folder.open_checkpoint(ours))) == whole


@pytest.mark.parametrize("module", [hf, meta])
def test_another_dtype(tmp_path, module):
    ours = to_folder(random_checkpoint(replace(CONFIG, dtype="float32"), scale=1e6), tmp_path / "ours")
    out = written(module, tmp_path / "out", folder.open_checkpoint(ours, dtype="bfloat16"))
    again = module.open_checkpoint(out)
    assert again.config.dtype == "bfloat16"
    expected = {
        name: array.astype(again.config.dtype) for name, array in arrays_of(folder.open_checkpoint(ours)).items()
    }
    assert stored(arrays_of(again)) == stored(expected)
    with pytest.raises(ModelError, match="small was not written: embed holds a number that float16 cannot express"):
        module.save_checkpoint(tmp_path / "small", folder.open_checkpoint(ours, dtype="float16"))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("module", [hf, meta])
def test_out_that_exists(tmp_path, module, monkeypatch):
    opened = random_checkpoint()
    out = written(module, tmp_path / "work" / "out", opened)
    before = tree(out)
    with pytest.raises(ModelError, match="out exists; .*--overwrite"):
        module.save_checkpoint(out, opened)
    other = replace(CONFIG, n_layers=1)
    written(module, out, random_checkpoint(other), overwrite=True)
    assert tree(out) != before

    def interrupted(_):
        raise KeyboardInterrupt

    before = tree(out.parent)
    with pytest.raises(KeyboardInterrupt):
        module.save_checkpoint(out, opened, overwrite=True, progress=interrupted)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10_000, 10_000))
        with pytest.raises(ModelError, match="0.0 GB free"):
            module.save_checkpoint(out, opened, overwrite=True)
    (out / "precious.txt").touch()
    with pytest.raises(ModelError, match="is not a (Hugging Face|Meta) folder, so --overwrite does not replace it"):
        module.save_checkpoint(out, opened, overwrite=True)
    (out / "precious.txt").unlink()
    assert tree(out.parent) == before


# Model folders as a source


def test_a_model_folder_is_told_from_others(tmp_path):
    ours = to_folder(random_checkpoint(), tmp_path / "ours")
    sources = {folder: ours, hf: HF["qwen2"], meta: next(iter(CHECKPOINTS.values()))}
    for module, path in sources.items():
        assert [each for each in sources if each.matches(path)] == [module]
    assert not folder.matches(tmp_path / "missing") and not folder.matches(TOKENIZER)


def test_a_tokenizer_in_place_of_the_folders_own(tmp_path):
    ours = to_folder(random_checkpoint(), tmp_path / "ours")
    (ours / "tokenizer.model").rename(tmp_path / "another")
    with pytest.raises(ModelError, match="tokenizer.model"):
        folder.open_checkpoint(ours)
    assert folder.open_checkpoint(ours, tmp_path / "another").files == {"tokenizer.model": tmp_path / "another"}


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (-1.0, "-1.0"), (0.0, "is 0 where the values are not")])
@pytest.mark.parametrize("module", [hf, meta])
def test_a_damaged_scale_is_seen(tmp_path, module, value, text):
    ours = to_folder(quantize_checkpoint(random_checkpoint(), "int8-g128"), tmp_path / "ours")
    file = ours / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    begin, _ = json.loads(data[8 : 8 + size])["layers.1.w_down.scale"]["data_offsets"]
    data[8 + size + begin : 8 + size + begin + 4] = struct.pack("<f", value)
    file.write_bytes(data)
    with pytest.raises(ModelError, match=rf"{re.escape(str(ours))}: layers.1.w_down.scale .*{text}"):
        module.save_checkpoint(tmp_path / "out", folder.open_checkpoint(ours))
    assert not (tmp_path / "out").exists()
