"""A kernel that was made is kept, and taken only for what it was made of."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import pytest

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from jaxllm.kernels import launch  # noqa: E402


@JITFunction  # triton.jit makes something else where the suite runs kernels in the interpreter
def _double(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, 2 * tl.load(x + at))


@JITFunction
def _triple(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, 3 * tl.load(x + at))


@gluon.jit
def _gluon(x, out, COUNT: gl.constexpr):
    gl.store(out, gl.load(x))


@dataclass
class Result:
    """jax_triton.triton_lib.CompilationResult."""

    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str = "much"
    llir: str = "more"
    global_scratch_size: int | None = None
    tensordesc_meta: tuple = ()


class Library:
    """Of jax_triton.triton_lib what matters here: kernels are tuples of what they are made of."""

    CompilationResult = Result
    triton_kernel_call_lib = SimpleNamespace(TritonKernel=lambda *arguments: arguments)

    def __init__(self):
        self.calls, self.scratch = 0, None

    def make(self, function, spec, target, backend, backend_options):
        self.calls += 1
        warps, programs = backend_options["num_warps"], backend_options["num_ctas"]
        ir, options = f"IR of {spec.constants}", backend.parse_options(backend_options)
        result = Result(f"PTX for {target.arch}", function.fn.__name__, 128, global_scratch_size=self.scratch)
        kernel = result.name, warps, programs, result.shared_mem_bytes, result.binary, ir, target.arch
        return kernel, ir, options, result


@pytest.fixture
def make(tmp_path):
    """make(function, ...): a kernel; .library counts how many were made, .folder is where they are kept."""
    library = Library()
    backend = SimpleNamespace(parse_options=lambda options: SimpleNamespace(hash=lambda: str(options)))

    def call(function=_double, capability=90, count=16, warps=4, versions=("1", "1"), of="*fp32"):
        spec = SimpleNamespace(
            signature={"x": of, "out": of, "COUNT": "constexpr"}, constants={"COUNT": count}, attrs={}
        )
        options = {"num_warps": warps, "num_ctas": 1}
        target = SimpleNamespace(arch=capability)
        function = SimpleNamespace(fn=function)
        kernel, ir, _, result = launch._kernel(
            function, library, library.make, versions, spec, target, backend, options
        )
        assert kernel[5] == ir and kernel[4] == result.binary and kernel[3] == result.shared_mem_bytes
        return kernel

    call.library, call.folder = library, tmp_path / "cache"
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(call.folder))
    yield call
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_made_once(make):
    others = [{"function": _triple}, {"function": _gluon}, {"capability": 80}, {"count": 32}, {"warps": 8}]
    others += [{"versions": ("1", "2")}, {"of": "*bf16"}]
    made = [make(), *(make(**other) for other in others)]
    assert make.library.calls == 8 and len(list(make.folder.iterdir())) == 8
    assert [make(), *(make(**other) for other in others)] == made
    assert make.library.calls == 8
    assert made[0] == ("_double", 4, 1, 128, "PTX for 90", "IR of {'COUNT': 16}", 90)


@pytest.mark.parametrize("content", ["", "{", "[]", '["IR"]', '["IR", {"binary": "ptx"}]', '["IR", {"something": 1}]'])
def test_a_damaged_file_is_made_again(make, content):
    made = make()
    (file,) = make.folder.iterdir()
    file.write_text(content)
    assert make() == made and make.library.calls == 2
    assert make() == made and make.library.calls == 2


def test_a_kernel_with_memory_of_its_own_is_not_kept(make):
    make.library.scratch = 64
    make()
    make()
    assert make.library.calls == 2


def test_without_a_folder(make):
    make.folder.write_text("a file, where a folder should be")
    for folder in str(make.folder), None:
        jax.config.update("jax_compilation_cache_dir", folder)
        calls = make.library.calls
        assert make() == make()
        assert make.library.calls == calls + 2
