"""The order of the house: imports go down the floors of the design, and nothing unpickles or needs PyTorch."""

import ast
import pickle
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": -1,  # below all others
    "config": 0,
    "tensor": 0,
    "tokenizer": 0,
    "kernels": 0,
    "chat_template": 0,
    "chat": 1,
    "quantize": 1,
    "ops": 2,
    "model": 3,
    "sampling": 3,
    "pipeline": 4,
    "sharding": 4,
    "resources": 5,
    "loader": 6,
    "generate": 7,
    "convert": 7,
    "__init__": 7,
}
FILES = {f"jaxllm.{file.stem}": file for file in (ROOT / "jaxllm").glob("*.py")}
FILES |= {f"jaxllm.{part}.{file.stem}": file for part in ("kernels", "convert") for file in (ROOT / part).glob("*.py")}


def place(module):
    """The name in FLOORS of a module of ours: of a package, the package's."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree):
    """The full name of every module that a syntax tree imports, also in functions and by name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute in this house"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # a module, or a name in node.module
                is_module = inner in FILES or inner in ("jaxllm.kernels", "jaxllm.convert")
                yield inner if is_module else node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # such as a lazy "jaxllm.kernels.rope:triton"
            if name := re.fullmatch(r"(jaxllm\.[\w.]+)(:\w+)?", node.value):
                yield name[1]


def test_every_module_has_a_floor():
    assert {place(module) for module in FILES} <= FLOORS.keys()
    assert len(FILES) >= 17


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module):
    own = place(module)
    for imported in imports(ast.parse(FILES[module].read_text())):
        if imported.split(".")[0] != "jaxllm":
            continue
        other = place(imported)
        inside = own == other and own in ("convert", "kernels") and module != imported
        assert FLOORS[other] < FLOORS[own] or inside, f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_torch_and_no_pickle(module):
    tree = ast.parse(FILES[module].read_text())
    roots = {name.split(".")[0] for name in imports(tree)}
    assert not roots & {"torch", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    if module != "jaxllm.convert.pth":
        assert "pickle" not in roots
        return
    # the reader of pickles names their opcodes, which are bytes, and uses nothing else of the module
    from_imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "pickle"}
    assert used and not from_imports
    assert all(isinstance(getattr(pickle, name), bytes) for name in used)


def test_the_rules_see_what_they_are_for():
    def found(code):
        return list(imports(ast.parse(code)))

    assert found("def f():\n    from jaxllm import ops, __version__") == ["jaxllm.ops", "jaxllm"]
    assert found("from jaxllm.model import forward\nimport torch.nn") == ["jaxllm.model", "torch.nn"]
    assert found("x = lazy('jaxllm.kernels.rope:triton')") == ["jaxllm.kernels.rope"]
    assert [place(m) for m in ("jaxllm", "jaxllm.ops", "jaxllm.kernels.rope")] == ["__init__", "ops", "kernels"]


@pytest.mark.parametrize("file", sorted((ROOT / "bench").glob("*.py")), ids=lambda file: file.stem)
def test_benches_find_what_they_import(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    runpy.run_path(str(file), run_name="imported")
