"""The plan of scripts/sweep.py: which runs, in which order, how each stands, on which GPUs; and what it refuses.

In this process, as the plan starts none. test_sweep_runs.py has the runs, test_sweep_clusters.py SLURM and wandb.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import arguments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import sweep  # noqa: E402

GRID = {(optimizer, 2**k, seed) for optimizer in ("sgd", "shb", "nshb") for k in range(3, 14) for seed in (0, 1, 2)}
DIGITS = ("--dataset", "digits", "--model", "ResNet20", "--device", "cpu")


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


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Makes a stand-in, as for a machine with these GPUs, or with a driver that is broken."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")

    def install(*gpus, broken=False):
        uuids = "".join(f"echo 'GPU {n}: H100 (UUID: GPU-aa{n})'\n" for n in gpus)
        indices = "".join(f"echo {n}\n" for n in gpus)
        script = f'if [ "$1" = -L ]; then\n:\n{uuids}else\n:\n{indices}fi\n'
        smi.write_text("#!/bin/sh\n" + ("echo NVIDIA-SMI has failed\nexit 9\n" if broken else script))
        smi.chmod(0o755)

    install()
    return install


def script(*words, directory: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    """scripts/sweep.sh as a command."""
    command, environment = [ROOT / "scripts" / "sweep.sh", *words], os.environ | {"PYTHON": python}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def record(directory: Path, words: list[str], status: str | None, **content) -> None:
    """What a run of main.py with `words` leaves in runs/ that has ended with `status`, or not at all."""
    args = arguments.parse([*words, "--resume"])
    run = directory / args.runs_dir / args.name
    run.mkdir(parents=True)
    if status:
        content |= {"status": status, "steps": arguments.planned_steps(args), "args": vars(args)}
        (run / "summary.json").write_text(json.dumps(content, default=str))


# --- the grid -----------------------------------------------------------------------------------------------


def test_the_plan_is_the_papers_grid_longest_first_and_nothing_is_written(plan):
    *lines, last = plan("critical")
    points = [re.match(r"new +critical-CIFAR100-ResNet18-(\w+)-b(\d+)-lr0.1\S*-seed(\d)$", line) for line in lines]
    assert len(points) == 99 and all(points)
    assert {(optimizer, int(b), int(seed)) for optimizer, b, seed in (point.groups() for point in points)} == GRID
    sizes = [int(point[2]) for point in points]
    assert sizes == sorted(sizes)
    assert last.startswith("99 runs, 99 to do")
    assert files(plan.directory) == []


def test_sampling_starts_with_the_large_batches_for_there_they_take_longest(plan):
    lines = plan("sampling", "--optimizers=sgd", "--seeds=0")
    assert re.findall(r"-b(\d+)-", "\n".join(lines)) == [str(2**k) for k in range(13, 2, -1)]
    lines = plan("sampling", "--optimizers=sgd", "--seeds=0", "--batchsizes", "16 8 32")
    assert re.findall(r"-b(\d+)-", "\n".join(lines)) == ["16", "8", "32"]


def test_lists_are_separated_by_spaces_or_commas(plan):
    lines = plan("normal", "--optimizers=shb,sgd", "--seeds", " 1, 0 ", "--batchsizes", "8")
    assert re.findall(r"-(sgd|shb)-.*-seed(\d)", "\n".join(lines)) == [
        *[("shb", "1"), ("sgd", "1")],
        *[("shb", "0"), ("sgd", "0")],
    ]


def test_the_flag_of_an_empty_list_is_main_pys(plan):
    one = ("normal", "--optimizers", "sgd", "--seeds", 0, "--batchsizes", 8)
    assert plan(*one, "--lr", 0.5)[0].endswith("sgd-b8-lr0.5-seed0")
    lines = plan(*one, "--lrs", "0.5 0.05")
    assert re.findall(r"-lr([\d.]+)-", "\n".join(lines)) == ["0.5", "0.05"]
    with pytest.raises(arguments.UserError, match="--lr"):
        plan(*one, "--lrs", "0.5 0.05", "--lr", 1)


def test_points_that_are_one_run_are_dropped_and_counted(plan):
    words = ("normal", "--seeds", 0, "--batchsizes", 8, "--lrs", "0.1 0.01", "--beta1s", "0.5 0.9")
    *lines, dropped, last = plan(*words)
    names = [re.sub(r"new +normal-CIFAR100-ResNet18-(.*)-seed0", r"\1", line) for line in lines]
    expected = []
    for lr in ("0.1", "0.01"):
        betas = [f"{optimizer}-b8-lr{lr}-beta{beta}" for beta in ("0.5", "0.9") for optimizer in ("shb", "nshb")]
        expected += [f"sgd-b8-lr{lr}", *betas]
    assert names == expected
    assert dropped.startswith("dropped: 2 points ") and last.startswith("10 runs, 10 to do")
    assert not any("dropped" in line for line in plan(*words[:-2]))


def test_a_dropped_flag_is_not_on_the_command_line_of_a_run():
    own, flags = sweep.command_line(["normal", "--seeds", "0", "--batchsizes", "8", "--beta1s", "0.5", "--epochs=3"])
    commands = {run.command[-2]: run.command for run in sweep.expand(own, flags)}
    assert "--beta1=0.5" not in commands["--optimizer=sgd"]
    assert "--beta1=0.5" in commands["--optimizer=shb"] and "--epochs=3" in commands["--optimizer=shb"]


def test_a_list_whose_flag_main_py_does_not_know_is_refused_by_main_py_and_by_it_alone(plan, monkeypatch):
    monkeypatch.setitem(sweep.LISTS, "mu", "")
    assert len(plan("normal")) == 100
    with pytest.raises(arguments.UserError, match="--mu"):
        plan("normal", "--mus", "1 2")


def test_the_flag_of_one_optimizer_is_swept_for_that_alone(plan, monkeypatch):
    """As ν of QHM: an optimizer that takes the flag beside three that do not."""
    monkeypatch.setitem(arguments.OPTIMIZERS, "other", {"momentum": "beta1", "min": "min_epochs"})
    monkeypatch.setitem(sweep.LISTS, "min_epochs", "")
    sweep.without_a_say.cache_clear()
    words = ("critical", "--seeds", 0, "--batchsizes", 8, "--optimizers", "sgd nshb other", "--min_epochs", 5)
    assert plan(*words)[-1].startswith("3 runs")
    *lines, dropped, last = plan(*words[:-2], "--min_epochss", "3 4 5")
    sweep.without_a_say.cache_clear()
    assert dropped.startswith("dropped: 4 points") and last.startswith("5 runs")
    assert sum("-other-" in line for line in lines) == 3


def test_count_is_the_size_of_the_grid(plan, capsys):
    assert sweep.main(["normal", "--count"]) == 0
    assert capsys.readouterr().out == "99\n"
    assert sweep.main(["normal", "--seeds", "0 1", "--batchsizes", "8 16 32", "--count"]) == 0
    assert capsys.readouterr().out == "18\n"


DOCUMENTED = re.findall(r"^scripts/sweep\.sh (.+)$", (ROOT / "docs" / "experiments.md").read_text(), re.M)


@pytest.mark.parametrize("line", [line for line in DOCUMENTED if "$" not in line])
def test_every_sweep_of_the_docs_plans_runs_that_main_py_takes(plan, line):
    words = shlex.split(line.partition("#")[0].replace("--dry_run", ""))
    if "--injected_noises" in words and not hasattr(arguments.parse([]), "injected_noise"):
        pytest.skip("this main.py has no --injected_noise")
    lines = plan(*words)
    assert lines[-1].split(" runs")[0].isdigit() and not [line for line in lines if line.startswith("refused")]


# --- how each run stands ------------------------------------------------------------------------------------


def test_the_plan_tells_new_half_done_ended_and_refused_runs_apart(plan):
    for b, status in ((16, None), (32, "finished"), (64, "diverged"), (128, "not_reached")):
        record(plan.directory, [*DIGITS, "--optimizer", "sgd", "--batchsize", str(b)], status)
    before = files(plan.directory)
    sizes = "8 16 32 64 128 2048"
    lines = plan("normal", *DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", sizes)
    states = [line.split()[0] for line in lines[:6]]
    assert states == ["new", "unfinished", "finished", "diverged", "not_reached", "refused"]
    assert "--batchsize=2048 --seed=0 --optimizer=sgd: error: argument --batchsize: got 2048" in lines[5]
    assert lines[6].startswith("6 runs, 2 to do")
    assert files(plan.directory) == before


def test_an_ended_run_is_skipped_only_if_the_command_asks_for_nothing_more(plan):
    one = ("--dataset", "digits", "--optimizers", "sgd", "--seeds", 0, "--batchsizes", 8)
    digits = ["--dataset", "digits", "--optimizer", "sgd", "--batchsize", "8"]
    record(plan.directory, [*digits, "--epochs", "1"], "finished")
    assert plan("normal", *one, "--epochs", 1)[0].startswith("finished")
    assert plan("normal", *one, "--epochs", 2)[0].startswith("new")
    record(plan.directory, [*digits, "--mode", "critical"], "finished")
    assert plan("critical", *one, "--eps", 0.5)[0].startswith("finished")
    assert plan("critical", *one, "--eps", 0.5, 0.25)[0].startswith("unfinished")


def test_a_run_made_with_other_arguments_is_refused_by_name(plan):
    digits = ["--dataset", "digits", "--optimizer", "sgd", "--batchsize", "8", "--mode", "critical"]
    record(plan.directory, [*digits, "--min_epochs", "3", "--name", "x"], "finished")
    (plan.directory / "runs" / "x").rename(plan.directory / "runs" / arguments.parse(digits).name)
    words = ("--dataset", "digits", "--optimizers", "sgd", "--seeds", 0, "--batchsizes", "8 16")
    lines = plan("critical", *words)
    assert lines[0].startswith("refused") and "was begun with other arguments: --min_epochs 11 (was 3)" in lines[0]
    assert lines[1].startswith("new") and lines[2].startswith("2 runs, 1 to do")


def test_an_upper_bound_is_marked(plan):
    digits = [*DIGITS, "--mode", "critical", "--optimizer", "sgd", "--eps", "2.0", "1.5"]
    early = {"at_first_check": ["2.0", "1.5"]}
    record(plan.directory, [*digits, "--batchsize", "8"], "finished", results=early)
    record(plan.directory, [*digits, "--batchsize", "16"], "finished", results={"at_first_check": []})
    record(plan.directory, [*digits, "--batchsize", "32"], "finished", results=None)
    words = ("critical", *DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", "8 16 32", "--eps", 2.0, 1.5)
    lines = plan(*words)
    assert lines[0].endswith("-b8-lr0.1-seed0: an upper bound, as reached at the first check: eps 2.0 1.5")
    assert lines[1].endswith("-b16-lr0.1-seed0") and lines[2].endswith("-b32-lr0.1-seed0")
    assert plan(*words, 0.5)[0].endswith("-b8-lr0.1-seed0")  # asked for more, it has not ended


# --- what is refused ----------------------------------------------------------------------------------------


BAD = [
    ([], "mode"),
    (["--seeds", "0"], "mode"),
    (["--eps", "0.5", "critical"], "argument mode: got '--eps'"),
    (["nrmal"], "--mode"),
    (["normal", "--optimizers", "adam"], "adam"),
    (["normal", "--batchsizes", "8.5"], "8.5"),
    (["normal", "--batchsizes", "*"], "'*'"),
    (["normal", "--seeds"], "--seeds"),
    (["normal", "--seeds", ""], "--seeds"),
    (["normal", "--gpus", " "], "--gpus"),
    (["normal", "--gpus", "nonsense"], "--gpus: got 'nonsense', allowed is what nvidia-smi lists: none"),
    (["normal", "--gpus", "97"], "--gpus: got '97', allowed is what nvidia-smi lists: none"),
    (["normal", "--jobs_per_gpu", "0"], "--jobs_per_gpu"),
    (["normal", "--jobs-per-gpu=a[$(touch x)]"], "--jobs_per_gpu"),
    (["normal", "--jobs-per_gpu", "100"], "--jobs_per_gpu: got '100', allowed is a whole number from 1 to 99"),
    (["normal", "--batchsizes", "8 8"], "twice"),
    (["normal", "--batchsizes", "8 08"], "twice"),
    (["normal", "--beta1s", "0.9 0.9"], "twice"),
    (["normal", "--optimizers", "sgd", "--beta1s", "0.9 0.9"], "twice"),
    (["normal", "--lrs", "0.1 1e-1"], "twice"),
    (["normal", "--name", "x"], "--name"),
    (["normal", "--resume"], "--resume"),
    (["normal", "--mode=critical"], "--mode"),
    (["normal", "--batchsize", "8"], "--batchsizes"),
    (["normal", "--seed=8"], "--seeds"),
    (["normal", "--lr", "fast"], "--lr"),
    (["normal", "--learning-rate", "1"], "did you mean --lr"),
    (["normal", "extra"], "extra"),
    (["normal", "--task", "99"], "--task: got 99, allowed is 0 to 98"),
    (["normal", "--task", "-1"], "--task: got '-1'"),
    (["normal", "--task", "x"], "--task: got 'x'"),
]


@pytest.mark.parametrize(("words", "named"), BAD)
def test_a_bad_argument_is_named_and_nothing_starts(plan, nvidia_smi, words, named):
    (plan.directory / "8").touch()  # what a * would become
    with pytest.raises(arguments.UserError) as error:
        plan(*words)
    assert named in str(error.value)
    assert files(plan.directory) == [plan.directory / "8"]


@pytest.mark.parametrize("words", [["normal", "--lr", "fast"], ["normal", "--runs_dir", "file"], []])
def test_as_a_command_it_is_one_line_and_exit_status_2(tmp_path, words):
    (tmp_path / "file").touch()
    done = script(*words, directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert files(tmp_path) == [tmp_path / "file"]


def test_a_missing_interpreter_is_named(tmp_path):
    done = script("normal", directory=tmp_path, python="no-such-python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no interpreter 'no-such-python'; PYTHON names another\n"


def test_help_names_the_lists_and_says_what_becomes_of_other_flags(tmp_path):
    done = script("--help", directory=tmp_path)
    assert done.returncode == 0
    for part in ("--batchsizes", "--optimizers", "8 16 32", "goes to main.py", "Exit status"):
        assert part in done.stdout


# --- planning is cheap, and says what reading the records says -----------------------------------------------


def test_planning_loads_neither_torch_nor_anything_else_that_is_slow(tmp_path):
    code = "import sys, sweep; sweep.main(['critical', '--dry_run']); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT / "scripts")}  # without the tests' own sitecustomize
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "99 runs" in done.stdout
    loaded = set(done.stderr.split())
    assert "sweep" in loaded
    assert not loaded & {"torch", "torchvision", "wandb", "sklearn", "scipy", "matplotlib", "pandas", "yaml"}


def test_a_damaged_summary_is_a_warning_and_the_run_is_to_do(tmp_path):
    digits = [*DIGITS, "--optimizer", "sgd", "--batchsize", "8", "--runs_dir", str(tmp_path)]
    record(tmp_path, digits, None)
    file = tmp_path / arguments.parse(digits).name / "summary.json"
    file.write_text('{"status": "fini')
    words = ["normal", *DIGITS, "--optimizers", "sgd", "--batchsizes", "8", "--seeds", "0", "--runs_dir", tmp_path]
    command = [sys.executable, ROOT / "scripts" / "sweep.py", *words, "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "unfinished")
    assert done.stderr.startswith(f"warning: {file} is damaged") and done.stderr.count("\n") == 1


# --- the GPUs -----------------------------------------------------------------------------------------------


ONE = ("normal", *DIGITS, "--seeds", 0, "--batchsizes", 8)


def test_only_gpus_of_this_machine_are_taken(plan, nvidia_smi):
    nvidia_smi(0, 3)
    for gpus, number in (("0", 1), ("3,0", 2), ("GPU-aa3", 1)):
        assert plan(*ONE, "--gpus", gpus)[-1].endswith(f"{number} at a time")
    for gpus, wrong in (("0 1", "1"), ("GPU-bb", "GPU-bb"), ("-1", "-1"), ("00", "00"), ("GPU", "GPU")):
        with pytest.raises(arguments.UserError) as error:
            plan(*ONE, "--gpus", gpus)
        assert str(error.value) == f"argument --gpus: got '{wrong}', allowed is what nvidia-smi lists: 0, 3"


def test_the_gpus_are_those_of_nvidia_smi_or_of_cuda_visible_devices(plan, nvidia_smi, monkeypatch):
    def slots(*words):
        return int(re.search(r"(\d+) at a time", plan(*ONE, *words)[-1])[1])

    nvidia_smi(0, 1, 2)
    assert slots() == 3
    nvidia_smi(broken=True)
    assert slots() == 1
    assert slots("--jobs_per_gpu", 2) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert slots() == 2
    assert slots("--gpus", "GPU-a GPU-b") == 2  # what holds anyway is not looked up
    nvidia_smi(0, 1)
    assert slots("--gpus", "0", "--jobs-per-gpu", "3") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots() == 1
    monkeypatch.setenv("PATH", str(plan.directory))  # neither nvidia-smi nor anything else
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slots() == 1
