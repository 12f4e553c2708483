"""What `critical --full_grad_every` measures: ‖∇f(x_t)‖ every so many steps, and when it is first ≤ ε."""

import numpy as np

from arguments import ENDLESS
from measure.draws import length
from measure.gradients import full_gradient
from progress import Progress
from state import first_crossing
from training import Training


class FullGradients:
    """‖∇f(x_t)‖ over all training images at every so many steps of a run (measure.md, section 7).

    every: steps between two measurements. at: the steps to measure at; 0, before the first update, is one. reached:
    {ε as text: first measured step with ‖∇f‖ ≤ ε, or None}; the norm is not monotone, so that between two
    measurements it may have been ≤ ε before. last: the last step measured and kept, None before the first.
    """

    def __init__(self, run: Training):
        self.run, self.norm = run, None
        self.every = max(1, round(run.args.full_grad_every * run.steps_per_epoch))
        self.at = range(0, ENDLESS, self.every)
        self.last = run.total.steps // self.every * self.every if run.step else None
        self.reached = run.results["steps_to_eps_full"] = self.reached_before()

    def reached_before(self) -> dict[str, int | None]:
        """`reached` as far as the run has come; an ε that is new to it is looked for in what was measured."""
        known = self.run.results.get("steps_to_eps_full", {})
        rows = self.run.record.full_gradients.rows()
        norms, found = np.array([float(row["full_gradient_norm"]) for row in rows]), {}
        for eps in self.run.args.eps:
            index = first_crossing(norms, 0, eps, 0)
            found[repr(eps)] = None if index is None else index * self.every
        return {eps: known.get(eps, step) for eps, step in found.items()}

    def measure(self) -> None:
        """Measure at the present x_t, as `sampling` does: training mode, fresh augmentation. To be kept by `keep`.

        A norm that is not finite is a divergence, and is not kept.
        """
        run, size = self.run, self.run.args.full_grad_batchsize
        progress = Progress(run, run.data.size)
        try:
            chunks = run.data.full_pass(run.step, size)
            with run.autocast():
                norm = length(full_gradient(run.model, chunks, run.data.size, progress.chunks_of(size)))
        finally:
            progress.bar.close()
        if not np.isfinite(norm):
            run.stop("diverged", run.step + 1)
            return
        self.norm = norm
        for eps in run.args.eps:
            if self.reached[repr(eps)] is None and norm <= eps:
                self.reached[repr(eps)] = run.step

    def keep(self) -> dict:
        """Put what was just measured into the record, once its step is counted; what the dashboard shows of it."""
        if self.norm is None:
            return {}
        shown, self.norm, self.last = {"full_gradient_norm": self.norm}, None, self.run.step
        record = self.run.record
        record.append(record.full_gradients, [{"steps": self.last} | shown])
        return shown

    def results(self) -> dict:
        """For the summary: each step to ε, the measured step before it, the SFO complexity, and the resolution."""
        above, sfo = {}, {}
        for eps, step in self.reached.items():
            above[eps] = self.last if step is None else step - self.every
            sfo[eps] = None if step is None else step * self.run.args.batchsize
        above = {eps: None if step is None or step < 0 else step for eps, step in above.items()}
        found = {"steps_to_eps_full": self.reached, "last_above_eps_full": above, "sfo_full": sfo}
        return found | {"full_gradient_every": self.every}
