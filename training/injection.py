"""The noise that --inject adds to every mini-batch gradient of a run (docs/measuring.md)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from measure.gradients import has_batchnorm
from measure.injected import isotropic_twin, scale, scale_of_variances, smaller_batch_noise, variance
from training.data import INJECTING

if TYPE_CHECKING:
    from training.loop import Training

DRAWS = 16  # mini-batches of either size from which c follows, with BatchNorm


class Injection:
    """u_t of one run. With BatchNorm its factor c follows from variances measured at the beginning of every epoch.

    scale_of_epoch: (epoch, c), for a checkpoint.
    """

    def __init__(self, run: "Training"):
        self.run, self.objective = run, run.objective()
        self.measured, self.scale_of_epoch = has_batchnorm(run.model), (-1, 0.0)

    def add(self) -> None:
        """g_t ← g_t + u_t, in `.grad`."""
        with torch.no_grad():
            torch._foreach_add_([p.grad for p in self.objective.params], self.noise())

    def noise(self, draw: int = 0) -> list[Tensor]:
        """u_t of the present step, or u of a draw there, by its number from 1 on."""
        run, args = self.run, self.run.args
        with run.autocast():
            pair = run.data.independent(run.step, args.inject_batchsize, draw)
            u = smaller_batch_noise(self.objective, pair, self._scale(draw))
        if args.inject == "isotropic":
            u = isotropic_twin(u, run.data.generator(INJECTING, run.step, draw))
        return u

    def _scale(self, draw: int) -> float:
        run, b, smaller = self.run, self.run.args.batchsize, self.run.args.inject_batchsize
        if not self.measured:
            epoch_ends = (run.step + 1) % run.steps_per_epoch == 0 and not draw
            b = run.data.size - (run.steps_per_epoch - 1) * b if epoch_ends else b  # its last batch may be smaller
            return scale(run.data.size, b, smaller) if b > smaller else 0.0
        epoch = run.step // run.steps_per_epoch
        if self.scale_of_epoch[0] != epoch:
            variances = [variance(self.objective, run.data.draws(run.step, size, DRAWS)) for size in (b, smaller)]
            self.scale_of_epoch = (epoch, scale_of_variances(*variances))
        return self.scale_of_epoch[1]
