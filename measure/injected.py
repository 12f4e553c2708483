"""Noise u_t added to a mini-batch gradient, so that g_t + u_t varies as the gradient of a smaller batch does.

    u_t = c (g_A − g_A′),   A, A′ independent batches of B images,   Cov(u_t) = 2c² V_B

As a control, an isotropic vector of the same length. Sources: docs/measuring.md; Wu et al. 1906.07405, Zhu et al.
1803.00195 add noise of a given covariance, this form of it is ours.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from measure.draws import isotropic, length, spread
from measure.gradients import Batch, Objective


def scale(n: int, b: int, smaller: int) -> float:
    """c at which g + u has the covariance of batches of `smaller` images; g of b, all drawn from n. ValueError else.

    It is exact where a gradient is the mean of its images' gradients (no BatchNorm), with different images in a batch.
    """
    if not 1 <= smaller < b <= n:
        raise ValueError(f"the batch size to imitate must be at least 1 and below {b}, got {smaller}")
    return scale_of_variances((n - b) / b, (n - smaller) / smaller)


def scale_of_variances(of_b: float, of_smaller: float) -> float:
    """c from V_b and V_B, as measured: with BatchNorm. 0 if V_B is not the larger one."""
    return max(0.0, (1 - of_b / of_smaller) / 2) ** 0.5 if of_smaller > 0 else 0.0


def variance(objective: Objective, batches: Iterable[Batch]) -> float:
    """V̂_b, the trace of the covariance of mini-batch gradients, from two or more independent batches of one size."""
    mean, total, k = [torch.zeros_like(p) for p in objective.params], 0.0, 0
    with objective.unchanged():
        for k, batch in enumerate(batches, 1):
            total += spread(objective.gradient(batch), mean, k).sum().item()
    if k < 2:
        raise ValueError(f"a variance needs two batches or more, got {k}")
    return total / (k - 1)


def smaller_batch_noise(objective: Objective, pair: Iterable[Batch], c: float) -> list[Tensor]:
    """u = c (g_A − g_A′) for the pair of batches (A, A′): one tensor for each of the objective's parameters."""
    with objective.unchanged():
        first, second = (objective.gradient(batch) for batch in pair)
    return list(torch._foreach_mul(torch._foreach_sub(first, second), c))


def isotropic_twin(u: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A vector as long as u whose direction is isotropic; in the shapes of u."""
    twin = isotropic(u, 1.0, generator)
    return list(torch._foreach_mul(twin, length(u) / length(twin)))
