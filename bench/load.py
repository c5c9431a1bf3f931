"""Load a model of a released model's sizes, with random weights: how fast, and how much memory of the host's own.

    python bench/load.py [--preset llama2-7b] [--quantize int8] [--dir FOLDER] [--repeat 3]

Writes the model folder, then loads it in processes of their own, twice in each, with the command's settings of a GPU's
memory: with its file in the page cache, and with that emptied before the first load (beside it, how fast the disk
reads the file in order).  At last the command `python -m jaxllm.generate` is started on it twice, and tells where the
time went up to the first text.
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from memory import in_a_process

from convert import memory
from jaxllm import loader
from jaxllm.config import preset
from jaxllm.model import abstract_params
from jaxllm.quantize import SCHEMES
from jaxllm.tokenizer import load_tokenizer

BLOCK = 16 << 20  # bytes
# GB/s of device_put of a memory map's pieces from 8 threads, measured on an H100; on a CPU nothing is copied
PREDICTED = {"gpu": 30.0}


def write_folder(folder, config, quantize):
    """Write a model folder with random int8 values or bfloat16 weights: its size in bytes."""
    folder.mkdir()
    shapes = loader.parameter_shapes(abstract_params(config, quantize))
    header, offsets, total = loader.safetensors_header(shapes)
    random = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
    # of a bfloat16: exponents from 2**-7 to 2**-4
    weights = ((random.view(np.uint16) & 0x81FF) | 0x3C00).view(np.uint8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for name, shape in sorted(shapes.items(), key=lambda item: offsets[item[0]]):
            count = shape.size * shape.dtype.itemsize
            if name.endswith(".scale"):
                block = np.full(shape.size, 2e-4, np.float32).view(np.uint8)
            else:
                block = random if name.endswith(".values") else weights
            for start in range(0, count, BLOCK):
                file.write(memoryview(block)[: min(BLOCK, count - start)])
        os.fsync(file.fileno())
    text = {"format": "jaxllm", "format_version": loader.FORMAT_VERSION, "quantization": quantize}
    (folder / "config.json").write_text(json.dumps(text | {"config": config.to_json()}))
    # a SentencePiece model is a protobuf message: what is appended continues its list of pieces (field 1), each a
    # string (field 1) and a score (field 2)
    own = loader.DEMO / "tokenizer.model"
    names = [b"<unused %d>" % number for number in range(load_tokenizer(own).vocab_size, config.vocab_size)]
    extra = [b"\x0a%c%s\x15%s" % (len(name), name, struct.pack("<f", -1e9)) for name in names]
    tokenizer = own.read_bytes() + b"".join(b"\x0a%c%s" % (len(entry), entry) for entry in extra)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return total


def child(folder, watch):
    """Load the folder twice, and print as JSON how long it took, or (watch) how much memory: looking takes time."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the device is ready, and its libraries are loaded
    (before, _), done = memory("self"), threading.Event()
    peak = before

    def look():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, memory("self")[0])

    watcher = threading.Thread(target=look)
    if watch:
        watcher.start()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(loader.load(folder).params)
        times.append(time.perf_counter() - start)
    done.set()
    device = {"platform": jax.devices()[0].platform, "device": jax.devices()[0].device_kind}
    figures = {"private_before": before, "private_peak": peak} if watch else {"seconds": times[0], "again": times[1]}
    print(json.dumps(figures | device))


def load(folder, *options):
    """What `child` finds in a process of its own, which has said why if it fails."""
    return in_a_process(__file__, "--child", folder, *options) or sys.exit(1)


def empty_cache(file):
    """Have the system forget the pages of a file."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_in_order(file):
    """GB/s of reading a file from beginning to end into one buffer."""
    buffer, count, start = memoryview(bytearray(BLOCK)), 0, time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while found := opened.readinto(buffer):
            count += found
    return count / (time.perf_counter() - start) / 1e9


def start_up(folder):
    """Start the command: its stats, and the seconds of the whole process."""
    command = [sys.executable, "-m", "jaxllm.generate", "--model", str(folder), "--prompt", "To be, or not to be"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--max-new-tokens", "2", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)["stats"] | {"process_s": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama2-7b")
    parser.add_argument("--quantize", choices=[*SCHEMES, "none"], default="int8")
    parser.add_argument("--dir", type=Path, help="where the model's size is free on a disk")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.watch)
        return
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this bench reads /proc/self/smaps_rollup, which only Linux has")
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-", dir=args.dir) as folder:
        run(Path(folder) / "model", args)


def run(folder, args):
    """Write, load, report."""
    quantize = None if args.quantize == "none" else args.quantize
    size = write_folder(folder, preset(args.preset), quantize)
    file = folder / "model.safetensors"
    print(f"{args.preset} {args.quantize}: {size / 1e9:.2f} GB")
    report = {"bench": "load", "preset": args.preset, "quantize": quantize, "bytes": size, "warm": [], "cold": []}

    def show(kind, found):
        rates = [size / found[name] / 1e9 for name in ("seconds", "again")]
        report[kind].append(found | dict(zip(("gb_per_s", "again_gb_per_s"), rates, strict=True)))
        expected = PREDICTED.get(found["platform"]) if kind == "warm" else None
        print(
            f"{kind}: {found['seconds']:.2f} s, {rates[0]:.1f} GB/s; again in the same process {rates[1]:.1f} GB/s"
            + (f" (predicted {expected:.0f})" if expected else ""),
            flush=True,
        )

    read_in_order(file)
    load(folder)  # compiles what joins the pieces
    for _ in range(args.repeat):
        show("warm", load(folder))
    report["memory"] = found = load(folder, "--watch")
    print(
        f"host private memory: {found['private_before'] / 1e6:.0f} MB before the load, and "
        f"{found['private_peak'] / 1e6:.0f} MB at most during it"
    )
    empty_cache(file)
    report["disk_gb_per_s"] = read_in_order(file)
    print(f"reading the file in order with an empty page cache: {report['disk_gb_per_s']:.2f} GB/s")
    for _ in range(args.repeat):
        empty_cache(file)
        show("cold", load(folder))
    read_in_order(file)
    first, second = start_up(folder), start_up(folder)
    report["start_up"] = {"first": first, "second": second}
    names = ("import_s", "device_s", "load_s", "prefill_compile_s", "prefill_s", "first_text_s", "process_s")
    for kind, stats in report["start_up"].items():
        print(f"{kind} start: " + ", ".join(f"{name} {stats[name]:.2f}" for name in names))
    packages = {name: version(name) for name in ("jax", "numpy")}
    print(json.dumps(report | {"python": platform.python_version(), **packages, "cpus": len(os.sched_getaffinity(0))}))


if __name__ == "__main__":
    main()
