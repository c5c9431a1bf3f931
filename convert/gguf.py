"""GGUF files, llama.cpp's format: a model's settings, its tokenizer and its tensors, float or quantized, in one file.

Source: docs/gguf.md and gguf-py of ggml; convert_hf_to_gguf.py of llama.cpp, which wrote most of these files.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.convert import ggml
from jaxllm.convert.checkpoint import (
    Checkpoint,
    Tensor,
    equal,
    model_weights,
    part_shapes,
    stored_shape,
    tokenizer_name,
)
from jaxllm.errors import ModelError
from jaxllm.loader import advise
from jaxllm.model import rope_frequencies
from jaxllm.tokenizer import LLAMA3_DIGITS, LLAMA3_SPLIT

MAX_HEADER = 64 << 20  # bytes of settings, tokenizer and list of tensors; real ones have up to 20 MB
MAX_ENTRIES = 1 << 16  # of settings and of tensors; real ones have some dozens and up to 1500
_OTHER_KIND = "this kind of model is not supported"


@dataclass(frozen=True)
class Type:
    """How a tensor's numbers are stored: `block` of them, neighbours in a row, in `size` bytes."""

    name: str
    block: int
    size: int
    dtype: np.dtype | None = None  # None: quantized


_TYPES = {
    0: Type("F32", 1, 4, np.dtype("<f4")),
    1: Type("F16", 1, 2, np.dtype("<f2")),
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    20: Type("IQ4_NL", 32, 18),
    23: Type("IQ4_XS", 256, 136),
    30: Type("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
_NUMBERS = "<u1 <i1 <u2 <i2 <u4 <i4 <f4 ? . . <u8 <i8 <f8".split()
_NUMBERS = {kind: np.dtype(name) for kind, name in enumerate(_NUMBERS) if name != "."}
_STRING, _ARRAY = 8, 9

# types of tokens; the piece types of SentencePiece have the same numbers
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclass(frozen=True)
class _Family:
    """What a `general.architecture` has besides LLaMA's sizes; adjacent_pairs is as in `model_weights`."""

    adjacent_pairs: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    fused: bool = False  # q, k and v are one tensor, and so are gate and up


_FAMILIES = {
    "llama": _Family(adjacent_pairs=True),  # LLaMA 1 to 3.3, Mistral, TinyLlama, SmolLM2
    "qwen2": _Family(attention_bias=True),
    "qwen3": _Family(qk_norm=True),
    "phi3": _Family(fused=True),
}

# settings that change what is computed -> the value that means LLaMA's own; other values are refused
_ONLY = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.logit_softcapping": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": None,
    "attention.sliding_window_pattern": None,
    "attention.temperature_scale": None,
    "embedding_scale": None,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": None,
    "residual_scale": None,
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
    "use_parallel_residual": False,
}


@dataclass(frozen=True)
class _Pre:
    """A `tokenizer.ggml.pre`: how byte-level BPE cuts text into words; steps are pre-tokenizers of `tokenizers`."""

    steps: list[dict]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges make of it
    add_bos: bool = False  # where the file does not say


def _pattern(digits):
    """The steps for the words of tiktoken's cl100k_base, with runs of digits cut as in LLaMA 3 or Qwen 2."""
    regex = LLAMA3_SPLIT.replace(LLAMA3_DIGITS, digits)
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, _BYTE_LEVEL | {"use_regex": False}]


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's words
_LLAMA3 = _Pre(_pattern(LLAMA3_DIGITS), ignore_merges=True, add_bos=True)
_PRE = {
    "default": _Pre([_BYTE_LEVEL]),
    "gpt-2": _Pre([_BYTE_LEVEL]),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": _Pre(_pattern(LLAMA3_DIGITS)),  # Phi-4
    "qwen2": _Pre(_pattern(r"\p{N}"), nfc=True),
    "deepseek-r1-qwen": _Pre(_pattern(r"\p{N}")),
    "smollm": _Pre([{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]),
}


def matches(source: Path) -> bool:
    """Whether source is a file that begins as GGUF does."""
    try:
        if not os.path.isfile(source):  # a pipe would wait
            return False
        with open(source, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def open_checkpoint(source: Path, tokenizer_file: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Open a GGUF file of version 2 or 3, little-endian and not split.

    dtype is what float weights are to be stored as: by default as they are in a file of one float type, and float16,
    the type of their scales, where matrices are quantized; these are dequantized to it at once, as `Stored` says.
    tokenizer_file replaces the tokenizer in the file.
    Raises ModelError naming the file when it is damaged, or no model of a known family, or has settings or tensor types
    that are not supported.
    """
    own = {} if tokenizer_file is None else {tokenizer_name(tokenizer_file): tokenizer_file}
    try:
        metadata, tensors = read(source)
        config = _config(metadata, tensors, dtype)
        files = _tokenizer_files(metadata, own)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    tensors = {name: replace(tensor, dtype=config.dtype) for name, tensor in tensors.items()}
    family = _FAMILIES[metadata["general.architecture"]]
    weights = model_weights(config, _named(tensors, config, family), family.adjacent_pairs)
    return Checkpoint(config=config, weights=weights, files=files)


# The file


@dataclass(frozen=True)
class Stored:
    """A tensor in a mapped file, [rows, in] or [rows]: floats stay what they are, and what is quantized becomes dtype.

    Rows with a number that does not fit into dtype become float32 instead.
    """

    data: mmap.mmap
    code: int
    shape: tuple[int, ...]
    start: int
    dtype: str = "float32"

    @property
    def type(self) -> Type:
        return _TYPES[self.code]

    def rows(self, start, stop):
        """Rows start to stop, as an array of its own."""
        shape = (stop - start, *self.shape[1:])
        row = _size(self.type, self.shape[1:])
        raw = np.frombuffer(self.data, np.uint8, (stop - start) * row, self.start + start * row)
        if self.type.dtype is not None:
            rows = raw.copy().view(self.type.dtype).reshape(shape)
        else:
            blocks = raw.reshape(-1, self.type.size)
            rows = ggml.dequantize(blocks, self.type.name, self.dtype).reshape(shape)
        # pages of a mapped file that were read count as this process's memory until they are given back
        advise(np.frombuffer(self.data, np.uint8), "MADV_DONTNEED")
        return rows


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor, from `first` on, as a tensor."""

    whole: Tensor
    first: int
    shape: tuple[int, ...]

    def rows(self, start, stop):
        """Rows start to stop of the part, as an array of its own."""
        return self.whole.rows(self.first + start, self.first + stop)


def _size(type, shape):
    """The bytes of a tensor of this type and shape, whose rows are whole blocks."""
    return math.prod(shape) // type.block * type.size


def read(file: Path) -> tuple[dict, dict[str, Stored]]:
    """The settings and tensors of a GGUF file, nothing of the tensors read.

    Settings are Python's numbers, bools and strings, and for arrays lists of str or numpy arrays.  The file is not
    trusted: raises ModelError, without the file's name, for anything that contradicts the format or the file's size.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(8)
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if head else b""
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read ({error})") from None
    if head[:4] != b"GGUF":
        raise ModelError(f"begins with {head[:4]!r} instead of GGUF; give a .gguf file")
    version = int.from_bytes(head[4:], "little")
    if version in (2 << 24, 3 << 24):
        raise ModelError(
            "is big-endian, and only little-endian files can be read; convert it with gguf_convert_endian.py"
        )
    if version not in (2, 3):
        raise ModelError(f"has GGUF version {version}, and 2 and 3 can be read; make it with a newer llama.cpp")

    header = _Header(data, at=8)
    tensor_count, setting_count = header.number("<u8"), header.number("<u8")
    for count, what in (tensor_count, "tensors"), (setting_count, "settings"):
        if count > MAX_ENTRIES:
            raise _damaged(f"it claims {count} {what}, of the allowed {MAX_ENTRIES}")
    metadata = {}
    for _ in range(setting_count):
        key = header.string()
        if key in metadata:
            raise _damaged(f"it has the setting {_show(key)} twice")
        metadata[key] = header.value(header.number("<u4"))
    if _get(metadata, "split.count", int, 0) > 1:
        raise ModelError(
            f"is one of {metadata['split.count']} files of a model; merge them with `llama-gguf-split --merge` first"
        )
    alignment = _get(metadata, "general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise _damaged(f"general.alignment is {alignment}, which must be a power of two")

    found = {}
    for _ in range(tensor_count):
        name, entry = _entry(header)
        if name in found:
            raise _damaged(f"it has the tensor {_show(name)} twice")
        found[name] = entry
    begin, end = -(-header.at // alignment) * alignment, 0
    tensors = {}
    for name, (code, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        if offset % alignment or offset < end:
            raise _damaged(f"tensor {_show(name)} starts at {offset}, inside another one or unaligned")
        end = offset + _size(_TYPES[code], shape)
        if begin + end > len(data):
            raise _damaged(f"tensor {_show(name)} ends at byte {begin + end} of {len(data)}")
        tensors[name] = Stored(data, code, shape, begin + offset)
    return metadata, tensors


class _Header:
    """Reads one value after the other from the start of a file."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def take(self, count):
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise _damaged(f"its header ends at byte {self.at}, and the file at {len(self.data)}")
        if self.at > MAX_HEADER:
            raise _damaged(f"its header is larger than {MAX_HEADER >> 20} MiB")
        return self.data[start : self.at]

    def number(self, dtype):
        dtype = np.dtype(dtype)
        number = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        return float(str(number)) if dtype == np.float32 else number.item()  # 1e-5, and not what is nearest to it

    def string(self):
        content = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise _damaged(f"it has the string {_show(content)}, which is not UTF-8") from None

    def value(self, kind):
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            if kind in _NUMBERS:
                return np.frombuffer(self.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])
        raise _damaged(f"it has a setting of type {kind}, which is unknown or an array in an array")


def _entry(header):
    """A tensor's name, and its type's code, its shape and where its data start."""
    name, rank = header.string(), header.number("<u4")
    if not 1 <= rank <= 4:
        raise _damaged(f"tensor {_show(name)} has {rank} axes, allowed are 1 to 4")
    shape = tuple(header.number("<u8") for _ in range(rank))[::-1]  # in the file the innermost comes first
    code, offset = header.number("<u4"), header.number("<u8")
    if code not in _TYPES:
        known = ", ".join(type.name for type in _TYPES.values())
        raise ModelError(
            f"tensor {_show(name)} has the type {code} of ggml, and {known} can be read; take the model in one of these"
        )
    if 0 in shape or shape[-1] % _TYPES[code].block:
        raise _damaged(f"tensor {_show(name)} is {list(shape)}, which is no whole number of {_TYPES[code].name} blocks")
    return name, (code, shape, offset)


# The config


def _config(metadata, tensors, dtype):
    """The ModelConfig, after all tensors were checked against it."""
    architecture = _get(metadata, "general.architecture", str)
    if architecture not in _FAMILIES:
        raise ModelError(f"holds a model of the family {_show(architecture)}; known are {', '.join(_FAMILIES)}")
    family = _FAMILIES[architecture]
    for key, only in _ONLY.items():
        value = metadata.get(f"{architecture}.{key}", only)
        if type(value) is not type(only) or value != only:
            what = "must be absent" if only is None else f"must be {only}"
            raise ModelError(f"has {architecture}.{key}={_show(value)}, which {what}; {_OTHER_KIND}")

    def size(name, default=None):
        return _whole(metadata, f"{architecture}.{name}", default)

    embed = _tensor(tensors, "token_embd.weight")
    dim, n_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", dim // n_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, head_dim) != head_dim:
            raise ModelError(f"has {architecture}.{name}={size(name)}, and heads of {head_dim}; {_OTHER_KIND}")
    config = ModelConfig(
        vocab_size=embed.shape[0],
        dim=dim,
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=size("feed_forward_length"),
        max_len=size("context_length"),
        norm_eps=_get(metadata, f"{architecture}.attention.layer_norm_rms_epsilon", float),
        rope_theta=_get(metadata, f"{architecture}.rope.freq_base", float, 10000.0),
        tied="output.weight" not in tensors,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        sliding_window=_get(metadata, f"{architecture}.attention.sliding_window", int, 0) or None,
        dtype=dtype or _dtype(tensors),
    )
    _check_tensors(tensors, config, family, architecture)
    if not config.tied:
        output = tensors["output.weight"]
        config = replace(config, tied=embed.code == output.code and equal(embed, output))
    return replace(config, rope_scaling=_rope_scaling(tensors, config))


def _check_tensors(tensors, config, family, architecture):
    """Raise unless the tensors are those that a model of this config has, and as large."""
    if config.n_layers > len(tensors):  # before names are made for so many
        raise _damaged(f"{architecture}.block_count is {config.n_layers}, and there are {len(tensors)} tensors")
    shapes = part_shapes(config)
    expected = {"token_embd.weight": shapes["embed"], "output_norm.weight": shapes["norm"]}
    if not config.tied:
        expected["output.weight"] = shapes["embed"]
    for stored, parts in _layer(family).items():
        shape = stored_shape(shapes, parts)
        expected |= {f"blk.{i}.{stored}": shape for i in range(config.n_layers)}
    for name, shape in expected.items():
        tensor = _tensor(tensors, name)
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} is {list(tensor.shape)}, and the settings make it {list(shape)}; the file is damaged, "
                f"or holds another kind of model"
            )
        if len(shape) == 1 and tensor.type.dtype is None:
            raise ModelError(f"tensor {name} is {tensor.type.name}, and a vector must be F32, F16 or BF16")
    extra = sorted(tensors.keys() - expected.keys() - {"rope_freqs.weight"})
    if extra and extra[0].startswith("rope_factors"):
        raise ModelError("stretches RoPE by longrope; supported is LLaMA 3's way, take a model with a shorter context")
    if extra:
        raise ModelError(
            f"has the tensor {_show(extra[0])}, which no {architecture} with block_count={config.n_layers} has; "
            f"{_OTHER_KIND}"
        )


