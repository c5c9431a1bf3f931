"""A Gluon kernel written in terms of `jaxllm.kernels.ptx`, as plain Python on a CPU, warp by warp.

Modelled are: global memory, whose arrays lie apart; each program's shared memory, at first all ones, which is NaN or
-1; barriers and mbarriers; copies that arrive when they are issued, or as late as possible, as a seed says; the lanes
of a warp as numpy arrays.  Each warp has a thread.  One at a time runs, until what it waits for is not there, and which
one is next the seed says too, so that a run can be repeated; one in which all wait fails at once.

Checked are: accesses are aligned and inside of an array; inputs are not written; no word is written twice, and who
reads one that is written waits for it; an mbarrier expects as many bytes as are copied; nothing is left under way.

Not modelled are: the memory model (a store is seen by all, at once), caches, an order of warps that changes where none
waits, fused multiply-adds, registers, the compiler, and the PTX code itself.
"""

import importlib.util
import random
import threading
import time
import traceback
import types
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
from triton.experimental.gluon import language as gl

LANES = np.arange(32)
SHARED, GLOBAL = 1 << 10, 1 << 40  # the first addresses
APART = 4096  # bytes between arrays
TIMEOUT = 120  # seconds for a launch
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def load(module, programs, seed=0, **constants):
    """A copy of a module of kernels with other constants, whose `launch` is here, with so many multiprocessors."""
    spec = importlib.util.spec_from_file_location("emulated_kernels", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for name, value in constants.items():
        setattr(copy, name, gl.constexpr(value) if isinstance(getattr(copy, name), gl.constexpr) else value)
    device = SimpleNamespace(core_count=programs)
    extend = SimpleNamespace(backend=SimpleNamespace(get_default_device=lambda: device))
    copy.jax = SimpleNamespace(extend=extend, ShapeDtypeStruct=jax.ShapeDtypeStruct)
    copy.launch = lambda kernel, *arrays, **how: Launch(seed).run(copy, kernel, *arrays, **how)
    return copy


class Stop(BaseException):
    """Ends a warp of a launch that has failed."""


class Launch:
    """One run of a kernel: its memory, and whose turn it is."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.copies = []  # that are under way
        self.turn, self.current, self.failure = threading.Semaphore(0), None, None

    def run(self, module, kernel, *arrays, out, grid, aliases, num_warps, num_stages, backend_options, **constants):
        """`jaxllm.kernels.launch.launch`."""
        given = [np.asarray(array) for array in jax.tree.leaves(arrays)]
        new = [number for number in range(len(out)) if number not in aliases.values()]
        places, size, results = [], APART, {}  # where arrays are, and which of them are results
        for number, array in enumerate([*given, *(np.full(out[i].shape, np.nan, out[i].dtype) for i in new)]):
            if number in aliases or number >= len(given):
                results[aliases[number] if number in aliases else new[number - len(given)]] = number
            places.append((size, array))
            size += (array.nbytes // APART + 2) * APART
        self.memory, self.rights = np.zeros(size, np.uint8), np.zeros(size, np.uint8)  # 1: to read, 2: and write
        self.written, self.read = np.zeros(size // 4, bool), np.zeros(size // 4, bool)  # words
        for number, (place, array) in enumerate(places):
            self.memory[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
            self.rights[place : place + array.nbytes] = 2 if number in results.values() else 1
        pointers = iter(tensor(GLOBAL + place, np.int64) for place, _ in places)
        arguments = [*jax.tree.map(lambda _: next(pointers), arrays), *list(pointers)]
        for name, value in constants.items():  # constants that kernels get: those of a Plan as numbers
            constants[name] = SimpleNamespace(**{k: v.value for k, v in vars(value).items() if hasattr(v, "value")})
        body = plain(module, gl=language(self), ptx=Instructions(self))[kernel.fn.__name__]
        size = SHARED + constants["plan"].MEMORY
        programs = [
            SimpleNamespace(number=number, memory=np.full(size, 255, np.uint8), barriers={}, mbarriers={})
            for number in range(*grid)
        ]
        warps = [SimpleNamespace(program=program, number=number) for program in programs for number in range(num_warps)]
        self.take_turns(warps, lambda: body(*arguments, **constants))
        for program in programs:
            assert not any(m.bytes or m.arrivals != m.needed for m in program.mbarriers.values()), (
                "in mid-phase at the end"
            )
        assert not (self.written & self.read).any(), "a word that is written was read without a wait"
        made = [places[results[number]] for number in range(len(out))]
        return [self.memory[at : at + a.nbytes].copy().view(a.dtype).reshape(a.shape) for at, a in made]

    def take_turns(self, warps, work):
        """Let warps do their work, one at a time, until all have ended; AssertionError if that never is."""
        threads = [threading.Thread(target=self.live, args=(warp, work), daemon=True) for warp in warps]
        for warp, thread in zip(warps, threads, strict=True):
            warp.turn, warp.ready = threading.Semaphore(0), lambda: True  # ready is None when the warp has ended
            thread.start()
        end, left = time.monotonic() + TIMEOUT, list(warps)
        while left and self.failure is None:
            start = self.random.randrange(len(left))
            self.current = next((warp for warp in left[start:] + left[:start] if warp.ready()), None)
            if self.current is not None:
                self.current.turn.release()
                if not self.turn.acquire(timeout=max(0, end - time.monotonic())):
                    self.failure = "a warp neither ends nor waits"
                elif self.current.ready is None:
                    left.remove(self.current)
            elif self.copies:
                self.copies.pop(self.random.randrange(len(self.copies)))()
            else:
                names = ", ".join(f"{warp.program.number}/{warp.number}" for warp in left)
                self.failure = f"all warps (program/warp) wait for what never comes: {names}"
        for warp in warps:
            warp.turn.release()
        for thread in threads:
            thread.join(max(1, end - time.monotonic()))
        assert self.failure is None, self.failure
        assert not self.copies, "copies are under way at the end"

    def live(self, warp, work):
        warp.turn.acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):  # a GPU does not warn
                    work()
        except Stop:
            return
        except BaseException:
            self.failure = f"program {warp.program.number}, warp {warp.number}: {traceback.format_exc()}"
        warp.ready = None
        self.turn.release()

    def wait(self, ready):
        """Come back when ready() is true."""
        if not ready():
            warp = self.current
            warp.ready = ready
            self.turn.release()
            warp.turn.acquire()
            if self.failure is not None:
                raise Stop

    def words(self, address, on, right=1):
        """Places, in words, of the words at addresses in global memory; all those that are on have to exist."""
        assert address.dtype == np.int64
        place = address - GLOBAL
        used = place[on]
        assert not (used % 4).any(), "not aligned"
        assert ((used >= 0) & (used < self.rights.size)).all() and (self.rights[used] >= right).all(), "outside"
        return np.where(on, place // 4, 0)


class Tensor(np.ndarray):
    """The values of a warp's lanes [32], or one [] that is that of all."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)

    def __mod__(self, other):
        return np.fmod(self, other)  # as in C

    def __rmod__(self, other):
        return np.fmod(other, self)

    def __floordiv__(self, other):
        return np.floor_divide(self - np.fmod(self, other), other)

    def __rfloordiv__(self, other):
        return np.floor_divide(other - np.fmod(other, self), self)

    # values do not change: another name may stand for them
    __iadd__ = np.ndarray.__add__
    __isub__ = np.ndarray.__sub__
    __imul__ = np.ndarray.__mul__


def tensor(value, dtype=None):
    """A Tensor; of a number of Python's one of float32 or int32."""
    if dtype is None and isinstance(value, (bool, int, float)):
        dtype = np.float32 if isinstance(value, float) else np.int32 if abs(value) < 1 << 31 else np.int64
    return np.asarray(value, dtype).view(Tensor)


def lanes(value):
    """A value for each of 32 lanes."""
    value = np.asarray(value)
    return value if value.shape == (32,) else np.full(32, value, value.dtype)


def numbers(values, dtype):
    """What is in the last axis of values, in another type."""
    return np.ascontiguousarray(values).view(np.ndarray).view(dtype)


def plain(module, **names):
    """A module's names with its kernels as functions of Python, constants as numbers, and other names besides."""
    found = vars(module) | names
    for name, value in list(found.items()):
        function = getattr(value, "fn", None)
        if isinstance(value, gl.constexpr):
            found[name] = value.value
        elif isinstance(function, types.FunctionType):
            found[name] = types.FunctionType(function.__code__, found, name, function.__defaults__)
    return found


def language(launch):
    """As much of Gluon's language as is needed."""

    def both(function):
        def call(x, y):
            alone = not isinstance(x, np.ndarray) and not isinstance(y, np.ndarray)
            return function(tensor(x), y) if alone else function(x, y)

        return call

    shared = SimpleNamespace(index=lambda _: SimpleNamespace(store=lambda _: None), _keep_alive=lambda: None)
    return SimpleNamespace(
        constexpr=None, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=BFLOAT16, static_range=range,
        BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        allocate_shared_memory=lambda *_: shared,
        arange=lambda _, __, layout: tensor(launch.current.number * 32 + LANES, np.int32),
        program_id=lambda _: tensor(launch.current.program.number),
        load=lambda address: tensor(launch.memory.view(np.int32)[launch.words(address, True)]),
        minimum=both(np.fmin), maximum=both(np.fmax), to_tensor=tensor, cast=lambda value, to: tensor(value).to(to),
        where=lambda c, x, y: both(lambda x, y: np.where(c, x, y))(x, y).view(Tensor),
        zeros_like=np.zeros_like, exp=np.exp, exp2=np.exp2, rsqrt=lambda x: np.float32(1) / np.sqrt(x),
    )  # fmt: skip


class Instructions:
    """`jaxllm.kernels.ptx`, for the warp whose turn it is."""

    def __init__(self, launch):
        self._launch = launch
        self.warp_index = lambda: tensor(launch.current.number)
        self.shared_base = lambda: tensor(SHARED)
        self.load_shared = lambda address: self._load(address, np.float32)
        self.load_shared_int64 = lambda address: self._load(address, np.int64)
        self.load_flag = lambda address: self._load(address, np.int32)
        self.load_float = lambda address: self.load_words(address, 1, 1, 1, 0)[0].view(np.float32)
        self.warp_barrier = self.mbarrier_fence = lambda: None
        self.mbarrier_arrive = lambda address: self._count(self._mbarrier(address), 1, 0)
        self.evict_first = self.evict_normal = lambda: tensor(0, np.int64)
        self.other_lane = lambda value, distance: tensor(lanes(value)[LANES ^ distance])
        self.highest_lane = lambda value: tensor(np.full(32, value.max()))

    def _program(self):
        return self._launch.current.program

    def _shared(self, address, size, dtype):
        """Shared memory as rows of so many bytes, and which of them are at address."""
        address = np.asarray(address)
        assert address.dtype == np.int32 and not (address & (size - 1)).any() and address.min() >= SHARED
        return self._program().memory.reshape(-1, size).view(dtype), address // size

    def _first(self):
        return self._launch.current.number == 0

    # shared memory

    def store_shared(self, address, value, mask):
        memory, rows = self._shared(lanes(address), 4, np.int32)
        mask = lanes(mask)
        memory[rows[mask], 0] = lanes(value).view(np.int32)[mask]

    def store_shared_pair(self, address, first, second):
        memory, rows = self._shared(lanes(address), 8, np.int32)
        memory[rows] = np.stack([lanes(first), lanes(second)], 1)

    def zero_shared(self, address):
        memory, rows = self._shared(address, 16, np.int32)
        memory[rows] = 0

    def store_12_pointers(self, address, pointers):
        if self._first():
            assert len(pointers) == 12
            memory, row = self._shared(address, 8, np.int64)
            memory[row : row + 12, 0] = pointers

    def store_flag(self, address, value):
        if self._first():
            memory, row = self._shared(address, 4, np.int32)
            memory[row, 0] = value

    def load_shared_words(self, address):
        memory, rows = self._shared(lanes(address), 16, np.int32)
        return tuple(tensor(word) for word in memory[rows].T)

    def _load(self, address, dtype):
        memory, rows = self._shared(address, np.dtype(dtype).itemsize, dtype)
        return tensor(memory[rows, 0])

    def sum_shared(self, address, count):
        memory, rows = self._shared(address, 16, np.float32)
        sums = memory[rows[..., None] + np.arange(count // 4)].sum(-2)
        return (sums[..., 0] + sums[..., 1] + (sums[..., 2] + sums[..., 3])).view(Tensor)

    def sum_pairs(self, address, count, stride):
        places = lanes(address)[:, None] + np.arange(count, dtype=np.int32) * np.int32(stride)
        memory, rows = self._shared(places, 8, np.float32)
        return tuple(memory[rows].sum(1).T.view(Tensor))

    def add_sums(self, address, sums, more, mask):
        memory, rows = self._shared(lanes(address), 4 * len(sums), np.float32)
        on = lanes(mask)
        old = np.where(lanes(more)[on, None], memory[rows[on]], np.float32(0))
        memory[rows[on]] = old + np.stack([lanes(v)[on] for v in sums], -1)

    # barriers

    def barrier(self, number, threads):
        state = self._program().barriers.setdefault(number, SimpleNamespace(arrived=0, phase=0, threads=threads))
        assert state.threads == threads
        phase, state.arrived = state.phase, state.arrived + 32
        if state.arrived == threads:
            state.arrived, state.phase = 0, phase + 1
        self._launch.wait(lambda: state.phase != phase)

    def mbarrier_init(self, address, arrivals):
        if self._first():
            assert address % 8 == 0
            state = SimpleNamespace(needed=arrivals, arrivals=arrivals, bytes=0, phase=0)
            self._program().mbarriers[int(address)] = state

    def _mbarrier(self, address):
        return self._program().mbarriers[int(address)]

    @staticmethod
    def _count(mbarrier, arrivals, copied):
        mbarrier.arrivals -= arrivals
        mbarrier.bytes -= copied
        if mbarrier.arrivals == mbarrier.bytes == 0:
            mbarrier.arrivals, mbarrier.phase = mbarrier.needed, mbarrier.phase + 1

    def mbarrier_wait(self, address, parity):
        mbarrier = self._mbarrier(address)
        self._launch.wait(lambda: (mbarrier.phase - 1) % 2 == parity)

    # copies

    def _row(self, source, size):
        """The place of bytes in global memory that are copied."""
        assert source % 16 == 0 and size % 16 == 0 and np.asarray(source).dtype == np.int64
        begin = int(source) - GLOBAL
        rights = self._launch.rights[begin : begin + int(size)]
        assert begin >= 0 and len(rights) == size and rights.all(), "outside"
        return slice(begin, begin + int(size))

    def copy_rows(self, target, source, row_bytes, mask, mbarrier, all_bytes, policy):
        launch, memory = self._launch, self._program().memory
        mbarrier, mask = self._mbarrier(mbarrier), lanes(mask)
        target, source, sizes = (lanes(of)[mask] for of in (target, source, row_bytes))
        assert sizes.sum() == all_bytes, "not the bytes that the mbarrier expects"
        assert mbarrier.bytes == 0 and mbarrier.arrivals == mbarrier.needed, "a copy to a slot that is being filled"
        self._count(mbarrier, 1, -int(all_bytes))
        rows = [(int(to), self._row(*row)) for to, *row in zip(target, source, sizes, strict=True)]
        for to, row in rows:
            assert to % 16 == 0 and to >= SHARED and to + row.stop - row.start <= len(memory)
            launch.read[row.start // 4 : row.stop // 4] = True

        def copy():
            for to, row in rows:
                memory[to : to + row.stop - row.start] = launch.memory[row]
                self._count(mbarrier, 0, row.stop - row.start)

        if launch.random.random() < 0.5:
            copy()
        else:
            launch.copies.append(copy)

    # words in global memory

    def _places(self, address, n, rows, count, width, row_stride, stride):
        """Which of the words [32, rows * count, width] of each lane exist, and their places in global memory."""
        offsets = np.arange(rows)[:, None] * row_stride + np.arange(count) * stride
        groups = lanes(address)[:, None] + offsets.reshape(-1)
        on = np.tile(np.arange(count) < lanes(n)[:, None], rows)
        assert not (groups[on] % (4 * min(width, 4))).any(), "not aligned"
        on = np.broadcast_to(on[..., None], (32, rows * count, width))
        return on, self._launch.words(groups[..., None] + 4 * np.arange(width), on)

    def load_words(self, address, n, count, width, stride, wait=False, rows=1, row_stride=0):
        launch, memory = self._launch, self._launch.memory.view(np.int32)
        on, places = self._places(address, n, rows, count, width, row_stride, stride)
        used = places[on]
        if wait and used.size:
            launch.wait(lambda: memory[used[-1]] != 0 and memory[used].all())
        else:
            launch.read[used] = True
        words = np.where(on, memory[places], 0)
        if np.ndim(address) == 0:  # as all lanes do the same
            words = words[0]
        return tuple(tensor(words[..., i, j]) for i in range(rows * count) for j in range(width))

    def load_rows(self, address, n, row_stride, rows, count, width, stride):
        on, places = self._places(address, n, rows, count, width, row_stride, stride)
        memory = self._launch.memory.view(np.int32)
        words = np.where(on & (self._launch.random.random() < 0.5), memory[places], 0)
        return tuple(tensor(word) for word in words.reshape(32, -1).T)

    def wait_for_rows(self, words, address, n, row_stride, rows, count, width, stride):
        found = self.load_words(address, n, count, width, stride, True, rows, row_stride)
        assert all(((word == 0) | (word == there)).all() for word, there in zip(words, found, strict=True))
        return found

    def store_word(self, address, value, mask):
        launch, mask = self._launch, lanes(mask)
        places = launch.words(lanes(address), mask, 2)[mask]
        assert len(set(places.tolist())) == len(places) and not launch.written[places].any(), "written twice"
        launch.written[places] = True
        launch.memory.view(np.int32)[places] = lanes(value).view(np.int32)[mask]

    # between lanes

    def sum_lanes(self, value, distances):
        value = lanes(value)
        for distance in distances:
            value = value + value[LANES ^ distance]
        return value.view(Tensor)

    # numbers

    def pack_bfloat16(self, low, high):
        return numbers(np.stack([lanes(low), lanes(high)], -1).astype(BFLOAT16), np.int32)[:, 0].view(Tensor)

    def max_of_magnitudes(self, peak, pair):
        pairs = [numbers(lanes(words)[:, None], BFLOAT16).astype(np.float32) for words in (peak, pair)]
        return self.pack_bfloat16(*np.maximum(pairs[0], abs(pairs[1])).T)

    def multiply_bfloat16(self, pair, other):
        a, b = (numbers(lanes(words)[:, None], BFLOAT16).astype(np.float32) for words in (pair, other))
        return self.pack_bfloat16(*(a * b).T)

    def two_digits(self, *words):
        digits = numbers(np.stack(words, -1)[..., None], np.uint8)  # [lane, word, byte]
        digits = digits[:, :, 1], digits[:, :, 0] ^ 128
        return tuple(numbers(digit, np.int32)[:, 0].view(Tensor) for digit in digits)

    def transpose_bytes(self, *words):
        parts = numbers(np.stack(words, -1)[..., None], np.uint8)  # [lane, word, byte]
        return tuple(numbers(parts[:, :, byte], np.int32)[:, 0].view(Tensor) for byte in (2, 1, 0))

    def multiply_tile(self, sums, w, x, mask, size, steps):
        dtype = {1: np.int8, 2: BFLOAT16, 4: np.float32}[size]
        memory, w = self._shared(lanes(w), 16, dtype)
        _, x = self._shared(lanes(x), 16, dtype)
        step = 4 * np.arange(steps)
        w, x = memory[w[:, None] + step], memory[x[:, None] + step]  # [lane, step, number]
        x[~lanes(mask)] = 0
        if size == 4:
            return tuple((sums[i] + (w[..., i] * x[..., i]).sum(-1)).view(Tensor) for i in range(4))
        results = list(sums)
        for half in range(2):
            a, b = (v.reshape(8, 4 * steps, 2, -1)[:, :, half].astype(np.float64).reshape(8, -1) for v in (x, w))
            products = (a @ b.T).reshape(8, 4, 2)[LANES // 4, LANES % 4]  # of a row of x with two of w
            for i in range(2):
                results[2 * half + i] = (results[2 * half + i] + products[:, i]).astype(sums[0].dtype)
        return tuple(results)

    def multiply_full_tile(self, sums, w, x, y, mask, steps):
        x, y = ([*sums[i : i + 2], *sums[i + 4 : i + 6]] for i in (0, 2)), (x, y)
        x, y = (self.multiply_tile(part, w, place, mask, 1, steps) for part, place in zip(*(x, y), strict=True))
        return *x[:2], *y[:2], *x[2:], *y[2:]
