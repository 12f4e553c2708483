"""The shape of mini-batch noise across M draws at one x_t: zero mean, isotropy, normality, tails.

A histogram of one ω's entries shows how unequal their scales are, and not whether ω is normal. So coordinates are
followed across draws, and covariances come from the pair differences e_k = (g_{2k−1} − g_{2k})/√2, which have mean
exactly zero and covariance Σ, whatever the mean of g is. Definitions and sources: docs/measuring.md.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

BLOCK = 1 << 14  # coordinates at a time: M of each in float64 stay in the processor's cache
COMPONENTS = 5  # principal components that are tested
LEVEL = 0.05  # of the tests whose rejections are counted


def shape(
    draws: list[Tensor],
    full: Tensor,
    directions: dict[str, Tensor] | None = None,
    layers: dict[str, int] | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """The shape of the noise g_i − ∇f, of the whole vector as "all" and of each layer.

    draws: M ≥ 4 gradients g_i, independent, flat (d,), as `budget` hands them to `keep`. full: ∇f, flat (d,), in the
    same order. directions: vectors (d,) fixed beforehand, such as the memory; ∇f itself is one. layers: the number
    of entries of each, in order. between: called before every block of coordinates. Memory: the draws, which stay
    where they are, and one block. ValueError for fewer draws, or lengths that do not agree.
    """
    layers, directions = layers or {}, {"gradient": full} | (directions or {})
    d = len(full)
    if len(draws) < 4:
        raise ValueError(f"the shape needs at least 4 draws, got {len(draws)}")
    if any(len(vector) != d for vector in [*draws, *directions.values()]) or sum(layers.values()) not in (0, d):
        raise ValueError(f"draws, directions and layers must have as many entries as the full gradient, {d}")
    whole, found, start = None, {}, 0
    for name, size in (layers or {"all": d}).items():
        sums = _sums(draws, full, list(directions.values()), range(start, start + size), between)
        found[name] = _numbers(sums, list(directions))
        whole = sums if whole is None else [a + b for a, b in zip(whole, sums, strict=True)]
        start += size
    return {"all": _numbers(whole, list(directions))} | found


def _sums(
    draws: list[Tensor], full: Tensor, directions: list[Tensor], coordinates: range, between: Callable[[], None]
) -> list[np.ndarray]:
    """What adds up over coordinates: `_coordinate_sums`, ω_iᵀω_j (M, M), and ω_iᵀu for each direction u (M, ·)."""
    m = len(draws)
    total = [np.zeros(len(SUMS)), np.zeros((m, m)), np.zeros((m, len(directions)))]
    for start in range(coordinates.start, coordinates.stop, BLOCK):
        between()
        block = slice(start, min(start + BLOCK, coordinates.stop))
        omega = torch.stack([g[block] for g in draws]) - full[block]
        omega = omega.double().cpu().numpy()
        fixed = torch.stack([u[block] for u in directions]).double().cpu().numpy()
        for sum_, part in zip(total, (_coordinate_sums(omega), omega @ omega.T, omega @ fixed.T), strict=True):
            sum_ += part
    return total


SUMS = ("entries", "moving", "variance", "variance²", "G2", "rejected", "tails", "1/hill", "x", "x²", "x³", "x⁴")


def _coordinate_sums(omega: np.ndarray) -> np.ndarray:
    """`SUMS` over the coordinates of a block, omega (M, B); those that are the same in all draws have no shape."""
    first, moving = omega[0], omega[:, _moves(omega)]
    variance = moving.var(axis=0, ddof=1)
    kurtosis, p = normality(moving)
    inverse = inverse_hill(moving)
    finite = np.isfinite(inverse)
    return np.array(
        [
            len(first),
            len(variance),
            variance.sum(),
            (variance**2).sum(),
            kurtosis.sum(),
            (p < LEVEL).sum() if len(omega) >= 20 else np.nan,
            finite.sum(),
            inverse[finite].sum(),
            *((first**power).sum() for power in (1, 2, 3, 4)),
        ]
    )


def _moves(values: np.ndarray) -> np.ndarray:
    """Which columns differ from row to row by more than rounding."""
    return np.ptp(values, axis=0) > 1e-12 * np.abs(values).max(axis=0)


def normality(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column of `values` (M, ·): the unbiased excess kurtosis G2, and the p of D'Agostino and Pearson's K².

    G2 has mean 0 for a normal. p is nan below M = 20, where K² is not near χ². Both are nan for a constant column.
    """
    kurtosis, p = np.full((2, values.shape[1]), np.nan)
    moving = _moves(values)
    if moving.any():
        kurtosis[moving] = stats.kurtosis(values[:, moving], axis=0, bias=False)
        if len(values) >= 20:
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
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(tail[:, 1:] / tail[:, :1]).mean(axis=1)