def _layer(family):
    """The tensors of a layer: name in the file -> names in `model_weights` of what it holds, one below the other."""
    names = {
        "attn_norm.weight": ["attn_norm"],
        "attn_output.weight": ["o"],
        "ffn_norm.weight": ["ffn_norm"],
        "ffn_down.weight": ["down"],
    }
    if family.fused:
        return names | {"attn_qkv.weight": ["q", "k", "v"], "ffn_up.weight": ["gate", "up"]}
    names |= {f"attn_{part}.weight": [part] for part in "qkv"} | {
        f"ffn_{part}.weight": [part] for part in ("gate", "up")
    }
    if family.attention_bias:
        names |= {f"attn_{part}.bias": [f"{part}_bias"] for part in "qkv"}
    if family.qk_norm:
        names |= {f"attn_{part}_norm.weight": [f"{part}_norm"] for part in "qk"}
    return names


def _named(tensors, config, family) -> Mapping[str, Tensor]:
    """The tensors by the names of `model_weights`."""
    named = {"embed": tensors["token_embd.weight"], "norm": tensors["output_norm.weight"]}
    if not config.tied:
        named["output"] = tensors["output.weight"]
    shapes = part_shapes(config)
    for i in range(config.n_layers):
        for stored, parts in _layer(family).items():
            first = 0
            for part in parts:
                whole = tensors[f"blk.{i}.{stored}"]
                named[f"layers.{i}.{part}"] = whole if len(parts) == 1 else Part(whole, first, shapes[part])
                first += shapes[part][0]
    return named


