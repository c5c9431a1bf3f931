"""The resource manager: how much memory a model takes, before a byte of it is loaded; what is free; what is in use.

All sizes are in bytes.  Shapes use the legend of `jaxllm.kernels.reference`; T is the tokens of a prefill call.
"""

import ctypes
import gc
import math
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from numbers import Integral
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp

from jaxllm.config import KV_CACHES, ModelConfig
from jaxllm.errors import InputError
from jaxllm.model import KVCache, Params, abstract_params, init_cache
from jaxllm.pipeline import LEAST, largest_piece, stores_scores
from jaxllm.quantize import SCHEMES

GUARD = 100 << 20  # bytes: zones of 16 MiB around each of four buffers, and cuBLAS's own 32 MiB
MOST_ROWS = 2**31 - 1  # rows are numbered in int32
NO_LIMIT = 1 << 60  # bytes: control groups of version 1 write "no limit" as the largest number they have
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*(?:([KMGT])(I?B)?|B)?\s*", re.I | re.ASCII)


@dataclass(frozen=True)
class Plan:
    """What a run takes on its device, in bytes: weights, cache (keys and values) and workspace (all else, at its peak).

    config is what runs: its dtype is the type of activations and cache, its kv_cache how the cache is held.
    batch B rows have max_len S slots each; weight_dtype is the type of the float weights, quantize and keep_float are
    those of `abstract_params`.
    """

    config: ModelConfig
    batch: int
    max_len: int
    weight_dtype: str
    quantize: str | None
    keep_float: tuple[str, ...]
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes of weights, cache and workspace together."""
        return self.weights + self.cache + self.workspace

    def to_json(self) -> dict:
        """The values, and the total, as a dict that `json` can write; sizes are in bytes."""
        return asdict(self) | {"keep_float": list(self.keep_float), "total": self.total}


@dataclass(frozen=True)
class Usage:
    """Bytes of the arrays that are live on one device: in `Params`, in `KVCache`s, and in neither."""

    weights: int
    caches: int
    other: int


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GiB", "24G" (the same), "24 GB" (powers of 1000), "1.5TiB" or "25769803776".

    Upper or lower case; a fraction of a byte is dropped.  Raises InputError for anything else, and for less than 1.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    size = 0
    if match:
        number, prefix, suffix = match.groups()
        base = 1000 if (suffix or "").lower() == "b" else 1024
        size = int(Fraction(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))
    if size < 1:
        raise InputError(
            f"{text!r} is not a size of memory; it must be a number above 0 with or without a unit, such as 24GiB, "
            f"24G (the same), 24GB (powers of 1000), 512MiB, or 25769803776 (bytes)"
        )
    return size


def format_size(size: int) -> str:
    """A size in bytes for people to read, such as "12.3 GiB": in the largest unit of which it is 1 or more."""
    if size < 1024:
        return f"{size} B"
    value, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if round(value, 1) < 1024:  # as it will be printed
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def plan(
    config: ModelConfig,
    batch: int = 1,
    max_len: int | None = None,
    quantize: str | None = None,
    kv_cache: str | None = None,
    devices: int | Sequence[jax.Device] | None = None,
    dtype: str | None = None,
    keep_float: Collection[str] = (),
) -> Plan:
    """The Plan of running a model with `batch` prompts at a time; computed from shapes, nothing is allocated.

    config is the stored model's: float weights are of its dtype, narrowed to dtype where that is narrower, as `load`
    does.  max_len is the context in tokens (None: the model's), quantize how the weights are held (None: float),
    kv_cache how the cache is (None: as the config says), dtype, "float32" or "bfloat16", the type of activations and
    cache (None: the config's), keep_float as in `abstract_params`, and devices a number of devices or the jax devices
    themselves: this version runs a model on one.
    Raises InputError for a value out of range.
    """
    if quantize not in (None, *SCHEMES):
        raise InputError(f"quantize is {quantize!r}; it must be {', '.join(SCHEMES)} or None")
    if kv_cache not in KV_CACHES:
        raise InputError(f"kv_cache is {kv_cache!r}; it must be int8 or None (as the model's config says)")
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; it must be float32, bfloat16 or None (the model's)")
    if isinstance(keep_float, str) or not isinstance(keep_float, Collection):
        raise InputError(f"keep_float is {keep_float!r}; it must be a list of names of matrices")
    if not _is_count(batch, MOST_ROWS):
        raise InputError(f"batch is {batch!r}; it must be a whole number from 1 to {MOST_ROWS}")
    if max_len is not None and not _is_count(max_len, config.max_len):
        raise InputError(
            f"max_len is {max_len!r}; it must be a whole number from 1 to {config.max_len}, the model's context"
        )
    _check_devices(devices)
    dtype = dtype or config.dtype
    return _sized(
        Plan(
            config=replace(config, dtype=dtype, kv_cache=kv_cache or config.kv_cache),
            batch=int(batch),
            max_len=int(max_len or config.max_len),
            weight_dtype=min(dtype, config.dtype, key=lambda name: jnp.dtype(name).itemsize),
            quantize=quantize,
            keep_float=tuple(keep_float),
            weights=0,
            cache=0,
            workspace=0,
        )
    )


def _is_count(value, most=math.inf):
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 < value <= most


def _check_devices(devices):
    listed = isinstance(devices, Sequence) and all(isinstance(device, jax.Device) for device in devices)
    count = len(devices) if listed else 1 if devices is None else devices
    if not _is_count(count):
        raise InputError(f"devices is {devices!r}; it must be 1, or a list of one jax device")
    if count > 1:
        raise InputError(f"devices are {count}; this version of jaxllm runs a model on one device")


def _sized(plan):
    """The same plan with its bytes worked out anew."""
    stored = replace(plan.config, dtype=plan.weight_dtype)
    return replace(
        plan,
        weights=_over_layers(stored, lambda config: abstract_params(config, plan.quantize, plan.keep_float)),
        cache=_over_layers(
            plan.config, lambda config: jax.eval_shape(lambda: init_cache(config, plan.batch, plan.max_len))
        ),
        workspace=_workspace(plan.config, plan.batch, plan.max_len, plan.quantize),
    )


def _over_layers(config, make):
    """Bytes of the abstract tree that make(config) gives; worked out on one layer and two, because all are alike."""

    def size(layers):
        leaves = jax.tree.leaves(make(replace(config, n_layers=layers)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    one = size(1)
    return one + (config.n_layers - 1) * (size(2) - one)


def _workspace(config, batch, slots, quantize):
    """Bytes that prefill and decode take besides weights and cache, whichever takes more, compiling them included.

    The temporaries are what XLA reports for its own attention, which stores scores; what it tries out while it compiles
    for a GPU (each product with every algorithm, the result twice to compare them, between guard zones) was measured:
    bench/memory.py.  A CPU tries nothing, but converts a quantized matrix to float32: this is about as much, or on the
    safe side.
    """
    itemsize = jnp.dtype(config.dtype).itemsize
    tokens = batch * min(largest_piece(config, batch), slots)  # B*T, of a prefill call
    qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    scores = keys = 0
    if stores_scores(config):
        scores = tokens * config.n_heads * slots  # [B, N, T, S]
        keys = batch * config.n_kv_heads * slots * config.head_dim  # [B, K, S, H]
    matrix = config.dim * (max(2 * config.ffn_dim, config.vocab_size) if batch > 1 else 2 * config.ffn_dim)
    running = max(
        scores * (4 + itemsize) + tokens * (qkv + config.dim) * itemsize,  # float32 scores, and config.dtype
        tokens * 2 * config.ffn_dim * (4 + itemsize),  # [B, T, 2F]
    )
    # of a quantized matrix a converted copy besides
    trying = GUARD + max(
        2 * 4 * scores + (keys + tokens * config.n_heads * config.head_dim) * itemsize,
        2 * 4 * tokens * 2 * config.ffn_dim + matrix * (itemsize + (1 if quantize else 0)),
    )
    sampling = 4 * batch * config.vocab_size * 4  # float32 [B, V]: the logits, scaled, sorted, and their sums
    state = batch * (config.vocab_size + 4 + 4 + 1)  # seen bool [B, V]; token, step int32 [B]; done bool [B]
    return max(running, trying) + sampling + state


def longest_context(plan: Plan, free: int | None, weights_loaded: bool = False) -> int | None:
    """The most slots a row that fit into `free` bytes at the plan's batch, at most the model's context.

    0 when not even one does, None when free is.  With weights_loaded, free is what is left beside the weights.
    """
    return None if free is None else _most_slots(plan, _limit(plan, free, weights_loaded), plan.config.max_len)


def largest_batch(plan: Plan, free: int | None, weights_loaded: bool = False) -> int | None:
    """The most rows of the plan's max_len slots that fit into `free` bytes.

    0 when not even one does, None when free is.  With weights_loaded, free is what is left beside the weights.
    """
    return None if free is None else _most_rows(plan, _limit(plan, free, weights_loaded))


def _limit(plan, free, weights_loaded):
    """The bytes that plan.total may be."""
    return free + plan.weights if weights_loaded else free


def _most_slots(plan, limit, most):
    return bisect_right(range(1, most + 1), limit, key=lambda slots: _sized(replace(plan, max_len=slots)).total)


def _most_rows(plan, limit, most=None):
    if most is None:  # no more than as many as their caches fit
        most = min(max(limit, 0) // _sized(replace(plan, batch=1)).cache, MOST_ROWS)
    return bisect_right(range(1, most + 1), limit, key=lambda rows: _sized(replace(plan, batch=rows)).total)


def require_memory(plan: Plan, free: int | None, weights_loaded: bool = False, least: int | None = None) -> None:
    """Raise InputError, with the cheapest change that fits, unless the plan fits into `free` bytes.

    With free None it is not known how much there is, and nothing is refused.  With weights_loaded the weights are on
    the device already: free is what is left beside them, only cache and workspace have to fit, and no change of the
    weights is offered.  A context shorter than `least` slots (by default 128) is not offered.
    """
    if free is None or plan.total <= _limit(plan, free, weights_loaded):
        return
    parts = {"weights": plan.weights, "cache": plan.cache, "workspace": plan.workspace}
    if weights_loaded:
        del parts["weights"]
    needed = sum(parts.values())
    split = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
    raise InputError(
        f"this needs {format_size(needed)} of memory{' beside the weights' if weights_loaded else ''} ({split}), "
        f"{format_size(needed - free)} more than the {format_size(free)} that is free; "
        f"{_remedy(plan, free, weights_loaded, least)}"
    )


def _remedy(plan, free, weights_loaded=False, least=None):
    """In words: the cheapest change that makes a plan fit that does not, or how much it needs at the least."""
    limit = _limit(plan, free, weights_loaded)
    least = min(least or LEAST, plan.max_len)
    cache = {} if plan.config.kv_cache else {"kv_cache": "int8"}
    weights = {} if plan.quantize or weights_loaded else {"quantize": "int8"}
    for changes in _changes(plan, limit, least, cache, weights):
        changed = _changed(plan, changes)
        if changed.total <= limit:
            return f"it fits with {_in_words(changes)}"
    smallest = cache | weights
    smallest |= {"max_len": least} if least < plan.max_len else {}
    smallest |= {"batch": 1} if plan.batch > 1 else {}
    if not smallest:
        return "it cannot be made smaller: take a smaller model, or a device with more memory"
    needed = _changed(plan, smallest).total - (limit - free)
    return (
        f"even with {_in_words(smallest)} it needs {format_size(needed)}: take a smaller model, or a device with more "
        f"memory"
    )


def _changes(plan, limit, least, cache, weights):
    """What might make the plan fit, in the order of what it costs the user; some of it does not."""
    yield cache
    yield weights
    for base in ({}, cache | weights):
        yield base
        changed = _changed(plan, base)
        slots = _most_slots(changed, limit, plan.max_len)
        if slots >= least:
            yield base | {"max_len": slots}
        rows = _most_rows(changed, limit, plan.batch)
        if rows:
            yield base | {"batch": rows}
    rows = _most_rows(_changed(plan, cache | weights | {"max_len": least}), limit, plan.batch)
    if rows:
        fewer = cache | weights | {"batch": rows}
        yield fewer | {"max_len": _most_slots(_changed(plan, fewer), limit, plan.max_len)}


def _changed(plan, changes):
    changes = dict(changes)
    kv_cache = changes.pop("kv_cache", plan.config.kv_cache)
    return _sized(replace(plan, config=replace(plan.config, kv_cache=kv_cache), **changes))


def _in_words(changes):
    """Changes as flags of a command, and as arguments of a library call."""
    named = {name: value for name, value in changes.items() if name != "batch"}
    words = []
    if named:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items())
        arguments = ", ".join(f"{name}={value!r}" for name, value in named.items())
        words.append(f"{flags} (in Python, {arguments})")
    if "batch" in changes:
        words.append("one prompt at a time" if changes["batch"] == 1 else f"{changes['batch']} prompts at a time")
    return " and ".join(words)


def table(plan: Plan, free: int | None) -> str:
    """The plan as lines of text: its parts, whether it fits into `free` bytes (None: not known), and what would fit."""
    scale, unit = (1 << 30, "GiB") if plan.total >= 1 << 30 else (1 << 20, "MiB")
    dtype = plan.config.dtype
    weights = plan.quantize or plan.weight_dtype
    if plan.keep_float:
        weights += f", {plan.weight_dtype}: {', '.join(plan.keep_float)}"
    cache = f"batch {plan.batch}, {plan.max_len} tokens, {plan.config.kv_cache or dtype}"
    rows = [
        ("weights", plan.weights, weights),
        ("cache", plan.cache, cache),
        ("workspace", plan.workspace, f"{dtype} activations"),
        ("total", plan.total, ""),
    ]
    if free is not None:
        rows.append(("available", free, "fits" if plan.total <= free else "does not fit"))
    lines = [f"{name:16}{size / scale:10.2f} {unit}  {note}".rstrip() for name, size, note in rows]
    if free is None:
        return "\n".join([*lines, "available       not known on this system"])
    lines += [
        f"{'to spare' if plan.total <= free else 'missing':16}{abs(free - plan.total) / scale:10.2f} {unit}",
        f"{'longest context':16}{longest_context(plan, free):10} tokens at batch {plan.batch}",
        f"{'largest batch':16}{largest_batch(plan, free):10} prompts of {plan.max_len} tokens",
    ]
    if plan.total > free:
        lines.append(_remedy(plan, free))
    return "\n".join(lines)


def report(plan: Plan, free: int | None) -> dict:
    """What `table` tells, as a dict that `json` can write: sizes in bytes, None for what is not known."""
    return plan.to_json() | {
        "available": free,
        "fits": None if free is None else plan.total <= free,
        "longest_context": longest_context(plan, free),
        "largest_batch": largest_batch(plan, free),
    }


def free_memory(device: jax.Device | None = None, _root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on a device (None: JAX's default one); None where that cannot be known.

    Of an accelerator, what its allocator has left; of an NVIDIA GPU whose allocator has no limit, what the driver calls
    free and what the allocator keeps for reuse, a tenth of the GPU set aside for what is not allocated through XLA.  Of
    a CPU, the smaller of what the system calls available and what the limits of this process's control groups leave;
    files in memory count as free there, and so does a model that is used from its memory map.
    """
    device = device or jax.extend.backend.get_default_device()
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        used = stats.get("bytes_in_use")
        if used is None:
            return None
        if stats.get("bytes_limit"):
            return max(0, stats["bytes_limit"] - used)
        memory = _driver_memory(device)
        if memory is None:
            return None
        free, total = memory
        kept = stats.get("peak_bytes_in_use", used) - used
        return max(0, min(free + kept, total * 9 // 10 - used))
    known = [size for size in (_system_memory(_root), *_control_groups(_root)) if size is not None]
    return min(known, default=None)


@cache
def cuda_driver() -> ctypes.CDLL | None:
    """The CUDA driver's library (https://docs.nvidia.com/cuda/cuda-driver-api); None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_memory(device):
    """The bytes (free, in all) of an NVIDIA GPU, whoever uses them, as its driver tells them; or None."""
    cuda = cuda_driver()
    number, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if (
        cuda is None
        or cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(number), device.local_hardware_id)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
    ):
        return None
    try:
        if cuda.cuCtxPushCurrent_v2(context):
            return None
        failed = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(number)
    return None if failed else (free.value, total.value)


def _system_memory(root):
    """Bytes that Linux, or another system that counts free pages, has available; macOS does not say."""
    for name, value in _pairs(root / "proc/meminfo"):
        if name == "MemAvailable:":
            return value * 1024
    try:
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows, no such name on macOS
        return None
    return pages * size if pages >= 0 and size > 0 else None


def _control_groups(root):
    """Bytes that each memory limit on the way from this process's control group to the topmost one leaves.

    Linux, Documentation/admin-guide/cgroup-v2.rst ("Memory") and cgroup-v1/memory.rst.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        mount = root / "sys/fs/cgroup"
        if number == "0":
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = mount / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        # in a container the path may be the host's, and then the container's own group is mounted at the top
        if ".." in group.parts or not group.is_dir():
            group = mount
        for folder in (group, *group.parents):
            left = _left_in_group(folder, *files)
            if left is not None:
                yield left
            if folder == mount:
                break


def _left_in_group(folder, limit, usage, cache):
    """Bytes that one group may still take, None without a limit; file cache is given back first, so it is not used."""
    limit, usage = (_number(next(iter(_lines(folder / name)), "")) for name in (limit, usage))
    if limit is None or limit >= NO_LIMIT or usage is None:
        return None
    return max(0, limit - usage + dict(_pairs(folder / "memory.stat")).get(cache, 0))


def _lines(file):
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # another system, or none of our business
        return []


def _pairs(file):
    """(name, number) of each line that starts so."""
    for line in _lines(file):
        name, number = (*line.split(), "", "")[:2]
        if _number(number) is not None:
            yield name, _number(number)


def _number(text):
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text.strip()) else None  # "max" is no limit


def usage() -> dict[jax.Device, Usage]:
    """Bytes of the arrays that are live on each device of this process.

    Nobody keeps a list: the garbage collector's objects are searched for `Params` and `KVCache`s, and what JAX has
    live besides their arrays is other: a state's small arrays, a prompt, also weights taken out of their Params.
    Gradients and an optimiser's moments that are Params, too, count as weights.  A buffer that several arrays share
    counts once, and so does one in a memory map, whether its pages have been read or not.  Garbage that is not
    collected yet counts, because it takes memory; so nothing is collected here.  Not counted are the temporaries of
    running programs and the programs themselves.
    """
    # holds each array, so that no other gets its id meanwhile; what is no live array (a shape, a tracer) has no effect
    found = {}
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would ask a proxy, which may do anything
        if kind is Params or kind is KVCache:
            # not the leaves of the thing itself: another thread may be just building it
            for leaf in jax.tree.leaves(list(vars(thing).values())):
                found[id(leaf)] = leaf, "weights" if kind is Params else "caches"

    live = [array for platform in jax.extend.backend.backends() for array in jax.live_arrays(platform)]
    sizes = {device: {"weights": 0, "caches": 0, "other": 0} for device in jax.local_devices()}
    seen = set()
    # an array of a model first, so that another one over its buffer does not make it "other"
    for array in sorted(live, key=lambda array: id(array) not in found):
        name = found[id(array)][1] if id(array) in found else "other"
        for device, buffer, size in _buffers(array):
            if (device, buffer) not in seen:
                seen.add((device, buffer))
                sizes.setdefault(device, {"weights": 0, "caches": 0, "other": 0})[name] += size
    return {device: Usage(**counts) for device, counts in sizes.items()}


def _buffers(array):
    """(device, what tells the buffer from others, bytes) of each piece of a live array; none once it is deleted."""
    try:
        # an array makes these pieces, arrays over its own buffers, when it is first asked, and keeps them: they are
        # among the live arrays of the next time
        pieces = [(shard.device, shard.data) for shard in array.addressable_shards]
    except RuntimeError:  # deleted since it was listed
        return
    for device, piece in pieces:
        try:
            buffer = piece.unsafe_buffer_pointer()
        except (RuntimeError, ValueError, NotImplementedError):
            if piece.is_deleted():
                continue
            buffer = ("array", id(piece))  # a device that does not tell
        yield device, buffer, piece.nbytes
