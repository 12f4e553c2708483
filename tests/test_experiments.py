import csv
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Tiny, committed, make_data, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import arguments
import data as datasets
import main
import models
import training
import utils
from arguments import OPTIMIZERS
from measure.gradients import gradient_norm
from measure.noise import measure
from state import first_crossing


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(models, "build", lambda name, num_classes: Tiny(num_classes))


def start(*argv, data=None):
    """A Training without a record, on the CPU."""
    args = arguments.parse(["--device", "cpu", "--dataset", "digits", "--model", "ResNet20", *map(str, argv)])
    return training.Training(
        args, data or datasets.load("digits", Path("unused"), torch.device("cpu"), args.seed), None, None
    )


def run(tmp_path, *argv):
    """A whole run in this process, on the CPU: its exit status and directory."""
    flags = ["--device", "cpu", "--dataset", "digits", "--model", "ResNet20", "--runs_dir", str(tmp_path)]
    args = arguments.parse([*flags, *map(str, argv)])
    return main.main(args), tmp_path / args.name


def rows(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def slow_training(args, data, steps):
    """The textbook loop: loss, gradient norm (float64), hits of every step; the model at the end."""
    torch.manual_seed(args.seed)
    model = Tiny(data.spec.classes)
    beta = {"momentum": args.beta1}
    options = {"sgd": {}, "shb": beta, "nshb": beta, "qhm": beta | {"nesterov": True}}[args.optimizer]
    lr = args.lr * (1 - args.beta1 if args.optimizer in ("nshb", "qhm") else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    seen, epoch = [], 0
    while True:
        for x, y in data.epoch(epoch, args.batchsize):
            if len(seen) == steps:
                return seen, model
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            loss.backward()
            norm = sum((p.grad.double() ** 2).sum().item() for p in model.parameters()) ** 0.5
            seen.append((loss.item(), norm, (out.argmax(1) == y).sum().item(), len(y)))
            optimizer.step()
        epoch += 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batchsize", [100, 479, 1437])
def test_training_is_the_textbook_loop(optimizer, batchsize):
    run = start("--optimizer", optimizer, "--batchsize", batchsize, "--lr", 0.05, "--nu", 0.9)  # ν = β: Nesterov's
    windows = list(committed(run.windows(33), run))
    seen, model = slow_training(run.args, run.data, 33)
    losses, norms, hits, sizes = np.array(seen).T
    got = {k: np.concatenate([getattr(w, k) for w in windows]) for k in ("steps", "losses", "norms", "hits", "sizes")}
    assert got["steps"].tolist() == list(range(1, 34))
    np.testing.assert_allclose(got["losses"], losses, rtol=1e-4)
    np.testing.assert_allclose(got["norms"], norms, rtol=1e-4)
    assert np.array_equal(got["sizes"], sizes) and np.abs(got["hits"] - hits).max() <= 1
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_the_device_is_read_every_window_and_at_the_end_of_an_epoch(monkeypatch):
    run = start("--batchsize", 4)  # 360 steps an epoch
    ends = [int(w.steps[-1]) for w in committed(run.windows(1000), run)]
    assert ends == [200, 360, 400, 600, 720, 800, 1000]


def test_nshb_at_lr_over_one_minus_beta_is_shb_at_lr():
    losses = {}
    for name, lr in (("shb", 0.02), ("nshb", 0.2)):
        run = start("--optimizer", name, "--lr", lr, "--batchsize", 128)
        losses[name] = np.concatenate([w.losses for w in committed(run.windows(100), run)])
    np.testing.assert_allclose(losses["shb"], losses["nshb"], rtol=2e-3)


@pytest.mark.parametrize(
    "mode", [["normal", "--epochs", 2], ["critical", "--max_steps", 20], ["sampling", "--steps", 20]]
)
@pytest.mark.parametrize(("nu", "same"), [(0, "sgd"), (1, "nshb")])
def test_qhm_ends_in_sgd_and_nshb_bit_for_bit_in_every_mode(tmp_path, mode, nu, same):
    argv = ["--mode", *mode, "--batchsize", 150, "--lr", 0.05]
    ends = [["--optimizer", "qhm", "--nu", nu, "--name", "q"], ["--optimizer", same, "--name", "s"]]
    made = [run(tmp_path, *argv, *end) for end in ends]
    assert [status for status, _ in made] == [0, 0]
    ours, theirs = (torch.load(directory / "checkpoint.pt", weights_only=True)["model"] for _, directory in made)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("eps", [["2.5"], ["2.2", "3.0", "2.5"]])
@pytest.mark.parametrize("min_epochs", [0, 1, 3])
@pytest.mark.parametrize(("seed", "batchsize"), [(0, 128), (1, 7)])
def test_the_first_crossing_is_exact(tmp_path, eps, min_epochs, seed, batchsize):
    argv = ("--mode", "critical", "--batchsize", batchsize, "--seed", seed, "--min_epochs", min_epochs, "--lr", 0.02)
    status, directory = run(tmp_path, *argv, "--eps", *eps, "--max_steps", 1500)
    s = summary(directory)
    norms = np.fromfile(directory / "gradient_norms.f32", "<f4")
    # The twin: a growing list, as the paper defines it, on the norms of the textbook loop.
    seen, _ = slow_training(
        arguments.parse([*map(str, argv), "--dataset", "digits"]),
        datasets.load("digits", Path("x"), torch.device("cpu"), seed),
        len(norms),
    )
    np.testing.assert_allclose(norms[:50], np.array(seen)[:50, 1], rtol=1e-3)
    guard, total, crossed = min_epochs * -(-1437 // batchsize), 0.0, {}
    for t, norm in enumerate(norms.tolist(), start=1):
        total += norm
        for e in map(float, eps):
            if t >= guard and total / t <= e:
                crossed.setdefault(repr(e), t)
    assert {k: v for k, v in s["results"]["steps_to_eps"].items() if v is not None} == crossed
    assert list(s["results"]["steps_to_eps"]) == [repr(e) for e in sorted(map(float, eps), reverse=True)]
    for key, steps in s["results"]["steps_to_eps"].items():
        assert s["results"]["sfo"][key] == (None if steps is None else steps * batchsize)
    complete = len(crossed) == len(eps)
    assert s["status"] == ("finished" if complete else "not_reached") and status == 0
    assert s["steps"] == len(norms) == (max(crossed.values()) if complete else 1500)
    assert s["results"]["mean_gradient_norm"] == pytest.approx(total / len(norms), rel=1e-12)
    assert s["results"]["max_gradient_norm"] == norms.max()
    table = rows(directory)
    assert int(table[-1]["steps"]) == s["steps"]
    for row, before in zip(table, [{"steps": 0}, *table], strict=False):
        part = norms[int(before["steps"]) : int(row["steps"])].astype(float)
        assert float(row["min_g-norm"]) == part.min() and float(row["max_g-norm"]) == part.max()
        assert float(row["g-norm"]) == pytest.approx(part.mean(), rel=1e-9)
        assert float(row["ave-norm"]) == pytest.approx(norms[: int(row["steps"])].astype(float).mean(), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shapes", [[(512, 512, 3, 3), (512,), (100, 512)], [(640, 640, 3, 3), ()], [(1,)]])
def test_the_gradient_norm_is_exact_in_float32(shapes, seed):
    """One sum of all squares in float32 is 5e-6 too small here, and 2e-5 with the gradients of a real ResNet18."""
    torch.manual_seed(seed)
    gradients = [torch.randn(shape) * torch.rand(()) for shape in shapes]
    exact = sum(g.double().square().sum().item() for g in gradients) ** 0.5
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("first", [1, 201])
@pytest.mark.parametrize("first_check", [1, 5, 203, 300])
@pytest.mark.parametrize("eps", [0.3, 0.5, 2.0, 1e-9])
def test_first_crossing_against_a_loop(first, first_check, eps):
    means = np.random.default_rng(first_check).integers(0, 9, 20) / 4  # some equal to ε
    expected = next((first + i for i, m in enumerate(means) if m <= eps and first + i >= first_check), None)
    assert first_crossing(means, first, eps, first_check) == expected


def test_a_new_eps_is_looked_for_in_the_history_in_double_precision():
    norms = np.linspace(1, 0.9, 200_000).astype("<f4")
    total, expected = 0.0, None
    for t, norm in enumerate(norms.tolist(), start=1):
        total += norm
        if total / t <= 0.97:
            expected = t
            break
    in_float32 = np.cumsum(norms) / np.arange(1, len(norms) + 1)
    assert np.flatnonzero(in_float32 <= 0.97)[0] + 1 != expected  # or else this test could not tell
    record = SimpleNamespace(norms=SimpleNamespace(norms=lambda: norms))
    args = SimpleNamespace(eps=[0.97, 0.5])
    known = SimpleNamespace(args=args, results={"steps_to_eps": {"0.5": 7}}, record=record)
    assert main.reached_before(known, 1) == {"0.97": expected, "0.5": 7}


def test_what_comes_after_the_last_crossing_is_no_part_of_the_run(tmp_path, monkeypatch):
    """A divergence in the same window, for instance."""
    step = training.Training.eager_step

    def broken(run, x, y):
        out = step(run, x, y)
        out[1] = {0: 5.0, 6: 0.1, 9: float("inf")}.get(run.step, 1.0)
        return out

    monkeypatch.setattr(training.Training, "eager_step", broken)
    argv = ("--mode", "critical", "--batchsize", 128, "--min_epochs", 0, "--eps", 1.5)
    status, directory = run(tmp_path, *argv)
    s = summary(directory)
    norms = [5, 1, 1, 1, 1, 1, 0.1]  # means 5, 3, 2.33, 2, 1.8, 1.67, 1.44
    assert (status, s["status"], s["steps"], s["results"]["steps_to_eps"]) == (0, "finished", 7, {"1.5": 7})
    assert "diverged_at_step" not in s["results"]
    np.testing.assert_allclose(np.fromfile(directory / "gradient_norms.f32", "<f4"), norms, rtol=1e-6)


@pytest.mark.parametrize(("eps", "marked"), [(["90", "0.01"], ["90.0"]), (["0.01"], [])])
@pytest.mark.parametrize("min_epochs", [0, 2])
def test_what_was_reached_at_the_first_check_is_marked(tmp_path, capsys, eps, marked, min_epochs):
    """With --min_epochs 0 every step is checked, and nothing is only a bound."""
    argv = ("--mode", "critical", "--batchsize", 479, "--min_epochs", min_epochs, "--max_steps", 10, "--eps", *eps)
    _, directory = run(tmp_path, *argv)
    expected = marked if min_epochs else []
    assert summary(directory)["results"]["at_first_check"] == expected
    assert ("upper bounds" in capsys.readouterr().out) == bool(expected)


def test_a_sum_of_millions_is_added_in_double_precision():
    total = training.Sums(steps=5_000_000, norm=5e6 * 0.1)
    window = training.Window(np.arange(5_000_001, 5_000_201), *(np.full(200, 0.1),) * 4)
    exact = (5e5 + 0.1 * np.arange(1, 201)) / window.steps
    np.testing.assert_allclose(total.running_norms(window) / window.steps, exact, rtol=1e-14)


def test_normal_records_the_textbook_numbers_every_epoch(tmp_path):
    status, directory = run(tmp_path, "--batchsize", 128, "--epochs", 3, "--lr", 0.02)
    args = arguments.parse(["--batchsize", "128", "--lr", "0.02", "--dataset", "digits"])
    data = datasets.load("digits", Path("x"), torch.device("cpu"), 0)
    table = rows(directory)
    assert status == 0 and [int(r["steps"]) for r in table] == [12, 24, 36]
    for i, row in enumerate(table):
        seen, model = slow_training(args, data, 12 * (i + 1))
        loss, norm, hits, size = np.array(seen[-12:]).T
        assert float(row["training_loss"]) == pytest.approx((loss * size).sum() / 1437, rel=1e-4)
        assert float(row["training_acc"]) == pytest.approx(100 * hits.sum() / 1437, abs=0.15)
        assert float(row["g-norm"]) == pytest.approx(norm.mean(), rel=1e-3)
        assert float(row["max_g-norm"]) == pytest.approx(norm.max(), rel=1e-3)
        model.eval()
        out = model(data.normalize(data.x_test))
        assert float(row["test_loss"]) == pytest.approx(F.cross_entropy(out, data.y_test).item(), rel=1e-3)
        accuracy = 100 * (out.argmax(1) == data.y_test).double().mean().item()
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=0.6)
    results = summary(directory)["results"]
    assert results["accuracy"] == float(table[-1]["accuracy"])
    assert results["best_accuracy"] == max(float(r["accuracy"]) for r in table)
    assert summary(directory)["epochs"] == 3


def test_the_best_accuracy_is_the_best_of_all_epochs(tmp_path, monkeypatch):
    accuracies = iter([50.0, 70.0, 60.0])
    monkeypatch.setattr(training.Training, "evaluate", lambda run: (next(accuracies), 1.0))
    _, directory = run(tmp_path, "--batchsize", 479, "--epochs", 3)
    results = summary(directory)["results"]
    assert (results["accuracy"], results["best_accuracy"]) == (60.0, 70.0)


@pytest.mark.parametrize("batchsize", [500, 1000])
def test_the_loss_of_a_window_weighs_images_and_not_batches(tmp_path, batchsize):
    argv = ("--mode", "sampling", "--steps", -(-1437 // batchsize), "--batchsize", batchsize, "--lr", 0.01)
    _, directory = run(tmp_path, *argv)
    args = arguments.parse([*map(str, argv), "--dataset", "digits"])
    seen, _ = slow_training(args, datasets.load("digits", Path("x"), torch.device("cpu"), 0), args.steps)
    loss, _, _, size = np.array(seen).T
    weighted = (loss * size).sum() / 1437
    assert float(rows(directory)[0]["training_loss"]) == pytest.approx(weighted, rel=1e-6)
    assert abs(weighted / loss.mean() - 1) > 1e-5  # or else this test could not tell


@pytest.mark.parametrize("mode", ["normal", "critical", "sampling"])
def test_max_steps_ends_any_mode(tmp_path, mode):
    status, directory = run(tmp_path, "--mode", mode, "--batchsize", 128, "--max_steps", 17)
    s = summary(directory)
    assert status == 0 and s["steps"] == 17 and s["epochs"] == pytest.approx(17 / 12)
    assert s["status"] == ("not_reached" if mode == "critical" else "finished")
    assert int(rows(directory)[-1]["steps"]) == 17


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_measured(optimizer):
    """Bit for bit: weights, buffers, optimizer state, losses and norms, with a test and a measurement every step."""
    plain, measured = (start("--optimizer", optimizer, "--batchsize", 128, data=make_data(700)) for _ in range(2))
    assert plain.steps_per_epoch == 6
    for run, measuring in ((plain, False), (measured, True)):
        step = run.eager_step

        def observed(x, y, run=run, step=step, measuring=measuring):
            if measuring:
                measure(run.model, run.optimizer, (x, y), run.data.full_pass(run.step, 333), run.data.size)
                run.evaluate()
            return step(x, y)

        run.train_step = observed
    a, b = (list(committed(run.windows(12), run)) for run in (plain, measured))
    for w, v in zip(a, b, strict=True):
        assert np.array_equal(w.losses, v.losses) and np.array_equal(w.norms, v.norms)
    for p, q in zip(plain.model.state_dict().values(), measured.model.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(plain.optimizer.state.values(), measured.optimizer.state.values(), strict=True):
        assert torch.equal(p["momentum_buffer"], q["momentum_buffer"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 15])
def test_sampling_measures_at_the_step_it_says(tmp_path, optimizer, steps):
    argv = ("--mode", "sampling", "--optimizer", optimizer, "--nu", 0.9, "--batchsize", 128, "--steps", steps)
    status, directory = run(tmp_path, *argv)
    results, omega = summary(directory)["results"], np.load(directory / "omega.npy", allow_pickle=False)
    # The twin: the textbook loop up to x_t, then one more batch without an update.
    args = arguments.parse([*map(str, argv), "--dataset", "digits"])
    data = datasets.load("digits", Path("x"), torch.device("cpu"), 0)
    _, model = slow_training(args, data, steps)
    x, y = next(data.epoch(*divmod(steps, 12)[:1], 128, steps % 12))
    g = torch.cat([p.flatten() for p in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])
    full = 0
    for x, y in data.full_pass(steps, 1000):
        loss = F.cross_entropy(model(x), y, reduction="sum") / 1437
        full = full + torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))])
    assert status == 0 and omega.dtype == np.float32 and omega.shape == (g.numel(),)
    assert results["gradient_norm"] == pytest.approx(g.norm().item(), rel=1e-3)
    assert results["full_gradient_norm"] == pytest.approx(full.norm().item(), rel=1e-3)
    assert results["gradient_noise_norm"] == pytest.approx((g - full).norm().item(), rel=1e-3)
    assert results["noise_norm"] == pytest.approx(np.linalg.norm(omega.astype(float)), rel=1e-9)
    assert results["delta"] == pytest.approx(0.1 * results["noise_norm"])
    if optimizer == "sgd":
        assert results["noise_norm"] == results["gradient_noise_norm"]
        np.testing.assert_allclose(omega, (g - full).numpy(), atol=2e-4)


@pytest.mark.parametrize("mode", ["normal", "critical", "sampling"])
def test_divergence_is_an_ending_of_its_own(tmp_path, mode):
    argv = ("--mode", mode, "--batchsize", 128, "--lr", 1e38, "--steps", 500, "--epochs", 50, "--optimizer", "sgd")
    status, directory = run(tmp_path, *argv)
    s = summary(directory)
    assert (status, s["status"]) == (3, "diverged")
    step = s["results"]["diverged_at_step"]
    args = arguments.parse([*map(str, argv), "--dataset", "digits"])
    seen, _ = slow_training(args, datasets.load("digits", Path("x"), torch.device("cpu"), 0), step)
    finite = np.isfinite(np.array(seen)[:, :2].astype(np.float32)).all(1)
    assert finite[:-1].all() and not finite[-1] and s["steps"] == step - 1
    if mode == "critical":
        assert np.isfinite(np.fromfile(directory / "gradient_norms.f32", "<f4")).all()
        assert (directory / "gradient_norms.f32").stat().st_size == 4 * (step - 1)
    assert not (directory / "omega.npy").exists()


@pytest.mark.parametrize("mode", ["normal", "sampling"])
def test_what_is_not_finite_only_when_measured_is_a_divergence_too(tmp_path, mode):
    """One update with a huge lr: its loss and gradient were finite, the test's and ω are not."""
    argv = ("--mode", mode, "--lr", 1e38, "--steps", 1, "--max_steps", 1, "--optimizer", "sgd", "--batchsize", 128)
    status, directory = run(tmp_path, *argv)
    s = summary(directory)
    assert (status, s["status"], s["steps"], s["results"]["diverged_at_step"]) == (3, "diverged", 1, 2)
    assert not (directory / "omega.npy").exists()


def test_a_gradient_that_is_not_finite_is_a_divergence_even_if_the_loss_is(monkeypatch):
    run = start("--batchsize", 128)
    step = run.eager_step

    def broken(x, y):
        out = step(x, y)
        if run.step == 20:
            out[1] = float("inf")
        return out

    run.train_step = broken
    steps = [int(w.steps[-1]) for w in committed(run.windows(40), run)]
    assert run.outcome == "diverged" and run.diverged_at == 21 and steps == [12, 20]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    final = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, directory = run(tmp_path, "--batchsize", 128, "--epochs", 2, "--seed", seed, "--name", name)
        content = torch.load(directory / "checkpoint.pt", weights_only=True)
        final[name] = torch.cat([t.flatten().double() for t in content["model"].values()])
    assert torch.equal(final["a"], final["b"]) and not torch.equal(final["a"], final["c"])


def test_bf16_differs_and_still_learns(tmp_path):
    losses = {}
    for precision in ("default", "ieee", "bf16"):
        _, directory = run(
            tmp_path, "--batchsize", 128, "--epochs", 3, "--lr", 0.02, "--precision", precision, "--name", precision
        )
        losses[precision] = summary(directory)["results"]["training_loss"]
    assert losses["default"] == losses["ieee"] != losses["bf16"]  # on the CPU the default is IEEE float32
    assert losses["bf16"] == pytest.approx(losses["ieee"], rel=0.05)


def test_bf16_holds_where_the_test_images_are_evaluated():
    found = {}
    for precision in ("default", "bf16"):
        trained = start("--precision", precision)
        with torch.no_grad():
            trained.model.linear.weight.mul_(30)  # or else rounding hardly shows in the loss
        found[precision] = trained.evaluate()[1]
    model = trained.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(trained.data.normalize(trained.data.x_test)).float()
    expected = F.cross_entropy(logits, trained.data.y_test).item()
    assert found["bf16"] == pytest.approx(expected, rel=1e-5) and abs(found["default"] / expected - 1) > 1e-4


def test_bf16_holds_where_the_noise_is_measured(tmp_path):
    """At step 0, where all precisions have the same weights."""
    argv = ("--mode", "sampling", "--steps", 0, "--batchsize", 128)
    found = {}
    for precision in ("default", "bf16"):
        _, directory = run(tmp_path, *argv, "--precision", precision, "--name", precision)
        found[precision] = summary(directory)["results"]["noise_norm"]
    trained = start(*argv)
    with torch.autocast("cpu", torch.bfloat16):
        batch = next(trained.data.epoch(0, 128))
        chunks, n = trained.data.full_pass(0, 1000), trained.data.size
        expected, _ = measure(trained.model, trained.optimizer, batch, chunks, n)
    assert found["bf16"] == expected["noise_norm"] != found["default"]


@pytest.mark.parametrize("precision", ["default", "ieee", "bf16"])
def test_ieee_turns_tf32_off(precision):
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    for backend in backends:
        backend.fp32_precision = "tf32"
    utils.set_up(start("--precision", precision).args)
    expected = "ieee" if precision == "ieee" else "tf32"
    assert [backend.fp32_precision for backend in backends] == [expected] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_what_a_step_frees_serves_the_next_one():
    """In pages that the system had to clear: next to none with main.py's settings."""
    program = """if True:
        import resource, torch, utils
        utils.keep_freed_memory()
        for _ in range(20):  # the heap takes a few to settle
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(6_000_000).add(1)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1000  # by default 11,700, unless the system has huge pages
