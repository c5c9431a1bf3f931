"""Hugging Face's checkpoints: against transformers' answers, in every way that they are stored, and bad input."""

import json
import os
import re
import shutil
import sys
import time
from collections import namedtuple
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import DATA, TOKENIZER, arrays_of, as_arrays, as_stored, params_of, resident_bytes, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.convert import checkpoint as checkpoint_module
from jaxllm.convert import hf, meta, pth
from jaxllm.errors import ModelError
from jaxllm.loader import parameter_shapes
from jaxllm.model import abstract_params, forward

HF = DATA / "hf"
FIXTURES = {folder.name: folder for folder in sorted(HF.iterdir()) if folder.is_dir()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
WQ, WK, NORM = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    values = {name: value for name, value in (config_of(folder) | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))


def tensors_of(folder):
    """The stored tensors, by the safetensors library."""
    return as_arrays(folder / WEIGHTS)


def write_safetensors(file, tensors):
    """Write arrays by the safetensors library."""
    file.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in tensors.items()}))


def write_sharded(folder, tensors, count=3, name=WEIGHTS, write=write_safetensors):
    """Write tensors into `count` files with an index, in place of the one file."""
    (folder / WEIGHTS).unlink()
    stem, _, suffix = name.partition(".")
    weight_map = {}
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        part = dict(list(tensors.items())[i::count])
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def stored(checkpoint):
    return {name: as_stored(array) for name, array in arrays_of(checkpoint).items()}


def model(checkpoint):
    """The Params of a checkpoint and its config, in float32."""
    return params_of(checkpoint, "float32"), replace(checkpoint.config, dtype="float32")


run_forward = jax.jit(forward, static_argnums=1)


@pytest.fixture
def folder(tmp_path):
    """A function: a fixture's copy that may be changed."""
    return lambda name="llama-gqa": shutil.copytree(FIXTURES[name], tmp_path / "models" / name)


# Right input


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_against_transformers(name):
    checkpoint = hf.open_checkpoint(FIXTURES[name])
    assert checkpoint.config.dtype == tensors_of(FIXTURES[name])[EMBED].dtype.name
    params, config = model(checkpoint)
    oracle = np.load(FIXTURES[name] / "oracle.npz")
    logits, _ = run_forward(params, config, oracle["tokens"])
    np.testing.assert_allclose(logits, oracle["logits"], atol=2e-4, rtol=0)
    # greedy ids are what follows from themselves: in a call of the same shape, so that nothing compiles again
    tokens = np.zeros_like(oracle["tokens"])
    tokens[:, :24] = np.concatenate([oracle["tokens"][:, :8], oracle["greedy_ids"]], 1)
    logits, _ = run_forward(params, config, tokens)
    np.testing.assert_array_equal(np.argmax(logits[:, 7:23], -1), oracle["greedy_ids"])


def fused(tensors):
    """llama's tensors as phi3 stores them."""
    out = dict(tensors)
    for layer in {name.partition("self_attn")[0] for name in tensors if "q_proj" in name}:
        for whole, names in {
            "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            parts = [out.pop(f"{layer}{name}.weight") for name in names]
            out[f"{layer}{whole}.weight"] = np.concatenate(parts)
    return out


PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}


