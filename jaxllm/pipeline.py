"""Inference: token ids in, token ids out.  Prefill in bucketed pieces, decode in scanned chunks, one donated state.

Nothing here knows files or text: the parameters may come from anywhere.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from numbers import Integral
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.model import KVCache, Params, forward, hidden_states, init_cache, logits
from jaxllm.sampling import Sampling, sample

CHUNK = 8  # tokens a decode call: enough to hide the host's work, few enough that text streams smoothly
PIECE = 512  # tokens of a row that a prefill call takes at most: bounds the attention scores, [B, N, PIECE, S] float32
TOKENS = 2048  # of all rows, where no such scores are stored: enough to keep a GPU's tensor cores busy
LEAST = 128  # slots of the smallest cache
SMALLEST = 16  # tokens of the smallest prefill call: below it, padding costs less than another compilation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that decoding carries from token to token, on the device and donated.

    cache: what the tokens so far left behind; token int32 [B]: the last token chosen, not in the cache yet;
    seen bool [B, V]: the tokens that occurred in each row; step int32 [B]: how many tokens were chosen;
    done bool [B]: the row met an end-of-sequence token, and its cache no longer grows.
    """

    cache: KVCache
    token: jax.Array
    seen: jax.Array
    step: jax.Array
    done: jax.Array


@partial(jax.jit, static_argnames=("config", "batch", "slots"))
def init_state(config: ModelConfig, batch: int, slots: int) -> State:
    """The State before any prompt: `batch` rows with room for `slots` tokens each."""
    return State(
        cache=init_cache(config, batch, slots),
        token=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        step=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
    )


@partial(jax.jit, donate_argnames="state")
def rewind(state: State, lengths, seen) -> State:
    """The State in which of each row only the first lengths int32 [B] tokens are left, and none was chosen.

    seen bool [B, V] marks the tokens that occur among those.
    """
    nothing = jnp.zeros_like(lengths)
    return State(replace(state.cache, length=lengths), nothing, seen, nothing, jnp.zeros_like(state.done))


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill(params: Params, config: ModelConfig, state: State, tokens, lengths, sampling: Sampling):
    """Take in a piece of the prompts, tokens int32 [B, T] of which the first lengths [B] of each row are real.

    Returns the state and the token int32 [B] chosen after each row's last real token so far: behind the last piece, the
    first token of the answer.  A row whose prompt has ended takes part with length 0 and keeps its token.
    """
    hidden, cache = hidden_states(params, config, tokens, state.cache, lengths)
    row = jnp.arange(tokens.shape[0])
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = state.seen.at[row[:, None], tokens].max(real)
    last = hidden[row, jnp.maximum(lengths - 1, 0)]
    chosen = sample(logits(params, config, last), sampling, jnp.zeros_like(state.step), seen, config.impl)
    token = jnp.where(lengths > 0, chosen, state.token)
    return State(cache, token, seen, jnp.where(lengths > 0, 1, state.step), state.done), token


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state")
def decode_chunk(params: Params, config: ModelConfig, state: State, sampling: Sampling, eos, steps: int):
    """Choose `steps` more tokens for every row: the state and tokens int32 [B, steps], -1 behind an end of sequence.

    eos int32 [E] lists the tokens that end a row; the first one chosen is still returned.
    """

    def step(state, _):
        done = state.done | jnp.any(state.token[:, None] == eos, axis=-1)
        # not by index: so it is done in passing, where the logits are read
        seen = state.seen | (jnp.arange(config.vocab_size) == state.token[:, None])
        alive = jnp.where(done, 0, 1)  # a finished row's cache no longer grows, and in a batch it is not read
        scores, cache = forward(params, config, state.token[:, None], state.cache, alive)
        chosen = sample(scores[:, 0], sampling, state.step, seen, config.impl)
        token = jnp.where(done, state.token, chosen)
        return State(cache, token, seen, state.step + alive, done), jnp.where(done, -1, chosen)

    state, tokens = jax.lax.scan(step, state, None, length=steps)
    return state, tokens.T


