"""scripts/study.py: which runs the study has, that main.py takes them all, and what it says they cost."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import PATIENCE, ROOT

import arguments

sys.path.insert(0, str(ROOT / "scripts"))
import study
from test_sweep import record


@pytest.mark.parametrize("part", study.PARTS)
def test_main_takes_every_run(part, tmp_path):
    runs = study.planned(study.command_line([f"--runs_dir={tmp_path}"]), part)
    assert {run.state for run in runs} == {"new"}
    assert not list(tmp_path.iterdir())


def test_it_scales(tmp_path):
    argv = ["--model=ResNet18", "--seeds=0 1 2", "--batchsizes=8 8192", f"--runs_dir={tmp_path}"]
    own = study.command_line(argv)
    assert len(study.critical(study.command_line(["--batchsizes=1 2 4 8"]))) == 4
    assert all("ResNet18" in run.label for run in study.planned(own, "critical"))
    assert len(study.planned(own, "critical")) == 2 * 3 * 3 + 3 * 3  # b, optimizers, seeds; of SHB b = 1, 2, 4
    assert len(study.planned(own, "accuracy")) == 3 * 3 * (3 + 2 + 3)  # optimizers, seeds, b in its three ways


def test_the_critical_runs_end_after_an_epoch(tmp_path):
    lines = study.critical(study.command_line(["--batchsizes=16 1024", f"--runs_dir={tmp_path}"]))
    caps = [word for line in lines for word in line if word.startswith("--max_steps")]
    assert caps == ["--max_steps=3125", "--max_steps=49", "--max_steps=2500"]


def steps_of(args):
    """All steps at which a sampling run measures."""
    return [*args.earlier_steps, args.steps]


def test_delta_is_measured_where_training_ended(tmp_path):
    """Each run of `normal` has a sampling run of its setting that measures at its last step, and at no other."""
    for part in ("control", "accuracy"):
        runs = study.planned(study.command_line([f"--runs_dir={tmp_path}", "--seeds=0"]), part)
        args = [arguments.parse([word for word in run.command[2:] if word != "--resume"]) for run in runs]
        ends, measured = set(), set()
        for one in args:
            setting = one.optimizer, one.batchsize, one.injected_noise
            updates = one.max_steps or one.epochs * -(-50_000 // one.batchsize)
            ends |= {(*setting, updates)} if one.mode == "normal" else set()
            measured |= {(*setting, step) for step in steps_of(one)} if one.mode == "sampling" else set()
        assert ends and ends == measured


def test_it_says_what_the_parts_took(tmp_path):
    own = study.command_line([f"--runs_dir={tmp_path}"])
    words = [word for word in study.planned(own, "paper")[0].command[2:] if word != "--resume"]
    record(tmp_path, words, "finished", seconds=5400.0, results={}, mode="sampling")
    rows = {row["part"]: row for row in study.cost(own)}
    assert rows["paper"] == {"part": "paper", "runs": 1, "ended": 1, "hours": "1.50"}
    assert rows["noise"]["ended"] == 0 and rows["noise"]["hours"] == "0.00"
    assert study.thresholds(rows.values()) == []
    study.write_table(tmp_path / "cost.csv", pd.DataFrame(rows.values()))
    with open(tmp_path / "cost.csv", newline="") as file:
        assert list(csv.DictReader(file))[2] == {key: str(value) for key, value in rows["paper"].items()}


@pytest.mark.parametrize("part", ["critical", "stop"])
def test_figures_are_drawn_at_every_eps_once_there_is_a_history(tmp_path, part):
    own = study.command_line([f"--runs_dir={tmp_path}"])
    words = [word for word in study.planned(own, part)[0].command[2:] if word != "--resume"]
    record(tmp_path, words, "finished", seconds=1.0, results={}, mode="critical")
    assert study.thresholds(study.cost(own)) == ["--eps", *study.EPS_DRAWN]


def script(*argv, **environment):
    command = ["bash", str(ROOT / "scripts" / "results.sh"), *argv]
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_script_runs_every_part_then_the_figures(tmp_path):
    """With an interpreter that only notes how it was called."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase $1 in */study.py) exec {sys.executable} "$@";; esac\necho "$@" >> {tmp_path}/calls\n'
    )
    python.chmod(0o755)
    done = script(f"--runs_dir={tmp_path / 'runs'}", f"--out={tmp_path}", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    *sweeps, figures = (tmp_path / "calls").read_text().splitlines()
    assert all(Path(line.split()[0]).name == "sweep.py" for line in sweeps)
    assert len(sweeps) == 3 + 1 + 1 + 1 + 4 + 10 + 5
    assert figures == f"{ROOT / 'figures.py'} {tmp_path / 'runs'} --out {tmp_path}"
    assert (tmp_path / "cost.csv").is_file()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_waits_until_the_sweep_has_stopped_its_runs(tmp_path, signum):
    """With a sweep that stops as the real one does. Ctrl-C, which a terminal sends to all, is sent to the group."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase $1 in */study.py) exec {sys.executable} "$@";; esac\n'
        f"trap 'echo stopped >> {tmp_path}/calls; exit 130' TERM INT\n"
        f"echo started >> {tmp_path}/calls\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "results.sh"), f"--runs_dir={tmp_path / 'runs'}", f"--out={tmp_path}"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHON": str(python)}, start_new_session=True)
    try:
        while process.poll() is None and not (tmp_path / "calls").exists():
            time.sleep(0.01)
        (process.send_signal if signum == signal.SIGTERM else lambda s: os.killpg(process.pid, s))(signum)
        assert process.wait(PATIENCE) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "calls").read_text().splitlines() == ["started", "stopped"]


def test_bad_input(tmp_path):
    for argv, named in (
        (["--parts=x"], "--parts: got 'x'"),
        (["--batchsizes=0"], "batchsize"),
        (["--sedes=1"], "seeds"),
    ):
        done = script(*argv, f"--runs_dir={tmp_path / 'runs'}", f"--out={tmp_path}")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_of_groups_that_say_the_same_the_readme_has_the_last(monkeypatch):
    monkeypatch.setattr(study, "SHOWN", ("A.", "B.", "C."))
    said = {"one": "- **B.** one b. More of it.\n", "two": "- **C.** two c = 0.5; that is all.\n- **D.** Not shown.\n"}
    report = "".join(
        f"\n## {group}\n\n### in words\n\n- **A.** {group} a.\n{more}- untitled\n\n### table\n"
        for group, more in said.items()
    )
    assert (
        study.words(report) == "one:\n- **B.** one b.\n\ntwo:\n- **A.** two a.\n- **C.** two c = 0.5; that is all.\n"
    )


def test_the_readme_shows_what_the_results_say(tmp_path):
    """Word for word, as `show` puts it there."""
    report = ROOT / "results" / "report.md"
    said = [line for line in report.read_text().splitlines() if line.startswith("- **")]
    shown = study.words(report.read_text())
    titles = [line.split("**")[1] for line in shown.splitlines() if line[:1] == "-"]
    assert sorted(titles) == sorted(study.SHOWN)
    assert said and all(line in " ".join(said) for line in shown.replace("\n  ", " ").splitlines() if line[:1] == "-")
    assert shown in (ROOT / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    study.show(copy, report)
    assert copy.read_text() == f"before\n<!-- results -->\n{shown}<!-- end -->\nafter\n"
