"""What is measured at a step: when, its rows against slow twins, and that training does not notice."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import parsed, rows, start, summary
from test_experiments import textbook

from arguments import MEASURES, OPTIMIZERS
from measure.quantities import QUANTITIES, quantity
from training.loop import Training
from training.record import MEASUREMENTS


def numbers(rows, **where):
    """The only row for which the columns have these values; its cells as numbers, without the empty ones."""
    where = {"batchnorm": "train", "layer": "all"} | where
    (row,) = [row for row in rows if all(row[key] == str(value) for key, value in where.items())]
    return {key: float(value) for key, value in row.items() if value and key not in ("batchnorm", "layer")}


def flat_gradient(model, x, y):
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradient]).double()


def full_gradient(model, data, step):
    """Of all images at once."""
    return flat_gradient(model, *map(torch.cat, zip(*data.full_pass(step, 1000), strict=True)))


ALL = ["--measure", *MEASURES, "--draws", 4, "--draw_batchsizes", 16]
ALL += ["--probe_images", 20, "--full_grad_batchsize", 4000]


@pytest.mark.parametrize(
    "mode",
    [
        ["normal", "--epochs", 1, "--measure_every", 0.7, "--exact_memory", 2],
        ["critical", "--max_steps", 16, "--measure_every", 0.7, "--measure_batchnorm", "eval"],
        ["sampling", "--steps", 3, 16],
    ],
)
def test_a_run_with_and_without_measuring_has_the_same_bits(train, mode):
    argv = ["--batchsize", 250, "--model", "ConvNet1d", "--seed", 3]
    _, plain = train("--epochs", 1, *argv)
    _, measured = train("--mode", *mode, *argv, *ALL)
    a, b = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (plain, measured))
    assert all(torch.equal(b["model"][key], value) for key, value in a["model"].items())
    for key, state in a["optimizer"]["state"].items():
        assert torch.equal(b["optimizer"]["state"][key]["momentum_buffer"], state["momentum_buffer"])
    assert torch.equal(a["random"][0], b["random"][0])
    assert (plain / "gradient_norms.f32").read_bytes() == (measured / "gradient_norms.f32").read_bytes()
    assert len(rows(measured, "measurements")) >= 2


@pytest.mark.parametrize("every", [0.02, 0.4, 1, 1.7, 5])
@pytest.mark.parametrize("batchsize", [64, 1000])
def test_one_measurement_in_every_interval_at_a_position_that_moves(mnist1d_dir, every, batchsize):
    run = start(mnist1d_dir, "--batchsize", batchsize, "--measure_every", every)
    spacing, steps = every * run.steps_per_epoch, [0]
    while steps[-1] < 300 * max(1, spacing):
        steps.append(run.measuring.next_after(steps[-1]))
    assert sorted(set(steps)) == steps
    if spacing >= 2:
        for k in range(1, int(steps[-1] / spacing)):
            assert sum(int((k - 1) * spacing) <= step < k * spacing for step in steps[1:]) in (1, 2)
        assert abs(len(steps) - 1 - steps[-1] / spacing) <= 1
        counts = np.histogram([step / spacing % 1 for step in steps[1:]], bins=4, range=(0, 1))[0]
        assert counts.min() > 0.1 * len(steps)  # no part of the interval is left out


def test_a_run_measures_at_its_steps_and_its_end_and_never_twice(train, mnist1d_dir):
    _, directory = train("--batchsize", 250, "--epochs", 3, "--measure_every", 1)
    steps = [int(row["steps"]) for row in rows(directory, "measurements")]
    run = start(mnist1d_dir, "--batchsize", 250, "--epochs", 3, "--measure_every", 1)
    expected = {0, 48} | {run.measuring.next_after(step) for step in range(47)} - {run.measuring.next_after(47)}
    assert steps == sorted(step for step in expected if step <= 48) and len(steps) == 5
    known = {row["steps"]: row["accuracy"] for row in rows(directory)}
    for row in rows(directory, "measurements"):
        assert row["accuracy"] == known.get(row["steps"], row["accuracy"]) and row["accuracy"]
    _, sampled = train("--mode", "sampling", "--batchsize", 250, "--steps", 7, 2, 7 + 4)
    assert [row["steps"] for row in rows(sampled, "measurements")] == ["2", "7", "11"]


def test_a_critical_run_is_measured_where_it_ends(train):
    argv = ("--mode", "critical", "--batchsize", 301, "--min_epochs", 0, "--model", "Softmax", "--optimizer", "sgd")
    _, directory = train(*argv, "--eps", 0.6, 0.7, 3.0, "--measure_every", 0.5)
    table, results = rows(directory, "measurements"), summary(directory)["results"]
    assert int(table[-1]["steps"]) == summary(directory)["steps"] == results["steps_to_eps"]["0.6"]
    norms = {int(row["steps"]): float(row["full_gradient_norm"]) for row in table}
    assert results["steps_to_eps_full"]["3.0"] == 0
    for eps in ("3.0", "0.7", "0.6"):
        first = next((step for step, norm in norms.items() if norm <= float(eps)), None)
        before = [step for step in norms if first is None or step < first]
        assert results["steps_to_eps_full"][eps] == first
        assert results["last_above_eps_full"][eps] == (before[-1] if before else None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 15])
def test_omega_is_that_of_the_textbook_loop(train, mnist1d_dir, optimizer, steps):
    argv = ("--mode", "sampling", "--optimizer", optimizer, "--batchsize", 128, "--steps", steps)
    status, directory = train(*argv)
    omega, row = np.load(directory / "omega.npy", allow_pickle=False), numbers(rows(directory, "measurements"))
    args = parsed(mnist1d_dir, *argv)
    _, model, data = textbook(args, steps)
    g, full = flat_gradient(model, *list(data.epoch(0, 128))[steps]), full_gradient(model, data, steps)
    assert status == 0 and omega.dtype == np.float32 and omega.shape == g.shape
    if optimizer == "sgd" or steps == 0:
        w = {"sgd": 1, "shb": 1, "nshb": 0.1, "qhm": 0.55}[optimizer]  # m = 0 at step 0
        np.testing.assert_allclose(omega, (w * g - full).numpy(), atol=2e-6)
    assert row["noise_norm"] == pytest.approx(np.linalg.norm(omega.astype(float)), rel=1e-6)
    assert row["full_gradient_norm"] == pytest.approx(full.norm().item(), rel=1e-5)
    assert row["gradient_noise_norm"] == pytest.approx((g - full).norm().item(), rel=1e-5)
    assert row["delta"] == pytest.approx(args.lr * row["noise_norm"]) and row["draws"] == 1 and "delta_se" not in row
    results = summary(directory)["results"]
    kept = QUANTITIES.keys() & results.keys() & row.keys()
    assert len(kept) > 5 and all(results[key] == pytest.approx(row[key]) for key in kept)


@pytest.mark.parametrize(("optimizer", "w"), [("shb", 1.0), ("nshb", 0.1)])
def test_delta_and_variance_are_those_of_the_draws(train, mnist1d_dir, optimizer, w):
    argv = ("--mode", "sampling", "--optimizer", optimizer, "--batchsize", 128)
    argv += ("--steps", 20, "--draws", 6, "--draw_batchsizes", 32)
    _, directory = train(*argv)
    table = rows(directory, "measurements")
    args = parsed(mnist1d_dir, *argv)
    _, model, data = textbook(args, 20)
    full = full_gradient(model, data, 20)
    state = torch.load(directory / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    memory = 0.9 * torch.cat([state[i]["momentum_buffer"].flatten() for i in range(len(state))]).double()
    for b in (128, 32):
        row = numbers(table, batch_size=b)
        draws = torch.stack([flat_gradient(model, *batch) for batch in data.draws(20, b, 6)])
        norms = (w * draws + memory - full).norm(dim=1)
        variance = draws.var(dim=0, unbiased=True).sum().item()
        assert row["draws"] == 6 and row["delta"] == pytest.approx(args.lr * norms.mean().item(), rel=1e-5)
        assert row["delta_se"] == pytest.approx(args.lr * norms.std().item() / 6**0.5, rel=1e-4)
        other = 0.1 if optimizer == "shb" else 10.0  # d under the other name, and η by its inverse
        renamed = args.lr / other * (other * (w * draws + memory) - full).norm(dim=1).mean().item()
        names = ("delta_as_shb", "delta_as_nshb")
        own, renamed_as = names if optimizer == "shb" else reversed(names)
        assert row[own] == row["delta"] and row[renamed_as] == pytest.approx(renamed, rel=1e-5)
        assert row["variance"] == pytest.approx(variance, rel=1e-5)
        assert row["c_squared"] == pytest.approx(b * 3999 / (4000 - b) * variance, rel=1e-5)
        assert row["noise_square"] == pytest.approx((norms**2).mean().item(), rel=1e-5)
        assert row["memory"] == pytest.approx((memory - (1 - w) * full).norm().item() ** 2, rel=1e-5)
        assert ("noise_norm" in row) == (b == 128)


def test_recalibrated_accuracy_against_a_slow_twin(mnist1d_dir):
    """Means of the batches' means and unbiased variances, caught at every BatchNorm's input; float64 evaluation."""
    run = start(mnist1d_dir, "--model", "ConvNet1d", "--batchsize", 100, "--epochs", 1)
    list(run.windows(40))
    found, before = run.evaluate(), copy.deepcopy(run.model.state_dict())
    model, seen = copy.deepcopy(run.model).double().train(), {}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, inputs: seen.setdefault(m, []).append(inputs[0].detach()))
    with torch.no_grad():
        for x, _ in run.data.for_batchnorm(40, 5000, 1000):
            model(x.double())
        for norm in norms:
            channels = [x.transpose(0, 1).flatten(1) for x in seen[norm]]
            assert len(channels) == 4
            norm.running_mean = torch.stack([c.mean(1) for c in channels]).mean(0)
            norm.running_var = torch.stack([c.var(1) for c in channels]).mean(0)
        logits = model.eval()(run.data.x_test.double())
    assert found["test_loss_recalibrated"] == pytest.approx(F.cross_entropy(logits, run.data.y_test).item(), rel=1e-5)
    hits = (logits.argmax(1) == run.data.y_test).double().mean().item()
    assert found["accuracy_recalibrated"] == pytest.approx(100 * hits, abs=0.03)
    assert abs(found["accuracy_recalibrated"] - found["accuracy"]) > 1
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


def test_recalibrated_accuracy_is_the_plain_one_where_weights_stand_still(train):
    argv = ("--model", "ConvNet1d", "--batchsize", 1000, "--epochs", 15, "--lr", "1e-9")
    results = summary(train(*argv)[1])["results"]
    assert results["accuracy_recalibrated"] == pytest.approx(results["accuracy"], abs=0.3)
    assert results["test_loss_recalibrated"] == pytest.approx(results["test_loss"], rel=0.01)


def test_when_accuracy_is_recalibrated(train, monkeypatch):
    argv = ("--model", "ConvNet1d", "--batchsize", 500, "--epochs", 3)
    _, plain = train(*argv, "--name", "plain", "--measure_every", 1)
    _, every = train(*argv, "--name", "every", "--recalibrate")
    given = [[bool(row["accuracy_recalibrated"]) for row in rows(directory)] for directory in (plain, every)]
    measured = {row["steps"] for row in rows(plain, "measurements")}
    assert given[0] == [row["steps"] in measured for row in rows(plain)] and given[0].count(False) == 2
    assert given[1] == [True] * 3 and all(row["accuracy_recalibrated"] for row in rows(plain, "measurements"))
    a, b = (torch.load(directory / "checkpoint.pt")["model"] for directory in (plain, every))
    assert all(torch.equal(a[key], b[key]) for key in a)
    last = [summary(directory)["results"]["accuracy_recalibrated"] for directory in (plain, every)]
    assert last[0] == last[1] == float(rows(every)[-1]["accuracy_recalibrated"])
    tests, tested = [], Training._tested
    monkeypatch.setattr(Training, "_tested", lambda run: tests.append(run.step) or tested(run))
    _, without = train("--batchsize", 500, "--epochs", 3, "--recalibrate")  # an MLP: no BatchNorm
    assert tests == [8, 16, 24] and not any(row["accuracy_recalibrated"] for row in rows(without))
    assert "accuracy_recalibrated" not in summary(without)["results"]


@pytest.mark.parametrize("optimizer", ["shb", "nshb"])
def test_the_exact_memory_is_split_in_every_mode(train, mnist1d_dir, optimizer):
    """Against a buffer that is fed the full gradient of every step since the first."""
    argv = ("--optimizer", optimizer, "--batchsize", 500, "--exact_memory", 100, "--measure_every", 1)
    _, directory = train(*argv, "--epochs", 2)
    _, critical = train(*argv, "--mode", "critical", "--max_steps", 16)
    table = rows(directory, "measurements")
    kept = [row["memory_noise"] for row in rows(critical, "measurements")]
    assert [row["memory_noise"] for row in table] == kept and kept[0] == "0.0" and kept[-1]
    args = parsed(mnist1d_dir, *argv)
    w = 1.0 if optimizer == "shb" else 0.1
    shadow, buffer = 0.0, 0.0
    for t in range(17):
        _, model, data = textbook(args, t)
        full, g = full_gradient(model, data, t), flat_gradient(model, *list(data.epoch(t // 8, 500))[t % 8])
        row = [row for row in table if row["steps"] == str(t)]
        if row and t:
            noise, drift = 0.9 * (buffer - shadow), 0.9 * shadow - (1 - w) * full
            parts = [noise @ noise, drift @ drift, 2 * noise @ drift]
            got = [float(row[0][key]) for key in ("memory_noise", "memory_drift", "memory_cross")]
            np.testing.assert_allclose(got, [float(part) for part in parts], rtol=2e-4, atol=1e-6)
        shadow, buffer = 0.9 * shadow + w * full, 0.9 * buffer + w * g


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_number_is_declared_and_in_its_column(train, optimizer):
    argv = ("--mode", "sampling", "--steps", 2, "--batchsize", 250, "--model", "ConvNet1d", "--optimizer", optimizer)
    _, directory = train(*argv, *ALL, "--measure_batchnorm", "train", "eval", "--exact_memory", 2)
    table = rows(directory, "measurements")
    assert tuple(table[0]) == tuple(MEASUREMENTS)
    for name in summary(directory)["results"]:
        assert quantity(name)
    for mode in ("train", "eval"):
        own, other = (numbers(table, batch_size=b, batchnorm=mode) for b in (250, 16))
        missing = {column for column in MEASUREMENTS if column not in own} - {"batchnorm", "layer"}
        without = ("augmentation", "c_squared_aug", "delta_as", "memory_kurtosis")
        without += ("memory_",) if mode == "eval" or optimizer == "sgd" else ()
        expected = {q for q in missing if q.startswith(without)}
        assert missing <= expected | {"non_normal_share", "components_rejected", "hill", "hill_normal"}
        assert "variance" in other and "lambda_max" not in other
    layers = [row["layer"] for row in table if row["batchnorm"] == "train" and row["batch_size"] == "250"]
    assert layers[0] == "all" and len(layers) > 3 and all(row["noise_trace"] for row in table if row["layer"] != "all")


def test_a_number_that_is_not_finite_ends_the_run(train, monkeypatch):
    from training import measuring

    measured, infinite = measuring.batch_noise, {"noise_norm": float("inf")}
    monkeypatch.setattr(measuring, "batch_noise", lambda *a, **o: (measured(*a, **o)[0] | infinite, None))
    status, directory = train("--mode", "sampling", "--steps", 5, 9, "--batchsize", 250)
    assert (status, summary(directory)["status"], summary(directory)["steps"]) == (3, "diverged", 5)
    assert not (directory / "measurements.csv").exists()
