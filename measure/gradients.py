"""Temporary."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` in training or evaluation mode for a while, and leave no trace in buffers or random state."""
    buffers = [b.clone() for b in model.buffers()]
    was_training = model.training
    cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices=cuda):
            model.train(training)
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def gradient(model: nn.Module, x: Tensor, y: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """Gradient of the mean cross-entropy of a batch; one tensor a parameter, None where the loss does not need it.

    x: images (b, 3, 32, 32). y: labels (b,). params: of the model, those to differentiate by. `.grad` is not touched.
    """
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), params, allow_unused=True))


def full_gradient(
    model: nn.Module,
    chunks: Iterable[tuple[Tensor, Tensor]],
    n: int,
    between: Callable[[], None] = lambda: None,
    params: list[Tensor] | None = None,
) -> list[Tensor]:
    """∇f(x_t), the gradient of the mean loss over all n training images (paper, section 2, mode sampling).

    chunks: images (b, 3, 32, 32) and labels (b,), n images in all; every image weighs 1/n, also in a partial
    last chunk. between: called before every chunk; what it raises ends the pass. params: of the model, those to
    differentiate by (default: all that are not frozen). BatchNorm works in training mode, so with it the result
    depends on the size of the chunks. Returns one tensor a parameter. ValueError if the chunks do not hold n images.
    """
    params = params or [p for p in model.parameters() if p.requires_grad]
    total, seen = [torch.zeros_like(p) for p in params], 0
    with unchanged(model, training=True):
        for x, y in chunks:
            between()
            loss = 1 / n * F.cross_entropy(model(x), y, reduction="sum")
            torch._foreach_add_(total, torch.autograd.grad(loss, params, materialize_grads=True))
            seen += len(y)
    if seen != n:
        raise ValueError(f"the chunks hold {seen} images, not {n}")
    return total


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """‖g‖, Euclidean over all the tensors together (paper, section 2, mode critical); a scalar on their device.

    On the CPU the entries of an output channel, at most some thousands, are summed in float32 and the channels in
    float64: within 1e-7. One long sum in float32, as of torch's get_total_norm, is 2e-5 too small for ResNet18.
    """
    if gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)  # in two launches, and a tree of short sums
    rows = [g.flatten(1) if g.ndim > 1 else g.view(1, -1) for g in gradients]
    channels = torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows])
    return torch.linalg.vector_norm(channels, dtype=torch.float64)
