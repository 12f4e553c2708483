"""Does the noise of the search direction smooth the loss? Measured directly, by the loss at the points it leads to.

    y = x − η∇f,   y − ηω_i = x − ηd_i = z − ηφ_i,   z = y − ημ,   φ_i = w(g_i − ∇f) + u_i

A step splits into a displacement by momentum, −ημ, and a fluctuation, −ηφ, whose mean over batches is zero. Only the
fluctuation smooths: E f(z − ηφ) is f at z averaged over it [Kleinberg et al. 2018; the paper's section 3]. u is noise
that training injects, if any. Nothing here changes what it measures.
"""

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from measure.draws import estimate, isotropic, squares, standard_error
from measure.optimizers import affine
from measure.sharpness import Landscape, signs


def smoothing(
    f: Landscape,
    optimizer: Optimizer,
    full: list[Tensor],
    draws: list[Tensor],
    points: int,
    generator: torch.Generator,
    injected: float = 0.0,
) -> dict[str, float]:
    """The excess loss under the noise of a step, under two controls, and as predicted (measure.md, section 5; ours).

    full: ∇f(x_t) over all images, one tensor for each of f.params. draws: M ≥ 4 gradients of mini-batches at x_t,
    flat, as `measure.noise.budget` keeps them. points: P, from 2 to M, of each kind; those of the controls are P/2
    vectors (two at least), each with its mirror image. injected: R, E‖u‖² = R². Returns f at the points x, y, z
    (loss_x, loss_y, loss_z) and, with their standard errors over the draws or the vectors,
      excess       mean f(y − ηω_i) − f(y), over the first P draws: what the whole of ω does; = displacement + real
      displacement f(z) − f(y): what momentum does, no smoothing
      real         mean f(z − ηφ_i) − f(z): what the fluctuation does
      gaussian     as real, for Gaussian noise of the same covariance
      isotropic    as real, for Gaussian noise of one scale and the same E‖φ‖²
      predicted, predicted_isotropic   η² tr(HΣ)/2 and η² tr(H) tr(Σ)/(2d), with H at z, Σ = Cov φ
      fluctuation_norm                 √(E‖ηφ‖²), the length of the fluctuation in parameter space
    ValueError for a number of draws or points outside these ranges, draws of another size, or an optimizer that
    `affine` refuses.
    """
    if len(draws) < 4 or not 2 <= points <= len(draws):
        raise ValueError(f"draws must be 4 or more, points 2 to as many; got {len(draws)} draws, {points} points")
    step = Step(f.params, optimizer, full, draws, injected)
    loss_x = f.value()
    with f.moved(step.descent):
        loss_y = f.value()
    with f.moved(step.drift):
        loss_z, probes = f.value(), signs(f.params, generator)
        rises = {"real": np.array([f.rise(step.real(i, generator), loss_z) for i in range(points)])}
        for kind, draw in {"gaussian": step.gaussian, "isotropic": step.isotropic}.items():
            vectors = range(max(2, points // 2))
            rises[kind] = np.array([f.rise_both_ways(draw(generator), loss_z) for _ in vectors])
        pairs = step.pairs()
        curvatures, traces = np.split(f.quadratic([*pairs, *probes]), [len(pairs)])
    rises = {"excess": rises["real"] + loss_z - loss_y} | rises
    numbers = {"points": points, "loss_x": loss_x, "loss_y": loss_y, "loss_z": loss_z, "displacement": loss_z - loss_y}
    for kind, values in rises.items():
        numbers |= estimate(kind, values)
    per_trace, injected_per_trace = (norm**2 / (2 * step.entries) for norm in (step.norm, step.injected))
    per_trace_se = standard_error(np.array([squares(pair).sum().item() for pair in pairs])) / (2 * step.entries)
    trace, trace_se = traces.mean(), standard_error(traces)
    return numbers | {
        "predicted": float(curvatures.mean() / 2 + injected_per_trace * trace),
        "predicted_se": float(np.hypot(standard_error(curvatures) / 2, injected_per_trace * trace_se)),
        "predicted_isotropic": float(per_trace * trace),
        "predicted_isotropic_se": float(np.hypot(per_trace * trace_se, per_trace_se * trace)),
        "fluctuation_norm": step.norm,
    }


class Step:
    """The displacements that make up one step of training, in parameter space, one tensor a parameter.

    descent: −η∇f, from x to y. drift: −η(w∇f + memory), from x to z. norm: √(E‖ηφ‖²). injected: ηR. entries: d.
    """

    def __init__(
        self, params: list[Tensor], optimizer: Optimizer, full: list[Tensor], draws: list[Tensor], injected: float
    ):
        self.params, self.entries, self.draws = params, sum(p.numel() for p in params), draws
        if any(draw.numel() != self.entries for draw in draws):
            raise ValueError(f"draws must have as many entries as the parameters, {self.entries}")
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        weights, memory = affine(optimizer, params)
        rates = [rates[p] for p in params]
        if injected and len(set(rates)) > 1:
            raise ValueError(f"injected noise is isotropic under one learning rate only, got {sorted(set(rates))}")
        self.scales = [-rate * w for rate, w in zip(rates, weights, strict=True)]
        self.descent = [-rate * g for rate, g in zip(rates, full, strict=True)]
        self.drift = [s * g - rate * m for s, g, rate, m in zip(self.scales, full, rates, memory, strict=True)]
        self.full = torch.cat([g.reshape(-1) for g in full]).cpu()
        self.mean, self.injected = sum(draws) / len(draws), rates[0] * injected
        spread = sum(squares(self._scaled(draw - self.mean)).sum().item() for draw in draws) / (len(draws) - 1)
        self.norm = float(np.sqrt(spread + self.injected**2))

    def real(self, i: int, generator: torch.Generator) -> list[Tensor]:
        """−ηφ_i, of the i-th draw, with fresh injected noise."""
        return self._with_injected(self._scaled(self.draws[i] - self.full), generator)

    def gaussian(self, generator: torch.Generator) -> list[Tensor]:
        """Gaussian, with the covariance of −ηφ that the draws have: Σ_i ξ_i (g_i − ḡ)/√(M − 1), ξ ~ N(0, 1)."""
        xi = torch.randn(len(self.draws), generator=generator, device=generator.device).cpu()
        xi /= (len(self.draws) - 1) ** 0.5
        total = sum(x * draw for x, draw in zip(xi.tolist(), self.draws, strict=True)) - xi.sum() * self.mean
        return self._with_injected(self._scaled(total), generator)

    def isotropic(self, generator: torch.Generator) -> list[Tensor]:
        """Gaussian, of one scale in every direction, as long as −ηφ in the mean square."""
        return isotropic(self.params, self.norm, generator)

    def pairs(self) -> list[list[Tensor]]:
        """−ηw e_k of the pair differences e_k = (g_{2k−1} − g_{2k})/√2: mean zero, covariance that of −ηw g."""
        firsts, seconds = self.draws[0::2], self.draws[1::2]
        return [self._scaled((g - h) / 2**0.5) for g, h in zip(firsts, seconds, strict=False)]

    def _scaled(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as tensors on the parameters' device, times −ηw."""
        parts = vector.split([p.numel() for p in self.params])
        shaped = [part.view(p.shape).to(p.device) for p, part in zip(self.params, parts, strict=True)]
        return [s * part for s, part in zip(self.scales, shaped, strict=True)]

    def _with_injected(self, displacement: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        if not self.injected:
            return displacement
        return torch._foreach_add(displacement, isotropic(self.params, self.injected, generator))
