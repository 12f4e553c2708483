import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from measure import noise
from measure.draws import augmentation, draw
from measure.gradients import full_gradient
from measure.optimizers import ExactMemory, affine, frozen_gain
from shb import NSHB, QHM, SGD, SHB

N, B = 6, 2
TORCH = [{}, {"momentum": 0.6}, {"momentum": 0.6, "dampening": 0.3}, {"momentum": 0.6, "nesterov": True}]


def squared_error(output, y):
    return F.mse_loss(output.squeeze(1), y)


def regression(seed=0):
    """A linear regression on six points, in float64, whose 15 batches of two can all be listed."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(N, generator=rng, dtype=torch.float64)
    torch.manual_seed(seed)
    return nn.Linear(3, 1).double(), x, y


def every_batch(x, y):
    return [(x[list(index)], y[list(index)]) for index in itertools.combinations(range(N), B)]


def flat_gradient(model, x, y):
    """By hand: 2 (wᵀx + c − y) (x, 1), averaged over the batch."""
    error = x @ model.weight.detach()[0] + model.bias.detach()[0] - y
    rows = 2 * error[:, None] * torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return rows.mean(0).numpy()


def warmed_up(optimizer, model, batches, steps=3):
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        squared_error(model(x), y).backward()
        optimizer.step()
    return optimizer


def optimizers(model):
    """Each with what its rule says by hand: w, the factor on the buffer, and Σ h_k² of the memory."""
    params = lambda: list(model.parameters())  # noqa: E731
    yield SGD(params(), 0.05), 1, 0, 0
    yield SHB(params(), 0.05, momentum=0.6), 1, 0.6, 0.36 / 0.64
    yield NSHB(params(), 0.05, momentum=0.6), 0.4, 0.6, 0.16 * 0.36 / 0.64
    yield QHM(params(), 0.05, momentum=0.6, nu=0.7), 1 - 0.42, 0.42, (0.42 * 0.4) ** 2 / 0.64
    rules = [(1, 0, 0), (1, 0.6, 0.36 / 0.64), (0.7, 0.6, 0.49 * 0.36 / 0.64), (1.6, 0.36, 0.36**2 / 0.64)]
    for options, rule in zip(TORCH, rules, strict=True):
        yield torch.optim.SGD(params(), lr=0.05, **options), *rule


@pytest.mark.parametrize("case", range(8))
def test_the_budget_over_all_pairs_of_draws_is_the_truth_of_all_batches(case):
    """M = 2 draws, all 225 pairs of batches: the mean of an unbiased estimate is the quantity itself, to rounding."""
    model, x, y = regression()
    batches = every_batch(x, y)
    optimizer, w, factor, gain = list(optimizers(model))[case]
    warmed_up(optimizer, model, batches)
    buffers = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    m = np.zeros(4) if buffers[0] is None else torch.cat([b.flatten() for b in buffers]).numpy()
    full = full_gradient(model, [(x[:4], y[:4]), (x[4:], y[4:])], N, loss=squared_error)
    nabla = flat_gradient(model, x, y)
    np.testing.assert_allclose(torch.cat([t.flatten() for t in full]).numpy(), nabla, rtol=1e-12)
    rows = [
        noise.budget(model, optimizer, batches[0], full, pair, N, loss=squared_error)
        for pair in itertools.product(batches, batches)
    ]
    mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
    g = np.array([flat_gradient(model, *batch) for batch in batches])
    images = np.array([flat_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    omega, mu = w * g + factor * m - nabla, factor * m - (1 - w) * nabla
    variance = ((g - nabla) ** 2).sum(1).mean()
    c_squared = ((images - nabla) ** 2).sum(1).mean()
    expected = {
        "draws": 2,
        "batch_size": B,
        "full_gradient_norm": np.linalg.norm(nabla),
        "noise_norm": np.linalg.norm(omega[0]),
        "noise_square": (omega**2).sum(1).mean(),
        "delta": 0.05 * np.linalg.norm(omega, axis=1).mean(),
        "variance": variance,
        "fresh": w**2 * variance,
        "memory": mu @ mu,
        "memory_noise_frozen": gain * variance,
        "staleness": mu @ mu - gain * variance,
        "c_squared": c_squared,
        "noise_scale": c_squared / (nabla @ nabla),
    }
    for key, value in expected.items():
        assert mean[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    assert mean["batchnorm_bias"] == pytest.approx(0, abs=1e-12)
    assert mean["noise_square"] == pytest.approx(mean["fresh"] + mean["memory"], rel=1e-9)
    norms = np.linalg.norm(g, axis=1)
    largest = [max(pair) for pair in itertools.product(norms, norms)]
    assert [row["largest_gradient_norm"] for row in rows] == pytest.approx(largest)


def test_many_draws_agree_with_the_plain_formulas():
    model, x, y = regression(1)
    batches = every_batch(x, y)
    optimizer = warmed_up(SHB(model.parameters(), 0.05), model, batches)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    picked = [batches[i] for i in np.random.default_rng(0).integers(0, 15, 20)]
    kept = []
    row = noise.budget(model, optimizer, batches[0], full, picked, N, loss=squared_error, keep=kept.append)
    g = np.array([flat_gradient(model, *batch) for batch in picked])
    np.testing.assert_allclose(torch.stack(kept).numpy(), g, rtol=1e-12)
    assert row["variance"] == pytest.approx(g.var(axis=0, ddof=1).sum())
    gap = g.mean(0) - flat_gradient(model, x, y)
    assert row["batchnorm_bias"] == pytest.approx(gap @ gap - row["variance"] / 20)
    _, memory = affine(optimizer, list(model.parameters()))
    omega = g + torch.cat([m.flatten() for m in memory]).numpy() - flat_gradient(model, x, y)
    deltas = 0.05 * np.linalg.norm(omega, axis=1)
    assert row["delta"] == pytest.approx(deltas.mean())
    assert row["delta_se"] == pytest.approx(deltas.std(ddof=1) / np.sqrt(20))
    successive = [(g[k] - g[:k].mean(0)) @ (g[k] - g[:k].mean(0)) * k / (k + 1) for k in range(1, 20)]
    assert row["variance"] == pytest.approx(np.mean(successive))
    assert row["variance_se"] == pytest.approx(np.std(successive, ddof=1) / np.sqrt(19))
    assert row["c_squared_se"] == pytest.approx(row["variance_se"] * B * (N - 1) / (N - B))


def test_standard_errors_cover_and_estimates_are_unbiased_over_many_repetitions():
    """48 draws, 200 times: means within four standard errors, 90 to 99 % of 95 % intervals hold the truth."""
    model, x, y = regression(2)
    batches = every_batch(x, y)
    optimizer = warmed_up(NSHB(model.parameters(), 0.05, momentum=0.6), model, batches)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    everything = noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error)
    truth = {key: everything[key] for key in ("delta", "variance", "c_squared")}
    truth["variance"] *= 14 / 15  # all 15 batches are the population
    truth["c_squared"] *= 14 / 15
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        picked = [batches[i] for i in rng.integers(0, 15, 48)]
        rows.append(noise.budget(model, optimizer, batches[0], full, picked, N, loss=squared_error))
    for key, value in truth.items():
        estimates, errors = (np.array([row[name] for row in rows]) for name in (key, f"{key}_se"))
        assert abs(estimates.mean() - value) < 4 * estimates.std(ddof=1) / np.sqrt(200), key
        covered = np.mean(abs(estimates - value) < 1.96 * errors)
        assert 0.90 <= covered <= 0.99, (key, covered)
    bias = np.array([row["batchnorm_bias"] for row in rows])
    assert abs(bias.mean()) < 4 * bias.std(ddof=1) / np.sqrt(200)


def test_groups_have_their_own_rates_and_momentum():
    model, x, y = regression(3)
    batches = every_batch(x, y)
    groups = [
        {"params": [model.bias], "lr": 0.5, "momentum": 0.3},
        {"params": [model.weight], "lr": 0.05, "momentum": 0.8},
    ]
    optimizer = warmed_up(NSHB(groups), model, batches)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    row = noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error)
    g = np.array([flat_gradient(model, *batch) for batch in batches])
    nabla = flat_gradient(model, x, y)
    beta, lr = np.array([0.8, 0.8, 0.8, 0.3]), np.array([0.05, 0.05, 0.05, 0.5])
    m = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]).numpy()
    mu = beta * m - beta * nabla
    omega = (1 - beta) * g + beta * m - nabla
    v = g.var(axis=0, ddof=1)
    assert row["fresh"] == pytest.approx(((1 - beta) ** 2 * v).sum())
    assert row["memory"] == pytest.approx(mu @ mu)
    assert row["memory_noise_frozen"] == pytest.approx(((1 - beta) ** 2 * beta**2 / (1 - beta**2) * v).sum())
    assert row["delta"] == pytest.approx(np.linalg.norm(lr * omega, axis=1).mean())
    own, _ = noise.batch_noise(model, optimizer, batches[0], full, loss=squared_error)
    assert own["noise_norm"] == pytest.approx(row["noise_norm"]) == pytest.approx(np.linalg.norm(omega[0]))
    assert own["delta"] == pytest.approx(np.linalg.norm(lr * omega[0]))


@pytest.mark.parametrize("options", [*TORCH, {"momentum": 0.6, "dampening": 0.3, "steps": 0}])
def test_torch_s_sgd_moves_as_the_direction_says(options):
    """Its own step is the twin; also the first one, whose gradient enters the buffer undamped."""
    model, x, y = regression(4)
    batches, steps = every_batch(x, y), options.get("steps", 3)
    options = {key: value for key, value in options.items() if key != "steps"}
    optimizer = warmed_up(torch.optim.SGD(model.parameters(), lr=0.05, **options), model, batches, steps)
    weights, memory = affine(optimizer, list(model.parameters()))
    optimizer.zero_grad()
    squared_error(model(x), y).backward()
    expected = [w * p.grad + m for p, w, m in zip(model.parameters(), weights, memory, strict=True)]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, b, d in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close((b - p.detach()) / 0.05, d, rtol=1e-9, atol=1e-12)


class Quasi(SHB):
    """QHM as a user might write it: what `step` does and what `direction` says, no word on how it works inside."""

    def __init__(self, params, lr=0.1, momentum=0.9, nu=0.7):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr, "momentum": momentum, "nu": nu})

    def _both(self, group, p, m):
        m = group["momentum"] * m + (1 - group["momentum"]) * p.grad
        return m, (1 - group["nu"]) * p.grad + group["nu"] * m

    def buffer(self, p):
        return self.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p))

    @torch.no_grad()
    def direction(self):
        return [self._both(g, p, self.buffer(p))[1] for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m, d = self._both(group, p, self.buffer(p))
                self.state[p]["momentum_buffer"] = m
                p -= group["lr"] * d


def test_an_optimizer_of_the_user_s_takes_part_by_its_direction():
    model, x, y = regression(5)
    batches, beta, nu = every_batch(x, y), 0.9, 0.7
    optimizer = warmed_up(Quasi(model.parameters(), 0.05), model, batches)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    row = noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error)
    m = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]).numpy()
    mu = nu * beta * (m - flat_gradient(model, x, y))
    assert row["fresh"] == pytest.approx((1 - nu * beta) ** 2 * row["variance"])
    assert row["memory"] == pytest.approx(mu @ mu)
    assert row["memory_noise_frozen"] == pytest.approx((nu * beta) ** 2 * (1 - beta) / (1 + beta) * row["variance"])


@pytest.mark.parametrize("cls", [SGD, SHB, NSHB, QHM, Quasi])
def test_frozen_memory_noise_is_what_a_million_steps_of_pure_noise_leave(cls):
    """x frozen, gradients N(0, 1): the variance of the memory of d is frozen_gain."""
    optimizer = cls([torch.zeros(4000, requires_grad=True)], lr=0.0, **({} if cls is SGD else {"momentum": 0.8}))
    (p,) = optimizer.param_groups[0]["params"]
    torch.manual_seed(0)
    for _ in range(60):
        p.grad = torch.randn(4000)
        optimizer.step()
    _, (memory,) = affine(optimizer, [p])
    gain = frozen_gain(optimizer, optimizer.param_groups[0])
    assert memory.square().mean().item() == pytest.approx(gain, rel=4 * (2 / 4000) ** 0.5)


@pytest.mark.parametrize("nu", [0.0, 1e-15, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_qhm_s_frozen_gain_is_its_sum_over_past_steps(nu, beta):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = QHM([x], lr=0.1, momentum=beta, nu=nu)
    h = [nu * (1 - beta) * beta**k for k in range(1, 5000)]
    gain = frozen_gain(optimizer, optimizer.param_groups[0])
    assert gain == pytest.approx(sum(v**2 for v in h), rel=1e-9, abs=1e-40)


class Preconditioned(SGD):
    def direction(self):
        return [d * torch.arange(1.0, d.numel() + 1).view_as(d).to(d) for d in super().direction()]


class Sign(SGD):
    def direction(self):
        return [d.sign() for d in super().direction()]


class Needy(SGD):
    def __init__(self, params, lr, why):
        super().__init__(params, lr)


class TwoBuffers(SGD):
    """Its memory has two decay rates."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                a, b = self.state[p].get("a", 0), self.state[p].get("b", 0)
                self.state[p]["a"], self.state[p]["b"] = 0.5 * a + p.grad, 0.9 * b + p.grad
                p -= group["lr"] * (self.state[p]["a"] + self.state[p]["b"])


