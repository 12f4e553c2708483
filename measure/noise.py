"""Search direction noise ω_t = d_t − ∇f(x_t): of one batch, and its budget over many draws.

    d_t = w g_t + memory,   ω_t = w (g_t − ∇f) + μ_t,   μ_t = memory − (1 − w) ∇f

w and the memory belong to the optimizer (measure/optimizers.py); every number is of the present x_t and named as in
measure/quantities.py. Parameters that a step would not move, being frozen, not needed by the loss, or not the
optimizer's, are left out of d_t and of ∇f. Nothing here changes what it measures. Arguments of both functions:

full: ∇f(x_t), as `full_gradient` returns it. injected: where training takes g_t + u_t in place of g_t
(measure/injected.py), gives u of the i-th draw, i ≥ 1, and at 0 the u_t that training adds next, one tensor for each
of the objective's parameters. ω_t then includes it; V_b and C² are of g alone. renamed: {name: η′/η}, where the same
trajectory is that of another algorithm at the learning rate η′, its d′ = (η/η′) d; δ under that name is
η′‖d′ − ∇f‖ = η‖d − (η′/η)∇f‖ (ours).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.optim import Optimizer

from measure.draws import estimate, flat, length, refuse_copies, spread, squares
from measure.gradients import Batch, Objective
from measure.optimizers import affine, direction, learning_rates

Injected = Callable[[int], list[Tensor]]
MOMENTS = ("mean", "std", "skewness", "excess_kurtosis")


def batch_noise(
    objective: Objective,
    optimizer: Optimizer,
    batch: Batch,
    full: list[Tensor],
    injected: Injected | None = None,
    renamed: dict[str, float] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Measure ω_t at the present x_t, before the update that `batch`, the next mini-batch, would make.

    Returns the numbers (norms are Euclidean over all parameters; delta is lr · ‖ω‖ (paper, section 3), with several
    parameter groups the norm of all lr_p ω_p) and ω itself, flat, in the model's order, float32, on the CPU.
    ValueError as in `direction`, and if a step would move no parameter.
    """
    found = objective.gradient_by_parameter(batch)
    rates, full = _moved(objective, optimizer, found, full)
    g, u = [found[p] for p in rates], _injected(injected, 0, objective, rates)
    directions = direction(optimizer, dict(zip(rates, torch._foreach_add(g, u), strict=True)) if injected else found)
    d, g, full = flat([directions[p] for p in rates]), flat(g), flat(full)
    lr = torch.cat([torch.full((p.numel(),), rate, dtype=torch.float64) for p, rate in rates.items()])
    omega = d - full
    d_norm, full_norm = _norm(d), _norm(full)
    dot = torch.dot(d.double(), full.double()).item()
    numbers = {
        "noise_norm": _norm(omega),
        "direction_norm": d_norm,
        "full_gradient_norm": full_norm,
        "gradient_noise_norm": _norm(g - full),
        "cosine": dot / (d_norm * full_norm) if d_norm * full_norm else float("nan"),
        "injected": length(u) ** 2,
    }
    for name, ratio in ({"delta": 1.0} | (renamed or {})).items():
        numbers[name] = _norm(lr * (omega + (1 - ratio) * full))
    return numbers | statistics(omega.numpy()), omega


def statistics(omega: np.ndarray) -> dict[str, float]:
    """Moments of the entries of ω (d,), in float64, std that of the population; skewness nan for a constant.

    They are pooled over coordinates, whose scales differ: a large kurtosis does not tell ω from a Gaussian vector.
    """
    omega = omega.astype(np.float64)
    found = omega.mean(), omega.std(), stats.skew(omega), stats.kurtosis(omega)
    return {f"omega_{name}": float(value) for name, value in zip(MOMENTS, found, strict=True)}


