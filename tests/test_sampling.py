"""--mode sampling at many steps: its rows, their numbers by slow twins, and what resuming makes of them."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, make_data, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child
from test_survival import bits

import data
import landscape
import models
from arguments import parse
from training import Training

BASE = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--lr", 0.02, "--name", "r"]
MANY = ["--mode", "sampling", "--steps", 0, 10, 25, 30, "--full_grad_batchsize", 500]
ALL = [*MANY, "--draws", 6, "--draw_batchsizes", 16, 200, "--measure_batchnorm", "train", "eval", "--shape"]
ALL += ["--smoothing", 3, "--sharpness", "--probe_images", 40]
FILES = ("measurements.csv", "shape.csv", "landscape.csv", "omega.npy")


def rows(directory, name="measurements.csv"):
    with open(directory / name, newline="") as file:
        return list(csv.DictReader(file))


def left(directory):
    """The files of a measurement, and the state that training has come to."""
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    state = [bits(content[key]) for key in ("model", "optimizer", "window", "step", "total")]
    return [(directory / name).read_bytes() for name in FILES if (directory / name).exists()], state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all there is, never interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    status, log = child.run([*BASE, *ALL, "--exact_memory", 4], directory)
    assert status == 0 and "warning" not in log.lower(), log
    return directory / "runs" / "r"


def test_there_is_a_row_for_each_step_mode_and_batch_size(whole):
    head = [(int(r["steps"]), r["batchnorm"], int(r["batch_size"])) for r in rows(whole)]
    assert head == [(s, m, b) for s in (0, 10, 25, 30) for m in ("train", "eval") for b in (16, 64, 200)]
    assert all(int(r["draws"]) == 6 for r in rows(whole))
    shapes = rows(whole, "shape.csv")
    assert {r["layer"] for r in shapes} == {"all", "conv", "bn", "linear"} and len(shapes) == 4 * 2 * 4
    results = summary(whole)["results"]
    last = next(r for r in rows(whole) if (r["steps"], r["batchnorm"], r["batch_size"]) == ("30", "train", "64"))
    assert results["budget"]["delta"] == float(last["delta"]) and results["noise_norm"] == pytest.approx(
        float(last["noise_norm"]), rel=1e-6
    )


def test_training_goes_on_as_if_nothing_had_been_measured(whole, tmp_path):
    status, log = child.run([*BASE, "--mode", "sampling", "--steps", 30, "--full_grad_batchsize", 500], tmp_path)
    assert status == 0, log
    plain = tmp_path / "runs" / "r"
    ours, theirs = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (whole, plain))
    for key in ("model", "optimizer", "random", "step"):
        assert bits(ours[key]) == bits(theirs[key]), key
    assert (whole / "omega.npy").read_bytes() == (plain / "omega.npy").read_bytes()
    (row,) = rows(plain)
    assert row["draws"] == "0" and row["variance"] == row["delta_se"] == "" and float(row["accuracy"]) > 0
    extra = {"budget", "landscape"}
    assert {k: v for k, v in summary(whole)["results"].items() if k not in extra} == summary(plain)["results"]


@pytest.mark.parametrize("at", [2, 5, 27, 40, 75, 100, 150])
def test_stopped_anywhere_it_resumes_to_the_same_rows(whole, tmp_path, at):
    """Between two steps, two chunks of a full gradient, two draws, or two blocks of the shape."""
    argv = [*BASE, *ALL, "--exact_memory", 4]
    status, log = child.run(argv, tmp_path, f"signal_at={at}")
    assert status == 143, log
    status, log = child.run([*argv, "--resume"], tmp_path)
    assert status == 0 and "warning" not in log.lower(), log
    assert left(tmp_path / "runs" / "r") == left(whole)


@pytest.mark.parametrize("moment", ["die_in_write", "die_between_renames", "die_after_rename"])
def test_killed_at_the_worst_moments_it_resumes_to_the_same_rows(whole, tmp_path, moment):
    argv = [*BASE, *ALL, "--exact_memory", 4, "--resume"]
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, moment)
    assert status < 0, log
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert left(tmp_path / "runs" / "r") == left(whole)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients]).double()


class Twin:
    """The textbook loop with SHB: x_t, m_{t−1}, and by another buffer what full gradients alone would have made."""

    def __init__(self, steps, seed=0):
        self.data = data.load("digits", Path("unused"), torch.device("cpu"), seed)
        torch.manual_seed(seed)
        self.model, self.m, self.shadow = Tiny(10), 0.0, 0.0
        batches = (b for epoch in range(9) for b in self.data.epoch(epoch, 64))
        for t in range(steps):
            full = self.full(t) if t >= steps - 4 else 0.0
            self.shadow = 0.9 * self.shadow + full
            self.m = 0.9 * self.m + self.gradient(*next(batches))
            with torch.no_grad():
                vector = torch.nn.utils.parameters_to_vector(self.model.parameters()) - 0.02 * self.m.float()
                torch.nn.utils.vector_to_parameters(vector, self.model.parameters())
        self.next = next(batches)

    def gradient(self, x, y, weight=1.0):
        loss = weight * F.cross_entropy(self.model(x), y)
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))

    def full(self, t):
        return sum(self.gradient(x, y, len(y) / 1437) for x, y in self.data.full_pass(t, 500))


def test_the_numbers_are_those_of_a_slow_twin(whole):
    """At step 10, in training mode: SHB, so ω = g + βm − ∇f."""
    twin = Twin(10)
    full, memory = twin.full(10), 0.9 * twin.m
    row = next(r for r in rows(whole) if (r["steps"], r["batchnorm"], r["batch_size"]) == ("10", "train", "64"))
    row = {k: float(v) for k, v in row.items() if k != "batchnorm"}
    draws = torch.stack([twin.gradient(x, y) for x, y in twin.data.draws(10, 64, 6)])
    variance = ((draws - draws.mean(0)) ** 2).sum().item() / 5
    deltas = 0.02 * (draws + memory - full).norm(dim=1)
    expected = {
        "full_gradient_norm": full.norm().item(),
        "noise_norm": (twin.gradient(*twin.next) + memory - full).norm().item(),
        "memory": memory.norm().item() ** 2,
        "fresh": variance,
        "variance": variance,
        "memory_noise_frozen": 0.81 / 0.19 * variance,
        "c_squared": 64 * 1436 / 1373 * variance,
        "delta": deltas.mean().item(),
        "delta_se": deltas.std().item() / 6**0.5,
        "batchnorm_bias": (draws.mean(0) - full).norm().item() ** 2 - variance / 6,
        "memory_noise": (0.9 * (twin.m - twin.shadow)).norm().item() ** 2,
        "memory_drift": (0.9 * twin.shadow).norm().item() ** 2,
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=2e-3), key
    assert row["staleness"] == pytest.approx(row["memory"] - row["memory_noise_frozen"])
    assert row["memory_noise"] + row["memory_drift"] + row["memory_cross"] == pytest.approx(row["memory"], rel=1e-5)


def test_the_landscape_is_that_of_a_slow_twin(whole):
    """At step 10, in training mode: the loss of the probe at points that are added up by hand."""
    twin = Twin(10)
    row = next(r for r in rows(whole, "landscape.csv") if (r["steps"], r["batchnorm"]) == ("10", "train"))
    row = {k: float(v) for k, v in row.items() if k != "batchnorm"}
    full, memory, eta = twin.full(10), 0.9 * twin.m, 0.02
    x = torch.nn.utils.parameters_to_vector(twin.model.parameters()).detach().double()
    draws = torch.stack([twin.gradient(*batch) for batch in twin.data.draws(10, 64, 6)])
    probe = list(twin.data.probe(40, 250))

    def loss(point):
        torch.nn.utils.vector_to_parameters(point.float(), twin.model.parameters())
        twin.model.train()
        return sum(F.cross_entropy(twin.model(x), y, reduction="sum").item() for x, y in probe) / 40

    y, z = x - eta * full, x - eta * (full + memory)
    real = torch.tensor([loss(x - eta * (g + memory)) for g in draws[:3]]) - loss(z)
    expected = {"loss_x": loss(x), "loss_y": loss(y), "loss_z": loss(z), "displacement": loss(z) - loss(y)}
    expected |= {"real": real.mean().item(), "real_se": real.std().item() / 3**0.5, "points": 3, "probe_images": 40}
    expected["excess"] = row["displacement"] + row["real"]
    spread = ((draws - draws.mean(0)) ** 2).sum().item() / 5
    expected["fluctuation_norm"] = eta * spread**0.5
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=5e-3, abs=1e-5), key
    assert all(row[key] > 0 for key in ("lambda_max", "average_sharpness_se", "batch_sharpness", "predicted"))
    assert row["average_sharpness"] > 0 or abs(row["average_sharpness"]) < 4 * row["average_sharpness_se"]


def test_the_landscape_is_measured_in_float32_whatever_training_uses(monkeypatch):
    """The weights are the same, so all of it is. Nothing is asked of draws that were not made."""
    monkeypatch.setattr(models, "build", lambda name, num_classes: Tiny(num_classes))
    argv, found = [*BASE, "--device", "cpu", "--mode", "sampling", "--sharpness", "--probe_images", 40], []
    for precision in ("default", "bf16"):
        args = parse([*map(str, argv), "--batchsize", "10", "--precision", precision])
        run = Training(args, make_data(60), None, None)
        found.append(landscape.measure(run, "train", [], [], 0.1, SimpleNamespace(before=lambda cost: None)))
    assert found[0] == found[1] and found[0]["lambda_max"] > 0
    assert found[0]["real"] is found[0]["points"] is None


def test_the_probe_is_the_same_at_every_step_and_for_every_optimizer():
    data = make_data(50)
    (x, y), (u, v) = list(data.probe(30, 20)), list(data.probe(30, 20))
    assert all(torch.equal(a, b) for a, b in zip((*x, *y), (*u, *v), strict=True))
    assert [len(labels) for _, labels in (x, y)] == [20, 10]


def test_a_draw_holds_different_images_and_depends_on_nothing_else():
    images = make_data(50)
    first = list(images.draws(7, 20, 3))
    again = list(images.draws(7, 20, 5))[:3]
    for (x, y), (u, v) in zip(first, again, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    plain = make_data(50, augmented=False)
    plain.spec = plain.spec.__class__(50, 20, 10, (0.5,) * 3, (0.5,) * 3, None, augmented=False)
    for x, _ in plain.draws(7, 20, 3):
        assert len(torch.unique(x.flatten(1), dim=0)) == 20
    (a, _), (b, _) = list(plain.draws(7, 20, 2))
    assert not torch.equal(a, b)
    assert not torch.equal(next(images.draws(8, 20, 1))[0], first[0][0])


def test_a_pair_holds_the_same_images_augmented_twice():
    images = make_data(50)
    for (x, y), (u, v) in images.augmented_pairs(3, 20, 4):
        assert torch.equal(y, v) and not torch.equal(x, u) and x.shape == (20, 3, 32, 32)


@pytest.mark.parametrize("cap", [12, 25])
def test_a_cap_measures_where_it_ends(cap, tmp_path):
    status, log = child.run([*BASE, *MANY, "--max_steps", cap], tmp_path)
    assert status == 0, log
    steps = [int(r["steps"]) for r in rows(tmp_path / "runs" / "r")]
    assert steps == {12: [0, 10, 12], 25: [0, 10, 25]}[cap]


def test_a_divergence_at_a_measured_step_is_an_ending(tmp_path):
    argv = [*BASE, "--mode", "sampling", "--steps", 1, 50, "--lr", 1e38, "--optimizer", "sgd"]
    status, log = child.run(argv, tmp_path)
    directory = tmp_path / "runs" / "r"
    assert status == 3 and summary(directory)["status"] == "diverged", log
    assert not (directory / "omega.npy").exists() and not (directory / "measurements.csv").exists()


def test_a_long_measurement_says_how_long(monkeypatch, capsys):
    import progress

    clock = iter([0.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    record = SimpleNamespace(bar=SimpleNamespace(disable=True))
    shown = progress.Progress(SimpleNamespace(step=7, record=record, check_signals=lambda: None), 50_000)
    between = shown.chunks_of(1000)
    for _ in range(5):
        between()
    assert capsys.readouterr().out == "measuring at step 7: 50,000 images, 25 minutes\n"


def test_the_dashboard_has_groups(whole):
    import sampling

    numbers = [dict(row, batch_size=int(row["batch_size"])) for row in rows(whole)[-6:]]
    args = parse([*map(str, BASE), *map(str, ALL)])
    shown = sampling.shown(args, numbers, rows(whole, "shape.csv")[-8:], rows(whole, "landscape.csv")[-2:])
    assert {"noise/delta", "noise_eval/delta", "variance/c_squared_b16", "variance_eval/variance_b200"} <= shown.keys()
    assert {"smoothing/real", "smoothing_eval/predicted_se", "sharpness/lambda_max"} <= shown.keys()
    assert "shape/isotropy" in shown and "noise/steps" not in shown and float(shown["noise/fresh"]) > 0