def _dtype(tensors):
    """The float type that holds what the matrices hold."""
    types = {tensor.type for tensor in tensors.values() if len(tensor.shape) > 1}
    if any(type.dtype is None for type in types):
        return "float16"
    return types.pop().dtype.name if len(types) == 1 else "float32"


def _rope_scaling(tensors, config):
    """LLaMA 3.1's RopeScaling, of which a file keeps only what each pair's frequency is divided by."""
    if "rope_freqs.weight" not in tensors:
        return None
    tensor = tensors["rope_freqs.weight"]
    if tensor.shape != (config.head_dim // 2,) or tensor.type.dtype is None:
        raise _damaged(f"rope_freqs.weight is {tensor.type.name}{list(tensor.shape)}, not F32[{config.head_dim // 2}]")
    divisors = tensor.rows(0, tensor.shape[0]).astype(np.float64)
    if (divisors == 1).all():
        return None
    largest = divisors.max()
    if np.isfinite(divisors).all() and divisors.min() > 0 and largest > 1:
        scaling = RopeScaling(factor=float(str(np.float32(largest))))
        with np.errstate(all="ignore"):  # rope_theta is not trusted
            plain, scaled = (rope_frequencies(replace(config, rope_scaling=s)) for s in (None, scaling))
        if np.allclose(plain / divisors, scaled, rtol=1e-4, atol=0):
            return scaling
    raise ModelError(
        f"stretches RoPE by rope_freqs.weight, up to {largest} times, and not as LLaMA 3.1 does it from a context of "
        f"{RopeScaling(1.0).original_max_len} tokens on; {_OTHER_KIND}"
    )


# The tokenizer


def _tokenizer_files(metadata, own):
    """Hugging Face's files of the tokenizer's settings, and the tokenizer itself, unless the user has its own file."""
    tokens = _get(metadata, "tokenizer.ggml.tokens", list, [])
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        ids[name] = _get(metadata, f"tokenizer.ggml.{name}_token_id", int, None)
        if ids[name] is not None and not 0 <= ids[name] < len(tokens):
            raise _damaged(f"tokenizer.ggml.{name}_token_id is {ids[name]}, and there are {len(tokens)} tokens")

    kind = _get(metadata, "tokenizer.ggml.model", str, "none")
    pre = _PRE.get(_get(metadata, "tokenizer.ggml.pre", str, "default"), _PRE["default"])
    add_bos = _get(metadata, "tokenizer.ggml.add_bos_token", bool, kind == "llama" or pre.add_bos)
    config = {"add_bos_token": add_bos and ids["bos"] is not None}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config |= {ours: tokens[ids[name]] for name, ours in names.items() if ids[name] is not None}
    generation = {} if ids["bos"] is None else {"bos_token_id": ids["bos"]}
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None)
    if ends:
        generation["eos_token_id"] = list(ends)
    files = {"tokenizer_config.json": _json(config), "generation_config.json": _json(generation)}
    template = _get(metadata, "tokenizer.chat_template", str, None)
    if template is not None:
        files["chat_template.jinja"] = template.encode()

    if own:
        return files | own
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError(
            f"has a tokenizer of the kind {_show(kind)} with {len(tokens)} tokens, and gpt2 and llama can be read; "
            f"name the file of one with --tokenizer"
        )
    types = _token_types(metadata, tokens, ids)
    # unused ones at the end only fill the matrix up
    count = max((id + 1 for id, type in enumerate(types) if type != _UNUSED), default=0)
    if kind == "gpt2":
        return files | {"tokenizer.json": _byte_level_bpe(metadata, tokens[:count], types[:count])}
    return files | {"tokenizer.model": _sentencepiece(metadata, tokens[:count], types[:count], ids)}