# windows.npz: logits of row 1 by transformers 5.23.0 (eager, float32) for these tensors and these changes
@pytest.mark.parametrize(
    ("name", "family", "changes"),
    [
        ("llama-gqa", "phi3", PHI3 | {"sliding_window": 8}),
        ("mistral", "mistral", {"sliding_window": 8}),
        ("qwen2", "qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_sliding_window_against_transformers(folder, name, family, changes):
    source = folder(name)
    edit_config(source, **changes)
    if family == "phi3":
        write_safetensors(source / WEIGHTS, fused(tensors_of(source)))
    params, config = model(hf.open_checkpoint(source))
    assert config.sliding_window == 8
    logits, _ = run_forward(params, config, np.load(source / "oracle.npz")["tokens"][1:])
    np.testing.assert_allclose(logits[0], np.load(HF / "windows.npz")[family], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_bit_for_bit(name):
    """Head by head, against the rows that transformers' view(heads, H) gives each head."""
    checkpoint = hf.open_checkpoint(FIXTURES[name])
    config, ours, theirs = checkpoint.config, arrays_of(checkpoint), tensors_of(FIXTURES[name])
    assert config.tied == (OUTPUT not in theirs) == ("output" not in ours)
    for i in range(config.n_layers):
        q, k, v = (
            theirs[f"model.layers.{i}.self_attn.{part}_proj.weight"].reshape(-1, config.head_dim, config.dim)
            for part in "qkv"
        )
        wqkv = ours[f"layers.{i}.wqkv"]
        for head in range(config.n_heads):
            kv, g = divmod(head, config.n_heads // config.n_kv_heads)
            np.testing.assert_array_equal(wqkv[kv, g], q[head], strict=True)
        np.testing.assert_array_equal(wqkv[:, -2], k, strict=True)
        np.testing.assert_array_equal(wqkv[:, -1], v, strict=True)
        gate_up = [theirs[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        np.testing.assert_array_equal(ours[f"layers.{i}.w_gate_up"], gate_up, strict=True)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
@pytest.mark.parametrize(
    "store",
    [
        lambda folder, tensors: write_sharded(folder, tensors),
        lambda folder, tensors: (folder / WEIGHTS).rename(folder / "another.safetensors"),
        lambda folder, tensors: [(folder / WEIGHTS).unlink(), pth.write(folder / "pytorch_model.bin", tensors)],
        lambda folder, tensors: write_sharded(folder, tensors, 2, "pytorch_model.bin", pth.write),
    ],
    ids=["sharded", "another name", "bin", "bin sharded"],
)
def test_however_it_is_stored(folder, name, store):
    source = folder(name)
    store(source, tensors_of(source))
    found, expected = hf.open_checkpoint(source), hf.open_checkpoint(FIXTURES[name])
    assert found.config == expected.config
    assert stored(found) == stored(expected)


def test_safetensors_come_before_bin_and_consolidated(folder):
    source = folder()
    expected = stored(hf.open_checkpoint(source))
    (source / "pytorch_model.bin").write_bytes(b"not used")
    (source / "consolidated.safetensors").write_bytes(b"not used")
    assert stored(hf.open_checkpoint(source)) == expected


def test_links_as_in_hugging_faces_cache(folder, tmp_path):
    blobs = folder()
    source = tmp_path / "snapshot"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    assert stored(hf.open_checkpoint(source)) == stored(hf.open_checkpoint(blobs))


def test_tensors_that_config_json_implies_are_left_out(folder):
    source = folder()
    expected = stored(hf.open_checkpoint(source))
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in (0, 1)}
    write_safetensors(source / WEIGHTS, tensors_of(source) | frequencies)
    found = hf.open_checkpoint(source)
    assert stored(found) == expected and found.config.dtype == "bfloat16"


@pytest.mark.parametrize("claim", [True, False, None, "absent"])
def test_tied_embeddings(folder, claim):
    source = folder()
    tensors = tensors_of(source)
    edit_config(source, tie_word_embeddings=claim)
    if claim is not True:
        assert not hf.open_checkpoint(source).config.tied
    copied = tensors | {OUTPUT: tensors[EMBED]}
    for stored_tensors in copied, {name: tensor for name, tensor in tensors.items() if name != OUTPUT}:
        write_safetensors(source / WEIGHTS, stored_tensors)
        found = hf.open_checkpoint(source)
        assert found.config.tied and "output" not in found.weights


def test_biases_of_llama(folder):
    """qwen2's tensors make a llama with attention_bias, whose bias behind the attention may be stored if it is 0."""
    source = folder("qwen2")
    expected = hf.open_checkpoint(FIXTURES["qwen2"])
    edit_config(source, model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True)
    found = hf.open_checkpoint(source)
    assert found.config == expected.config and stored(found) == stored(expected)
    zeros = {f"model.layers.{i}.self_attn.o_proj.bias": np.zeros(48, np.float32) for i in (0, 1)}
    write_safetensors(source / WEIGHTS, tensors_of(source) | zeros)
    assert stored(hf.open_checkpoint(source)) == stored(expected)


def test_dtype(folder):
    source = folder()
    tensors = tensors_of(source)
    assert hf.open_checkpoint(source, dtype="float16").config.dtype == "float16"
    write_safetensors(source / WEIGHTS, tensors | {NORM: tensors[NORM].astype(np.float32)})
    assert hf.open_checkpoint(source).config.dtype == "bfloat16"  # as config.json says
    assert hf.open_checkpoint(source, dtype="float32").config.dtype == "float32"
    edit_config(source, dtype="absent", torch_dtype="float32")
    assert hf.open_checkpoint(source).config.dtype == "float32"


def test_parts_of_one_weight_in_several_types(folder):
    source = folder()
    expected = arrays_of(hf.open_checkpoint(source))
    tensors = tensors_of(source)
    tensors |= {WQ: tensors[WQ].astype(np.float32), WK: tensors[WK].astype(np.float16)}
    expected["layers.1.wqkv"] = expected["layers.1.wqkv"].astype(np.float32)
    expected["layers.1.wqkv"][:, 2] = tensors[WK].reshape(2, 16, 64)  # float16 cannot express all of bfloat16
    write_safetensors(source / WEIGHTS, tensors)
    found = arrays_of(hf.open_checkpoint(source, dtype="float32"))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), strict=True)


SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
OLD = {"rope_parameters": "absent", "rope_theta": 10000.0}
QWEN3 = {"use_sliding_window": True, "sliding_window": 32}


# What a change of config.json makes of the ModelConfig; transformers' configuration files say why
@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama-gqa", {}, {}),
        ("llama-gqa", OLD, {}),
        ("llama-gqa", OLD | {"rope_theta": "absent"}, {}),
        ("llama-gqa", OLD | {"rope_scaling": None, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ("llama-gqa", OLD | {"rope_scaling": {"type": "default"}}, {}),
        ("llama-gqa", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, {"rope_theta": 1e6}),
        ("llama-gqa", {"rope_parameters": SCALED | {"rope_theta": 3}}, {"rope_theta": 3.0, "rope_scaling": SCALED}),
        ("llama-gqa", OLD | {"rope_scaling": SCALED}, {"rope_scaling": SCALED}),
        ("llama-gqa", {"head_dim": None}, {}),
        ("llama-gqa", {"head_dim": "absent"}, {}),
        ("llama-gqa", {"model_type": "absent"}, {}),
        ("llama-gqa", {"architectures": None}, {}),
        ("llama-gqa", {"architectures": ["LLaMAForCausalLM"]}, {}),
        ("llama-gqa", {"max_position_embeddings": "absent"}, {}),
        ("llama-gqa", {"max_position_embeddings": 4096}, {"max_len": 4096}),
        ("llama-gqa", {"rms_norm_eps": 1e-6}, {"norm_eps": 1e-6}),
        ("llama-gqa", {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2}, {}),
        ("llama-gqa", {"pretraining_tp": 4, "quantization_config": None, "hidden_act": "swish"}, {}),
        ("mistral", {"sliding_window": 32, "use_sliding_window": False}, {"sliding_window": 32}),
        ("mistral", {"sliding_window": "absent"}, {"sliding_window": 4096}),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}, {}),
        ("qwen2", {"use_sliding_window": True}, {}),  # from layer 28 on
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": "absent", "max_window_layers": 0}, {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "absent"}, {}),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": "absent"},
            {"sliding_window": 4096},
        ),
        ("qwen3", {"sliding_window": 32}, {}),
        ("qwen3", QWEN3, {}),
        ("qwen3", QWEN3 | {"layer_types": ["sliding_attention"] * 2}, {"sliding_window": 32}),
        ("qwen3", QWEN3 | {"layer_types": "absent"}, {}),
        ("qwen3", QWEN3 | {"layer_types": None, "max_window_layers": 0}, {"sliding_window": 32}),
    ],
)
def test_config_json(folder, name, changes, expected):
    usual = dict(n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-5, dtype="bfloat16")
    plain = {
        "llama-gqa": ModelConfig(vocab_size=512, dim=64, head_dim=16, ffn_dim=112, max_len=2048, **usual),
        "mistral": ModelConfig(
            vocab_size=512, dim=64, head_dim=16, ffn_dim=96, max_len=4096, rope_theta=1e6, **usual
        ),
        "qwen2": ModelConfig(
            vocab_size=384, dim=48, head_dim=8, ffn_dim=96, max_len=4096, rope_theta=1e6, tied=True,
            attention_bias=True, **usual | dict(n_heads=6, norm_eps=1e-6, dtype="float32"),
        ),
        "qwen3": ModelConfig(
            vocab_size=384, dim=48, head_dim=16, ffn_dim=96, max_len=4096, rope_theta=1e6, tied=True, qk_norm=True,
            **usual | dict(norm_eps=1e-6),
        ),
    }[name]  # fmt: skip
    source = folder(name)
    edit_config(source, **changes)
    if "rope_scaling" in expected:
        expected = expected | {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 64)}
    assert hf.open_checkpoint(source).config == replace(plain, **expected)


