"""The command and the library's text functions: what they print, and how they refuse."""

import importlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import resources
from jaxllm.chat import ChatTemplate
from jaxllm.errors import InputError
from jaxllm.loader import load
from jaxllm.sampling import Sampling

command = importlib.import_module("jaxllm.generate")
NAME = "llama2-gqa-bf16-2shard"


@pytest.fixture(scope="module")
def model(converted):
    return load(converted(NAME))


@pytest.fixture
def cli(converted, capsys, monkeypatch):
    """Run the command in this process, as `python -m jaxllm.generate` does: (exit status, stdout, stderr)."""

    model_folder = converted(NAME)

    def run(*args, stdin=b"", folder=model_folder):
        arguments = [str(a) for a in args] + ([] if folder is None else ["--model", str(folder)])
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        try:
            status = jaxllm.errors.run_command(command.main)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_the_text_is_the_prompts_continuation(model):
    (result,) = jaxllm.generate(model, ["The ship"], Sampling(temperature=0.0), max_new_tokens=24)
    ids = model.tokenizer.encode("The ship")
    assert result.prompt_tokens == ids and len(result.tokens) == 24 and result.finish_reason == "length"
    assert "The ship" + result.text == model.tokenizer.decode(ids + result.tokens)
    assert "".join(jaxllm.stream(model, "The ship", Sampling(temperature=0.0), 24)) == result.text
    logits, _ = jaxllm.forward(model.params, model.config, np.array([ids + result.tokens]))
    assert np.argmax(logits[0, len(ids) - 1 : -1], axis=-1).tolist() == result.tokens


def test_a_batch_gives_what_each_prompt_gives_alone(model):
    prompts = ["I", "A rather longer prompt than the first,", "No!"]
    together = jaxllm.generate(model, prompts, Sampling(seed=3), 30)
    for prompt, result in zip(prompts, together, strict=True):
        alone = jaxllm.generate(model, [prompt], Sampling(seed=3), 30)[0]
        assert (alone.text, alone.tokens, alone.finish_reason) == (result.text, result.tokens, result.finish_reason)


def test_stop_strings(model):
    free = jaxllm.generate(model, ["The ship"], Sampling(seed=1), 40)[0].text
    middle = free[10:13]
    for stop in ([middle], ["not there", middle], [middle + "never"], [middle, free[5:7]]):
        (result,) = jaxllm.generate(model, ["The ship"], Sampling(seed=1), 40, stop)
        ends = [free.index(s) for s in stop if s in free]
        assert result.text == (free[: min(ends)] if ends else free)
        assert result.finish_reason == ("stop" if ends else "length")
        # nothing of a stop string is printed before it is known whether it is one
        assert "".join(jaxllm.stream(model, "The ship", Sampling(seed=1), 40, stop)) == result.text


def test_text_that_may_become_a_stop_string_is_held_back():
    assert command.held_back("abcST", ["STOP", "xyz"]) == 2
    assert command.held_back("abcSTO", ["STOP", "TO!"]) == 3
    assert command.held_back("abc", ["STOP"]) == 0
    assert command.held_back("", ["STOP"]) == 0


def test_end_of_sequence(model, monkeypatch):
    free = jaxllm.generate(model, ["The ship"], Sampling(seed=1), 30)[0]
    eos = free.tokens[12]
    ending = replace(model, tokenizer=replace(model.tokenizer, eos_ids=(eos,)))
    (result,) = jaxllm.generate(ending, ["The ship"], Sampling(seed=1), 30)
    assert result.tokens == free.tokens[: free.tokens.index(eos)] and result.finish_reason == "stop"


def test_importing_the_module_does_not_hide_the_function():
    assert jaxllm.generate is command and callable(jaxllm.generate)
    assert jaxllm.Generation is command.Generation
    with pytest.raises(AttributeError, match="genrate"):
        jaxllm.genrate  # noqa: B018
    assert all(hasattr(jaxllm, name) for name in jaxllm.__all__)


