"""The house rules: sizes, layers, and imports that go one way (design.md)."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TRACKED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
)
FILES = [ROOT / name for name in TRACKED.stdout.split() if (ROOT / name).exists()]
FILES = FILES or [p for p in ROOT.rglob("*.py") if not {".venv", "runs"} & set(p.relative_to(ROOT).parts)]  # no git
PRODUCT = sorted(p for p in FILES if p.relative_to(ROOT).parts[0] != "tests")
# What each part may import of ours, besides itself.
MAY = {
    "shb": set(),
    "measure": set(),
    "utils": set(),
    "datasets": {"utils"},
    "models": {"utils"},
    "arguments": {"utils", "datasets", "models"},
    "training": {"utils", "datasets", "models", "arguments", "measure", "shb"},
    "main": {"utils", "datasets", "models", "arguments", "measure", "shb", "training"},
    "bench": {"utils", "datasets", "models", "arguments", "measure", "shb", "training", "main"},
    "scripts": {"utils", "datasets", "models", "arguments", "measure", "training", "main", "scripts", "report"},
    "report": {"utils", "arguments", "measure.quantities", "training.stopping"},
    "figures": {"report", "utils", "arguments"},
}
WITHIN_REPORT = ["records", "statistics", "critical", "plots", "page"]  # each may import those before it


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """The modules of ours that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in MAY}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_long_and_imports_go_one_way(path):
    text = path.read_text()
    assert text.count("\n") <= 400 and (not text or ast.get_docstring(ast.parse(text)))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
    allowed = MAY[part(path)] | {part(path)}
    for name in imported(path):
        assert any(f"{name}.".startswith(f"{each}.") or each.startswith(f"{name}.") for each in allowed), name


def test_the_layers_within_report():
    for level, module in enumerate(WITHIN_REPORT):
        found = {name.partition(".")[2] for name in imported(ROOT / "report" / f"{module}.py")}
        assert not {name.split(".")[0] for name in found} & set(WITHIN_REPORT[level:]), module


def test_sizes():
    lines = {path: path.read_text().count("\n") for path in FILES}
    assert sum(path.parent == ROOT for path in FILES) <= 7
    assert sum(n for path, n in lines.items() if path in PRODUCT) <= 6035
    tests = [n for path, n in lines.items() if path not in PRODUCT]
    assert sum(tests) <= 7000 and max(tests) <= 400
    assert (ROOT / "README.md").read_text().count("\n") <= 100


def test_what_loads_no_torch():
    modules = "arguments, datasets, utils, models, figures, report.page, report.plots, measure.quantities"
    modules += ", training.stopping, training.record"
    program = f"import sys, {modules}; arguments.parse([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_instrument_can_be_copied(tmp_path):
    """measure/ alone, in another place, measures a network of another's."""
    shutil.copytree(ROOT / "measure", tmp_path / "measure")
    program = """
import torch
from measure.gradients import Objective
from measure.noise import batch_noise
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
x, y = torch.randn(8, 3), torch.randint(2, (8,))
objective = Objective(model)
full = objective.full_gradient([(x, y)], 8)
print(batch_noise(objective, optimizer, (x, y), full)[0]["noise_norm"] < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
