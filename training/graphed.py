"""The step as one captured CUDA graph: the same kernels on the same memory, without Python or a launch for each.

Not yet run, for want of a GPU: see the README.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Graphed:
    """`step(x, y)`, which returns tensors, as one captured graph; batches not of `batchsize` run eagerly.

    The numbers of a parameter group (lr, …) are part of the graph: when one is changed, it is captured anew.
    """

    def __init__(self, step: Callable[..., tuple], model: nn.Module, optimizer: Optimizer, batchsize: int):
        self.step, self.model, self.optimizer, self.batchsize = step, model, optimizer, batchsize
        self.captured = None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """As `step`."""
        if len(y) != self.batchsize:
            return self.step(x, y)
        now = [v for group in self.optimizer.param_groups for k, v in group.items() if k != "params"]
        if now != self.captured:
            self.x, self.y = x.clone(), y.clone()
            self._capture(x.device)
            self.captured = now
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return tuple(out.clone() for out in self.out)  # the next replay overwrites them

    def _capture(self, device: torch.device) -> None:
        # Warming up really trains, so what it changes is put back, in the memory that the graph will use.
        model = {k: v.clone() for k, v in self.model.state_dict().items()}
        momentum = {p: s["momentum_buffer"].clone() for p, s in self.optimizer.state.items()}
        random = torch.cuda.get_rng_state(device)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step(self.x, self.y)
            torch.cuda.current_stream().wait_stream(stream)
            self.model.load_state_dict(model)
            for p, state in self.optimizer.state.items():
                state["momentum_buffer"].copy_(momentum[p] if p in momentum else torch.zeros_like(p))
            torch.cuda.set_rng_state(random, device)
            self.optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.step(self.x, self.y)
