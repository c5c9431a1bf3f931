"""A Pallas kernel for Mosaic GPU as plain Python on a CPU, warp group by warp group.

Each warp group has a thread; they take turns as in `gluon_emulator`, in an order that a seed says, and a run in which
all wait fails at once.  The seed also says whether a copy arrives, or a product is made, when it is issued or as
late as possible.  Shared memory is NaN at first, and where a copy is under way.  (Pallas' own interpreter has no
accumulators that begin with values, no products of what is in registers, and makes all products at once.)

Checked are: each phase of a barrier is waited for before the next one ends; what was stored in shared memory is
committed before tensor cores or copies read it; global memory is read inside of arrays, except by copies, which give
zeros outside; every word of the results is written once; nothing is left under way.

Not modelled are: layouts and transforms, registers, the compiler, and warps of a group that are not in step.
"""

import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
from gluon_emulator import Launch


def load(module, seed=0, **constants):
    """A copy of a module of kernels, with other constants, that runs here."""
    spec = importlib.util.spec_from_file_location("emulated_mosaic", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    machine = Machine(seed)
    for name, value in list(vars(copy).items()):  # not traced
        setattr(copy, name, getattr(value, "__wrapped__", value) if hasattr(value, "trace") else value)
    copy.jnp, copy.lax, copy.pl, copy.plgpu = np, machine, machine, machine
    vars(copy).update(constants)
    return copy


class Slice(SimpleNamespace):
    """`pl.ds`."""


class Ref:
    """A part of an array in shared or global memory: of all axes a number, or a begin and an end."""

    def __init__(self, memory, ranges, turned=False):
        self.memory, self.ranges, self.turned = memory, ranges, turned

    at = property(lambda self: self)
    dtype = property(lambda self: self.memory.array.dtype)

    @property
    def shape(self):
        shape = tuple(r[1] - r[0] for r in self.ranges if isinstance(r, tuple))
        return shape[::-1] if self.turned else shape

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        ranges, index = [], iter(() if index == (...,) else index)
        for old in self.ranges:
            new = old if not isinstance(old, tuple) else next(index, None)
            if isinstance(new, Slice):
                new = (old[0] + int(new.start), old[0] + int(new.start) + new.size)
            elif isinstance(old, tuple):
                new = old if new is None else old[0] + int(new)
            ranges.append(new)
        assert next(index, None) is None
        part = Ref(self.memory, ranges)
        return part.array[()] if not part.shape else part

    def transpose(self, axes):
        assert axes == (1, 0)
        return Ref(self.memory, self.ranges, turned=True)

    def __setitem__(self, index, values):
        part = self[index]
        assert values.dtype == part.array.dtype and values.shape == part.shape
        part.array[...] = values
        part._view(self.memory.storing)[...] = self.memory.machine.launch.current.number

    def committed(self):
        """The array, for tensor cores and copies."""
        assert (self._view(self.memory.storing) < 0).all(), "stored and not committed"
        return self.array

    @property
    def array(self):
        return self._view(self.memory.array)

    def _view(self, array):
        """A view of the part, which has to be inside."""
        for r, size in zip(self.ranges, array.shape, strict=True):
            low, high = r if isinstance(r, tuple) else (r, r + 1)
            assert 0 <= low < high <= size, "outside"
        view = array[tuple(slice(*r) if isinstance(r, tuple) else r for r in self.ranges)]
        return view.T if self.turned else view

    def inside(self):
        """Of the part, and of the array that it is a part of, what is inside of both."""
        mine, its = [], []
        for r, size in zip(self.ranges, self.memory.array.shape, strict=True):
            if isinstance(r, tuple):
                length = max(0, min(r[1], size) - r[0])
                mine.append(slice(length))
                its.append(slice(r[0], r[0] + length))
            else:
                its.append(r)
        return tuple(mine), tuple(its)


def whole(array, machine=None):
    """A Ref to an array in global memory, or in a machine's shared memory: there it is known who stores."""
    memory = SimpleNamespace(array=array, machine=machine, storing=machine and np.full(array.shape, -1))
    return Ref(memory, [(0, size) for size in array.shape])


class Accumulator:
    """Registers that tensor cores add to."""

    def __init__(self, machine, shape):
        self.machine, self.shape, self.values = machine, shape, np.zeros(shape, np.float32)

    def __getitem__(self, index):
        return self.machine.wgmma_accumulator_load(self)

    def __setitem__(self, index, values):
        assert values.shape == self.shape and values.dtype == np.float32
        self.values = values


class Barriers(list):
    """Barriers by number; one that is alone needs none."""

    at = property(lambda self: self)


class Machine:
    """As much of `jax.lax`, `jax.experimental.pallas` and its `mosaic_gpu` as is needed."""

    Layout = SimpleNamespace(WGMMA=SimpleNamespace(reduce=lambda _: None))
    TilingTransform = SwizzleTransform = CompilerParams = staticmethod(lambda *_, **__: None)
    set_max_registers = staticmethod(lambda *_, **__: None)
    layout_cast = staticmethod(lambda x, _: x)
    optimization_barrier = staticmethod(lambda x: x)
    rem = staticmethod(np.fmod)
    div = staticmethod(lambda x, y: np.int32(int(x) // int(y)))
    cdiv = staticmethod(lambda x, y: -(-x // y))
    ds = staticmethod(lambda start, size: Slice(start=start, size=size))
    load = staticmethod(lambda ref, layout=None, optimized=True: ref.array.copy())
    when = staticmethod(lambda condition: lambda function: function() if condition else None)

    def __init__(self, seed):
        self.seed = seed

    def kernel(self, body, *, out_type, grid, grid_names, num_threads, thread_name, scratch_types, compiler_params):
        """`plgpu.kernel`: programs run one after the other."""

        def call(*arrays):
            given = [whole(np.array(array)) for array in arrays]
            out = whole(np.zeros(out_type.shape, out_type.dtype))
            self.written, self.sizes = np.zeros(out_type.shape, int), dict(zip(grid_names, grid, strict=True))
            for number, place in enumerate(np.ndindex(*grid)):
                self.launch = Launch(self.seed * 10**6 + number)
                self.tiles = []
                scratch = jax.tree.map(lambda make: make(), scratch_types)
                program = SimpleNamespace(number=number)
                groups = [
                    SimpleNamespace(
                        program=program, number=group, products=[], stores=[], waits={},
                        axes=dict(zip(grid_names, place, strict=True)) | {thread_name: group},
                    )
                    for group in range(num_threads)
                ]  # fmt: skip
                self.launch.take_turns(groups, lambda scratch=scratch: body(*given, out, *scratch))
                assert not any(group.products or group.stores for group in groups), "under way at the end"
            assert (self.written == 1).all(), "not every result was written once"
            return out.memory.array

        return call

    def axis_index(self, name):
        return np.int32(self.launch.current.axes[name])

    def axis_size(self, name):
        return self.sizes[name]

    # control and numbers

    @staticmethod
    def fori_loop(begin, end, body, carry):
        for step in range(int(begin), int(end)):
            carry = body(np.int32(step), carry)
        return carry

    @staticmethod
    def run_scoped(function, *types):
        return function(*(make() for make in types))

    @staticmethod
    def broadcast_in_dim(x, shape, axes):
        return np.broadcast_to(np.expand_dims(x, [i for i in range(len(shape)) if i not in axes]), shape)

    @staticmethod
    def broadcasted_iota(dtype, shape, axis, layout=None):
        return np.broadcast_to(np.expand_dims(np.arange(shape[axis], dtype=dtype), 1 - axis), shape)

    # what is in shared memory or registers

    def SMEM(self, shape, dtype, transforms=()):
        def make():
            self.tiles.append(whole(np.full(shape, np.nan, dtype), self))
            return self.tiles[-1]

        return make

    def ACC(self, shape, dtype):
        assert dtype == np.float32
        return lambda: Accumulator(self, shape)

    def Barrier(self, num_arrivals=1, num_barriers=None):
        def make():
            state = [SimpleNamespace(needed=num_arrivals, left=num_arrivals, phase=0) for _ in range(num_barriers or 1)]
            return state[0] if num_barriers is None else Barriers(state)

        return make

    def commit_smem(self):
        for tile in self.tiles:
            storing = tile.memory.storing
            storing[storing == self.launch.current.number] = -1

    # barriers

    @staticmethod
    def barrier_arrive(barrier):
        barrier.left -= 1
        if barrier.left == 0:
            barrier.left, barrier.phase = barrier.needed, barrier.phase + 1

    def barrier_wait(self, barrier):
        waits = self.launch.current.waits
        number = waits[id(barrier)] = waits.get(id(barrier), 0) + 1
        self.launch.wait(lambda: barrier.phase >= number)
        assert barrier.phase == number, "a phase was over before it was waited for"

    def _let_others_run(self):
        answers = iter([False])
        self.launch.wait(lambda: next(answers, True))

    # copies

    def copy_gmem_to_smem(self, source, target, barrier):
        mine, its = source.inside()
        values = np.zeros(source.shape, source.memory.array.dtype)
        values[mine] = source.memory.array[its]
        target.committed()[...] = np.nan

        def arrive():
            target.array[...] = values
            self.barrier_arrive(barrier)

        self._now_or_later(arrive, self.launch.copies)

    def copy_smem_to_gmem(self, source, target):
        def store():
            mine, its = target.inside()
            target.memory.array[its] = source.committed()[mine]
            self.written[its] += 1

        self._now_or_later(store, self.launch.current.stores)

    def wait_smem_to_gmem(self, n, wait_read_only=False):
        self._let_others_run()
        stores = self.launch.current.stores
        while len(stores) > n:
            stores.pop(0)()

    def _now_or_later(self, work, queue):
        if self.launch.random.random() < 0.5 and (queue is self.launch.copies or not queue):
            work()
        else:
            queue.append(work)

    # products

    def wgmma(self, accumulator, a, b):
        def multiply():
            x, y = (m.committed() if isinstance(m, Ref) else m for m in (a, b))
            assert x.dtype == y.dtype
            accumulator.values = accumulator.values + x.astype(np.float32) @ y.astype(np.float32)

        multiply.accumulator = accumulator
        self._now_or_later(multiply, self.launch.current.products)

    def wgmma_accumulator_load(self, accumulator, wait_n=0):
        self._let_others_run()
        products = self.launch.current.products
        while len(products) > wait_n:
            products.pop(0)()
        assert all(product.accumulator is not accumulator for product in products), "read before its product is made"
        return accumulator.values
