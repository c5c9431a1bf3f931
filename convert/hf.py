"""Hugging Face's checkpoints: config.json beside *.safetensors or pytorch_model*.bin, as `save_pretrained` writes them.

Source: each family's configuration and modeling files in transformers 4 and 5, whose defaults hold for what a
config.json leaves out.
"""

import json
import os
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PureWindowsPath

import jax
import numpy as np
from sentencepiece import SentencePieceProcessor

from jaxllm.config import DTYPES, ModelConfig
from jaxllm.convert import pth
from jaxllm.convert.checkpoint import (
    CARRIED,
    Checkpoint,
    Mapped,
    blocks,
    carried_files,
    check_file,
    equal,
    model_tensors,
    model_weights,
    part_names,
    part_shapes,
    read_json,
    stored_shape,
)
from jaxllm.errors import ModelError
from jaxllm.loader import find_tokenizer, new_folder, not_written, read_safetensors, safetensors_header, write_files
from jaxllm.tokenizer import load_tokenizer

# how weights are stored: the name of the file that holds all of them, and its reader; with .index.json, many files'
STORED: tuple[tuple[str, Callable[..., dict[str, np.ndarray]]], ...] = (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", pth.read),
)
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 100, 100

EMBED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MAX_SHARD = 5_000_000_000  # bytes of weights in one file, as `save_pretrained` of transformers 4 cuts them


@dataclass(frozen=True)
class Family:
    """A model_type by how it differs from LLaMA.

    defaults stand for what config.json leaves out; fixed is what this family's code does whatever config.json says.
    fused: q, k, v are stored as one tensor, and so are gate, up.
    """

    architecture: str
    defaults: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)
    qk_norm: bool = False
    fused: bool = False


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_ALL_LAYERS = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
_SOME_LAYERS = {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048},  # which the first conversions of LLaMA 1 leave out
        fixed=_ALL_LAYERS | {"sliding_window": None},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        fixed=_NO_BIAS | _ALL_LAYERS,
    ),
    "phi3": Family("Phi3ForCausalLM", fixed=_NO_BIAS | _ALL_LAYERS, fused=True),
    "qwen2": Family("Qwen2ForCausalLM", defaults=_SOME_LAYERS, fixed=_NO_BIAS | {"attention_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM", defaults=_SOME_LAYERS | {"head_dim": 128}, fixed={"mlp_bias": False}, qk_norm=True
    ),
}


def matches(source: Path) -> bool:
    """Whether source is a folder whose config.json names a model_type or architectures, as Hugging Face's do."""
    try:
        settings = read_json(source / "config.json")
    except ModelError:
        return False
    return isinstance(settings.get("model_type"), str) or isinstance(settings.get("architectures"), list)


