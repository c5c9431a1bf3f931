"""Generation against plain loops over the forward pass; what compiled programs promise of memory and recompiling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import pipeline
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.model import abstract_params, forward, init_cache, quantize_params
from jaxllm.pipeline import Session, State, bucket, decode_chunk, generate_tokens, init_state, prefill, rewind
from jaxllm.sampling import Sampling

CONFIG = ModelConfig(
    vocab_size=61, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40, max_len=256, dtype="float32"
)
GREEDY = Sampling(temperature=0.0)
WILD = Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 1.5 / leaf.shape[-1] ** 0.5, leaf.dtype),
        abstract_params(config),
    )


PARAMS = random_params(CONFIG)


def prompts_of(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


def run(prompts, sampling=GREEDY, new=20, config=CONFIG, **more):
    """Each row's tokens up to its end."""
    tokens = np.concatenate(list(generate_tokens(PARAMS, config, prompts, sampling, new, **more)), axis=1)
    ends = [row.tolist().index(-1) if -1 in row else len(row) for row in tokens]
    assert all((row[end:] == -1).all() for row, end in zip(tokens, ends, strict=True))
    return [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]


@jax.jit
def padded_logits(params, tokens):
    return forward(params, CONFIG, tokens)[0]


def greedy_by_forward(prompt, new, params=PARAMS):
    """The most likely continuation, by a whole forward pass without a cache for every token."""
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + new):
        tokens[0, n] = np.argmax(padded_logits(params, tokens)[0, n - 1])
    return tokens[0, len(prompt) : len(prompt) + new].tolist()


def test_greedy_equals_whole_forward_passes():
    prompts = prompts_of(3, 17, 40)
    assert run(prompts, new=30) == [greedy_by_forward(p, 30) for p in prompts]


@pytest.mark.parametrize("lengths", [(1,), (16,), (17,), (60, 5, 33), (128, 1)])
def test_prompts_in_pieces(monkeypatch, lengths):
    monkeypatch.setattr(pipeline, "PIECE", 32)  # several prefill calls a prompt; rows end in different ones
    prompts = prompts_of(*lengths)
    assert run(prompts, new=6) == [greedy_by_forward(p, 6) for p in prompts]


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "sampled"])
def test_a_row_gets_the_tokens_it_would_get_alone(sampling):
    prompts = prompts_of(2, 31, 9, 64)
    together = run(prompts, sampling)
    assert together == [run([p], sampling)[0] for p in prompts]
    assert len({tuple(row) for row in together}) == 4


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunk_size_changes_nothing(chunk):
    prompts = prompts_of(4, 11)
    assert run(prompts, WILD, chunk=chunk) == run(prompts, WILD)


def test_seeds():
    prompts = prompts_of(5) * 3
    rows = run(prompts, replace(WILD, seed=np.array([5, 6, 5])))
    assert rows[0] == rows[2] == run(prompts[:1], WILD)[0]
    assert rows[0] != rows[1]


def test_a_row_ends_at_an_end_of_sequence_token():
    prompts = prompts_of(3, 17, 40)
    free = run(prompts, new=30)
    eos = free[0][11], free[1][2]
    expected = []
    for row in free:
        ends = [row.index(token) for token in eos if token in row]
        expected.append(row[: min(ends) + 1] if ends else row)
    assert {len(row) for row in expected} != {30}
    assert run(prompts, new=30, eos_ids=eos) == expected
    first = free[2][0]  # chosen by prefill, before the first chunk
    assert run(prompts[2:], eos_ids=[first]) == [[first]]


def test_limits():
    short, long = prompts_of(5, 250)
    rows = run([short, long], new=300)
    assert [len(row) for row in rows] == [251, 6]  # the context of 256 is full
    assert rows[1] == greedy_by_forward(long, 6)
    assert rows[0][:20] == greedy_by_forward(short, 20)
    assert [len(row) for row in run([short], new=300, max_len=8)] == [3]
    assert [len(row) for row in run([short], new=1)] == [1]


@pytest.mark.parametrize(
    "prompts, more, message",
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 256], {}, "256 tokens.*context of 256"),
        ([[1] * 9], dict(max_len=9), "raise max_len"),
        ([[1]], dict(max_len=257), "256"),
        ([[1, 61]], {}, "0 to 60"),
        ([[-1]], {}, "0 to 60"),
        ([[1]], dict(new=0), "max_new_tokens"),
        ([[1]], dict(sampling=Sampling(top_p=0.0)), "top_p"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(prompts, more, message):
    arguments = dict(sampling=GREEDY, new=4) | more
    with pytest.raises(InputError, match=message) as caught:
        generate_tokens(
            PARAMS, CONFIG, prompts, arguments["sampling"], arguments["new"], max_len=arguments.get("max_len")
        )
    assert "\n" not in str(caught.value)


def test_the_next_chunk_is_dispatched_before_the_last_one_is_read(monkeypatch):
    events = []

    class Watched:
        """Tokens on the device, which tell when they are read."""

        def __init__(self, tokens, number):
            self.tokens, self.number = tokens, number

        def __array__(self, dtype=None, copy=None):
            events.append(f"read {self.number}")
            return np.array(self.tokens)

    def dispatch(*args):
        number = sum(e.startswith("dispatch") for e in events)
        events.append(f"dispatch {number}")
        state, tokens = decode_chunk(*args)
        return state, Watched(tokens, number)

    monkeypatch.setattr(pipeline, "decode_chunk", dispatch)
    run(prompts_of(3), new=1 + 3 * pipeline.CHUNK)
    assert events == ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "read 2"]


