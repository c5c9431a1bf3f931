"""Convert a synthetic checkpoint in a process of its own: how much memory of its own that needs, and how fast it is.

    python bench/convert.py [FORMAT ...] [--model llama2-7b] [--layers N] [--quantize int8] [--warm] [--dir /tmp]

Formats are meta, hf, bin, gguf-f16, gguf-q8_0, gguf-q4_k and orbax.  One after the other is written with random weights
in the model's sizes, copied with shutil.copytree, and converted, each from the disk (its files are dropped from the
page cache first) and up to a sync, so that writing to the disk is part of both; then removed.  --warm leaves the files
in the page cache and the sync away, which says something of models that fit into memory twice.

Private memory is the highest of many samples of Private_Clean + Private_Dirty in /proc/PID/smaps_rollup: all that the
process shares with no other, what it alone has mapped of files included.  "anonymous" is the part that no file backs.
Fails where private memory reaches 2 GB, or the time is more than 1.5 times that of a copy of the larger of what was
read and what was written.
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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.config import preset
from jaxllm.convert import checkpoint, pth

LIMIT = 2e9  # bytes of private memory
SLOWEST = 1.5  # times a plain copy
SHARD = 5e9  # bytes of one file, for Hugging Face's
INTERVAL = 0.02  # s between two looks at the child's memory
STARTED = 150e6  # bytes: a guess at Python, numpy and JAX, imported and idle, and the tokenizer
# bytes for each element of a block: its copy where it is joined and one more that is written meanwhile; for a quantized
# type also a copy of its bytes and what becomes of them, in each of four threads
PER_ELEMENT = {"meta": 6, "hf": 6, "bin": 6, "orbax": 6, "gguf-f16": 6, "gguf-q8_0": 18, "gguf-q4_k": 16}

# part of `checkpoint.part_shapes` -> its names in Meta's, Hugging Face's and GGUF's files, and the axis Meta splits
TOP = {
    "embed": ("tok_embeddings", "model.embed_tokens", "token_embd", 1),
    "norm": ("norm", "model.norm", "output_norm", None),
    "output": ("output", "lm_head", "output", 0),
}
LAYER = {
    "attn_norm": ("attention_norm", "input_layernorm", "attn_norm", None),
    "q": ("attention.wq", "self_attn.q_proj", "attn_q", 0),
    "k": ("attention.wk", "self_attn.k_proj", "attn_k", 0),
    "v": ("attention.wv", "self_attn.v_proj", "attn_v", 0),
    "o": ("attention.wo", "self_attn.o_proj", "attn_output", 1),
    "ffn_norm": ("ffn_norm", "post_attention_layernorm", "ffn_norm", None),
    "gate": ("feed_forward.w1", "mlp.gate_proj", "ffn_gate", 0),
    "up": ("feed_forward.w3", "mlp.up_proj", "ffn_up", 0),
    "down": ("feed_forward.w2", "mlp.down_proj", "ffn_down", 1),
}
META, HF, GGUF = range(3)


def parts(config, vendor):
    """(name, shape, axis) of every tensor as a vendor calls it."""
    shapes = checkpoint.part_shapes(config)
    for part, names in TOP.items():
        yield f"{names[vendor]}.weight", shapes[part], names[3]
    for i in range(config.n_layers):
        prefix = ("layers.", "model.layers.", "blk.")[vendor]
        for part, names in LAYER.items():
            yield f"{prefix}{i}.{names[vendor]}.weight", shapes[part], names[3]


def random_bits(rng, shape, dtype):
    """Random numbers from 2**-7 to 2**-4 of both signs, from random bits: several GB take seconds."""
    masks = {"bfloat16": (0x81FF, 0x3C00), "float16": (0x8FFF, 0x2000)}
    keep, put = masks[dtype.name]
    bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
    return (bits & keep | put).view(dtype)


BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


def write_tokenizer(file, count):
    """A tokenizer.json of so many tokens."""
    tokens = {"<unk>": 0} | {f"t{i}": i for i in range(1, count)}
    model = {"type": "BPE", "vocab": tokens, "merges": [], "unk_token": "<unk>"}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def write_meta(folder, config, rng):
    """LLaMA-2 as Meta ships it, in two shards."""
    shards = 2
    settings = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    settings |= {"n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size}
    (folder / "params.json").write_text(json.dumps(settings))

    def tensors():
        for name, shape, axis in parts(config, META):
            split = [size // shards if at == axis else size for at, size in enumerate(shape)]
            yield name, random_bits(rng, split, BF16)

    for number in range(shards):
        pth.write(folder / f"consolidated.{number:02}.pth", tensors())


def hf_settings(config):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
    }


def write_safetensors(file, entries, rng):
    header, end = {}, 0
    for name, shape in entries:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, shape in entries:
            opened.write(random_bits(rng, shape, BF16).reshape(-1).view(np.uint8))


def write_bin(file, entries, rng):
    pth.write(file, ((name, random_bits(rng, shape, BF16)) for name, shape in entries))


def write_hf(folder, config, rng, stem="model", suffix="safetensors", write=write_safetensors):
    """Shards of up to 5 GB with an index, as save_pretrained writes them."""
    (folder / "config.json").write_text(json.dumps(hf_settings(config)))
    shards, size = [[]], 0
    for name, shape, _ in parts(config, HF):
        size += 2 * int(np.prod(shape))
        if size > SHARD:
            shards.append([])
            size = 2 * int(np.prod(shape))
        shards[-1].append((name, shape))
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        file = folder / f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        write(file, entries, rng)
        weight_map |= {name: file.name for name, _ in entries}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_pytorch(folder, config, rng):
    write_hf(folder, config, rng, "pytorch_model", "bin", write_bin)


def random_blocks(rng, shape, type):
    """A tensor of a quantized type: random bytes, but for its scales, which are small and finite."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[type]
    raw = np.frombuffer(rng.bytes(int(np.prod(shape)) // block * size), np.uint8).reshape(-1, size).copy()
    scales = {"Q8_0": 1, "Q4_K": 2}[type.name]
    bits = np.ascontiguousarray(raw[:, : 2 * scales]).view(np.uint16)
    raw[:, : 2 * scales] = (bits & 0x03FF | 0x0800).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write_gguf(folder, config, rng, kind="F16"):
    """One file, in which vectors are F32 and matrices of this type."""
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    block, size = gguf.GGML_QUANT_SIZES[type]
    for name, shape, _ in parts(config, GGUF):
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = shape if kind == "F16" else (*shape[:-1], shape[-1] // block * size)
            dtype = F16 if kind == "F16" else np.dtype(np.uint8)
            writer.add_tensor_info(name, stored, dtype, int(np.prod(shape)) // block * size, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, _ in parts(config, GGUF):
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        elif kind == "F16":
            writer.write_tensor_data(random_bits(rng, shape, F16))
        else:
            writer.write_tensor_data(random_blocks(rng, shape, type))
    writer.close()


def write_orbax(folder, config, rng):
    """What the command makes of Hugging Face's."""
    source = folder.parent / "before"
    source.mkdir()
    write_hf(source, config, rng)
    folder.rmdir()
    command = [sys.executable, "-m", "jaxllm.convert", source, folder, "--to", "orbax"]
    subprocess.run([*command, "--tokenizer", folder.parent / "tokenizer.json"], check=True)
    shutil.rmtree(source)


FORMATS = {
    "meta": write_meta,
    "hf": write_hf,
    "bin": write_pytorch,
    "gguf-f16": write_gguf,
    "gguf-q8_0": lambda *args: write_gguf(*args, kind="Q8_0"),
    "gguf-q4_k": lambda *args: write_gguf(*args, kind="Q4_K"),
    "orbax": write_orbax,
}


def files_of(path):
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def size_of(path):
    return sum(file.stat().st_size for file in files_of(path))


def drop(path):
    """Take the files out of the page cache, once they are on the disk."""
    os.sync()
    for file in files_of(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(path):
    """Read the files into the page cache, as far as they fit."""
    for file in files_of(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 << 20):
                pass


def memory(pid):
    """(private, anonymous) bytes of a process; 0 at its end."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):
        return 0, 0
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    private = found.get("Private_Clean:", 0) + found.get("Private_Dirty:", 0)
    return private, found.get("Anonymous:", 0)


def timed(source, warm, action):
    """The seconds of action(), with the source in the page cache, or else from the disk and to the disk."""
    os.sync()
    (touch if warm else drop)(source)
    start = time.perf_counter()
    result = action()
    if not warm:
        os.sync()
    return time.perf_counter() - start, result


def convert(source, out, *options):
    """Convert in a child process: its peaks of memory."""
    command = [sys.executable, "-m", "jaxllm.convert", str(source), str(out), *map(str, options)]
    peaks = 0, 0
    with tempfile.TemporaryFile("w+") as said:  # the child would wait for a pipe that nobody empties
        child = subprocess.Popen(command, stderr=said)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            peaks = tuple(map(max, peaks, memory(child.pid)))
            time.sleep(INTERVAL)
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed: {said.read()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"private_peak_bytes": peaks[0], "anonymous_peak_bytes": peaks[1], "cpu_seconds": cpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--model", default="llama2-7b", help="a preset (default: llama2-7b)")
    parser.add_argument("--layers", type=int, help="in place of the preset's")
    parser.add_argument("--quantize", help="convert to this, not to float weights")
    parser.add_argument("--warm", action="store_true", help="from the page cache, and not up to a sync")
    parser.add_argument("--dir", type=Path, help="where twice the checkpoint's size is free")
    args = parser.parse_args()
    unknown = {*args.formats} - {*FORMATS}
    if unknown:
        sys.exit(f"no format {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this bench reads /proc/PID/smaps_rollup, which only Linux has")
    config = preset(args.model)
    if args.layers:
        config = replace(config, n_layers=args.layers)
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-", dir=args.dir) as folder:
        reports = [run(Path(folder), name, config, args) for name in args.formats or FORMATS]
    packages = {name: version(name) for name in ("jax", "numpy")}
    report = {"bench": "convert", "model": args.model, "layers": config.n_layers, "warm": args.warm, "formats": reports}
    report |= {"python": platform.python_version(), **packages, "cpus": len(os.sched_getaffinity(0))}
    print(json.dumps(report))
    sys.exit(int(not all(found["within"] for found in reports)))


def run(folder, name, config, args):
    """Write a checkpoint, copy it, convert it, remove it: the report."""
    predicted = STARTED + PER_ELEMENT[name] * checkpoint.BLOCK + (12 * checkpoint.BLOCK if args.quantize else 0)
    print(f"{name}: predicted {predicted / 1e6:.0f} MB of private memory, whatever the checkpoint's size")
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(tokenizer, config.vocab_size)
    source, out = folder / "source", folder / "out"
    source.mkdir()
    FORMATS[name](source, config, np.random.default_rng(0))
    size = size_of(source)

    copy, _ = timed(source, args.warm, lambda: shutil.copytree(source, out))
    shutil.rmtree(out)
    options = ["--tokenizer", tokenizer] + (["--quantize", args.quantize] if args.quantize else [])
    given = next(source.glob("*.gguf"), source)
    seconds, found = timed(source, args.warm, lambda: convert(given, out, *options))
    written = size_of(out)
    shutil.rmtree(out)
    shutil.rmtree(source)

    copied = copy * max(size, written) / size  # of a small source that becomes large
    ratio, peak = seconds / copied, found["private_peak_bytes"]
    print(
        f"{name}: {size / 1e9:.2f} GB read, {written / 1e9:.2f} GB written in {seconds:.1f} s "
        f"({found['cpu_seconds']:.1f} s of CPU); a copy took {copy:.1f} s, {size / copy / 1e9:.2f} GB/s: {ratio:.2f} "
        f"times a copy of the larger; private {peak / 1e6:.0f} MB, "
        f"anonymous {found['anonymous_peak_bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    report = {"format": name, "read_bytes": size, "written_bytes": written, "seconds": seconds, "copy_seconds": copy}
    report |= found | {"ratio": ratio, "predicted_bytes": predicted}
    return report | {"within": peak < LIMIT and ratio <= SLOWEST}


if __name__ == "__main__":
    main()
