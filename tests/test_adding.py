"""The README's recipes: an optimizer, a network and a data set added to a copy of the repository, and then used."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, summary

LENET = """from torch import nn


class LeNet(nn.Sequential):
    def __init__(self, num_classes):
        convolutions = nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(6, 16, 5), nn.ReLU()
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(144, num_classes))
"""


def recipes():
    """The Python blocks of the section, in their order."""
    section = (ROOT / "README.md").read_text().split("## Adding your own")[1]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the product with the recipes followed, and the data set's file."""
    directory = tmp_path_factory.mktemp("copy")
    for name in ("models", "measure", "report"):
        shutil.copytree(ROOT / name, directory / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, directory)
    optimizer, its_flags, network, data_set = recipes()
    for name, text in (
        ("shb.py", optimizer),
        ("arguments.py", its_flags),
        ("models/__init__.py", network),
        ("datasets.py", data_set),
    ):
        with open(directory / name, "a") as file:
            file.write(f"\n\n{text}")
    (directory / "models" / "lenet.py").write_text(LENET)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 300), ("test", 100)):
        arrays[f"y_{part}"] = rng.integers(0, 10, n)
        noise = rng.integers(0, 200, (n, 32, 32, 3))
        arrays[f"x_{part}"] = (noise + 5 * arrays[f"y_{part}"][:, None, None, None]).astype(np.uint8)
    (directory / "data").mkdir()
    np.savez(directory / "data" / "mine.npz", **arrays)
    return directory


def python(directory, *words):
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done
    return done.stdout


ADDED = ["--device", "cpu", "--dataset", "mine", "--model", "LeNet", "--optimizer", "nesterov", "--lr", 0.01]


def test_what_is_added_works_in_every_mode_and_figure(copy):
    flags = [*ADDED, "--batchsize", 50]
    python(copy, "main.py", *flags, "--mode", "normal", "--epochs", 2, "--name", "n")
    python(copy, "main.py", *flags, "--mode", "critical", "--min_epochs", 0, "--eps", 1000, "--name", "c")
    python(copy, "main.py", *flags, "--mode", "sampling", "--steps", 7, "--name", "s")
    runs = copy / "runs"
    assert summary(runs / "n")["steps"] == 12 and summary(runs / "n")["args"]["optimizer"] == "nesterov"
    assert summary(runs / "c")["results"]["steps_to_eps"] == {"1000.0": 1}
    assert summary(runs / "s")["results"]["noise_norm"] > 0
    said = python(copy, "figures.py", "runs", "--out", "figures")
    for name in ("n", "c", "s"):
        assert f"used: {name}\n" in said, said
    assert "left out" not in said, said
    assert "NESTEROV" in (copy / "figures" / "report.md").read_text().upper()


def test_the_recipe_s_optimizer_is_torch_s_nesterov(copy):
    program = """if True:
        import torch, shb
        ours, theirs = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        a = shb.NESTEROV([ours], lr=0.1, momentum=0.9)
        b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
        for t in range(20):
            for p, optimizer in ((ours, a), (theirs, b)):
                p.grad = torch.sin(p.detach() + t)
                optimizer.step()
        print(torch.allclose(ours, theirs, rtol=1e-12))"""
    assert python(copy, "-c", program) == "True\n"


def test_there_is_a_recipe_for_each():
    assert len(recipes()) == 4  # an optimizer and its flags, a network, a data set
