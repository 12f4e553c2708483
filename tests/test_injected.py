"""--injected_noise: u_t in training and in every number of ω_t; and the two δ of a trajectory that has two names."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, committed, make_data, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child
from test_measure_budget import N, every_batch, flat_gradient, regression, squared_error, warmed_up
from test_sampling import left, rows

import arguments
import models
import training
from measure import noise
from measure.draws import isotropic
from measure.gradients import full_gradient
from shb import NSHB, QHM, SGD, SHB

R = 0.5
BASE = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--lr", 0.02, "--name", "r"]


def slow_u(shapes, norm, generator):
    """u by the definition: one normal vector of variance R²/d, cut into the shapes in their order."""
    d = sum(int(np.prod(shape)) for shape in shapes)
    return torch.cat([torch.randn(shape, generator=generator).flatten() for shape in shapes]) * norm / d**0.5


def slow_seed(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@pytest.mark.parametrize("shapes", [[(3, 2), (), (1,)], [(2, 2, 2)], [(5,)]])
def test_isotropic_noise_has_its_norm_and_no_direction(shapes):
    like = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    generator = torch.Generator().manual_seed(1)
    drawn = [isotropic(like, R, generator) for _ in range(4000)]
    assert all(t.shape == u.shape and t.dtype == u.dtype for t, u in zip(like, drawn[0], strict=True))
    u = torch.stack([torch.cat([t.flatten() for t in each]) for each in drawn]).numpy()
    d = u.shape[1]
    squares = (u**2).sum(1)
    assert abs(squares.mean() - R**2) < 4 * squares.std() / 4000**0.5
    covariance = u.T @ u / 4000
    error = R**2 / d / 4000**0.5  # of an entry beside the diagonal; √2 times it on the diagonal
    assert abs(covariance - R**2 / d * np.eye(d)).max() < 4.5 * 2**0.5 * error
    assert abs(u.mean(0)).max() < 4.5 * R / d**0.5 / 4000**0.5
    again = isotropic(like, R, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, again, drawn[0]))


# --- in training ---


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(models, "build", lambda name, num_classes: Tiny(num_classes))


def start(*argv):
    argv = ["--device", "cpu", "--dataset", "digits", "--model", "ResNet20", "--batchsize", 25, *argv]
    return training.Training(arguments.parse([*map(str, argv)]), make_data(60, augmented=False), None, None)


@pytest.mark.parametrize("optimizer", arguments.OPTIMIZERS)
def test_training_is_the_textbook_loop_with_noise(tiny, optimizer):
    """In float64; the momentum buffers see no noise."""
    flags = ("--optimizer", optimizer, "--lr", 0.05, "--seed", 3, "--beta1", 0.8, "--nu", 0.3)
    run = start(*flags, "--injected_noise", R)
    twin = copy.deepcopy(run.model).double()
    moved = list(twin.parameters())
    m = [torch.zeros_like(p) for p in moved]
    run.data.seed = 3
    for t in range(10):
        x, y = list(run.data.epoch(t // 3, 25))[t % 3]
        g = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), moved)
        u = slow_u([p.shape for p in moved], R, torch.Generator().manual_seed(slow_seed(3, 7, t)))
        parts = u.double().split([p.numel() for p in moved])
        for i, p in enumerate(moved):
            weight = {"sgd": 1, "shb": 1}.get(optimizer, 0.2)
            m[i] = (0 if optimizer == "sgd" else 0.8) * m[i] + weight * g[i]
            d = 0.7 * g[i] + 0.3 * m[i] if optimizer == "qhm" else m[i]
            p.data -= 0.05 * (d + parts[i].view_as(p))
    list(committed(run.windows(10), run))
    for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=2e-5)
    found = [run.optimizer.state[p]["momentum_buffer"] for p in run.model.parameters() if p in run.optimizer.state]
    for buffer, expected in zip(found, m if optimizer != "sgd" else [], strict=True):
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-2, atol=1e-4)


def test_what_a_step_does_not_move_gets_no_noise(tiny):
    run = start("--injected_noise", R)
    before = [p.detach().clone() for p in run.model.parameters()]
    still = run.model.conv.bias
    for p in run.model.parameters():
        p.grad = None if p is still else torch.zeros_like(p)
    run.update()
    shapes = [p.shape for p in run.model.parameters() if p is not still]
    u = slow_u(shapes, R, torch.Generator().manual_seed(slow_seed(0, 7, 0)))
    moved = torch.cat(
        [(b - p.detach()).flatten() for p, b in zip(run.model.parameters(), before, strict=True) if p is not still]
    )
    torch.testing.assert_close(moved, 0.1 * u, rtol=1e-3, atol=1e-7)
    assert torch.equal(still, before[1])


def test_without_it_no_generator_is_made(tiny, monkeypatch):
    run = start()
    monkeypatch.setattr(run.data, "generator", None)
    list(committed(run.windows(4), run))


# --- in the numbers ---


def generators(*draw):
    return torch.Generator().manual_seed(slow_seed(*draw) if draw else 99)


MAKE = {
    "sgd": lambda p: SGD(p, 0.05),
    "shb": lambda p: SHB(p, 0.05, momentum=0.6),
    "nshb": lambda p: NSHB(p, 0.05, momentum=0.6),
    "qhm": lambda p: QHM(p, 0.05, momentum=0.6, nu=0.7),
}
RULE = {"sgd": (1, 0), "shb": (1, 0.6), "nshb": (0.4, 0.6), "qhm": (1 - 0.42, 0.42)}


def prepared(name, seed=0):
    """A warmed-up optimizer, and g of all batches, ∇f and the memory, by hand."""
    model, x, y = regression(seed)
    batches = every_batch(x, y)
    optimizer = warmed_up(MAKE[name](model.parameters()), model, batches)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    g, nabla = np.array([flat_gradient(model, *batch) for batch in batches]), flat_gradient(model, x, y)
    buffers = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in model.parameters()]
    memory = RULE[name][1] * torch.cat([b.flatten() for b in buffers]).numpy()
    return model, optimizer, batches, full, g, nabla, memory


@pytest.mark.parametrize("renamed", [None, 0.4, 2.5])
@pytest.mark.parametrize("name", MAKE)
def test_the_budget_with_injected_noise_and_under_another_name(name, renamed):
    model, optimizer, batches, full, g, nabla, memory = prepared(name)
    measured = lambda **more: noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error, **more)  # noqa: E731
    plain = measured()
    row = measured(injected=R, generator=generators, renamed=renamed)
    shapes = [p.shape for p in model.parameters()]
    u = np.array([slow_u(shapes, R, generators(i + 1)).numpy() for i in range(15)])
    own = slow_u(shapes, R, generators()).numpy()
    d = RULE[name][0] * g + memory
    deltas = 0.05 * np.linalg.norm(d + u - nabla, axis=1)
    expected = {
        "injected": R**2,
        "noise_norm": np.linalg.norm(d[0] + own - nabla),
        "noise_square": ((d + u - nabla) ** 2).sum(1).mean(),
        "delta": deltas.mean(),
        "delta_se": deltas.std(ddof=1) / 15**0.5,
    }
    if renamed is not None:
        deltas = 0.05 * np.linalg.norm(d + u - renamed * nabla, axis=1)
        expected |= {"delta_renamed": deltas.mean(), "delta_renamed_se": deltas.std(ddof=1) / 15**0.5}
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-6), key
    assert {key: row[key] for key in plain if key not in expected} == {
        key: plain[key] for key in plain if key not in expected
    }
    assert row.keys() - plain.keys() == expected.keys() - plain.keys() and plain["injected"] == 0
    numbers, omega = noise.batch_noise(
        model, optimizer, batches[0], full, squared_error, True, R, generators, renamed=renamed
    )
    np.testing.assert_allclose(omega.numpy(), d[0] + own - nabla, rtol=1e-6)
    assert numbers["noise_norm"] == pytest.approx(expected["noise_norm"])
    assert numbers["injected_noise_norm"] == pytest.approx(np.linalg.norm(own))
    assert numbers["delta"] == pytest.approx(0.05 * expected["noise_norm"])
    assert numbers["direction_norm"] == pytest.approx(np.linalg.norm(d[0]))
    assert numbers["gradient_noise_norm"] == pytest.approx(np.linalg.norm(g[0] - nabla))
    assert numbers["omega_mean"] == pytest.approx(omega.mean().item())
    if renamed is not None:
        assert numbers["delta_renamed"] == pytest.approx(0.05 * np.linalg.norm(d[0] + own - renamed * nabla))
    with pytest.raises(ValueError, match="needs a generator"):
        measured(injected=R)


def test_the_parts_add_up_and_the_intervals_cover():
    """150 measurements of 32 draws: unbiased within four standard errors; 90 to 99 % of 95 % intervals hold δ."""
    model, optimizer, batches, full, g, nabla, memory = prepared("shb", 1)
    rng, found = np.random.default_rng(0), []
    for k in range(150):
        picked = [batches[i] for i in rng.integers(0, 15, 32)]
        more = {"injected": 3 * R, "generator": lambda *draw, k=k: generators(k, *draw), "renamed": 2.5}
        found.append(noise.budget(model, optimizer, batches[0], full, picked, N, loss=squared_error, **more))
    omega = g + memory - nabla
    exact = ((omega**2).sum(1)).mean() + (3 * R) ** 2
    squares = np.array([row["noise_square"] for row in found])
    assert abs(squares.mean() - exact) < 4 * squares.std(ddof=1) / 150**0.5
    budgets = np.array([row["fresh"] + row["memory"] + row["injected"] for row in found])
    assert abs(budgets.mean() - exact) < 4 * budgets.std(ddof=1) / 150**0.5
    many = g[rng.integers(0, 15, 200_000)] + memory + rng.normal(size=(200_000, 4)) * 3 * R / 2
    for key, nabla_factor in (("delta", 1), ("delta_renamed", 2.5)):
        truth = 0.05 * np.linalg.norm(many - nabla_factor * nabla, axis=1).mean()
        estimates, errors = (np.array([row[name] for row in found]) for name in (key, f"{key}_se"))
        assert abs(estimates.mean() - truth) < 4 * estimates.std(ddof=1) / 150**0.5
        assert 0.90 <= np.mean(abs(estimates - truth) < 1.96 * errors) <= 0.99


@pytest.mark.parametrize("beta", [0.0, 0.6, 0.9])
def test_one_trajectory_has_two_deltas_and_each_name_gives_both(beta):
    """SHB at η(1 − β) and NSHB at η, in float64: each one's δ under the other name is the other's own."""
    found = {}
    for name, cls, lr, renamed in (("shb", SHB, 0.05 * (1 - beta), 1 / (1 - beta)), ("nshb", NSHB, 0.05, 1 - beta)):
        model, x, y = regression(2)
        batches = every_batch(x, y)
        optimizer = warmed_up(cls(model.parameters(), lr, momentum=beta), model, batches, steps=12)
        full = full_gradient(model, [(x, y)], N, loss=squared_error)
        found[name] = noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error, renamed=renamed)
        own, _ = noise.batch_noise(model, optimizer, batches[3], full, squared_error, renamed=renamed)
        found[f"{name}, one draw"] = own
    for one, other in (("shb", "nshb"), ("nshb", "shb")):
        for draws in ("", ", one draw"):
            assert found[one + draws]["delta"] == pytest.approx(found[other + draws]["delta_renamed"], rel=1e-10)
        assert found[one]["delta_se"] == pytest.approx(found[other]["delta_renamed_se"], rel=1e-9)
    assert beta == 0 or found["shb"]["delta"] != pytest.approx(found["shb"]["delta_renamed"], rel=0.05)


# --- whole runs ---


def test_two_runs_of_one_trajectory_give_each_other_s_delta(tmp_path):
    made = {}
    for name, lr in (("shb", 0.02), ("nshb", 0.2)):
        argv = [*BASE[:-4], "--mode", "sampling", "--steps", 5, "--draws", 4, "--optimizer", name, "--lr", lr]
        status, log = child.run([*argv, "--name", name], tmp_path)
        assert status == 0, log
        made[name] = summary(tmp_path / "runs" / name)["results"]
    for one, other in (("shb", "nshb"), ("nshb", "shb")):
        assert made[one]["delta"] == pytest.approx(made[other]["delta_renamed"], rel=1e-3)
        assert made[one]["budget"]["delta"] == pytest.approx(made[other]["budget"]["delta_renamed"], rel=1e-3)
    assert made["shb"]["delta"] != pytest.approx(made["shb"]["delta_renamed"], rel=0.05)


def test_omega_holds_the_u_that_the_step_adds(tmp_path):
    """At x_0, and then at x_1: what a run has beside one without injected noise is u_0, and the step −η u_0."""
    made = {}
    for steps in (0, 1):
        for norm in (0, R):
            name = f"{steps}-{norm}"
            argv = [*BASE[:-2], "--mode", "sampling", "--steps", steps, "--injected_noise", norm, "--name", name]
            status, log = child.run(argv, tmp_path)
            assert status == 0, log
            made[steps, norm] = tmp_path / "runs" / name
    models_ = [torch.load(made[1, norm] / "checkpoint.pt", weights_only=True)["model"] for norm in (0, R)]
    shapes = [p.shape for p in Tiny(10).parameters()]
    u = slow_u(shapes, R, torch.Generator().manual_seed(slow_seed(0, 7, 0)))
    plain, noisy = (np.load(made[0, norm] / "omega.npy") for norm in (0, R))
    np.testing.assert_allclose(noisy - plain, u.numpy(), atol=1e-6)
    x0, x1 = (torch.cat([each[name].flatten() for name, _ in Tiny(10).named_parameters()]) for each in models_)
    torch.testing.assert_close(x1 - x0, -0.02 * u, rtol=1e-4, atol=1e-7)
    without, with_it = (summary(made[0, norm])["results"] for norm in (0, R))
    assert with_it["injected_noise_norm"] == pytest.approx(u.norm().item())
    assert "injected_noise_norm" not in without
    for key in ("gradient_noise_norm", "direction_norm", "cosine", "full_gradient_norm", "gradient_norm"):
        assert without[key] == with_it[key]
    assert with_it["noise_norm"] == pytest.approx(np.linalg.norm(noisy)) != without["noise_norm"]
    assert [row["injected"] for norm in (0, R) for row in rows(made[0, norm])] == ["0.0", "0.25"]


NOISY = ["--mode", "sampling", "--steps", 3, 10, "--full_grad_batchsize", 500, "--draws", 4, "--injected_noise", R]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    status, log = child.run([*BASE, *NOISY], directory)
    assert status == 0, log
    return directory / "runs" / "r"


@pytest.mark.parametrize("sabotage", ["signal_at=2", "signal_at=25", "die_in_write", "die_after_rename"])
def test_stopped_or_killed_it_resumes_to_the_same_bits(whole, tmp_path, sabotage):
    argv = [*BASE, *NOISY, "--resume"]
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, sabotage)
    assert status != 0, log
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert left(tmp_path / "runs" / "r") == left(whole)


def test_each_draw_has_its_own_u_and_the_row_says_how_much(whole):
    for row in rows(whole):
        parts = sum(float(row[key]) for key in ("fresh", "memory", "injected"))
        assert row["injected"] == str(R**2) and row["delta_renamed_se"] != ""
        assert float(row["noise_square"]) == pytest.approx(parts, rel=0.3)
    assert Path(whole / "omega.npy").exists()


def test_with_another_norm_it_is_another_run(whole):
    argv = [*BASE, *NOISY[:-1], 0.7, "--resume"]
    status, log = child.run(argv, whole.parents[1])
    assert status == 2 and "--injected_noise 0.7 (was 0.5)" in log, log