def bucket(count: int, smallest: int, largest: int) -> int:
    """The smallest power of two from `smallest` up that holds `count`, or `largest` if that comes first."""
    return min(max(smallest, 1 << (count - 1).bit_length()), largest)


def generate_tokens(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    max_len: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Continue every prompt: yields arrays int32 [B, n] of further tokens as they are read from the device.

    prompts are B lists of token ids, of any lengths; a row gets the tokens that it would get alone (up to rounding: in
    bfloat16 a near tie may fall another way in a batch of another size).  A row ends at an id of eos_ids, which is
    yielded, at max_new_tokens, or where prompt and answer fill max_len slots (by default the context that the model was
    trained for); behind its end it yields -1.  The next chunk is dispatched before the last one is read, so that the
    device does not wait for the host.
    Raises InputError before anything is computed for an empty or too long prompt, an id outside the vocabulary or a
    setting out of range.
    """
    limits = row_limits(config, prompts, max_new_tokens, max_len)
    settings = sampling.rows(len(prompts))
    return _generate(params, config, prompts, settings, limits, eos_ids, max_len or config.max_len, chunk)


def row_limits(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_len: int | None = None):
    """How many tokens each row of `generate_tokens` gets at most, int [B]; raises InputError for what cannot be run."""
    for name, value in (("max_new_tokens", max_new_tokens), ("max_len", max_len)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"{name} is {value!r}; it must be a whole number")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if max_len is not None and not 1 < max_len <= config.max_len:
        raise InputError(f"max_len is {max_len}; it must be from 2 to {config.max_len}, the model's context")
    if len(prompts) == 0:
        raise InputError("there is no prompt; give at least one")
    room = max_len or config.max_len
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) >= room:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for an answer in a context of {room}; "
                f"shorten it" + (f" or raise max_len (up to {config.max_len})" if room < config.max_len else "")
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(f"prompt {i} holds a token id outside the vocabulary, 0 to {config.vocab_size - 1}")
    return np.array([min(max_new_tokens, room - len(prompt)) for prompt in prompts])


def cache_slots(prompts: Sequence[Sequence[int]], limits: np.ndarray, room: int) -> int:
    """The slots a row of `generate_tokens` gets, for prompts and limits [B] of further tokens in a context of room."""
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits.tolist(), strict=True))
    return bucket(longest, LEAST, room)


def _generate(params, config, prompts, sampling, limits, eos_ids, room, chunk):
    slots = cache_slots(prompts, limits, room)
    state = _state_beside(params, config, len(prompts), slots)
    for _, tokens in _continue(params, config, state, prompts, slots, sampling, limits, eos_ids, chunk):
        yield tokens


def _state_beside(params, config, batch, slots):
    """`init_state` on the device that params are committed to, if they are to one."""
    state = init_state(config, batch, slots)
    if isinstance(params.norm, jax.Array) and params.norm.committed and len(params.norm.devices()) == 1:
        # so is what the programs return, and each would be compiled for either kind of State
        state = jax.device_put(state, params.norm.sharding)
    return state


def _continue(params, config, state, prompts, slots, sampling, limits, eos_ids, chunk):
    """Prefill prompts behind what a State's rows hold, and decode: yields the State, and tokens, again and again."""
    lengths = np.array([len(prompt) for prompt in prompts])
    for tokens, counts in _pieces(prompts, lengths, slots, largest_piece(config, len(prompts))):
        state, token = prefill(params, config, state, tokens, counts, sampling)

    eos = np.array(sorted(eos_ids), np.int32)
    ended = np.zeros(len(prompts), bool)
    read = 0

    def receive(tokens):
        nonlocal ended, read
        tokens = np.array(tokens)
        tokens[np.arange(read, read + tokens.shape[1]) >= limits[:, None]] = -1
        read += tokens.shape[1]
        ended |= (tokens[:, -1] == -1) | np.isin(tokens, eos).any(axis=1) | (read >= limits)
        return tokens

    yield state, receive(token[:, None])  # at once: the first token need not wait until decoding is compiled
    dispatched, waiting = 1, None
    while not ended.all():
        following = None
        if dispatched < limits.max():
            state, following = decode_chunk(params, config, state, sampling, eos, chunk)
            dispatched += chunk
        if waiting is not None:
            yield state, receive(waiting)
        waiting = following


class Session:
    """One row whose cache is kept: of the next prompt, only what follows a beginning that is there is prefilled.

    params and config are as in `forward`; slots is how many tokens prompt and answer may have together.  reused is how
    many tokens of the last prompt were in the cache.
    """

    def __init__(self, params: Params, config: ModelConfig, slots: int):
        self.slots, self.reused = slots, 0
        self._params, self._config = params, config
        self._state: State | None = None
        self._ids: list[int] = []  # the row; its last tokens may not be in the cache yet

    def generate_tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        chunk: int = CHUNK,
    ) -> Iterator[np.ndarray]:
        """Continue a prompt, as the function of this name does.  An answer that is under way ends with what it has."""
        limits = row_limits(self._config, [prompt], max_new_tokens, self.slots)
        settings, prompt = sampling.rows(1), list(prompt)
        state, self._state = self._state, None  # donated; lost if something is raised
        if state is None:
            state, self._ids = _state_beside(self._params, self._config, 1, self.slots), []
        held = self._ids[: np.asarray(state.cache.length)[0]]
        # the last token is run again even if all are there: its logits choose the first of the answer
        same = takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt[:-1], strict=False))
        self.reused = sum(1 for _ in same)
        self._ids = prompt[: self.reused]
        seen = np.zeros((1, self._config.vocab_size), bool)
        seen[0, self._ids] = True
        self._state = rewind(state, np.array([self.reused], np.int32), seen)
        return self._generate(self._state, prompt, settings, limits, eos_ids, chunk)

    def _generate(self, state, prompt, sampling, limits, eos_ids, chunk):
        ids, rest = list(prompt), [prompt[self.reused :]]
        answer = _continue(self._params, self._config, state, rest, self.slots, sampling, limits, eos_ids, chunk)
        while self._state is state:  # no other prompt came meanwhile
            self._state = None
            following = next(answer, None)
            if following is None:
                self._state = state
                return
            state, tokens = following
            ids += [token for token in tokens[0].tolist() if token >= 0]
            self._state, self._ids = state, ids
            yield tokens


