"""The three experiments against textbook loops, on MNIST-1D: the trajectory, what a row says, when a run ends."""

from itertools import accumulate, count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import parsed, rows, start, summary

import arguments
import models
from arguments import ENDLESS, OPTIMIZERS
from training import loop
from training.data import load
from training.stopping import StoppingRule, first_crossing, running_means


def textbook(args, steps):
    """The loop in plain torch on the same batches: loss, ‖g‖ in float64, hits, size of every step; the model."""
    torch.manual_seed(args.seed)
    model = models.build(args.model, 10)
    data = load("mnist1d", args.data_dir, torch.device("cpu"), args.seed)
    params, seen, lr, beta, nu = list(model.parameters()), [], args.lr, args.beta1, args.nu
    m = [torch.zeros_like(p) for p in params]
    for epoch in count():
        for x, y in data.epoch(epoch, args.batchsize):
            if len(seen) == steps:
                return seen, model, data
            out = model(x)
            loss = F.cross_entropy(out, y)
            g = torch.autograd.grad(loss, params)
            norm = sum((each.double() ** 2).sum().item() for each in g) ** 0.5
            seen.append((loss.item(), norm, (out.argmax(1) == y).sum().item(), len(y)))
            with torch.no_grad():
                for p, buffer, each in zip(params, m, g, strict=True):
                    if args.optimizer == "sgd":
                        p.add_(each, alpha=-lr)
                        continue
                    buffer.mul_(beta).add_(each, alpha=1.0 if args.optimizer == "shb" else 1 - beta)
                    d = torch.lerp(each, buffer, nu) if args.optimizer == "qhm" else buffer
                    p.add_(d, alpha=-lr)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_thousand_steps_equal_a_plain_loop_to_the_bit(optimizer, mnist1d_dir):
    run = start(mnist1d_dir, "--optimizer", optimizer, "--batchsize", 60)  # 67 steps an epoch, the last of 40
    windows = list(run.windows(1000))
    seen, model, _ = textbook(run.args, 1000)
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    losses, norms, hits, sizes = np.array(seen).T
    got = {k: np.concatenate([getattr(w, k) for w in windows]) for k in ("steps", "losses", "norms", "hits", "sizes")}
    assert got["steps"].tolist() == list(range(1, 1001))
    np.testing.assert_allclose(got["losses"], losses, rtol=1e-6)
    np.testing.assert_allclose(got["norms"], norms, rtol=2e-7)
    assert np.array_equal(got["hits"], hits) and np.array_equal(got["sizes"], sizes)


def test_the_device_is_read_every_window_and_at_the_end_of_an_epoch(mnist1d_dir):
    run = start(mnist1d_dir, "--batchsize", 12)  # 334 steps an epoch
    assert [int(w.steps[-1]) for w in run.windows(1000)] == [200, 334, 400, 600, 668, 800, 1000]


def test_evaluations_are_thinned_by_one_rule(train, monkeypatch):
    """Every epoch to 200, every second to 400, every fourth to 800; rows likewise, and one every 200 steps."""

    def evaluate(run):
        run.evaluated = {"steps": run.step, "accuracy": 10.0, "test_loss": 2.3}
        return run.evaluated

    monkeypatch.setattr(loop.Training, "evaluate", evaluate)
    monkeypatch.setattr(loop.Training, "eager_step", lambda run, x, y: (torch.tensor(1.0),) * 3)
    _, directory = train("--batchsize", 4000, "--epochs", 830, "--model", "Softmax")
    evaluated = [int(row["steps"]) for row in rows(directory) if row["accuracy"]]
    assert evaluated == [*range(1, 201), *range(202, 401, 2), *range(404, 801, 4), 808, 816, 824, 830]
    assert {int(row["steps"]) for row in rows(directory)} == set(evaluated) | {600, 800}


def test_normal_records_the_textbook_numbers(train, mnist1d_dir):
    argv = ("--batchsize", 128, "--epochs", 3)
    status, directory = train(*argv)
    table, results = rows(directory), summary(directory)["results"]
    assert status == 0 and [int(r["steps"]) for r in table] == [32, 64, 96]
    for i, row in enumerate(table):
        seen, model, data = textbook(parsed(mnist1d_dir, *argv), 32 * (i + 1))
        loss, norm, hits, size = np.array(seen[-32:]).T
        assert float(row["training_loss"]) == pytest.approx((loss * size).sum() / 4000, rel=1e-6)
        assert float(row["training_acc"]) == pytest.approx(100 * hits.sum() / 4000, abs=1e-9)
        assert float(row["g-norm"]) == pytest.approx(norm.mean(), rel=1e-6)
        assert float(row["ave-norm"]) == pytest.approx(np.array(seen)[:, 1].mean(), rel=1e-6)
        x = torch.cat([x for x, _ in data.test(1000)])
        assert float(row["test_loss"]) == pytest.approx(F.cross_entropy(model(x), data.y_test).item(), rel=1e-5)
        accuracy = 100 * (model(x).argmax(1) == data.y_test).double().mean().item()
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=0.02)
    for column in ("accuracy", "training_loss"):
        assert results[column] == float(table[-1][column])
    assert results["best_accuracy"] == max(float(r["accuracy"]) for r in table)
    assert summary(directory)["epochs"] == 3


