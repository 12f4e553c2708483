"""The paper's grid on several machines: scripts/sweep_slurm.sh and scripts/sweep.yaml, beside scripts/sweep.py."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

import arguments

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "scripts" / "sweep_slurm.sh"
sys.path.insert(0, str(ROOT / "scripts"))
import sweep  # noqa: E402

GRID = {(optimizer, 2**k, seed) for optimizer in ("sgd", "shb", "nshb") for k in range(3, 14) for seed in (0, 1, 2)}


def slurm(task: str | None, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    """The script as a task of an array, in the repository, where it is submitted."""
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_ARRAY_TASK_ID"} | {"PYTHON": python}
    environment |= {"SLURM_ARRAY_TASK_ID": task} if task else {}
    return subprocess.run([SLURM, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_slurm_array_is_the_grid_each_point_once():
    first, last = map(int, re.search(r"^#SBATCH --array=(\d+)-(\d+)$", SLURM.read_text(), re.M).groups())
    seen = []
    for task in range(first, last + 1):
        own, flags = sweep.command_line(["critical", "--eps", "1.0", "0.5", "--task", str(task)])
        program, *rest = sweep.expand(own, flags)[own.task].command[1:]
        args = arguments.parse(rest)
        assert (program, args.mode, args.eps, args.resume) == (str(ROOT / "main.py"), "critical", [1.0, 0.5], True)
        seen.append((args.optimizer, args.batchsize, args.seed))
    assert len(seen) == len(set(seen)) and set(seen) == GRID
    assert [b for _, b, _ in seen] == sorted(b for _, b, _ in seen)


def test_the_tasks_are_the_runs_that_count_says_and_none_is_there_twice(capsys):
    words = ["normal", "--seeds", "0", "--batchsizes", "8 16", "--lrs", "0.1 0.01", "--beta1s", "0.5 0.9 0.99"]
    assert sweep.main([*words, "--count"]) == 0
    count = int(capsys.readouterr().out)
    assert count == 2 * 2 * (1 + 3 + 3)
    names = [arguments.parse(sweep.expand(*sweep.command_line(words))[k].command[2:]).name for k in range(count)]
    assert len(set(names)) == count
    with pytest.raises(arguments.UserError, match=f"allowed is 0 to {count - 1}"):
        sweep.main([*words, "--task", str(count)])


def test_a_slurm_task_asks_the_sweep_for_its_run():
    done = slurm("7", "critical", "--eps", "1.0", "0.5", python="echo")
    assert (done.returncode, done.stdout) == (0, "scripts/sweep.py critical --eps 1.0 0.5 --task 7\n")


@pytest.mark.parametrize(("task", "words"), [("99", ["normal"]), (None, ["normal"]), ("0", []), ("0", ["nrmal"])])
def test_a_slurm_task_outside_the_grid_is_an_error(task, words):
    done = slurm(task, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_in_a_slurm_task_the_signal_reaches_main_py_itself(tmp_path):
    # sbatch signals the batch shell alone: it has to have become main.py.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase $1 in\n*main.py) echo $$ "$@" ;;\n*) exec {sys.executable} "$@" ;;\nesac\n')
    python.chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "4", "PYTHON": str(python)}
    words = [SLURM, "normal", "--lr", "0.5"]
    process = subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid, program, *flags = process.communicate(timeout=PATIENCE)[0].split()
    assert (int(pid), program) == (process.pid, str(ROOT / "main.py"))
    args = arguments.parse(flags)
    assert (args.mode, args.lr, args.optimizer, args.batchsize, args.seed) == ("normal", 0.5, "shb", 8, 1)
    assert "\n#SBATCH --signal=B:TERM@" in SLURM.read_text()


def test_wandb_agents_run_the_grid_with_main_py(tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    agent = pytest.importorskip("wandb.wandb_agent")
    if not hasattr(agent.Agent, "_command_run") or not hasattr(agent, "AgentProcess"):
        pytest.skip("this version of wandb builds its agents' command line in another place")
    config = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text())
    assert (config["method"], config["program"], config["project"]) == ("grid", "main.py", "role_of_momentum")
    parameters = config["parameters"]
    swept = {flag: usual.split() for flag, usual in sweep.LISTS.items() if usual}
    assert list(parameters) == list(swept)
    for flag, usual in swept.items():
        assert list(map(str, parameters[flag]["values"])) == usual
    commands = []

    class Recorder:
        def __init__(self, command, **options):
            commands.append(command)

    monkeypatch.setattr(agent, "AgentProcess", Recorder)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "is set by the agent, and undone by this")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "likewise")
    one = agent.Agent(api=None, queue=None, sweep_id="sweep")
    one._sweep_command = config["command"]
    for k, values in enumerate(itertools.product(*(p["values"] for p in parameters.values()))):
        point = {key: {"value": value} for key, value in zip(parameters, values, strict=True)}
        one._command_run({"type": "run", "run_id": f"run{k}", "program": config["program"], "args": point})
    seen = []
    for command in commands:
        assert command[:3] == ["/usr/bin/env", "python", "main.py"]
        args = arguments.parse(command[3:])
        assert (args.mode, args.eps, args.resume, args.wandb_mode) == ("critical", [1.0, 0.7, 0.5], True, "online")
        seen.append((args.optimizer, args.batchsize, args.seed))
    assert len(seen) == len(set(seen)) and set(seen) == GRID
    assert arguments.parse(commands[0][3:]).name == "critical-CIFAR100-ResNet18-sgd-b8-lr0.1-seed0"
