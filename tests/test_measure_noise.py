"""measure/noise.py and draws.py: by listing all batches of a small problem, and by slow twins."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from regression import TORCH, B, N, every_batch, flat_gradient, regression, squared_error, warmed_up
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from measure import noise
from measure.draws import augmentation, draw, isotropic
from measure.gradients import Objective
from measure.optimizers import ExactMemory
from measure.quantities import columns
from shb import NSHB, QHM, SGD, SHB

R = 0.5
# Each optimizer with what its rule says by hand: w, and the factor on the buffer.
RULES = [(SGD, {}, 1, 0), (SHB, {"momentum": 0.6}, 1, 0.6), (NSHB, {"momentum": 0.6}, 0.4, 0.6)]
RULES += [(QHM, {"momentum": 0.6, "nu": 0.7}, 1 - 0.42, 0.42)]
RULES += [
    (torch.optim.SGD, options, *rule)
    for options, rule in zip(TORCH, [(1, 0), (1, 0.6), (0.7, 0.6), (1.6, 0.36)], strict=True)
]


def prepared(case, seed=0):
    """An optimizer some steps into its training; by hand w, g of all batches, ∇f and the memory."""
    objective, x, y = regression(seed)
    batches = every_batch(x, y)
    make, options, w, factor = RULES[case]
    optimizer = warmed_up(make(objective.params, lr=0.05, **options), objective, batches)
    full = objective.full_gradient([(x[:4], y[:4]), (x[4:], y[4:])], N)
    g = np.array([flat_gradient(objective.model, *batch) for batch in batches])
    nabla = flat_gradient(objective.model, x, y)
    buffers = [optimizer.state[p].get("momentum_buffer") for p in objective.params]
    m = np.zeros(4) if buffers[0] is None else torch.cat([b.flatten() for b in buffers]).numpy()
    return objective, optimizer, batches, full, w, g, nabla, factor * m


# --- the budget ---


@pytest.mark.parametrize("case", range(8))
def test_the_budget_over_all_pairs_of_draws_is_the_truth_of_all_batches(case):
    """M = 2 draws, all 225 pairs of batches: the mean of an unbiased estimate is the quantity itself, to rounding."""
    objective, optimizer, batches, full, w, g, nabla, memory = prepared(case)
    rows = [noise.budget(objective, optimizer, full, pair, N) for pair in itertools.product(batches, batches)]
    mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
    _, x, y = regression()
    images = np.array([flat_gradient(objective.model, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    omega, mu = w * g + memory - nabla, memory - (1 - w) * nabla
    variance, c_squared = ((g - nabla) ** 2).sum(1).mean(), ((images - nabla) ** 2).sum(1).mean()
    expected = {
        "draws": 2,
        "full_gradient_norm": np.linalg.norm(nabla),
        "noise_square": (omega**2).sum(1).mean(),
        "delta": 0.05 * np.linalg.norm(omega, axis=1).mean(),
        "variance": variance,
        "fresh": w**2 * variance,
        "memory": mu @ mu,
        "injected": 0,
        "c_squared": c_squared,
        "noise_scale": c_squared / (nabla @ nabla),
        "batchnorm_bias": 0,
    }
    for key, value in expected.items():
        assert mean[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    norms = np.linalg.norm(g, axis=1)
    largest = [max(pair) for pair in itertools.product(norms, norms)]
    assert [row["max_draw_norm"] for row in rows] == pytest.approx(largest)


def test_standard_errors_cover_and_estimates_are_unbiased_over_many_repetitions():
    """32 draws, 150 times, with injected noise and a second name: 90 to 99 % of 95 % intervals hold the truth."""
    objective, optimizer, batches, full, w, g, nabla, memory = prepared(2, seed=2)
    rng, found = np.random.default_rng(0), []
    for k in range(150):
        picked = [batches[i] for i in rng.integers(0, 15, 32)]
        options = {"injected": lambda i, k=k: some_u(k, i, norm=3 * R), "renamed": {"delta_as_shb": 2.5}}
        found.append(noise.budget(objective, optimizer, full, picked, N, **options))
    variance = ((g - nabla) ** 2).sum(1).mean()
    truth = {"variance": variance, "c_squared": variance * B * (N - 1) / (N - B)}
    many = w * (g[rng.integers(0, 15, 200_000)] + rng.normal(size=(200_000, 4)) * 3 * R / 2) + memory
    truth["delta"] = 0.05 * np.linalg.norm(many - nabla, axis=1).mean()
    truth["delta_as_shb"] = 0.05 * np.linalg.norm(many - 2.5 * nabla, axis=1).mean()
    for key, value in truth.items():
        estimates, errors = (np.array([row[name] for row in found]) for name in (key, f"{key}_se"))
        assert abs(estimates.mean() - value) < 4 * estimates.std(ddof=1) / np.sqrt(150), key
        covered = np.mean(abs(estimates - value) < 1.96 * errors)
        assert 0.90 <= covered <= 0.99, (key, covered)
    exact = ((w * g + memory - nabla) ** 2).sum(1).mean() + (w * 3 * R) ** 2
    for parts in (("batchnorm_bias",), ("noise_square",), ("fresh", "memory")):
        sums = np.array([sum(row[part] for part in parts) for row in found])
        expected = 0 if parts == ("batchnorm_bias",) else exact
        assert abs(sums.mean() - expected) < 4 * sums.std(ddof=1) / np.sqrt(150), parts


def test_the_bias_of_batchnorm_is_found():
    """All batches of two in training mode: ‖E g_b − ∇f‖² by listing them, against the estimate over all pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    objective, (_, x, y) = Objective(model, squared_error), regression()
    batches = every_batch(x, y)
    full = objective.full_gradient([(x, y)], N)
    g = torch.stack([torch.cat([t.flatten() for t in objective.gradient(batch)]) for batch in batches])
    nabla = torch.cat([t.flatten() for t in full])
    optimizer = NSHB(model.parameters(), 0.05, momentum=0.6)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    rows = [noise.budget(objective, optimizer, full, pair, N) for pair in itertools.product(batches, batches)]
    found = {key: np.mean([row[key] for row in rows]) for key in ("batchnorm_bias", "variance", "noise_square")}
    bias = (g.mean(0) - nabla).square().sum().item()
    assert bias > 0.1
    variance = (g - g.mean(0)).square().sum(1).mean().item()
    m = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    noise_square = (0.4 * g + 0.6 * m - nabla).square().sum(1).mean().item()
    expected = {"batchnorm_bias": bias, "variance": variance, "noise_square": noise_square}
    assert found == pytest.approx(expected, rel=1e-9)