@pytest.mark.parametrize("batchsize", [4, 32])
def test_rows_cover_every_step_once_whatever_the_mode(train, batchsize):
    tables = []
    for mode in (["normal", "--epochs", 1], ["critical", "--eps", 0.01], ["sampling", "--steps", 450]):
        _, directory = train("--mode", *mode, "--batchsize", batchsize, "--max_steps", 450)
        norms = np.fromfile(directory / "gradient_norms.f32", "<f4").astype(float)
        table, before = rows(directory), 0
        tables.append({row["steps"]: row for row in table})
        assert len(norms) == summary(directory)["steps"] == int(table[-1]["steps"])
        for row in table:
            part, steps = norms[before : int(row["steps"])], int(row["steps"])
            assert float(row["min_g-norm"]) == part.min() and float(row["max_g-norm"]) == part.max()
            assert float(row["g-norm"]) == pytest.approx(part.mean(), rel=1e-12)
            assert float(row["ave-norm"]) == pytest.approx(norms[:steps].mean(), rel=1e-12)
            before = steps
    for steps in set(tables[0]) & set(tables[1]) & set(tables[2]):
        for column in ("training_loss", "training_acc", "ave-norm"):
            assert tables[0][steps][column] == tables[1][steps][column] == tables[2][steps][column]


def test_until_loss_ends_after_the_first_epoch_below_it(train):
    argv = ("--batchsize", 40, "--lr", 0.1, "--optimizer", "sgd", "--model", "MLP")
    _, whole = train(*argv, "--epochs", 8, "--name", "whole")
    losses = [float(row["training_loss"]) for row in rows(whole)]
    level = losses[4] + 1e-6
    assert min(losses[:4]) > level  # or else this test could not tell
    status, directory = train(*argv, "--until_loss", level, "--epochs", 50)
    s = summary(directory)
    assert (status, s["status"], s["epochs"]) == (0, "finished", 5)
    assert s["results"]["training_loss"] == losses[4] and s["results"]["accuracy"] == float(rows(whole)[4]["accuracy"])
    weights = [torch.load(d / "checkpoint.pt", weights_only=True) for d in (whole, directory)]
    assert weights[1]["step"] == 500
    _, capped = train(*argv, "--until_loss", 1e-9, "--epochs", 2)
    assert summary(capped)["status"] == "not_reached" and summary(capped)["epochs"] == 2
    _, more = train(*argv, "--until_loss", 1e-9, "--epochs", 3, "--resume")
    assert summary(more)["epochs"] == 3


