"""Search direction noise ω_t = d_t − ∇f(x_t): one batch's, its budget over many draws, and statistics of ω.

    d_t = w g_t + memory,   ω_t = w (g_t − ∇f) + μ_t,   μ_t = memory − (1 − w) ∇f

w and the memory belong to the optimizer (measure/optimizers.py); every number is of the present x_t. Where training
adds noise u_t to d_t, ω_t includes it. Nothing here changes what it measures: weights, buffers, `.grad`, optimizer and
random state stay as they were.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from measure.draws import dense_gradient, estimate, flat, isotropic, length, squares
from measure.gradients import Batch, Loss, full_gradient, gradient, trained, unchanged
from measure.optimizers import affine, direction, frozen_gain

# (): that of u_t, which training adds next. (i): that of the i-th draw, i ≥ 1.
Generators = Callable[..., torch.Generator]


def measure(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    chunks: Iterable[Batch],
    n: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], Tensor]:
    """Measure ω_t of `batch` as `batch_noise` does, with the full gradient of `chunks`, n and `between`."""
    return batch_noise(model, optimizer, batch, full_gradient(model, chunks, n, between))


def batch_noise(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    full: list[Tensor],
    loss: Loss = F.cross_entropy,
    training: bool | None = True,
    injected: float = 0.0,
    generator: Generators | None = None,
    renamed: float | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Measure ω_t = d_t − ∇f(x_t), both at the present x_t, before the update that `batch` would make.

    batch: the next mini-batch. full: ∇f(x_t), loss and training: as in `full_gradient`. optimizer: as `direction`
    takes it. Parameters that `step` would not move, being frozen, unused, or not the optimizer's, are left out of
    d_t and of ∇f. injected: R, where training adds to d_t isotropic Gaussian noise u_t, E‖u_t‖² = R², of `generator`
    (measure.draws.isotropic over the parameters counted); ω_t then includes it, the other numbers do not. renamed:
    η′/η, where the same trajectory is that of another algorithm at the learning rate η′, its d′ = (η/η′) d; then δ
    under that name is measured too, η′‖d′ − ∇f‖ = η‖d − (η′/η)∇f‖ (measure.md, section 7).

    Returns the numbers (norms are Euclidean over all parameters; delta = lr · ‖ω‖, paper, section 3, and with several
    parameter groups the norm of all lr_p ω_p; cosine: of the angle between d_t and ∇f; injected_noise_norm and
    delta_renamed where they are asked for) and ω itself, flat, in the model's order, float32, on the CPU. ValueError
    for injected noise without a generator.
    """
    with unchanged(model, training):
        found = _moving(model, optimizer, batch, loss)
    params = list(found)
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    directions = dict(zip(rates, direction(optimizer, found), strict=True))
    d, g = flat([directions[p] for p in params]), flat([found[p] for p in params])
    full = flat(_of(params, model, full))
    lr = torch.cat([torch.full((p.numel(),), rates[p], dtype=torch.float64) for p in params])
    omega = d - full
    if injected:
        u = flat(_injected(params, injected, generator))
        omega += u
    d_norm, full_norm, noise_norm = _norm(d), _norm(full), _norm(omega)
    dot = torch.dot(d.double(), full.double()).item()
    numbers = {
        "noise_norm": noise_norm,
        "direction_norm": d_norm,
        "full_gradient_norm": full_norm,
        "gradient_norm": _norm(g),
        "gradient_noise_norm": _norm(g - full),
        "cosine": dot / (d_norm * full_norm) if d_norm * full_norm else float("nan"),
        "delta": _norm(lr * omega),
    }
    if renamed is not None:
        numbers["delta_renamed"] = _norm(lr * (omega + (1 - renamed) * full))
    if injected:
        numbers["injected_noise_norm"] = _norm(u)
    return numbers | {f"omega_{k}": v for k, v in statistics(omega.numpy()).items()}, omega