def test_mlp_and_attention_of_other_widths(folder):
    """Every size of its own: what is mixed up shows as a wrong shape."""
    rng = np.random.default_rng(0)
    sizes = {"q": (40, 24), "k": (20, 24), "v": (20, 24), "o": (24, 40), "gate": (36, 24), "up": (36, 24)}
    sizes["down"] = 24, 36
    tensors = {EMBED: (70, 24), OUTPUT: (70, 24), "model.norm.weight": (24,)}
    for name, shape in sizes.items():
        part = "mlp" if name in ("gate", "up", "down") else "self_attn"
        tensors[f"model.layers.0.{part}.{name}_proj.weight"] = shape
    tensors |= {f"model.layers.0.{name}_layernorm.weight": (24,) for name in ("input", "post_attention")}
    source = folder()
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in tensors.items()}
    whole = []
    for family, held in ({}, tensors), (PHI3, fused(tensors)):
        write_safetensors(source / WEIGHTS, held)
        edit_config(
            source, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=36,
            num_hidden_layers=1, vocab_size=70, **family,
        )  # fmt: skip
        found = hf.open_checkpoint(source)
        model(found)
        whole.append(stored(found))
    assert whole[0] == whole[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
@pytest.mark.parametrize("kind", [WEIGHTS, "pytorch_model.bin"])
def test_what_was_read_is_no_longer_held_in_memory(folder, monkeypatch, kind):
    source = folder()
    tensors = {name: np.tile(tensor, [16] * tensor.ndim) for name, tensor in tensors_of(source).items()}
    sizes = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
    edit_config(source, **{name: 16 * config_of(source)[name] for name in sizes})
    if kind == WEIGHTS:
        write_safetensors(source / kind, tensors)
    else:
        (source / WEIGHTS).unlink()
        pth.write(source / kind, tensors)
    monkeypatch.setattr(checkpoint_module, "BLOCK", 1 << 18)
    found = hf.open_checkpoint(source)

    peak = 0
    for weight in found.weights.values():
        for _ in weight.blocks():
            pass
        peak = max(peak, resident_bytes(source))
    size = (source / kind).stat().st_size
    assert size > 6e7 and peak < size / 8


# Files that are carried over


@pytest.mark.parametrize("name", FIXTURES)
def test_files_carried_over(name):
    carried = {
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "generation_config.json", "chat_template.jinja",
    }  # fmt: skip
    there = {file.name: file for file in FIXTURES[name].iterdir() if file.name in carried}
    assert hf.open_checkpoint(FIXTURES[name]).files == there


def test_tokenizer_by_name(folder, tmp_path):
    source = folder("qwen2")
    sentencepiece, bpe = tmp_path / "a", tmp_path / "b"
    shutil.copyfile(TOKENIZER, sentencepiece)
    shutil.copyfile(source / "tokenizer.json", bpe)
    others = {name: source / name for name in ("tokenizer_config.json", "special_tokens_map.json")}
    others["generation_config.json"] = source / "generation_config.json"
    for _ in range(2):
        assert hf.open_checkpoint(source, sentencepiece).files == others | {"tokenizer.model": sentencepiece}
        assert hf.open_checkpoint(source, bpe).files == others | {"tokenizer.json": bpe}
        (source / "tokenizer.json").unlink(missing_ok=True)  # it need not have one then


# Bad input: one line that names the file and the remedy


def refusal(source, *arguments):
    """The message with which a folder is refused; checks that nothing on the disk changed."""
    before = tree(source.parent)
    start = time.monotonic()
    with pytest.raises(ModelError) as info:
        hf.open_checkpoint(source, *arguments)
    assert time.monotonic() - start < 5
    assert tree(source.parent) == before
    message = str(info.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def delete(name):
    return lambda folder: (folder / name).unlink()


def edit_tensors(change):
    def edit(folder):
        tensors = tensors_of(folder)
        change(tensors)
        write_safetensors(folder / WEIGHTS, tensors)

    return edit


def edit_tensor(name, change):
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def sharded(change=lambda index: None, then=lambda folder: None):
    def edit(folder):
        write_sharded(folder, tensors_of(folder))
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))
        then(folder)

    return edit


