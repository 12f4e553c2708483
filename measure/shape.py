"""The shape of mini-batch noise across M draws at one x_t: isotropy, normality, tails.

Coordinates are followed across draws, and covariances come from the pair differences e_k = (g_{2k−1} − g_{2k})/√2, of
mean zero and covariance Σ, whatever the mean of g is. Definitions and sources: docs/measuring.md.
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

    draws: M ≥ 4 independent gradients g_i, flat (d,), as `budget` hands them to `keep`. full: ∇f, flat (d,).
    directions: vectors (d,) fixed beforehand, such as the memory; ∇f itself is one. layers: the number of entries of
    each, in order. between: called with 0 before every block. ValueError for fewer draws, or lengths that differ.
    """
    layers, directions = layers or {}, {"gradient": full} | (directions or {})
    d = len(full)
    if len(draws) < 4:
        raise ValueError(f"the shape needs at least 4 draws, got {len(draws)}")
    if any(len(vector) != d for vector in [*draws, *directions.values()]) or sum(layers.values()) not in (0, d):
        raise ValueError(f"draws, directions and layers must have as many entries as the full gradient, {d}")
    blocks, at = {}, 0
    for name, size in (layers or {"all": d}).items():
        blocks[name] = []
        for start in range(at, at + size, BLOCK):
            between(0)
            block = slice(start, min(start + BLOCK, at + size))
            omega = torch.stack([g[block] for g in draws]) - full[block]
            fixed = torch.stack([u[block] for u in directions.values()])
            blocks[name].append(_sums(omega.double().cpu().numpy(), fixed.double().cpu().numpy()))
        at += size
    blocks = {"all": [sums for each in blocks.values() for sums in each]} | blocks
    return {name: _numbers(each, list(directions)) for name, each in blocks.items()}


def _sums(omega: np.ndarray, fixed: np.ndarray) -> dict[str, np.ndarray]:
    """What adds up over blocks of coordinates, of draws (M, B) and directions (·, B)."""
    half = len(omega) // 2
    # The halves are independent: the mean of the product is σ⁴, whatever the law, where a square's is larger.
    one, two = omega[:half].var(axis=0, ddof=1), omega[half:].var(axis=0, ddof=1)
    kurtosis, p = normality(omega)
    inverse, square = inverse_hill(omega), omega**2
    tails = inverse[np.isfinite(inverse)]
    return {
        **{"entries": omega.shape[1], "moving": np.isfinite(kurtosis).sum(), "kurtosis": np.nansum(kurtosis)},
        **{"first half": one.sum(), "second half": two.sum(), "product": one @ two},
        **{"rejected": (p < LEVEL).sum() if len(omega) >= FEWEST else np.nan},
        **{"tails": len(tails), "inverse_hill": tails.sum(), "gram": omega @ omega.T, "along": omega @ fixed.T},
        "powers": np.array([part.sum(axis=1) for part in (omega, square, square * omega, square**2)]),
    }


def normality(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column of `values` (M, ·): the unbiased excess kurtosis G2, and the p of D'Agostino and Pearson's K².

    p is nan below M = 20, where K² is not near χ²; both are for a column that is constant but for rounding.
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

    Biased for every law but Pareto's: compare with a normal's.
    """
    k = max(2, len(values) // 10)
    distances = np.abs(values - values.mean(axis=0)).T.copy()
    tail = np.sort(np.partition(distances, -k - 1, axis=1)[:, -k - 1 :], axis=1)
    return np.log(tail[:, 1:] / tail[:, :1]).mean(axis=1)


@cache
def _normal_tail(m: int) -> float:
    """What `inverse_hill` gives for a normal, in the mean over 10,000 columns."""
    return inverse_hill(np.random.default_rng(0).standard_normal((m, 10_000))).mean()


def _numbers(blocks: list[dict[str, np.ndarray]], names: list[str]) -> dict[str, float]:
    """What docs/measuring.md lists, from the `_sums` of blocks; nan where nothing moves."""
    sums = {key: sum(each[key] for each in blocks) for key in blocks[0]}
    d, moving, gram = sums["entries"], np.float64(sums["moving"]), sums["gram"]
    trace, ratio = _covariance(gram)
    mean, second, third, fourth = sums["powers"] / d  # of each draw's entries
    pooled = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / (second - mean**2) ** 2 - 3
    numbers = {
        "entries": int(d),
        "moving": int(moving),
        "noise_trace": trace,
        "isotropy": d * ratio,
        "effective_rank": 1 / ratio,
        "coordinate_kurtosis": sums["kurtosis"] / moving,
        "non_normal_share": sums["rejected"] / moving,
        "pooled_kurtosis": pooled.mean(),
        "scales_kurtosis": 3 * d * sums["product"] / (sums["first half"] * sums["second half"]) - 3,
        "hill": sums["tails"] / sums["inverse_hill"],
        "hill_normal": 1 / _normal_tail(len(gram)),
    }
    numbers |= _principal_components(gram)
    along, _ = normality(sums["along"])
    numbers |= {f"{name}_kurtosis": kurtosis for name, kurtosis in zip(names, along, strict=True)}
    return {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}


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
