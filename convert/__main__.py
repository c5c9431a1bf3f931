"""`python -m jaxllm.convert SOURCE OUT`: a checkpoint into a model folder."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxllm.config import DTYPES
from jaxllm.convert import gguf, hf, meta
from jaxllm.convert.checkpoint import Checkpoint
from jaxllm.errors import ArgumentParser, InputError, ModelError, run_command
from jaxllm.loader import TOKENIZERS, check_vocabulary, parameter_shapes, save
from jaxllm.model import MATRICES, abstract_params
from jaxllm.quantize import SCHEMES
from jaxllm.tokenizer import load_tokenizer

SOURCES = (
    "a folder with params.json and consolidated.NN.pth (Meta's), one with config.json and *.safetensors or "
    "pytorch_model*.bin (Hugging Face's), or a GGUF file"
)


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says; raises InputError for what the user has to change."""
    parser = ArgumentParser(
        prog="python -m jaxllm.convert", description="Convert a checkpoint into a jaxllm model folder."
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder as Meta or Hugging Face ship it, or a GGUF file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    parser.add_argument("--quantize", choices=SCHEMES, help="store the matrices as int8, half of bfloat16's size")
    parser.add_argument(
        "--keep-float", nargs="+", action="extend", default=[], choices=MATRICES, metavar="NAME",
        help=f"but not these: {', '.join(MATRICES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="store float weights as this (default: as they are)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one that came with SOURCE")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at OUT")
    args = parser.parse_args(argv)

    if not os.path.exists(args.source):
        raise ModelError(f"{args.source}: no such file or folder; SOURCE is {SOURCES}")
    if args.out.resolve() == args.source.resolve() or args.out.resolve() in args.source.resolve().parents:
        raise InputError(f"OUT {args.out} is or contains SOURCE {args.source}; choose another folder")
    checkpoint = _format(args.source).open_checkpoint(args.source, args.tokenizer, args.dtype)
    config = checkpoint.config
    check_tokenizer(checkpoint)

    shapes = parameter_shapes(abstract_params(config, args.quantize, args.keep_float)).values()
    total = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    name = f"{args.source.name} -> {args.out}"
    # delay and leave: what is refused is told in one line, without a bar above it
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, delay=1, leave=False) as bar:
        save(
            args.out,
            config,
            checkpoint.weights,
            checkpoint.files,
            quantize=args.quantize,
            keep_float=args.keep_float,
            overwrite=args.overwrite,
            progress=bar.update,
        )
    count = sum(shape.size for shape in parameter_shapes(abstract_params(config)).values())
    print(f"{args.out}: {count / 1e6:,.1f} M parameters, {args.quantize or config.dtype}", file=sys.stderr)


def _format(source):
    """The module that reads a checkpoint, by what is in it; raises ModelError where that is nothing known."""
    for module in (gguf, hf, meta):
        if module.matches(source):
            return module
    raise ModelError(f"{source} is no checkpoint of a known kind, or its config.json is damaged; SOURCE is {SOURCES}")


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise ModelError if the tokenizer of a checkpoint cannot be read, or is another model's."""
    name = next(name for name in TOKENIZERS if name in checkpoint.files)
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint.files[name]
        if isinstance(file, bytes):  # the files beside it say more about it
            for each, content in checkpoint.files.items():
                (Path(folder) / each).write_bytes(content)
            file = Path(folder) / name
        check_vocabulary(load_tokenizer(file), file, checkpoint.config)


if __name__ == "__main__":
    sys.exit(run_command(main))
