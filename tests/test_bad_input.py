"""Every flag and file given badly, as a real command: exit status 2, one `error:` line, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import child
import pytest
from conftest import ROOT, run_main

import main
from arguments import parse

SAMPLING = ["--mode", "sampling"]
ROWS = [  # arguments; what the line must name: the argument, what was given, what is allowed
    (["--mode", "train"], "--mode", "'train'", "critical"),
    (["--dataset", "MNIST"], "--dataset", "'MNIST'", "digits"),
    (["--model", "ResNet50"], "--model", "'ResNet50'", "ResNet18"),
    (["--epochs", "0"], "--epochs", "'0'", "at least 1"),
    (["--epochs", "1.5"], "--epochs", "'1.5'", "whole number"),
    (["--lr", "0"], "--lr", "'0'", "above 0"),
    (["--lr", "nan"], "--lr", "'nan'", "finite"),
    (["--lr", "1e39"], "--lr", "'1e39'", "at most 1e38"),
    (["--seed", "9" * 5000], "--seed", "'999", "0 to 2^63"),
    (["--device", "cuda:00"], "--device", "'cuda:00'", "cuda:0"),
    (["--batchsize", "1438"], "--batchsize", "1438", "at most the 1437"),
    (["--beta1", "1"], "--beta1", "'1'", "not including, 1"),
    (["--beta1", "0,9"], "--beta1", "'0,9'", "from 0"),
    (["--nu", "1.1"], "--nu", "'1.1'", "from 0 to 1"),
    (["--inject", "gaussian", "--inject_batchsize", "2"], "--inject", "'gaussian'", "covariance, isotropic"),
    (["--inject", "covariance"], "--inject_batchsize", "None", "1 to 7"),
    (["--inject", "covariance", "--inject-batchsize", "8"], "--inject_batchsize", "8", "1 to 7"),
    (["--inject", "isotropic", "--inject_batchsize", "2", "--cuda_graph"], "--inject", "isotropic", "--cuda_graph"),
    (["--eps", "0.5", "-1"], "--eps", "'-1'", "above 0"),
    (["--eps"], "--eps", "expected at least one argument", ""),
    (["--min_epochs", "-1"], "--min_epochs", "'-1'", "at least 0"),
    (["--steps", "-1"], "--steps", "'-1'", "at least 0"),
    (["--measure_every", "1", "--full_grad_batchsize", "2000"], "--full_grad_batchsize", "2000", "at most the 1437"),
    (["--full_grad_every", "1"], "--full_grad_every", "1", "did you mean --measure_every?"),
    (["--seed", "-1"], "--seed", "'-1'", "0 to 2^63"),
    (["--device", "mps"], "--device", "'mps'", "has no float64"),
    (["--mode=critical", "--eps=1.0", "0.7", "0.5"], "arguments: 0.7 0.5", "stand without =: --eps 1.0 0.7", ""),
    (["--lr", "0.1", "--seed", "0", "1", "2"], "arguments: 1 2", "--seed takes one value", "scripts/sweep.sh"),
    (["two words", "--lr", "0.1"], "arguments: two words", "--help", ""),
    (["--cuda_graph", "yes"], "unrecognized arguments", "yes", "--help"),
    (["--deterministic=1"], "--deterministic", "'1'", "ignored explicit argument"),
    (["--data_dir", ""], "--data_dir", "''", "directory"),
    (["--checkpoint_every", "-1"], "--checkpoint_every", "'-1'", "at least 0"),
    (["--name", "../../x"], "--name", "'../../x'", "A-Z"),
    (["--name", "a\x1b[31m"], "--name", "x1b", "A-Z"),
    (["--name", "x" * 300], "--name", "'xxxxx", "128"),
    (["--wandb_mode", "on"], "--wandb_mode", "'on'", "offline"),
    (["--wandb_project", "a/b"], "--wandb_project", "'a/b'", "up to 128"),
    (["--learning-rate=0.1"], "--learning_rate", "0.1", "did you mean --lr?"),
    (["--qqq"], "unrecognized arguments", "--qqq;", "--help lists what is allowed"),
    (["--dataset", "cifar100"], "--dataset", "'cifar100'", "did you mean CIFAR100?"),
    (["--eps", "0.5,0.7"], "--eps", "'0.5,0.7'", "spaces separate them"),
    ([*SAMPLING, "--steps", "5", "0", "5"], "--steps", "5 0 5", "each value once"),
    ([*SAMPLING, "--draws", "1"], "--draws", "'1'", "at least 2"),
    ([*SAMPLING, "--draws", "3", "--measure", "shape"], "--draws", "3", "4 and more with shape"),
    ([*SAMPLING, "--measure", "size"], "--measure", "'size'", "noise, shape, smoothing, sharpness"),
    ([*SAMPLING, "--draw_batchsizes", "8"], "--draw_batchsizes", "8", "only --measure noise, or --draws"),
    ([*SAMPLING, "--draws", "4", "--draw_batchsizes", "8", "1438"], "--draw_batchsizes", "1438", "at most the 1437"),
    ([*SAMPLING, "--draws", "4", "--draw_batchsizes", "8", "8"], "--draw_batchsizes", "8 8", "each value once"),
    # What does not affect the run:
    (["--mode", "critical", "--epochs", "3"], "--epochs", "got 3", "only --mode normal uses it"),
    (["--eps", "1"], "--eps", "got 1.0", "only --mode critical uses it"),
    ([*SAMPLING, "--measure_every", "1"], "--measure_every", "got 1.0", "--mode sampling measures at --steps"),
    (["--draws", "8"], "--draws", "got 8", "measures with --measure_every"),
    (["--full_grad_batchsize", "100"], "--full_grad_batchsize", "got 100", "measures with --measure_every"),
    ([*SAMPLING, "--draws", "8", "--probe_images", "9"], "--probe_images", "got 9", "smoothing or sharpness"),
    (["--optimizer", "sgd", "--beta1", "0.5"], "--beta1", "got 0.5", "--optimizer sgd does not use it"),
    (["--optimizer", "shb", "--nu", "0.5"], "--nu", "got 0.5", "--optimizer shb does not use it"),
    (["--dataset", "mnist1d"], "--model", "got ResNet18", "with --dataset mnist1d are MLP, Softmax, ConvNet1d"),
    (["--model", "MLP"], "--model", "got MLP", "with --dataset digits are ResNet18"),
]


def forked(*argv, cwd):
    """As `run_main`, in a process that has torch loaded already. Its log, stdout and stderr in one, is outside cwd."""
    status, log = child.run(argv, cwd, log=cwd.with_name(f"{cwd.name}.log"))
    return subprocess.CompletedProcess(argv, status, log, log)


def check(done, *parts):
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and done.stdout in ("", done.stderr), done
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


@pytest.mark.parametrize(("argv", "argument", "given", "allowed"), ROWS, ids=lambda v: None)
def test_bad_arguments(argv, argument, given, allowed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = main.cli([*(["--dataset", "digits"] if "--dataset" not in argv else []), *argv])
    out = capsys.readouterr()
    check(subprocess.CompletedProcess(argv, status, out.out, out.err), argument, given, allowed)
    assert list(tmp_path.iterdir()) == []


QUICK = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", "1437", "--max_steps", "1"]


def test_what_only_the_machine_can_tell(tmp_path):
    """A device that is not there, no network, a graph without CUDA, a directory that cannot be."""
    (tmp_path / "file").write_text("in the way")
    for argv, parts in (
        (["--device", "cuda:97"], ["--device", "'cuda:97'", "this machine has", "cpu"]),
        (["--device", "cpu", "--cuda_graph"], ["--cuda_graph", "cpu"]),
        (["--runs_dir", "file"], ["--runs_dir", "file"]),
        (["--runs_dir", "/proc/nowhere"], ["--runs_dir", "/proc/nowhere"]),
        (["--runs_dir", ".", "--name", "file"], ["file"]),
        (["--dataset", "CIFAR10", "--data_dir", "new/data"], ["--data_dir", "CIFAR10.npz", "digits"]),
        (["--dataset", "CIFAR10", "--data_dir", "file"], ["--data_dir", "file"]),
        (["--dataset", "CIFAR10", "--data_dir", "x" * 300], ["--data_dir", "too long"]),
        (["--runs_dir", "x" * 300], ["--runs_dir", "too long"]),
    ):
        check(forked(*QUICK, *argv, cwd=tmp_path), *parts)
        assert [p.name for p in tmp_path.rglob("*")] == ["file"], argv


def test_a_directory_of_somebody_s_is_not_touched(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "notes.txt").touch()
    check(forked(*QUICK, "--name", "x", cwd=tmp_path), "--name", "exists already (unfinished)", "--resume")
    assert [p.name for p in tmp_path.rglob("*")] == ["runs", "x", "notes.txt"]


def test_a_wandb_mode_that_does_not_exist(tmp_path):
    done = run_main(*QUICK, cwd=tmp_path, env={"WANDB_MODE": "bogus"})
    check(done, "--wandb_mode", "'bogus'", "offline")
    assert list(tmp_path.iterdir()) == []


def test_names_of_flags_take_either_dash():
    for flag in ("--runs-dir", "--runs_dir"):
        assert parse([f"{flag}=~/a-b"]).runs_dir == Path.home() / "a-b"
        args = parse([flag, "a-b_c", "--wandb_project=x"])
        assert (args.runs_dir, args.name) == (Path("a-b_c"), "normal-CIFAR100-ResNet18-shb-b8-lr0.1-beta0.9-seed0")
    assert parse(["--optimizer=sgd", "--mode=critical"]).name == "critical-CIFAR100-ResNet18-sgd-b8-lr0.1-seed0"


OTHER_RESULTS = [  # what makes another result and cannot be added to a run later
    *([[mode, flag, value] for mode in ("normal", "critical", "sampling")
       for flag, value in (("--lr", "0.1000001"), ("--lr", "1"), ("--beta1", "0.95"), ("--batchsize", "16"),
                           ("--seed", "1"), ("--precision", "bf16"), ("--cuda_graph", None), ("--deterministic", None),
                           ("--optimizer", "sgd"), ("--model", "ResNet20"), ("--dataset", "CIFAR10"),
                           ("--optimizer", "qhm"))]),
    ["normal", "--inject", "isotropic", "--inject_batchsize", "2"],
    ["normal", "--optimizer", "qhm", "--nu", "0.9"], ["normal", "--optimizer", "nshb"],
    ["normal", "--epochs", "10"], ["normal", "--max_steps", "10"], ["critical", "--min_epochs", "1"],
    ["sampling", "--steps", "5"], ["sampling", "--max_steps", "5"], ["sampling", "--full_grad_batchsize", "500"],
    ["sampling", "--steps", "5", "10000"], ["sampling", "--steps", "6", "5", "10000"], ["sampling", "--draws", "4"],
    ["sampling", "--draws", "4", "--measure", "shape"], ["sampling", "--draws", "4", "--draw_batchsizes", "8"],
    ["sampling", "--measure", "shape"], ["sampling", "--measure", "noise"], ["sampling", "--measure", "sharpness"],
    ["sampling", "--measure_batchnorm", "eval"], ["sampling", "--exact_memory", "5"],
    ["sampling", "--measure_batchnorm", "train", "eval"], ["normal", "--measure_every", "1"],
    ["normal", "--measure_every", "1", "--draws", "4"], ["normal", "--until_loss", "0.1"],
]  # fmt: skip


def test_default_names_do_not_collide():
    names = {}
    for mode, *flag in [["normal"], ["critical"], ["sampling"], *OTHER_RESULTS]:
        argv = ["--mode", mode, *(word for word in flag if word is not None)]
        names.setdefault(parse(argv).name, []).append(argv)
    assert all(len(found) == 1 for found in names.values()), names


@pytest.mark.parametrize("more", ["--eps 0.1 0.2", "--max_steps 7", "--device cpu", "--save_memory"])
def test_what_can_be_added_later_or_does_not_affect_the_result_is_not_in_the_name(more):
    assert parse(["--mode", "critical", *more.split()]).name == parse(["--mode", "critical"]).name


def test_lists_are_in_the_name():
    args = parse(["--mode=sampling", "--optimizer=sgd", "--steps", "100", "0", "5", "--measure=shape", "--draws=9"])
    assert args.name == "sampling-CIFAR100-ResNet18-sgd-b8-lr0.1-steps0+5+100-measurenoise+shape-draws9-seed0"
    assert (parse(["--mode", "sampling", "--measure", "shape"]).draws, args.steps) == (64, [0, 5, 100])
    assert parse(["--mode", "sampling", "--draws", "9"]).measure == ["noise"]
    args = parse(["--dataset=digits", "--mode=sampling", "--measure=smoothing"])
    assert (args.full_grad_batchsize, args.probe_images) == (1000, 1437)  # all, where there are fewer than 2,000


def test_switches_take_what_wandb_s_agents_write(monkeypatch):
    args = parse(["--resume=True", "--cuda-graph=false", "--deterministic=TRUE"])
    assert (args.resume, args.cuda_graph, args.deterministic) == (True, False, True)
    monkeypatch.delenv("WANDB_MODE")
    for value, mode in (("true", "disabled"), ("1", "disabled"), ("false", "offline"), ("", "offline")):
        monkeypatch.setenv("WANDB_DISABLED", value)
        assert parse([]).wandb_mode == mode
    assert parse(["--wandb_mode=online"]).wandb_mode == "online"


PROGRAMS = ["main.py --lr=0", "-OO figures.py --out x", "scripts/sweep.py x", "scripts/verdicts.py x"]


@pytest.mark.parametrize("words", [*PROGRAMS, "-m scripts.sweep x", "-m scripts.verdicts x", "-m main --lr=0"])
def test_programs_start_however_python_is_called_and_refuse_without_torch(words, tmp_path):
    """PYTHONSAFEPATH leaves a script's directory out of Python's path, and -m puts another in."""
    (tmp_path / "torch.py").write_text("print('loaded')")
    env = os.environ | {"PYTHONSAFEPATH": "" if words.startswith("-m") else "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert done.stdout == ""


def test_help_names_every_flag(tmp_path):
    done = run_main("--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"--{flag} " in done.stdout for flag in ("mode", "beta1", "eps", "resume"))
