"""Recomputing in the backward pass what does not fit into memory (--save_memory)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def save_memory(model: nn.Module) -> None:
    """Have a network keep only each block's input for the backward pass, which recomputes the rest.

    A block is a child of `model.layers`, an nn.Sequential, that has layers of its own. Outputs, gradients, buffers and
    the names in state_dict stay as they are; a step takes about a third longer. ValueError without such `layers`.
    """
    if not isinstance(getattr(model, "layers", None), nn.Sequential):
        raise ValueError(f"{type(model).__name__} has no nn.Sequential called `layers` whose blocks can be recomputed")
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
