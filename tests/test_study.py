"""scripts/results.sh: main.py takes every run; scripts/verdicts.py on simulated data."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from recorded import record

sys.path.insert(0, str(ROOT / "scripts"))
import verdicts

from report import predictors, records


def results(*argv, cwd):
    env = os.environ | {"PYTHON": sys.executable, "RESULTS": str(cwd)}
    command = ["bash", str(ROOT / "scripts" / "results.sh"), *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_main_takes_every_run_and_nothing_is_written(tmp_path):
    """All parts, each run once; flags that are given go to every run."""
    done = results("mnist1d", "confirm", "convnet", "images", "cifar100", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    runs = [line for line in done.stdout.splitlines() if line.startswith("new ")]
    assert len(runs) == len(set(runs)) > 500 and not list(tmp_path.iterdir())
    fewer = results("cifar100", "--model", "ResNet18", "--dry_run", cwd=tmp_path).stdout
    assert fewer.count("new ") == 12 and "ResNet20" not in fewer.replace("--model=ResNet20", "")


@pytest.mark.parametrize("argv", [["grid"], ["mnist1d", "--seed_of", "1", "--dry_run"]])
def test_a_bad_argument_is_one_line(tmp_path, argv):
    done = results(*argv, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


FLAGS = {"SGD": "--optimizer=sgd", "SHB": "--optimizer=shb", "NSHB": "--optimizer=nshb"}


def simulated(tmp_path, accuracy, b_star_over_eta):
    """Runs of all cells of the tests: `accuracy` of (cell, its δ, its η_eff/b); Softmax with b* ~ η to that power."""
    rng = np.random.default_rng(0)
    seen = {}
    for _, _, pairs in verdicts.ACCURACY:
        for first, second in pairs:
            _, d = seen.setdefault(str(first), (first, 0.1))
            seen.setdefault(str(second), (second, d if pairs is verdicts.EQUAL_DELTA else 0.25))
    for cell, d in seen.values():
        name, _, inject = cell["label"].partition(" inject ")
        flags = f"{FLAGS[name]} --lr={cell['lr']} --batchsize={cell['b']}"
        flags += f" --inject {inject.split()[0]} --inject_batchsize 16" if inject else ""
        step = cell["lr"] / cell["b"] / (0.1 if name == "SHB" else 1)
        for seed in range(5):
            value = accuracy(cell, d, step) + rng.normal(0, 0.1)
            row = {"training_loss": 0.005, "training_acc": 99.0, "accuracy": value, "epoch": 10}
            record(tmp_path, f"{flags} --seed={seed}", 10, metrics=[row | {"steps": 40_000 // cell["b"]}])
    for lr in verdicts.RATES:
        for b in (125, 182, 250, 364, 500, 667, 1000, 1334, 2000, 4000):
            for seed in range(5):
                # ‖g‖ whose running mean is ε after SFO/b steps, SFO with its minimum at b* = 50/ε² · (η/0.02)^power
                stars = [50 / eps**2 * (lr / 0.02) ** b_star_over_eta for eps in verdicts.EVERY_EPS]
                ends = [1e5 / b * np.exp(0.1 * np.log2(b / star) ** 2) * (i + 1) for i, star in enumerate(stars)]
                ends, t = np.maximum.accumulate(ends) * np.exp(rng.normal(0, 0.02)), np.arange(1, 8001)
                means = np.exp(np.interp(np.log(t), np.log([1, *ends, 1e5]), np.log([1, *verdicts.EVERY_EPS, 0.2])))
                norms = np.diff(means * t, prepend=0)
                flags = f"--mode=critical --optimizer=sgd --lr={lr} --batchsize={b} --seed={seed} --min_epochs=0"
                record(tmp_path, f"{flags} --model=Softmax --eps 0.4 0.3 0.25", 8000, norms=norms)
    runs = records.runs(tmp_path)
    rows, _ = predictors.trajectories(runs[runs["model"] == "MLP"])
    found = verdicts.verdicts(rows, runs[runs["model"] == "Softmax"])
    return found.set_index("test")


def test_the_verdicts_where_the_step_and_the_shape_decide(tmp_path):
    def accuracy(cell, delta, step):
        step = 0.1 / 16 if "covariance" in cell["label"] else step
        return 70 + 2 * np.log2(step)

    found = simulated(tmp_path, accuracy, 0)
    assert found["significant"].tolist() == [True] * 5 + [False] and (found["n"] == 5).all()
    effects = found["effect"].tolist()
    assert max(abs(effects[0]), abs(effects[3])) < 0.2 and effects[1] > 2 and abs(effects[2] - 8) < 0.3
    assert abs(effects[4]) < 0.3 and 1.7 < effects[5] < 2.3


def test_the_verdicts_where_delta_decides_and_the_formula_holds(tmp_path):
    found = simulated(tmp_path, lambda cell, delta, step: 60 + 30 * delta, 1)
    assert found["significant"].tolist()[:2] == [False, False]
    assert abs(found["effect"].iloc[4] - 1) < 0.2 and not found["significant"].iloc[4]


def test_holm_s_rule():
    assert verdicts.holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == [True, False, False, True]
    assert verdicts.holm(np.array([0.02, 0.06])).tolist() == [True, False]
    with pytest.raises(ValueError, match="no run of"):
        verdicts.cell(records.runs("nowhere"), {"label": "SGD"})


def test_the_tables_in_results_are_those_of_their_records(tmp_path):
    """Byte by byte; the records lie in one archive. Of confirm: mnist1d takes twice as long."""
    kept = ROOT / "results" / "confirm"
    subprocess.run(["tar", "-xJf", kept / "runs.tar.xz", "-C", tmp_path], check=True)
    assert verdicts.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    for name in ("verdicts", "settings", "predictors", "matched", "equal_delta", "equal_updates"):
        ours, theirs = (folder / f"{name}.csv" for folder in (tmp_path / "out", kept))
        pd.testing.assert_frame_equal(pd.read_csv(ours), pd.read_csv(theirs), rtol=5e-5)
        assert ours.read_bytes() == theirs.read_bytes() or pd.__version__ < "3", name  # it rounds the fifth digit
