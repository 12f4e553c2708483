"""The plan of scripts/sweep.py: which runs, how each stands, on which GPUs or machines; and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

import arguments
from utils import UserError

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "scripts" / "sweep_slurm.sh"
sys.path.insert(0, str(ROOT / "scripts"))
import sweep  # noqa: E402

GRID = {(optimizer, 2**k, seed) for optimizer in ("sgd", "shb", "nshb") for k in range(3, 14) for seed in (0, 1, 2)}
SIGNALS = ("--dataset", "mnist1d", "--model", "MLP", "--device", "cpu")
ONE = ("--optimizers", "sgd", "--seeds", 0, "--batchsizes", 8)


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """The plan that a command line makes, in an empty directory, as lines; the directory is `plan.directory`."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def dry_run(*words):
        assert sweep.main([*map(str, words), "--dry_run"]) == 0
        return capsys.readouterr().out.splitlines()

    dry_run.directory = directory
    return dry_run


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def record(directory: Path, words: list, status: str | None, results: dict | None = None) -> None:
    """What a run of main.py with `words` leaves in runs/ that has ended with `status`, or not at all."""
    args = arguments.parse([*map(str, words), "--resume"])
    run = directory / args.runs_dir / args.name
    run.mkdir(parents=True)
    if status:
        content = {"status": status, "steps": arguments.planned_steps(args), "args": vars(args)}
        (run / "summary.json").write_text(json.dumps(content | {"results": results or {}}, default=str))


def test_the_plan_is_the_papers_grid_longest_first_and_nothing_is_written(plan):
    *lines, last = plan("critical")
    points = [re.match(r"new +critical-CIFAR100-ResNet18-(\w+)-b(\d+)-lr0.1\S*-seed(\d)$", line) for line in lines]
    assert len(points) == 99 and all(points)
    assert {(optimizer, int(b), int(seed)) for optimizer, b, seed in (point.groups() for point in points)} == GRID
    sizes = [int(point[2]) for point in points]
    assert sizes == sorted(sizes)
    assert last == "99 runs, 99 to do, 1 at a time"
    lines = plan("sampling", "--optimizers=sgd", "--seeds=0", "--batchsizes", "16,8 32")
    assert re.findall(r"-b(\d+)-", "\n".join(lines)) == ["16", "8", "32"]
    assert re.findall(r"-b(\d+)-", plan("sampling")[0]) == ["8192"]  # where the large batches take longest
    assert files(plan.directory) == []


def test_a_flag_of_main_py_and_its_list_are_one(plan):
    assert plan("normal", *ONE, "--lr", 0.5)[0].endswith("sgd-b8-lr0.5-seed0")
    for values in (["0.5 0.05"], ["0.5", "0.05"], ["0.5", "--lr=0.05"]):
        lines = plan("normal", "--optimizer=sgd", "--seed", 0, "--batchsize", "8", "--lrs", *values)
        assert re.findall(r"-lr([\d.]+)-", "\n".join(lines)) == ["0.5", "0.05"]


def test_what_only_some_optimizers_take_is_dropped_for_the_others(plan, capsys):
    words = ("normal", "--seeds", 0, "--batchsizes", 8, "--lrs", "0.1 0.01", "--beta1s", "0.5 0.9")
    *lines, dropped, last = plan(*words)
    names = [re.sub(r"new +normal-CIFAR100-ResNet18-(.*)-seed0", r"\1", line) for line in lines]
    expected = []
    for lr in ("0.1", "0.01"):
        betas = [f"{optimizer}-b8-lr{lr}-beta{beta}" for beta in ("0.5", "0.9") for optimizer in ("shb", "nshb")]
        expected += [f"sgd-b8-lr{lr}", *betas]
    assert names == expected
    assert sweep.main([*map(str, words), "--count"]) == 0 and capsys.readouterr().out == "10\n"
    assert dropped.startswith("dropped: 2 points ") and last.startswith("10 runs, 10 to do")
    lines = plan("normal", "--seeds", 0, "--batchsizes", 8, "--optimizers", "sgd qhm", "--nu", 0.3)
    assert [re.search("(sgd|qhm)-b8-(.*)-seed0", line)[2] for line in lines[:2]] == ["lr0.1", "lr0.1-beta0.9-nu0.3"]


