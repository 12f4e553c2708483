"""The training step and the loop around it, common to the three experiments, and its checkpoints."""

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from arguments import ENDLESS
from data import Data
from record import Record
from shb import OPTIMIZERS
from utils import Signals

WINDOW = 200  # steps between two readings of the device


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


class Training:
    """Everything of a run that moves, and so everything that a checkpoint holds.

    step: updates made. last: the step after which to end. diverged_at: number of the first step whose loss or
    gradient was not finite. sums, results: the running numbers of the experiment, plain Python values.
    The last checkpoint is from before the last window is counted: taken up again for more, a run goes on as one
    that had been asked for all of it at once.
    """

    def __init__(self, args: Namespace, data: Data, record: Record | None, signals: Signals | None):
        self.args, self.data, self.record = args, data, record
        self.check_signals = signals.check if signals else lambda: None
        torch.manual_seed(args.seed)
        self.model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
        if args.save_memory:
            models.save_memory(self.model)
        options = {} if args.optimizer == "sgd" else {"momentum": args.beta1}
        self.optimizer = OPTIMIZERS[args.optimizer](self.model.parameters(), lr=args.lr, **options)
        self.train_step = Graphed(self) if args.compile else self.eager_step
        self.steps_per_epoch = -(-data.size // args.batchsize)
        self.step, self.last, self.diverged_at = 0, ENDLESS, None
        self.sums, self.results = {"steps": 0, "norm": 0.0, "max_norm": 0.0}, {}
        self.window, self.filled = torch.zeros(WINDOW, 3, device=data.device), 0
        self.next_checkpoint = time.monotonic() + args.checkpoint_every

    def windows(self) -> Iterator[Window]:
        """Train up to step `last`, giving what was measured every WINDOW steps and at the end of each epoch.

        Nothing waits for the device in between. A loss or gradient that is not finite ends it, with the window
        cut before that step.
        """
        if self.filled and self._window_over():  # stopped between a window's last step and its reading
            yield from self._read_window()
        progress = self.record.bar.update if self.record else lambda: None
        while self.step < self.last and not self.diverged_at:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            for x, y in self.data.epoch(epoch, self.args.batchsize, start):
                self.window[self.filled] = self.train_step(x, y)
                self.filled += 1
                self.step += 1
                progress()
                self.check_signals()
                if time.monotonic() >= self.next_checkpoint:
                    self.save()
                if self._window_over():
                    yield from self._read_window()
                    if self.step >= self.last or self.diverged_at:
                        break

    def eager_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on images x (b, 3, 32, 32) and labels y (b,); loss, ‖g_t‖ and hits, still on the device."""
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        norm = gradient_norm([p.grad for p in self.model.parameters()])
        self.optimizer.step()
        return torch.stack([loss.detach(), norm, (logits.argmax(1) == y).sum()])

    def autocast(self) -> torch.autocast:
        """The precision of forward passes: bfloat16 where that is safe under --precision bf16, else untouched."""
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def _window_over(self) -> bool:
        return self.step % WINDOW == 0 or self.step % self.steps_per_epoch == 0 or self.step == self.last

    def _read_window(self) -> Iterator[Window]:
        losses, norms, hits = self.window[: self.filled].cpu().double().numpy().T
        steps = np.arange(self.step - self.filled + 1, self.step + 1)
        left_over = self.data.size - (self.steps_per_epoch - 1) * self.args.batchsize
        sizes = np.where(steps % self.steps_per_epoch == 0, left_over, self.args.batchsize)
        window = Window(steps, losses, norms, hits, sizes)
        bad = np.flatnonzero(~np.isfinite(losses + norms))
        if self.record and (bad.size or self.step >= self.last):
            self.save()
        if bad.size:
            self.diverged_at = int(steps[bad[0]])
            window = window.until(self.diverged_at - 1)
        if window.steps.size:
            yield window
        self.filled = 0  # only now: a checkpoint made until here holds the window as not yet read

    def count(self, window: Window) -> None:
        """Add a window to the sums over all steps: their number, the sum and the maximum of ‖g_t‖."""
        self.sums["norm"] = float(self.running_sums(window)[-1])
        self.sums["max_norm"] = max(self.sums["max_norm"], float(window.norms.max()))
        self.sums["steps"] += len(window.steps)

    def running_sums(self, window: Window) -> np.ndarray:
        """The sum of ‖g_t‖ over all steps up to each step of `window`, added one by one in float64.

        Its cost does not grow with the number of steps before.
        """
        return np.cumsum(np.append(self.sums["norm"], window.norms))[1:]

    def save(self) -> None:
        """Write a checkpoint. An epoch's permutation and augmentation follow from the seed and the step alone."""
        cuda = [torch.cuda.get_rng_state(self.data.device)] if self.data.device.type == "cuda" else []
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": self.window[: self.filled].cpu(),
            "random": [torch.get_rng_state(), *cuda],
            "norms_recorded": self.sums["steps"] if self.args.mode == "critical" else 0,
        }
        content |= {key: getattr(self, key) for key in ("step", "sums", "results")}
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
        for key in ("step", "sums", "results"):
            setattr(self, key, content[key])

    def log_window(self, window: Window) -> None:
        """Record the mean, minimum and maximum over a counted window, so that no excursion hides."""
        row = {
            "training_loss": float(window.losses @ window.sizes / window.sizes.sum()),
            "g-norm": float(window.norms.mean()),
            "min_g-norm": float(window.norms.min()),
            "max_g-norm": float(window.norms.max()),
            "ave-norm": self.sums["norm"] / self.sums["steps"],
        }
        self.log(row)

    def log(self, row: dict) -> None:
        """Record one row at the last step counted; as a line of progress too where an epoch or the run ends."""
        step = self.sums["steps"]
        row = {"steps": step, "epoch": step / self.steps_per_epoch} | row
        over = step % self.steps_per_epoch == 0 or step >= self.last
        self.record.log(row, show=over)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """‖g‖, Euclidean over all the tensors together (paper, section 2, mode critical); a scalar on their device.

    On the CPU the entries of an output channel, at most some thousands, are summed in float32 and the channels in
    float64: within 1e-7. One long sum in float32, as of torch's get_total_norm, is 2e-5 too small for ResNet18.
    """
    if gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)  # in two launches, and a tree of short sums
    rows = [g.flatten(1) if g.ndim > 1 else g.view(1, -1) for g in gradients]
    channels = torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows])
    return torch.linalg.vector_norm(channels, dtype=torch.float64)


