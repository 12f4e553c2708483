"""The training step and the loop around it, common to the three experiments, and what a checkpoint holds."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

import models
import shb
from arguments import ENDLESS, FULL_GRAD_BATCHSIZE, OPTIMIZERS
from measure.gradients import Objective, gradient_norm, has_batchnorm, unchanged
from measure.quantities import EVALUATED
from models.recomputed import save_memory
from training.data import Data
from training.graphed import Graphed
from training.injection import Injection
from training.measuring import Measuring
from training.record import Record
from training.stopping import running_sums
from utils import Signals

RECALIBRATED = 5000  # training images for BatchNorm's statistics, or all if fewer
WINDOW = 200  # steps between two readings of the device, at most


@dataclass
class Sums:
    """What has been added up over steps, of a run or of an epoch: plain numbers, for they go into checkpoints."""

    steps: int = 0
    inputs: int = 0
    loss: float = 0.0  # of each input
    hits: float = 0.0
    norm: float = 0.0
    max_norm: float = 0.0

    def plus(self, window: np.recarray) -> "Sums":
        """These sums and the steps of a window."""
        if not window.steps.size:
            return replace(self)
        return Sums(
            self.steps + len(window.steps),
            self.inputs + int(window.sizes.sum()),
            self.loss + float(window.losses @ window.sizes),
            self.hits + float(window.hits.sum()),
            float(running_sums(window.norms, self.norm)[-1]),
            max(self.max_norm, float(window.norms.max())),
        )


def evaluation_interval(epoch: int) -> int:
    """Epochs from one evaluation to the next: 1 up to epoch 200, 2 up to 400, 4 up to 800, and so on (ours)."""
    return 1 << max(0, (epoch // 100).bit_length() - 1)


class Training:
    """Everything of a run that moves, and so everything that a checkpoint holds.

    step: updates made. total, epoch: sums over the steps counted, of the run and of its present epoch. results: of
    the experiment, plain values. outcome: how it has ended, see `stop`. diverged_at: number of the first step whose
    loss or gradient is not finite.
    """

    def __init__(self, args: Namespace, data: Data, record: Record | None, signals: Signals | None):
        self.args, self.data, self.record = args, data, record
        self.check_signals = signals.check if signals else lambda: None
        torch.manual_seed(args.seed)
        self.model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
        if args.save_memory:
            save_memory(self.model)
        self.params, self.loss = list(self.model.parameters()), F.cross_entropy
        options = {name: getattr(args, flag) for name, flag in OPTIMIZERS[args.optimizer].items()}
        self.optimizer = getattr(shb, args.optimizer.upper())(self.params, lr=args.lr, **options)
        self.train_step = self.eager_step
        if args.cuda_graph:
            self.train_step = Graphed(self.eager_step, self.model, self.optimizer, args.batchsize)
        self.steps_per_epoch = -(-data.size // args.batchsize)
        self.step, self.last, self.earliest_end = 0, ENDLESS, None
        self.total, self.epoch, self.results, self.evaluated = Sums(), Sums(), {}, {}
        self.outcome, self.diverged_at = None, None
        self.window = []  # of each step since the last row: loss, ‖g_t‖, hits, still on the device
        self.injection = Injection(self) if args.inject else None
        self.measuring = Measuring(self)
        self.has_batchnorm = has_batchnorm(self.model)
        self.next_checkpoint = time.monotonic() + args.checkpoint_every

    def windows(self, last: int, earliest_end: Callable[[], int] | None = None) -> Iterator[np.recarray]:
        """Train up to step `last`, giving what was measured since the last row each time the device is read.

        That is every WINDOW steps, at the end of an epoch, where ω is measured, at `last`, and at the step that
        earliest_end names, before which the experiment cannot end. What is not finite ends the run, with the window
        cut before it. The caller decides with each window whether to evaluate and to `stop`; then it is counted and
        its row logged. A signal before that leaves it uncounted in the checkpoint: it is done again on resuming.
        """
        self.last, self.earliest_end = last, earliest_end
        if self.step == 0 and self.measuring.due():
            self._log(None, self.measuring.measure())
        next_reading = self._next_reading(self.step - 1 if self.window else self.step)
        if self.window and self.step >= next_reading:  # stopped between a window's last step and its row
            yield from self._read()
            next_reading = self._next_reading(self.step)
        while self.step < self.last and not self.outcome:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            for x, y in self.data.epoch(epoch, self.args.batchsize, start):
                self._advance(x, y)
                if self.step >= next_reading:
                    yield from self._read()
                    if self.step >= self.last or self.outcome:
                        break
                    next_reading = self._next_reading(self.step)

    def _advance(self, x: Tensor, y: Tensor) -> None:
        self.measuring.before_step()
        self.window.append(self.train_step(x, y))
        self.step += 1
        if self.record:
            self.record.bar.update()
        self.check_signals()
        if time.monotonic() >= self.next_checkpoint:
            self.save()

    def _next_reading(self, step: int) -> int:
        epoch = step // self.steps_per_epoch + 1
        interval = 1 if self.args.until_loss else evaluation_interval(epoch)
        epoch_end = -(-epoch // interval) * interval * self.steps_per_epoch
        points = [(step // WINDOW + 1) * WINDOW, epoch_end, self.measuring.next_after(step), self.last]
        if self.earliest_end:
            points.append(max(step + 1, self.earliest_end()))
        return min(points)

    @property
    def evaluation_due(self) -> bool:
        """Whether an epoch that is to be evaluated, or the run, ends at the present step."""
        epoch, left = divmod(self.step, self.steps_per_epoch)
        return self.step >= self.last or (left == 0 and epoch % evaluation_interval(epoch) == 0)

    def _read(self) -> Iterator[np.recarray]:
        window = self._window()
        bad = np.flatnonzero(~np.isfinite(window.losses + window.norms))
        if bad.size:
            self.stop("diverged", int(window.steps[bad[0]]))
            window = window[window.steps < self.diverged_at]
        elif self.step >= self.last:
            # From before the last window is counted: taken up again for more, a run goes on as one that had been
            # asked for all of it at once.
            self.save()
        if window.steps.size:
            yield window
        due = self.outcome != "diverged" and self.measuring.due()
        if not (self.outcome or due or self.evaluation_due or self.step % WINDOW == 0):
            return
        measured = self.measuring.measure() if due else []
        if window.steps.size:
            self._count(window)
            self._log(window, measured)
        self.window = []

    def _window(self) -> np.recarray:
        """What the steps since the last row measured, one entry a step: number, loss, ‖g_t‖, hits, inputs."""
        columns = [torch.stack(column).float() for column in zip(*self.window, strict=True)]
        losses, norms, hits = torch.stack(columns).cpu().double().numpy()
        steps = np.arange(self.step - len(self.window) + 1, self.step + 1)
        left_over = self.data.size - (self.steps_per_epoch - 1) * self.args.batchsize
        sizes = np.where(steps % self.steps_per_epoch == 0, left_over, self.args.batchsize)
        return np.rec.fromarrays([steps, losses, norms, hits, sizes], names="steps, losses, norms, hits, sizes")

    def _count(self, window: np.recarray) -> None:
        """Add a window to the sums and its norms to the history. From here on a checkpoint holds it as done."""
        self.epoch, self.total = self.epoch_with(window), self.total.plus(window)
        if self.record:
            self.record.norms.append(window.norms.astype("<f4").tobytes())

    def epoch_with(self, window: np.recarray) -> Sums:
        """Sums over the epoch of the window's last step, up to that step."""
        end = int(window.steps[-1])
        start = (end - 1) // self.steps_per_epoch * self.steps_per_epoch
        before = self.epoch if window.steps[0] - 1 > start else Sums()
        return before.plus(window[window.steps > start])

    def stop(self, outcome: str, diverged_at: int | None = None) -> None:
        """End the run at the present step, its window not yet counted: the only way to end before `last`.

        outcome: `finished` or `diverged`, as in summary.json.
        """
        self.outcome, self.diverged_at = outcome, diverged_at
        self.save()

    def eager_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update on inputs x (b, …) and labels y (b,); loss, ‖g_t‖ and hits, still on the device."""
        for p in self.params:
            p.grad = None  # as zero_grad does, without its hooks: they take a twentieth of the MLP's step
        with self.autocast():
            logits = self.model(x)
            loss = self.loss(logits, y)
        loss.backward()
        if self.injection:
            self.injection.add()
        norm = gradient_norm([p.grad for p in self.params])
        self.optimizer.update()
        return loss.detach(), norm, (logits.argmax(1) == y).sum()

    def objective(self, **options) -> Objective:
        """What training descends on, for measuring; options: as of Objective."""
        return Objective(self.model, self.loss, **options)

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes: bfloat16 where that is safe under --precision bf16, else untouched."""
        bf16 = self.args.precision == "bf16"
        return torch.autocast(self.data.device.type, torch.bfloat16) if bf16 else nullcontext()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The mini-batch that the next step takes."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        return next(self.data.epoch(epoch, self.args.batchsize, start))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`accuracy` (%) and mean `test_loss` of the test data, in evaluation mode. A loss not finite ends the run.

        With BatchNorm also both with recalibrated statistics: at each evaluation with --recalibrate, else where ω is
        measured and at the end.
        """
        if self.evaluated.get("steps") != self.step:
            with unchanged(self.model, training=False), self.autocast():
                accuracy, loss = self._tested()
            self.evaluated = {"steps": self.step, "accuracy": accuracy, "test_loss": loss}
            if not np.isfinite(loss):
                self.stop("diverged", self.step + 1)
        last = self.step >= self.last or self.outcome == "finished"
        wanted = self.has_batchnorm and (self.args.recalibrate or last or self.measuring.due())
        if wanted and "accuracy_recalibrated" not in self.evaluated and self.outcome != "diverged":
            self.evaluated |= self._recalibrated()
        return {name: value for name, value in self.evaluated.items() if name != "steps"}

    def _recalibrated(self) -> dict[str, float]:
        """As `evaluate`, with BatchNorm's statistics the mean over forward passes at the present weights [Izmailov
        2018]: running ones lag behind. Of RECALIBRATED training images in chunks of 1,000.
        """
        with unchanged(self.model, training=True), self.autocast():
            batches = self.data.for_batchnorm(self.step, RECALIBRATED, FULL_GRAD_BATCHSIZE)
            update_bn((x for x, _ in batches), self.model)
            self.model.eval()
            accuracy, loss = self._tested()
        return {"accuracy_recalibrated": accuracy, "test_loss_recalibrated": loss}

    def _tested(self) -> tuple[float, float]:
        totals, n = torch.zeros(2, device=self.data.device), len(self.data.y_test)
        images = len(self.data.spec.shape) == 3  # vectors are small: a small batch of them is all overhead
        for x, y in self.data.test(min(max(self.args.batchsize, 100), 1000) if images else 5000):
            self.check_signals()
            logits = self.model(x).float()
            totals += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
        hits, loss = totals.tolist()
        return 100 * hits / n, loss / n

    def _log(self, window: np.recarray | None, measured: list[dict]) -> None:
        """One row of metrics.csv (none before the first step), and what was measured at the present step."""
        if self.record is None:
            return
        if window is None:
            self.record.log(None, measured, say=False)
            return
        end = int(window.steps[-1])
        row = {
            "steps": end,
            "epoch": end / self.steps_per_epoch,
            "training_loss": self.epoch.loss / self.epoch.inputs,
            "training_acc": 100 * self.epoch.hits / self.epoch.inputs,
            "g-norm": float(window.norms.mean()),
            "min_g-norm": float(window.norms.min()),
            "max_g-norm": float(window.norms.max()),
            "ave-norm": self.total.norm / self.total.steps,
        }
        evaluated = self.evaluated if self.evaluated.get("steps") == end and self.outcome != "diverged" else {}
        row |= {name: evaluated.get(name) for name in EVALUATED}
        self.record.log(row, measured, say=self.evaluation_due or self.outcome is not None)

    def save(self) -> None:
        """Write a checkpoint. An epoch's permutation and augmentation follow from the seed and the step alone."""
        if self.record is None:
            return
        cuda = [torch.cuda.get_rng_state(self.data.device)] if self.data.device.type == "cuda" else []
        window = [torch.stack(column).float() for column in zip(*self.window, strict=True)]
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": torch.stack(window, 1).cpu() if window else torch.zeros(0, 3),
            "random": [torch.get_rng_state(), *cuda],
            "step": self.step,
            "total": asdict(self.total),
            "epoch": asdict(self.epoch),
            "results": self.results,
            "measuring": self.measuring.state_dict(),
            "injection": self.injection.scale_of_epoch if self.injection else None,
        }
        self.record.save_checkpoint(content)
        self.next_checkpoint = time.monotonic() + self.args.checkpoint_every

    def load(self, content: dict) -> None:
        """Go back to where `save` was called."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.window = [row.unbind() for row in content["window"].to(self.data.device)]
        torch.set_rng_state(content["random"][0])
        for state in content["random"][1:]:
            if self.data.device.type == "cuda":
                torch.cuda.set_rng_state(state, self.data.device)
        self.step, self.results = content["step"], content["results"]
        self.total, self.epoch = Sums(**content["total"]), Sums(**content["epoch"])
        self.measuring.load_state_dict(content["measuring"])
        if self.injection:
            self.injection.scale_of_epoch = content["injection"]