# --- injected noise, and another name ---


def some_u(*key, norm=R):
    """Isotropic noise for the regression, of a generator that `key` seeds."""
    like = [torch.zeros(shape, dtype=torch.float64) for shape in ((1, 3), (1,))]
    return isotropic(like, norm, torch.Generator().manual_seed(sum(1000**i * k for i, k in enumerate(key))))


def test_isotropic_noise_has_its_norm_and_no_direction():
    like, generator = [torch.zeros(shape, dtype=torch.float64) for shape in ((3, 2), (), (1,))], torch.Generator()
    drawn = [isotropic(like, R, generator) for _ in range(4000)]
    assert all(t.shape == u.shape and t.dtype == u.dtype for t, u in zip(like, drawn[0], strict=True))
    u = torch.stack([torch.cat([t.flatten() for t in each]) for each in drawn]).numpy()
    d, squares = u.shape[1], (u**2).sum(1)
    assert abs(squares.mean() - R**2) < 4 * squares.std() / 4000**0.5
    error = R**2 / d / 4000**0.5  # of an entry of the covariance beside the diagonal; √2 times it on the diagonal
    assert abs(u.T @ u / 4000 - R**2 / d * np.eye(d)).max() < 4.5 * 2**0.5 * error
    assert abs(u.mean(0)).max() < 4.5 * R / d**0.5 / 4000**0.5
    assert all(map(torch.equal, isotropic(like, R, torch.Generator()), drawn[0]))