def stores_scores(config: ModelConfig) -> bool:
    """Whether a prefill call stores attention scores [B, N, T, S]: XLA's attention does, kernels do not."""
    facts = {
        "cache": config.kv_cache or config.dtype,
        "head_dim": config.head_dim,
        "tokens": PIECE,
        "slots": config.max_len,
        "window": config.sliding_window,
    }
    return ops.choose("attention", config.impl, config.dtype, facts) is ops.IMPLEMENTATIONS["attention"]["xla"]


def largest_piece(config: ModelConfig, batch: int) -> int:
    """How many tokens of each row a call of `prefill` takes at most."""
    return PIECE if stores_scores(config) else max(PIECE, TOKENS >> (batch - 1).bit_length())


def _pieces(prompts, lengths, slots, most):
    """Cut right-padded prompts into calls of `prefill`: (tokens [B, T], real lengths [B]), T from a few buckets."""
    for start in range(0, int(lengths.max()), most):
        left = np.clip(lengths - start, 0, most)
        tokens = np.zeros((len(prompts), bucket(int(left.max()), SMALLEST, min(most, slots))), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : left[row]] = prompt[start : start + left[row]]
        yield tokens, left.astype(np.int32)


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next process does not compile them again.

    Leaves a cache that the user has set up (JAX_COMPILATION_CACHE_DIR or jax.config) alone.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxllm" / "xla"))
    # the default skips what compiles within a second, which is most of a small model's start
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
