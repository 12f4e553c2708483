"""The paper's formulas: degree of smoothing δ, critical batch size b*, and C² from a measured b*.

lr: η; b: batch size; beta: β; eps: ε, the gradient norm to reach; c_squared: C², bound of the variance of one image's
gradient; k: K, bound of the full gradient's norm. Source: section 3 of the paper, arXiv 2402.02325v3, unless said.
Every argument but the optimizer's name and β may be an array. NaN for an optimizer without a formula.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Formula(NamedTuple):
    """Three functions of β: E‖ω‖² by variance · C²/b + gradient · K², and b* > critical · ηC²/ε².

    SGD's and SHB's δ are bounds. NSHB's is a formula and no bound: it has no term for the memory.
    """

    variance: Callable
    gradient: Callable
    critical: Callable


def beta_hat(beta):
    """Return β̂, what SHB's momentum adds: β(β² − β + 1)/(1 − β)²."""
    return beta * (beta**2 - beta + 1) / (1 - beta) ** 2


# One entry an optimizer. The factors of b* for SHB (singular at β = 0) and NSHB are derived: they give every published
# C² from a power of two, and the squares of the published figure.
FORMULAS = {
    "sgd": Formula(lambda β: 1.0, lambda β: 0.0, lambda β: 1.0),
    "shb": Formula(lambda β: 1 + beta_hat(β), beta_hat, lambda β: beta_hat(β) / β**2 if β else np.nan),
    "nshb": Formula(lambda β: 1 / (1 - β), lambda β: 0.0, lambda β: 1 / (1 - β)),
}
NONE = Formula(*[lambda β: np.nan] * 3)


def delta(optimizer, lr, b, c_squared, k=0.0, beta=0.0):
    """Return δ = ηψ, a length in parameter space.

    sgd   η √(C²/b)
    shb   η √((1 + β̂) C²/b + β̂ K²)
    nshb  η √(C²/((1 − β) b))
    """
    formula = FORMULAS.get(optimizer, NONE)
    return lr * np.sqrt(formula.variance(beta) * c_squared / b + formula.gradient(beta) * np.square(k))


def deltas(rows, c_squared, k):
    """Return δ of every row of a table with the columns optimizer, lr, b and beta1."""
    columns = rows["optimizer"], rows["lr"], rows["b"], c_squared, k, rows["beta1"].fillna(0)
    return [delta(*values) for values in zip(*columns, strict=True)]


def critical_batch_size(optimizer, lr, c_squared, eps, beta=0.0):
    """Return the lower bound of b*: ηC²/ε², for SHB times (β² − β + 1)/(β (1 − β)²), for NSHB times 1/(1 − β)."""
    return FORMULAS.get(optimizer, NONE).critical(beta) * lr * c_squared / np.square(eps)


def c_squared(optimizer, lr, b_star, eps, beta=0.0):
    """Return the C² at which that bound equals a measured b*: the paper's estimate of C²."""
    return b_star * np.square(eps) / (lr * FORMULAS.get(optimizer, NONE).critical(beta))