def budget(
    objective: Objective,
    optimizer: Optimizer,
    full: list[Tensor],
    draws: Iterable[Batch],
    n: int,
    keep: Callable[[Tensor], None] | None = None,
    injected: Injected | None = None,
    renamed: dict[str, float] | None = None,
) -> dict[str, float]:
    """What ω_t is made of, from M mini-batches at the same x_t; docs/measuring.md defines every number.

    draws: M ≥ 2 batches of b images, each drawn as training draws one and independently of the others, as
    `measure.draws.draw` does; what the first one's loss needs is what a step moves. n: training images. keep: given
    each draw's g + u, flat, on the CPU, for measure/shape.py and smoothing.py. Memory: some nine gradients, whatever
    M is. ValueError as in `affine`, if a step would move no parameter, for fewer than two draws, for draws of
    several sizes or larger than n, or copies of a few.
    """
    sizes, readings, names = [], [], {"delta": 1.0} | (renamed or {})
    with objective.unchanged():
        for draw in refuse_copies(draws, n):
            found = objective.gradient_by_parameter(draw)
            sizes.append(len(draw[1]))
            if len(sizes) == 1:
                rates, full = _moved(objective, optimizer, found, full)
                weights, memory = affine(optimizer, list(rates))
                offset = torch._foreach_sub(memory, full)
                mean, noisy_mean = ([torch.zeros_like(p) for p in rates] for _ in range(2))
            g = [found[p] if p in found else torch.zeros_like(p) for p in rates]
            u = _injected(injected, len(sizes), objective, rates)
            noisy = torch._foreach_add(g, u) if injected else g
            omega = torch._foreach_add(torch._foreach_mul(noisy, weights), offset)
            alone = spread(g, mean, len(sizes))
            both = spread(noisy, noisy_mean, len(sizes)) if injected else alone
            renamings = [squares(torch._foreach_add(omega, full, alpha=1 - ratio)) for ratio in names.values()]
            readings.append(torch.stack([alone, both, squares(g), squares(u), *renamings]))
            if keep:
                keep(flat(noisy))
    if len(sizes) < 2 or len(set(sizes)) > 1 or sizes[0] > n:
        raise ValueError(f"draws must be two or more batches of one size of at most {n} images, got sizes {sizes}")
    mu = torch._foreach_add(torch._foreach_mul(full, weights), offset)  # ω where g = ∇f
    numbers = _moments(
        torch.stack(readings).cpu().numpy(), np.array(weights), np.array([*rates.values()]), list(names)
    )
    m, b, full_norm = len(sizes), sizes[0], length(full)
    factor = b * (n - 1) / (n - b) if b < n else float("nan")
    c_squared = factor * numbers["variance"]
    return numbers | {
        "draws": m,
        "full_gradient_norm": full_norm,
        "memory": length(mu) ** 2,
        "c_squared": c_squared,
        "c_squared_se": factor * numbers["variance_se"],
        "batchnorm_bias": length(torch._foreach_sub(mean, full)) ** 2 - numbers["variance"] / m,
        "noise_scale": c_squared / full_norm**2 if full_norm else float("nan"),
    }


def _moments(readings: np.ndarray, weights: np.ndarray, lr: np.ndarray, names: list[str]) -> dict[str, float]:
    """Means over the draws. readings: (M, 4 + names, P), of each parameter `spread` of g and of g + u, ‖g‖², ‖u‖², and
    ‖ω‖² by each name.
    """
    alone, both, norms, injected, *noise = readings.swapaxes(0, 1)
    numbers = {"noise_square": float(noise[0].sum(1).mean())}
    for name, square in zip(names, noise, strict=True):
        numbers |= estimate(name, np.sqrt(square @ lr**2))
    numbers |= estimate("variance", alone[1:].sum(1))  # the first draw has none before it
    return numbers | {
        "fresh": float(weights**2 @ both[1:].mean(0)),
        "injected": float(injected.sum(1).mean()),
        "max_draw_norm": float(np.sqrt(norms.sum(1).max())),
    }


def _injected(injected: Injected | None, i: int, objective: Objective, rates: dict[Tensor, float]) -> list[Tensor]:
    """u of the i-th draw for what a step moves; zeros where nothing is injected."""
    if not injected:
        return [torch.zeros_like(p) for p in rates]
    by_parameter = dict(zip(objective.params, injected(i), strict=True))
    return [by_parameter[p] for p in rates]


def _moved(
    objective: Objective, optimizer: Optimizer, found: dict[Tensor, Tensor], full: list[Tensor]
) -> tuple[dict[Tensor, float], list[Tensor]]:
    """The parameters that a step with the gradients `found` moves, with their learning rates, and their ∇f."""
    if [t.shape for t in full] != [p.shape for p in objective.params]:
        raise ValueError("full must be as full_gradient returns it: one tensor for each of the objective's parameters")
    rates, by_parameter = learning_rates(optimizer), dict(zip(objective.params, full, strict=True))
    moved = {p: rates[p] for p in found if p in rates}
    if not moved:
        raise ValueError("the loss depends on no parameter that the optimizer holds and that is not frozen")
    return moved, [by_parameter[p] for p in moved]


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
