"""Search direction noise ω_t = d_t − ∇f(x_t): the full gradient, the measurement, and statistics of ω.

Nothing here changes what it measures: weights, buffers, `.grad`, optimizer and random state stay as they were.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data
from shb import SGD


@contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` in training or evaluation mode for a while, and leave no trace in buffers or random state."""
    buffers = [b.clone() for b in model.buffers()]
    was_training = model.training
    cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices=cuda):
            model.train(training)
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def gradient(model: nn.Module, x: Tensor, y: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """Gradient of the mean cross-entropy of a batch; one tensor a parameter, None where the loss does not need it.

    x: images (b, 3, 32, 32). y: labels (b,). params: of the model, those to differentiate by. `.grad` is not touched.
    """
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), params, allow_unused=True))


def full_gradient(
    model: nn.Module,
    chunks: Iterable[tuple[Tensor, Tensor]],
    n: int,
    between: Callable[[], None] = lambda: None,
    params: list[Tensor] | None = None,
) -> list[Tensor]:
    """∇f(x_t), the gradient of the mean loss over all n training images (paper, section 2, mode sampling).

    chunks: images (b, 3, 32, 32) and labels (b,), n images in all; every image weighs 1/n, also in a partial
    last chunk. between: called before every chunk; what it raises ends the pass. params: of the model, those to
    differentiate by (default: all that are not frozen). BatchNorm works in training mode, so with it the result
    depends on the size of the chunks. Returns one tensor a parameter. ValueError if the chunks do not hold n images.
    """
    params = params or [p for p in model.parameters() if p.requires_grad]
    total, seen = [torch.zeros_like(p) for p in params], 0
    with unchanged(model, training=True):
        for x, y in chunks:
            between()
            loss = 1 / n * F.cross_entropy(model(x), y, reduction="sum")
            torch._foreach_add_(total, torch.autograd.grad(loss, params, materialize_grads=True))
            seen += len(y)
    if seen != n:
        raise ValueError(f"the chunks hold {seen} images, not {n}")
    return total


def measure(
    model: nn.Module,
    optimizer: SGD,
    batch: tuple[Tensor, Tensor],
    data: Data,
    step: int,
    full_grad_batchsize: int,
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
    chunks = data.full_pass(step, full_grad_batchsize)
    full = _flat(full_gradient(model, chunks, data.size, between, params))
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


def direction(optimizer: SGD, gradients: dict[Tensor, Tensor | None]) -> list[Tensor]:
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