def test_stdout_is_the_text_and_nothing_else(cli, model):
    status, out, err = cli("--prompt", "The ship", "--seed", 4, "--max-new-tokens", 16)
    assert (status, out) == (0, jaxllm.generate(model, ["The ship"], Sampling(seed=4), 16)[0].text + "\n")
    assert err == ""
    assert cli("--prompt", "The ship", "--seed", 4, "--max-new-tokens", 16, "--echo")[1] == "The ship" + out
    prompts = ["The ship", "A", "It was"]
    results = jaxllm.generate(model, prompts, Sampling(temperature=0.0), 9)
    _, out, _ = cli("--greedy", "--max-new-tokens", 9, "--prompt", *prompts)
    assert out == "".join(r.text + "\n" for r in results)
    repeated = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    assert cli("--greedy", "--max-new-tokens", 9, *repeated)[1] == out


def test_prompt_from_stdin_or_a_file(cli, tmp_path):
    text = "It was\nthe größte ship"
    expected = cli("--prompt", text)[1]
    (tmp_path / "p.txt").write_text(text + "\n", encoding="utf-8")
    assert cli("--prompt-file", tmp_path / "p.txt")[1] == expected
    assert cli("-", stdin=text.encode())[1] == expected


def test_json(cli, model):
    status, out, err = cli("--prompt", "The ship", "A", "--json", "--max-new-tokens", 5, "--seed", 9, "--top-k", 8)
    objects = [json.loads(line) for line in out.splitlines()]
    results = jaxllm.generate(model, ["The ship", "A"], Sampling(seed=9, top_k=8), 5)
    assert (status, err) == (0, "")
    for got, want in zip(objects, results, strict=True):
        assert set(got) == {"prompt", "prompt_tokens", "tokens", "text", "finish_reason", "seed", "stats"}
        assert {k: got[k] for k in ("prompt", "prompt_tokens", "tokens", "text", "finish_reason")} == {
            k: getattr(want, k) for k in ("prompt", "prompt_tokens", "tokens", "text", "finish_reason")
        }
        assert got["seed"] == 9 and got["stats"]["decode_tokens_per_s"] > 0 and got["stats"]["load_s"] > 0


def test_stats(cli, model):
    status, out, err = cli("--prompt", "The ship", "--stats", "--max-new-tokens", 9)
    assert status == 0
    names = ["imports", "device", "load", "compile prefill", "prefill", "first text"]
    names += ["compile", "prefill", "decode", "read per token", "read", "share of peak"]
    lines = err.splitlines()
    assert [line[:16].strip() for line in lines] == names
    seconds = [float(line[16:].split()[0]) for line in lines[:6]]
    assert seconds[5] >= sum(seconds[1:5]) - 0.1  # what is counted lies between the process's start and the first text
    stats = jaxllm.generate(model, ["The ship"], max_new_tokens=9)[0].stats
    # every weight but the embedding, and the cache at the middle of the answer: 3 layers of 2 * 4 heads of 16 float32
    weights = (512 * 128 + 3 * (128 * 128 * 3 + 3 * 128 * 448 + 2 * 128) + 128) * 2
    prompt = len(model.tokenizer.encode("The ship"))
    assert stats["bytes_per_token"] == weights + (prompt + 4) * 3 * 2 * 4 * 16 * 4


