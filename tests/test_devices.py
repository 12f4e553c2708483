"""Which device a run takes."""

import json

import pytest
import torch
from conftest import make_data, run_main, start

import arguments
import utils
from training.loop import Training
from utils import UserError


@pytest.mark.parametrize(("gpus", "mps", "best"), [(0, False, "cpu"), (2, False, "cuda:0"), (0, True, "cpu")])
def test_auto_is_the_best_there_is_and_a_name_is_taken_at_its_word(gpus, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert (str(utils.pick_device("auto")), str(utils.pick_device("cpu"))) == (best, "cpu")
    if gpus:
        assert [str(utils.pick_device(name)) for name in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]
        with pytest.raises(UserError, match=r"--device: got 'cuda:2', this machine has cuda:0, cuda:1, cpu"):
            utils.pick_device("cuda:2")


def test_a_plain_command_takes_the_best_there_is(tmp_path, mnist1d_dir):
    argv = ["--dataset", "mnist1d", "--model", "MLP", "--batchsize", 1437, "--max_steps", 1, "--name", "r"]
    done = run_main(*argv, "--data_dir", mnist1d_dir, cwd=tmp_path, device=None)
    assert done.returncode == 0, done
    content = json.loads((tmp_path / "runs" / "r" / "args.json").read_text())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    assert content["args"]["device"] == "auto" and content["environments"][0]["device"] == (gpu or "cpu")


@pytest.mark.parametrize("argv", [[], ["--optimizer", "sgd"], ["--optimizer", "qhm"], ["--save_memory"]])
def test_steps_run_without_a_look_at_the_device(argv):
    """On torch's meta device, which has shapes and no data: to read it, or to meet a CPU tensor, fails."""
    args = arguments.parse(["--dataset", "digits", "--model", "ResNet20", "--batchsize", "500", *argv])
    run = Training(args, make_data(1437, device="meta"), None, None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # the reading of the window alone
        next(run.windows(100))
    assert run.step == 3 == run.steps_per_epoch and len(run.window) == 3


def test_what_a_measured_step_reads_is_known(mnist1d_dir, monkeypatch):
    """The paper's single draw: the test images once, one copy of each vector and of each norm; nothing a chunk."""
    reads = []
    for name in ("item", "tolist", "cpu"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, read=read, name=name: reads.append(name) or read(t))
    counts = {}
    for chunk in (500, 4000):
        flags = ["--batchsize", 100, "--mode", "sampling", "--steps", 3, "--full_grad_batchsize", chunk]
        run = start(mnist1d_dir, *flags)
        run.args.steps, run.last = [9], 9  # not the last step, which keeps ω
        reads.clear()
        run.measuring.measure()
        counts[chunk] = {name: reads.count(name) for name in sorted(set(reads))}
    assert counts[500] == counts[4000] and sum(counts[500].values()) < 20, counts


def test_settings_of_the_backends_are_changed(monkeypatch):
    utils.set_up(arguments.parse(["--precision", "ieee", "--deterministic"]))
    assert torch.backends.cudnn.conv.fp32_precision == "ieee" and torch.are_deterministic_algorithms_enabled()
    utils.set_up(arguments.parse([]))
    assert torch.backends.cudnn.benchmark
