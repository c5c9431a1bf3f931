"""The memory plan against what a run takes on a GPU.

    python bench/memory.py [PRESET:QUANTIZE:KV_CACHE:BATCH:MAX_LEN ...]

Each case runs in a process of its own, with the command's settings of a GPU's memory: weights of the preset's sizes are
made on the device, one at a time, a prompt fills the context but for the tokens that are decoded, and the allocator's
peak is compared with the plan's total.  A case that is named twice shows what compiling takes: the second time the
programs come from the compilation cache.
QUANTIZE is none or a scheme, KV_CACHE none or int8.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import resources
from jaxllm.config import preset
from jaxllm.generate import GPU_MEMORY
from jaxllm.model import abstract_params
from jaxllm.pipeline import enable_compilation_cache, generate_tokens
from jaxllm.sampling import Sampling

CASES = (
    "llama2-7b:int8:none:1:4096",
    "llama2-7b:none:none:1:4096",
    "llama2-7b:int8:int8:1:4096",
    "llama2-7b:int8-g128:none:1:4096",
    "llama2-7b:w8a8:none:1:4096",
    "llama2-7b:int8:none:8:1024",
    "tinyllama-1.1b:none:none:1:2048",
    "llama2-70b:int8:none:1:4096",
)
NEW = 64  # tokens


@partial(jax.jit, static_argnames=("shape", "dtype"))
def noise(shape, dtype):
    """Numbers without a visible pattern, in one loop that needs no memory besides: int8, or floats around 0."""
    # jax.random would take four bytes a number, or more
    index = jax.lax.iota(jnp.uint32, np.prod(shape)).reshape(shape)
    index = (index ^ (index >> 15)) * jnp.uint32(2654435761)
    values = ((index ^ (index >> 13)) >> 24).astype(jnp.int32) - 128
    return values.astype(jnp.int8) if dtype == "int8" else (values / 4096).astype(dtype)


def random_params(config, quantize):
    """Params made on the device, one tensor at a time."""

    def one(path, leaf):
        if path[-1].name == "scale":
            return jnp.full(leaf.shape, 2e-4, leaf.dtype)
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.block_until_ready(noise(leaf.shape, jnp.dtype(leaf.dtype).name))

    return jax.tree_util.tree_map_with_path(one, abstract_params(config, quantize))


def child(case):
    """Run one case, and print what it took as JSON."""
    name, quantize, kv_cache, batch, max_len = case.split(":")
    quantize, kv_cache = (None if value == "none" else value for value in (quantize, kv_cache))
    batch, max_len = int(batch), int(max_len)
    plan = resources.plan(preset(name), batch, max_len, quantize, kv_cache)
    enable_compilation_cache()
    device = jax.devices()[0]
    resources.require_memory(plan, resources.free_memory(device))
    params = random_params(preset(name), quantize)
    loaded = device.memory_stats()["bytes_in_use"]
    prompts = np.random.default_rng(0).integers(3, plan.config.vocab_size, (batch, max_len - NEW)).tolist()
    times, tokens = [], 0
    run = generate_tokens(params, plan.config, prompts, Sampling(temperature=0.0), NEW, max_len=max_len)
    for chunk in run:
        times.append(time.perf_counter())
        tokens += chunk.shape[1]
        if len(times) == 2:  # compiled by now
            started, tokens = times[-1], 0
    usage = resources.usage()[device]
    stats = device.memory_stats()
    print(
        json.dumps(
            {
                "case": case,
                "plan": plan.total,
                "plan_weights": plan.weights,
                "plan_cache": plan.cache,
                "plan_workspace": plan.workspace,
                "loaded": loaded,
                "peak": stats["peak_bytes_in_use"],
                "usage_weights": usage.weights,
                "tokens_per_s": batch * tokens / (times[-1] - started),
                "device": device.device_kind,
            }
        )
    )


def in_a_process(*arguments):
    """What Python prints last, JSON, run with arguments and with the command's settings of a GPU's memory.

    None if it fails.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=GPU_MEMORY | os.environ)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, metavar="PRESET:QUANTIZE:KV_CACHE:BATCH:MAX_LEN")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.cases[0])
        return
    # a process that looks for a GPU must not hold it, so the children look
    results = []
    for case in args.cases:
        found = in_a_process(__file__, "--child", case)
        if found is None:
            print(f"{case}: failed")
            continue
        results.append(found)
        print(
            f"{case}: planned {found['plan'] / 1e9:.2f} GB (weights {found['plan_weights'] / 1e9:.2f}, cache "
            f"{found['plan_cache'] / 1e9:.2f}, workspace {found['plan_workspace'] / 1e9:.2f}), measured peak "
            f"{found['peak'] / 1e9:.2f}, plan / measured {found['plan'] / found['peak']:.3f}; "
            f"{found['tokens_per_s']:.1f} tokens/s",
            flush=True,
        )
    print(json.dumps({"bench": "memory", "results": results, "jax": version("jax")}))


if __name__ == "__main__":
    main()
