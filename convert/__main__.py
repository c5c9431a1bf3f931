"""`python -m jaxllm.convert SOURCE OUT`: a checkpoint into a model folder, or one into another format."""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from jaxllm.chat import load_template
from jaxllm.config import DTYPES
from jaxllm.convert import folder, gguf, hf, hub, meta, orbax
from jaxllm.convert.checkpoint import Checkpoint, quantize_checkpoint, read_json
from jaxllm.errors import ArgumentParser, InputError, ModelError, run_command
from jaxllm.loader import TOKENIZERS, check_vocabulary, parameter_shapes, save
from jaxllm.model import MATRICES, abstract_params
from jaxllm.quantize import SCHEMES
from jaxllm.tokenizer import Tokenizer, load_tokenizer

SOURCES = (
    "a folder with params.json and consolidated.NN.pth (Meta's), one with config.json and *.safetensors or "
    "pytorch_model*.bin (Hugging Face's), a GGUF file, a model folder of jaxllm's or its Orbax checkpoint, or a model "
    "on the Hugging Face Hub: org/name, org/name@revision or org/name/file.gguf"
)
# in the order in which they are tried
FORMATS = {
    gguf: "GGUF file",
    hf: "Hugging Face's folder",
    folder: "model folder of jaxllm's",
    orbax: "Orbax checkpoint",
    meta: "Meta's folder",
}
TARGETS = {"hf": hf, "meta": meta, "orbax": orbax}


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says; raises InputError for what the user has to change."""
    parser = ArgumentParser(
        prog="python -m jaxllm.convert",
        description="Convert a checkpoint into a jaxllm model folder, or into another format.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help=f"{SOURCES}")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the folder to write")
    parser.add_argument(
        "--to", choices=TARGETS,
        help="write Hugging Face's format, Meta's or an Orbax checkpoint (default: a model folder of jaxllm's)",
    )  # fmt: skip
    parser.add_argument("--inspect", action="store_true", help="only print what SOURCE is, and what would be written")
    parser.add_argument("--quantize", choices=SCHEMES, help="store the matrices as int8, half of bfloat16's size")
    parser.add_argument(
        "--keep-float", nargs="+", action="extend", default=[], choices=MATRICES, metavar="NAME",
        help=f"but not these: {', '.join(MATRICES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="store float weights as this (default: as they are)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one that came with SOURCE")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of the same format at OUT")
    args = parser.parse_args(argv)

    jax.config.update("jax_platforms", "cpu")  # a GPU has nothing to do here, and would give its memory
    if args.quantize and args.to in ("hf", "meta"):
        raise InputError(f"--to {args.to} has no int8 weights; leave --quantize out, or --to")
    if args.inspect == (args.out is not None):
        raise InputError("--inspect writes nothing; leave OUT out" if args.inspect else "OUT is missing; name a folder")
    source, id = args.source, None
    if not os.path.exists(source):
        id = hub.parse(source.as_posix())
        if id is None:
            raise ModelError(f"{source}: no such file or folder; SOURCE is {SOURCES}")
        if args.inspect:
            return _print_download(id)
        if os.path.lexists(args.out) and not args.overwrite:  # before many GB are downloaded
            raise InputError(f"{args.out} exists; choose another folder, or replace what is in it with --overwrite")
        source = hub.download(id, hf.read_config)
    if args.out is not None:
        out, inside = args.out.resolve(), source.resolve()
        if out == inside or out in inside.parents:
            raise InputError(f"OUT {args.out} is or contains SOURCE {args.source}; choose another folder")
    module = _format(source)
    checkpoint = module.open_checkpoint(source, args.tokenizer, args.dtype)
    tokenizer = check_tokenizer(checkpoint)
    if args.quantize:
        checkpoint = _quantize(args.source, checkpoint, args.quantize, args.keep_float)
    if args.inspect:
        _print(module, source, checkpoint, tokenizer, args.to)
    else:
        _convert(id or source.name, checkpoint, args)


def _format(source):
    """The module that reads a checkpoint, by what is in it; raises ModelError where that is nothing known."""
    for module in FORMATS:
        if module.matches(source):
            return module
    raise ModelError(f"{source} is no checkpoint of a known kind, or its config.json is damaged; SOURCE is {SOURCES}")


def check_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint; raises ModelError if it cannot be read, or is another model's."""
    name = next(name for name in TOKENIZERS if name in checkpoint.files)
    with tempfile.TemporaryDirectory() as beside:
        file = checkpoint.files[name]
        if isinstance(file, bytes):  # the files beside it say more about it
            for each, content in checkpoint.files.items():
                (Path(beside) / each).write_bytes(content)
            file = Path(beside) / name
        tokenizer = load_tokenizer(file)
        check_vocabulary(tokenizer, file, checkpoint.config)
    return tokenizer


