"""The recipes of docs/extending.md, followed in a copy of the repository, and what they add, used in every mode."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PATIENCE, ROOT, summary

import shb
from training.stopping import first_crossing, running_means

NO_PRODUCT = shutil.ignore_patterns(".*", "__pycache__", "data", "docs", "results", "runs", "tests", "wandb")
PROGRAM = """import json, sys, figures, main
for argv in json.loads(sys.argv[1]):
    assert main.cli(argv) == 0, argv
figures.main(["runs", "--out", "figures"])"""
COMMON = "--device cpu --dataset mine --model LeNet --wandb_mode disabled --lr 0.02"
DRAWN = "--optimizer nesterov --draws 6 --probe_images 20"
RUNS = {  # 6 steps an epoch at b = 50
    "normal": "--optimizer nesterov --batchsize 50 --epochs 2 --measure_every 1 --lr_decay 0.5",
    "critical": "--optimizer nesterov --batchsize 50 --min_epochs 0 --eps 0.65 --max_steps 60",
    "sampling": f"{DRAWN} --batchsize 50 --steps 0 7 --measure shape smoothing",
    "sampling_b100": f"{DRAWN} --batchsize 100 --steps 7 --measure sharpness",
    "sampling_plain": "--optimizer sgd --batchsize 50 --steps 0 1",
    "sampling_decay": "--optimizer sgd --batchsize 50 --steps 0 1 --weight_decay 20",
}


def recipes():
    """{title: (how many files it says it touches, its blocks: (file, diff or python, text))}."""
    found = {}
    for section in (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]:
        title, count = re.match(r"(.*): (\d) files?\n", section).groups()
        blocks = re.findall(r"`([\w/]+\.py)`[^`]*\n\n?```(diff|python)\n(.*?)```", section, flags=re.DOTALL)
        found[title] = int(count), blocks
        assert len(blocks) == section.count("```") / 2, title
    return found


def follow(blocks, directory):
    """Write what the blocks say to the files of a copy of the repository."""
    for name, kind, block in blocks:
        text = (directory / name).read_text() if (directory / name).exists() else ""
        if kind == "python":
            text += f"\n\n{block}" if text else block
        else:
            lines = block.splitlines(keepends=True)
            old, new = ("".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(old) == 1, f"{name} does not hold this once:\n{old}"
            text = text.replace(old, new)
        (directory / name).write_text(text)


def copied(directory):
    """A copy of the product."""
    return shutil.copytree(ROOT, directory, ignore=NO_PRODUCT, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A copy in which every recipe was followed, RUNS made and drawn; and what was printed."""
    directory = copied(tmp_path_factory.mktemp("copy"))
    for _, blocks in recipes().values():
        follow(blocks, directory)
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 300), ("test", 100)):
        arrays[f"y_{part}"] = y = rng.integers(0, 10, n)
        arrays[f"x_{part}"] = (rng.integers(0, 200, (n, 32, 32, 3)) + 5 * y[:, None, None, None]).astype(np.uint8)
    (directory / "data").mkdir()
    np.savez(directory / "data" / "mine.npz", **arrays)
    lines = [f"--mode {name.partition('_')[0]} --name {name} {COMMON} {flags}".split() for name, flags in RUNS.items()]
    command, env = [sys.executable, "-c", PROGRAM, json.dumps(lines)], os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


@pytest.mark.parametrize("title", recipes())
def test_each_recipe_alone_touches_as_many_files_as_it_says(title, tmp_path):
    count, blocks = recipes()[title]
    assert len({name for name, _, _ in blocks}) == count
    follow(blocks, copied(tmp_path))


def test_the_optimizer_is_torch_s_nesterov():
    ((_, _, text), *_) = recipes()["An optimizer"][1]
    names = vars(shb).copy()
    exec(text, names)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizers = names["NESTEROV"]([ours], 0.1, 0.9), torch.optim.SGD([theirs], 0.1, 0.9, nesterov=True)
    for t in range(20):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.sin(p.detach() + t)
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-12)


def test_what_is_added_runs_in_every_mode_and_is_drawn(used):
    directory, said = used
    assert "left out" not in said and said.count("finished after") == len(RUNS), said
    page = (directory / "figures" / "page.md").read_text()
    assert "NESTEROV" in page and "How does the degree of smoothing δ depend on the batch size?" in page
    (table,) = directory.glob("figures/mine_LeNet_lr0.02_beta0.9_delta.csv")
    formula = pd.read_csv(table).set_index("label")["delta_formula"]
    assert formula["NESTEROV"].notna().all()


def test_the_flag_the_number_the_rule_and_the_decay_do_what_they_say(used):
    runs, said = used[0] / "runs", used[1]
    end = summary(runs / "normal")["results"]  # after two epochs
    assert end["delta"] == pytest.approx(0.02 * 0.5**2 * end["noise_norm"])
    assert 0 < end["omega_max"] < end["noise_norm"] and "size of the largest entry" in said
    norms = np.fromfile(runs / "critical" / "gradient_norms.f32", "<f4")
    (steps,) = summary(runs / "critical")["results"]["steps_to_eps"].values()
    assert steps == len(norms) == 1 + np.flatnonzero(norms <= 0.65)[0]
    assert steps != first_crossing(running_means(norms), 1, 0.65, 1)  # the rule of the repository
    before, first = [], []  # what was measured before the first step, and the norm of its gradient
    for run in (runs / "sampling_plain", runs / "sampling_decay"):
        before.append(pd.read_csv(run / "measurements.csv").iloc[0])
        first.append(np.fromfile(run / "gradient_norms.f32", "<f4")[0])
    plain, decay = before
    assert decay["noise_norm"] == pytest.approx(plain["noise_norm"], rel=1e-4)  # λx cancels in g − ∇f
    assert decay["full_gradient_norm"] > 5 * plain["full_gradient_norm"] and first[1] > 5 * first[0]
