"""The examples of docs/measuring.md, as they stand there, on a model and a loss of a user's own."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "measuring.md").read_text(), re.DOTALL)


def of_a_user():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    train_set = TensorDataset(torch.randn(400, 6), torch.randn(400, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return {"model": model, "train_set": train_set, "optimizer": optimizer, "loss": nn.MSELoss()}


def test_the_examples_run_as_they_stand(capsys):
    names = of_a_user()
    for block in BLOCKS:
        exec(compile(block, "docs/measuring.md", "exec"), names)
    row, found, around = names["row"], names["found"], names["smoothed"] | names["sharp"]
    assert row["draws"] == 64 and row["batch_size"] == 32
    assert all(isinstance(value, int | float) and np.isfinite(value) for value in (row | around).values())
    assert found["all"]["trace"] == pytest.approx(row["variance"], rel=0.3)
    assert list(found) == ["all", *dict(names["model"].named_parameters())]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_first_example_is_ten_lines_and_the_tables_name_what_is_returned():
    names = of_a_user()
    code = [line for line in BLOCKS[0].splitlines() if line]
    assert len(code) <= 10
    for block in BLOCKS:
        exec(compile(block, "docs/measuring.md", "exec"), names)
    rows = re.findall(r"^\| ([a-z_0-9, ]+) \|", (ROOT / "docs" / "measuring.md").read_text(), re.MULTILINE)
    listed = {key for row in rows for key in row.split(", ")} - {"key"}
    returned = (names["row"], names["found"]["all"], names["smoothed"], names["sharp"])
    assert listed == {key for numbers in returned for key in numbers}


def test_the_folder_imports_nothing_of_this_project():
    own = {path.stem for path in ROOT.glob("*.py")} | {"models", "report", "scripts"}
    for path in (ROOT / "measure").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not {module.split(".")[0] for module in modules} & own, path
