"""scripts/study.py: which runs the study has, that main.py takes them all, and what is kept of them."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import study
import sweep


def runs(*argv):
    """The runs of all parts."""
    own = study.command_line(list(argv))
    return [run for line in study.lines(own) for run in sweep.plan(*sweep.command_line(line))]


def test_main_takes_every_run_and_nothing_is_written(tmp_path):
    found = runs(f"--runs_dir={tmp_path}")
    assert len(found) == 5 + 3 + 1 and {run.state for run in found} == {"new"}
    assert not list(tmp_path.iterdir())
    larger = runs(f"--runs_dir={tmp_path}", "--model=ResNet18", "--seeds=0 1 2")
    assert len(larger) == 3 * len(found) and all("ResNet18" in run.label for run in larger)


def test_its_records_lie_in_results():
    assert {run.state for run in runs()} == {"finished"}


@pytest.mark.parametrize("status", [0, 130])
def test_every_part_is_made_then_the_figures_unless_it_is_stopped(tmp_path, monkeypatch, status):
    called = []
    monkeypatch.setattr(sweep, "main", lambda argv: called.append(argv[0]) or status)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(study.subprocess, "run", lambda command: called.append(command[1:]) or done)
    assert study.main([f"--runs_dir={tmp_path}", f"--out={tmp_path}"]) == status
    figures = [str(ROOT / "figures.py"), str(tmp_path), "--out", str(tmp_path)]
    assert called == (["sampling"] if status else ["sampling"] * 5 + [figures])


def test_a_bad_argument_is_one_line(tmp_path):
    for argv, named in (("--parts=x", "--parts: got 'x'"), ("--model=ResNet81", "--model"), ("--seeds=a", "--seed")):
        command = ["bash", str(ROOT / "scripts" / "results.sh"), argv, f"--runs_dir={tmp_path}", f"--out={tmp_path}"]
        done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
