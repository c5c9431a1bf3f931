"""Decode and prefill of a whole model on one GPU, as shares of what its memory and tensor cores give in the same run.

    python bench/decode.py --preset llama2-7b --weights int8 --prompt 32 --new 128 [--batch B] [--context N] [--json]

Weights are random numbers of the preset's sizes, made on the device.  A prompt is taken in, the cache is set to hold
`--context` tokens, and the loop of `generate` decodes: chunks that are dispatched one ahead.  The bytes of a token are
the weights that decoding reads, and the filled part of the cache.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from memory import in_a_process, random_params
from ops import ceilings

from jaxllm import pipeline
from jaxllm.config import preset
from jaxllm.sampling import Sampling

WEIGHTS = {  # dtype, quantization
    "fp32": ("float32", None), "bf16": ("bfloat16", None), "int8": ("bfloat16", "int8"),
    "int8-g128": ("bfloat16", "int8-g128"), "w8a8": ("bfloat16", "w8a8"),
}  # fmt: skip
REPEATS = 5


def tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def at_length(state, length):
    """The state with so many tokens in every row's cache, whatever they are."""
    return replace(state, cache=replace(state.cache, length=jnp.full_like(state.cache.length, length)))


def measure(config, params, args, slots):
    """Seconds to the end of the first prefill and chunk (with compilation), of a prefill, and of a token."""
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (args.batch, args.prompt)).tolist()
    lengths = np.full(args.batch, args.prompt)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p).rows(args.batch)
    eos = np.array([], np.int32)

    def fill(state):
        for tokens, counts in pipeline._pieces(prompts, lengths, slots, pipeline.largest_piece(config, args.batch)):
            state, _ = pipeline.prefill(params, config, state, tokens, counts, sampling)
        return jax.block_until_ready(state)

    def decode(state):
        waiting = None
        for _ in range(args.new // pipeline.CHUNK):
            state, tokens = pipeline.decode_chunk(params, config, state, sampling, eos, pipeline.CHUNK)
            if waiting is not None:
                np.asarray(waiting)
            waiting = tokens
        np.asarray(waiting)
        return state

    fresh = partial(pipeline.init_state, config, args.batch, slots)
    start = time.perf_counter()
    state = fill(fresh())
    state, tokens = pipeline.decode_chunk(params, config, state, sampling, eos, pipeline.CHUNK)
    np.asarray(tokens)
    compiled = time.perf_counter() - start
    prefills, tokens = [], []
    for _ in range(REPEATS):
        state = jax.block_until_ready(at_length(state, 0))
        start = time.perf_counter()
        state = fill(state)
        prefills.append(time.perf_counter() - start)
        state = jax.block_until_ready(at_length(state, args.context or args.prompt))
        start = time.perf_counter()
        state = decode(state)
        tokens.append((time.perf_counter() - start) / (args.new // pipeline.CHUNK * pipeline.CHUNK))
    return compiled, float(np.median(prefills)), float(np.median(tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama2-7b")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--kv-cache", choices=["int8"])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, help="tokens in the cache when decoding begins (the prompt's)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--impl", nargs="+", default=["auto"], help="one measurement for each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cache:
        child(args)
        return
    with tempfile.TemporaryDirectory() as cache:
        for impl in args.impl:
            folder = os.path.join(cache, impl)
            # two processes with compilation caches of their own: the first compiles, the second finds what it made
            command = [__file__, *sys.argv[1:], "--cache", folder, "--impl", impl]
            first = in_a_process(*command)
            second = first and in_a_process(*command)
            if second is None:
                sys.exit(1)  # it has said why
            show(args, second | {"first_run_s": first["run_s"], "second_run_s": second["run_s"]})


def child(args):
    """Measure one implementation, and print what was found as JSON."""
    if jax.default_backend() != "gpu":
        sys.exit("this bench needs a GPU")
    jax.config.update("jax_compilation_cache_dir", args.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    dtype, quantize = WEIGHTS[args.weights]
    config = replace(preset(args.preset), dtype=dtype, kv_cache=args.kv_cache, impl=args.impl[0])
    length = max(args.prompt, args.context or 0) + args.new
    slots = -(-length // 128) * 128
    config = replace(config, max_len=slots)  # beyond what the model was trained for, too: no time depends on it
    ceiling = ceilings()
    params = jax.block_until_ready(random_params(config, quantize))
    run, prefill, token = measure(config, params, args, slots)
    read = tree_bytes(params) - tree_bytes(params.embed)
    if params.output is None:
        read += tree_bytes(params.embed)
    cache = jax.eval_shape(partial(pipeline.init_state, config, args.batch, slots)).cache
    filled = (args.context or args.prompt) + args.new / 2
    read_bytes = read + tree_bytes((cache.k, cache.v)) * filled / slots
    tokens = args.batch * args.prompt
    heads = config.n_heads * config.head_dim
    qkv = heads + 2 * config.n_kv_heads * config.head_dim
    matrices = config.n_layers * config.dim * (qkv + heads + 3 * config.ffn_dim)
    attention = 2 * config.n_layers * heads * args.prompt * tokens  # causal: half of the slots
    result = {
        "preset": args.preset, "weights": args.weights, "kv_cache": args.kv_cache, "batch": args.batch,
        "prompt": args.prompt, "context": args.context or args.prompt, "slots": slots, "impl": config.impl,
        "tokens_per_s": args.batch / token, "us_per_step": token * 1e6, "bytes_per_step": read_bytes,
        "share_of_read": read_bytes / token / ceiling["read"], "prefill_s": prefill,
        "prefill_tflop_per_s": (2 * tokens * matrices + attention) / prefill / 1e12,
        "run_s": run, "ceilings": ceiling, "device": jax.devices()[0].device_kind, "python": platform.python_version(),
        "jax": version("jax"), "triton": version("triton"),
    }  # fmt: skip
    print(json.dumps(result))


def show(args, result):
    if args.json:
        print(json.dumps(result), flush=True)
        return
    print(
        f"{args.preset} {args.weights} batch {args.batch} context {result['context']} {result['impl']}: "
        f"{result['tokens_per_s']:.1f} tokens/s, {result['us_per_step']:.0f} us a step, "
        f"{result['share_of_read']:.3f} of the read ceiling; prefill {result['prefill_s'] * 1e3:.1f} ms, "
        f"{result['prefill_tflop_per_s']:.0f} TFLOP/s; first run {result['first_run_s']:.1f} s, second "
        f"{result['second_run_s']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
