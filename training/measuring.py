"""What is measured at a step, in any mode, and its rows of measurements.csv (docs/measuring.md)."""

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from arguments import ENDLESS, OPTIMIZERS, measures, planned_steps
from measure.draws import augmentation, flat
from measure.gradients import Objective
from measure.noise import batch_noise, budget
from measure.optimizers import ExactMemory, affine, direction
from measure.quantities import INDEX
from measure.shape import shape
from measure.sharpness import sharpness
from measure.smoothing import CONTROLS, smoothing
from training.data import PROBING, SMOOTHING
from training.record import MEASUREMENTS

if TYPE_CHECKING:
    from training.loop import Training

PROBE_CHUNK = 250  # probe images at once: a product with the Hessian holds several times what a gradient does
VECTOR_CHUNK = 1000  # the same of vectors, whose networks are so small that a chunk is mostly overhead
BATCHES = 32  # mini-batches for batch sharpness, and displacements for average sharpness, in mirrored pairs
GOLDEN = (5**0.5 - 1) / 2


class Measuring:
    """Measures ω_t of one run at the steps that its arguments name, before the update of that step.

    `sampling`: at --steps. Else with --measure_every E: at step 0, once in every E epochs, at the end. The k-th of
    these lies at the fraction kφ mod 1 of its E epochs, φ the golden ratio: what momentum holds depends on the
    position in the epoch (docs/measuring.md), so that a fixed one would show only itself.
    """

    def __init__(self, run: "Training"):
        self.run, self.args, self.on = run, run.args, measures(run.args)
        self.memory = ExactMemory(run.objective(), run.optimizer) if self.on and run.args.exact_memory else None
        self.fed = -1  # the last step whose full gradient the exact memory has taken in

    def due(self) -> bool:
        """Whether the present step is one to measure at; a run's last always is."""
        step = self.run.step
        begins, ended = step == 0 and self.args.mode != "sampling", self.run.outcome == "finished"
        return self.on and (begins or ended or step >= self.run.last or self.next_after(step - 1) == step)

    def next_after(self, step: int) -> int:
        """The first step after `step` to measure at, as far as it is known beforehand."""
        if not self.on:
            return ENDLESS
        if self.args.mode == "sampling":
            return min((at for at in self.args.steps if at > step), default=ENDLESS)
        spacing = self.args.measure_every * self.run.steps_per_epoch
        k = max(1, int(step / spacing))
        while (at := int((k - 1 + k * GOLDEN % 1) * spacing)) <= step:
            k += 1
        return at

    def before_step(self) -> None:
        """Take in ∇f(x_t) for --exact_memory K, in the K steps before one to measure at."""
        ahead = min(self.next_after(self.run.step), self.run.last)
        if self.memory is None or ahead - self.run.step > self.args.exact_memory:
            return
        run = self.run
        if self.fed != run.step - 1:
            self.memory = ExactMemory(run.objective(), run.optimizer)
        objective = run.objective(between=lambda images: run.check_signals())
        with run.autocast():
            chunks = run.data.full_pass(run.step, self.args.full_grad_batchsize)
            self.memory.add(objective.full_gradient(chunks, run.data.size))
        self.fed = run.step

    def measure(self) -> list[dict]:
        """Rows of measurements.csv at the present x_t; none, and the run ends, if ω is not finite.

        The numbers of the training batch size become results of the run.
        """
        run, rows = self.run, []
        evaluated, silent = run.evaluate(), run.record is None or run.record.bar.disable
        with tqdm(total=round(self.cost()), desc=f"step {run.step}", unit="image", leave=False, disable=silent) as bar:

            def before(images: float) -> None:
                run.check_signals()
                bar.update(round(images))

            for mode in self.args.measure_batchnorm:
                objective = run.objective(training=mode == "train", between=before)
                with objective.unchanged():  # once, and not for each of a thousand passes
                    found = self._measure_in(objective, mode)
                if found is None:
                    run.stop("diverged", run.step + 1)
                    return []
                rows += found
        head = {"steps": run.step, "epoch": run.step / run.steps_per_epoch}
        rows = [dict.fromkeys(MEASUREMENTS) | head | row | evaluated for row in rows]
        own = next(row for row in rows if row["batch_size"] == self.args.batchsize)
        run.results = {key: value for key, value in run.results.items() if key not in MEASUREMENTS}
        run.results |= {key: value for key, value in own.items() if key not in INDEX and value is not None}
        return rows

    def _measure_in(self, objective: Objective, mode: str) -> list[dict] | None:
        """As `measure`, in one of BatchNorm's modes."""
        run, args, data = self.run, self.args, self.run.data
        known = {"renamed": self._renamed()}
        if run.injection:
            known["injected"] = run.injection.noise
        with run.autocast():
            full = objective.full_gradient(data.full_pass(run.step, args.full_grad_batchsize), data.size)
            own, omega = batch_noise(objective, run.optimizer, run.next_batch(), full, **known)
        if not np.isfinite(own["noise_norm"]):
            return None
        if args.mode == "sampling" and run.step == planned_steps(args) and mode == args.measure_batchnorm[0]:
            run.record.save_omega(omega.numpy(), run.step)
        own["draws"] = 1
        kept, found = [], {}
        for b in {args.batchsize, *args.draw_batchsizes} if args.measure else ():
            if b == args.batchsize and {"shape", "smoothing"} & set(args.measure):
                known["keep"] = kept.append
            with run.autocast():
                draws = data.draws(run.step, b, args.draws)
                more = known if b == args.batchsize else {"renamed": known["renamed"]}  # u is made for b alone
                found[b] = budget(objective, run.optimizer, full, draws, data.size, **more)
            known.pop("keep", None)
        own |= found.pop(args.batchsize, {}) | self._augmentation(objective)
        if self.memory is not None and objective.training and self.fed == run.step - 1:
            own |= self.memory.split(full)
        shapes = self._shape(objective, kept, full) if "shape" in args.measure else {"all": {}}
        own |= shapes.pop("all") | self._landscape(objective, kept, full, own["delta"])
        found[args.batchsize] = own
        layers = [{"batch_size": args.batchsize, "layer": layer} | numbers for layer, numbers in shapes.items()]
        rows = [{"batch_size": b, "layer": "all"} | numbers for b, numbers in sorted(found.items())]
        return [{"batchnorm": mode} | row for row in rows + layers]

    def _renamed(self) -> dict[str, float]:
        """SHB at η is NSHB at η/(1 − β): η′/η of the two names, under which one trajectory has two δ."""
        beta = self.args.beta1
        ratios = {"shb": (1.0, 1 / (1 - beta)), "nshb": (1 - beta, 1.0)}.get(self.args.optimizer, ())
        return dict(zip(("delta_as_shb", "delta_as_nshb"), ratios, strict=False))

    def _augmentation(self, objective: Objective) -> dict:
        """Augmentation's part of the variance, at the batch size of training."""
        if not (self.args.draw_batchsizes and self.run.data.spec.augmented):
            return {}
        with self.run.autocast():
            batches = self.run.data.augmented_pairs(self.run.step, self.args.batchsize, max(2, self.args.draws // 4))
            return augmentation(objective, batches)

    def _shape(self, objective: Objective, kept: list[Tensor], full: list[Tensor]) -> dict[str, dict]:
        """The shape of the noise over the draws `kept`: of the whole vector, and of each layer."""
        named = [(name.rpartition(".")[0], p) for name, p in self.run.model.named_parameters() if p.requires_grad]
        layers = {layer: sum(p.numel() for _, p in group) for layer, group in groupby(named, key=lambda pair: pair[0])}
        directions = {}
        if OPTIMIZERS[self.args.optimizer]:  # SGD has no memory
            directions["memory"] = flat(affine(self.run.optimizer, objective.params)[1])
        return shape(kept, flat(full), directions, layers, objective.between)

    def _landscape(self, objective: Objective, kept: list[Tensor], full: list[Tensor], delta: float) -> dict:
        """Smoothing and sharpness. Not under autocast: bfloat16 rounds by more than isotropic noise moves the loss."""
        run, args, found = self.run, self.args, {}
        if not {"smoothing", "sharpness"} & set(args.measure):
            return found
        halves = run.data.probe(args.probe_images, VECTOR_CHUNK if len(run.data.spec.shape) == 1 else PROBE_CHUNK)
        found["probe_images"] = args.probe_images
        if "smoothing" in args.measure:
            generator = run.data.generator(SMOOTHING, run.step)
            found |= smoothing(objective, halves, run.optimizer, full, kept, generator)
        if "sharpness" in args.measure:
            batches = run.data.draws(run.step, args.batchsize, BATCHES)
            generator = run.data.generator(PROBING, run.step)
            g = objective.gradient(run.next_batch())
            g = torch._foreach_add(g, run.injection.noise()) if run.injection else g
            d = direction(run.optimizer, dict(zip(objective.params, g, strict=True)))
            along = {"direction": [d[p] for p in objective.params], "gradient": g}
            found |= sharpness(objective, halves, batches, delta, BATCHES // 2, generator, along)
        return found

    def cost(self) -> float:
        """About what a measurement costs, in images forward and backward: docs/measuring.md, Cost."""
        args, m, n = self.args, self.args.draws, self.args.probe_images
        cost = self.run.data.size + (m * sum({args.batchsize, *args.draw_batchsizes}) if args.measure else 0.0)
        controls = min(m / 2, CONTROLS)
        cost += n * (0.4 * (m + 4 * controls) + 3 * controls + 50) if "smoothing" in args.measure else 0
        cost += 187 * n + 129 * args.batchsize if "sharpness" in args.measure else 0
        return len(args.measure_batchnorm) * cost

    def state_dict(self) -> dict:
        """What the exact memory holds."""
        return {"fed": self.fed, "shadow": self.memory.shadow.state_dict()} if self.memory else {}

    def load_state_dict(self, state: dict) -> None:
        """Go back to where `state_dict` was called."""
        if state and self.memory:
            self.fed = state["fed"]
            self.memory.shadow.load_state_dict(state["shadow"])
