"""On a GPU: what the CPU cannot show. Needs neither wandb nor scikit-learn, nor a data set."""

import copy
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_data, summary

import arguments
import main
import models
import utils
from arguments import OPTIMIZERS
from measure.gradients import Objective
from models import IMAGE, NETWORKS
from training import data as datasets
from training.loop import Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = "cuda:0"
FLAGS = ["--dataset", "digits", "--model", "ResNet20", "--device", GPU]  # of digits there is only the name


def images(**options):
    return make_data(1437, device=GPU, **options)


def make(*flags):
    """A Training of ResNet20 on random images, without a record."""
    args = arguments.parse([*FLAGS, *map(str, flags)])
    utils.set_up(args)
    return Training(args, images(), None, None)


def trajectory(run, last):
    """Losses, gradient norms and the weights that `run` ends with."""
    windows = list(run.windows(last))
    values = [np.concatenate([getattr(w, key) for w in windows]) for key in ("losses", "norms")]
    return *values, [v.cpu() for v in run.model.state_dict().values()]


def assert_near(got, want):
    """Two trajectories: losses and norms, and the weights at the end."""
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    for p, q in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_graphed_and_eager_trajectories_agree(optimizer):
    """From the start, and from a checkpoint whose momentum the graph must take over."""
    flags = ("--optimizer", optimizer, "--batchsize", 100, "--lr", 0.01, "--deterministic")
    eager, contents = make(*flags), []
    norms = SimpleNamespace(append=lambda norms: None)
    bar = SimpleNamespace(update=lambda: None)
    eager.record = SimpleNamespace(save_checkpoint=contents.append, bar=bar, norms=norms, log=lambda *a, **o: None)
    head = trajectory(eager, 110)
    eager.save()
    saved = copy.deepcopy(contents[-1])
    tail = trajectory(eager, 320)
    whole = [np.concatenate(pair) for pair in zip(head[:2], tail[:2], strict=True)]
    assert_near(trajectory(make(*flags, "--cuda_graph"), 320), (*whole, tail[2]))
    resumed = make(*flags, "--cuda_graph")
    resumed.load(saved)
    assert_near(trajectory(resumed, 320), tail)


def test_capturing_leaves_no_trace():
    run, eager = make("--batchsize", 100, "--cuda_graph"), make("--batchsize", 100)
    random = torch.cuda.get_rng_state(), torch.get_rng_state()
    for x, y in islice(run.data.epoch(0, 100), 3):
        for a, b in zip(run.train_step(x, y), eager.train_step(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for p, q in zip(run.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert torch.equal(random[0], torch.cuda.get_rng_state()) and torch.equal(random[1], torch.get_rng_state())


@pytest.mark.parametrize("flags", [(), ("--cuda_graph",), ("--save_memory",)])
def test_no_step_waits_for_the_gpu(flags):
    run = make("--batchsize", 8, *flags)
    step = run.train_step
    list(run.windows(100))

    def watched(x, y):  # from here on, since an epoch begins with copies of its plan
        torch.cuda.set_sync_debug_mode("error")
        return step(x, y)

    run.train_step = watched
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the reading of the window, and nothing before it
            next(run.windows(150))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 150


def test_deterministic_means_the_same_bits():
    a, b = (trajectory(make("--batchsize", 100, "--deterministic"), 40) for _ in range(2))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert all(torch.equal(p, q) for p, q in zip(a[2], b[2], strict=True))


@pytest.mark.parametrize("flags", [(), ("--cuda_graph",), ("--precision", "bf16")])
def test_saving_memory_changes_nothing_but_the_memory(flags):
    flags = ("--batchsize", 512, "--lr", 0.01, "--deterministic", *flags)
    ends, peaks = [], []
    for extra in ((), ("--save_memory",)):
        run = make(*flags, *extra)
        torch.cuda.reset_peak_memory_stats()
        ends.append(trajectory(run, 20))
        peaks.append(torch.cuda.max_memory_allocated())
        del run
    assert_near(*ends)
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize("name", [name for name in NETWORKS if models.takes(name, IMAGE)])
def test_a_network_gives_what_it_gives_on_the_cpu(name):
    utils.set_up(arguments.parse([*FLAGS, "--precision", "ieee", "--deterministic"]))
    torch.manual_seed(0)
    here = models.build(name, 10)
    there = copy.deepcopy(here).to(GPU, memory_format=torch.channels_last)
    batches = [next(make_data(64, device=device).epoch(0, 16)) for device in ("cpu", GPU)]
    sides = zip((here, there), batches, strict=True)
    gradients = [Objective(model).gradient(batch) for model, batch in sides]
    for x, y in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(y.cpu() - x) <= 1e-2 * torch.linalg.vector_norm(x) + 1e-4


def test_augmented_pixels_are_those_of_the_cpu_bit_for_bit():
    plan = torch.from_numpy(datasets.draw_augmentation(np.random.default_rng(0), 1437, 15.0))
    index = torch.randperm(1437, dtype=torch.int32)
    here, there = make_data(1437), images()
    pixels = there.images(index.to(GPU), plan.to(GPU))
    assert torch.equal(here.images(index, plan), pixels.cpu())
    assert torch.equal(here.normalize(here.images(index, plan)), there.normalize(pixels).cpu())


@pytest.mark.parametrize("flags", [(), ("--cuda_graph",)])
@pytest.mark.parametrize("mode", ["normal", "critical", "sampling"])
def test_a_whole_run_is_near_that_of_the_cpu(mode, flags, tmp_path, monkeypatch):
    found = {}
    for device in ("cpu", GPU):
        monkeypatch.setattr(datasets, "load", lambda *_, device=device: make_data(1437, 100, device=device))
        argv = [*FLAGS, "--mode", mode, "--batchsize", 128, "--lr", 0.01, "--max_steps", 14, "--precision", "ieee"]
        argv += ["--eps", 0.01] if mode == "critical" else []
        argv += ["--runs_dir", tmp_path, "--name", device.replace(":", ""), "--device", device]
        args = arguments.parse([*map(str, argv), *(flags if device == GPU else ())])
        assert main.main(args) == 0
        found[device] = summary(tmp_path / args.name)["results"]
    for key, value in found["cpu"].items():
        if key in ("training_loss", "ave-norm", "noise_norm", "full_gradient_norm"):
            assert found[GPU][key] == pytest.approx(value, rel=0.02), key
    assert found["cpu"].keys() == found[GPU].keys()