def _token_types(metadata, tokens, ids):
    """The type of each token; those that begin or end a text are control tokens, whatever the file says."""
    types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise _damaged("tokenizer.ggml.token_type is not a whole number for each of tokenizer.ggml.tokens")
    types = types.tolist()
    for name in ("bos", "eos", "eot", "eom"):
        if ids[name] is not None:
            types[ids[name]] = _CONTROL
    if len({*tokens}) < len(tokens) or not all(tokens):
        raise _damaged("tokenizer.ggml.tokens has a token twice, or an empty one")
    return types


def _byte_level_bpe(metadata, tokens, types):
    """The content of a Hugging Face tokenizer.json."""
    name = _get(metadata, "tokenizer.ggml.pre", str, None)
    if name not in _PRE:
        raise ModelError(
            f"cuts text into words as tokenizer.ggml.pre={_show(name)} says, and {', '.join(_PRE)} are known; name the "
            f"model's tokenizer.json with --tokenizer"
        )
    pre, merges, known = _PRE[name], _get(metadata, "tokenizer.ggml.merges", list), {*tokens}
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise _damaged(f"tokenizer.ggml.merges has {_show(merge)}, which are no two tokens that make a third")
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": token, **options, "special": type == _CONTROL}
        for id, (token, type) in enumerate(zip(tokens, types, strict=True))
        if type in (_CONTROL, _USER_DEFINED)
    ]
    return _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
            "post_processor": None,
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre.ignore_merges,
                "vocab": {token: id for id, token in enumerate(tokens)},
                "merges": merges,
            },
        }
    )