# sizes at which cache, weights and their float32 copies cannot be mistaken for each other
BIG = replace(CONFIG, vocab_size=2000, dim=128, n_layers=2, ffn_dim=512, head_dim=16, max_len=4096)
SLOTS = 1024


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "kind, kv_cache, batch",
    [
        (None, None, 1),
        (None, None, 3),
        ("int8", None, 1),
        ("int8", None, 3),
        ("int8-g128", "int8", 3),
        ("w8a8", "int8", 1),
    ],
)
def test_decode_updates_the_cache_in_place(kind, kv_cache, batch):
    config = replace(BIG, kv_cache=kv_cache)
    params = abstract_params(config, kind)
    state = jax.eval_shape(lambda: init_state(config, batch, SLOTS))
    eos = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = decode_chunk.lower(params, config, state, Sampling().rows(batch), eos, 8).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size_of(state)
    layer = SLOTS * BIG.n_kv_heads * BIG.head_dim * 4 * batch  # bytes of one layer's keys as float32
    # a transposed view of one layer's keys and one of its values (or those in float32, of an int8 cache);
    # never another cache, nor the weights in another type
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < 2.5 * layer < min(BIG.n_layers * 2 * layer, 4 * weights)


@pytest.mark.parametrize("kind, kv_cache", [(None, None), ("w8a8", "int8")])
def test_prefill_updates_the_cache_in_place(kind, kv_cache):
    config = replace(BIG, kv_cache=kv_cache)
    state = jax.eval_shape(lambda: init_state(config, 2, SLOTS))
    tokens, lengths = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = prefill.lower(
        abstract_params(config, kind), config, state, tokens, lengths, Sampling().rows(2)
    ).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == size_of(state)


def test_nothing_is_compiled_twice_inside_a_bucket():
    run(prompts_of(20), WILD, new=20)
    compiled = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    for i in range(10):
        sampling = Sampling(temperature=0.3 * (i % 3), top_k=i, top_p=1 - i / 20, min_p=i / 50, seed=i)
        run(prompts_of(17 + i, seed=i), sampling, new=12 + 3 * i)
    assert compiled == []
    run(prompts_of(1, 2, 3, 4, 5, 6, 7), new=2)  # another batch size: the listener does hear a compilation
    assert any("prefill" in name for name in compiled)


@pytest.mark.parametrize("scheme, kv_cache", [("int8", None), ("int8-g128", "int8"), ("w8a8", "int8")])
def test_int8_generates_what_whole_int8_forwards_do(scheme, kv_cache):
    config = replace(CONFIG, kv_cache=kv_cache, n_layers=1)
    params = quantize_params(jax.tree.map(np.asarray, replace(PARAMS, layers=PARAMS.layers[:1])), scheme)
    prompts = prompts_of(10, 21, 1, 16)
    answers = np.concatenate(list(generate_tokens(params, config, prompts, GREEDY, 40)), axis=1)[:, :40]
    rows = np.zeros((4, 61), np.int32)
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        row[: len(prompt) + 40] = [*prompt, *answer]
    cache = init_cache(config, 4, 61) if kv_cache else None
    scores = np.asarray(jax.jit(forward, static_argnums=1)(params, config, rows, cache)[0])
    for row, prompt, answer in zip(scores, prompts, answers, strict=True):
        row = row[len(prompt) - 1 :][:40]
        # each token is the best one, up to a value that falls on a boundary between two levels here and not there
        assert (row[np.arange(40), answer] >= row.max(axis=-1) - 5e-3).all()
    assert len({*answers.ravel()}) > 15


@pytest.fixture
def prefilled(monkeypatch):
    """A list into which goes how many tokens each call of prefill is given, padding not counted."""
    counts = []

    def count(params, config, state, tokens, lengths, sampling):
        counts.append(int(lengths.sum()))
        return prefill(params, config, state, tokens, lengths, sampling)

    monkeypatch.setattr(pipeline, "prefill", count)
    return counts


