"""Which device a run takes."""

import json
import os

import pytest
import torch
from conftest import make_data, run_main

import arguments
import utils
from measure.gradients import Objective
from training.loop import Training
from utils import UserError


def set_gpus(monkeypatch, count, mps=False):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("gpus", "mps", "best"), [(0, False, "cpu"), (2, False, "cuda:0"), (0, True, "cpu")])
def test_auto_is_the_best_there_is(gpus, mps, best, monkeypatch):
    set_gpus(monkeypatch, gpus, mps)
    assert str(utils.pick_device("auto")) == best


def test_a_name_is_taken_at_its_word(monkeypatch):
    set_gpus(monkeypatch, 2)
    assert [str(utils.pick_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    with pytest.raises(UserError, match=r"--device: got 'cuda:2', this machine has cuda:0, cuda:1, cpu"):
        utils.pick_device("cuda:2")


def test_a_plain_command_takes_the_best_there_is(tmp_path, mnist1d_dir):
    argv = ["--dataset", "mnist1d", "--model", "MLP", "--batchsize", 1437, "--max_steps", 1, "--name", "r"]
    done = run_main(*argv, "--data_dir", mnist1d_dir, cwd=tmp_path, device=None)
    assert done.returncode == 0, done
    content = json.loads((tmp_path / "runs" / "r" / "args.json").read_text())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    assert content["args"]["device"] == "auto" and content["environments"][0]["device"] == (gpu or "cpu")


@pytest.fixture
def meta(monkeypatch):
    """A Training on torch's meta device, which has shapes and no data: to read it, or to meet a CPU tensor, fails."""

    def start(*argv):
        argv = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", "500", *argv]
        return Training(arguments.parse(argv), make_data(1437, device="meta"), None, None)

    return start


@pytest.mark.parametrize("argv", [[], ["--optimizer", "sgd"], ["--optimizer", "qhm"], ["--save_memory"]])
def test_steps_run_without_a_look_at_the_device(meta, argv):
    run = meta(*argv)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # the reading of the window alone
        next(run.windows(100))
    assert run.step == 3 == run.steps_per_epoch and len(run.window) == 3


def test_a_full_gradient_runs_without_a_look_at_the_device(meta):
    run = meta()
    full = Objective(run.model).full_gradient(run.data.full_pass(0, 500), run.data.size)
    assert all(g.is_meta and g.shape == p.shape for g, p in zip(full, run.model.parameters(), strict=True))


def test_what_a_measured_step_reads_is_known(mnist1d_dir, monkeypatch):
    """The paper's single draw: the test images once, one copy of each vector and of each norm; nothing a chunk."""
    reads = []
    for name in ("item", "tolist", "cpu"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, read=read, name=name: reads.append(name) or read(t))
    counts = {}
    for chunk in (500, 4000):
        argv = ["--dataset", "mnist1d", "--model", "MLP", "--batchsize", "100", "--mode", "sampling", "--steps", "3"]
        argv += ["--full_grad_batchsize", str(chunk), "--data_dir", str(mnist1d_dir)]
        from training.data import load

        args = arguments.parse(argv)
        run = Training(args, load("mnist1d", args.data_dir, torch.device("cpu"), 0), None, None)
        run.args.steps, run.last = [9], 9  # not the last step, which keeps ω
        reads.clear()
        run.measuring.measure()
        counts[chunk] = {name: reads.count(name) for name in sorted(set(reads))}
    assert counts[500] == counts[4000] and sum(counts[500].values()) < 20, counts


def test_settings_of_the_backends_are_changed(monkeypatch):
    """Together with the next: what one test has set up does not reach another."""
    utils.set_up(arguments.parse(["--precision", "ieee", "--deterministic"]))
    assert torch.backends.cudnn.conv.fp32_precision == "ieee" and torch.are_deterministic_algorithms_enabled()
    utils.set_up(arguments.parse([]))
    assert torch.backends.cudnn.benchmark


def test_settings_of_the_backends_are_back():
    assert torch.backends.cudnn.conv.fp32_precision != "ieee" and torch.backends.cuda.matmul.fp32_precision != "ieee"
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