def open_checkpoint(source: Path, tokenizer_file: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Open a folder that `save_pretrained` wrote, or a download of one.

    dtype is what float weights are to be stored as, by default what they are, and where they differ what config.json
    says.  tokenizer_file is used in place of the folder's own.
    Raises ModelError naming the file when something is missing or not supported, or sizes differ from config.json's.
    """
    file = source / "config.json"
    settings, family, config = read_config(source)
    files = carried_files(source, tokenizer_file)

    tensors = _name_parts(file, config, family, read_tensors(source))
    _refuse_bias(file, config, tensors)
    stored = {tensor.array.dtype.name for tensor in tensors.values()}
    if dtype is None:
        dtype = next(iter(stored)) if len(stored) == 1 else settings.get("dtype", settings.get("torch_dtype"))
        if dtype not in DTYPES:
            raise ModelError(
                f"{source} mixes weights of {', '.join(sorted(stored))}, and config.json has dtype={_show(dtype)}; "
                f"choose one with --dtype"
            )
    if len(stored) > 1:  # parts of one weight go together in the type that has all numbers of the others
        tensors = {name: Mapped(tensor.array, "float32") for name, tensor in tensors.items()}
    output = tensors.get("output")
    tied = output is None or equal(tensors["embed"], output)
    if config.tied and not tied:
        raise ModelError(
            f"{file} has tie_word_embeddings=true, but {OUTPUT} is not {EMBED}; if the file of weights is right, set "
            f"it to false"
        )
    config = replace(config, tied=tied, dtype=dtype)
    return Checkpoint(config=config, weights=model_weights(config, tensors), files=files)


# config.json


def read_config(source: Path) -> tuple[dict, Family, ModelConfig]:
    """What a folder's config.json says, its family, and the config that both make.

    Raises ModelError when the family or one of its settings is not supported.
    """
    file = source / "config.json"
    settings = read_json(file)
    family = _find_family(file, settings)
    return settings, family, _read_config(file, family, settings)


def _find_family(file, settings):
    """The Family of a config.json, by its model_type, or by its architectures where it has none."""
    model_type, architectures = settings.get("model_type"), settings.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise ModelError(f"{file} has architectures={_show(architectures)}, which must be a list; download it again")
    lowered = {name.lower() for name in architectures or () if isinstance(name, str)}
    if model_type is None:
        model_type = next((name for name, one in FAMILIES.items() if one.architecture.lower() in lowered), None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"architectures={_show(architectures)}" if model_type is None else f"model_type={_show(model_type)}"
        raise ModelError(f"{file} has {named}, which is not supported; the known families are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    # LLaMA 1 was converted by code that wrote LLaMAForCausalLM
    if architectures and family.architecture.lower() not in lowered:
        raise ModelError(
            f"{file} has architectures={_show(architectures)}; of the family {model_type} only {family.architecture} "
            f"is supported"
        )
    return family


def _read_config(file, family, settings):
    """The ModelConfig that a config.json describes, tied as it claims, and of no dtype in particular."""
    settings = family.defaults | settings | family.fixed

    def number(name, values=settings, whole=True, least=1):
        value = values.get(name)
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
        if not right or (value != int(value) or value < least if whole else value == 0):
            allowed = f"a whole number from {least}" if whole else "a number above 0"
            raise ModelError(f"{file} has {name}={_show(value)}, which must be {allowed}; is it complete?")
        return int(value) if whole else float(value)

    def flag(name):
        value = settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{file} has {name}={_show(value)}, which must be true or false; download it again")
        return bool(value)

    _refuse_what_we_lack(file, settings)
    if flag("mlp_bias"):
        raise ModelError(f"{file} has mlp_bias=true; biases are supported on q, k and v only")
    dim, n_heads, n_layers = (number(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    has_head_dim = settings.get("head_dim") is not None
    if not has_head_dim and dim % n_heads:
        raise ModelError(
            f"{file} has num_attention_heads={n_heads}, which does not divide hidden_size={dim}, and no head_dim; is "
            f"it complete?"
        )
    values = dict(
        vocab_size=number("vocab_size"),
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if settings.get("num_key_value_heads") is None else number("num_key_value_heads"),
        head_dim=number("head_dim") if has_head_dim else dim // n_heads,
        ffn_dim=number("intermediate_size"),
        max_len=number("max_position_embeddings"),
        norm_eps=number("rms_norm_eps", whole=False),
        tied=flag("tie_word_embeddings"),
        attention_bias=flag("attention_bias"),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(file, settings, number, flag),
        **_rope(file, settings, number),
    )
    try:
        return ModelConfig.from_json(values)
    except ModelError as error:
        raise ModelError(f"{file} describes no model: {error}") from None


def _refuse_what_we_lack(file, settings):
    quantization = settings.get("quantization_config") or settings.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"{file} says that the weights are quantized already ({_show(method)}), which is not supported; take the "
            f"unquantized model, and --quantize int8 to make it smaller"
        )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if settings.get(name):
            raise ModelError(f"{file} has {name}={_show(settings[name])}; mixtures of experts are not supported")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{file} has hidden_act={_show(settings['hidden_act'])}; supported is silu")


def _sliding_window(file, settings, number, flag):
    """The window of all layers, None for none.  Raises ModelError where some layers have it, and others not."""
    n_layers = number("num_hidden_layers")
    window = None
    if flag("use_sliding_window") and settings.get("sliding_window") is not None:
        window = number("sliding_window")
    kinds = settings.get("layer_types")
    if kinds is None:
        first = 0 if window is None else min(number("max_window_layers", least=0), n_layers)
        windowed = 0 if window is None else n_layers - first
    else:
        if not isinstance(kinds, list) or len(kinds) != n_layers:
            raise ModelError(f"{file} has layer_types={_show(kinds)}; it lists a type for each of {n_layers} layers")
        other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if other:
            raise ModelError(
                f"{file} has {_show(other[0])} in layer_types; supported are full_attention and sliding_attention"
            )
        windowed = kinds.count("sliding_attention")
        if windowed and window is None:
            raise ModelError(f"{file} has sliding_attention in layer_types, but no sliding_window; is it complete?")
    if 0 < windowed < n_layers:
        raise ModelError(
            f"{file} gives {windowed} of {n_layers} layers a sliding window; supported is one for all layers, or none"
        )
    return window if windowed else None


def _rope(file, settings, number):
    """rope_theta and rope_scaling of the ModelConfig, from either generation's names."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"{file} has RoPE settings {_show(rope)}; supported are one object's, for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ModelError(f"{file} has RoPE of type {_show(kind)}; supported are default and llama3")
    part = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ModelError(f"{file} has partial_rotary_factor={_show(part)}; supported is 1, where a whole head rotates")
    holder = next((values for values in (rope, settings) if values.get("rope_theta") is not None), None)
    theta = 10000.0 if holder is None else number("rope_theta", holder, whole=False)
    if kind == "default":
        return {"rope_theta": theta}
    names = "factor", "low_freq_factor", "high_freq_factor"
    scaling = {name: number(name, rope, whole=False) for name in names}
    scaling["original_max_len"] = number("original_max_position_embeddings", rope)
    return {"rope_theta": theta, "rope_scaling": scaling}


# The files of weights


def read_tensors(source):
    """Every stored tensor by its name, with the file that it is in."""
    files, read = _find_weights(source)
    found = {}
    for file, names in files.items():
        check_file(file)
        tensors = read(file)
        lacking = next((name for name in names if name not in tensors), None)
        if lacking is not None:
            raise ModelError(f"{file} has no {_show(lacking)}, which the index says is in it; download the model again")
        for name, array in tensors.items():
            if name in found:
                raise ModelError(f"{file} holds {_show(name)}, and so does {found[name][0]}; download the model again")
            found[name] = file, array
    return found


def _find_weights(source):
    """The files of weights, each with the names of tensors that an index says are in it, and their reader."""
    for name, read in STORED:
        index = source / f"{name}.index.json"
        if os.path.isfile(source / name):
            return {source / name: []}, read
        if os.path.isfile(index):
            return _read_index(index), read
    lone = sorted(source.glob("*.safetensors"))
    if len(lone) == 1:
        return {lone[0]: []}, read_safetensors
    if lone:
        raise ModelError(f"{source / 'model.safetensors.index.json'} is missing, which {len(lone)} *.safetensors need")
    raise ModelError(f"{source} has a config.json but no {' and no '.join(name for name, _ in STORED)}; download one")


def _read_index(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has weight_map={_show(weight_map)}; it names the file of each tensor")
    files = {}
    for tensor, name in weight_map.items():
        # Windows has the most ways to leave a folder
        if not isinstance(name, str) or PureWindowsPath(name).name != name or not name.isprintable():
            raise ModelError(
                f"{index} has the file {_show(name)} for {_show(tensor)}, which must be a name in its folder; where "
                f"does it come from?"
            )
        files.setdefault(index.parent / name, []).append(tensor)
    for file in files:
        if not os.path.isfile(file):
            raise ModelError(f"{index} names {_show(file.name)}, which is missing; download all files of the model")
    return files


# Tensors


def _name_parts(file, config, family, found):
    """The tensors by the names of `model_weights`, each checked against config.json before anything of it is read."""
    if config.n_layers > len(found):  # before names are made for so many
        raise ModelError(
            f"{file} has num_hidden_layers={config.n_layers}, but the files of weights hold {len(found)} tensors; is "
            f"one missing?"
        )
    expected = _expected(config, family, found)
    shapes = part_shapes(config) | {"o_bias": (config.dim,)}
    for name, (holder, _) in found.items():
        if name not in expected and ".rotary_emb." not in name:  # RoPE's frequencies, which config.json implies
            raise ModelError(
                f"{holder} holds {_show(name)}, which no {family.architecture} of {config.n_layers} layers has; is "
                f"it quantized, or an adapter, or is config.json another model's?"
            )
    tensors = {}
    for name, parts in expected.items():
        if name not in found:
            raise ModelError(f"{file.parent}: no file holds {name}, which config.json asks for; is one missing?")
        holder, array = found[name]
        kinds = [part.rpartition(".")[2] for part in parts]
        shape = stored_shape(shapes, kinds)
        if array.shape != shape:
            raise ModelError(
                f"{holder}: {name} is {list(array.shape)}, and config.json makes it {list(shape)}; is that another "
                f"model's?"
            )
        if array.dtype.name not in DTYPES:
            raise ModelError(f"{holder}: {name} is {array.dtype}; supported are {', '.join(DTYPES)}")
        start = 0
        for part, kind in zip(parts, kinds, strict=True):
            stop = start + shapes[kind][0]
            tensors[part] = Mapped(array[start:stop])
            start = stop
    return tensors


def _expected(config, family, found):
    """For each stored tensor the names in `model_weights` of what it holds, one below the other."""
    if family.fused:
        layer = {"self_attn.qkv_proj.weight": ["q", "k", "v"], "mlp.gate_up_proj.weight": ["gate", "up"]}
    else:
        layer = {f"self_attn.{name}_proj.weight": [name] for name in "qkv"}
        layer |= {f"mlp.{name}_proj.weight": [name] for name in ("gate", "up")}
    layer |= {
        "input_layernorm.weight": ["attn_norm"],
        "self_attn.o_proj.weight": ["o"],
        "post_attention_layernorm.weight": ["ffn_norm"],
        "mlp.down_proj.weight": ["down"],
    }
    if config.attention_bias:
        layer |= {f"self_attn.{name}_proj.bias": [f"{name}_bias"] for name in "qkv"}
    if config.qk_norm:
        layer |= {f"self_attn.{name}.weight": [name] for name in ("q_norm", "k_norm")}

    expected = {EMBED: ["embed"], "model.norm.weight": ["norm"]}
    if OUTPUT in found:
        expected[OUTPUT] = ["output"]
    for i in range(config.n_layers):
        own = layer
        if f"model.layers.{i}.self_attn.o_proj.bias" in found and config.attention_bias:
            own = layer | {"self_attn.o_proj.bias": ["o_bias"]}
        for name, parts in own.items():
            expected[f"model.layers.{i}.{name}"] = [f"layers.{i}.{part}" for part in parts]
    return expected


def _refuse_bias(file, config, tensors):
    """Raise ModelError for a bias behind the attention that is not 0: models without it carry one all the same."""
    for i in range(config.n_layers):
        bias = tensors.pop(f"layers.{i}.o_bias", None)
        if bias is not None and any(block.any() for block in blocks(bias)):
            raise ModelError(
                f"{file} has attention_bias=true, and model.layers.{i}.self_attn.o_proj.bias is not 0; biases are "
                f"supported on q, k and v only"
            )


# Writing


def save_checkpoint(
    out: Path,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a folder that `from_pretrained` of transformers 4.45 and newer opens, weights in config.dtype.

    What is int8 is dequantized.  progress is called with the number of bytes written, again and again.  The folder
    appears when it is whole; an existing one is replaced only with overwrite, and only if all in it is of this format.
    Raises ModelError when no family in FAMILIES has what the config says, or the folder exists or cannot be written.
    """
    config = checkpoint.config
    model_type, settings = _family_settings(out, config)
    shapes = part_shapes(config)
    held = {OUTPUT} if not config.tied else set()
    expected = _expected(config, FAMILIES[model_type], held)
    stored_names = {part: name for name, (part,) in expected.items()}
    kinds = {stored_names[part]: part.rpartition(".")[2] for name in checkpoint.weights for part in part_names(name)}
    dtype = np.dtype(config.dtype)
    files = _split({name: jax.ShapeDtypeStruct(shapes[kind], dtype) for name, kind in kinds.items()})
    total = sum(shape.size * dtype.itemsize for part in files.values() for shape in part.values())

    with new_folder(out, total, overwrite, _may_be_replaced, "Hugging Face") as folder:
        with not_written(out):
            tensors = model_tensors(checkpoint)
            for name, part in files.items():
                _write_safetensors(folder / name, part, tensors, progress)
        if len(files) > 1:
            weight_map = {tensor: name for name, part in files.items() for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / f"{STORED[0][0]}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_files(folder, checkpoint.files)
        _describe_tokenizer(folder)
        tokenizer = load_tokenizer(find_tokenizer(folder))
        ends = list(tokenizer.eos_ids)
        settings |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _may_be_replaced(path):
    """Whether all in a folder is what `save_checkpoint` writes."""
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    names = os.listdir(path) if os.path.isdir(path) else []
    return matches(path) and all(name in ("config.json", *CARRIED) or weights.fullmatch(name) for name in names)


def _family_settings(out, config):
    """The model_type that has what a config says, and its config.json.  Raises ModelError where there is none."""
    if config.attention_bias and config.qk_norm:
        raise ModelError(
            f"{out} was not written: no family of transformers has biases and norms of q and k without a bias behind "
            f"the attention; leave out --to hf"
        )
    model_type = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    if model_type == "llama" and config.sliding_window is not None:
        model_type = "mistral"
    rope = None
    if config.rope_scaling is not None:
        rope = dict(vars(config.rope_scaling))
        rope["original_max_position_embeddings"] = rope.pop("original_max_len")
        rope["rope_type"] = "llama3"
    settings = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        # by the names of transformers 4, which 5 reads as well
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "torch_dtype": config.dtype,
        "tie_word_embeddings": config.tied,
    }
    if model_type == "mistral":
        settings["sliding_window"] = config.sliding_window
    elif model_type in ("qwen2", "qwen3"):
        settings |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        settings["sliding_window"] = config.sliding_window
    if model_type in ("llama", "qwen3"):
        settings["attention_bias"] = False
    return model_type, settings


def _describe_tokenizer(folder):
    """Write tokenizer_config.json beside a SentencePiece model that came alone: transformers 5 guesses wrong."""
    file, beside = find_tokenizer(folder), folder / "tokenizer_config.json"
    data = file.read_bytes()
    if beside.exists() or not data.startswith(b"\n"):  # LLaMA 3's tokenizer.model is text
        return
    sp = SentencePieceProcessor(model_proto=data)
    ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    settings = {name: sp.id_to_piece(id) for name, id in ids.items() if id >= 0}
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": sp.bos_id() >= 0, "add_eos_token": False}
    beside.write_text(json.dumps(settings, indent=2) + "\n")


def _split(shapes):
    """Files of at most MAX_SHARD bytes, or one tensor, by the names of `save_pretrained`: the shapes in each."""
    parts, filled = [{}], 0
    for name, shape in shapes.items():
        size = shape.size * shape.dtype.itemsize
        if parts[-1] and filled + size > MAX_SHARD:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    whole = STORED[0][0]
    if len(parts) == 1:
        return {whole: parts[0]}
    stem, _, suffix = whole.partition(".")
    return {f"{stem}-{i:05}-of-{len(parts):05}.{suffix}": part for i, part in enumerate(parts, 1)}


def _write_safetensors(file, shapes, tensors, progress):
    """Write as many tensors of an iterator as there are shapes, in their order, and by the shapes' names."""
    # without a format transformers 4 refuses the file
    header, offsets, total = safetensors_header(shapes, {"format": "pt"})
    with file.open("wb") as opened:
        opened.write(header)
        for name, (_, tensor) in zip(shapes, islice(tensors, len(shapes)), strict=True):
            raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
            opened.seek(offsets[name])
            opened.write(raw)
            if progress is not None:
                progress(raw.nbytes)
            del tensor, raw  # else they live on while the next ones are read
        opened.truncate(total)


def _show(value):
    """repr, on one line and cut short: a value from a file may be anything."""
    return _SHORT.repr(value)[:300]
