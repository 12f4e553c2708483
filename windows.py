"""What consecutive steps have measured, and sums over steps."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Window:
    """What consecutive steps measured: arrays with one entry a step.

    steps: their numbers, from 1. losses: mean cross-entropy of the mini-batch, before the update. norms: ‖g_t‖
    over all parameters. hits: images classified correctly. sizes: images in the mini-batch.
    """

    steps: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    hits: np.ndarray
    sizes: np.ndarray

    def until(self, step: int) -> "Window":
        """The part up to and including step number `step`."""
        n = int(np.searchsorted(self.steps, step, side="right"))
        return Window(self.steps[:n], self.losses[:n], self.norms[:n], self.hits[:n], self.sizes[:n])


@dataclass
class Sums:
    """What has been added up over steps, of a run or of an epoch: plain numbers, for they go into checkpoints."""

    steps: int = 0
    images: int = 0
    loss: float = 0.0  # of each image
    hits: float = 0.0
    norm: float = 0.0
    max_norm: float = 0.0

    def add(self, window: Window) -> None:
        """Add the steps of a window."""
        self.steps += len(window.steps)
        self.images += int(window.sizes.sum())
        self.loss += float(window.losses @ window.sizes)
        self.hits += float(window.hits.sum())
        self.norm = float(self.running_norms(window)[-1])
        self.max_norm = max(self.max_norm, float(window.norms.max()))

    def running_norms(self, window: Window) -> np.ndarray:
        """The sum of ‖g_t‖ over all steps up to each step of `window`, added one by one in float64.

        Its cost does not grow with the number of steps before.
        """
        return np.cumsum(np.append(self.norm, window.norms))[1:]
