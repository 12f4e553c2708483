"""Independent mini-batches at one x_t, what augmentation adds to their variance, and sums over vectors of weights."""

import random
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from measure.gradients import Batch, Objective, own_random_state, pair


def draw(loader: DataLoader, m: int, generator: torch.Generator) -> Iterator[Batch]:
    """m independent mini-batches: the first of m fresh passes over `loader`. ValueError if it does not shuffle.

    One pass would not do: its batches are disjoint, so V̂_b would be too large by the factor N/(N − b). generator: of
    the CPU, one for all measurements of a run. It moves on from draw to draw, and every pass is seeded by it; the
    global random state stays as it is. A generator made anew at every step would repeat the same draws.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(f"draws need a DataLoader, which can be passed over again, got {type(loader).__name__}")
    sampler = getattr(loader if loader.batch_sampler is None else loader.batch_sampler, "sampler", None)
    if loader.persistent_workers or loader.generator is not None or getattr(sampler, "generator", None) is not None:
        raise ValueError(
            "draws need a loader of their own, without persistent_workers and generator: drawing moves both"
        )
    if isinstance(sampler, SequentialSampler):
        raise ValueError("draws need a loader that shuffles, got one that gives the same first batch every time")
    for _ in range(m):
        with own_random_state():
            seed = int(torch.randint(2**32, (), generator=generator))
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            batch = next(iter(loader))
        yield batch


def augmentation(objective: Objective, pairs: Iterable[tuple[Batch, Batch]]) -> dict[str, float]:
    """The part of V_b that random augmentation makes: E‖g − g′‖²/2 over pairs of batches of the same images (ours).

    pairs: two or more; both batches of one hold the same b images, augmented independently. Returns
    augmentation_variance, its standard error, and c_squared_augmentation, b times it. ValueError for fewer than two
    pairs or several sizes.
    """
    sizes, halves = [], []
    with objective.unchanged():
        for first, second in pairs:
            difference = torch._foreach_sub(objective.gradient(first), objective.gradient(second))
            halves.append(length(difference) ** 2 / 2)
            sizes += [len(first[1]), len(second[1])]
    if len(halves) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"pairs must be two or more, of batches of one size, got sizes {sizes}")
    found = estimate("augmentation_variance", np.array(halves))
    return found | {"c_squared_augmentation": sizes[0] * found["augmentation_variance"]}


def refuse_copies(draws: Iterable[Batch], n: int = 4) -> Iterator[Batch]:
    """The same draws, from n images. ValueError if few of them differ: their variance would be too small, or 0 ± 0.

    Few: at most a quarter of the draws, of n if that is fewer, and of four draws or more.
    """
    count, different = 0, set()
    for x, y in map(pair, draws):
        count += 1
        different.add(tuple(zlib.crc32(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) for t in (x, y)))
        yield x, y
    if count >= 4 and 4 * len(different) <= min(count, n):
        got = f"{count} draws of {len(different)} batches"
        raise ValueError(f"draws must be independent, got {got}: does the loader shuffle anew?")


def spread(g: list[Tensor], mean: list[Tensor], k: int) -> Tensor:
    """The k-th draw's part of V̂_b, for each tensor (P,); `mean`, of the draws before, takes g in.

    It is (k − 1)/k times the squared distance to that mean: its expectation is V_b for each k ≥ 2, and the mean over
    these is Σ‖g_i − ḡ‖²/(M − 1) [Welford 1962].
    """
    step = torch._foreach_sub(g, mean)
    torch._foreach_add_(mean, step, alpha=1 / k)
    return squares(step) * ((k - 1) / k)


def isotropic(like: list[Tensor], norm: float, generator: torch.Generator) -> list[Tensor]:
    """Gaussian noise u of one scale in every coordinate, E‖u‖² = norm², shaped as the tensors `like`.

    Drawn in float32 on the generator's device, tensor by tensor, so that the generator's seed alone determines it.
    """
    scale = norm / sum(t.numel() for t in like) ** 0.5
    return [
        torch.randn(t.shape, generator=generator, device=generator.device).mul_(scale).to(t.device, t.dtype)
        for t in like
    ]


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries in one vector, on the CPU."""
    return torch.cat([t.reshape(-1) for t in tensors]).cpu()


def squares(tensors: list[Tensor]) -> Tensor:
    """‖·‖² of each tensor, in float64; (P,). As in `gradient_norm`, only a channel's entries are summed in float32."""
    rows = [t.flatten(1) if t.ndim > 1 else t.view(1, -1) for t in tensors]
    return torch.stack([torch.linalg.vector_norm(row, dim=1).double().square().sum() for row in rows])


def length(tensors: list[Tensor]) -> float:
    """The Euclidean norm over all tensors together."""
    return squares(tensors).sum().sqrt().item()


def estimate(key: str, values: np.ndarray) -> dict[str, float]:
    """The mean of independent values as `key`, and its standard error as `key`_se."""
    return {key: float(values.mean()), f"{key}_se": standard_error(values)}


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; nan if there are fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