def test_quantize_and_dtype(cli, model):
    plain = cli("--prompt", "The ship", "--greedy")[1]
    assert cli("--prompt", "The ship", "--greedy", "--dtype", "float32")[1] == plain
    status, out, _ = cli("--prompt", "The ship", "--greedy", "--quantize", "int8")
    assert status == 0 and out != plain


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "none of --prompt"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "more than one of"),
        (["--prompt-file", "/nowhere/p"], "/nowhere/p cannot be read"),
        (["--prompt", "ship " * 9000], "leaves no room"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "--top-p"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-len", "99999"], "from 2 to 4096"),
        (["--prompt", "a b c d e f", "--max-len", "4"], "raise max_len"),
        (["--prompt", "a", "--seed", "-3"], "seed"),
        (["--prompt", "a", "--stop", ""], "stop string 0 is empty"),
        (["--prompt", "a", "--impl", "triton"], "triton"),
        (["--prompt", "a", "--impl", "atention=xla"], "atention"),
        (["--prompt", "a", "--impl", "=xla"], "no op called ''"),
        (["--prompt", "a", "--echo", "--json"], "--echo"),
        (["--prompt", "a", "--device-memory", "24GiB"], "--device-memory belongs to --plan"),
        (["--prompt", "a", "--preset", "llama2-7b"], "--preset belongs to --plan"),
        (["--prompt", "a", "--kv-cache", "int4"], "int4"),
        (["--prompt", "a", "--keep-float", "embed"], "'embed' is to be kept float, but nothing is quantized"),
        (["--prompt", "a", "--quantize", "int8", "--keep-float", "norm"], "norm"),
        (["--plan", "--preset", "llama2-7b"], "--preset and --model are both given"),
        (["--plan", "--device-memory", "24 apples"], "'24 apples' is not a size of memory"),
        (["--plan", "--device-memory", "0"], "'0' is not a size of memory"),
        (["--plan", "--device-memory", "-1GiB"], "argument --device-memory"),
        (["--plan", "--max-len", "0"], "max_len is 0"),
        (["--plan", "--max-len", "100000"], "max_len is 100000"),
        (["--prompt", "a", "--quantize", "int3"], "int3"),
        (["--prompt", "a", "--no-such-flag"], "--no-such-flag"),
        (["--prompt", "a", "--top-k", "many"], "many"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--prompt", "a", "--tokenizer", "/nowhere/t"], "/nowhere/t"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_status_2(cli, args, message):
    status, out, err = cli(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_bad_stdin_and_bad_folder(cli, tmp_path):
    message = "error: standard input is not UTF-8 at byte 0; convert it to UTF-8\n"
    assert cli("-", stdin=b"\xff\xfe") == (2, "", message)
    status, out, err = cli("--prompt", "a", folder=tmp_path)
    assert (status, out) == (2, "") and f"{tmp_path} is not a model folder" in err and err.count("\n") == 1
    status, out, err = cli("--prompt", "a", folder="x" * 5000)
    assert (status, out) == (2, "") and "no such folder" in err and err.count("\n") == 1


def test_plan(cli, model):
    status, out, err = cli(
        "--plan", "--preset", "llama2-13b", "--quantize", "int8", "--device-memory", "24GiB", folder=None
    )
    assert (status, err) == (0, "")
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    # 13.0 G parameters of a byte and their scales, 40 layers of 2 * 40 heads of 128 bfloat16 in 4096 slots
    assert 12.1 < float(rows["weights"][0]) < 12.2 and float(rows["cache"][0]) == 3.13
    assert rows["available"][0] == "24.00" and rows["available"][-1] == "fits"
    assert rows["longest context"][0] == "4096" and int(rows["largest batch"][0]) >= 3

    status, out, _ = cli("--plan", "--preset", "llama2-70b", "--device-memory", "80GB", "--json", folder=None)
    plan = json.loads(out)
    assert status == 0 and not plan["fits"] and plan["available"] == 80 * 10**9
    assert plan["total"] == plan["weights"] + plan["cache"] + plan["workspace"] > 2 * 68.9e9
    assert "it fits with" not in out and plan["longest_context"] == 0
    status, out, _ = cli("--plan", "--preset", "llama2-70b", "--device-memory", "80GB", folder=None)
    assert status == 0 and "it fits with --quantize int8" in out

    status, out, _ = cli("--plan", "--kv-cache", "int8", "--json")
    plan = json.loads(out)
    assert plan["weights"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert plan["config"]["kv_cache"] == "int8" and plan["fits"]
    status, _, err = cli("--plan", "--preset", "llama-8b", folder=None)
    assert status == 2 and "no preset is called 'llama-8b'" in err


def test_what_does_not_fit_is_refused(cli, model, monkeypatch):
    free = 200 << 20
    monkeypatch.setattr(jaxllm.resources, "free_memory", lambda device=None: free)
    many = ["word"] * 5000
    status, out, err = cli("--prompt", *many, "--max-new-tokens", 100)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "this needs" in err and "200.0 MiB that is free" in err and "prompts at a time" in err
    with pytest.raises(InputError, match="beside the weights .* prompts at a time"):
        jaxllm.generate(model, many, max_new_tokens=100)
    # what was advised works
    fewer = int(re.search(r"(\d+) prompts at a time", err)[1])
    assert 1 < fewer < 5000
    command.Generation(model, many[:fewer], max_new_tokens=100)


def test_int8_cache(cli, converted):
    plain = cli("--prompt", "The ship", "--greedy", "--json")[1]
    status, out, _ = cli("--prompt", "The ship", "--greedy", "--kv-cache", "int8", "--json")
    assert status == 0
    ours, theirs = json.loads(out), json.loads(plain)
    assert ours["tokens"][:3] == theirs["tokens"][:3]
    # 3 layers of 2 * 4 heads, of 16 float32 or 16 bytes and a scale
    filled = len(theirs["prompt_tokens"]) + len(theirs["tokens"]) // 2
    assert theirs["stats"]["bytes_per_token"] - ours["stats"]["bytes_per_token"] == filled * 3 * 8 * (64 - 20)
    model = load(converted(NAME), kv_cache="int8")
    result = jaxllm.generate(model, ["The ship"], Sampling(temperature=0.0))[0]
    assert result.tokens == ours["tokens"]


def test_gpu_memory_is_settled_unless_the_user_has(monkeypatch):
    for name in (*command.GPU_MEMORY, *command.GPU_MEMORY_TOO):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(resources, "cuda_driver", lambda: object())
        patch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
        assert not command._settle_gpu_memory() and "XLA_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setattr(resources, "cuda_driver", lambda: None)
    assert not command._settle_gpu_memory() and not any(name in os.environ for name in command.GPU_MEMORY)
    monkeypatch.setattr(resources, "cuda_driver", lambda: object())
    assert command._settle_gpu_memory()
    assert {name: os.environ[name] for name in command.GPU_MEMORY} == command.GPU_MEMORY
    for name in command.GPU_MEMORY:
        monkeypatch.delenv(name)


def test_library_arguments(model):
    for prompts, more, message in [
        ("The ship", {}, "prompts are given as str"),
        (["The ship"], dict(stop="x"), "stop strings are given as str"),
        ((text for text in ["The ship"]), {}, "prompts are given as generator"),
        (["The ship"], dict(stop=None), "stop strings are given as NoneType"),
        (["The ship"], dict(stop=[b"x"]), "stop string 0 is of type bytes"),
        (["The ship"], dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (["The ship"], dict(max_len="8"), "max_len is '8'"),
    ]:
        with pytest.raises(InputError, match=message):
            jaxllm.generate(model, prompts, **more)


def test_a_generation_can_be_left_and_gone_on_with(model):
    whole = jaxllm.generate(model, ["The ship", "A"], Sampling(seed=1), 30, ["never this"])
    generation = jaxllm.Generation(model, ["The ship", "A"], Sampling(seed=1), 30, ["never this"])
    for _ in generation:
        break
    assert [r.finish_reason for r in generation.results] == ["interrupted"] * 2
    for _ in generation:
        pass
    assert [r.text for r in generation.results] == [r.text for r in whole]


def test_token_ids_are_prompts_too(model):
    texts = ["The ship", "A rather longer one"]
    ids = [model.tokenizer.encode(text) for text in texts]
    want = jaxllm.generate(model, texts, Sampling(seed=3), 12)
    for prompts in (ids, [texts[0], np.array(ids[1])], [jax.numpy.array(ids[0]), tuple(ids[1])]):
        got = jaxllm.generate(model, prompts, Sampling(seed=3), 12)
        for a, b in zip(got, want, strict=True):
            assert (a.prompt_tokens, a.tokens, a.text) == (b.prompt_tokens, b.tokens, b.text)
            assert a.prompt == model.tokenizer.decode(b.prompt_tokens)
    assert "".join(jaxllm.stream(model, ids[0], Sampling(seed=3), 12)) == want[0].text
    for prompts, message in [
        ([[]], "prompt 0 is empty"),
        (["A", [1, 512]], "prompt 1 holds a token id outside the vocabulary, 0 to 511"),
        ([[-1]], "outside the vocabulary"),
        ([[2**70]], "prompt 0 is of type list, and no list of whole numbers"),
        ([1, 2], "prompt 0 is of type int, and no list of whole numbers"),
        ([[1.0, 2.0]], "prompt 0 is of type list"),
        ([[True]], "prompt 0 is of type list"),
        ([["A"]], "prompt 0 is of type list"),
        ([[[1], [1, 2]]], "prompt 0 is of type list"),
        ([None], "prompt 0 is of type NoneType"),
        ([b"A"], "prompt 0 is of type bytes"),
    ]:
        with pytest.raises(InputError, match=message):
            jaxllm.generate(model, prompts)


@dataclass(frozen=True)
class Turns(ChatTemplate):
    """A template without a process of its own: a line a message, as one function of the messages says."""

    line: Callable = lambda role, content: f"{role[0].upper()}: {content.strip()}\n"

    def render(self, messages):
        return "".join(self.line(m["role"], m["content"]) for m in messages) + "A:"


TURNS = Turns("turns", "", {})
SETTINGS = [Sampling(temperature=0.0), Sampling(seed=7, repetition_penalty=1.1)]


def fresh(model, result, sampling, count):
    """What `generate` makes of the ids that a conversation's turn was given."""
    return jaxllm.generate(model, [result.prompt_tokens], replace(sampling, seed=result.seed), count)[0]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["greedy", "sampled"])
def test_a_conversation_says_what_its_whole_text_continues_with(model, sampling):
    talk = jaxllm.Conversation(model, "Be brief.", TURNS, sampling, max_new_tokens=12, max_len=128)
    assert talk.result is None
    said, reused = [], []
    for text, pieces in (("The ship", 99), ("  And then? ", 2), ("Why", 99)):
        answer = talk.say(text)
        came = "".join(piece for _, piece in zip(range(pieces), answer, strict=False))
        answer.close()
        want = fresh(model, talk.result, sampling, 12)
        assert talk.result.text == came == want.text[: len(came)]
        assert talk.result.finish_reason == ("interrupted" if pieces == 2 else "length")
        assert pieces == 2 or talk.result.tokens == want.tokens
        assert talk.result.prompt == model.tokenizer.decode(talk.result.prompt_tokens)
        said += [{"role": "user", "content": text}, {"role": "assistant", "content": came}]
        assert talk.messages == [{"role": "system", "content": "Be brief."}, *said]
        reused.append(talk._session.reused)
        assert talk._generation._prefilled == len(want.prompt_tokens) - reused[-1]
    assert reused[0] == 0 and all(reused[i] >= len("S: Be brief.") // 3 for i in (1, 2))
    assert reused[2] > reused[1]
    assert talk.result.seed != sampling.seed  # another turn, other draws


def test_a_template_that_changes_the_past(model):
    forgetful = Turns(
        "forgetful", "", {}, lambda role, content: f"{role[0]}{content[:3] if role == 'assistant' else content}\n"
    )
    talk = jaxllm.Conversation(model, None, forgetful, SETTINGS[0], max_new_tokens=16, max_len=128)
    for text in ("The ship", "It was", "A"):
        "".join(talk.say(text))
        assert talk.result.tokens == fresh(model, talk.result, SETTINGS[0], 16).tokens
        assert talk._session.reused < len(talk.result.prompt_tokens) - 1


def test_a_conversation_begins_anew(model):
    talk = jaxllm.Conversation(model, None, TURNS, Sampling(seed=3), max_new_tokens=12, max_len=128)
    first, second = "".join(talk.say("The ship")), "".join(talk.say("The ship"))
    talk.reset()
    assert talk.messages == [] and talk.result is None
    assert ["".join(talk.say("The ship")), "".join(talk.say("The ship"))] == [first, second]
    del talk.messages[2:]  # the list may be changed
    assert "".join(talk.say("The ship")) == second
    other = jaxllm.Conversation(model, None, TURNS, Sampling(seed=4), max_new_tokens=12, max_len=128)
    assert (
        "".join(other.say("The ship"))
        == jaxllm.generate(model, [talk._template.encode(talk.messages[:1], model.tokenizer)], Sampling(seed=4), 12)[
            0
        ].text
    )
    left = talk.say("never asked for")
    assert "".join(talk.say("The ship")) and list(left) == []
    assert talk.messages[5] == {"role": "assistant", "content": ""}


def test_a_conversations_stop_strings(model):
    pieces = list(jaxllm.Conversation(model, None, TURNS, SETTINGS[0], max_len=128).say("The ship"))
    whole, begun = "".join(pieces), len("".join(pieces[:2]))
    talk = jaxllm.Conversation(model, None, TURNS, SETTINGS[0], max_len=128, stop=[whole[20:24], whole[8:10] + "never"])
    assert "".join(talk.say("The ship")) == whole[: whole.index(whole[20:24])] == talk.messages[1]["content"]
    assert talk.result.finish_reason == "stop"
    talk = jaxllm.Conversation(model, None, TURNS, SETTINGS[0], max_len=128, stop=[whole[begun - 2 : begun] + "never"])
    answer = talk.say("The ship")
    assert next(answer) + next(answer) == whole[: begun - 2]
    answer.close()  # an answer that ends here has what was held back
    assert talk.messages[1]["content"] == talk.result.text == whole[:begun]


def test_what_a_conversation_refuses(model, monkeypatch):
    talk = jaxllm.Conversation(model, None, TURNS, max_new_tokens=12, max_len=128)
    "".join(talk.say("The ship"))
    before = list(talk.messages)
    with pytest.raises(InputError, match=r"has \d{3,} tokens, .* context of 128; .* /reset .*, or raise max_len"):
        talk.say("word " * 400)
    for nothing in ("", " \n", None, 3):
        with pytest.raises(InputError, match="the message is"):
            talk.say(nothing)
    assert talk.messages == before and "".join(talk.say("A"))
    for more, message in [
        (dict(max_len=1), "max_len is 1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(stop="x"), "stop strings are given as str"),
        (dict(template=None), "has no chat template"),
        (dict(template="/nowhere/t"), "/nowhere/t: cannot be read"),
        (dict(sampling=Sampling(top_p=2.0)), "top_p"),
    ]:
        with pytest.raises(InputError, match=message):
            jaxllm.Conversation(model, **dict(template=TURNS) | more)
    with pytest.raises(InputError, match="give a ChatTemplate"):
        jaxllm.Conversation(replace(model, path=None), template="llama2")
    monkeypatch.setattr(jaxllm.resources, "free_memory", lambda device=None: 120 << 20)
    with pytest.raises(InputError, match="beside the weights .*max_len"):
        jaxllm.Conversation(model, template=TURNS)


CHAT = "--chat", "--chat-template", "llama2", "--max-new-tokens", 6, "--seed", 5, "--max-len", 128


def test_a_conversation_from_a_pipe(cli, model):
    talk = jaxllm.Conversation(model, "Be brief.", "llama2", Sampling(seed=5), max_new_tokens=6, max_len=128)
    want = ["".join(talk.say(text)) for text in ("The ship", "/etc/hosts is", "/usr")]
    lines = b"The ship\n\n   \r\n/etc/hosts is\n /usr\r\n/reset\nThe ship"
    status, out, err = cli(*CHAT, "--system", "Be brief.", stdin=lines)
    assert (status, err) == (0, "") and out == "".join(text + "\n" for text in [*want, want[0]])
    assert cli(*CHAT, "--system", "Be brief.", "--prompt", "The ship")[1] == want[0] + "\n"

    status, out, err = cli(*CHAT, "--system", "Be brief.", "--json", "--stats", stdin=lines[:26])
    turns = [json.loads(line) for line in out.splitlines()]
    assert [(turn["prompt"], turn["text"]) for turn in turns] == [
        ("The ship", want[0]),
        ("/etc/hosts", turns[1]["text"]),
    ]
    assert [turn["seed"] == 5 for turn in turns] == [True, False]
    assert turns[0].keys() == json.loads(cli(*CHAT, "--json", "--prompt", "A")[1]).keys()
    assert status == 0 and err.count("decode") == 2 and err.count("load") == 1


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        ([], b"A\n/rest\nA\n", "no command is called /rest; /reset begins anew; a space before it"),
        ([], b"A\n" + b"word " * 9000, "the conversation has"),
        ([], b"A\n\xff\n", "not UTF-8 at byte 0"),
        (["--echo"], b"A\n", "--echo can have no effect in a conversation"),
        (["--max-len", 9999], b"A\n", "max_len is 9999"),
        (["--max-new-tokens", 0], b"A\n", "max_new_tokens is 0"),
    ],
    ids=["command", "long", "utf-8", "echo", "max-len", "max-new-tokens"],
)
def test_a_conversation_from_a_pipe_ends_with_an_error(cli, args, stdin, message):
    status, out, err = cli(*CHAT, *args, stdin=stdin)
    assert status == 2 and message in err and err.count("\n") == 1
    assert out.count("\n") == (0 if args else 1) or not args


def test_one_turns_prompt_is_the_users_message(cli):
    got = json.loads(cli(*CHAT, "--json", "--prompt", "A")[1])
    assert got["prompt"] == "A" and cli(*CHAT, "--echo", "--prompt", "A")[1] == "A" + got["text"] + "\n"


def until(terminal, pattern, seconds=120):
    """What a pseudo-terminal shows, up to a pattern at its end."""
    shown, end = b"", time.monotonic() + seconds
    while not re.search(pattern + rb"\Z", shown):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], shown
        shown += os.read(terminal, 4096)
    return shown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals here")
def test_a_conversation_on_a_terminal(converted, tmp_path):
    args = [sys.executable, "-m", "jaxllm.generate", "--model", str(converted(NAME)), "--chat", "--greedy"]
    args += ["--chat-template", "llama2", "--max-new-tokens", "3500"]
    ours, theirs = os.openpty()
    # a session of its own, whose terminal this is: Ctrl-C comes from there
    take_it = [
        sys.executable,
        "-c",
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])",
    ]
    process = subprocess.Popen(
        [*take_it, *args], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    try:
        assert b"Ctrl-C stops an answer, Ctrl-D leaves\r\n" in until(ours, rb"\r\n> ")
        os.write(ours, b"The shXp\x08\x08ip\x1b[D\x04\n")  # edited: backspaces, and the last letter taken away
        first = until(ours, rb"\n.{30,}")
        os.write(ours, b"\x03")
        first += until(ours, rb"\r\n> ")
        os.write(ours, b"/rest\n")
        assert b"error: no command is called /rest" in until(ours, rb"\r\n> ")
        time.sleep(1)  # Python's input() loses a signal that comes in the moment before it waits
        os.write(ours, b"half a line\x03")
        assert b"Ctrl-D leaves" in until(ours, rb"\r\n> ")
        os.write(ours, b"/reset\n")
        until(ours, rb"> ")
        os.write(ours, b"\x1b[A\x1b[A\x1b[A\n")  # the line before, and those before that
        again = until(ours, rb"\n.{30,}")
        os.write(ours, b"\x03")
        until(ours, rb"\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    answers = [text.split(b"\n", 1)[1][:30] for text in (first, again)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_ctrl_c_keeps_the_text_so_far(converted):
    args = [sys.executable, "-m", "jaxllm.generate", "--model", str(converted(NAME))]
    args += ["--max-new-tokens", "4000", "--prompt", "A", "The ship", "--stats", "--echo", "--greedy"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(process.stdout.fileno(), 1)  # it is under way
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).startswith(b"A")
    assert b"\nThe ship" in rest and rest.endswith(b"\n")  # the row behind it was not shown yet
    assert b"Traceback" not in err and err.endswith(b"interrupted\n") and b"decode" in err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_in_one_line(converted):
    line = f"{sys.executable} -m jaxllm.generate --model {converted(NAME)} --prompt A --max-new-tokens 4 > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_no_failure(converted):
    line = f"{sys.executable} -m jaxllm.generate --model {converted(NAME)} --prompt A --max-new-tokens 400 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
