"""Recomputing in the backward pass what does not fit into memory (--save_memory)."""

from collections import OrderedDict
from itertools import count

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from utils import UserError


def save_memory(model: nn.Module) -> None:
    """Have a network keep only each block's input for the backward pass, which recomputes the rest.

    A block is a child with layers of its own of `model.layers`, an nn.Sequential. UserError without such `layers`.
    """
    if not isinstance(getattr(model, "layers", None), nn.Sequential):
        raise UserError(f"argument --save_memory: {type(model).__name__} has no nn.Sequential called `layers`")
    model.layers = Recomputed(OrderedDict(model.layers.named_children()))


class Recomputed(nn.Sequential):
    """The same layers one after another, those that have layers of their own (the blocks) recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, …) → what the last layer gives."""
        # No block draws random numbers, and under capture the generator's state cannot be read.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for layer in self:
            x = checkpoint(_forward(layer), x, **options) if any(layer.children()) else layer(x)
        return x


def _forward(block: nn.Module):
    """The block's forward pass; from the second call on BatchNorm's running statistics, moved already, stay."""
    calls = count()

    def run(x: Tensor) -> Tensor:
        copies = {name: buffer.clone() for name, buffer in block.named_buffers()} if next(calls) else {}
        return functional_call(block, copies, (x,))

    return run
