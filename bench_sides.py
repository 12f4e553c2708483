"""The sides that bench.py compares. Each is timed in a process of its own, which prints what it found as JSON.

`python bench_sides.py SIDE STEP STEPS …`: a block of STEPS steps, which begins at step STEP; then flags of main.py.
"""

import json
import os
import resource
import sys
import threading
import time
from argparse import Namespace
from contextlib import suppress
from itertools import chain, count, repeat
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import arguments
import datasets
import main
import models
import utils
from data import Data
from measure.gradients import full_gradient
from record import Record
from shb import SHB
from training import WINDOW, Training, Window


class Clock:
    """Reads the time now, after the first step, and where the block begins and ends; then it stops the side.

    A side tells it after each step how many it has made. The block begins after `begin` of them, at least 2.
    """

    def __init__(self, device: torch.device, begin: int, steps: int):
        self.device, self.marks = device, [1, begin, begin + steps]
        self.times = [time.perf_counter()]

    def at(self, made: int) -> None:
        """So many steps are made. Raises Stopped at the end of the block, as a signal would."""
        if made != self.marks[len(self.times) - 1]:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())
        if made == self.marks[-1]:
            raise utils.Stopped(0)


def textbook(args: Namespace, data: Data, clock: Clock, start: int) -> None:
    """Training as it is commonly written."""
    import torchvision.transforms as T
    from torchvision.datasets import CIFAR100

    torch.backends.cudnn.benchmark = True
    device = data.device
    model = models.build(args.model, data.spec.classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.beta1)
    augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(data.spec.angle)]
    scale = [T.ToTensor(), T.Normalize(data.spec.mean, data.spec.std)]
    images = CIFAR100.__new__(CIFAR100)  # torchvision's own, but not from its files
    images.data, images.targets = data.pixels.view(-1, 32, 32, 3).cpu().numpy(), data.y_train.tolist()
    images.transform, images.target_transform = T.Compose(augment * data.spec.augmented + scale), None
    pinned = device.type == "cuda"
    loader = DataLoader(images, args.batchsize, True, num_workers=2, persistent_workers=True, pin_memory=pinned)
    losses, norms = [], [9.0] * start
    for made, (x, y) in enumerate(chain.from_iterable(repeat(loader)), 1):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if args.mode == "critical":
            norms.append(sum(p.grad.norm().item() ** 2 for p in model.parameters()) ** 0.5)
            if sum(norms) / len(norms) <= min(args.eps):
                break
        optimizer.step()
        losses.append(loss.item())
        clock.at(made)


def bare(args: Namespace, data: Data, clock: Clock, start: int) -> None:
    """Nothing but the network, on one batch; in sampling without updates, so that gradients add up."""
    model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
    optimizer = SHB(model.parameters(), lr=args.lr, momentum=args.beta1)
    x, y = next(data.epoch(0, args.batchsize))
    for made in count(1):
        F.cross_entropy(model(x), y).backward()
        if args.mode != "sampling":
            optimizer.step()
            optimizer.zero_grad()
        clock.at(made)


def full_pass(args: Namespace, data: Data, clock: Clock) -> None:
    """The full gradient as main.sampling has it, pass after pass; a step is a chunk."""

    def chunks():
        passes = (data.full_pass(number, args.batchsize) for number in count())
        for made, chunk in enumerate(chain.from_iterable(passes)):
            clock.at(made)
            yield chunk

    full_gradient(Training(args, data, None, None).model, chunks(), data.size)


def ours(args: Namespace, data: Data, clock: Clock, start: int) -> None:
    """main.py's own loop over its own Training, put at step `start`. RuntimeError if training diverges."""
    if args.mode == "sampling":
        full_pass(args, data, clock)
    record = Record(args)
    record.claim(data.checksum)
    # A run asks after every step whether a signal has come.
    run = Training(args, data, record, SimpleNamespace(check=lambda: clock.at(run.step - start)))
    record.begin(data.device, start)
    run.step = start
    past = made_up(start, args.batchsize)
    run.commit(past)
    if args.mode == "critical":  # with the record that such a run has
        record.append_norms(past.norms)
        for _ in range(start // WINDOW):
            run.log_window(past.until(WINDOW))
    with suppress(utils.Stopped):
        main.EXPERIMENTS[args.mode](run)
    if run.outcome or not run.window[: run.filled].isfinite().all():
        raise RuntimeError(f"training diverged before step {run.step}: nothing to measure")


def made_up(steps: int, images: int) -> Window:
    """What so many steps may have measured."""
    losses, norms, hits = 1 + np.random.default_rng(0).random((3, steps))
    return Window(np.arange(1, steps + 1), losses, norms, hits, np.full(steps, images))


SIDES = {"textbook": textbook, "bare": bare, "ours": ours}


def load(args: Namespace, device: torch.device) -> Data:
    """CIFAR-100 if it is cached, else as many random images. One is left to test on, which takes no time."""
    spec, rng = datasets.DATASETS["CIFAR100"], np.random.default_rng(0)
    if (args.data_dir / "CIFAR100.npz").exists():
        arrays = datasets.read("CIFAR100", args.data_dir)
    else:
        x = rng.integers(0, 256, (spec.train_images, 32, 32, 3), dtype=np.uint8)
        arrays = {"x_train": x, "y_train": rng.integers(0, spec.classes, spec.train_images)}
    arrays |= {"x_test": arrays["x_train"][:1], "y_test": arrays["y_train"][:1]}
    return Data(spec, arrays, device, args.seed)


def timed(side: str, step: int, steps: int, argv: list[str]) -> dict:
    """Seconds a step, seconds to the first step, and peak memory in bytes: resident, or reserved on CUDA.

    step: where the block of `steps` steps begins. argv: as main.py's. RuntimeError if the side cannot be made.
    """
    args = arguments.parse(argv)
    device = utils.pick_device(args.device)
    begin = 6 if side == "textbook" else 2  # of the textbook's batches, four are ready beforehand
    clock = Clock(device, begin, steps)
    if side == "textbook":
        torch.manual_seed(args.seed)
    else:
        utils.set_up(args)
    with suppress(utils.Stopped):
        SIDES[side](args, load(args, device), clock, step - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)  # a captured graph's too
    start, first, block, end = clock.times
    return {"seconds_a_step": (end - block) / steps, "seconds_to_first_step": first - start, "peak_bytes": peak}


if __name__ == "__main__":
    # stdin is a pipe of bench.py's, in which nothing comes; it ends when that process does, however that may be.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    side, step, steps, *argv = sys.argv[1:]
    print("\n" + json.dumps(timed(side, int(step), int(steps), argv)))