REFUSED = [
    (lambda p: torch.optim.Adam(p), "torch.optim.SGD or have a method direction.*got Adam"),
    (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), "weight_decay=0.01"),
    (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize=True"),
    (lambda p: Preconditioned(p, 0.1), "Preconditioned: the search direction is not w·g"),
    (lambda p: Sign(p, 0.1), "Sign: the search direction is not w·g"),
    (lambda p: Needy(p, 0.1, "because"), "Needy cannot be made from parameter groups"),
    (lambda p: TwoBuffers(p, 0.1), "TwoBuffers: the memory is not one buffer"),
    (lambda p: SGD([torch.zeros(1, requires_grad=True)], 0.1), "depends on no parameter that the optimizer holds"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(make, message):
    model, x, y = regression()
    batches = every_batch(x, y)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    with pytest.raises(ValueError, match=message):
        noise.budget(model, make(model.parameters()), batches[0], full, batches, N, loss=squared_error)


def test_draws_must_be_alike_and_the_loss_a_mean():
    model, x, y = regression()
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    run = lambda draws, n=N, loss=squared_error: noise.budget(  # noqa: E731
        model, SGD(model.parameters()), (x, y), full, draws, n, loss=loss
    )
    for draws, n in [([], N), ([(x, y)], N), ([(x, y), (x[:2], y[:2])], N), ([(x, y), (x, y)], 5)]:
        with pytest.raises(ValueError, match="two or more batches of one size"):
            run(draws, n)
    with pytest.raises(ValueError, match=r"one number; got shape \(6, 1\)"):
        run([(x, y)] * 2, loss=lambda output, y: output)
    row = run([(x, y)] * 2)
    assert np.isnan(row["c_squared"]) and row["variance"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(row["variance_se"])
    with pytest.raises(ValueError, match="two or more"):
        augmentation(model, [((x, y), (x, y))], loss=squared_error)


def bumpy(seed=0):
    """Everything that measuring could disturb: BatchNorm, dropout, a frozen BatchNorm in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model.append(nn.Linear(8, 3))
    model[4].eval().requires_grad_(False)
    return model


def state(model, optimizer, loader):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    randoms = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    return buffers, grads, randoms, [module.training for module in model.modules()], len(optimizer.state)


def equal(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("make", [SHB, torch.optim.SGD])
@pytest.mark.parametrize("fails", [None, 2, 6])
@pytest.mark.parametrize("training", [True, False, None])
def test_measuring_leaves_no_trace(make, fails, training):
    model = bumpy()
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
    for batch in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    before, calls = state(model, optimizer, loader), []

    def between():
        random.random()
        np.random.random()
        calls.append(1)
        if len(calls) == fails:
            raise KeyError("stop")

    def everything():
        chunks = DataLoader(TensorDataset(x, y), batch_size=16)
        full = full_gradient(model, chunks, 40, between, training=training)
        options = {"training": training, "between": between}
        row = noise.budget(model, optimizer, (x[:8], y[:8]), full, draw(loader, 4), 40, **options)
        augmentation(model, zip(draw(loader, 2), draw(loader, 2), strict=True), **options)
        return row

    if fails:
        with pytest.raises(KeyError):
            everything()
    else:
        assert everything() == everything()
    assert len(calls) == (fails or 2 * (3 + 4 + 2)) and equal(before, state(model, optimizer, loader))


def test_modes_of_batchnorm():
    """Evaluation mode uses running statistics, training mode a batch's own, None each module's own flag."""
    model = bumpy()
    model[2].p = 0.0
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    for buffer in (model[1].running_mean, model[4].running_mean):
        buffer.fill_(0.7)
    found = {}
    for training in (True, False, None):
        twin = copy.deepcopy(model)
        if training is not None:
            twin.train(training)
        params = [p for p in twin.parameters() if p.requires_grad]
        expected = torch.autograd.grad(F.cross_entropy(twin(x), y), params)
        found[training] = full_gradient(model, [(x, y)], 40, training=training)
        for a, b in zip(found[training], expected, strict=True):
            torch.testing.assert_close(a, b)
        row = noise.budget(
            model, SGD(model.parameters()), (x, y), found[training], [(x, y)] * 2, 40, training=training
        )
        assert row["batchnorm_bias"] == pytest.approx(0, abs=1e-10)
    assert not torch.allclose(found[True][0], found[None][0]) and not torch.allclose(found[False][0], found[None][0])


def test_the_bias_of_batchnorm_is_found():
    """All batches of two in training mode: ‖E g_b − ∇f‖² by listing them, against the estimate over all pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    _, x, y = regression()
    batches = every_batch(x, y)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    g = []
    for a, b in batches:
        model.zero_grad()
        squared_error(model(a), b).backward()
        g.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    g, nabla = torch.stack(g), torch.cat([t.flatten() for t in full])
    optimizer = NSHB(model.parameters(), 0.05, momentum=0.6)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    rows = [
        noise.budget(model, optimizer, batches[0], full, pair, N, loss=squared_error)
        for pair in itertools.product(batches, batches)
    ]
    bias = (g.mean(0) - nabla).square().sum().item()
    assert bias > 0.1
    assert np.mean([row["batchnorm_bias"] for row in rows]) == pytest.approx(bias, rel=1e-9)
    variance = np.mean([row["variance"] for row in rows])
    assert variance == pytest.approx((g - g.mean(0)).square().sum(1).mean().item(), rel=1e-9)
    m = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    mean = 0.6 * (m - nabla) + 0.4 * (g.mean(0) - nabla)
    expected = 0.4**2 * variance + mean.square().sum().item()
    assert np.mean([row["noise_square"] for row in rows]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [SHB, NSHB, QHM, Quasi, torch.optim.SGD])
def test_exact_memory_splits_as_sums_over_the_past_do(make):
    model, x, y = regression(6)
    batches = every_batch(x, y)
    options = {"nesterov": True} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.05, momentum=0.6, **options)
    exact = ExactMemory(model, optimizer)
    past = []
    for batch in batches[:7]:
        full = full_gradient(model, [(x, y)], N, loss=squared_error)
        exact.add(full)
        past.append((flat_gradient(model, *batch), flat_gradient(model, x, y)))
        optimizer.zero_grad()
        squared_error(model(batch[0]), batch[1]).backward()
        optimizer.step()
    first = {SHB: 0.6, NSHB: 0.4 * 0.6, QHM: 0.5 * 0.4 * 0.6, Quasi: 0.7 * 0.4 * 0.6, torch.optim.SGD: 0.36}[make]
    w = {SHB: 1, NSHB: 0.4, QHM: 1 - 0.5 * 0.6, Quasi: 1 - 0.7 * 0.6, torch.optim.SGD: 1.6}[make]
    weights = first * 0.6 ** np.arange(7)
    nabla = flat_gradient(model, x, y)
    noise_part = sum(h * (g - f) for h, (g, f) in zip(weights, past[::-1], strict=True))
    drift = sum(h * f for h, (_, f) in zip(weights, past[::-1], strict=True)) - (1 - w) * nabla
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    found = exact.split(full)
    assert found["memory_noise"] == pytest.approx(noise_part @ noise_part, rel=1e-9)
    assert found["memory_drift"] == pytest.approx(drift @ drift, rel=1e-9)
    row = noise.budget(model, optimizer, batches[0], full, batches, N, loss=squared_error)
    assert sum(found.values()) == pytest.approx(row["memory"], rel=1e-9)


def test_augmentation_s_part_by_listing_all_of_it():
    """Two augmentations, x and −x + 0.5, of each image of each batch: all 15 × 16 pairs."""
    model, x, y = regression(7)
    variants = torch.stack([x, 0.5 - x])
    pairs, within, every = [], [], []
    for index in itertools.combinations(range(N), B):
        views = []
        for choice in itertools.product((0, 1), repeat=B):
            images = torch.stack([variants[c, i] for c, i in zip(choice, index, strict=True)])
            views.append((images, y[list(index)]))
        pairs += list(itertools.product(views, views))
        g = np.array([flat_gradient(model, *view) for view in views])
        within.append(((g - g.mean(0)) ** 2).sum(1).mean())
        every.append(g)
    found = augmentation(model, pairs, loss=squared_error)
    assert found["augmentation_variance"] == pytest.approx(np.mean(within), rel=1e-12)
    assert found["c_squared_augmentation"] == pytest.approx(B * np.mean(within), rel=1e-12)
    # One image's gradient, over images and augmentation: what docs/measuring.md makes of both numbers.
    single = [flat_gradient(model, v[i : i + 1], y[i : i + 1]) for v in variants for i in range(N)]
    variance = np.concatenate(every).var(axis=0).sum()
    c_squared = B * (N - 1) / (N - B) * variance - (B - 1) / (N - B) * found["c_squared_augmentation"]
    assert c_squared == pytest.approx(np.array(single).var(axis=0).sum(), rel=1e-9)


def test_draws_of_a_loader_are_independent_and_those_of_one_pass_are_not():
    model, x, y = regression(8)
    loader = DataLoader(TensorDataset(x, y), batch_size=B, shuffle=True)
    torch.manual_seed(0)
    full = full_gradient(model, [(x, y)], N, loss=squared_error)
    truth = np.mean([((flat_gradient(model, *b) - flat_gradient(model, x, y)) ** 2).sum() for b in every_batch(x, y)])

    def variance(draws):
        return noise.budget(model, SGD(model.parameters()), (x, y), full, draws, N, loss=squared_error)["variance"]

    independent = np.array([variance(list(draw(loader, 3))) for _ in range(400)])
    one_pass = np.array([variance(list(loader)) for _ in range(400)])
    assert abs(independent.mean() - truth) < 4 * independent.std() / 400**0.5
    assert abs(one_pass.mean() - truth * N / (N - B)) < 4 * one_pass.std() / 400**0.5
    with pytest.raises(ValueError, match="a loader that shuffles"):
        next(draw(DataLoader(TensorDataset(x, y), batch_size=B), 3))