# --- critical -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [["0.8"], ["0.75", "3.0", "0.8"]])
@pytest.mark.parametrize("min_epochs", [0, 1])
@pytest.mark.parametrize(("seed", "batchsize"), [(0, 128), (1, 301)])
def test_a_critical_run_ends_exactly_at_the_first_crossing(train, mnist1d_dir, eps, min_epochs, seed, batchsize):
    argv = ("--mode", "critical", "--batchsize", batchsize, "--seed", seed, "--min_epochs", min_epochs)
    argv += ("--optimizer", "sgd", "--model", "Softmax", "--eps", *eps, "--max_steps", 700)
    status, directory = train(*argv)
    s, norms = summary(directory), np.fromfile(directory / "gradient_norms.f32", "<f4")
    # The twin: a growing list, as the paper defines it, on the norms of the textbook loop.
    seen, model, _ = textbook(parsed(mnist1d_dir, *argv), len(norms))
    np.testing.assert_allclose(norms, np.array(seen)[:, 1], rtol=1e-5)
    check, total, crossed = min_epochs * -(-4000 // batchsize), 0.0, {}
    for t, norm in enumerate(norms.tolist(), start=1):
        total += norm
        for e in map(float, eps):
            if t >= check and total / t <= e:
                crossed.setdefault(repr(e), t)
    results = s["results"]
    assert {k: v for k, v in results["steps_to_eps"].items() if v is not None} == crossed
    assert list(results["steps_to_eps"]) == [repr(e) for e in sorted(map(float, eps), reverse=True)]
    complete = len(crossed) == len(eps)
    assert s["status"] == ("finished" if complete else "not_reached") and status == 0
    assert s["steps"] == len(norms) == (max(crossed.values()) if complete else 700)
    assert results["sfo"] == {k: v and v * batchsize for k, v in results["steps_to_eps"].items()}
    assert results["at_first_check"] == [k for k, v in results["steps_to_eps"].items() if v == check > 1]
    assert results["ave-norm"] == pytest.approx(total / len(norms), rel=1e-12)
    assert results["max_gradient_norm"] == norms.max()
    weights = torch.load(directory / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_readings_before_the_crossing_are_few(train, monkeypatch):
    readings, read = [], loop.Training._window
    monkeypatch.setattr(loop.Training, "_window", lambda run: readings.append(run.step) or read(run))
    argv = ("--mode", "critical", "--batchsize", 301, "--min_epochs", 0, "--model", "Softmax", "--optimizer", "sgd")
    _, directory = train(*argv, "--eps", 0.4)
    assert summary(directory)["status"] == "finished" and len(readings) < 0.5 * summary(directory)["steps"]


@pytest.mark.parametrize("first", [1, 201])
@pytest.mark.parametrize("check", [1, 5, 203, 300])
@pytest.mark.parametrize("eps", [0.3, 0.5, 2.0, 1e-9])
def test_first_crossing_against_a_loop(first, check, eps):
    means = np.random.default_rng(check).integers(0, 9, 20) / 4  # some equal to ε
    expected = next((first + i for i, m in enumerate(means) if m <= eps and first + i >= check), None)
    assert first_crossing(means, first, eps, check) == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_step_before_the_earliest_end_is_a_crossing(seed):
    rng = np.random.default_rng(seed)
    norms, eps, check, step = rng.gamma(2, 1 / (1 + np.arange(900) / 100)), 0.7, 13, 0
    crossing = first_crossing(running_means(norms), 1, eps, check)
    rule, total, readings = StoppingRule([eps], check), 0.0, 0
    while not rule.all_reached:
        step_before, step = step, max(step + 1, rule.earliest_end())
        rule.follow(norms[step_before:step], total, step_before)
        total, readings = rule.total, readings + 1
    assert rule.reached == {repr(eps): crossing} and step == crossing and readings < crossing / 4


def test_a_running_mean_of_millions_is_in_double_precision():
    norms = np.linspace(1, 0.9, 200_000).astype("<f4")
    totals = accumulate(norms.tolist())
    expected = next(t for t, total in enumerate(totals, start=1) if total / t <= 0.97)
    in_float32 = np.cumsum(norms) / np.arange(1, len(norms) + 1)
    assert np.flatnonzero(in_float32 <= 0.97)[0] + 1 != expected  # or else this test could not tell
    assert first_crossing(running_means(norms), 1, 0.97, 1) == expected
    parts = np.concatenate([running_means(norms[:777]), running_means(norms[777:], norms[:777].sum(dtype=float), 777)])
    np.testing.assert_allclose(parts, running_means(norms), rtol=1e-12)


# --- ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [["normal", "--epochs", 3], ["critical"], ["sampling", "--steps", 300]])
def test_a_divergence_ends_the_run_before_that_step(train, monkeypatch, mode):
    step = loop.Training.eager_step

    def broken(run, x, y):
        loss, norm, hits = step(run, x, y)
        return (loss * float("nan"), norm, hits) if run.step == 49 else (loss, norm, hits)

    monkeypatch.setattr(loop.Training, "eager_step", broken)
    status, directory = train("--mode", *mode, "--batchsize", 128)
    s = summary(directory)
    assert (status, s["status"], s["steps"], s["results"]["diverged_at_step"]) == (3, "diverged", 49, 50)
    assert len(np.fromfile(directory / "gradient_norms.f32", "<f4")) == 49 == int(rows(directory)[-1]["steps"])


def test_a_test_loss_that_is_not_finite_is_a_divergence(train, monkeypatch):
    forward = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **o: forward(*a, **o) * (float("nan") if o else 1))
    status, directory = train("--batchsize", 128, "--epochs", 2)
    assert (status, summary(directory)["status"], summary(directory)["steps"]) == (3, "diverged", 32)
    assert not any(row["accuracy"] for row in rows(directory))


def test_a_run_prints_what_its_numbers_mean(train, capsys):
    train("--mode", "sampling", "--steps", 3, "--batchsize", 128)
    out = capsys.readouterr().out
    assert "finished after 3 steps" in out and "search direction noise of the batch that training takes next" in out
    assert all("(" in line for line in out.splitlines() if line.startswith("  "))


@pytest.mark.parametrize(("model", "steps", "said"), [("ConvNet1d", 3, 3), ("ConvNet1d", 100, 2), ("MLP", 3, 0)])
def test_an_accuracy_that_batchnorm_spoils_says_so(model, steps, said, train, capsys):
    train("--model", model, "--max_steps", steps, "--batchsize", 100, "--epochs", 9)
    assert capsys.readouterr().out.count("may be low: BatchNorm's averages lag") == said


def test_a_plain_command_is_the_papers():
    args = arguments.parse([])
    values = (args.mode, args.dataset, args.model, args.optimizer, args.epochs, args.lr, args.batchsize, args.beta1)
    assert values == ("normal", "CIFAR100", "ResNet18", "shb", 200, 0.1, 8, 0.9)
    assert arguments.planned_steps(args) == 200 * 6250 and not arguments.measures(args)
    assert arguments.planned_steps(arguments.parse(["--mode", "critical"])) == ENDLESS
    sampling = arguments.parse(["--mode", "sampling"])
    assert (sampling.draws, sampling.measure, sampling.steps) == (1, [], [10_000])