@pytest.mark.parametrize("case", range(4))
def test_injected_noise_and_another_name_enter_what_they_should(case):
    objective, optimizer, batches, full, w, g, nabla, memory = prepared(case)
    draws, g_0, g = batches[1:], g[0], g[1:]
    plain = noise.budget(objective, optimizer, full, draws, N)
    successive = [(g[k] - g[:k].mean(0)) @ (g[k] - g[:k].mean(0)) * k / (k + 1) for k in range(1, 14)]
    gap, variance_se = g.mean(0) - nabla, np.std(successive, ddof=1) / 13**0.5
    assert plain["variance"] == pytest.approx(g.var(axis=0, ddof=1).sum())
    assert plain["variance_se"] == pytest.approx(variance_se)
    assert plain["c_squared_se"] == pytest.approx(variance_se * B * (N - 1) / (N - B))
    assert plain["batchnorm_bias"] == pytest.approx(gap @ gap - plain["variance"] / 14)
    options, kept = {"injected": some_u, "renamed": {"delta_as_shb": 0.4, "delta_as_nshb": 1.0}}, []
    row = noise.budget(objective, optimizer, full, draws, N, keep=kept.append, **options)
    u = np.array([torch.cat([t.flatten() for t in some_u(i)]).numpy() for i in range(15)])
    own, u, d = u[0], u[1:], w * g + memory
    deltas, renamed = (0.05 * np.linalg.norm(d + w * u - ratio * nabla, axis=1) for ratio in (1, 0.4))
    np.testing.assert_allclose(torch.stack(kept), g + u, rtol=1e-9)
    expected = {
        "injected": (u**2).sum(1).mean(),
        "fresh": w**2 * (g + u).var(axis=0, ddof=1).sum(),
        "noise_square": ((d + w * u - nabla) ** 2).sum(1).mean(),
        "delta": deltas.mean(),
        "delta_se": deltas.std(ddof=1) / 14**0.5,
        "delta_as_shb": renamed.mean(),
        "delta_as_shb_se": renamed.std(ddof=1) / 14**0.5,
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-6), key
    assert (row["delta_as_nshb"], row["delta_as_nshb_se"]) == (row["delta"], row["delta_se"])
    assert all(row[key] == plain[key] for key in plain if key not in expected)
    without, _ = noise.batch_noise(objective, optimizer, batches[0], full)
    numbers, omega = noise.batch_noise(objective, optimizer, batches[0], full, **options)
    d = w * (g_0 + own) + memory
    np.testing.assert_allclose(omega.numpy(), d - nabla, rtol=1e-6)
    expected = {
        "noise_norm": np.linalg.norm(d - nabla),
        "delta": 0.05 * np.linalg.norm(d - nabla),
        "delta_as_shb": 0.05 * np.linalg.norm(d - 0.4 * nabla),
        "delta_as_nshb": 0.05 * np.linalg.norm(d - nabla),
        "omega_mean": omega.mean().item(),
        "injected": own @ own,
        "direction_norm": np.linalg.norm(d),
        "full_gradient_norm": without["full_gradient_norm"],
        "gradient_noise_norm": without["gradient_noise_norm"],
    }
    assert {key: numbers[key] for key in expected} == pytest.approx(expected)
    found = row | numbers | ExactMemory(objective, optimizer).split(full)
    found |= augmentation(objective, [(batches[0], batches[1])] * 2)
    assert sorted(found) == sorted(columns("noise", "variance"))


# --- draws ---