def _json(values):
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def _sentencepiece(metadata, tokens, types, ids):
    """The content of a SentencePiece model: its ModelProto, of which few fields matter to who reads text with it.

    Source: sentencepiece_model.proto.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or len(scores) < len(tokens):
        raise _damaged("tokenizer.ggml.scores is not a number for each of tokenizer.ggml.tokens")
    if types.count(_UNKNOWN) != 1 or not {*types} <= {*range(_NORMAL, _BYTE + 1)}:
        raise ModelError(
            "has token types in tokenizer.ggml.token_type that no SentencePiece model has: 1 to 6, and 2 only once; "
            "name the model's tokenizer.model with --tokenizer"
        )
    pieces = []
    for token, score, type in zip(tokens, scores.tolist(), types, strict=False):
        pieces.append(_message(1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, type)))
    bpe = 2
    trainer = _varint(3, bpe) + _varint(4, len(tokens)) + _varint(35, int(_BYTE in types))
    special = {"unk": types.index(_UNKNOWN), "bos": ids["bos"], "eos": ids["eos"], "pad": None}
    for number, id in enumerate(special.values()):
        trainer += _varint(40 + number, -1 if id is None else id)
        trainer += _message(45 + number, b"" if id is None else tokens[id].encode())
    prefix = _get(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
    normalizer = _message(1, b"identity") + _varint(3, int(prefix)) + _varint(4, 0) + _varint(5, 1)
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def _message(number, content):
    """A field of protobuf with bytes, a string or a message in it."""
    return _base128(number << 3 | 2) + _base128(len(content)) + content


def _varint(number, value):
    """A field of protobuf with a whole number in it."""
    return _base128(number << 3) + _base128(value % (1 << 64))


def _base128(value):
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes(digits + bytes([value]))


# Settings


_REQUIRED = object()


def _get(metadata, key, kind, default=_REQUIRED):
    """A setting of this Python type."""
    value = metadata.get(key, default)
    if value is _REQUIRED:
        raise ModelError(f"has no {key}; it is no language model, or damaged")
    if value is not default and type(value) is not kind:
        raise _damaged(f"{key} is {_show(value)}, which must be of type {kind.__name__}")
    return value


def _whole(metadata, key, default=None):
    """A size; where the file has one for each layer, they must be the same."""
    value = metadata.get(key, default)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
        if (value != value[0]).any():
            raise ModelError(f"has {key} that differ between layers; {_OTHER_KIND}")
        value = value[0].item()
    if value is None:
        raise ModelError(f"has no {key}; it is no language model, or damaged")
    if type(value) is not int or value < 1:
        raise _damaged(f"{key} is {_show(value)}, which must be a whole number above 0")
    return value


def _tensor(tensors, name):
    if name not in tensors:
        raise ModelError(f"has no tensor {name}; it is another kind of model, or damaged")
    return tensors[name]


def _damaged(what):
    return ModelError(f"{what}; the file is damaged, download it again")


def _show(value):
    """repr, on one line and cut short: a value from the file may be endless."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)}"
    return repr(value[:60] if isinstance(value, str | bytes) else value)
