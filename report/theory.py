"""The paper's formulas: degree of smoothing, critical batch size, and C² from a measured one.

Symbols, the same everywhere below (sources: section 3 of the paper, arXiv 2402.02325v3, unless said):
  lr      η, learning rate, > 0                        batch_size  b, samples in a step, > 0
  beta    β, momentum factor, in [0, 1); SGD has none  eps         ε, the gradient norm to reach, > 0
  c_squared  C², bound of the per-sample gradient's variance (gradient norm squared), >= 0
  k          K, bound of the gradient norm, >= 0
Every argument but the optimizer's name may be an array; results broadcast. An argument outside its
domain, NaN and infinity among them, is a ValueError that names it.
"""

import numpy as np

OPTIMIZERS = ("sgd", "shb", "nshb")


def in_order(table, *then):
    """Return the rows in the order of OPTIMIZERS, other optimizers last; those of one by the columns `then`."""
    order = table["optimizer"].map({name: i for i, name in enumerate(OPTIMIZERS)})
    return table.assign(order=order).sort_values(["order", *then], kind="stable")


def _check(**arguments):
    for name, value in arguments.items():
        value = np.asarray(value, dtype=float)
        if name == "beta":
            allowed, inside = "in [0, 1)", (value >= 0) & (value < 1)
        elif name in ("c_squared", "k"):
            allowed, inside = ">= 0", value >= 0
        else:
            allowed, inside = "> 0", value > 0
        if not np.all(inside & np.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be finite and {allowed}")


def beta_hat(beta):
    """Return β̂ = β(β² − β + 1) / (1 − β)², no unit: what SHB's momentum adds to the variance [paper]."""
    _check(beta=beta)
    return beta * (beta**2 - beta + 1) / (1 - beta) ** 2


def degree_of_smoothing(optimizer, lr, batch_size, c_squared, k=0.0, beta=0.0):
    """Return δ = ηψ, where E‖ω_t‖ <= ψ and ω is the search direction noise; a length in parameter space.

    sgd      η √(C²/b)                        [paper]
    shb      η √((1 + β̂) C²/b + β̂ K²)         [paper]
    nshb     η √(C² / ((1 − β) b))            [paper, v3]
    nshb_v1  η √(C²/b + 4β² (C²/b + K²))      [paper, v1; withdrawn by v3]
    K enters shb and nshb_v1 only, β all but sgd.
    """
    _check(lr=lr, batch_size=batch_size, c_squared=c_squared, k=k, beta=beta)
    if optimizer == "nshb_v1":
        variance = c_squared / np.asarray(batch_size, dtype=float)
        psi_squared = variance + 4 * np.square(beta) * (variance + np.square(k))
    else:
        psi_squared = sum(terms(optimizer, batch_size, c_squared, k, beta))
    return lr * np.sqrt(psi_squared)


def terms(optimizer, batch_size, c_squared, k=0.0, beta=0.0):
    """Return the two terms of ψ², the bound of E‖ω‖², gradient norm squared: C²'s and K's. δ = ηψ.

    sgd   C²/b               0
    shb   (1 + β̂) C²/b       β̂ K²
    nshb  C² / ((1 − β) b)   0          [paper, as `degree_of_smoothing`]
    """
    _check(batch_size=batch_size, c_squared=c_squared, k=k, beta=beta)
    variance = c_squared / np.asarray(batch_size, dtype=float)
    if optimizer == "sgd":
        return variance, 0.0
    if optimizer == "shb":
        return (1 + beta_hat(beta)) * variance, beta_hat(beta) * np.square(k)
    if optimizer == "nshb":
        return variance / (1 - beta), 0.0
    raise ValueError(f"optimizer is {optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")


def _bound_factor(optimizer, beta):
    _check(beta=beta)
    if optimizer == "sgd":
        return 1.0
    if optimizer == "nshb":
        return 1 / (1 - beta)
    if optimizer == "shb":
        if np.any(np.equal(beta, 0)):
            raise ValueError(f"beta is {beta}; SHB's bound of the critical batch size needs 0 < beta < 1")
        return (beta**2 - beta + 1) / (beta * (1 - beta) ** 2)
    raise ValueError(f"optimizer is {optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")


def critical_batch_size_bound(optimizer, lr, c_squared, eps, beta=0.0):
    """Return the lower bound of b*, the batch size (samples) with the least SFO complexity: b* > this.

    sgd   ηC² / ε²                                [paper]
    shb   ηC² (β² − β + 1) / (β (1 − β)² ε²)      [derived; singular at β = 0: ValueError]
    nshb  ηC² / ((1 − β) ε²)                      [derived]
    Derived: they give every published C² from a power-of-two b*, and the squares of the published figure.
    """
    _check(lr=lr, c_squared=c_squared, eps=eps)
    return lr * c_squared * _bound_factor(optimizer, beta) / np.square(eps)


def c_squared_from_b(optimizer, lr, batch_size, eps, beta=0.0):
    """Return the C² at which the bound equals a measured b* (`batch_size`); gradient norm squared [paper].

    The inverse of `critical_batch_size_bound`, with its domain. An estimate: the bound need not be tight.
    """
    _check(lr=lr, batch_size=batch_size, eps=eps)
    return batch_size * np.square(eps) / (lr * _bound_factor(optimizer, beta))
