"""Search direction noise ω_t = d_t − ∇f(x_t): of one batch, and its budget over many draws.

    d_t = w g_t + memory,   ω_t = w (g_t − ∇f) + μ_t,   μ_t = memory − (1 − w) ∇f

w and the memory belong to the optimizer (measure/optimizers.py); every number is of the present x_t and named as in
measure/quantities.py. Parameters that a step would not move, being frozen, not needed by the loss, or not the
optimizer's, are left out of d_t and of ∇f. Nothing here changes what it measures. Arguments of both functions:

full: ∇f(x_t), as `full_gradient` returns it. injected: (R, generators), where training adds to d_t isotropic Gaussian
noise u_t with E‖u_t‖² = R²; ω_t then includes it. generators() is the generator of u_t, which training adds next, and
generators(i) that of the i-th draw, i ≥ 1. renamed: {name: η′/η}, where the same trajectory is that of another
algorithm at the learning rate η′, its d′ = (η/η′) d; δ under that name is η′‖d′ − ∇f‖ = η‖d − (η′/η)∇f‖ (ours).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from measure.draws import estimate, flat, isotropic, length, squares
from measure.gradients import Batch, Objective
from measure.optimizers import affine, direction, learning_rates

Injected = tuple[float, Callable[..., torch.Generator]]


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
    directions = direction(optimizer, found)
    d, g, full = flat([directions[p] for p in rates]), flat([found[p] for p in rates]), flat(full)
    lr = torch.cat([torch.full((p.numel(),), rate, dtype=torch.float64) for p, rate in rates.items()])
    omega = d - full
    if injected:
        omega += flat(isotropic(list(rates), injected[0], injected[1]()))
    d_norm, full_norm = _norm(d), _norm(full)
    dot = torch.dot(d.double(), full.double()).item()
    numbers = {
        "noise_norm": _norm(omega),
        "direction_norm": d_norm,
        "full_gradient_norm": full_norm,
        "gradient_noise_norm": _norm(g - full),
        "cosine": dot / (d_norm * full_norm) if d_norm * full_norm else float("nan"),
        "injected": injected[0] ** 2 if injected else 0.0,
    }
    for name, ratio in ({"delta": 1.0} | (renamed or {})).items():
        numbers[name] = _norm(lr * (omega + (1 - ratio) * full))
    return numbers | statistics(omega.numpy()), omega


def statistics(omega: np.ndarray) -> dict[str, float]:
    """Moments of the entries of ω, in float64: mean, std (of the population), skewness, excess kurtosis.

    omega: flat array (ours; the paper shows a histogram). They are pooled over coordinates, whose scales differ: a
    large kurtosis does not tell ω from a Gaussian vector. A constant array has skewness and kurtosis nan.
    """
    omega = omega.astype(np.float64)
    mean, std = omega.mean(), omega.std()
    z = (omega - mean) / std if std > 0 else np.full_like(omega, np.nan)
    return {
        "omega_mean": float(mean),
        "omega_std": float(std),
        "omega_skewness": float((z**3).mean()),
        "omega_excess_kurtosis": float((z**4).mean() - 3),
    }


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
    each draw's gradient, flat, on the CPU, for measure/shape.py and smoothing.py. Memory: some seven gradients,
    whatever M is. ValueError as in `affine`, if a step would move no parameter, for fewer than two draws, for draws of
    several sizes or larger than n.
    """
    sizes, readings, names = [], [], {"delta": 1.0} | (renamed or {})
    with objective.unchanged():
        for draw in draws:
            found = objective.gradient_by_parameter(draw)
            sizes.append(len(draw[1]))
            if len(sizes) == 1:
                rates, full = _moved(objective, optimizer, found, full)
                weights, memory = affine(optimizer, list(rates))
                offset = torch._foreach_sub(memory, full)
                mean = [torch.zeros_like(p) for p in rates]
            g = [found[p] if p in found else torch.zeros_like(p) for p in rates]
            omega = torch._foreach_add(torch._foreach_mul(g, weights), offset)
            if injected:
                torch._foreach_add_(omega, isotropic(list(rates), injected[0], injected[1](len(sizes))))
            renamings = [squares(torch._foreach_add(omega, full, alpha=1 - ratio)) for ratio in names.values()]
            readings.append(torch.stack([_spread(g, mean, len(sizes)), squares(g), *renamings]))
            if keep:
                keep(flat(g))
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
        "injected": injected[0] ** 2 if injected else 0.0,
        "c_squared": c_squared,
        "c_squared_se": factor * numbers["variance_se"],
        "batchnorm_bias": length(torch._foreach_sub(mean, full)) ** 2 - numbers["variance"] / m,
        "noise_scale": c_squared / full_norm**2 if full_norm else float("nan"),
    }


def _spread(g: list[Tensor], mean: list[Tensor], k: int) -> Tensor:
    """The k-th draw's part of V̂_b, for each parameter; `mean`, of the draws before, takes g in.

    It is (k − 1)/k times the squared distance to that mean: its expectation is V_b for each k ≥ 2, and the mean over
    these is Σ‖g_i − ḡ‖²/(M − 1) [Welford 1962].
    """
    step = torch._foreach_sub(g, mean)
    torch._foreach_add_(mean, step, alpha=1 / k)
    return squares(step) * ((k - 1) / k)


def _moments(readings: np.ndarray, weights: np.ndarray, lr: np.ndarray, names: list[str]) -> dict[str, float]:
    """Means over the draws. readings: (M, 2 + names, P), of each parameter `_spread`, ‖g‖², and ‖ω‖² by each name."""
    spread, norms, *noise = readings.swapaxes(0, 1)
    spread = spread[1:]  # the first draw has none before it
    numbers = {"noise_square": float(noise[0].sum(1).mean())}
    for name, square in zip(names, noise, strict=True):
        numbers |= estimate(name, np.sqrt(square @ lr**2))
    return numbers | {
        **estimate("variance", spread.sum(1)),
        "fresh": float(weights**2 @ spread.mean(0)),
        "max_draw_norm": float(np.sqrt(norms.sum(1).max())),
    }


def _moved(
    objective: Objective, optimizer: Optimizer, found: dict[Tensor, Tensor], full: list[Tensor]
) -> tuple[dict[Tensor, float], list[Tensor]]:
    """The parameters that a step with the gradients `found` moves, with their learning rates, and their ∇f."""
    rates, by_parameter = learning_rates(optimizer), dict(zip(objective.params, full, strict=True))
    moved = {p: rates[p] for p in found if p in rates}
    if not moved:
        raise ValueError("the loss depends on no parameter that the optimizer holds and that is not frozen")
    return moved, [by_parameter[p] for p in moved]


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
