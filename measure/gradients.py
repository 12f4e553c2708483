"""Mini-batch and full gradients of a loss at the present weights, and what BatchNorm does meanwhile.

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
SMALL = 1 << 16  # weights of a network whose step costs what Python costs
VALUE = 0.4  # cost of a forward pass, in forward and backward passes; measured with ResNet20 on a CPU


class Objective:
    """f, the mean loss over images, as a function of a model's parameters.

    loss: of the model's output and the targets. It must be the mean over the batch of a loss of each image; a sum, or
    a mean weighted otherwise, gives another f. training: True or False puts the model in training or evaluation mode
    while it measures, None leaves every module in its mode; in training mode (the paper's) BatchNorm makes a gradient
    depend on the batch. params: those to differentiate by; default: all that are not frozen, in the model's order.
    between: called before every pass with its cost, in images forward and backward; what it raises ends a measurement.
    ValueError for weights in bfloat16 or float16, whose differences are rounded away, and for another reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        training: bool | None = True,
        params: list[Tensor] | None = None,
        between: Callable[[float], None] = lambda images: None,
    ):
        model = getattr(model, "_orig_mod", model)  # what torch.compile makes has no second derivative
        self.model, self.loss, self.training, self.between = model, loss, training, between
        options = {"reduction": getattr(loss, "reduction", "mean")} | getattr(loss, "keywords", {})
        if options["reduction"] != "mean" or getattr(loss, "weight", options.get("weight")) is not None:
            raise ValueError(f"the loss must be the plain mean over the batch, got {loss}")
        self.params = params or [p for p in model.parameters() if p.requires_grad]
        others = {str(p.dtype) for p in self.params} - {"torch.float32", "torch.float64"}
        if others or not self.params:
            got = ", ".join(sorted(others)) or "none"
            raise ValueError(f"weights to differentiate by must be float32 or float64 (model.float()), got {got}")
        self._measuring = False

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """As the function `unchanged`, with gradients on. Inside of itself it does nothing: random numbers go on."""
        if self._measuring:
            yield
            return
        self._measuring = True
        try:
            with unchanged(self.model, self.training), torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            self._measuring = False

    def gradient_by_parameter(self, batch: Batch) -> dict[Tensor, Tensor]:
        """Gradient of the loss of a batch, for each parameter that this loss needs, in the order of `params`.

        ValueError if the loss returns more than one number.
        """
        x, y = pair(batch)
        with self.unchanged():
            self.between(len(y))
            value = self.loss(self.model(x), y)
            if value.ndim:
                shape = tuple(value.shape)
                raise ValueError(f"the loss must return the mean over the batch, one number; got shape {shape}")
            found = torch.autograd.grad(value, self.params, allow_unused=True)
        found = {p: g for p, g in zip(self.params, found, strict=True) if g is not None}
        if any(g.is_sparse for g in found.values()):
            raise ValueError("gradients must be dense: make the embedding with sparse=False")
        return found

    def gradient(self, batch: Batch) -> list[Tensor]:
        """One tensor for each of `params`: zeros where the loss does not need it."""
        found = self.gradient_by_parameter(batch)
        return [found[p] if p in found else torch.zeros_like(p) for p in self.params]

    def full_gradient(self, chunks: Iterable[Batch], n: int) -> list[Tensor]:
        """∇f(x_t), the gradient of the mean loss over all n training images (paper, section 2).

        chunks: batches of any sizes, n images in all, as one pass has them. Every image weighs 1/n, also in a partial
        last chunk. ValueError if the chunks do not hold n images.
        """
        seen = 0
        with self.unchanged():
            total = [torch.zeros_like(p) for p in self.params]
            for x, y in map(pair, chunks):
                self.between(len(y))
                value = len(y) / n * self.loss(self.model(x), y)
                torch._foreach_add_(total, torch.autograd.grad(value, self.params, materialize_grads=True))
                seen += len(y)
        if seen != n:
            raise ValueError(f"the chunks hold {seen} images, not {n}")
        return total

    def value(self, batches: list[Batch]) -> float:
        """f at the present weights, the mean loss over all images of the batches."""
        total = 0.0
        with self.unchanged(), torch.no_grad():
            for x, y in batches:
                self.between(VALUE * len(y))
                output = self.model(x)
                if self.loss is F.cross_entropy:
                    output = output.double()  # a mean in float32 may be off by more than what is looked for
                total += len(y) * self.loss(output, y).item()
        return total / images(batches)


def pair(batch: Batch) -> Batch:
    """The batch itself. ValueError if it is not (inputs, targets)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch must be a pair (inputs, targets), got {type(batch).__name__}")
    return batch


def images(batches: list[Batch]) -> int:
    """How many images the batches hold."""
    return sum(len(y) for _, y in batches)


def has_batchnorm(model: nn.Module) -> bool:
    """Whether an image's gradient depends on its batch in training mode."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@contextmanager
def unchanged(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put `model` in training or evaluation mode for a while, and leave no trace in buffers or random state.

    training: None leaves every module in the mode it is in. The random state is that of torch (CPU, and the CUDA
    devices that hold parameters), NumPy and Python; a generator of the user's own is not known here.
    """
    buffers = [b.clone() for b in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with own_random_state(cuda):
            if training is not None:
                model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


@contextmanager
def own_random_state(cuda: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put torch's (CPU and the given devices), NumPy's and Python's random state back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=list(cuda)):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """‖g‖, Euclidean over all the tensors together (paper, section 2, mode critical); a scalar on their device.

    On the CPU the entries of an output channel, at most some thousands, are summed in float32 and the channels in
    float64: within 1e-7. One long sum in float32, as of torch's get_total_norm, is 2e-5 too small for ResNet18.
    """
    if gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)  # in two launches, and a tree of short sums
    if sum(g.numel() for g in gradients) <= SMALL:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        return torch.linalg.vector_norm(flat, dtype=torch.float64)  # a call a tensor would be a tenth of a step
    rows = [g.flatten(1) if g.ndim > 1 else g.view(1, -1) for g in gradients]
    channels = torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows])
    return torch.linalg.vector_norm(channels, dtype=torch.float64)
