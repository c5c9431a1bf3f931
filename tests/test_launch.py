"""What Triton's compiler made is kept, and taken only for what it was made of."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import pytest

pytest.importorskip("triton")
from jaxllm.kernels import launch


@dataclass
class Result:
    """Of jax_triton.triton_lib.CompilationResult, what matters here."""

    binary: str
    shared_mem_bytes: int
    ttgir: str = ""
    llir: str = ""
    tensordesc_meta: tuple = ()


class Compiler:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, backend, options, target):
        self.calls += 1
        return Result(f"ptx of {module} for {target}", 128, "much", "more", [])


def options(name):
    return SimpleNamespace(hash=lambda: name)


@pytest.fixture
def compile(tmp_path):
    """compile(module, options, target, versions); .compiler counts its calls, .folder is where results are kept."""
    compiler, library = Compiler(), SimpleNamespace(CompilationResult=Result)

    def call(module, of, target="sm_90", versions=("1", "1")):
        return launch._compile(library, compiler, versions, module, None, options(of), target)

    call.compiler, call.folder = compiler, tmp_path / "cache"
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(call.folder))
    yield call
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_compiled_once(compile):
    first, second = compile("module", "options"), compile("module", "options")
    assert compile.compiler.calls == 1
    assert (first.binary, first.shared_mem_bytes) == (second.binary, second.shared_mem_bytes)
    assert second.binary == "ptx of module for sm_90"
    compile("another module", "options")
    compile("module", "other options")
    assert compile("module", "options", "sm_80").binary == "ptx of module for sm_80"
    compile("module", "options", versions=("1", "2"))
    assert compile.compiler.calls == 5
    assert len(list(compile.folder.iterdir())) == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"binary": "ptx"}', '{"something": 1}'])
def test_a_damaged_file_is_made_again(compile, content):
    compile("module", "options")
    (file,) = compile.folder.iterdir()
    file.write_text(content)
    assert compile("module", "options").shared_mem_bytes == 128
    assert compile.compiler.calls == 2
    assert json.loads(file.read_text())["shared_mem_bytes"] == 128


def test_without_a_folder(compile, tmp_path):
    compile.folder.write_text("a file, where a folder should be")
    for folder in str(compile.folder), None:
        jax.config.update("jax_compilation_cache_dir", folder)
        calls = compile.compiler.calls
        assert compile("module", "options").binary == compile("module", "options").binary
        assert compile.compiler.calls == calls + 2
