"""The house rules: sizes, and imports that go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted(p for p in ROOT.glob("**/*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs"))
# From the experiments down to what everybody may use; a module imports from rows below its own, or of its package.
LAYERS = [
    {"figures", "bench", "scripts"},
    {"bench_sides"},
    {"main"},
    {"sampling", "full_gradients", "report"},
    {"landscape"},
    {"progress"},
    {"training"},
    {"record", "graphed", "shb", "data", "measure", "windows"},
    {"checkpoints", "dashboard", "owner"},
    {"utils", "state"},
    {"arguments"},
    {"datasets", "models", "converters", "combinations"},
    {"files", "messages"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def name(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """The modules of ours that a file imports, by the first part of their names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_long(path):
    text = path.read_text()
    assert text.count("\n") <= 260
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    up = [other for other in imported(path) - {name(path)} if LEVEL[other] <= LEVEL[name(path)]]
    assert not up


@pytest.mark.parametrize("package", ["measure"])
def test_the_instrument_can_be_copied(package):
    for path in ROOT.glob(f"{package}/*.py"):
        assert imported(path) <= {package}, path


def test_arguments_and_states_are_read_without_torch():
    program = "import arguments, state, sys; arguments.parse([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_file_says_what_it_is_about():
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in FILES if path.stat().st_size)
    assert Path(ROOT / "README.md").read_text().count("\n") <= 130
