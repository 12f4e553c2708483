"""Search direction noise ω_t = d_t − ∇f(x_t): one batch's, its budget over many draws, and statistics of ω.

    d_t = w g_t + memory,   ω_t = w (g_t − ∇f) + μ_t,   μ_t = memory − (1 − w) ∇f

w and the memory belong to the optimizer (measure/optimizers.py); every number is of the present x_t. Nothing here
changes what it measures: weights, buffers, `.grad`, optimizer and random state stay as they were.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from measure.draws import dense_gradient, flat, length, squares, standard_error
from measure.gradients import Batch, Loss, full_gradient, gradient, trained, unchanged
from measure.optimizers import affine, direction, frozen_gain


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
) -> tuple[dict[str, float], Tensor]:
    """Measure ω_t = d_t − ∇f(x_t), both at the present x_t, before the update that `batch` would make.

    batch: the next mini-batch. full: ∇f(x_t), loss and training: as in `full_gradient`. optimizer: as `direction`
    takes it. Parameters that `step` would not move, being frozen, unused, or not the optimizer's, are left out of
    d_t and of ∇f. Returns the numbers (norms are Euclidean over all parameters; delta = lr · ‖ω‖, paper, section 3,
    and with several parameter groups the norm of all lr_p ω_p; cosine: of the angle between d_t and ∇f) and ω
    itself, flat, in the model's order, float32, on the CPU.
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
) -> dict[str, float]:
    """What ω_t is made of, from M further mini-batches at the same x_t; docs/measuring.md defines every number.

    batch, full, loss, training, and the parameters counted: as in `batch_noise`. draws: M ≥ 2 batches of b images,
    each drawn as training draws one and independently of the others, as `draw` does. n: training images. between:
    called before every draw; what it raises ends the measurement. keep: given each draw's gradient, flat, on the
    CPU, for measure/shape.py. Memory: seven gradients, whatever M is. ValueError for an optimizer that `affine` or
    `frozen_gain` refuses, for fewer than two draws, draws of several sizes or larger than n.
    """
    sizes, readings = [], []
    with unchanged(model, training):
        own = _moving(model, optimizer, batch, loss)
        params = list(own)
        full = _of(params, model, full)
        weights, memory = affine(optimizer, params)
        lr, gains = _settings(optimizer, params)
        offset = torch._foreach_sub(memory, full)
        mean = [torch.zeros_like(p) for p in params]
        for draw in draws:
            between()
            g = dense_gradient(model, draw, params, loss)
            sizes.append(len(draw[1]))
            readings.append(_reading(g, mean, len(sizes), weights, offset))
            if keep:
                keep(flat(g))
    if len(sizes) < 2 or len(set(sizes)) > 1 or sizes[0] > n:
        raise ValueError(f"draws must be two or more batches of one size of at most {n} images, got sizes {sizes}")
    numbers = {
        "draws": len(sizes),
        "batch_size": sizes[0],
        "full_gradient_norm": length(full),
        "noise_norm": length(_omega(list(own.values()), weights, offset)),
        "memory": length(_omega(full, weights, offset)) ** 2,
    }
    numbers |= _moments(torch.stack(readings).cpu().numpy(), np.array(weights), lr, gains)
    distance = length(torch._foreach_sub(mean, full))
    return numbers | _derived(numbers, distance, n)


def _moments(readings: np.ndarray, weights: np.ndarray, lr: np.ndarray, gains: np.ndarray) -> dict[str, float]:
    """Over the draws. readings: (M, 3, P), a row as `_reading` gives it; the others: one entry a parameter."""
    spread, noise, norms = readings.swapaxes(0, 1)
    spread = spread[1:]
    variances, totals, deltas = spread.mean(0), spread.sum(1), np.sqrt(noise @ lr**2)
    return {
        "noise_square": float(noise.sum(1).mean()),
        "delta": float(deltas.mean()),
        "delta_se": standard_error(deltas),
        "variance": float(totals.mean()),
        "variance_se": standard_error(totals),
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
        pair = (float(group["lr"]), frozen_gain(optimizer, group))
        settings |= dict.fromkeys(group["params"], pair)
    return np.array([settings[p] for p in params]).T


def _reading(g: list[Tensor], mean: list[Tensor], k: int, weights: list[float], offset: list[Tensor]) -> Tensor:
    """Of the k-th draw, for each parameter: its part of V̂_b, of ‖ω‖², of ‖g‖²; (3, P). `mean` takes it in.

    The part of V̂_b is (k − 1)/k times the squared distance to the mean of the draws before: its expectation is V_b
    for each k ≥ 2, and the mean over these is Σ‖g_i − ḡ‖²/(M − 1) [Welford 1962].
    """
    step = torch._foreach_sub(g, mean)
    torch._foreach_add_(mean, step, alpha=1 / k)
    return torch.stack([squares(step) * ((k - 1) / k), squares(_omega(g, weights, offset)), squares(g)])


def _omega(g: list[Tensor], weights: list[float], offset: list[Tensor]) -> list[Tensor]:
    return torch._foreach_add(torch._foreach_mul(g, weights), offset)


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