def budget(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    full: list[Tensor],
    draws: Iterable[Batch],
    n: int,
    loss: Loss = F.cross_entropy,
    training: bool | None = True,
    between: Callable[[], None] = lambda: None,
    keep: Callable[[Tensor], None] | None = None,
    injected: float = 0.0,
    generator: Generators | None = None,
    renamed: float | None = None,
) -> dict[str, float]:
    """What ω_t is made of, from M further mini-batches at the same x_t; docs/measuring.md defines every number.

    batch, full, loss, training, injected, generator, renamed, and the parameters counted: as in `batch_noise`. draws:
    M ≥ 2 batches of b images, each drawn as training draws one and independently of the others, as `draw` does. n:
    training images. between: called before every draw; what it raises ends the measurement. keep: given each draw's
    gradient, flat, on the CPU, for measure/shape.py. Memory: seven gradients, nine with injected noise, whatever M is.
    ValueError as in `batch_noise`, for an optimizer that `affine` or `frozen_gain` refuses, for fewer than two draws,
    draws of several sizes or larger than n.
    """
    sizes, readings = [], []
    with unchanged(model, training):
        own = _moving(model, optimizer, batch, loss)
        params = list(own)
        full = _of(params, model, full)
        weights, memory = affine(optimizer, params)
        lr, gains = _settings(optimizer, params)
        offset = torch._foreach_sub(memory, full)
        u = _injected(params, injected, generator)
        noise_norm = length(_omega(list(own.values()), weights, offset, u))
        mean = [torch.zeros_like(p) for p in params]
        for draw in draws:
            between()
            g = dense_gradient(model, draw, params, loss)
            sizes.append(len(draw[1]))
            u = _injected(params, injected, generator, len(sizes))
            readings.append(_reading(g, mean, len(sizes), _omega(g, weights, offset, u), full, renamed))
            if keep:
                keep(flat(g))
    if len(sizes) < 2 or len(set(sizes)) > 1 or sizes[0] > n:
        raise ValueError(f"draws must be two or more batches of one size of at most {n} images, got sizes {sizes}")
    numbers = {
        "draws": len(sizes),
        "batch_size": sizes[0],
        "full_gradient_norm": length(full),
        "noise_norm": noise_norm,
        "memory": length(_omega(full, weights, offset, [])) ** 2,
        "injected": injected**2,
    }
    numbers |= _moments(torch.stack(readings).cpu().numpy(), np.array(weights), lr, gains)
    distance = length(torch._foreach_sub(mean, full))
    return numbers | _derived(numbers, distance, n)


def _moments(readings: np.ndarray, weights: np.ndarray, lr: np.ndarray, gains: np.ndarray) -> dict[str, float]:
    """Over the draws. readings: (M, 3 or 4, P), a row as `_reading` gives it; the others: one entry a parameter."""
    spread, norms, noise, *renamed = readings.swapaxes(0, 1)
    spread = spread[1:]
    variances, totals = spread.mean(0), spread.sum(1)
    numbers = estimate("delta", np.sqrt(noise @ lr**2))
    if renamed:
        numbers |= estimate("delta_renamed", np.sqrt(renamed[0] @ lr**2))
    return numbers | {
        "noise_square": float(noise.sum(1).mean()),
        **estimate("variance", totals),
        "fresh": float(weights**2 @ variances),
        "memory_noise_frozen": float(gains @ variances),
        "largest_gradient_norm": float(np.sqrt(norms.sum(1).max())),
    }


def _derived(numbers: dict[str, float], distance: float, n: int) -> dict[str, float]:
    """What follows from the moments. distance: ‖ḡ − ∇f‖. n: training images."""
    b, full = numbers["batch_size"], numbers["full_gradient_norm"]
    factor = b * (n - 1) / (n - b) if b < n else float("nan")
    c_squared = factor * numbers["variance"]
    return {
        "staleness": numbers["memory"] - numbers["memory_noise_frozen"],
        "c_squared": c_squared,
        "c_squared_se": factor * numbers["variance_se"],
        "batchnorm_bias": distance**2 - numbers["variance"] / numbers["draws"],
        "noise_scale": c_squared / full**2 if full else float("nan"),
    }


