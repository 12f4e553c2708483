"""The shape of mini-batch noise across M draws at one x_t: isotropy, normality, tails.

A histogram of one ω's entries shows how unequal their scales are, and not whether ω is normal. So coordinates are
followed across draws, and covariances come from the pair differences e_k = (g_{2k−1} − g_{2k})/√2, which have mean
exactly zero and covariance Σ, whatever the mean of g is. Definitions and sources: docs/measuring.md.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

BLOCK = 1 << 14  # coordinates at a time: M of each in float64 stay in the processor's cache
COMPONENTS = 5  # principal components that are tested
LEVEL = 0.05  # of the tests whose rejections are counted
FEWEST = 20  # values for D'Agostino and Pearson's test


@np.errstate(divide="ignore", invalid="ignore")  # nan and infinity say what there is to say
def shape(
    draws: list[Tensor],
    full: Tensor,
    directions: dict[str, Tensor] | None = None,
    layers: dict[str, int] | None = None,
    between: Callable[[float], None] = lambda images: None,
) -> dict[str, dict[str, float]]:
    """The shape of the noise g_i − ∇f, of the whole vector as "all" and of each layer.

    draws: M ≥ 4 gradients g_i, independent, flat (d,), as `budget` hands them to `keep`. full: ∇f, flat (d,), in the
    same order. directions: vectors (d,) fixed beforehand, such as the memory; ∇f itself is one. layers: the number
    of entries of each, in order. between: called with 0 before every block of coordinates. Memory: the draws, which
    stay where they are, and one block. ValueError for fewer draws, or lengths that do not agree.
    """
    layers, directions = layers or {}, {"gradient": full} | (directions or {})
    d = len(full)
    if len(draws) < 4:
        raise ValueError(f"the shape needs at least 4 draws, got {len(draws)}")
    if any(len(vector) != d for vector in [*draws, *directions.values()]) or sum(layers.values()) not in (0, d):
        raise ValueError(f"draws, directions and layers must have as many entries as the full gradient, {d}")
    sums, start = {}, 0
    for name, size in (layers or {"all": d}).items():
        sums[name] = _sums(draws, full, list(directions.values()), range(start, start + size), between)
        start += size
    whole = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {name: _numbers(each, list(directions)) for name, each in ({"all": whole} | sums).items()}


def _sums(
    draws: list[Tensor], full: Tensor, directions: list[Tensor], coordinates: range, between: Callable[[float], None]
) -> list[np.ndarray]:
    """What adds up over coordinates: `_coordinate_sums`, the first four powers of each draw's entries (4, M),
    ω_iᵀω_j (M, M), and ω_iᵀu for each direction u (M, ·).
    """
    m = len(draws)
    total = [np.zeros(len(SUMS)), np.zeros((4, m)), np.zeros((m, m)), np.zeros((m, len(directions)))]
    for start in range(coordinates.start, coordinates.stop, BLOCK):
        between(0)
        block = slice(start, min(start + BLOCK, coordinates.stop))
        omega = torch.stack([g[block] for g in draws]) - full[block]
        omega = omega.double().cpu().numpy()
        fixed = torch.stack([u[block] for u in directions]).double().cpu().numpy()
        square = omega**2
        powers = np.array([part.sum(axis=1) for part in (omega, square, square * omega, square**2)])
        total[0] += _coordinate_sums(omega)
        total[1] += powers
        total[2] += omega @ omega.T
        total[3] += omega @ fixed.T
    return total


HALVES = ("variance 1", "variance 2", "product")  # of the two halves of the draws, and of both
SUMS = ("entries", "moving", *HALVES, "G2", "rejected", "tails", "1/hill")


def _coordinate_sums(omega: np.ndarray) -> np.ndarray:
    """`SUMS` over the coordinates of a block, omega (M, B); one that is the same in all draws has no shape."""
    half = len(omega) // 2
    # The halves are independent: the mean of the product is σ⁴, whatever the law, where a square's is larger.
    one, two = omega[:half].var(axis=0, ddof=1), omega[half:].var(axis=0, ddof=1)
    kurtosis, p = normality(omega)
    rejected = (p < LEVEL).sum() if len(omega) >= FEWEST else np.nan
    inverse = inverse_hill(omega)
    tails = inverse[np.isfinite(inverse)]
    moving = np.isfinite(kurtosis).sum()
    sums = [omega.shape[1], moving, one.sum(), two.sum(), one @ two, np.nansum(kurtosis), rejected]
    return np.array([*sums, len(tails), tails.sum()])


def normality(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column of `values` (M, ·): the unbiased excess kurtosis G2, and the p of D'Agostino and Pearson's K².

    G2 has mean 0 for a normal. p is nan below M = 20, where K² is not near χ². Both are nan for a column that is
    constant but for rounding.
    """
    kurtosis, p = np.full((2, values.shape[1]), np.nan)
    moving = np.ptp(values, axis=0) > 1e-12 * np.abs(values).max(axis=0)
    if moving.any():
        kurtosis[moving] = stats.kurtosis(values[:, moving], axis=0, bias=False)
    if moving.any() and len(values) >= FEWEST:
        p[moving] = stats.normaltest(values[:, moving], axis=0).pvalue
    return kurtosis, p


