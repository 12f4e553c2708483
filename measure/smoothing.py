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

from measure.draws import estimate, flat, isotropic, squares, standard_error
from measure.gradients import Batch, Objective, images
from measure.optimizers import affine, learning_rates
from measure.sharpness import moved, quadratic, rises, signs


def smoothing(
    objective: Objective,
    probe: list[Batch],
    optimizer: Optimizer,
    full: list[Tensor],
    draws: list[Tensor],
    generator: torch.Generator,
    injected: float = 0.0,
) -> dict[str, float]:
    """The excess loss under the noise of a step, under two controls, and as predicted (ours; docs/measuring.md).

    probe: the batches that f is the mean loss of. full: ∇f(x_t) over all images. draws: M ≥ 4 mini-batch gradients
    at x_t, flat, as `measure.noise.budget` keeps them. injected: R, E‖u‖² = R². Returns numbers named as in
    measure/quantities.py, with standard errors over the draws, or over the vectors of the controls: M/2, each with its
    mirror image. ValueError for fewer draws, draws of another size, and as in `affine`.
    """
    if len(draws) < 4:
        raise ValueError(f"smoothing needs 4 draws or more, got {len(draws)}")
    step = Step(objective.params, optimizer, full, draws, injected)
    loss_x = objective.value(probe)
    with moved(objective, step.descent):
        loss_y = objective.value(probe)
    with moved(objective, step.drift):
        loss_z, probes = objective.value(probe), signs(objective.params, generator)
        real = rises(objective, probe, loss_z, (step.real(i, generator) for i in range(len(draws))))
        halves = range(len(draws) // 2)  # with their mirror images as many points as draws
        gaussian = rises(objective, probe, loss_z, (step.gaussian(generator) for _ in halves), mirrored=True)
        equal = rises(objective, probe, loss_z, (step.isotropic(generator) for _ in halves), mirrored=True)
        pairs = step.pairs()
        curvatures, traces = np.split(quadratic(objective, probe, [*pairs, *probes]), [len(pairs)])
    return {
        "probe_images": images(probe),
        "loss_x": loss_x,
        "loss_y": loss_y,
        "loss_z": loss_z,
        **estimate("excess", real + loss_z - loss_y),
        "displacement": loss_z - loss_y,
        **estimate("excess_real", real),
        **estimate("excess_gaussian", gaussian),
        **estimate("excess_isotropic", equal),
        **_predictions(step, curvatures, traces, pairs),
        "fluctuation_norm": step.norm,
    }


def _predictions(
    step: "Step", curvatures: np.ndarray, traces: np.ndarray, pairs: list[list[Tensor]]
) -> dict[str, float]:
    """What the Hessian at z predicts. curvatures, traces: vᵀHv of `pairs`, and of signs."""
    per_trace, injected_per_trace = (norm**2 / (2 * step.entries) for norm in (step.norm, step.injected))
    per_trace_se = standard_error(np.array([squares(pair).sum().item() for pair in pairs])) / (2 * step.entries)
    trace, trace_se = traces.mean(), standard_error(traces)
    return {
        "excess_predicted": float(curvatures.mean() / 2 + injected_per_trace * trace),
        "excess_predicted_se": float(np.hypot(standard_error(curvatures) / 2, injected_per_trace * trace_se)),
        "excess_predicted_isotropic": float(per_trace * trace),
        "excess_predicted_isotropic_se": float(np.hypot(per_trace * trace_se, per_trace_se * trace)),
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
        weights, memory = affine(optimizer, params)
        by_parameter = learning_rates(optimizer)
        rates = [by_parameter[p] for p in params]
        if injected and len(set(rates)) > 1:
            raise ValueError(f"injected noise is isotropic under one learning rate only, got {sorted(set(rates))}")
        self.scales = [-rate * w for rate, w in zip(rates, weights, strict=True)]
        self.descent = [-rate * g for rate, g in zip(rates, full, strict=True)]
        self.drift = [s * g - rate * m for s, g, rate, m in zip(self.scales, full, rates, memory, strict=True)]
        self.full = flat(full)
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
