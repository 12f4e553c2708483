"""Independent mini-batches at one x_t: drawing them, their gradients, and what augmentation adds to their variance."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from measure.gradients import Batch, Loss, gradient, trained, unchanged


def draw(loader: DataLoader, m: int) -> Iterator[Batch]:
    """m independent mini-batches: the first of m fresh passes over `loader`. ValueError if it does not shuffle.

    One pass would not do: its batches are disjoint, so V̂_b would be too large by the factor N/(N − b).
    """
    if isinstance(loader.sampler, SequentialSampler):
        raise ValueError("draws need a loader that shuffles, got one that gives the same first batch every time")
    for _ in range(m):
        yield next(iter(loader))


def augmentation(
    model: nn.Module,
    pairs: Iterable[tuple[Batch, Batch]],
    params: list[Tensor] | None = None,
    loss: Loss = F.cross_entropy,
    training: bool | None = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The part of V_b that random augmentation makes: E‖g − g′‖²/2 over pairs of batches of the same images (ours).

    pairs: two or more; both batches of one hold the same b images, augmented independently. params: those to count
    (default: `trained`). The rest: as in `budget`. Returns `augmentation_variance`, its standard error, and
    `c_squared_augmentation`, b times it. ValueError for fewer than two pairs or several sizes.
    """
    params = params or trained(model)
    sizes, halves = [], []
    with unchanged(model, training):
        for first, second in pairs:
            between()
            gradients = [dense_gradient(model, batch, params, loss) for batch in (first, second)]
            halves.append(length(torch._foreach_sub(*gradients)) ** 2 / 2)
            sizes += [len(first[1]), len(second[1])]
    if len(halves) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"pairs must be two or more, of batches of one size, got sizes {sizes}")
    found = estimate("augmentation_variance", np.array(halves))
    return found | {"c_squared_augmentation": sizes[0] * found["augmentation_variance"]}


def dense_gradient(model: nn.Module, batch: Batch, params: list[Tensor], loss: Loss) -> list[Tensor]:
    """As `gradient`, with zeros where the loss does not need a parameter."""
    found = gradient(model, *batch, params, loss)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


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