def _quantize(source, checkpoint, quantize, keep_float):
    """The checkpoint with int8 matrices, which it may have already."""
    if checkpoint.quantized is None:
        return quantize_checkpoint(checkpoint, quantize, keep_float)
    if (checkpoint.quantized, {*checkpoint.keep_float}) == (quantize, {*keep_float}):
        return checkpoint
    kept = f" with {', '.join(checkpoint.keep_float)} as float" if checkpoint.keep_float else ""
    raise InputError(
        f"{source} is {checkpoint.quantized}{kept} already and cannot be quantized otherwise; leave --quantize out, or "
        f"convert what it was made from"
    )


def _convert(name, checkpoint, args):
    """Write the checkpoint, with a progress bar."""
    quantized = checkpoint.quantized
    if quantized and args.to in ("hf", "meta"):
        print(
            f"warning: {name} is {quantized}, which --to {args.to} cannot express: its weights are written as "
            f"{checkpoint.config.dtype}, with what int8 has rounded",
            file=sys.stderr,
        )
        quantized = None
    # delay and leave: what is refused is told in one line, without a bar above it
    total = _weight_bytes(checkpoint, quantized)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"{name} -> {args.out}", delay=1, leave=False) as bar:
        if args.to:
            TARGETS[args.to].save_checkpoint(args.out, checkpoint, overwrite=args.overwrite, progress=bar.update)
        else:
            save(
                args.out,
                checkpoint.config,
                checkpoint.weights,
                checkpoint.files,
                quantize=checkpoint.quantized,
                keep_float=checkpoint.keep_float,
                overwrite=args.overwrite,
                progress=bar.update,
            )
    count = _parameters(checkpoint.config)
    print(f"{args.out}: {count / 1e6:,.1f} M parameters, {quantized or checkpoint.config.dtype}", file=sys.stderr)


def _parameters(config):
    return sum(shape.size for shape in parameter_shapes(abstract_params(config)).values())


def _weight_bytes(checkpoint, quantized):
    """The bytes of the weights as they are written."""
    params = abstract_params(checkpoint.config, quantized, checkpoint.keep_float if quantized else ())
    return sum(shape.size * shape.dtype.itemsize for shape in parameter_shapes(params).values())


# --inspect


def _print_download(id):
    sizes = hub.file_sizes(id)
    print(f"{id}: {_size(sum(sizes.values()))} in {len(sizes)} files to download from the Hugging Face Hub, or cached")
    for name, size in sizes.items():
        print(f"  {name:<40}  {_size(size)}")