def statistics(omega: np.ndarray) -> dict[str, float]:
    """Moments of the entries of ω, in float64: mean, std (of the population), skewness, excess kurtosis, range.

    omega: flat array (ours; the paper shows a histogram). They are pooled over coordinates, whose scales differ: a
    large kurtosis does not tell ω from a Gaussian vector. A constant array has skewness and kurtosis nan.
    """
    omega = omega.astype(np.float64)
    mean, std = omega.mean(), omega.std()
    z = (omega - mean) / std if std > 0 else np.full_like(omega, np.nan)
    return {
        "entries": omega.size,
        "mean": float(mean),
        "std": float(std),
        "skewness": float((z**3).mean()),
        "excess_kurtosis": float((z**4).mean() - 3),
        "min": float(omega.min()),
        "max": float(omega.max()),
    }


def _moving(model: nn.Module, optimizer: Optimizer, batch: Batch, loss: Loss) -> dict[Tensor, Tensor]:
    """The parameters that a step on `batch` moves, in the model's order, with their gradients."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    params = [p for p in trained(model) if p in owned]
    found = gradient(model, *batch, params, loss) if params else []
    moving = {p: g for p, g in zip(params, found, strict=True) if g is not None}
    if not moving:
        raise ValueError("the loss depends on no parameter that the optimizer holds and that is not frozen")
    return moving


def _of(params: list[Tensor], model: nn.Module, full: list[Tensor]) -> list[Tensor]:
    """The entries of `full`, which has one for each of `trained(model)`, that belong to `params`."""
    by_parameter = dict(zip(trained(model), full, strict=True))
    return [by_parameter[p] for p in params]


def _settings(optimizer: Optimizer, params: list[Tensor]) -> np.ndarray:
    """The learning rate and `frozen_gain` of each parameter; (2, P)."""
    settings = {}
    for group in optimizer.param_groups:
        settings |= dict.fromkeys(group["params"], (float(group["lr"]), frozen_gain(optimizer, group)))
    return np.array([settings[p] for p in params]).T


def _injected(params: list[Tensor], norm: float, generator: Generators | None, *draw: int) -> list[Tensor]:
    """The noise u that is added to d_t, of u_t's generator or of a draw's; without any, empty."""
    if norm and generator is None:
        raise ValueError(f"injected noise of norm {norm} needs a generator")
    return isotropic(params, norm, generator(*draw)) if norm else []


def _reading(
    g: list[Tensor], mean: list[Tensor], k: int, omega: list[Tensor], full: list[Tensor], renamed: float | None
) -> Tensor:
    """Of the k-th draw, for each parameter: its part of V̂_b, ‖g‖², ‖ω‖², if `renamed` ‖d − (η′/η)∇f‖²; (3 or 4, P).

    `mean` takes g in; omega is overwritten. The part of V̂_b is (k − 1)/k times the squared distance to the mean of the
    draws before: its expectation is V_b for each k ≥ 2, and the mean over these is Σ‖g_i − ḡ‖²/(M − 1) [Welford 1962].
    """
    step = torch._foreach_sub(g, mean)
    torch._foreach_add_(mean, step, alpha=1 / k)
    parts = [squares(step) * ((k - 1) / k), squares(g), squares(omega)]
    if renamed is not None:
        torch._foreach_add_(omega, full, alpha=1 - renamed)
        parts.append(squares(omega))
    return torch.stack(parts)


def _omega(g: list[Tensor], weights: list[float], offset: list[Tensor], u: list[Tensor]) -> list[Tensor]:
    omega = torch._foreach_add(torch._foreach_mul(g, weights), offset)
    return torch._foreach_add(omega, u) if u else omega


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
