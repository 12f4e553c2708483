"""measure/optimizers.py: an optimizer's own step as the twin, sums over the past, and simulated trainings."""

import numpy as np
import pytest
import torch
from regression import TORCH, N, every_batch, flat_gradient, regression, warmed_up

from measure import noise
from measure.optimizers import ExactMemory, affine, memory_noise_standing_still
from shb import NSHB, QHM, SGD, SHB


@pytest.mark.parametrize(("options", "steps"), [*((each, 3) for each in TORCH), (TORCH[2], 0)])
def test_torch_s_sgd_moves_as_the_direction_says(options, steps):
    """Its own step is the twin; also the first one, whose gradient enters the buffer undamped."""
    objective, x, y = regression(4)
    optimizer = torch.optim.SGD(objective.params, lr=0.05, **options)
    warmed_up(optimizer, objective, every_batch(x, y), steps)
    weights, memory = affine(optimizer, objective.params)
    expected = [w * g + m for g, w, m in zip(objective.gradient((x, y)), weights, memory, strict=True)]
    before = [p.detach().clone() for p in objective.params]
    warmed_up(optimizer, objective, [(x, y)])
    for p, b, d in zip(objective.params, before, expected, strict=True):
        torch.testing.assert_close((b - p.detach()) / 0.05, d, rtol=1e-9, atol=1e-12)


class Preconditioned(SGD):
    def direction(self):
        return [d * torch.arange(1.0, d.numel() + 1).view_as(d).to(d) for d in super().direction()]


class Needy(SGD):
    def __init__(self, params, lr, why):
        super().__init__(params, lr)


class Sign(SGD):
    def direction(self):
        return [d.sign() for d in super().direction()]


REFUSED = [
    (lambda p: torch.optim.Adam(p), "torch.optim.SGD or have a method direction.*got Adam"),
    (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), "weight_decay=0.01"),
    (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize=True"),
    (lambda p: Preconditioned(p, 0.1), "Preconditioned: the search direction is not w·g"),
    (lambda p: Sign(p, 0.1), "Sign: the search direction is not w·g"),
    (lambda p: SGD([torch.zeros(1, requires_grad=True)], 0.1), "depends on no parameter that the optimizer holds"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(make, message):
    objective, x, y = regression()
    full = objective.full_gradient([(x, y)], N)
    with pytest.raises(ValueError, match=message):
        noise.budget(objective, make(objective.params), full, every_batch(x, y), N)
    with pytest.raises(ValueError, match="Needy cannot be made from parameter groups"):
        ExactMemory(objective, Needy(objective.params, 0.1, "because"))


@pytest.mark.parametrize("make", [SHB, NSHB, QHM, torch.optim.SGD])
def test_exact_memory_splits_as_sums_over_the_past_do(make):
    objective, x, y = regression(6)
    batches, past = every_batch(x, y), []
    nesterov = {"nesterov": True} if make is torch.optim.SGD else {}
    optimizer = make(objective.params, lr=0.05, momentum=0.6, **nesterov)
    exact = ExactMemory(objective, optimizer)
    for batch in batches[:7]:
        exact.add(objective.full_gradient([(x, y)], N))
        past.append((flat_gradient(objective.model, *batch), flat_gradient(objective.model, x, y)))
        warmed_up(optimizer, objective, [batch])
    first = {SHB: 0.6, NSHB: 0.4 * 0.6, QHM: 0.5 * 0.4 * 0.6, torch.optim.SGD: 0.36}[make]
    w = {SHB: 1, NSHB: 0.4, QHM: 1 - 0.5 * 0.6, torch.optim.SGD: 1.6}[make]
    weights = first * 0.6 ** np.arange(7)
    fluctuation = sum(h * (g - f) for h, (g, f) in zip(weights, past[::-1], strict=True))
    drift = sum(h * f for h, (_, f) in zip(weights, past[::-1], strict=True))
    drift -= (1 - w) * flat_gradient(objective.model, x, y)
    full = objective.full_gradient([(x, y)], N)
    found = exact.split(full)
    expected = {"memory_noise": fluctuation @ fluctuation, "memory_drift": drift @ drift}
    assert found == pytest.approx(expected | {"memory_cross": 2 * fluctuation @ drift}, rel=1e-9)
    row = noise.budget(objective, optimizer, full, batches, N)
    assert sum(found.values()) == pytest.approx(row["memory"], rel=1e-9)


@pytest.mark.parametrize(
    ("n", "b", "beta", "w"), [(64, 8, 0.9, 1.0), (100, 16, 0.9, 0.1), (30, 7, 0.5, 1.0), (9, 8, 0.8, 1.0)]
)
def test_memory_noise_of_weights_that_stand_still(n, b, beta, w):
    """Against 4,000 simulated trainings: shuffled epochs of single numbers, the partial batch kept."""
    rng, per_epoch, runs = np.random.default_rng(0), -(-n // b), 4000
    x = rng.normal(size=n)
    x -= x.mean()
    v_b = (x**2).sum() / (n - 1) * (n - b) / n / b
    memory, step, found = np.zeros(runs), 0, {}
    while len(found) < 3 * per_epoch:
        order = rng.permuted(np.tile(x, (runs, 1)), axis=1)
        for k in range(per_epoch):
            found[step] = (memory**2).mean() / v_b
            memory = beta * (memory + w * order[:, k * b : (k + 1) * b].mean(1))
            step += 1
    for step, simulated in found.items():
        exact = memory_noise_standing_still(n, b, step, beta, w)
        assert simulated == pytest.approx(exact, rel=5 * (2 / runs) ** 0.5, abs=1e-12), step


def test_memory_noise_of_weights_that_stand_still_is_what_the_definition_gives():
    """docs/measuring.md's numbers; and 0 before the first update."""
    late = [memory_noise_standing_still(64, 8, 8 * 100 + k, 0.9) for k in (0, 3, 7)]
    assert late == pytest.approx([0.265, 1.57, 0.67], rel=0.01)
    assert memory_noise_standing_still(100, 16, 7 * 100, 0.9) == pytest.approx(3.38, rel=0.002)
    assert memory_noise_standing_still(64, 8, 0, 0.9) == 0 == memory_noise_standing_still(64, 8, 9, 0.0)
    with pytest.raises(ValueError, match="b must be below n"):
        memory_noise_standing_still(8, 8, 1, 0.9)
