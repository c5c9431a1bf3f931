"""Convert a LLaMA checkpoint of several GB in a process of its own: how much memory of its own it needs, and how fast.

    python bench/convert.py [--layers 10] [--dir /tmp]

Writes a checkpoint of LLaMA-2 7B's sizes, but fewer layers and random weights, in two shards; converts it as float and
as int8; compares with a plain copy of the same bytes.  Fails when a conversion's private memory reaches 2 GB.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.config import preset
from jaxllm.convert import checkpoint, pth

TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "llama1-fp16-1shard" / "tokenizer.model"
VOCABULARY = 512  # pieces of that tokenizer
SHARDS = 2
LIMIT = 2e9  # bytes of private memory
INTERVAL = 0.05  # s between two looks at the child's memory
STARTED = 120e6  # bytes: a guess at Python, numpy and JAX, imported and idle


def random_weights(rng, *shape):
    """Random bfloat16 numbers from 2**-7 to 2**-4 of both signs, from random bits: several GB take seconds."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    np.bitwise_and(bits, 0x81FF, out=bits)
    np.bitwise_or(bits, 0x3C00, out=bits)
    return bits.view(ml_dtypes.bfloat16)


def shard(number, layers, config):
    """The (name, slice) pairs of one shard."""
    rng = np.random.default_rng(number)
    dim, ffn = config.dim, config.ffn_dim
    yield "tok_embeddings.weight", random_weights(rng, VOCABULARY, dim // SHARDS)
    for i in range(layers):
        for name in "wq", "wk", "wv":
            yield f"layers.{i}.attention.{name}.weight", random_weights(rng, dim // SHARDS, dim)
        yield f"layers.{i}.attention.wo.weight", random_weights(rng, dim, dim // SHARDS)
        for name in "w1", "w3":
            yield f"layers.{i}.feed_forward.{name}.weight", random_weights(rng, ffn // SHARDS, dim)
        yield f"layers.{i}.feed_forward.w2.weight", random_weights(rng, dim, ffn // SHARDS)
        for name in "attention_norm", "ffn_norm":
            yield f"layers.{i}.{name}.weight", np.ones(dim, ml_dtypes.bfloat16)
    yield "norm.weight", np.ones(dim, ml_dtypes.bfloat16)
    yield "output.weight", random_weights(rng, VOCABULARY // SHARDS, dim)


def write_checkpoint(folder, layers):
    """Write the checkpoint: its size in bytes."""
    config = preset("llama2-7b")
    folder.mkdir()
    settings = {"dim": config.dim, "n_layers": layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    (folder / "params.json").write_text(json.dumps(settings | {"multiple_of": 256, "vocab_size": -1}))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    for number in range(SHARDS):
        pth.write(folder / f"consolidated.{number:02}.pth", shard(number, layers, config))
    return sum(file.stat().st_size for file in folder.glob("*.pth"))


def private_bytes(pid):
    """The memory that a process shares with no other, files that it alone has mapped included; 0 at its end."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def convert(source, out, *options):
    """Convert in a child process: what it took."""
    command = [sys.executable, "-m", "jaxllm.convert", str(source), str(out), *options]
    start = time.perf_counter()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peak = 0
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, private_bytes(child.pid))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed: {child.stderr.read()[-2000:]}")
    return {"private_peak_bytes": peak, "seconds": seconds, "maxrss_bytes": usage.ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10, help="0.4 GB each (default: 10)")
    parser.add_argument("--dir", type=Path, default=None, help="where 3 times the checkpoint's size is free")
    args = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this bench reads /proc/PID/smaps_rollup, which only Linux has")
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-", dir=args.dir) as folder:
        sys.exit(run(Path(folder), args.layers))


def run(folder, layers):
    """Write, convert, report: the exit status."""
    # bfloat16: a block where it is mapped, and joined; int8 besides: its weights, rounded and clipped, all in float32
    predicted = {"float": STARTED + 2 * 2 * checkpoint.BLOCK, "int8": STARTED + (2 * 2 + 3 * 4) * checkpoint.BLOCK}
    for kind, peak in predicted.items():
        print(f"predicted: {kind} {peak / 1e6:.0f} MB of private memory, whatever the checkpoint's size")

    size = write_checkpoint(folder / "source", layers)
    print(f"checkpoint: {size / 1e9:.2f} GB in {SHARDS} shards of {layers} layers, in the page cache as far as it fits")
    start = time.perf_counter()
    for file in sorted((folder / "source").glob("*.pth")):
        shutil.copyfile(file, folder / file.name)
    copy = time.perf_counter() - start
    for file in folder.glob("*.pth"):
        file.unlink()
    print(f"plain copy: {copy:.1f} s, {size / copy / 1e9:.2f} GB/s")

    report = {"bench": "convert", "bytes": size, "copy_seconds": copy}
    for kind, options in {"float": (), "int8": ("--quantize", "int8")}.items():
        found = convert(folder / "source", folder / "out", *options)
        shutil.rmtree(folder / "out")
        print(
            f"{kind}: {found['private_peak_bytes'] / 1e6:.0f} MB private memory at most (predicted "
            f"{predicted[kind] / 1e6:.0f}), {found['seconds']:.1f} s, {size / found['seconds'] / 1e9:.2f} GB/s read, "
            f"maxrss {found['maxrss_bytes'] / 1e6:.0f} MB"
        )
        report[kind] = found | {"predicted_bytes": predicted[kind], "gb_per_s": size / found["seconds"] / 1e9}
    packages = {name: version(name) for name in ("jax", "numpy")}
    report |= {"python": platform.python_version(), **packages, "cpus": len(os.sched_getaffinity(0))}
    print(json.dumps(report))
    return int(max(report[kind]["private_peak_bytes"] for kind in predicted) >= LIMIT)


if __name__ == "__main__":
    main()
