"""Text generation: the library's `generate` and `stream`, and the command `python -m jaxllm.generate`."""

import json
import os
import re
import signal
import sys
import time
import types
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import resources
from jaxllm.chat import ChatTemplate, load_template
from jaxllm.config import KV_CACHES, preset
from jaxllm.errors import ArgumentParser, InputError, run_command
from jaxllm.loader import Model, load, open_folder, plan_folder
from jaxllm.model import MATRICES
from jaxllm.ops import check_implementations
from jaxllm.pipeline import Session, cache_slots, generate_tokens, row_limits
from jaxllm.quantize import SCHEMES
from jaxllm.sampling import Sampling

# GB/s from the makers' data sheets, by what JAX calls the device
PEAK_BANDWIDTH = {
    "NVIDIA H200": 4800,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA L40S": 864,
    "NVIDIA L4": 300,
    "NVIDIA GeForce RTX 5090": 1792,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 3090": 936,
}


# XLA's settings of a GPU's memory: it is taken from CUDA's own pool when it is needed.  XLA's own allocator would keep
# a table in the host's memory, a thirtieth as large as what it takes of the GPU's, and fill it while taking that.  Of
# what is given back, up to nine tenths of the GPU's memory are kept for reuse.
GPU_MEMORY = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_CLIENT_MEM_FRACTION": "0.9",
}
GPU_MEMORY_TOO = ("XLA_PYTHON_CLIENT_MEM_FRACTION",)  # another way for the user to decide

COMMANDS = "/reset begins anew"  # of a conversation
ANSWER = 512  # tokens of an answer in a conversation at most, unless the caller says otherwise

_IMPORTED = time.perf_counter()


@dataclass(frozen=True)
class Result:
    """What became of one prompt, given as this text or as ids that read so.

    prompt_tokens and tokens are ids; text is what tokens read as behind the prompt, without the stop string that ended
    it; finish_reason is "stop" (end of sequence, or a stop string), "length" (max_new_tokens or the context is full) or
    "interrupted".  stats speaks of the whole batch: see `Generation.stats`.
    """

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    seed: int
    stats: dict