DOCUMENTED = re.findall(r"^(?:bash )?scripts/sweep\.sh (.+)$", (ROOT / "docs" / "experiments.md").read_text(), re.M)


@pytest.mark.parametrize("line", [line for line in DOCUMENTED if "$" not in line])
def test_every_sweep_of_the_docs_plans_runs_that_main_py_takes(plan, line):
    lines = plan(*shlex.split(line.partition("#")[0].replace("--dry_run", "")))
    assert lines[-1].split(" runs")[0].isdigit() and not [line for line in lines if line.startswith("refused")]


def test_the_plan_tells_new_half_done_ended_and_refused_runs_apart(plan):
    for b, status in ((16, None), (32, "finished"), (64, "diverged"), (128, "not_reached")):
        record(plan.directory, [*SIGNALS, "--optimizer", "sgd", "--batchsize", b], status)
    before = files(plan.directory)
    lines = plan("normal", *SIGNALS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", "8 16 32 64 128 8192")
    states = [line.split()[0] for line in lines[:6]]
    assert states == ["new", "unfinished", "finished", "diverged", "not_reached", "refused"]
    assert "--batchsize=8192 --seed=0 --optimizer=sgd: error: argument --batchsize: got 8192" in lines[5]
    assert lines[6].startswith("6 runs, 2 to do")
    assert files(plan.directory) == before


def test_an_ended_run_is_skipped_only_if_the_command_asks_for_nothing_more(plan):
    sgd = [*SIGNALS, "--optimizer", "sgd"]
    record(plan.directory, [*sgd, "--epochs", 1], "finished")
    assert plan("normal", *SIGNALS, *ONE, "--epochs", 1)[0].startswith("finished")
    record(plan.directory, [*sgd, "--mode", "critical"], "finished", {"at_first_check": ["0.5"]})
    line = plan("critical", *SIGNALS, *ONE, "--eps", 0.5)[0]
    assert line.startswith("finished") and line.endswith("an upper bound, as reached at the first check: eps 0.5")
    assert plan("critical", *SIGNALS, *ONE, "--eps", 0.5, 0.25)[0].startswith("unfinished")


BAD = [
    ([], "mode"),
    (["--eps", "0.5", "critical"], "argument mode: got '--eps'"),
    (["normal", "--seeds", ""], "--seeds"),
    (["normal", "--gpus", "97"], "--gpus: got '97', allowed is what nvidia-smi lists: "),
    (["normal", "--name", "x"], "--name: the sweep sets it"),
    (["normal", "--learning-rate", "1"], "did you mean --lr"),
    (["critical", "--epochs", "3"], "argument --epochs: got 3, but only --mode normal uses it"),
    (["normal", "--optimizers", "sgd", "--beta1s", "0.5 0.9"], "--beta1: got 0.5, but --optimizer sgd does not use"),
    (["normal", "--task", "99"], "--task: got 99, allowed is 0 to 98"),
]


@pytest.mark.parametrize(("words", "named"), BAD)
def test_a_bad_argument_is_named_and_nothing_starts(plan, words, named):
    with pytest.raises(UserError, match=re.escape(named)):
        plan(*words)
    assert files(plan.directory) == []


def test_as_a_command_it_is_one_line_and_exit_status_2(tmp_path):
    (tmp_path / "file").touch()
    for python, words, said in (
        (sys.executable, ["normal", "--optimizers", "adam"], "argument --optimizer: got 'adam'"),
        (sys.executable, ["normal", "--runs_dir", "file"], "[Errno"),
        ("no-such-python", ["normal"], "there is no interpreter 'no-such-python'; PYTHON names another"),
    ):
        command, environment = [ROOT / "scripts" / "sweep.sh", *words], os.environ | {"PYTHON": python}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
        assert files(tmp_path) == [tmp_path / "file"]


def test_planning_loads_nothing_that_is_slow(tmp_path):
    code = "import sys, sweep; sweep.main(['critical', '--dry_run']); print(*sys.modules, file=sys.stderr)"
    environment, command = {"PYTHONPATH": str(ROOT / "scripts")}, [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "99 runs" in done.stdout
    loaded = set(done.stderr.split())
    assert "sweep" in loaded
    assert not loaded & {"torch", "torchvision", "wandb", "sklearn", "scipy", "matplotlib", "pandas", "yaml"}


def test_the_gpus_are_the_chosen_or_those_of_cuda_visible_devices_or_all(plan, tmp_path, monkeypatch):
    def slots(*words):
        return int(re.search(r"(\d+) at a time", plan("normal", *ONE, *words)[-1])[1])

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-aa0)'\necho 'GPU 3: H100 (UUID: GPU-aa3)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slots() == slots("--gpus", "3,0") == 2 and slots("--gpus", "GPU-aa3", "--jobs-per-gpu", 3) == 3
    assert slots("--device", "cpu") == 1 and slots("--device", "cpu", "--gpus", "0 3") == 2
    for gpus, wrong in (("0 1", "1"), ("GPU-bb", "GPU-bb"), ("-1", "-1"), ("00", "00"), ("GPU", "GPU")):
        with pytest.raises(UserError, match=f"--gpus: got '{wrong}', allowed is what nvidia-smi lists: 0, 3"):
            slots("--gpus", gpus)
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert slots() == 1 and slots("--jobs_per_gpu", 2) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert slots() == slots("--gpus", "GPU-a GPU-b") == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots() == 1


def test_the_slurm_array_is_the_grid_and_without_slurm_the_script_is_an_error():
    last = re.search(r"^#SBATCH --array=0-(\d+)$", SLURM.read_text(), re.M)[1]
    runs = sweep.plan(*sweep.command_line(["critical", "--eps", "1.0", "0.5"]))
    assert int(last) == len(runs) - 1
    assert {(run.args.optimizer, run.args.batchsize, run.args.seed) for run in runs} == GRID
    assert {(run.args.mode, *run.args.eps, run.args.resume) for run in runs} == {("critical", 1.0, 0.5, True)}
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_ARRAY_TASK_ID"}
    done = subprocess.run([SLURM, "normal"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: this is not a task") and not done.stdout


def test_a_slurm_task_becomes_its_run_so_that_the_signal_reaches_main_py_itself(tmp_path):
    # sbatch signals the batch shell alone: it has to have become main.py.
    python = tmp_path / "python"
    others = f'exec "{sys.executable}" "$@"'
    python.write_text(f'#!/bin/sh\ncase $1 in *main.py) printf "%s\\n" $$ "$@" ;; *) {others} ;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "4", "PYTHON": str(python)}
    process = subprocess.Popen(
        [SLURM, "normal", "--lr=0.5"], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid, program, *flags = process.communicate(timeout=PATIENCE)[0].splitlines()
    assert (int(pid), program) == (process.pid, str(ROOT / "main.py"))
    args = arguments.parse(flags)
    assert (args.mode, args.lr, args.optimizer, args.batchsize, args.seed) == ("normal", 0.5, "shb", 8, 1)
    assert "\n#SBATCH --signal=B:TERM@" in SLURM.read_text()


def test_wandb_agents_run_the_grid_with_main_py():
    config = pytest.importorskip("yaml").safe_load((ROOT / "scripts" / "sweep.yaml").read_text())
    assert (config["method"], config["program"], config["project"]) == ("grid", "main.py", "role_of_momentum")
    values = {flag: list(map(str, parameter["values"])) for flag, parameter in config["parameters"].items()}
    assert values == {flag: usual.split() for flag, usual in sweep.LISTS.items() if usual}
    env, python, program, *flags, point = config["command"]
    assert (env, python, program, point) == ("${env}", "${interpreter}", "${program}", "${args}")
    args = arguments.parse([*flags, *(f"--{flag}={each[0]}" for flag, each in values.items())])
    assert (args.mode, args.eps, args.resume, args.wandb_mode) == ("critical", [1.0, 0.7, 0.5], True, "online")
    assert args.name == "critical-CIFAR100-ResNet18-sgd-b8-lr0.1-seed0"
