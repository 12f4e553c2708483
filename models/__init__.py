"""The networks of the paper (section 2) and ResNet20, by name; and recomputing what does not fit into memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mobilenet import MobileNetv2
from .resnet import ResNet18, ResNet20
from .wideresnet import WideResNet

_MODELS = {
    "ResNet18": ResNet18,
    "WideResNet-28-10": WideResNet,
    "MobileNetv2": MobileNetv2,
    "ResNet20": ResNet20,
}


def build(name: str, num_classes: int) -> nn.Module:
    """The network `name` for images of shape (n, 3, 32, 32), giving logits of shape (n, num_classes).

    Its weights are drawn from torch's global generator. ValueError if there is no such network.
    """
    if name not in _MODELS:
        raise ValueError(f"no network called {name!r}; there are {', '.join(_MODELS)}")
    return _MODELS[name](num_classes)


def save_memory(model: nn.Module) -> None:
    """Have a network of `build` keep only each block's input for the backward pass, which recomputes the rest.

    Outputs, gradients, buffers and the names in state_dict stay as they are; a step takes about a third longer.
    """
    model.layers = Recomputed(*model.layers)


class Recomputed(nn.Sequential):
    """The same layers one after another, those that have layers of their own (the blocks) recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → what the last layer gives."""
        for layer in self:
            x = self._recomputed(layer, x) if any(layer.children()) else layer(x)
        return x

    @staticmethod
    def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
        def contexts():
            return nullcontext(), _buffers_kept(block)

        # No block draws random numbers, and under capture the generator's state cannot be read.
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    # The forward pass has moved BatchNorm's running statistics already: what comes again moves copies.
    buffers = [(module, *named) for module in block.modules() for named in module.named_buffers(recurse=False)]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