class Generation:
    """A batch of prompts being continued: iterate for (row, text) pieces as they come; `results` is what came so far.

    Arguments as in `generate`; with session the one prompt continues what that holds, whose slots are its max_len.  The
    pieces of a row joined are its text.
    """

    def __init__(self, model, prompts, sampling=None, max_new_tokens=128, stop=(), max_len=None, session=None):
        self._ids = _encoded(model.tokenizer, prompts)
        _check_texts("stop string", stop)
        self._model = model
        self._prompts = [p if isinstance(p, str) else None for p in prompts]  # None: given as ids
        self._sampling = Sampling() if sampling is None else sampling
        self._seeds = self._sampling.rows(len(self._ids)).seed.tolist()
        self._stop = tuple(stop)
        self._tokens: list[list[int]] = [[] for _ in self._ids]
        self._text = [""] * len(self._ids)
        self._held = [""] * len(self._ids)  # text that may turn out to be the start of a stop string
        self._finish: list[str | None] = [None] * len(self._ids)
        self._times: list[tuple[float, float, int]] = []  # clock, seconds of compilation so far, tokens chosen so far
        self._limits = row_limits(model.config, self._ids, max_new_tokens, session.slots if session else max_len)
        self._prefilled = sum(map(len, self._ids))
        model.check()
        eos_ids = model.tokenizer.eos_ids
        if session:
            self._chunks = session.generate_tokens(self._ids[0], self._sampling, max_new_tokens, eos_ids)
            self._prefilled -= session.reused
        else:
            slots = cache_slots(self._ids, self._limits, max_len or model.config.max_len)
            _require_memory(model, len(self._ids), slots, least=max(map(len, self._ids)) + 1)
            self._chunks = generate_tokens(
                model.params, model.config, self._ids, self._sampling, max_new_tokens, eos_ids, max_len
            )
        self._pieces = self._run()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces  # of which there is one: who stops iterating can go on later

    def _run(self):
        decoders = [self._model.tokenizer.decoder(ids) for ids in self._ids]
        held, chosen = self._held, 0
        self._note(chosen)
        for chunk in self._checked_chunks():
            chosen += int((chunk >= 0).sum())
            self._note(chosen)
            for row, tokens in enumerate(chunk.tolist()):
                if self.finished(row):
                    continue
                held[row] = self._take(row, tokens, decoders[row], held[row])
                keep = 0 if self.finished(row) else held_back(held[row], self._stop)
                piece = held[row][: len(held[row]) - keep]
                held[row] = held[row][len(piece) :]
                self._text[row] += piece
                if piece:
                    yield row, piece
            if all(self._finish):
                return

    def _checked_chunks(self):
        """The chunks, as long as the model is what it was: text from weights that changed would be garbage."""
        while True:
            self._model.check()
            chunk = next(self._chunks, None)
            self._model.check()
            if chunk is None:
                return
            yield chunk

    def _take(self, row, tokens, decoder, held):
        """Take in a row's next tokens, up to its end if that is among them; `held` with their text behind it."""
        for token in tokens:
            if token in self._model.tokenizer.eos_ids:
                self._finish[row] = "stop"
            else:
                self._tokens[row].append(token)
                held += decoder.put(token)
                if len(self._tokens[row]) == self._limits[row]:
                    self._finish[row] = "length"
            if self.finished(row):
                held += decoder.flush()
            found = [at for at in map(held.find, self._stop) if at >= 0]
            if found:
                held = held[: min(found)]
                self._finish[row] = "stop"
            if self.finished(row):
                break
        return held

    def _note(self, chosen):
        self._times.append((time.perf_counter(), _compiling.seconds, chosen))

    def finished(self, row: int) -> bool:
        """Whether no more text will come for a row."""
        return self._finish[row] is not None

    @property
    def results(self) -> list[Result]:
        """One Result a prompt; a row that was not finished has finish_reason "interrupted" and all its text so far."""
        stats = self.stats
        texts = map("".join, zip(self._text, self._held, strict=True))
        decode = self._model.tokenizer.decode
        return [
            Result(decode(ids) if prompt is None else prompt, ids, tokens, text, finish or "interrupted", seed, stats)
            for prompt, ids, tokens, text, finish, seed in zip(
                self._prompts, self._ids, self._tokens, texts, self._finish, self._seeds, strict=True
            )
        ]

    @property
    def stats(self) -> dict:
        """Speed of the whole batch, as a dict of numbers.

        compile_s (tracing, and compiling or reading from the cache) and prefill_compile_s (that of it before the first
        token); prefill_s (to the first token), prefill_tokens_per_s and decode_tokens_per_s, all without compilation;
        bytes_per_token (the least that decoding a token has to read: weights and filled cache), gb_per_s, and
        share_of_peak, gb_per_s over the bandwidth in the device's data sheet.  What was not measured is None.
        """
        measured = "prefill_compile_s", "prefill_s", "prefill_tokens_per_s", "decode_tokens_per_s"
        stats = dict.fromkeys((*measured, "gb_per_s", "share_of_peak"))
        stats |= {"compile_s": self._times[-1][1] - self._times[0][1] if self._times else None}
        stats |= {"bytes_per_token": self._bytes_per_token()}
        if len(self._times) > 1:
            (t0, c0, _), (t1, c1, n1) = self._times[:2]
            stats["prefill_compile_s"] = c1 - c0
            stats["prefill_s"] = max(t1 - t0 - (c1 - c0), 1e-9)
            stats["prefill_tokens_per_s"] = self._prefilled / stats["prefill_s"]
            t2, c2, n2 = self._times[-1]
            if n2 > n1:
                stats["decode_tokens_per_s"] = (n2 - n1) / max(t2 - t1 - (c2 - c1), 1e-9)
                stats["gb_per_s"] = stats["bytes_per_token"] * stats["decode_tokens_per_s"] / 1e9
                peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
                stats["share_of_peak"] = stats["gb_per_s"] / peak if peak else None
        return stats

    def _bytes_per_token(self):
        params, config = self._model.params, self._model.config
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        if params.output is not None:  # of the embedding only one row is read
            weights -= sum(leaf.nbytes for leaf in jax.tree.leaves(params.embed))
        # halfway through the answer
        filled = sum(len(ids) + len(tokens) // 2 for ids, tokens in zip(self._ids, self._tokens, strict=True))
        width = config.head_dim + 4 if config.kv_cache else config.head_dim * jnp.dtype(config.dtype).itemsize
        return (weights + filled * 2 * config.n_layers * config.n_kv_heads * width) // len(self._ids)


def _encoded(tokenizer, prompts):
    """The token ids of prompts, each a text or ids already; raises InputError for what is neither."""
    _check_list("prompt", prompts)
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            _check_text("prompt", i, prompt)
            encoded.append(tokenizer.encode(prompt))
            continue
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of several lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or ids.size and not np.issubdtype(ids.dtype, np.integer):
            got = type(prompt).__name__
            raise InputError(f"prompt {i} is of type {got}, and no list of whole numbers; give it a text, or token ids")
        encoded.append(ids.tolist())
    return encoded


def _check_texts(what, texts):
    """Raise InputError for prompts or stop strings that no model is needed to refuse."""
    _check_list(what, texts)
    for i, text in enumerate(texts):
        _check_text(what, i, text)


def _check_list(what, texts):
    if isinstance(texts, str | bytes) or not isinstance(texts, Collection):  # an iterator would be used up here
        raise InputError(f"the {what}s are given as {type(texts).__name__}; give a list of strings")


def _check_text(what, i, text):
    if not isinstance(text, str) or not text:
        got = "empty" if text == "" else f"of type {type(text).__name__}"
        raise InputError(f"{what} {i} is {got}; give it some text")


def _require_memory(model, batch, slots, least=None):
    """Raise InputError unless a cache of so many rows and slots fits beside a model that is loaded."""
    devices = model.params.norm.devices()
    if len(devices) == 1:  # params that a caller has split over several are that caller's business
        plan = resources.plan(model.config, batch, slots)
        resources.require_memory(plan, resources.free_memory(*devices), weights_loaded=True, least=least)


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of text are the beginning of a stop string."""
    sizes = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(sizes, default=0)


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    max_len: int | None = None,
) -> list[Result]:
    """Continue every prompt, as one batch: a Result for each, the same as the prompt would get alone, up to rounding.

    A prompt is a text, or token ids, to which nothing is added.
    In float32 that is the same text; in bfloat16 a near tie may fall another way in a batch of another size.
    sampling is `Sampling()` by default; a text ends at an end-of-sequence token, before the first of the stop strings,
    after max_new_tokens, or where the context of max_len tokens is full (by default what the model was trained for).
    Raises InputError for an empty or too long prompt, or a setting out of range.
    """
    generation = Generation(model, prompts, sampling, max_new_tokens, stop, max_len)
    for _ in generation:
        pass
    return generation.results


def stream(
    model: Model,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    max_len: int | None = None,
) -> Iterator[str]:
    """Continue one prompt: pieces of text as they come, never half a character.  Arguments as in `generate`."""
    return (piece for _, piece in Generation(model, [prompt], sampling, max_new_tokens, stop, max_len))


class Conversation:
    """A conversation with a model that was trained to chat; the cache keeps it, so that a turn prefills what is new.

    system is what the model is told first; template is a ChatTemplate, or the file of one, or "llama2" (by default the
    model's own).  sampling, max_new_tokens and stop are as in `generate`, for each answer; max_len is how many tokens
    the whole conversation may have (by default what the model was trained for).
    messages, a list of {"role", "content"}, is what was said so far; it may be changed between turns.
    Raises InputError where there is no template, for settings out of range, and, before it is allocated, when the free
    memory does not suffice for a cache of max_len tokens.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        template: ChatTemplate | str | Path | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = ANSWER,
        stop: Sequence[str] = (),
        max_len: int | None = None,
    ):
        if not isinstance(template, ChatTemplate):
            if model.path is None:
                raise InputError("the model was not loaded from a folder; give a ChatTemplate as template")
            template = load_template(model.path, template)
        self._model, self._system, self._template = model, system, template
        self._sampling = Sampling() if sampling is None else sampling
        self._seed = int(self._sampling.rows(1).seed[0])
        self._max_new_tokens, self._stop = max_new_tokens, stop
        _check_texts("stop string", stop)
        row_limits(model.config, [[0]], max_new_tokens, max_len)  # whatever will be said
        model.check()
        slots = max_len or model.config.max_len
        _require_memory(model, 1, slots)
        self._session = Session(model.params, model.config, slots)
        self._generation = self._pieces = None
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew: the same messages then get the same answers."""
        self._end()
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._generation = None

    def say(self, text: str) -> Iterator[str]:
        """The answer to a user's message, in pieces as they come; the next call, or closing the iterator, ends it.

        Both messages are in `messages` from now on, the answer as far as it has come.
        Raises InputError, and nothing is changed, for a text that is empty, or that leaves no room for an answer.
        """
        self._end()
        if not isinstance(text, str) or not text.strip():
            got = "empty" if isinstance(text, str) else f"of type {type(text).__name__}"
            raise InputError(f"the message is {got}; give it some text")
        said, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        ids = self._template.encode([*self.messages, said], self._model.tokenizer)
        room, most = self._session.slots, self._model.config.max_len
        if len(ids) >= room:
            raise InputError(
                f"with this message the conversation has {len(ids)} tokens, which leaves no room for an answer in a "
                f"context of {room}; shorten it, or begin anew with /reset (in Python, reset())"
                + (f", or raise max_len (up to {most})" if room < most else "")
            )
        # not the draws of the turn before, and not those of a conversation with the next seed
        turn = sum(message["role"] == "assistant" for message in self.messages)
        seed = int(np.random.SeedSequence((self._seed, turn)).generate_state(1)[0]) if turn else self._seed
        self._generation = Generation(
            self._model,
            [ids],
            replace(self._sampling, seed=seed),
            self._max_new_tokens,
            self._stop,
            session=self._session,
        )
        self.messages += said, answer
        self._pieces = self._answer(self._generation, answer)
        return self._pieces

    def _answer(self, generation, answer):
        try:
            for _, piece in generation:
                answer["content"] += piece
                yield piece
        finally:  # also what was held back, of an answer that ends here
            answer["content"] = generation.results[0].text

    def _end(self):
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None

    @property
    def result(self) -> Result | None:
        """What became of the last message so far.  prompt is all that the model was given; seed was this turn's."""
        return self._generation.results[0] if self._generation else None


class _Compiling:
    """Counts the seconds in which our programs were traced, lowered, and compiled or read from the cache."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, seconds, fun_name="", **_):
        # only the outermost: the functions traced inside a program report their own time once more
        ours = any(name in fun_name for name in ("init_state", "prefill", "decode_chunk"))
        if ours and event.startswith("/jax/core/compile/"):
            self.seconds += seconds


_compiling = _Compiling()


def main(argv: Sequence[str]) -> None:
    """Generate as the command line says; raises InputError for what the user has to change."""
    imported = _process_seconds()
    args = _parse(argv)
    if args.plan:
        _print_plan(args)
        return
    prompts = _prompts(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = ANSWER if prompts is None else 128
    _check_texts("prompt", prompts or ())
    _check_texts("stop string", args.stop)
    sampling = _sampling(args)
    if args.echo and (args.json or prompts is None):
        what = "with --json, which always holds the prompt" if args.json else "in a conversation"
        raise InputError(f"--echo can have no effect {what}; leave one out")

    settled = _settle_gpu_memory()
    start = time.perf_counter()
    device = jax.devices()[0]
    check_implementations(args.impl)
    times = {"import_s": imported, "device_s": time.perf_counter() - start}
    if device.platform == "gpu" and settled:
        settings = " ".join(f"{name}={value}" for name, value in GPU_MEMORY.items())
        print(f"taking the GPU's memory as it is needed ({settings})", file=sys.stderr)
    start = time.perf_counter()
    folder = open_folder(args.model, args.tokenizer)
    template = load_template(folder.path, args.chat_template) if args.chat else None
    ids = None if prompts is None else [_prompt_ids(args, folder.tokenizer, template, prompt) for prompt in prompts]
    model = _load(args, folder, ids)
    times["load_s"] = time.perf_counter() - start
    if args.model is None:
        print("no --model: using the small demonstration model inside the package", file=sys.stderr)
    settings = sampling, args.max_new_tokens, args.stop, args.max_len
    sys.stdout.reconfigure(encoding="utf-8")
    if prompts is None:
        _converse(Conversation(model, args.system, template, *settings), args, times)
        return
    generation = Generation(model, ids, *settings)
    try:
        _print_text(generation, prompts, args, times)
    finally:  # also on Ctrl-C: what there is so far
        if args.json:
            for prompt, result in zip(prompts, generation.results, strict=True):
                _print_json(prompt, result, times)
        if args.stats:
            _print_stats({"first_text_s": None} | times | generation.stats)


def _prompt_ids(args, tokenizer, template, prompt):
    if template is None:
        return tokenizer.encode(prompt)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return template.encode([*system, {"role": "user", "content": prompt}], tokenizer)


def _load(args, folder, ids):
    """The model, if it, and a cache for the prompts of these ids (None: for a conversation), fit into memory."""
    room = args.max_len or folder.config.max_len
    limits = row_limits(folder.config, ids or [[0]], args.max_new_tokens, args.max_len)
    slots, least = (cache_slots(ids, limits, room), max(map(len, ids)) + 1) if ids else (room, None)
    settings = _memory_settings(args)
    plan = plan_folder(folder, len(limits), slots, **settings)
    resources.require_memory(plan, resources.free_memory(), least=least)
    return load(folder, **settings, impl=args.impl)


def _memory_settings(args):
    return {name: getattr(args, name) for name in ("quantize", "dtype", "kv_cache", "keep_float")}


def _print_plan(args):
    """Print the memory plan of a model folder or of a preset; nothing is loaded."""
    if args.preset and args.model:
        raise InputError("--preset and --model are both given; give one")
    memory = resources.parse_size(args.device_memory) if args.device_memory else None
    batch = len(args.prompt) if args.prompt else 1
    settings = _memory_settings(args)
    if args.preset:
        plan = resources.plan(preset(args.preset), batch, args.max_len, **settings)
    else:
        plan = plan_folder(open_folder(args.model, args.tokenizer), batch, args.max_len, **settings)
    free = resources.free_memory() if memory is None else memory
    if args.json:
        print(json.dumps(resources.report(plan, free)))
    else:
        print(f"{args.preset or args.model or 'the small model inside the package'}:\n{resources.table(plan, free)}")


def _settle_gpu_memory():
    """Decide how JAX takes an NVIDIA GPU's memory, unless the user has: whether it was decided here."""
    if resources.cuda_driver() is None or any(name in os.environ for name in (*GPU_MEMORY, *GPU_MEMORY_TOO)):
        return False
    os.environ |= GPU_MEMORY
    return True


def _process_seconds():
    """Seconds since this process was started; where the system does not tell, since this module was imported."""
    try:
        with open("/proc/self/stat") as file:
            started = int(file.read().rpartition(")")[2].split()[19])  # proc(5): field 22, in clock ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED


def _parse(argv):
    parser = ArgumentParser(prog="python -m jaxllm.generate", description="Continue prompts with a LLaMA model.")
    parser.add_argument("stdin", nargs="?", choices=["-"], help="read the prompt from standard input")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: the one inside the package)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this tokenizer, not the folder's")
    parser.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts, run as one batch"
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file that holds one prompt")
    parser.add_argument(
        "--chat", action="store_true",
        help="the prompt is a user's message, of a model trained to chat; without a prompt, a conversation",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="with --chat: a Jinja template, or llama2 (default: the model's own)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default: 128, in a conversation {ANSWER} for each answer"
    )
    parser.add_argument("--temperature", type=float, help="default 0.8")
    parser.add_argument("--top-k", type=int, help="default 0: off")
    parser.add_argument("--top-p", type=float, help="default 1.0: off")
    parser.add_argument("--min-p", type=float, help="default 0.0: off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="default 1.0: off")
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before these")
    parser.add_argument("--quantize", choices=SCHEMES, help="quantize a float model while loading")
    parser.add_argument(
        "--keep-float", nargs="+", action="extend", default=[], choices=MATRICES, metavar="NAME",
        help=f"but not these: {', '.join(MATRICES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="type of activations and cache")
    parser.add_argument("--kv-cache", choices=KV_CACHES[1:], help="half the cache of bfloat16 (default: as --dtype)")
    parser.add_argument("--max-len", type=int, metavar="N", help="context in tokens (default: the model's)")
    parser.add_argument(
        "--impl", default="auto", metavar="auto|xla|triton|OP=IMPL,...", help="implementation of the ops"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument("--stats", action="store_true", help="print times and speeds to stderr")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt or turn, not its text")
    parser.add_argument("--plan", action="store_true", help="only print how much memory --model or --preset takes")
    parser.add_argument("--preset", metavar="NAME", help="with --plan: a released model, such as llama2-70b")
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="with --plan: 24GiB and the like (default: what is free)"
    )
    args = parser.parse_args(argv)
    for name in ("preset", "device_memory"):
        if getattr(args, name) is not None and not args.plan:
            raise InputError(f"--{name.replace('_', '-')} belongs to --plan; leave it out, or add that")
    for name in ("system", "chat_template"):
        if getattr(args, name) is not None and not args.chat:
            raise InputError(f"--{name.replace('_', '-')} belongs to --chat; leave it out, or add that")
    return args


def _prompts(args):
    """The prompts, or None for a conversation."""
    given = [name for name in ("stdin", "prompt", "prompt_file") if getattr(args, name) is not None]
    if (args.stdin or args.chat and not given) and sys.stdin is None:
        raise InputError("standard input is closed; give the prompt with --prompt")
    if not given and args.chat:
        return None
    if len(given) != 1:
        got = "none" if not given else "more than one"
        raise InputError(f"{got} of --prompt TEXT, --prompt-file FILE and - (standard input) is given; give one")
    if args.prompt is not None:
        return args.prompt
    source = "standard input" if args.stdin else args.prompt_file
    try:
        text = (sys.stdin.buffer.read() if args.stdin else args.prompt_file.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    return [text.removesuffix("\n")]  # the one that editors and `echo` put at the end


def _sampling(args):
    settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.greedy and settings:
        flags = ", ".join("--" + name.replace("_", "-") for name in settings)
        raise InputError(f"--greedy takes the most likely token, so {flags} can have no effect; leave one out")
    if args.greedy:
        settings["temperature"] = 0.0
    sampling = Sampling(**settings, repetition_penalty=args.repetition_penalty, seed=args.seed)
    sampling.rows(1)  # complains before the model is loaded
    return sampling


def _converse(conversation, args, times):
    """Answer a user's lines until they end; on a terminal neither an error nor Ctrl-C ends it."""
    terminal = sys.stdin.buffer.isatty()
    if args.stats:
        _print_stats(times)
    if terminal:
        print(f"a conversation: {COMMANDS}, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    read_line = _line_reader(terminal)
    while True:
        try:
            line = read_line()
            if line is None:
                return
            if line == "/reset":
                conversation.reset()
            elif re.fullmatch(r"/\w*", line):  # a path has a second slash, or words behind it
                raise InputError(f"no command is called {line}; {COMMANDS}; a space before it sends it to the model")
            elif line.strip():
                _print_answer(conversation, line.strip(), args, times, terminal)
        except InputError as error:
            if not terminal:  # a script should notice
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nCtrl-D leaves", file=sys.stderr)


def _line_reader(terminal):
    """A function that gives the user's next line, without what ends it, and None behind the last."""
    if terminal and sys.stdout.isatty():
        try:
            import readline  # noqa: F401  input() then edits lines, and knows those before
        except ImportError:  # on Windows the console does
            pass

    def read():
        try:
            if not terminal:
                line = sys.stdin.buffer.readline().decode()
                return line.rstrip() if line else None
            if sys.stdout.isatty():
                return input("> ").rstrip()
            print("> ", end="", file=sys.stderr, flush=True)
            return input().rstrip()
        except EOFError:
            print(file=sys.stderr)
            return None
        except UnicodeDecodeError as error:
            raise InputError(f"the line is not UTF-8 at byte {error.start}; convert it to UTF-8") from None

    return read


def _print_answer(conversation, line, args, times, terminal):
    """Print the answer to a line as it comes; Ctrl-C ends it, and is raised where no terminal asks for the next."""
    with _noted_interrupt() as pressed:
        pieces, printed = conversation.say(line), 0
        try:
            for piece in pieces:
                if not args.json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    printed += len(piece)
                if pressed:
                    break
        finally:  # also when Ctrl-C was pressed again
            pieces.close()
            result = conversation.result
            if args.json:
                _print_json(line, result, times)
            else:
                print(result.text[printed:], flush=True)
            if args.stats:
                _print_stats(result.stats)
    if pressed and not terminal:
        raise KeyboardInterrupt


def _print_json(prompt, result, times):
    print(json.dumps(asdict(result) | {"prompt": prompt, "stats": times | result.stats}), flush=True)


def _print_text(generation, prompts, args, times):
    """Print the continuations in order: the first unfinished one as it comes, those behind it when it is their turn."""
    start = prompts if args.echo else [""] * len(prompts)
    texts = list(start)
    row = printed = 0  # the first row that is not all printed, and how many of its characters are

    def show(everything=False):
        nonlocal row, printed
        while row < len(prompts):
            sys.stdout.write(texts[row][printed:])
            printed = len(texts[row])
            if not (everything or generation.finished(row)):
                break
            sys.stdout.write("\n")
            row, printed = row + 1, 0
        sys.stdout.flush()

    try:
        with _noted_interrupt() as pressed:
            for at, piece in generation:
                times.setdefault("first_text_s", _process_seconds())
                texts[at] += piece
                if not args.json:
                    show()
                if pressed:
                    raise KeyboardInterrupt
    finally:  # on Ctrl-C also the rows behind the first unfinished one, and what was held back
        if not args.json:
            texts = [prompt + result.text for prompt, result in zip(start, generation.results, strict=True)]
            show(everything=True)


@contextmanager
def _noted_interrupt():
    """Gives a list into which Ctrl-C puts something, and raises KeyboardInterrupt only when pressed again.

    Python's own handler raises wherever it finds itself, and in JAX's callbacks an exception is lost.
    """
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def note(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # ignored, in a job that a shell runs in the background
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _print_stats(stats):
    def line(name, key, unit, digits=1):
        if key not in stats:
            return
        value = stats[key]
        print(f"{name:<16} {'-' if value is None else f'{value:,.{digits}f} {unit}'}", file=sys.stderr)

    line("imports", "import_s", "s", 2)
    line("device", "device_s", "s", 2)
    line("load", "load_s", "s", 2)
    line("compile prefill", "prefill_compile_s", "s", 2)
    line("prefill", "prefill_s", "s", 2)
    line("first text", "first_text_s", "s after the start of the process", 2)
    line("compile", "compile_s", "s in all", 2)
    line("prefill", "prefill_tokens_per_s", "tokens/s")
    line("decode", "decode_tokens_per_s", "tokens/s")
    line("read per token", "bytes_per_token", "bytes", 0)
    line("read", "gb_per_s", "GB/s", 2)
    line("share of peak", "share_of_peak", "of the data sheet's bandwidth", 3)


class _Callable(types.ModuleType):
    """`jaxllm.generate` names both this module and the library's function: importing one must not hide the other."""

    __call__ = staticmethod(generate)


if __name__ == "__main__":
    sys.exit(run_command(main))
sys.modules[__name__].__class__ = _Callable