def _print(module, source, checkpoint, tokenizer, to):
    """Print what a checkpoint is, and what would become of it, from headers alone."""
    config = checkpoint.config
    extras = {
        "biases of q, k, v": config.attention_bias,
        "norms of q and k": config.qk_norm,
        f"window of {config.sliding_window} tokens": config.sliding_window is not None,
    }
    scaling = config.rope_scaling
    stretched = f", stretched by {scaling.factor:g} from {scaling.original_max_len} tokens on" if scaling else ""
    lines = {
        "format": FORMATS[module],
        "family": _family(module, source, config),
        "parameters": f"{_parameters(config) / 1e6:,.1f} M",
        "layers": config.n_layers,
        "width": config.dim,
        "heads": f"{config.n_heads}, and {config.n_kv_heads} of k and v, each {config.head_dim} wide",
        "ffn width": config.ffn_dim,
        "vocabulary": config.vocab_size,
        "context": f"{config.max_len} tokens",
        "rope": f"theta {config.rope_theta:g}{stretched}",
        "attention": ", ".join(name for name, there in extras.items() if there) or "plain",
        "output": "the embedding (tied)" if config.tied else "a matrix of its own",
        "stored": _stored(module, source, checkpoint),
        "tokenizer": _tokenizer(checkpoint, tokenizer),
        "chat template": _template(checkpoint),
        "would write": _written(checkpoint, to),
    }
    print(f"{source}:")
    for name, value in lines.items():
        print(f"{name:<15} {value}")


def _family(module, source, config):
    """What the source calls its family, or what one like it is called."""
    if module is gguf:
        return gguf.read(source)[0]["general.architecture"]
    if module is hf:
        return read_json(source / "config.json").get("model_type", "llama")
    return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"


def _stored(module, source, checkpoint):
    """How many bytes in how many files, and how many tensors of each type."""
    if module is gguf:
        files, types = [source], Counter(tensor.type.name for tensor in gguf.read(source)[1].values())
    elif module is hf:
        found = hf.read_tensors(source).values()
        files, types = {file for file, _ in found}, Counter(array.dtype.name for _, array in found)
    elif module is meta:
        shards = meta.read_shards(source)
        files = [file for file, _ in shards]
        types = Counter(array.dtype.name for _, tensors in shards for array in tensors.values())
    else:
        config, quantized = checkpoint.config, checkpoint.quantized
        leaves = parameter_shapes(abstract_params(config, quantized, checkpoint.keep_float if quantized else ()))
        types = Counter(leaf.dtype.name for leaf in leaves.values())
        inside = source.glob("*.safetensors") if module is folder else (source / orbax.PARAMS).rglob("*")
        files = [file for file in inside if os.path.isfile(file)]
    kinds = ", ".join(f"{name} ({count} tensors)" for name, count in types.most_common())
    size = sum(os.path.getsize(file) for file in files)
    return f"{_size(size)} in {len(files)} {'file' if len(files) == 1 else 'files'}: {kinds}"


def _tokenizer(checkpoint, tokenizer):
    name = next(name for name in TOKENIZERS if name in checkpoint.files)
    return f"{name}, {tokenizer.vocab_size} tokens"


def _template(checkpoint):
    """Whether the files hold a chat template, which is looked for as in a model folder."""
    with tempfile.TemporaryDirectory() as path:
        for name, content in checkpoint.files.items():
            if name not in TOKENIZERS:
                data = content if isinstance(content, bytes) else content.read_bytes()
                (Path(path) / name).write_bytes(data)
        try:
            return Path(load_template(path).name).name
        except ModelError as error:
            return f"not usable: {error}"
        except InputError:
            return "none"


def _written(checkpoint, to):
    """The bytes of weights and the files that the other arguments make."""
    quantized = None if to in ("hf", "meta") else checkpoint.quantized
    size = _weight_bytes(checkpoint, quantized)
    named = {
        None: ["config.json", "model.safetensors"],
        "hf": ["config.json", "*.safetensors of up to 5 GB each"],
        "meta": ["params.json", "consolidated.00.pth"],
        "orbax": ["config.json", f"{orbax.PARAMS}/"],
    }[to]
    stored = f"{quantized} and {checkpoint.config.dtype}" if quantized else checkpoint.config.dtype
    return f"{_size(size)} of {stored}: {', '.join([*named, *checkpoint.files])}"


def _size(count):
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(run_command(main))
