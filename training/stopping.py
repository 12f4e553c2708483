"""When a run has reached ε (paper, section 2, mode critical). No torch: report/ reads records with it."""

import numpy as np


def running_means(norms: np.ndarray, total: float = 0.0, steps: int = 0) -> np.ndarray:
    """The mean of ‖g_t‖ since the first step, after each of `norms`; total, steps: sum and number of those before."""
    return running_sums(norms, total) / np.arange(steps + 1, steps + len(norms) + 1)


def running_sums(norms: np.ndarray, total: float = 0.0) -> np.ndarray:
    """The sum of all ‖g_t‖ after each step, added one by one in float64, so that no grouping changes its bits."""
    return np.cumsum(np.append(total, norms), dtype=np.float64)[1:]


def first_crossing(means: np.ndarray, first: int, eps: float, first_check: int) -> int | None:
    """The first step, not before `first_check`, with a running mean of at most ε, or None. first: of means[0]."""
    start = max(0, first_check - first)
    below = np.flatnonzero(means[start:] <= eps)
    return first + start + int(below[0]) if below.size else None


def first_measured(norms: dict[int, float], eps: float) -> tuple[int | None, int | None]:
    """The first measured step with ‖∇f‖ at most ε, and the one before it. norms: ‖∇f‖ by step."""
    steps = sorted(norms)
    first = next((step for step in steps if norms[step] <= eps), None)
    before = [step for step in steps if first is None or step < first]
    return first, before[-1] if before else None


def first_check(min_epochs: int, steps_per_epoch: int) -> int:
    """The step at which the check starts: once `min_epochs` passes over the data are complete."""
    return max(1, min_epochs * steps_per_epoch)


class StoppingRule:
    """Follows the running mean of a run; `reached` is {ε as text: first step, or None}. check: as `first_check`."""

    def __init__(self, every_eps: list[float], check: int):
        self.every_eps, self.check, self.total = every_eps, check, 0.0
        self.reached = {repr(eps): None for eps in every_eps}

    def follow(self, norms: np.ndarray, total: float = 0.0, steps: int = 0) -> bool:
        """Take in ‖g_t‖ of steps, before which were `steps` with sum `total`; whether all ε are reached."""
        means = running_means(norms, total, steps)
        for eps in self.every_eps:
            if self.reached[repr(eps)] is None:
                self.reached[repr(eps)] = first_crossing(means, steps + 1, eps, self.check)
        self.total = float(running_sums(norms, total)[-1]) if len(norms) else total
        return self.all_reached

    @property
    def all_reached(self) -> bool:
        """Whether every ε has been reached."""
        return None not in self.reached.values()

    def earliest_end(self) -> int:
        """No step before this one can be the first at which all ε are reached: the sum of ‖g_t‖ never falls."""
        return max(self.check, int(self.total // min(self.every_eps)))
