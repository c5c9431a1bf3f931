"""Plans against formulas and allocated arrays; advice against brute force; free memory in made-up file systems."""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import ops, resources
from jaxllm.config import ModelConfig, preset
from jaxllm.errors import InputError
from jaxllm.model import KVCache, Params, abstract_params, init_cache, init_params, quantize_params
from jaxllm.pipeline import decode_chunk, init_state, prefill, stores_scores
from jaxllm.quantize import SCHEMES
from jaxllm.resources import (
    GUARD,
    Plan,
    Usage,
    format_size,
    free_memory,
    largest_batch,
    longest_context,
    parse_size,
    plan,
    require_memory,
    table,
    usage,
)
from jaxllm.sampling import Sampling

GiB = 1 << 30
SMALL = ModelConfig(vocab_size=300, dim=136, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=34, ffn_dim=200, max_len=64)


def held(tree):
    """Bytes of arrays that really exist."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def zeros(abstract, on_device=False):
    """Arrays of an abstract tree's shapes and types: numpy's, or jax's."""
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return jax.tree.map(jax.device_put, arrays) if on_device else arrays


# sizes as text


@pytest.mark.parametrize(
    "text, size",
    {
        "25769803776": 24 * GiB,
        "1": 1,
        "100B": 100,
        "24GiB": 24 * GiB,
        "24G": 24 * GiB,
        "24g": 24 * GiB,
        "24 GB": 24 * 10**9,
        " 24gib\n": 24 * GiB,
        "512MiB": 512 << 20,
        "512 M": 512 << 20,
        "512MB": 512 * 10**6,
        "7k": 7 << 10,
        "7KiB": 7 << 10,
        "7kB": 7000,
        "1.5TiB": 3 << 39,
        "1.5T": 3 << 39,
        "2TB": 2 * 10**12,
        ".5G": GiB // 2,
        "5.": 5,
        "1.9": 1,
        "0.0000000001 T": 109,
        "0.1GB": 10**8,
    }.items(),
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    # the last ones: a Kelvin sign, Arabic digits, too many digits
    ["", " ", "0", "0GiB", "0.9", "-1", "-1G", "+1", "nan", "inf", "infG", "1e9", "G", "GiB", "1iB", "1PB", "1 G B",
     "1GG", "1.2.3", ".", ".G", "1,5G", "0x10", "1_000", "24GiB free", "two", None, 5, 5.0, b"5", True,
     "5\N{KELVIN SIGN}", "\N{ARABIC-INDIC DIGIT FIVE}", "9" * 5000],
)  # fmt: skip
def test_not_a_size(text):
    with pytest.raises(InputError, match="is not a size of memory; it must be") as error:
        parse_size(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (12 * GiB + GiB * 3 // 10, "12.3 GiB"),
        (GiB - 1, "1.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_format_size(size, text):
    assert format_size(size) == text


@given(st.integers(1, 1 << 55))
def test_a_size_survives_its_text(size):
    text = format_size(size)
    assert text[-1] == "B" and text.count(".") <= 1
    assert abs(parse_size(text) - size) <= size * 0.05 + 1
    assert float(text.split()[0]) < 1024 or "TiB" in text


# what a plan counts

PARAMETERS = {"llama2-7b": 6738415616, "llama2-13b": 13015864320, "llama2-70b": 68976648192}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_models(name):
    config, count = preset(name), PARAMETERS[name]
    assert plan(config).weights == 2 * count
    assert plan(replace(config, dtype="float32")).weights == 4 * count
    dim, layers, ffn, vocab = config.dim, config.n_layers, config.ffn_dim, 32000
    kv_dim = {"llama2-70b": 1024}.get(name, dim)
    norms = (2 * layers + 1) * dim
    channels = layers * (dim + 2 * kv_dim + dim + 2 * ffn + dim) + 2 * vocab
    assert plan(config, quantize="int8").weights == 2 * norms + (count - norms) + 4 * channels
    assert plan(config, quantize="w8a8").weights == 2 * norms + (count - norms) + 4 * channels
    assert plan(config, quantize="int8-g128").weights == 2 * norms + (count - norms) + 4 * (count - norms) // 128
    kept = plan(config, quantize="int8", keep_float=["output"])
    assert kept.weights == plan(config, quantize="int8").weights + vocab * dim - 4 * vocab
    # two tensors of kv_dim numbers a layer and token, and 4 bytes of length a row
    assert plan(config, batch=3).cache == 3 * (4096 * layers * 2 * kv_dim * 2 + 4)
    scales = 4096 * layers * 2 * (kv_dim // 128) * 4
    assert plan(config, batch=3, kv_cache="int8").cache == 3 * (4096 * layers * 2 * kv_dim + scales + 4)


def test_what_fits_where():
    assert plan(preset("llama2-13b"), max_len=4096, quantize="int8").total < 24 * GiB
    assert plan(preset("llama2-13b"), max_len=4096).total > 24 * GiB
    assert plan(preset("llama2-70b"), max_len=4096, quantize="int8").total < 80 * GiB
    assert plan(preset("llama2-70b"), max_len=4096).total > 80 * GiB


@pytest.mark.parametrize("tied", [False, True])
def test_float_weights_as_allocated(tied):
    config = replace(SMALL, tied=tied, n_layers=2)
    assert plan(config).weights == held(jax.jit(init_params, static_argnames="config")(config, jax.random.key(0)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied, keep_float", [(False, ()), (False, ("output", "wo")), (True, ()), (True, ("w_down",))])
@pytest.mark.parametrize("layers", [1, 4])
def test_int8_weights_as_allocated(scheme, tied, keep_float, layers):
    config = replace(SMALL, tied=tied, n_layers=layers)
    params = quantize_params(zeros(abstract_params(config)), scheme, keep_float)
    assert plan(config, quantize=scheme, keep_float=keep_float).weights == held(params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("layers, batch, slots", [(1, 1, 1), (3, 1, 64), (5, 7, 33)])
def test_cache_as_allocated(dtype, kv_cache, layers, batch, slots):
    config = replace(SMALL, n_layers=layers, dtype=dtype)
    cache = init_cache(replace(config, kv_cache=kv_cache), batch, slots)
    assert plan(config, batch, slots, kv_cache=kv_cache).cache == held(cache)
    assert plan(replace(config, kv_cache=kv_cache), batch, slots).cache == held(cache)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_weights_are_narrowed_and_not_widened(stored, dtype, scheme):
    config = replace(SMALL, dtype=stored)
    arrays = zeros(abstract_params(config, scheme))
    if dtype == "bfloat16":
        as_float = lambda a: a if a.dtype == np.int8 else a.astype(jnp.bfloat16)  # noqa: E731
        arrays = jax.tree_util.tree_map_with_path(
            lambda path, a: a if getattr(path[-1], "name", "") == "scale" else as_float(a), arrays
        )
    made = plan(config, quantize=scheme, dtype=dtype)
    assert made.weights == held(arrays)
    assert made.cache == held(init_cache(replace(config, dtype=dtype), 1, 64))
    assert made.config == replace(config, dtype=dtype)
    assert made.weight_dtype == (dtype if stored == "float32" or dtype == "bfloat16" else stored)


@pytest.mark.parametrize(
    "name, scheme, kv_cache, peak",
    [
        ("llama2-7b", "int8", None, 9_567_177_216),
        ("llama2-7b", None, None, 16_299_631_104),
        ("llama2-7b", "int8", "int8", 8_543_767_040),
        ("llama2-70b", "int8", None, 72_083_974_656),
        ("tinyllama-1.1b", None, None, 2_618_511_872),
    ],
)
def test_plans_against_peaks_measured_on_an_h100(name, scheme, kv_cache, peak):
    """The allocator's peak with all memory taken at the start, compilation included, at a full context."""
    assert plan(preset(name), quantize=scheme, kv_cache=kv_cache).total == pytest.approx(peak, rel=0.005)


def test_workspace_holds_what_is_known_to_be_there():
    config = preset("llama2-7b")
    for batch, slots in ((1, 4096), (4, 1000), (2, 100)):
        tokens = min(512, slots)
        scores = batch * 32 * tokens * slots
        workspace = plan(config, batch, slots).workspace
        assert workspace > scores * 4 + batch * 32000 * (4 + 1)
        matrix = 2 * 11008 * 4096 if batch == 1 else 32000 * 4096  # the largest that is multiplied by
        most = 2 * (scores * 6 + batch * tokens * 2 * 11008 * 6 + batch * 32000 * 4 * 4 + matrix * 2)
        assert workspace < GUARD + most
    wide = replace(config, dtype="float32")
    assert plan(config).workspace < plan(wide).workspace < 2 * plan(config).workspace


@pytest.mark.parametrize("impl, stores", [("auto", False), ("attention=mosaic", False), ("attention=xla", True)])
def test_who_stores_scores_on_a_gpu(impl, stores, monkeypatch):
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: hopper)
    monkeypatch.setattr(ops, "find_spec", lambda package: package)
    assert stores_scores(replace(preset("llama2-7b"), impl=impl)) == stores


def test_workspace_without_stored_scores(monkeypatch):
    config = preset("llama2-7b")
    stored = [plan(config, 1, slots, "int8").workspace for slots in (1024, 4096)]
    monkeypatch.setattr(resources, "stores_scores", lambda config: False)
    monkeypatch.setattr(resources, "largest_piece", lambda config, batch: 2048)
    kernels = [plan(config, 1, slots, "int8").workspace for slots in (1024, 4096)]
    # gate and up of 2048 tokens, and their weights converted to bfloat16
    assert stored[0] < kernels[1] and kernels[1] > GUARD + 2 * 2 * 11008 * (2048 + 4096)
    config = replace(config, max_len=1 << 20)
    assert plan(config, 1, 1 << 20).workspace == plan(config, 1, 4096).workspace


def test_workspace_against_the_compiled_programs():
    # in float32, because in bfloat16 a CPU converts what other devices do not
    config = replace(SMALL, dtype="float32", n_layers=1, head_dim=32, max_len=512)
    params, state = abstract_params(config), jax.eval_shape(lambda: init_state(config, 2, 512))
    tokens, lengths, sampling = np.zeros((2, 512), np.int32), np.full(2, 512, np.int32), Sampling().rows(2)
    analysis = prefill.lower(params, config, state, tokens, lengths, sampling).compile().memory_analysis()
    workspace = plan(config, 2).workspace
    assert (workspace - GUARD) / 4 < analysis.temp_size_in_bytes < workspace
    aliased = plan(config, 2).cache + 2 * (300 + 4 + 4 + 1)
    assert analysis.alias_size_in_bytes == aliased


@given(st.integers(1, 40), st.integers(1, 63), st.sampled_from([None, "int8"]))
@settings(max_examples=30, deadline=None)
def test_more_takes_more(batch, slots, kv_cache):
    one = plan(SMALL, batch, slots, kv_cache=kv_cache)
    for more in (plan(SMALL, batch + 1, slots, kv_cache=kv_cache), plan(SMALL, batch, slots + 1, kv_cache=kv_cache)):
        assert more.cache > one.cache and more.workspace > one.workspace and more.weights == one.weights


def test_a_plan_is_fast_and_allocates_nothing():
    config = replace(preset("llama2-70b"), max_len=4095)  # one that no other test has seen
    before, seconds = len(jax.live_arrays()), []
    for slots in (4095, 4094, 4093):
        start = time.perf_counter()
        plan(config, 2, slots, "int8", "int8")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    assert len(jax.live_arrays()) == before


def test_a_plan_is_plain_data():
    made = plan(SMALL, np.int64(2), np.int32(50), "int8", "int8", keep_float={"wo"})
    assert made.total == made.weights + made.cache + made.workspace
    values = json.loads(json.dumps(made.to_json()))
    config = ModelConfig.from_json(values.pop("config"))
    assert config == replace(SMALL, kv_cache="int8")
    assert values.pop("total") == made.total and values["keep_float"] == ["wo"]
    assert Plan(config=config, **values | {"keep_float": ("wo",)}) == made
    assert hash(made) is not None
    assert (made.batch, made.max_len, made.quantize) == (2, 50, "int8")
    assert plan(SMALL).max_len == SMALL.max_len


@pytest.mark.parametrize("devices", [None, 1, np.int64(1), jax.local_devices()[:1], tuple(jax.local_devices()[:1])])
def test_one_device(devices):
    assert plan(SMALL, devices=devices) == plan(SMALL)


BAD = [
    *[({"batch": value}, "batch is .*; it must be a whole number from 1") for value in (0, -1, 1.0, True, "2", None)],
    ({"batch": 10**30}, "batch is 1000.*; it must be"),
    *[({"max_len": value}, "max_len is .*; it must be .* 1 to 64") for value in (0, -1, 65, 2.0, True, "2", 10**30)],
    *[({"quantize": v}, "quantize is .* int8, int8-g128, w8a8 or None") for v in ("int4", "", 8, True, "INT8")],
    *[({"kv_cache": value}, "kv_cache is .* int8 or None") for value in ("int4", "", 8, "bfloat16")],
    *[
        ({"dtype": value}, "dtype is .* float32, bfloat16 or None")
        for value in ("float16", "int8", "", 32, jnp.float32)
    ],
    *[({"devices": value}, "devices is .* must be 1") for value in (0, -1, 1.0, True, "2", [], [1], "cpu")],
    ({"devices": 2}, "devices are 2; this version of jaxllm runs a model on one device"),
    ({"devices": jax.local_devices()[:1] * 2}, "devices are 2; this version of jaxllm runs a model on one device"),
    ({"keep_float": "wo", "quantize": "int8"}, "keep_float is 'wo'; it must be a list"),
    ({"keep_float": 5}, "keep_float is 5; it must be a list"),
    ({"keep_float": ["w"], "quantize": "int8"}, "'w' cannot be kept float"),
    ({"keep_float": ["wo"]}, "nothing is quantized"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        plan(SMALL, **arguments)
    assert "\n" not in str(error.value)


# what fits


@pytest.mark.slow
@given(st.integers(1, 5), st.sampled_from([None, "int8"]), st.floats(0.5, 1.3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_longest_and_largest_by_brute_force(batch, kv_cache, share, loaded):
    config = replace(SMALL, max_len=20)
    wanted = plan(config, batch, 18, "int8", kv_cache)
    free = int(wanted.total * share) - loaded * wanted.weights

    def fits(batch, slots):
        made = plan(config, batch, slots, "int8", kv_cache)
        return made.cache + made.workspace + (not loaded) * made.weights <= free

    longest = longest_context(wanted, free, loaded)
    assert longest == max((slots for slots in range(1, 21) if fits(batch, slots)), default=0)
    most = largest_batch(wanted, free, loaded)
    assert most == sum(1 for _ in itertools.takewhile(lambda rows: fits(rows, 18), itertools.count(1)))


def test_edges_of_longest_and_largest():
    made = plan(SMALL, 2)
    assert longest_context(made, made.total) == 64 and longest_context(made, made.total - 1) == 63
    assert largest_batch(made, made.total) == 2 and largest_batch(made, made.total - 1) == 1
    assert longest_context(made, 10**30) == 64 and largest_batch(made, 10**30) == 2**31 - 1
    for free in (0, made.weights, -5):
        assert longest_context(made, free) == largest_batch(made, free) == 0
    assert longest_context(made, None) is None and largest_batch(made, None) is None


def test_enough_memory():
    made = plan(SMALL, 2)
    require_memory(made, made.total)
    require_memory(made, made.total - made.weights, weights_loaded=True)
    require_memory(made, None)
    require_memory(made, None, weights_loaded=True)
    for free, loaded in ((made.total - 1, False), (made.total - made.weights - 1, True)):
        with pytest.raises(InputError, match="1 B more than the"):
            require_memory(made, free, loaded)


def refusal(made, free, **more):
    with pytest.raises(InputError) as error:
        require_memory(made, free, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def advised(message):
    """The changes that a message advises, read from its flags: {argument: value}; the arguments must say the same."""
    flags = dict(re.findall(r"--([a-z-]+) (\w+)", message))
    changes = {name.replace("-", "_"): int(v) if v.isdigit() else v for name, v in flags.items()}
    if changes:
        assert re.search(r"\(in Python, (.*?)\)", message)[1] == ", ".join(f"{n}={v!r}" for n, v in changes.items())
    if rows := re.search(r"(one|\d+) prompts? at a time", message):
        changes["batch"] = 1 if rows[1] == "one" else int(rows[1])
    return changes


ROOMY = replace(SMALL, max_len=1024)  # cache and workspace weigh more than the weights


def needs(batch=1, loaded=False, **changes):
    made = plan(ROOMY, batch, **changes)
    return made.total - loaded * made.weights


def test_advice_in_the_order_of_its_cost():
    both = {"kv_cache": "int8", "quantize": "int8"}
    made = plan(ROOMY, 4)
    assert advised(refusal(made, made.total - 1)) == {"kv_cache": "int8"}
    assert advised(refusal(made, needs(4, kv_cache="int8"))) == {"kv_cache": "int8"}
    assert needs(4, kv_cache="int8") < needs(4, quantize="int8")
    shorter = advised(refusal(made, needs(4, kv_cache="int8") - 1))
    assert list(shorter) == ["max_len"] and needs(4, **shorter) < needs(4, kv_cache="int8")
    assert needs(4, max_len=shorter["max_len"] + 1) > needs(4, kv_cache="int8") - 1
    assert advised(refusal(made, needs(3), least=1024)) == {"batch": 3}
    assert advised(refusal(made, needs(3) - 1, least=1024)) == {"batch": 2}
    one = plan(ROOMY)
    assert needs(quantize="int8") < needs(kv_cache="int8")
    assert advised(refusal(one, needs(quantize="int8"))) == {"quantize": "int8"}
    assert advised(refusal(one, needs(quantize="int8") - 1, least=1024)) == both
    assert advised(refusal(one, needs(**both), least=1024)) == both
    assert advised(refusal(one, needs(**both) - 1, least=1000)) == both | {"max_len": 1023}


def test_advice_with_both_int8s_and_more():
    config, both = preset("llama2-7b"), {"kv_cache": "int8", "quantize": "int8"}
    made = plan(config, 2)
    assert advised(refusal(made, plan(config, 2, 4000, **both).total, least=4000)) == both | {"max_len": 4000}
    assert advised(refusal(made, plan(config, 1, **both).total, least=4096)) == both | {"batch": 1}
    assert advised(refusal(made, plan(config, 1, 150, **both).total)) == both | {"max_len": 150, "batch": 1}
    free = plan(config, 1, 128, **both).total
    assert advised(refusal(made, free)) == both | {"max_len": 128, "batch": 1}
    assert "it fits" not in refusal(made, free - 1) and "it fits" not in refusal(made, free, least=129)


def test_advice_does_not_repeat_what_is_done():
    made = plan(ROOMY, 1, quantize="int8-g128", kv_cache="int8")
    message = refusal(made, made.total - 1)
    assert list(advised(message)) == ["max_len"]
    made = plan(ROOMY, 1, 100, quantize="w8a8", kv_cache="int8")
    assert "it cannot be made smaller: take a smaller model" in refusal(made, made.total - 1)
    two = plan(ROOMY, 2, 100, quantize="w8a8", kv_cache="int8")
    assert advised(refusal(two, made.total)) == {"batch": 1}
    assert "even with one prompt at a time it needs " + format_size(made.total) in refusal(two, made.total - 1)


def test_weights_that_are_loaded_are_not_changed():
    made = plan(ROOMY, 2)
    rest = made.total - made.weights
    message = refusal(made, rest - 1, weights_loaded=True)
    assert message.startswith(f"this needs {format_size(rest)} of memory beside the weights (cache ")
    assert advised(message) == {"kv_cache": "int8"}
    least = needs(1, True, kv_cache="int8", max_len=128)
    message = refusal(made, least - 1, weights_loaded=True)
    assert "quantize" not in message and f"it needs {format_size(least)}:" in message


def test_what_a_refusal_says():
    made = plan(preset("llama2-13b"))
    assert refusal(made, 24 * GiB) == (
        f"this needs {format_size(made.total)} of memory (weights 24.2 GiB, cache 3.1 GiB, workspace "
        f"{format_size(made.workspace)}), {format_size(made.total - 24 * GiB)} more than the 24.0 GiB that is free; "
        f"it fits with --quantize int8 (in Python, quantize='int8')"
    )
    made = plan(preset("llama2-70b"), 2)
    smallest = plan(preset("llama2-70b"), 1, 128, "int8", "int8")
    assert refusal(made, 10 * GiB).endswith(
        "even with --kv-cache int8 --quantize int8 --max-len 128 (in Python, kv_cache='int8', quantize='int8', "
        f"max_len=128) and one prompt at a time it needs {format_size(smallest.total)}: take a smaller model, or a "
        "device with more memory"
    )


@given(
    st.integers(1, 6),
    st.integers(1, 1024),
    st.sampled_from([None, "int8"]),
    st.sampled_from([None, "int8-g128"]),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.integers(1, 300),
)
@settings(max_examples=25, deadline=None)
def test_advice_fits_and_is_there_when_something_fits(batch, slots, kv_cache, quantize, share, loaded, least):
    made = plan(ROOMY, batch, slots, quantize, kv_cache)
    here = made.weights if loaded else 0
    free = int((made.total - here - 1) * share)

    def fits(changes):
        changed = plan(
            ROOMY, **{"batch": batch, "max_len": slots, "quantize": quantize, "kv_cache": kv_cache} | changes
        )
        return changed.total - here <= free

    message = refusal(made, free, weights_loaded=loaded, least=least)
    changes = advised(message)
    assert changes.get("max_len", slots) >= min(least, slots)
    if "it fits with" in message:
        assert fits(changes)
        for name in {"max_len", "batch"} & changes.keys():  # and no more is taken away than must be
            assert not fits(changes | {name: changes[name] + 1})
    else:
        allowed = itertools.product({1, batch}, {min(least, slots), slots}, {kv_cache, "int8"})
        for rows, length, cache in allowed:
            held_as = {} if loaded else {"quantize": quantize or "int8"}
            assert not fits({"batch": rows, "max_len": length, "kv_cache": cache} | held_as)


def test_table():
    made = plan(preset("llama2-7b"), quantize="int8")
    lines = table(made, 24 * GiB).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "weights",
        "cache",
        "workspace",
        "total",
        "available",
        "to spare",
        "longest context",
        "largest batch",
    ]
    assert lines[0].split()[1:] == [f"{made.weights / GiB:.2f}", "GiB", "int8"]
    assert lines[1].split(maxsplit=3)[1:] == ["2.00", "GiB", "batch 1, 4096 tokens, bfloat16"]
    assert lines[4].split()[1:] == ["24.00", "GiB", "fits"]
    assert lines[5].split()[2] == f"{(24 * GiB - made.total) / GiB:.2f}"
    assert lines[6].split()[2] == "4096" and int(lines[7].split()[2]) == largest_batch(made, 24 * GiB)
    assert len({line.index("GiB") for line in lines[:6]}) == 1
    assert max(map(len, lines)) < 80


def test_table_of_what_does_not_fit():
    made = plan(preset("llama2-70b"), 2, keep_float=["output"], quantize="int8")
    text = table(made, 65 * GiB)
    remedy = text.splitlines()[-1]
    assert refusal(made, 65 * GiB).endswith(f"; {remedy}")
    assert "does not fit" in text and "int8, bfloat16: output" in text
    assert re.search(rf"missing +{(made.total - 65 * GiB) / GiB:.2f} GiB", text)
    assert "to spare" not in text and re.search(r"largest batch +0 ", text)


def test_table_of_a_small_model_and_of_unknown_memory():
    text = table(plan(SMALL), 900 << 20)
    assert "GiB" not in text and re.search(r"available +900.00 MiB  fits", text)
    text = table(plan(SMALL), None)
    assert "not known" in text and "fits" not in text and "longest" not in text


@pytest.mark.parametrize("name", ["llama-33b", "tinyllama-1.1b", "llama3.2-1b"])
def test_tables_of_other_models(name):
    assert len(table(plan(preset(name)), 4 * GiB).splitlines()) == (9 if plan(preset(name)).total > 4 * GiB else 8)


# free memory

CPU = jax.local_devices(backend="cpu")[0]
UNLIMITED = "9223372036854771712"


def system(root, files):
    """A file system below root: {path: text}."""
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def group2(folder, limit, used, cached=0):
    """The files of a control group, version 2."""
    folder = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\nactive_file 7\ninactive_file {cached}\nslab 9\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def group1(folder, limit, used, cached=0):
    """The files of a control group, version 1."""
    folder = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"cache 5\ninactive_file 7\ntotal_inactive_file {cached}\n"
    names = ("limit_in_bytes", "usage_in_bytes", "stat")
    return {
        f"{folder}/memory.{name}": text for name, text in zip(names, (f"{limit}\n", f"{used}\n", stat), strict=True)
    }


MEMORY = {"proc/meminfo": "MemTotal:  99999 kB\nMemFree:  1 kB\nMemAvailable:   50000 kB\nHugePages_Total:       0\n"}
ALL = 50000 * 1024
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/a\n4:memory,hugetlb:/a/b\n3:cpu:/\n0::/\n"}

SYSTEMS = {
    "no groups": ({}, ALL),
    "version 2": (V2 | group2("a/b", 9000, 4000, 300), 5300),
    "version 2, no limit": (V2 | group2("a/b", "max", 4000, 300), ALL),
    "version 2, limited above": (V2 | group2("a/b", "max", 4000) | group2("a", 8000, 5000, 10), 3010),
    "version 2, the tightest of all": (
        V2 | group2("a/b", 9000, 4000) | group2("a", 8000, 7000, 10) | group2("", 99999, 99000, 20),
        1010,
    ),
    "version 2, above the system": (V2 | group2("a/b", 1 << 50, 4000), ALL),
    "version 2, full": (V2 | group2("a/b", 9000, 9500, 100), 0),
    "version 2, no statistics": (V2 | group2("a/b", 9000, 4000) | {"sys/fs/cgroup/a/b/memory.stat": ""}, 5000),
    "version 2, nothing readable": (V2 | group2("a/b", "?", "!"), ALL),
    "version 2, path of another namespace": (V2 | group2("", 7000, 1000, 5), 6005),
    "version 2, path of which the namespace has a part": (V2 | group2("", 7000, 1000) | group2("a", 100, 50), 6000),
    "version 2, path above the namespace": (
        {"proc/self/cgroup": "0::/../x\n"} | group2("", 7000, 1000) | group2("../x", 100, 50),
        6000,
    ),
    "version 2, a colon in the path": ({"proc/self/cgroup": "0::/a:b/c\n"} | group2("a:b/c", 7000, 1000), 6000),
    "version 2, at the top": ({"proc/self/cgroup": "0::/\n"} | group2("", 7000, 1000), 6000),
    "version 1": (V1 | group1("a/b", 9000, 4000, 300), 5300),
    "version 1, no limit": (V1 | group1("a/b", UNLIMITED, 4000), ALL),
    "version 1, limited above": (V1 | group1("a/b", UNLIMITED, 4000) | group1("a", 8000, 5000, 10), 3010),
    "version 1, path of the host": (V1 | group1("", 7000, 1000, 5), 6005),
    "version 1, another controller's path": (
        {"proc/self/cgroup": "3:cpu:/a\n4:memory:/\n"} | group1("a", 10, 5) | group1("", 7000, 1000),
        6000,
    ),
    "not a list of groups": ({"proc/self/cgroup": "\nnonsense\n:::\n"} | group2("", 10, 5), ALL),
}


@pytest.mark.parametrize("files, free", SYSTEMS.values(), ids=SYSTEMS)
def test_free_memory_of_a_computer(files, free, tmp_path):
    assert free_memory(CPU, system(tmp_path / "root", MEMORY | files)) == free


def test_another_system(tmp_path, monkeypatch):
    names = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", names.__getitem__)
    assert free_memory(CPU, tmp_path) == 4096000
    old = system(tmp_path, {"proc/meminfo": "MemTotal:  99999 kB\nMemFree:  1 kB\n"})
    assert free_memory(CPU, old) == 4096000
    names["SC_AVPHYS_PAGES"] = -1
    assert free_memory(CPU, tmp_path) is None

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert free_memory(CPU, tmp_path) is None
    assert free_memory(CPU, system(tmp_path, V2 | group2("a/b", 9000, 4000))) == 5000
    assert free_memory(CPU, system(tmp_path, V1 | group1("a/b", UNLIMITED, 4000))) is None
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(CPU, tmp_path / "nowhere") is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_free_memory_here():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(CPU) <= total
    if jax.default_backend() == "cpu":
        assert abs(free_memory() - free_memory(CPU)) < total / 4


@pytest.mark.parametrize(
    "stats, free",
    [
        ({"bytes_limit": 1000, "bytes_in_use": 300, "peak_bytes_in_use": 900}, 700),
        ({"bytes_limit": 1000, "bytes_in_use": 1200}, 0),
        ({"bytes_in_use": 300}, None),
        ({"bytes_limit": 300}, None),
        (None, None),
    ],
)
def test_free_memory_of_a_gpu(stats, free, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "cuda_driver", lambda: None)
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert free_memory(device, system(tmp_path, MEMORY)) == free


class Driver:
    """The part of the CUDA driver that tells a GPU's memory; the call named in fails returns an error."""

    def __init__(self, free, total, fails=None):
        self.free, self.total, self.fails, self.calls = free, total, fails, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            values = {
                "cuDeviceGet": lambda out, number: (7 + number,),
                "cuDevicePrimaryCtxRetain": lambda out, number: (1000 + number.value,),
                "cuMemGetInfo_v2": lambda *out: (self.free, self.total),
            }.get(name, lambda *_: ())(*arguments)
            if name != self.fails:
                for argument, value in zip(arguments, values, strict=False):
                    argument._obj.value = value
            if name == "cuCtxPushCurrent_v2":
                assert arguments[0].value == 1009  # of device 7 + 2
            return 700 if name == self.fails else 0

        return call


@pytest.mark.parametrize(
    "used, peak, free, expected",
    [
        (100, 100, 600, 600),  # 300 belong to others
        (100, 250, 600, 750),  # the pool keeps what it had
        (100, 100, 900, 800),  # a tenth is not for us
        (950, 950, 50, 0),
    ],
)
def test_free_memory_of_a_gpu_whose_allocator_has_no_limit(used, peak, free, expected, monkeypatch):
    stats = {"bytes_limit": 0, "bytes_in_use": used, "peak_bytes_in_use": peak}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats, local_hardware_id=2)
    driver = Driver(free, 1000)
    monkeypatch.setattr(resources, "cuda_driver", lambda: driver)
    assert free_memory(device) == expected
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
    for fails in driver.calls[:-2]:
        failing = Driver(free, 1000, fails)
        monkeypatch.setattr(resources, "cuda_driver", lambda failing=failing: failing)
        assert free_memory(device) is None
        assert ("cuDevicePrimaryCtxRelease_v2" in failing.calls) == (
            fails in ("cuCtxPushCurrent_v2", "cuMemGetInfo_v2")
        )


# usage


def here():
    """The usage of the default device."""
    return usage()[jax.local_devices()[0]]


def grown(before):
    now = here()
    return Usage(now.weights - before.weights, now.caches - before.caches, now.other - before.other)


@pytest.fixture
def before():
    gc.collect()  # what earlier tests left would go at some moment
    return here()


def test_usage_of_weights_caches_and_others(before):
    params = zeros(abstract_params(SMALL, "int8", ["output"]), on_device=True)
    weights = held(params)
    assert grown(before).weights == weights == plan(SMALL, quantize="int8", keep_float=["output"]).weights
    cache = init_cache(replace(SMALL, kv_cache="int8"), 3, 50)
    assert grown(before).weights == weights and grown(before).caches == held(cache)
    moments = {"wo": jax.device_put(np.ones((100, 7), np.float32)), "step": jax.device_put(np.int32(5))}
    middle = here()
    more = [jax.device_put(np.ones(1000, np.float32))]
    assert grown(middle) == Usage(0, 0, 4000)
    del more
    assert grown(middle) == Usage(0, 0, 0)
    moments["wo"].delete()
    assert grown(middle) == Usage(0, 0, -2800)
    cache.k[0].values.delete()
    assert grown(before).caches == held(cache) - cache.k[0].values.nbytes
    del cache
    assert grown(before).caches == 0 and grown(before).weights == weights
    leaves = jax.tree.leaves(params)
    del params
    assert grown(before).weights == 0 and grown(middle).other == weights - 2800
    del leaves, moments
    assert grown(before).weights == 0 and grown(middle).other == -2804


def test_usage_counts_garbage_until_it_is_collected(before):
    gc.disable()
    try:
        loop = [init_cache(SMALL, 2, 30)]
        size = held(loop[0])
        loop.append(loop)
        del loop
        assert grown(before).caches == size
        gc.collect()
        assert grown(before).caches == 0
    finally:
        gc.enable()


def test_usage_of_a_donated_cache(before):
    config = replace(SMALL, n_layers=1, dtype="float32")
    params = zeros(abstract_params(config), on_device=True)
    first = init_state(config, 2, 32)
    size = held(first.cache)
    assert grown(before).caches == size
    second, tokens = decode_chunk(params, config, first, Sampling().rows(2), np.array([2], np.int32), 2)
    tokens.block_until_ready()
    assert first.cache.k[0].is_deleted()
    assert held(second.cache) == size == grown(before).caches
    assert grown(before).weights == held(params)


def test_usage_ignores_what_holds_no_memory(before):
    abstract = abstract_params(SMALL), jax.eval_shape(lambda: init_cache(SMALL, 1, 8))
    on_host = zeros(abstract)
    seen = []
    jax.make_jaxpr(lambda cache: (seen.append(usage()), cache)[1])(on_host[1])
    half = Params(embed=None, layers=(), norm=None, output=None)
    unfinished = object.__new__(KVCache)
    assert grown(before) == Usage(0, 0, 0) and len(seen) == 1
    assert seen[0][jax.local_devices()[0]].caches == before.caches
    del abstract, on_host, half, unfinished


def test_an_array_that_was_counted_can_be_donated(before):
    array = jax.jit(lambda: jnp.ones(3000))()  # not numpy's memory, which JAX may use but not give away
    assert grown(before) == grown(before) == Usage(0, 0, 12000)
    double = jax.jit(lambda a: 2 * a, donate_argnums=0)
    address = array.unsafe_buffer_pointer()
    assert double(array).unsafe_buffer_pointer() == address and array.is_deleted()


def test_usage_counts_a_shared_buffer_once(before):
    array = jax.device_put(np.ones(3000, np.float32))
    again = jax.device_put(array, jax.local_devices()[0], may_alias=True)
    assert again is not array and again.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert grown(before) == Usage(0, 0, 12000)
    cache = KVCache((again,), (array,), array)
    assert grown(before) == Usage(0, 12000, 0)
    params = Params(embed=array, layers=(), norm=array, output=array)
    assert sum(vars(grown(before)).values()) == 12000
    del params, cache, again
    assert grown(before) == Usage(0, 0, 12000)


def test_usage_where_no_pointer_is_told(before, monkeypatch):
    array = jax.device_put(np.ones(3000, np.float32))
    cache = KVCache((array,), (), jax.device_put(np.ones(5, np.float32)))

    def refuse(self):
        raise NotImplementedError("no pointers here")

    monkeypatch.setattr(type(array), "unsafe_buffer_pointer", refuse)
    assert grown(before) == grown(before) == Usage(0, 12020, 0)
    array.delete()
    assert grown(before) == Usage(0, 20, 0)
    assert cache.k[0] is array


def test_usage_of_what_is_deleted_while_it_is_looked_at(before, monkeypatch):
    array = jax.device_put(np.ones(3000, np.float32))
    cache = KVCache((array,), (), jax.device_put(np.ones(5, np.float32)))
    pointer = type(array).unsafe_buffer_pointer

    def late(self):
        if self.shape == (3000,):
            array.delete()
        return pointer(self)

    monkeypatch.setattr(type(array), "unsafe_buffer_pointer", late)
    assert grown(before).caches == 20
    assert cache.k[0].is_deleted()


def test_usage_while_arrays_come_and_go(before):
    stop, failures = threading.Event(), []

    def churn():
        while not stop.is_set():
            try:
                array = jax.device_put(np.ones(300, np.float32))
                cache = KVCache((array,), (jax.device_put(np.ones(3, np.float32)),), array)
                array.delete()
                del cache
            except Exception as error:  # a thread's own would be lost
                failures.append(error)
                raise

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            assert 0 <= grown(before).caches <= 2 * 1212
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert grown(before) == Usage(0, 0, 0)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxllm.model import KVCache
from jaxllm.resources import Usage, usage

devices = jax.devices()
assert len(devices) == 4 and all(total == Usage(0, 0, 0) for total in usage().values()) and len(usage()) == 4
mesh = Mesh(np.array(devices[:2]), "x")
split = jax.device_put(np.ones(1000, np.float32), NamedSharding(mesh, PartitionSpec("x")))
copies = jax.device_put(np.ones(100, np.float32), NamedSharding(mesh, PartitionSpec()))
pieces = [shard.data for shard in split.addressable_shards]
cache = KVCache((split,), (), jax.device_put(np.ones(7, np.float32), devices[2]))
for _ in range(2):
    assert [usage()[d] for d in devices] == [Usage(0, 2000, 400)] * 2 + [Usage(0, 28, 0), Usage(0, 0, 0)], usage()
"""


def test_usage_on_several_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
