"""Temporary."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from measure.gradients import full_gradient, gradient, unchanged


def measure(
    model: nn.Module,
    optimizer,
    batch: tuple[Tensor, Tensor],
    chunks,
    n: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], Tensor]:
    """Measure ω_t = d_t − ∇f(x_t), both at the present x_t, before the update that `batch` would make.

    batch: the next mini-batch, images (b, 3, 32, 32) and labels (b,). step: t, which picks the random numbers
    of the full pass. Parameters that `step` would not move, being frozen, unused, or not the optimizer's, are left
    out of d_t and of ∇f. Returns the numbers (norms are Euclidean over all parameters; delta = lr · ‖ω‖, paper,
    section 3, and with several parameter groups the norm of all lr_p ω_p; cosine: of the angle between d_t and ∇f)
    and ω itself, flat, in the model's order, float32, on the CPU.
    """
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    params = [p for p in model.parameters() if p.requires_grad and p in rates]
    with unchanged(model, training=True):
        found = dict(zip(params, gradient(model, *batch, params), strict=True))
    params = [p for p in params if found[p] is not None]
    directions = dict(zip(rates, direction(optimizer, found), strict=True))
    full = _flat(full_gradient(model, chunks, n, between, params))
    d, g = _flat([directions[p] for p in params]), _flat([found[p] for p in params])
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


def direction(optimizer, gradients: dict[Tensor, Tensor | None]) -> list[Tensor]:
    """d_t as it would be with these gradients, one tensor for each of the optimizer's parameters, group by group."""
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in owned]
    try:
        for p in owned:
            p.grad = gradients.get(p)
        return optimizer.direction()
    finally:
        for p, grad in zip(owned, held, strict=True):
            p.grad = grad


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


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).cpu()


def _norm(flat: Tensor) -> float:
    return torch.linalg.vector_norm(flat, dtype=torch.float64).item()
