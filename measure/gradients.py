"""Mini-batch and full gradients at the present weights, and what BatchNorm does meanwhile.

Nothing here changes what it measures: weights, buffers, `.grad`, training flags and random state stay as they were.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs (b, …) and targets (b, …), on the model's device
Loss = Callable[[Tensor, Tensor], Tensor]  # of the model's output and the targets; the mean over the batch


@contextmanager
def unchanged(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put `model` in training or evaluation mode for a while, and leave no trace in buffers or random state.

    training: None leaves every module in the mode it is in. The random state is that of torch (CPU, and the CUDA
    devices that hold parameters), NumPy and Python; a generator of the user's own is not known here.
    """
    buffers = [b.clone() for b in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices=cuda):
            if training is not None:
                model.train(training)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are not frozen, in the model's order: those of `full_gradient`."""
    return [p for p in model.parameters() if p.requires_grad]


def gradient(
    model: nn.Module, x: Tensor, y: Tensor, params: list[Tensor], loss: Loss = F.cross_entropy
) -> list[Tensor | None]:
    """Gradient of the mean loss of a batch; one tensor a parameter, None where the loss does not need it.

    x: inputs (b, …). y: targets (b, …). params: of the model, those to differentiate by. `.grad` is not touched.
    loss: see `full_gradient`. ValueError if it returns more than one number.
    """
    value = loss(model(x), y)
    if value.ndim:
        raise ValueError(f"the loss must return the mean over the batch, one number; got shape {tuple(value.shape)}")
    return list(torch.autograd.grad(value, params, allow_unused=True))


def full_gradient(
    model: nn.Module,
    chunks: Iterable[Batch],
    n: int,
    between: Callable[[], None] = lambda: None,
    params: list[Tensor] | None = None,
    loss: Loss = F.cross_entropy,
    training: bool | None = True,
) -> list[Tensor]:
    """∇f(x_t), the gradient of the mean loss over all n training images (paper, section 2, mode sampling).

    chunks: inputs (c, …) and targets (c, …), n images in all; every image weighs 1/n, also in a partial
    last chunk. between: called before every chunk; what it raises ends the pass. params: of the model, those to
    differentiate by (default: `trained`). loss: must be the mean over the images of a loss of each one; a sum, or a
    mean weighted otherwise, gives another f. training: see `unchanged`; in training mode (the paper's) BatchNorm
    makes the result depend on c. Returns one tensor a parameter. ValueError if the chunks do not hold n images.
    """
    params = params or trained(model)
    total, seen = [torch.zeros_like(p) for p in params], 0
    with unchanged(model, training):
        for x, y in chunks:
            between()
            value = 1 / n * _summed(loss, model(x), y)
            torch._foreach_add_(total, torch.autograd.grad(value, params, materialize_grads=True))
            seen += len(y)
    if seen != n:
        raise ValueError(f"the chunks hold {seen} images, not {n}")
    return total


def _summed(loss: Loss, output: Tensor, y: Tensor) -> Tensor:
    if loss is F.cross_entropy:
        return F.cross_entropy(output, y, reduction="sum")  # one rounding less than through the mean
    return len(y) * loss(output, y)


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