def outside(name):
    """An index that names a sound file elsewhere."""

    def edit(folder):
        write_sharded(folder, tensors_of(folder))
        index = json.loads((folder / INDEX).read_text())
        file = index["weight_map"][WQ]
        (folder / "sub").mkdir()
        for place in folder.parent, folder / "sub":
            shutil.copyfile(folder / file, place / "elsewhere.safetensors")
        elsewhere = name.format(folder=folder)
        index["weight_map"] = {k: elsewhere if v == file else v for k, v in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def twice(folder):
    tensors = tensors_of(folder)
    write_sharded(folder, tensors)
    write_safetensors(folder / "model-00003-of-00003.safetensors", tensors)


def header(**changes):
    """Change an entry of the safetensors header."""

    def edit(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        entries[WQ] |= changes
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
SHARD = "model-00002-of-00003.safetensors"

Bad = namedtuple("Bad", "spoil says fixture", defaults=("llama-gqa",))
BAD = {
    "no config.json": Bad(delete("config.json"), ["{source}/config.json is missing"]),
    "config.json no JSON": Bad(put("config.json", b'{"model_type": "llama",'), ["{source}/config.json", "JSON"]),
    "config.json no UTF-8": Bad(put("config.json", b'{"a\xff": 1}'), ["{source}/config.json", "JSON"]),
    "config.json a list": Bad(put("config.json", b"[]"), ["{source}/config.json", "JSON object"]),
    "config.json deep": Bad(put("config.json", b"[" * 100_000), ["{source}/config.json", "JSON"]),
    "config.json of many digits": Bad(
        put("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"), ["{source}/config.json", "JSON"]
    ),
    "config.json huge": Bad(put("config.json", b" " * (17 << 20)), ["{source}/config.json", "16 MiB"]),
    "config.json a folder": Bad(
        lambda folder: [delete("config.json")(folder), (folder / "config.json").mkdir()], ["{source}/config.json"]
    ),
    "config.json LFS": Bad(put("config.json", LFS), ["{source}/config.json", "Git LFS", "git lfs pull"]),
    **{
        f"model_type {kind}": Bad(
            config(model_type=kind), ["{source}/config.json", f"'{kind}'", "llama, mistral, phi3, qwen2, qwen3"]
        )
        for kind in ("mixtral", "gemma2", "")
    },
    "model_type a list": Bad(config(model_type=["llama"]), ["{source}/config.json", "model_type"]),
    "no model_type": Bad(
        config(model_type="absent", architectures="absent"), ["{source}/config.json", "architectures=None"]
    ),
    "no model_type, other architecture": Bad(
        config(model_type="absent", architectures=["GPT2LMHeadModel"]), ["{source}/config.json", "GPT2LMHeadModel"]
    ),
    "other architecture": Bad(
        config(architectures=["LlamaForSequenceClassification"]),
        ["{source}/config.json", "LlamaForSequenceClassification", "LlamaForCausalLM"],
    ),
    "architectures no list": Bad(config(architectures="LlamaForCausalLM"), ["architectures='LlamaForCausalLM'"]),
    **{
        f"{name} {str(value)[:9]}": Bad(config(**{name: value}), ["{source}/config.json", name])
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size",
            "rms_norm_eps",
        )
        for value in ("absent", None, "32", [32], {}, True, 0, -1, float("nan"), float("inf"), 10**400)
    },
    **{
        f"{name} {value!r}": Bad(config(**{name: value}), ["{source}/config.json", name])
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "mlp_bias")
        for value in ("32", [32], 0.5, -2, float("nan"))
    },
    "attention_bias 1": Bad(config(attention_bias=1), ["{source}/config.json", "attention_bias=1"]),
    "rms_norm_eps 1e300": Bad(config(rms_norm_eps=1e300), ["{source}/config.json", "rms_norm_eps=1e+300"]),
    "heads do not divide": Bad(
        config(num_attention_heads=5, head_dim=None), ["num_attention_heads=5", "hidden_size=64"]
    ),
    "kv heads do not divide": Bad(config(num_key_value_heads=3), ["{source}/config.json", "n_kv_heads=3"]),
    "no kv heads of mistral": Bad(
        config(num_key_value_heads="absent"), ["{source}/config.json", "n_kv_heads=8"], "mistral"
    ),
    "no kv heads of llama": Bad(
        config(num_key_value_heads=None), ["{source}/model.safetensors", "[32, 64]", "[64, 64]"]
    ),
    "odd head_dim": Bad(config(head_dim=15), ["{source}/config.json", "head_dim=15"]),
    "mlp_bias": Bad(config(mlp_bias=True), ["{source}/config.json", "mlp_bias", "q, k and v only"]),
    "hidden_act": Bad(config(hidden_act="gelu"), ["{source}/config.json", "hidden_act='gelu'", "silu"]),
    "hidden_act null": Bad(config(hidden_act=None), ["{source}/config.json", "hidden_act=None", "silu"]),
    **{
        f"quantized by {method}": Bad(
            config(quantization_config={"quant_method": method, "bits": 4}),
            ["{source}/config.json", method, "unquantized"],
        )
        for method in ("gptq", "awq", "bitsandbytes")
    },
    "quantized somehow": Bad(config(quantization_config="x"), ["{source}/config.json", "'x'", "unquantized"]),
    "experts": Bad(config(num_local_experts=8), ["{source}/config.json", "num_local_experts=8", "experts"]),
    **{
        f"rope {kind}": Bad(
            config(rope_scaling={"type": kind, "factor": 2.0}), ["{source}/config.json", kind, "default and llama3"]
        )
        for kind in ("linear", "dynamic", "yarn", "longrope", "su")
    },
    "rope new linear": Bad(
        config(rope_parameters={"rope_type": "linear", "factor": 2.0}), ["'linear'", "default and llama3"]
    ),
    "rope type null": Bad(config(rope_scaling={"rope_type": None, "type": "linear"}), ["default and llama3"]),
    "rope by layer type": Bad(
        config(rope_parameters={"full_attention": {"rope_type": "default"}}), ["{source}/config.json", "full_attention"]
    ),
    "rope a list": Bad(config(rope_scaling=[1]), ["{source}/config.json", "[1]"]),
    "rope theta": Bad(config(rope_parameters={"rope_theta": "x"}), ["{source}/config.json", "rope_theta='x'"]),
    "rope theta old": Bad(config(rope_parameters=None, rope_theta=-1), ["{source}/config.json", "rope_theta=-1"]),
    **{
        f"rope without {name}": Bad(
            config(rope_scaling={k: v for k, v in SCALED.items() if k != name}), ["{source}/config.json", name]
        )
        for name in SCALED
        if name != "rope_type"
    },
    "rope high below low": Bad(
        config(rope_scaling=SCALED | {"high_freq_factor": 0.5}), ["{source}/config.json", "high_freq_factor=0.5"]
    ),
    "partial_rotary_factor": Bad(config(partial_rotary_factor=0.75), ["partial_rotary_factor=0.75", "1"]),
    "partial_rotary_factor new": Bad(
        config(rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor=0.5"]
    ),
    "sliding_window 0": Bad(config(sliding_window=0), ["{source}/config.json", "sliding_window=0"], "mistral"),
    "sliding_window text": Bad(config(sliding_window="8"), ["{source}/config.json", "sliding_window='8'"], "mistral"),
    "some layers in the window": Bad(
        config(use_sliding_window=True, max_window_layers=1), ["{source}/config.json", "1 of 2 layers"], "qwen2"
    ),
    "max_window_layers": Bad(
        config(use_sliding_window=True, max_window_layers=-1), ["{source}/config.json", "max_window_layers"], "qwen2"
    ),
    "use_sliding_window": Bad(config(use_sliding_window="yes"), ["{source}/config.json", "use_sliding"], "qwen2"),
    "mixed layer_types": Bad(
        config(layer_types=["full_attention", "sliding_attention"], **QWEN3), ["1 of 2 layers"], "qwen3"
    ),
    "layer_types without a window": Bad(
        config(layer_types=["sliding_attention"] * 2), ["{source}/config.json", "sliding_window"], "qwen3"
    ),
    "unknown layer_types": Bad(config(layer_types=["full_attention", "linear"]), ["'linear'"], "qwen3"),
    "layer_types of other number": Bad(config(layer_types=["full_attention"]), ["2 layers"], "qwen3"),
    "layer_types no list": Bad(config(layer_types=3), ["layer_types=3"], "qwen3"),
    "no head_dim of qwen3": Bad(
        config(head_dim="absent"), ["{source}/model.safetensors", "[64, 48]", "[512, 48]"], "qwen3"
    ),
    "no weights": Bad(delete(WEIGHTS), ["{source}", "model.safetensors", "pytorch_model.bin"]),
    "weights LFS": Bad(put(WEIGHTS, LFS), ["{source}/model.safetensors", "Git LFS", "git lfs pull"]),
    "bin LFS": Bad(
        lambda folder: [delete(WEIGHTS)(folder), put("pytorch_model.bin", LFS)(folder)],
        ["{source}/pytorch_model.bin", "Git LFS"],
    ),
    "bin no zip": Bad(
        lambda folder: [delete(WEIGHTS)(folder), put("pytorch_model.bin", b"x" * 99)(folder)],
        ["{source}/pytorch_model.bin", "not a zip"],
    ),
    "weights empty": Bad(put(WEIGHTS, b""), ["{source}/model.safetensors", "0 bytes"]),
    "weights cut": Bad(
        lambda folder: put(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-9])(folder), ["{source}/model.safetensors"]
    ),
    "header huge": Bad(put(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), ["{source}/model.safetensors", "header"]),
    "entry of another type": Bad(header(dtype="F8_E4M3"), ["{source}/model.safetensors", "F8_E4M3"]),
    "entry of another shape": Bad(header(shape=[2**40, 2**40]), ["{source}/model.safetensors", WQ]),
    "entry outside": Bad(header(data_offsets=[0, 2**40]), ["{source}/model.safetensors", WQ]),
    "no wq": Bad(edit_tensors(lambda t: t.pop(WQ)), ["{source}", WQ, "missing"]),
    "no norm": Bad(edit_tensors(lambda t: t.pop("model.norm.weight")), ["{source}", "model.norm.weight"]),
    "no tensors": Bad(edit_tensors(lambda t: t.clear()), ["{source}/config.json", "num_hidden_layers=2", "0 tensors"]),
    "no prefix": Bad(
        edit_tensors(lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)]),
        ["{source}/model.safetensors", "no LlamaForCausalLM"],
    ),
    "extra tensor": Bad(
        edit_tensors(lambda t: t.update({"score.weight": t[EMBED]})),
        ["{source}/model.safetensors", "'score.weight'", "LlamaForCausalLM"],
    ),
    "extra name of any length": Bad(
        edit_tensors(lambda t: t.update({"x\n\u2028" * 9999: t[EMBED]})), ["{source}/model.safetensors", "'x\\n"]
    ),
    "quantized tensors": Bad(
        edit_tensors(lambda t: t.update({WQ.replace("weight", "qweight"): t.pop(WQ)})), ["qweight", "quantized"]
    ),
    "bias unannounced": Bad(
        edit_tensors(lambda t: t.update({WQ.replace("weight", "bias"): t[NORM]})), ["q_proj.bias", "LlamaForCausalLM"]
    ),
    "bias missing": Bad(config(attention_bias=True), ["{source}", "q_proj.bias"]),
    "bias behind the attention": Bad(
        lambda folder: [
            config(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True)(folder),
            edit_tensors(
                lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": np.eye(48, dtype=np.float32)[-1]})
            )(folder),
        ],
        ["{source}/config.json", "model.layers.1.self_attn.o_proj.bias", "q, k and v only"],
        "qwen2",
    ),
    "fewer layers": Bad(config(num_hidden_layers=1), ["{source}/model.safetensors", "model.layers.1.", "1 layers"]),
    "more layers": Bad(config(num_hidden_layers=3), ["{source}", "model.layers.2."]),
    "very many layers": Bad(config(num_hidden_layers=10**11), ["{source}/config.json", "=100000000000"]),
    "other hidden_size": Bad(config(hidden_size=128), ["{source}/model.safetensors", "128"]),
    "other kv heads": Bad(config(num_key_value_heads=4), ["{source}/model.safetensors", "[32, 64]", "[64, 64]"]),
    "other head_dim": Bad(config(head_dim=8), ["{source}/model.safetensors", "[64, 64]", "[32, 64]"]),
    "other ffn": Bad(config(intermediate_size=111), ["{source}/model.safetensors", "[112, 64]", "[111, 64]"]),
    "other vocabulary": Bad(config(vocab_size=510), ["{source}/model.safetensors", EMBED, "[512, 64]", "[510, 64]"]),
    "wq of one axis": Bad(edit_tensor(WQ, lambda a: a.reshape(-1)), ["{source}/model.safetensors", WQ, "[4096]"]),
    "norm of two axes": Bad(edit_tensor(NORM, lambda a: a[None]), ["{source}/model.safetensors", NORM, "[1, 64]"]),
    "output of other rows": Bad(
        edit_tensor(OUTPUT, lambda a: a[:-1]), ["{source}/model.safetensors", OUTPUT, "[511, 64]"]
    ),
    "integers": Bad(edit_tensor(WK, lambda a: a.astype(np.int8)), ["{source}/model.safetensors", WK, "int8"]),
    "doubles": Bad(
        lambda folder: [
            pth.write(folder / "pytorch_model.bin", {n: a.astype(np.float64) for n, a in tensors_of(folder).items()}),
            delete(WEIGHTS)(folder),
        ],
        ["{source}/pytorch_model.bin", "float64"],
    ),
    "mixed types, none named": Bad(
        lambda folder: [
            config(dtype="absent")(folder),
            edit_tensor(NORM, lambda a: a.astype(np.float32))(folder),
        ],
        ["{source}", "bfloat16, float32", "--dtype"],
    ),
    "tied, and an output of its own": Bad(
        config(tie_word_embeddings=True), ["{source}/config.json", "tie_word_embeddings=true", OUTPUT, EMBED]
    ),
    "phi3 not fused": Bad(config(**PHI3), ["{source}/model.safetensors", "Phi3ForCausalLM"]),
    "several files without an index": Bad(
        sharded(then=delete(INDEX)), ["{source}/model.safetensors.index.json", "missing", "3"]
    ),
    "a file of the index missing": Bad(sharded(then=delete(SHARD)), [INDEX, SHARD, "missing"]),
    "a file of the index LFS": Bad(sharded(then=put(SHARD, LFS)), ["{source}/" + SHARD, "Git LFS"]),
    "a file of the index cut": Bad(sharded(then=put(SHARD, b"12345678")), ["{source}/" + SHARD]),
    "index names too much": Bad(
        sharded(lambda index: index["weight_map"].update(more=SHARD)), ["{source}/" + SHARD, "'more'", "index"]
    ),
    "a tensor in two files": Bad(twice, ["{source}/model-0000", "holds", "and so does"]),
    "index LFS": Bad(sharded(then=put(INDEX, LFS)), ["{source}/" + INDEX, "Git LFS"]),
    "index no JSON": Bad(sharded(then=put(INDEX, b"{")), ["{source}/" + INDEX, "JSON"]),
    "index a list": Bad(sharded(then=put(INDEX, b"[]")), ["{source}/" + INDEX, "JSON object"]),
    "index empty": Bad(sharded(lambda index: index.clear()), ["{source}/" + INDEX, "weight_map=None"]),
    "index of no file": Bad(
        sharded(lambda index: index["weight_map"].update(a={"b": 1})), ["{source}/" + INDEX, "{{'b': 1}}"]
    ),
    "index with a long name": Bad(
        sharded(lambda index: index["weight_map"].update(a="x" * 99999)), ["{source}/" + INDEX, "missing"]
    ),
    **{
        f"index with {name!r}": Bad(outside(name), ["{source}/" + INDEX, "must be a name in its folder"])
        for name in (
            "../elsewhere.safetensors", "{folder}/../elsewhere.safetensors", "sub/elsewhere.safetensors",
            "..\\elsewhere.safetensors", "C:elsewhere.safetensors", "a\n.safetensors", "\0", "\ud800",
        )
    },
    **{f"index with {name!r}": Bad(outside(name), ["{source}/" + INDEX, "missing"]) for name in ("..", "")},
    "no tokenizer": Bad(delete("tokenizer.model"), ["{source}", "tokenizer.json nor tokenizer.model", "--tokenizer"]),
    "tokenizer LFS": Bad(put("tokenizer.model", LFS), ["{source}/tokenizer.model", "Git LFS"]),
    "tokenizer.json LFS": Bad(put("tokenizer.json", LFS), ["{source}/tokenizer.json", "Git LFS"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folder):
    bad = BAD[name]
    source = folder(bad.fixture)
    bad.spoil(source)
    message = refusal(source)
    for text in bad.says:
        assert text.format(source=source) in message


def test_bad_arguments(folder, tmp_path):
    source = folder()
    assert "missing.model is missing" in refusal(source, tmp_path / "missing.model")
    assert "models is missing" in refusal(source, tmp_path / "models")  # a folder
    assert "dtype='int4'" in refusal(source, None, "int4")
    (source.parent / "pointer").write_bytes(LFS)
    assert "pointer is a Git LFS pointer" in refusal(source, source.parent / "pointer")
    for wrong in source / "missing", source / "config.json", source / ("x" * 300), source / "\0":
        with pytest.raises(ModelError, match="config.json is missing"):
            hf.open_checkpoint(wrong)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on Windows")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.model"])
