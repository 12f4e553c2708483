"""The paper's formulas: degree of smoothing δ, critical batch size b*, and C² from a measured b*.

lr: η; b: batch size; beta: β; eps: ε, the gradient norm to reach; c_squared: C²; k: K. Source: section 3 of the paper,
arXiv 2402.02325v3, unless said. All but the optimizer and β may be arrays. NaN for an optimizer without a formula.
"""

import numpy as np


def beta_hat(β):
    """Return β̂, what SHB's momentum adds."""
    return β * (β**2 - β + 1) / (1 - β) ** 2


# One entry an optimizer, three functions of β: E‖ω‖² by 1st · C²/b + 2nd · K², and b* > 3rd · ηC²/ε². SGD's and SHB's
# δ are bounds. NSHB's is a formula and no bound: it has no term for the memory. The factors of b* for SHB (singular at
# β = 0) and NSHB are derived: they give every published C² from a power of two, and the published figure's squares.
FORMULAS = {
    "sgd": (lambda β: 1.0, lambda β: 0.0, lambda β: 1.0),
    "shb": (lambda β: 1 + beta_hat(β), beta_hat, lambda β: beta_hat(β) / β**2 if β else np.nan),
    "nshb": (lambda β: 1 / (1 - β), lambda β: 0.0, lambda β: 1 / (1 - β)),
}


def _factors(optimizer, beta):
    """Return the three factors of an optimizer, NaN without a formula."""
    return [factor(beta) for factor in FORMULAS.get(optimizer, [lambda β: np.nan] * 3)]


def delta(optimizer, lr, b, c_squared, k=0.0, beta=0.0):
    """Return δ: SGD η √(C²/b), SHB η √((1 + β̂) C²/b + β̂ K²), NSHB η √(C²/((1 − β) b))."""
    variance, gradient, _ = _factors(optimizer, beta)
    return lr * np.sqrt(variance * c_squared / b + gradient * np.square(k))


def deltas(rows, c_squared, k):
    """Return δ of every row of a table with the columns optimizer, lr, b and beta1."""
    columns = rows["optimizer"], rows["lr"], rows["b"], c_squared, k, rows["beta1"].fillna(0)
    return [delta(*values) for values in zip(*columns, strict=True)]


def critical_batch_size(optimizer, lr, c_squared, eps, beta=0.0):
    """Return the lower bound of b*: ηC²/ε², for SHB times (β² − β + 1)/(β (1 − β)²), for NSHB times 1/(1 − β)."""
    return _factors(optimizer, beta)[2] * lr * c_squared / np.square(eps)


def c_squared(optimizer, lr, b_star, eps, beta=0.0):
    """Return the C² at which that bound equals a measured b*: the paper's estimate of C²."""
    return b_star * np.square(eps) / (lr * _factors(optimizer, beta)[2])


def thresholds(optimizer, lr, beta=0.0):
    """Return 2(1 − β)/η and 2(1 + β)/η, η as in SHB, where batch sharpness is said to settle (arXiv 2604.14108)."""
    beta = 0.0 if optimizer == "sgd" else beta
    eta = lr * {"sgd": 1.0, "shb": 1.0, "nshb": 1 - beta}.get(optimizer, np.nan)
    return 2 * (1 - beta) / eta, 2 * (1 + beta) / eta