def take(answer, pieces=None):
    """The tokens of an answer, up to its end or of its first few pieces."""
    tokens = [token for _, piece in zip(range(pieces or 999), answer, strict=False) for token in piece[0].tolist()]
    return tokens[: tokens.index(-1)] if -1 in tokens else tokens


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "sampled"])
def test_a_session_answers_as_if_each_prompt_came_alone(prefilled, sampling):
    first, more, other = prompts_of(20, 5, 40)
    session = Session(PARAMS, CONFIG, 128)

    def check(prompt, new_tokens, pieces=None):
        fresh = run([prompt], sampling, 20)[0]
        prefilled.clear()
        answer = take(session.generate_tokens(prompt, sampling, 20), pieces)
        assert prefilled == [new_tokens] and session.reused == len(prompt) - new_tokens
        assert answer == fresh[: len(answer)] and (pieces or len(answer) == 20)
        return answer

    answer = check(first, 20)
    second = [*first, *answer, *more]
    begun = check(second, 5, pieces=2)
    assert len(begun) == 9  # given up
    check([*second, *begun, *other[:3]], 3)  # more than that was decoded ahead
    check(second, 1)  # all is there, and the last token is run again
    check([*second, *begun, 60], 1, pieces=1)
    check([*first, *answer[:3], (answer[3] + 1) % 61, *other], 41)  # the past differs from there on
    check(second[:12], 1)
    check(other, 40)


def test_a_session_at_the_end_of_a_sequence_and_of_the_cache():
    (prompt,) = prompts_of(20)
    free = run([prompt], new=30)[0]
    eos = next(token for at, token in enumerate(free) if at > 3 and token not in free[:at])
    session = Session(PARAMS, CONFIG, 128)
    answer = take(session.generate_tokens(prompt, GREEDY, 30, [eos]))
    assert answer[-1] == eos and answer == free[: len(answer)]
    longer = [*prompt, *answer, *prompts_of(104 - len(answer), seed=2)[0]]  # 124 of 128
    assert take(session.generate_tokens(longer, GREEDY, 30)) == run([longer], new=4)[0]
    assert session.reused == len(prompt) + len(answer) - 1  # what ends a sequence is not taken in
    full = [*longer, 1, 2, 3]
    assert take(session.generate_tokens(full, GREEDY, 30)) == run([full], new=1)[0]
    with pytest.raises(InputError, match="128 tokens.*context of 128"):
        session.generate_tokens([*full, 4], GREEDY, 30)
    assert take(session.generate_tokens(prompt, GREEDY, 30)) == free


def test_a_new_prompt_ends_the_answer_before_and_an_error_loses_the_cache(monkeypatch, prefilled):
    prompt, other = prompts_of(20, 30)
    session = Session(PARAMS, CONFIG, 128)
    left = session.generate_tokens(prompt, GREEDY, 30)
    assert take(left, 2) == run([prompt], new=9)[0]
    following = session.generate_tokens(other, GREEDY, 30)
    assert take(left) == []
    assert take(following) == run([other], new=30)[0]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode_chunk", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(session.generate_tokens(other, GREEDY, 30))
    prefilled.clear()
    assert take(session.generate_tokens(other, GREEDY, 30)) == run([other], new=30)[0]
    assert prefilled[0] == 30


def test_a_session_keeps_one_cache_and_compiles_nothing_for_a_later_turn():
    params = jax.device_put(PARAMS, jax.devices()[0])  # committed, as those of a loaded model are
    session = Session(params, replace(CONFIG, max_len=192), 192)
    compiled = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    prompt, places = prompts_of(10)[0], set()
    for turn in range(5):
        prompt = [*prompt, *take(session.generate_tokens(prompt, WILD, 12)), *prompts_of(7 + turn, seed=turn)[0]]
        places.add(tuple(array.unsafe_buffer_pointer() for array in session._state.cache.k + session._state.cache.v))
    assert len(places) == 1
    assert [compiled.count(f"jit({name})") for name in ("init_state", "rewind", "prefill", "decode_chunk")] == [1] * 4


def test_rewinding_copies_no_cache():
    state = jax.eval_shape(lambda: init_state(BIG, 1, SLOTS))
    seen = jax.ShapeDtypeStruct((1, BIG.vocab_size), bool)
    memory = rewind.lower(state, jax.ShapeDtypeStruct((1,), jnp.int32), seen).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size_of((state.cache.k, state.cache.v))
    assert memory.temp_size_in_bytes < size_of(state.cache.k[0])


def test_research_code_can_drive_the_programs_itself():
    """prefill and decode_chunk are plain functions of a State that anyone may build and look into."""
    (prompt,) = prompts_of(7)
    sampling = GREEDY.rows(1)
    state, token = prefill(PARAMS, CONFIG, init_state(CONFIG, 1, 32), np.array([prompt]), np.array([7]), sampling)
    state, tokens = decode_chunk(PARAMS, CONFIG, state, sampling, np.zeros(0, np.int32), 4)
    assert [int(token[0]), *tokens[0].tolist()] == greedy_by_forward(prompt, 5)
    assert isinstance(state, State) and state.cache.length.tolist() == [11] and state.step.tolist() == [5]
    assert state.seen[0].sum() == len({*prompt, int(token[0]), *tokens[0, :3].tolist()})


def test_buckets():
    assert [bucket(n, 16, 512) for n in (1, 16, 17, 64, 65, 512, 600)] == [16, 16, 32, 64, 128, 512, 512]
    assert bucket(100, 128, 64) == 64


def test_the_compilation_cache_is_on_and_respects_the_user(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        pipeline.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxllm" / "xla")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pipeline.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        pipeline.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        pipeline.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
