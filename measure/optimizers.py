"""What an optimizer does with a gradient: d_t = w g_t + memory, read off its behaviour.

An optimizer takes part if it is torch.optim.SGD, or has a method `direction()`, which returns d_t of the gradients
held in `.grad`, one tensor a parameter, group by group, and changes nothing. Weight decay and maximize are refused.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from measure.gradients import trained


def direction(optimizer: Optimizer, gradients: dict[Tensor, Tensor | None]) -> list[Tensor]:
    """d_t as it would be with these gradients, one tensor for each of the optimizer's parameters, group by group.

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
            return optimizer.direction()
        found = []
        for group in optimizer.param_groups:
            found += [_of_torch_sgd(group, p, optimizer.state.get(p, {})) for p in group["params"]]
        return found
    finally:
        for p, grad in zip(owned, held, strict=True):
            p.grad = grad


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
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    probes = []
    for value in (0.0, 1.0, 2.0):
        found = direction(optimizer, {p: torch.full_like(p, value) for p in params})
        probes.append(dict(zip(owned, found, strict=True)))
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


def frozen_gain(optimizer: Optimizer, group: dict) -> float:
    """The noise that the memory would hold, were x frozen, in units of V_b: Σ_{k≥1} h_k², where d_t = Σ h_k g_{t−k}.

    w²β²/(1 − β²) for SHB and NSHB (measure.md, section 1, derived), ν²β²(1 − β)/(1 + β) for QHM, where h_k is
    ν(1 − β)β^k. h is read off a copy of the optimizer that has one weight, by a gradient of 1 among zeros. ValueError
    unless h_{k+1} = β h_k: one buffer, a constant β.
    """
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    copy = twin(optimizer, [group], [[x]])
    h = []
    for g in (0.0, 1.0, 0.0, 0.0, 0.0):  # torch.optim.SGD treats the first gradient apart: so it is a zero
        x.data.zero_()  # so that its move is not rounded
        x.grad = torch.full_like(x, g)
        copy.step()
        h.append(-x.item())
    first, second, third = h[2:]
    if first == second == third == 0:
        return 0.0
    beta = second / first if first else float("nan")
    if not (abs(beta) < 1 and abs(third - beta * second) < 1e-9):
        raise ValueError(f"{type(optimizer).__name__}: the memory is not one buffer with a factor |β| < 1")
    return first**2 / (1 - beta**2)


def twin(optimizer: Optimizer, groups: list[dict], params: list[list[Tensor]]) -> Optimizer:
    """A new optimizer of the same class and settings, with lr = 1, for other parameters: a list for each group.

    ValueError if its class cannot be made from parameter groups and lr alone.
    """
    settings = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    settings = [group | {"params": p, "lr": 1.0} for group, p in zip(settings, params, strict=True)]
    try:
        return type(optimizer)(settings, lr=1.0)
    except TypeError as error:
        name = type(optimizer).__name__
        raise ValueError(f"{name} cannot be made from parameter groups and lr alone ({error})") from error


class ExactMemory:
    """Splits the memory of d_t exactly, on a problem where a full gradient a step can be afforded (ours).

    A second optimizer of the same class is fed ∇f(x_k) where training is fed g_k. Call `add` before each of the last
    K updates, then `split`; what gradients before these left behind counts as noise, and is β^K of what it was. The
    momentum must not change meanwhile. Memory: two gradients. ValueError as in `twin`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        groups = optimizer.param_groups
        self.shadows = {p: torch.zeros_like(p, requires_grad=True) for group in groups for p in group["params"]}
        self.shadow = twin(optimizer, groups, [[self.shadows[p] for p in group["params"]] for group in groups])

    def add(self, full: list[Tensor]) -> None:
        """Take in ∇f(x_k), as `full_gradient` returns it, before the update that leaves x_k."""
        for p, gradient in zip(trained(self.model), full, strict=True):
            if p in self.shadows:
                self.shadows[p].grad = gradient
        self.shadow.step()

    def split(self, full: list[Tensor]) -> dict[str, float]:
        """‖μ‖² at the present x_t, whose full gradient is `full`, as the sum of three numbers.

        memory_noise: of the part that noise of earlier batches makes. memory_drift: of the part that earlier and
        present full gradients make. memory_cross: twice the inner product of the two.
        """
        params = [p for p in trained(self.model) if p in self.shadows]
        weights, memory = affine(self.optimizer, params)
        _, expected = affine(self.shadow, [self.shadows[p] for p in params])
        now = dict(zip(trained(self.model), full, strict=True))
        noise, drift, cross = 0.0, 0.0, 0.0
        for p, w, m, e in zip(params, weights, memory, expected, strict=True):
            fluctuation, shift = (m - e).double(), (e - (1 - w) * now[p]).double()
            noise += fluctuation.square().sum().item()
            drift += shift.square().sum().item()
            cross += 2 * (fluctuation * shift).sum().item()
        return {"memory_noise": noise, "memory_drift": drift, "memory_cross": cross}