class Graphed:
    """`Training.eager_step` as one captured CUDA graph for full batches; the partial last batch runs eagerly.

    The same kernels on the same memory, without Python and without a launch each. Not yet measured: see README.
    """

    def __init__(self, run: Training):
        self.run, self.graph = run, None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As `Training.eager_step`; what it returns is overwritten by the next call."""
        if len(y) < self.run.args.batchsize:
            return self.run.eager_step(x, y)
        if self.graph is None:
            self.x, self.y = x.clone(), y.clone()
            self._capture()
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.out

    def _capture(self) -> None:
        run, device = self.run, self.run.data.device
        # Warming up really trains, so what it changes is put back, in the memory that the graph will use.
        model = {k: v.clone() for k, v in run.model.state_dict().items()}
        momentum = {p: s["momentum_buffer"].clone() for p, s in run.optimizer.state.items()}
        random = torch.cuda.get_rng_state(device)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run.eager_step(self.x, self.y)
            torch.cuda.current_stream().wait_stream(stream)
            run.model.load_state_dict(model)
            for p, state in run.optimizer.state.items():
                state["momentum_buffer"].copy_(momentum[p] if p in momentum else torch.zeros_like(p))
            torch.cuda.set_rng_state(random, device)
            run.optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = run.eager_step(self.x, self.y)