def test_a_pipe_is_not_waited_for(folder, name):
    source = folder()
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(ModelError, match=re.escape(str(source))):
        hf.open_checkpoint(source)


def test_matches(folder, tmp_path):
    assert all(hf.matches(source) for source in FIXTURES.values())
    source = folder()
    for text, right in {
        '{"model_type": "unknown"}': True,
        '{"architectures": ["LlamaForCausalLM"]}': True,
        '{"format": "jaxllm", "format_version": 1, "config": {}}': False,
        '{"model_type": 1}': False,
        "[]": False,
        "{": False,
        "[" * 100_000: False,
    }.items():
        (source / "config.json").write_text(text)
        assert hf.matches(source) == right
    (source / "config.json").unlink()
    metas = [folder for folder in DATA.iterdir() if (folder / "params.json").exists()]
    assert metas and all(meta.open_checkpoint(folder) for folder in metas)
    for other in *metas, source, source / WEIGHTS, tmp_path / "missing", tmp_path / ("x" * 300), tmp_path / "\0":
        assert not hf.matches(other)


# Any input: a checkpoint whose weights have the shapes that its config makes them, or a ModelError


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for each fixture, to be changed and put right again."""
    root = tmp_path_factory.mktemp("scratch")
    return {name: shutil.copytree(source, root / name) for name, source in FIXTURES.items()}


def opens_or_refuses(source):
    hf.matches(source)
    try:
        checkpoint = hf.open_checkpoint(source)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
        return
    assert {name: weight.shape for name, weight in checkpoint.weights.items()} == {
        name: leaf.shape for name, leaf in parameter_shapes(abstract_params(checkpoint.config)).items()
    }
    for weight in checkpoint.weights.values():
        assert sum(block.size for block in weight.blocks()) == np.prod(weight.shape)


NAMES = sorted(
    {name for source in FIXTURES.values() for name in config_of(source)}
    | {*SCALED, "partial_rotary_factor", "quantization_config", "num_experts", "use_sliding_window", "type"}
)
WORDS = st.sampled_from(["llama", "mistral", "phi3", "qwen2", "qwen3", "LlamaForCausalLM", "llama3", "full_attention"])
SCALARS = st.none() | st.booleans() | st.sampled_from([0, 1, 2, 4, 8, 16, 48, 64]) | st.integers() | st.floats() | WORDS
JSON = st.recursive(
    SCALARS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FIXTURES)), st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
def test_any_config_json(scratch, name, changes):
    (scratch[name] / "config.json").write_text(json.dumps(config_of(FIXTURES[name]) | changes))
    opens_or_refuses(scratch[name])
    shutil.copyfile(FIXTURES[name] / "config.json", scratch[name] / "config.json")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_safetensors_header(scratch, data):
    source = scratch["qwen3"]
    content = bytearray((FIXTURES["qwen3"] / WEIGHTS).read_bytes())
    if data.draw(st.booleans()):  # bytes of it
        for at, value in data.draw(st.dictionaries(st.integers(0, 2500), st.integers(0, 255), max_size=4)).items():
            content[at] = value
        content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, 2000, 9, 8, 7, 0]))]
    else:  # an entry of it
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(entries)))
        shapes = st.lists(st.sampled_from([0, 1, 16, 48, 64, 96, 384, -1, 2**63]), max_size=3)
        offsets = st.lists(st.integers(-1, 150_000), max_size=3)
        changes = st.fixed_dictionaries(
            {}, optional={"dtype": st.sampled_from(["F16", "I8", "F8", 3]), "shape": shapes, "data_offsets": offsets}
        )
        entries[name] = data.draw(JSON | changes.map(lambda change: entries[name] | change))
        text = json.dumps(entries).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    (source / WEIGHTS).write_bytes(content)
    opens_or_refuses(source)
    shutil.copyfile(FIXTURES["qwen3"] / WEIGHTS, source / WEIGHTS)


@settings(max_examples=100, deadline=None)
@given(JSON | st.builds(lambda value: {"weight_map": value}, JSON | st.dictionaries(st.text(), st.text(), max_size=3)))
def test_any_index(scratch, index):
    source = scratch["mistral"]
    (source / WEIGHTS).unlink(missing_ok=True)
    (source / INDEX).write_text(json.dumps(index))
    opens_or_refuses(source)
