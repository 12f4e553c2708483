"""Does the noise of the search direction smooth the loss? Measured directly, by the loss at the points it leads to.

    y = x − η∇f,   y − ηω_i = x − ηd_i = z − ηφ_i,   z = y − ημ,   φ_i = w(g_i + u_i − ∇f)

A step splits into a displacement by momentum, −ημ, and a fluctuation, −ηφ, whose mean over batches is zero. Only the
fluctuation smooths: E f(z − ηφ) is f at z averaged over it [Kleinberg et al. 2018; the paper's section 3]. u is noise
that training injects into the gradient, if any. Nothing here changes what it measures.

f(z − ηφ_i) − f(z) is dominated by its linear term −η∇f(z)ᵀφ_i, whose mean is zero where a mini-batch gradient is
unbiased. So that term is taken off each draw (a control variate; ours), and returned as excess_linear. With BatchNorm
in training mode its mean is what the bias of mini-batch gradients does; excess_real is then without it.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from measure.draws import estimate, flat, isotropic, squares, standard_error
from measure.gradients import Objective, images
from measure.optimizers import affine, learning_rates
from measure.sharpness import Halves, by_half, dot, moved, quadratic, rises, signs, values

CONTROLS = 16  # random vectors of each control, with their mirror images; more cost more than they tell


def smoothing(
    objective: Objective,
    halves: Halves,
    optimizer: Optimizer,
    full: list[Tensor],
    draws: list[Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    """The excess loss under the noise of a step, under two controls, and as predicted (ours; docs/measuring.md).

    halves: as in `measure.sharpness.sharpness`. full: ∇f(x_t) over all images. draws: M ≥ 4 mini-batch gradients
    at x_t, with the noise that training injects, flat, as `measure.noise.budget` keeps them. Returns numbers named as
    in measure/quantities.py, with standard errors over the draws, or over the vectors of the controls, M/2 or
    CONTROLS at most, each with its mirror image. ValueError for fewer draws or of another size, and as in `affine`.
    """
    if len(draws) < 4:
        raise ValueError(f"smoothing needs 4 draws or more, got {len(draws)}")
    step = Step(objective.params, optimizer, full, draws)
    loss_x = values(objective, halves).mean()
    with moved(objective, step.descent):
        loss_y = values(objective, halves).mean()
    with moved(objective, step.drift):
        loss_z, probes = values(objective, halves), signs(objective.params, generator)
        slopes = [objective.full_gradient(half, images(half)) for half in halves]
        linear = np.array([[dot(slope, step.real(i)) for slope in slopes] for i in range(len(draws))])
        real = rises(objective, halves, loss_z, map(step.real, range(len(draws)))) - linear
        few = range(min(len(draws) // 2, CONTROLS))
        gaussian = rises(objective, halves, loss_z, (step.gaussian(generator) for _ in few), mirrored=True)
        equal = rises(objective, halves, loss_z, (step.isotropic(generator) for _ in few), mirrored=True)
        pairs = step.pairs()[:CONTROLS]
        curvatures, traces = np.split(quadratic(objective, [*chain(*halves)], [*pairs, *probes]), [len(pairs)])
    displacement = float(loss_z.mean() - loss_y)
    return {
        "probe_images": sum(map(images, halves)),
        "loss_x": float(loss_x),
        "loss_y": float(loss_y),
        "loss_z": float(loss_z.mean()),
        **estimate("excess", real.mean(1) + displacement),
        "displacement": displacement,
        **estimate("excess_real", real.mean(1)),
        **by_half("excess_real", real.mean(0)),
        **estimate("excess_linear", linear.mean(1)),
        **estimate("excess_gaussian", gaussian.mean(1)),
        **estimate("excess_isotropic", equal.mean(1)),
        **_predictions(step, curvatures, traces, pairs),
        "fluctuation_norm": step.norm,
    }


def _predictions(
    step: "Step", curvatures: np.ndarray, traces: np.ndarray, pairs: list[list[Tensor]]
) -> dict[str, float]:
    """What the Hessian at z predicts. curvatures, traces: vᵀHv of `pairs`, and of signs."""
    per_trace = step.norm**2 / (2 * step.entries)
    per_trace_se = standard_error(np.array([squares(pair).sum().item() for pair in pairs])) / (2 * step.entries)
    trace, trace_se = traces.mean(), standard_error(traces)
    return {
        **estimate("excess_predicted", curvatures / 2),
        "excess_predicted_isotropic": float(per_trace * trace),
        "excess_predicted_isotropic_se": float(np.hypot(per_trace * trace_se, per_trace_se * trace)),
    }


class Step:
    """The displacements that make up one step of training, in parameter space, one tensor a parameter.

    descent: −η∇f, from x to y. drift: −η(w∇f + memory), from x to z. norm: √(E‖ηφ‖²). entries: d.
    """

    def __init__(self, params: list[Tensor], optimizer: Optimizer, full: list[Tensor], draws: list[Tensor]):
        self.params, self.entries, self.draws = params, sum(p.numel() for p in params), draws
        if any(draw.numel() != self.entries for draw in draws):
            raise ValueError(f"draws must have as many entries as the parameters, {self.entries}")
        weights, memory = affine(optimizer, params)
        by_parameter = learning_rates(optimizer)
        rates = [by_parameter[p] for p in params]
        self.scales = [-rate * w for rate, w in zip(rates, weights, strict=True)]
        self.descent = [-rate * g for rate, g in zip(rates, full, strict=True)]
        self.drift = [s * g - rate * m for s, g, rate, m in zip(self.scales, full, rates, memory, strict=True)]
        self.full, self.mean = flat(full), sum(draws) / len(draws)
        squared = sum(squares(self._scaled(draw - self.mean)).sum().item() for draw in draws)
        self.norm = float(np.sqrt(squared / (len(draws) - 1)))

    def real(self, i: int) -> list[Tensor]:
        """−ηφ_i, of the i-th draw."""
        return self._scaled(self.draws[i] - self.full)

    def gaussian(self, generator: torch.Generator) -> list[Tensor]:
        """Gaussian, with the covariance of −ηφ that the draws have: Σ_i ξ_i (g_i − ḡ)/√(M − 1), ξ ~ N(0, 1)."""
        xi = torch.randn(len(self.draws), generator=generator, device=generator.device).cpu()
        xi /= (len(self.draws) - 1) ** 0.5
        total = sum(x * draw for x, draw in zip(xi.tolist(), self.draws, strict=True)) - xi.sum() * self.mean
        return self._scaled(total)

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
