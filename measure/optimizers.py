"""What an optimizer does with a gradient: d_t = w g_t + memory, read off its behaviour.

An optimizer takes part if it is torch.optim.SGD, or has a method `direction()`, which returns d_t of the gradients
held in `.grad`, one tensor a parameter, group by group, and changes nothing. Weight decay and maximize are refused.
"""

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from measure.gradients import Objective


def direction(optimizer: Optimizer, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """d_t as it would be with these gradients, for each of the optimizer's parameters.

    ValueError if the optimizer does not take part, or decays weights or ascends.
    """
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    if not (hasattr(optimizer, "direction") or type(optimizer) is torch.optim.SGD):
        name = type(optimizer).__name__
        raise ValueError(f"the optimizer must be torch.optim.SGD or have a method direction(), got {name}")
    for group in optimizer.param_groups:
        for key in ("weight_decay", "maximize"):
            if group.get(key):
                raise ValueError(f"d_t and the gradient of the loss differ by {key}={group[key]}, which must be off")
    held = [p.grad for p in owned]
    try:
        for p in owned:
            p.grad = gradients.get(p)
        if hasattr(optimizer, "direction"):
            found = optimizer.direction()
        else:
            found = []
            for group in optimizer.param_groups:
                found += [_of_torch_sgd(group, p, optimizer.state.get(p, {})) for p in group["params"]]
    finally:
        for p, grad in zip(owned, held, strict=True):
            p.grad = grad
    return dict(zip(owned, found, strict=True))


@torch.no_grad()
def _of_torch_sgd(group: dict, p: Tensor, state: dict) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    beta, buffer = group["momentum"], state.get("momentum_buffer")
    if beta == 0:
        return p.grad.clone()
    # The first gradient enters the buffer undamped.
    m = p.grad if buffer is None else beta * buffer + (1 - group["dampening"]) * p.grad
    return p.grad + beta * m if group["nesterov"] else m.clone()


def affine(optimizer: Optimizer, params: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """w and the memory of d_t = w g_t + memory, for each of `params`; d_t is probed with gradients of 0, 1 and 2.

    The memory is β m_{t−1} for SHB and NSHB, νβ m_{t−1} for QHM, zero for SGD. ValueError if d_t is not of this form,
    with one w a parameter (Adam's is not), and where `direction` raises it.
    """
    probes = [direction(optimizer, {p: torch.full_like(p, value) for p in params}) for value in (0.0, 1.0, 2.0)]
    weights, memory = [], []
    for p in params:
        zero, one, two = (probe[p] for probe in probes)
        w = (one - zero).mean(dtype=torch.float64).item()
        error = (two - zero - 2 * w).abs().max()
        if error > 32 * torch.finfo(p.dtype).eps * (1 + zero.abs().max()):
            raise ValueError(f"{type(optimizer).__name__}: the search direction is not w·g + memory with one number w")
        weights.append(w)
        memory.append(zero)
    return weights, memory


def learning_rates(optimizer: Optimizer) -> dict[Tensor, float]:
    """η of each of the optimizer's parameters."""
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def memory_noise_standing_still(n: int, b: int, step: int, beta: float, weight: float = 1.0) -> float:
    """E‖noise of the memory‖²/V_b before the update `step` (from 0), if the weights had stood still (ours).

    Batches of b of n images, n in the last of an epoch if b does not divide it, each image once an epoch. The gradient
    of j steps ago weighs h_j = weight · β^j in the memory: 1 for SHB, 1 − β for NSHB, ν(1 − β) for QHM. With
    S² = V_b N b/(N − b) the noise is S² Σ_epochs [Σ_j h_j²/b_j − (Σ_j h_j)²/N]: the batches of an epoch are
    anti-correlated, so that it depends on the position in it. ValueError unless b < n and 0 ≤ β < 1.
    """
    if not (0 < b < n and 0 <= beta < 1):
        raise ValueError(f"b must be below n, and beta in [0, 1); got b {b}, n {n}, beta {beta}")
    per_epoch = -(-n // b)
    lags = np.arange(1, step + 1)[: 1 + int(np.log(1e-18) / np.log(beta)) if beta else 1]
    epoch, position = np.divmod(step - lags, per_epoch)
    sizes, h = np.where(position == per_epoch - 1, n - (per_epoch - 1) * b, b), weight * beta**lags
    sums = np.bincount(epoch, h, minlength=1)
    return float(n * b / (n - b) * ((h**2 / sizes).sum() - (sums**2).sum() / n))


class ExactMemory:
    """Splits the memory of d_t exactly, on a problem where a full gradient a step can be afforded (ours).

    A second optimizer of the same class, `shadow`, is fed ∇f(x_k) where training is fed g_k. Call `add` before each of
    the last K updates, then `split`; what gradients before these left behind counts as noise, and is β^K of what it
    was. The momentum must not change meanwhile. Memory: two gradients. ValueError if the optimizer's
    class cannot be made from parameter groups and lr alone.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer):
        self.objective, self.optimizer, groups = objective, optimizer, []
        self.shadows = {p: torch.zeros_like(p, requires_grad=True) for p in learning_rates(optimizer)}
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "param_names"}
            groups.append(settings | {"params": [self.shadows[p] for p in group["params"]], "lr": 1.0})
        try:
            self.shadow = type(optimizer)(groups, lr=1.0)
        except TypeError as error:
            name = type(optimizer).__name__
            raise ValueError(f"{name} cannot be made from parameter groups and lr alone ({error})") from error

    def add(self, full: list[Tensor]) -> None:
        """Take in ∇f(x_k), as `full_gradient` returns it, before the update that leaves x_k."""
        for p, gradient in zip(self.objective.params, full, strict=True):
            if p in self.shadows:
                self.shadows[p].grad = gradient
        self.shadow.step()

    def split(self, full: list[Tensor]) -> dict[str, float]:
        """‖μ‖² at the present x_t, whose full gradient is `full`, as the sum of three numbers.

        memory_noise: of the part that noise of earlier batches makes. memory_drift: of the part that earlier and
        present full gradients make. memory_cross: twice the inner product of the two.
        """
        now = {p: g for p, g in zip(self.objective.params, full, strict=True) if p in self.shadows}
        weights, memory = affine(self.optimizer, list(now))
        _, expected = affine(self.shadow, [self.shadows[p] for p in now])
        noise, drift, cross = 0.0, 0.0, 0.0
        for g, w, m, e in zip(now.values(), weights, memory, expected, strict=True):
            fluctuation, shift = (m - e).double(), (e - (1 - w) * g).double()
            noise += fluctuation.square().sum().item()
            drift += shift.square().sum().item()
            cross += 2 * (fluctuation * shift).sum().item()
        return {"memory_noise": noise, "memory_drift": drift, "memory_cross": cross}
