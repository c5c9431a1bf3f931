"""Meta's checkpoints: params.json, consolidated.NN.pth and tokenizer.model, as LLaMA 1, 2 and 3 came.

Every shard holds a slice of every tensor, split as Meta's model parallelism splits it, except for the norms, which are
copies.  Source: fairscale's parallel layers as used by `llama/model.py` of each release.
"""

import json
import mmap
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.config import DTYPES, ModelConfig, RopeScaling
from jaxllm.convert import pth
from jaxllm.convert.checkpoint import (
    CARRIED,
    Checkpoint,
    equal,
    model_tensors,
    model_weights,
    part_shapes,
    tokenizer_name,
)
from jaxllm.errors import ModelError
from jaxllm.loader import find_tokenizer, new_folder, not_written, write_files

# name in a layer -> its name in `model_weights`, and the axis on which the shards are to be joined (None: every shard
# has the whole)
_LAYER = {
    "attention_norm.weight": ("attn_norm", None),
    "attention.wq.weight": ("q", 0),
    "attention.wk.weight": ("k", 0),
    "attention.wv.weight": ("v", 0),
    "attention.wo.weight": ("o", 1),
    "ffn_norm.weight": ("ffn_norm", None),
    "feed_forward.w1.weight": ("gate", 0),
    "feed_forward.w2.weight": ("down", 1),
    "feed_forward.w3.weight": ("up", 0),
}
# and of those outside of the layers
_OUTSIDE = {"tok_embeddings.weight": "embed", "norm.weight": "norm", "output.weight": "output"}


@dataclass(frozen=True)
class Sharded:
    """A tensor in slices, to be joined on `axis`."""

    name: str
    slices: list[np.ndarray]
    axis: int

    @property
    def shape(self):
        shape = list(self.slices[0].shape)
        shape[self.axis] = sum(piece.shape[self.axis] for piece in self.slices)
        return tuple(shape)

    def rows(self, start, stop):
        """Rows start to stop of the whole tensor, as an array of its own."""
        found, first = [], 0
        for piece in self.slices:
            if self.axis:
                found.append(piece[start:stop])
            else:
                found.append(piece[max(start - first, 0) : max(stop - first, 0)])
                first += len(piece)
        rows = np.concatenate(found, axis=self.axis)
        for piece in self.slices:
            # pages of a mapped file that were read count as this process's memory until they are given back
            with suppress(AttributeError):  # on Windows
                piece.base.madvise(mmap.MADV_DONTNEED)
        return rows


def matches(source: Path) -> bool:
    """Whether a path is a folder with something of Meta's in it."""
    try:
        names = os.listdir(source)
    except OSError:
        return False
    return any(name == "params.json" or re.fullmatch(r"consolidated\.\d+\.pth", name) for name in names)


