"""The training step and the loop around it, common to the three experiments, and what a checkpoint holds."""

import time
from argparse import Namespace
from collections.abc import Container, Iterator
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import models
import shb
from arguments import ENDLESS, OPTIMIZERS
from data import INJECTING, Data
from graphed import Graphed
from measure.draws import isotropic
from measure.gradients import gradient_norm, unchanged
from models.recomputed import save_memory
from record import Record
from utils import Signals
from windows import Sums, Window

WINDOW = 200  # steps between two readings of the device, at most


class Training:
    """Everything of a run that moves, and so everything that a checkpoint holds.

    step: updates made. total, epoch: sums over the steps committed, of the run and of its present epoch. results:
    of the experiment, plain Python values. outcome: how it has ended, see `stop`. diverged_at: number of the first
    step whose loss or gradient was not finite. before_step: called before every update. attached: what an experiment
    adds, by name, with state_dict(); attached_state: what a checkpoint held of it.
    """

    def __init__(self, args: Namespace, data: Data, record: Record | None, signals: Signals | None):
        self.args, self.data, self.record = args, data, record
        self.check_signals = signals.check if signals else lambda: None
        torch.manual_seed(args.seed)
        self.model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
        if args.save_memory:
            save_memory(self.model)
        options = {name: getattr(args, flag) for name, flag in OPTIMIZERS[args.optimizer].items()}
        optimizer = getattr(shb, args.optimizer.upper())
        self.optimizer = optimizer(self.model.parameters(), lr=args.lr, **options)
        self.train_step = self.eager_step
        if args.compile:
            self.train_step = Graphed(self.eager_step, self.model, self.optimizer, args.batchsize)
        self.steps_per_epoch = -(-data.size // args.batchsize)
        self.step, self.last, self.read_at = 0, ENDLESS, set()
        self.total, self.epoch, self.results = Sums(), Sums(), {}
        self.outcome, self.diverged_at = None, None
        self.before_step, self.attached, self.attached_state = None, {}, {}
        self.window, self.filled = torch.zeros(WINDOW, 3, device=data.device), 0
        self.next_checkpoint = time.monotonic() + args.checkpoint_every

    # --- the loop ---

    def windows(self, last: int, read_at: Container[int] = frozenset()) -> Iterator[Window]:
        """Train up to step `last`, giving what was measured since the reading before; `commit` each before the next.

        The device is read every WINDOW steps, at the end of each epoch, at the steps in `read_at` and at `last`.
        Nothing waits for it in between. A loss or gradient that is not finite stops the run, with the window cut
        before that step.
        """
        self.last, self.read_at = last, read_at
        if self.filled and self._reading_point():  # stopped between a window's last step and its reading
            yield from self._read()
        while self.step < self.last and not self.outcome:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            for x, y in self.data.epoch(epoch, self.args.batchsize, start):
                self._advance(x, y)
                if self._reading_point():
                    yield from self._read()
                    if self.step >= self.last or self.outcome:
                        break

    def commit(self, window: Window) -> None:
        """Count a window, and begin the next. From here on a checkpoint holds it as done.

        So whatever belongs to its last step and can be interrupted (evaluating, measuring) comes before: then a run
        that is stopped there still has the window, and does that again when it is resumed.
        """
        if self.total.steps % self.steps_per_epoch == 0:
            self.epoch = Sums()
        self.total.add(window)
        self.epoch.add(window)
        self.filled = 0

    def stop(self, outcome: str, diverged_at: int | None = None) -> None:
        """End the run with the window in hand, not yet committed: the only way to end before `last`.

        outcome: `finished` or `diverged`, as in summary.json.
        """
        self.outcome, self.diverged_at = outcome, diverged_at
        self.save()

    def eager_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on images x (b, 3, 32, 32) and labels y (b,); loss, ‖g_t‖ and hits, still on the device."""
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        norm = gradient_norm([p.grad for p in self.model.parameters()])
        self.update()
        return torch.stack([loss.detach(), norm, (logits.argmax(1) == y).sum()])

    def update(self) -> None:
        """x ← x − η (d_t + u_t), with the gradients now held; u_t is the noise of --injected_noise."""
        self.optimizer.step()
        if self.args.injected_noise:
            self.inject()

    @torch.no_grad()
    def inject(self) -> None:
        """x ← x − η u_t, for what a step moves. Momentum never sees u_t."""
        moved = [p for p in self.model.parameters() if p.grad is not None]
        u = isotropic(moved, self.args.injected_noise, self.noise_generator())
        torch._foreach_add_(moved, u, alpha=-self.args.lr)

    def noise_generator(self, *draw: int) -> torch.Generator:
        """That of u_t, at the present step, or of the u of a draw there, by its number from 1 on."""
        return self.data.generator(INJECTING, self.step, *draw)

    def autocast(self) -> torch.autocast:
        """The precision of forward passes: bfloat16 where that is safe under --precision bf16, else untouched."""
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The mini-batch that the next step takes."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        return next(self.data.epoch(epoch, self.args.batchsize, start))

    def _advance(self, x: Tensor, y: Tensor) -> None:
        if self.before_step:
            self.before_step()
        self.window[self.filled] = self.train_step(x, y)
        self.filled += 1
        self.step += 1
        if self.record:
            self.record.bar.update()
        self.check_signals()
        if time.monotonic() >= self.next_checkpoint:
            self.save()

    def _reading_point(self) -> bool:
        by_rule = self.step % WINDOW == 0 or self.step % self.steps_per_epoch == 0
        return by_rule or self.step == self.last or self.step in self.read_at

    def _read(self) -> Iterator[Window]:
        losses, norms, hits = self.window[: self.filled].cpu().double().numpy().T
        steps = np.arange(self.step - self.filled + 1, self.step + 1)
        left_over = self.data.size - (self.steps_per_epoch - 1) * self.args.batchsize
        sizes = np.where(steps % self.steps_per_epoch == 0, left_over, self.args.batchsize)
        window = Window(steps, losses, norms, hits, sizes)
        bad = np.flatnonzero(~np.isfinite(losses + norms))
        if bad.size:
            self.stop("diverged", int(steps[bad[0]]))
            window = window.until(self.diverged_at - 1)
        elif self.step >= self.last:
            # From before the last window is counted: taken up again for more, a run goes on as one that had been
            # asked for all of it at once.
            self.save()
        if window.steps.size:
            yield window
        if self.filled and window.steps.size:
            raise RuntimeError("a window must be committed before the next")
        self.filled = 0

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy in percent and mean loss over the test images, in evaluation mode; reads the device once."""
        totals = torch.zeros(2, device=self.data.device)
        with unchanged(self.model, training=False), self.autocast():
            for x, y in self.data.test(min(max(self.args.batchsize, 100), 1000)):
                self.check_signals()
                logits = self.model(x).float()
                totals += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
        hits, loss = totals.tolist()
        return 100 * hits / len(self.data.y_test), loss / len(self.data.y_test)

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint. An epoch's permutation and augmentation follow from the seed and the step alone."""
        if self.record is None:
            return
        cuda = [torch.cuda.get_rng_state(self.data.device)] if self.data.device.type == "cuda" else []
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": self.window[: self.filled].cpu(),
            "random": [torch.get_rng_state(), *cuda],
            "step": self.step,
            "total": asdict(self.total),
            "epoch": asdict(self.epoch),
            "results": self.results,
            "attached": {name: each.state_dict() for name, each in self.attached.items()},
        }
        self.record.save_checkpoint(content)
        self.next_checkpoint = time.monotonic() + self.args.checkpoint_every

    def load(self, content: dict) -> None:
        """Go back to where `save` was called."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.filled = len(content["window"])
        self.window[: self.filled] = content["window"]
        torch.set_rng_state(content["random"][0])
        for state in content["random"][1:]:
            if self.data.device.type == "cuda":
                torch.cuda.set_rng_state(state, self.data.device)
        self.step, self.results = content["step"], content["results"]
        self.attached_state = content["attached"]
        self.total, self.epoch = Sums(**content["total"]), Sums(**content["epoch"])

    # --- rows of metrics.csv ---

    def log_window(self, window: Window, shown: dict | None = None) -> None:
        """Record the mean, minimum and maximum over a committed window, so that no excursion hides.

        shown: what the dashboard is to show beside them.
        """
        row = {
            "training_loss": float(window.losses @ window.sizes / window.sizes.sum()),
            "g-norm": float(window.norms.mean()),
            "min_g-norm": float(window.norms.min()),
            "max_g-norm": float(window.norms.max()),
            "ave-norm": self.total.norm / self.total.steps,
        }
        self.log(row, shown)

    def log(self, row: dict, shown: dict | None = None) -> None:
        """Record one row at the last step committed; as a line of progress too where an epoch or the run ends."""
        step = self.total.steps
        row = {"steps": step, "epoch": step / self.steps_per_epoch} | row
        over = step % self.steps_per_epoch == 0 or step >= self.last or self.outcome is not None
        self.record.log(row, over, shown or {})