def test_draws_must_be_alike():
    objective, x, y = regression()
    full, optimizer = objective.full_gradient([(x, y)], N), SGD(objective.params)
    for draws, n in [([], N), ([(x, y)], N), ([(x, y), (x[:2], y[:2])], N), ([(x, y), (x, y)], 5)]:
        with pytest.raises(ValueError, match="two or more batches of one size"):
            noise.budget(objective, optimizer, full, draws, n)
    row = noise.budget(objective, optimizer, full, [(x, y)] * 2, N)
    assert np.isnan(row["c_squared"]) and row["variance"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(row["variance_se"])
    with pytest.raises(ValueError, match="two or more"):
        augmentation(objective, [((x, y), (x, y))])
    with pytest.raises(ValueError, match="one tensor for each of the objective's parameters"):
        noise.batch_noise(objective, optimizer, (x, y), torch.cat([t.flatten() for t in full]))


def test_augmentation_s_part_by_listing_all_of_it():
    """Two augmentations, x and −x + 0.5, of each image of each batch: all 15 × 16 pairs."""
    objective, x, y = regression(7)
    variants = torch.stack([x, 0.5 - x])
    pairs, within, every = [], [], []
    for index in itertools.combinations(range(N), B):
        views = []
        for choice in itertools.product((0, 1), repeat=B):
            images = torch.stack([variants[c, i] for c, i in zip(choice, index, strict=True)])
            views.append((images, y[list(index)]))
        pairs += list(itertools.product(views, views))
        g = np.array([flat_gradient(objective.model, *view) for view in views])
        within.append(((g - g.mean(0)) ** 2).sum(1).mean())
        every.append(g)
    found = augmentation(objective, pairs)
    assert found["augmentation_variance"] == pytest.approx(np.mean(within), rel=1e-12)
    assert found["c_squared_augmentation"] == pytest.approx(B * np.mean(within), rel=1e-12)
    # One image's gradient, over images and augmentation: what docs/measuring.md makes of both numbers.
    single = [flat_gradient(objective.model, v[i : i + 1], y[i : i + 1]) for v in variants for i in range(N)]
    variance = np.concatenate(every).var(axis=0).sum()
    c_squared = B * (N - 1) / (N - B) * variance - (B - 1) / (N - B) * found["c_squared_augmentation"]
    assert c_squared == pytest.approx(np.array(single).var(axis=0).sum(), rel=1e-9)


def test_draws_of_a_loader_are_independent_and_those_of_one_pass_are_not():
    objective, optimizer, _, full, _, g, nabla, _ = prepared(0, seed=8)
    _, x, y = regression(8)
    loader = DataLoader(TensorDataset(x, y), batch_size=B, shuffle=True)
    torch.manual_seed(0)
    truth = ((g - nabla) ** 2).sum(1).mean()

    def variances(draws):
        return np.array([noise.budget(objective, optimizer, full, draws(), N)["variance"] for _ in range(100)])

    moving = torch.Generator().manual_seed(0)
    independent, one_pass = variances(lambda: list(draw(loader, 3, moving))), variances(lambda: list(loader))
    assert abs(independent.mean() - truth) < 4 * independent.std() / 10
    assert abs(one_pass.mean() - truth * N / (N - B)) < 4 * one_pass.std() / 10
    before = torch.get_rng_state()
    for _ in range(2):  # within a measurement, which puts the random state back, draws go on all the same
        with objective.unchanged():
            drawn = [tuple(batch[1].tolist()) for batch in draw(loader, 40, moving)]
        assert len(set(drawn)) > 15 and drawn[:5] != [tuple(batch[1].tolist()) for batch in draw(loader, 5, moving)]
    assert torch.equal(before, torch.get_rng_state())
    shuffled = DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(x), B, drop_last=False))
    assert len({tuple(batch[1].tolist()) for batch in draw(shuffled, 40, moving)}) > 15
    for bad, message in [
        (DataLoader(TensorDataset(x, y), batch_size=B), "a loader that shuffles"),
        (DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(range(6), B, False)), "4 draws of 1 batches"),
        (iter(loader), "need a DataLoader"),
        (DataLoader(x, B, sampler=RandomSampler(x, generator=moving)), "drawing moves both"),
        (DataLoader([{"x": 0, "y": 0}] * 60, B, shuffle=True), "got dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            noise.budget(objective, optimizer, full, draw(bad, 4, moving), N)
    cached = list(draw(loader, 2, moving))
    with pytest.raises(ValueError, match="8 draws of 2 batches"):
        noise.budget(objective, optimizer, full, cached * 4, 8)


# --- one batch's ω ---


class Branches(nn.Module):
    """A frozen layer, one that the loss does not need, one that the optimizer is not given, and two that train."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(20, 5), nn.Linear(5, 5)
        self.unused, self.foreign, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.foreign(self.frozen(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("make", [SGD, SHB, NSHB, QHM])
@pytest.mark.parametrize("turned", [False, True])
def test_omega_is_what_the_step_does_less_the_full_gradient_of_what_it_moves(make, turned):
    """Two groups of different lr and β, in either order; d from the step and not from the rule; float64 gradients."""
    torch.manual_seed(3)
    model, x, y = Branches(), torch.randn(60, 20), torch.randint(10, (60,))
    groups = [
        {"params": [*model.first.parameters(), *model.frozen.parameters()], "lr": 0.05},
        {"params": [*model.last.parameters(), *model.unused.parameters()], "lr": 0.4},
    ]
    if make is not SGD:
        groups = [group | {"momentum": beta} for group, beta in zip(groups, (0.7, 0.3), strict=True)]
    optimizer = make(groups[::-1] if turned else groups, 0.1)
    objective, batches = Objective(model), list(zip(x.split(8), y.split(8), strict=True))
    warmed_up(optimizer, objective, batches)
    full = objective.full_gradient(batches, 60)
    numbers, omega = noise.batch_noise(objective, optimizer, batches[3], full)
    kept, weights = [], {SGD: (1, 1), SHB: (1, 1), NSHB: (0.3, 0.7), QHM: (0.65, 0.85)}[make]
    row = noise.budget(objective, optimizer, full, batches[3:7], 60, keep=kept.append)
    each = [noise.batch_noise(objective, optimizer, batch, full)[0] for batch in batches[3:7]]
    assert row["delta"] == pytest.approx(np.mean([one["delta"] for one in each]))
    variances = torch.stack(kept).var(0).split([105, 60])  # of the first and the last layer
    fresh = sum(w**2 * v.sum().item() for w, v in zip(weights, variances, strict=True))
    assert row["fresh"] == pytest.approx(fresh, rel=1e-5)
    twin, moved = copy.deepcopy(model).double(), [*model.first.parameters(), *model.last.parameters()]
    parts = [*twin.first.parameters(), *twin.last.parameters()]
    losses = [F.cross_entropy(twin(a.double()), b) for a, b in ((x, y), batches[3])]
    full, g = (torch.cat([t.flatten() for t in torch.autograd.grad(loss, parts)]) for loss in losses)
    before = [p.detach().clone() for p in moved]
    warmed_up(optimizer, objective, batches[3:4])
    step = torch.cat([(b - p.detach()).double().flatten() for b, p in zip(before, moved, strict=True)])
    lr = torch.cat([torch.full((p.numel(),), rate) for p, rate in zip(moved, (0.05, 0.05, 0.4, 0.4), strict=True)])
    d = step / lr
    torch.testing.assert_close(omega.double(), d - full, rtol=1e-2, atol=1e-4)
    expected = {"full_gradient_norm": full.norm(), "gradient_noise_norm": (g - full).norm()}
    expected |= {"delta": (step - lr * full).norm(), "cosine": torch.cosine_similarity(d, full, dim=0)}
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value.item(), rel=1e-3), key
    assert row["full_gradient_norm"] == pytest.approx(numbers["full_gradient_norm"], rel=1e-6)


def test_statistics_of_omega():
    omega = (np.random.default_rng(0).gamma(2, 1, 10_001) * 1e-3).astype(np.float32)
    x, found = omega.astype(np.float64), noise.statistics(omega)
    z = (x - x.mean()) / x.std()
    expected = {"mean": x.mean(), "std": x.std(), "skewness": (z**3).mean(), "excess_kurtosis": (z**4).mean() - 3}
    assert found == pytest.approx({f"omega_{key}": value for key, value in expected.items()})
    constant = noise.statistics(np.zeros(5, np.float32))
    assert constant["omega_std"] == 0
    assert np.isnan(constant["omega_skewness"]) and np.isnan(constant["omega_excess_kurtosis"])