def _numbers(sums: list[np.ndarray], names: list[str]) -> dict[str, float]:
    total, gram, projections = dict(zip(SUMS, sums[0], strict=True)), sums[1], sums[2]
    m, d, moving = len(gram), total["entries"], total["moving"]
    zero_mean = (gram.sum() - np.trace(gram)) / (m * (m - 1))
    trace, trace_square = _covariance(gram)
    mean, *moments = (total[key] / d for key in ("x", "x²", "x³", "x⁴"))
    spread = moments[0] - mean**2
    fourth = moments[2] - 4 * mean * moments[1] + 6 * mean**2 * moments[0] - 3 * mean**4
    scales = 3 * total["variance²"] / (1 + 2 / (m - 1)) * d / total["variance"] ** 2 - 3
    normal = inverse_hill(np.random.default_rng(0).standard_normal((m, 10_000))).mean()
    numbers = {
        "entries": int(d),
        "moving": int(moving),
        "zero_mean": zero_mean,
        "zero_mean_sd": np.sqrt(2 * trace_square / (m * (m - 1))),
        "trace": trace,
        "isotropy": d * trace_square / trace**2,
        "effective_rank": trace**2 / trace_square,
        "kurtosis": total["G2"] / moving,
        "rejected": total["rejected"] / moving,
        "pooled_kurtosis": fourth / spread**2 - 3,
        "scales_kurtosis": scales,
        "hill": total["tails"] / total["1/hill"],
        "hill_normal": 1 / normal,
    }
    numbers |= _principal_components(gram)
    for name, kurtosis, p in zip(names, *normality(projections), strict=True):
        numbers |= {f"{name}_kurtosis": kurtosis, f"{name}_p": p}
    return {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}


def _covariance(gram: np.ndarray) -> tuple[float, float]:
    """tr Σ and tr(Σ²), both unbiased, from ω_iᵀω_j (M, M); of an odd number of draws the last is left out."""
    even = len(gram) // 2 * 2
    rows = gram[0:even:2, :even] - gram[1:even:2, :even]
    pairs = (rows[:, 0::2] - rows[:, 1::2]) / 2  # e_kᵀe_l
    k = len(pairs)
    return np.trace(pairs) / k, ((pairs**2).sum() - (np.diag(pairs) ** 2).sum()) / (k * (k - 1))


def _principal_components(gram: np.ndarray) -> dict[str, float]:
    """Normality along principal components of the first half of the draws, tested on the second half."""
    half = len(gram) // 2
    centre = np.eye(half) - 1 / half
    _, vectors = np.linalg.eigh(centre @ gram[:half, :half] @ centre)
    count = min(COMPONENTS, half - 1)
    kurtosis, p = normality(gram[half:, :half] @ centre @ vectors[:, -count:])
    rejected = (p < LEVEL).mean() if np.isfinite(p).all() else np.nan
    return {"components_kurtosis": kurtosis.mean(), "components_rejected": rejected}