def inverse_hill(values: np.ndarray) -> np.ndarray:
    """Hill's estimate of 1/α for each column of `values` (M, ·): P(|x| > r) ~ r^−α, from the tenth farthest out.

    Distances are from the column's mean, k = max(2, M/10) of them count. Biased for every law but Pareto's: compare
    with a normal's.
    """
    k = max(2, len(values) // 10)
    distances = np.abs(values - values.mean(axis=0)).T.copy()
    tail = np.sort(np.partition(distances, -k - 1, axis=1)[:, -k - 1 :], axis=1)
    return np.log(tail[:, 1:] / tail[:, :1]).mean(axis=1)


@cache
def _normal_tail(m: int) -> float:
    """What `inverse_hill` gives for a normal, in the mean over 10,000 columns."""
    return inverse_hill(np.random.default_rng(0).standard_normal((m, 10_000))).mean()


def _numbers(sums: list[np.ndarray], names: list[str]) -> dict[str, float]:
    """What docs/measuring.md lists; nan where nothing moves."""
    total, powers, gram, projections = dict(zip(SUMS, sums[0], strict=True)), *sums[1:]
    d, moving = total["entries"], total["moving"]
    trace, ratio = _covariance(gram)
    numbers = {
        "entries": int(d),
        "moving": int(moving),
        "noise_trace": trace,
        "isotropy": d * ratio,
        "effective_rank": 1 / ratio,
        "coordinate_kurtosis": total["G2"] / moving,
        "non_normal_share": total["rejected"] / moving,
        "pooled_kurtosis": _pooled(powers / d).mean(),
        "scales_kurtosis": 3 * d * total["product"] / (total["variance 1"] * total["variance 2"]) - 3,
        "hill": total["tails"] / total["1/hill"],
        "hill_normal": 1 / _normal_tail(len(gram)),
    }
    numbers |= _principal_components(gram)
    along, _ = normality(projections)
    numbers |= {f"{name}_kurtosis": kurtosis for name, kurtosis in zip(names, along, strict=True)}
    return {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}


def _pooled(powers: np.ndarray) -> np.ndarray:
    """The excess kurtosis of each draw's entries, from the means of their first four powers (4, M)."""
    mean, second, third, fourth = powers
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / (second - mean**2) ** 2 - 3


def _covariance(gram: np.ndarray) -> tuple[float, float]:
    """tr Σ, unbiased, and tr(Σ²)/(tr Σ)², from ω_iᵀω_j (M, M); an odd last draw is left out.

    The ratio is over the same pairs k ≠ l above and below: e_k as long as it happens to be cancels.
    """
    even = len(gram) // 2 * 2
    rows = gram[0:even:2, :even] - gram[1:even:2, :even]
    products = (rows[:, 0::2] - rows[:, 1::2]) / 2  # e_kᵀe_l
    lengths = np.diag(products)
    apart = ~np.eye(len(lengths), dtype=bool)
    squares, norms = (products**2)[apart].mean(), np.outer(lengths, lengths)[apart].mean()
    return lengths.mean(), squares / norms


def _principal_components(gram: np.ndarray) -> dict[str, float]:
    """Normality along principal components of the first half of the draws, tested on the second half."""
    if not np.isfinite(gram).all():
        return {"components_kurtosis": np.nan, "components_rejected": np.nan}
    half = len(gram) // 2
    centre = np.eye(half) - 1 / half  # takes the mean of the first half away
    _, vectors = np.linalg.eigh(centre @ gram[:half, :half] @ centre)
    count = min(COMPONENTS, half - 1)
    kurtosis, p = normality(gram[half:, :half] @ centre @ vectors[:, -count:])
    rejected = (p < LEVEL).mean() if np.isfinite(p).all() else np.nan
    return {"components_kurtosis": kurtosis.mean(), "components_rejected": rejected}