def open_checkpoint(source: Path, tokenizer_file: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Open the folder of a Meta checkpoint.

    dtype is what float weights are to be stored as, by default what they are.  The tokenizer is looked for in the
    folder and in the one above, where Meta's download put it.
    Raises ModelError naming the file when something is missing, or sizes contradict each other or params.json.
    """
    settings = _read_params_json(source / "params.json")
    shards = read_shards(source)
    config, tensors = _join(source, settings, shards)
    stored = {slice.dtype.name for tensor in tensors.values() for slice in tensor.slices}
    if dtype is None:
        if len(stored) > 1:
            raise ModelError(f"{source} mixes weights of {', '.join(sorted(stored))}; choose one with --dtype")
        dtype = stored.pop()
    try:
        config = ModelConfig.from_json(config | {"dtype": dtype})
    except ModelError as error:
        raise ModelError(f"{source / 'params.json'} and the tensors beside it make no LLaMA: {error}") from None
    tokenizer_file = tokenizer_file or _find_tokenizer(source)
    return Checkpoint(config, _weights(config, tensors), {tokenizer_name(tokenizer_file): tokenizer_file})


def _read_params_json(file):
    try:
        settings = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; it comes with Meta's checkpoint, copy it beside the .pth files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is not a JSON object; download it again")
    kinds = {
        "dim": int, "n_layers": int, "n_heads": int, "n_kv_heads": int, "vocab_size": int, "multiple_of": int,
        "max_seq_len": int, "norm_eps": float, "rope_theta": float, "ffn_dim_multiplier": float,
        "rope_scaling_factor": float,
    }  # fmt: skip
    for name, kind in kinds.items():
        value = settings.get(name)
        if value is None:
            if name in ("dim", "n_layers", "n_heads", "norm_eps"):
                raise ModelError(f"{file} has no {name}; is it complete?")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        unknown = name == "vocab_size" and value == -1  # LLaMA 1 and 2 leave it to the tokenizer
        if not number or not (0 < value < 1e12 or unknown) or (kind is int and value != int(value)):
            raise ModelError(f"{file} has {name}={str(value)[:40]}, which must be a number above 0; is it complete?")
    if settings["dim"] % settings["n_heads"]:
        raise ModelError(
            f"{file} has n_heads={settings['n_heads']}, which does not divide dim={settings['dim']}; is it complete?"
        )
    return settings


def read_shards(source):
    """The tensors of consolidated.00.pth, 01, ..., in order."""
    found = {int(m[1]): f for f in source.iterdir() if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", f.name))}
    if not found:
        raise ModelError(f"{source} holds no consolidated.NN.pth; it is not a checkpoint as Meta ships them")
    missing = next(n for n in range(len(found) + 1) if n not in found)
    if missing < max(found):
        raise ModelError(f"{source / f'consolidated.{missing:02}.pth'} is missing; download all shards")
    shards = [(found[n], pth.read(found[n])) for n in sorted(found)]
    first_file, first = shards[0]
    for file, tensors in shards[1:]:
        for name in first.keys() ^ tensors.keys():
            has, lacks = (first_file, file) if name in first else (file, first_file)
            raise ModelError(f"{lacks} has no {name!r}, which {has.name} has; these shards are not of one checkpoint")
        for name, tensor in tensors.items():
            if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
                raise ModelError(
                    f"{file}: {name} is {tensor.dtype}{list(tensor.shape)}, but {first[name].dtype}"
                    f"{list(first[name].shape)} in {first_file.name}; these shards are not of one checkpoint"
                )
    return shards


def _join(source, settings, shards):
    """The config as a dict, from the tensors' sizes checked against params.json, and the tensors, by Meta's names."""
    n_layers, n_heads = int(settings["n_layers"]), int(settings["n_heads"])
    dim = int(settings["dim"])
    head_dim = dim // n_heads
    held = {m[1] for name in shards[0][1] if (m := re.match(r"layers\.(\d+)\.", name))}
    if len(held) != n_layers:
        raise ModelError(f"{shards[0][0]} has {len(held)} layers, and params.json n_layers={n_layers}; is it complete?")
    columns = shards[0][1].get("tok_embeddings.weight", np.empty(0)).shape[-1:]
    axes = {"norm.weight": None, "output.weight": 0}
    # LLaMA 1 and 2 split the embedding's columns, LLaMA 3 its rows
    axes["tok_embeddings.weight"] = 0 if columns == (dim,) else 1
    for i in range(n_layers):
        axes |= {f"layers.{i}.{name}": axis for name, (_, axis) in _LAYER.items()}
    tied = "output.weight" not in shards[0][1]
    if tied:
        del axes["output.weight"]

    tensors = {}
    for name, axis in axes.items():
        slices = [found[name] for _, found in shards if name in found]
        if not slices:
            raise ModelError(f"{shards[0][0]} has no {name!r}; is it complete, and a LLaMA?")
        rank = 1 if axis is None else 2
        if slices[0].ndim != rank or slices[0].dtype.name not in DTYPES:
            raise ModelError(
                f"{shards[0][0]}: {name} is {slices[0].dtype}{list(slices[0].shape)}; it must have {rank} axes and be "
                f"one of {', '.join(DTYPES)}"
            )
        tensors[name] = Sharded(name, slices[:1] if axis is None else slices, axis or 0)
    extra = sorted(n for n in shards[0][1].keys() - axes.keys() if not n.endswith("rope.freqs"))
    if extra:
        raise ModelError(
            f"{shards[0][0]} has {extra[0]!r}, which no LLaMA with n_layers={n_layers} has; is it another family?"
        )

    vocab_size = tensors["tok_embeddings.weight"].shape[0]
    kv_rows = tensors["layers.0.attention.wk.weight"].shape[0]
    ffn_dim = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    n_kv_heads = int(settings.get("n_kv_heads") or n_heads)
    q_rows = n_heads * head_dim
    expected = {
        "attention_norm.weight": (dim,),
        "attention.wq.weight": (q_rows, dim),
        "attention.wk.weight": (n_kv_heads * head_dim, dim),
        "attention.wv.weight": (n_kv_heads * head_dim, dim),
        "attention.wo.weight": (dim, q_rows),
        "ffn_norm.weight": (dim,),
        "feed_forward.w1.weight": (_ffn_dim(settings) or ffn_dim, dim),
        "feed_forward.w2.weight": (dim, ffn_dim),
        "feed_forward.w3.weight": (ffn_dim, dim),
    }
    expected = {f"layers.{i}.{name}": shape for i in range(n_layers) for name, shape in expected.items()}
    rows = int(settings.get("vocab_size") or -1)
    expected |= {"norm.weight": (dim,), "tok_embeddings.weight": (vocab_size if rows == -1 else rows, dim)}
    if not tied:
        expected["output.weight"] = (vocab_size, dim)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"{source}: {name} is {list(tensors[name].shape)} over {len(shards)} file(s), and params.json makes it "
                f"{list(shape)}; is a shard missing, or params.json another model's?"
            )
    assert kv_rows == n_kv_heads * head_dim
    # LLaMA 3.2's small models ship the output matrix, although it is the embedding again
    tied = tied or equal(tensors["tok_embeddings.weight"], tensors["output.weight"])
    config = dict(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        max_len=_max_len(settings),
        norm_eps=float(settings["norm_eps"]),
        rope_theta=float(settings.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(settings),
        tied=tied,
    )
    return config, tensors


def _ffn_dim(settings):
    """The ffn width that Meta's code computes from params.json; None where that does not say enough."""
    if settings.get("multiple_of") is None:
        return None
    multiple = int(settings["multiple_of"])
    width = int(2 * 4 * int(settings["dim"]) / 3)
    if settings.get("ffn_dim_multiplier") is not None:
        width = int(settings["ffn_dim_multiplier"] * width)
    return -(-width // multiple) * multiple


def _max_len(settings):
    """The context in tokens that the model was trained for: not in params.json, but its values betray the release."""
    theta = settings.get("rope_theta") or 10000.0
    if settings.get("max_seq_len"):
        return int(settings["max_seq_len"])
    if settings.get("use_scaled_rope"):
        return 131072  # LLaMA 3.1 and later
    if theta == 500000.0:
        return 8192  # LLaMA 3
    if theta == 1000000.0:
        return 16384  # Code Llama
    llama1 = settings["norm_eps"] == 1e-6 or (settings["dim"] == 8192 and settings.get("n_kv_heads") is None)
    return 2048 if llama1 else 4096


def _rope_scaling(settings):
    if not settings.get("use_scaled_rope"):
        return None
    # 3.1 and 3.3 stretch by 8, which is what Meta's code does for all; 3.2's text models, known by their width, by 32
    # in the config.json that Meta published for them
    factor = settings.get("rope_scaling_factor") or (32.0 if settings["dim"] <= 3072 else 8.0)
    return vars(RopeScaling(factor=float(factor)))


def _find_tokenizer(source):
    for folder in (source, source.parent):
        if os.path.isfile(find_tokenizer(folder)):
            return find_tokenizer(folder)
    raise ModelError(
        f"{find_tokenizer(source)} is missing, and not in the folder above either; name it with --tokenizer"
    )


def _weights(config, tensors):
    """Every weight of the model folder, built from Meta's tensors as it is written."""
    named = {ours: tensors[theirs] for theirs, ours in _OUTSIDE.items() if ours != "output" or not config.tied}
    for i in range(config.n_layers):
        named |= {f"layers.{i}.{ours}": tensors[f"layers.{i}.{theirs}"] for theirs, (ours, _) in _LAYER.items()}
    return model_weights(config, named, adjacent_pairs=True)


# Writing


def save_checkpoint(
    out: Path,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write params.json, consolidated.00.pth and the tokenizer, as Meta's code loads them, weights in config.dtype.

    What is int8 is dequantized, and a tied output written out: Meta's code has none other.  progress is called with the
    number of bytes written, again and again.  The folder appears when it is whole; an existing one is replaced only
    with overwrite, and only if all in it is of this format.
    Raises ModelError for what no LLaMA of Meta's has, and when the folder exists or cannot be written.
    """
    config = checkpoint.config
    settings = _settings(out, config)
    shapes = part_shapes(config)
    size = np.dtype(config.dtype).itemsize
    total = sum(np.prod(shapes[kind]) for kind, _ in _LAYER.values()) * config.n_layers * size
    total += (2 * np.prod(shapes["embed"]) + config.dim) * size

    ours = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    for i in range(config.n_layers):
        ours |= {f"layers.{i}.{kind}": f"layers.{i}.{theirs}" for theirs, (kind, _) in _LAYER.items()}

    def tensors():
        for name, tensor in model_tensors(checkpoint, adjacent=True):
            count = tensor.nbytes
            yield ours[name], tensor
            if name == "embed" and config.tied:
                yield "output.weight", tensor
            del tensor
            if progress is not None:
                progress(count)

    with new_folder(out, int(total), overwrite, _may_be_replaced, "Meta") as folder:
        with not_written(out):
            pth.write(folder / "consolidated.00.pth", tensors())
        write_files(folder, checkpoint.files)
        (folder / "params.json").write_text(json.dumps(settings, indent=2) + "\n")


def _may_be_replaced(path):
    """Whether all in a folder is what `save_checkpoint` writes, or Meta's other shards."""
    names = os.listdir(path) if os.path.isdir(path) else []
    known = ("params.json", "checklist.chk", *CARRIED)
    return "params.json" in names and all(n in known or re.fullmatch(r"consolidated\.\d+\.pth", n) for n in names)


def _settings(out, config):
    """The params.json of a config; what is as Meta's code has it by itself is left out: older releases know no more."""
    lacking = {
        "biases": config.attention_bias,
        "norms of q and k": config.qk_norm,
        "a sliding window": config.sliding_window is not None,
        f"heads of {config.head_dim}": config.n_heads * config.head_dim != config.dim,
    }
    for what, there in lacking.items():
        if there:
            raise ModelError(
                f"{out} was not written: this model has {what}, which Meta's format cannot express; use --to hf"
            )
    settings = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    if config.n_kv_heads != config.n_heads:
        settings["n_kv_heads"] = config.n_kv_heads
    settings |= {"vocab_size": config.vocab_size, "norm_eps": config.norm_eps, **_ffn_settings(config)}
    if config.rope_theta != 10000.0:
        settings["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling
    if scaling is not None:
        settings["use_scaled_rope"] = True
        if vars(scaling) != _rope_scaling(settings):
            settings["rope_scaling_factor"] = scaling.factor
        if vars(scaling) != _rope_scaling(settings):
            raise ModelError(
                f"{out} was not written: this model has {scaling}, and Meta's format allows no other lengths and "
                f"factors than {RopeScaling(scaling.factor)}; use --to hf"
            )
    if _max_len(settings) != config.max_len:
        settings["max_seq_len"] = config.max_len
    return settings


def _ffn_settings(config):
    """multiple_of, and ffn_dim_multiplier if need be, from which `_ffn_dim` makes the config's width."""
    width = config.ffn_dim
    # the releases have 256, 1024 and 4096
    for multiple in (256, 512, 1024, 2048, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        settings = {"multiple_of": multiple}
        if _ffn_dim({"dim": config.dim, **settings}) == width:
            return settings
    multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width % m == 0)
    plain = int(2 * 4 * config.dim / 3)
    for digits in range(1, 18):  # as short a number as does it
        # the middle of what is rounded up to the width
        multiplier = round((width + 1 - multiple / 2) / plain, digits)
        settings = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
        if multiplier > 0 and _ffn_dim({"dim": config.dim, **settings}) == width:
            return settings
    raise AssertionError(f"no multiplier makes {width} of {plain}")
