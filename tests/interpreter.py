"""Triton kernels on a CPU: a `jax_triton` for tests, which runs kernels in Triton's own interpreter on numpy arrays.

Import this before any module with kernels: a kernel is made for the interpreter, or not, when it is defined.
"""

import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as _interpreter  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

POISON = 0x5D  # every byte of what a kernel has to write: 1e18 as float32 and bfloat16, 93 as int8


class _Storage:
    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        assert other is self or np.shares_memory(other.array, self.array)


class _Tensor:
    """As much of a torch.Tensor as the interpreter asks for, over a numpy array."""

    def __init__(self, array):
        self.array, self.storage = array, _Storage(array)
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self.storage

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.storage, self.array = storage, storage.array


def triton_call(*arrays, kernel, out_type, grid, input_output_aliases=None, num_warps=4, num_stages=2, **constants):
    """`jax_triton.triton_call`, in the interpreter; what a kernel does not write stays poison."""
    assert isinstance(kernel, InterpretedFunction), "the kernel was defined before tests/interpreter.py was imported"
    assert num_warps & (num_warps - 1) == 0 and num_warps <= 32
    leaves, tree = jax.tree.flatten(out_type)
    same = dict(input_output_aliases or {})

    def run(*arrays):
        given = [np.array(array) for array in arrays]  # copies: jax's own must not be written
        results = [np.full(leaf.size * leaf.dtype.itemsize, POISON, np.uint8).view(leaf.dtype) for leaf in leaves]
        results = [result.reshape(leaf.shape) for result, leaf in zip(results, leaves, strict=True)]
        for source, target in same.items():
            assert (given[source].shape, given[source].dtype) == (leaves[target].shape, leaves[target].dtype)
            results[target] = given[source]
        fresh = [result for number, result in enumerate(results) if number not in same.values()]
        with np.errstate(all="ignore"):  # a GPU does not warn
            kernel[grid](*map(_Tensor, (*given, *fresh)), **constants)
        return tuple(results)

    return jax.tree.unflatten(tree, jax.pure_callback(run, tuple(leaves), *arrays))


_convert_float = _interpreter._convert_float
_NUMPY = {tl.bfloat16: np.dtype(ml_dtypes.bfloat16), tl.float32: np.dtype(np.float32)}


def _convert(array, source, target, rounding):
    """Between float32 and bfloat16 as a GPU does it, to the nearest: the interpreter cuts off."""
    if source not in _NUMPY or target not in _NUMPY:
        return _convert_float(array, source, target, rounding)
    values = np.ascontiguousarray(array).view(_NUMPY[source]).astype(_NUMPY[target])
    return values.view(np.uint16 if target == tl.bfloat16 else np.uint32)


_interpreter._convert_float = _convert
sys.modules["jax_triton"] = SimpleNamespace(triton_call=triton_call)
