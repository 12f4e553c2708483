"""How fast a step is: ours beside the bare PyTorch step, on random inputs.

bare  forward, backward and update by torch.optim.SGD, on one batch that is on the device: what no loop can beat
ours  main.normal and main.critical as they are, records included, but without wandb and evaluation

Each side and round is a process of its own, which times a block of as many steps; the sides take turns. Shown are
medians over the rounds, also of the ratios. Any other flag goes to main.py (--device, --cuda_graph).
Exit status: 0 all is measured, 1 something is not, 2 bad argument.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import count
from math import ceil
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import numpy as np
import torch
import torch._dynamo  # an optimizer loads it, in a second: here, so that a forked side need not
import torch.nn.functional as F

import arguments
import main
import models
import utils
from datasets import DATASETS
from training.data import BLOCK, Data
from training.loop import Training
from training.record import Record

FIXED = ["--lr", "1e-4", "--wandb_mode", "disabled", "--checkpoint_every", "1e9", "--name", "bench"]
MODES = {
    "normal": ["--mode", "normal", "--epochs", "1000000000"],
    "critical": ["--mode", "critical", "--min_epochs", "0", "--eps", "1e-9", "2e-9", "3e-9"],
}
WARM = 6  # steps before a block
TABLE = "{:16} {:>5} {:8} {:8} {:>9} {:>9}  {}"
HEAD = ("network", "b", "mode", "side", "ms a step", "inputs/s", "ours is as fast")


class Clock:
    """Reads the time where a block of steps begins and ends."""

    def __init__(self, device: torch.device, steps: int):
        self.device, self.marks, self.times = device, [WARM, WARM + steps], []

    def at(self, made: int) -> None:
        """So many steps are made. Raises Stopped at the end of the block, as a signal would."""
        if made == self.marks[len(self.times)]:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.times.append(time.perf_counter())
        if len(self.times) == 2:
            raise utils.Stopped(0)


def bare(args: Namespace, data: Data, clock: Clock) -> None:
    """Nothing but the network and the optimizer, on one batch."""
    model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.beta1)
    x, y = next(data.epoch(0, args.batchsize))
    for made in count(1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        clock.at(made)


def ours(args: Namespace, data: Data, clock: Clock) -> None:
    """main.py's own loop with its record. RuntimeError if training diverges."""
    record = Record(args)
    record.claim(data.checksum)
    run = Training(args, data, record, SimpleNamespace(check=lambda: clock.at(run.step)))  # asked after every step
    record.begin(data.device, 0)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for this process)
    run.evaluate = lambda: {"accuracy": 0.0, "test_loss": 0.0}
    main.EXPERIMENTS[args.mode](run)
    raise RuntimeError(f"{run.outcome} at step {run.step}: nothing to measure")


SIDES = {"bare": bare, "ours": ours}


def random_data(args: Namespace, device: torch.device) -> Data:
    """As many random inputs and labels as the data set has; one to test on, as none is evaluated."""
    spec, rng = DATASETS[args.dataset], np.random.default_rng(0)
    size = (spec.train_images, *spec.shape)
    x = rng.normal(size=size).astype(np.float32) if len(spec.shape) == 1 else rng.integers(0, 256, size, np.uint8)
    y = rng.integers(0, spec.classes, spec.train_images)
    return Data(spec, {"x_train": x, "y_train": y, "x_test": x[:1], "y_test": y[:1]}, device, args.seed)


def timed(side: str, argv: list[str], steps: int) -> float:
    """Seconds a step over a block of `steps`. argv: as main.py's."""
    with tempfile.TemporaryDirectory() as directory:
        args = arguments.parse([*argv, "--runs_dir", directory])
        device = utils.pick_device(args.device)
        utils.set_up(args)  # bare has our settings of memory and backends, too
        clock = Clock(device, steps)
        with suppress(utils.Stopped):
            SIDES[side](args, random_data(args, device), clock)
    return (clock.times[1] - clock.times[0]) / steps


def apart(*what) -> float:
    """What `timed` finds in a process forked from this one, which has never computed. RuntimeError if it dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        return executor.submit(timed, *what).result()


def measure(own: Namespace, flags: list[str], model: str, b: int) -> None:
    """Print the rows of one network at one batch size: medians over the rounds."""
    dataset = "mnist1d" if models.takes(model, DATASETS["mnist1d"].shape) else "CIFAR100"
    common = ["--dataset", dataset, "--model", model, "--batchsize", str(b), *FIXED, *flags]
    for mode in own.modes:
        argv = [*common, *MODES[mode]]
        step = apart("bare", argv, 3)
        # Whole blocks of the augmentation, or some would pay for one and others not: nothing beside steps that long.
        whole = max(1, BLOCK // b) if step < own.seconds else 1
        steps = whole * ceil(own.seconds / step / whole)
        seconds = {side: [] for side in SIDES}
        for turn in range(own.rounds):
            for side in list(SIDES)[:: -1 if turn % 2 else 1]:
                seconds[side].append(apart(side, argv, steps))
        for side, each in seconds.items():
            middle, ratio = np.median(each), np.median(np.array(each) / seconds["ours"])
            row = (model, b, mode, side, f"{1e3 * middle:.4g}", round(b / middle), f"{ratio:.2f}")
            print(TABLE.format(*row), flush=True)


def command_line(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The arguments, and the flags for main.py, which checks them. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = utils.Parser(allow_abbrev=False, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--models", nargs="+", **utils.one_of(*models.NETWORKS), default=["MLP", "ResNet20"])
    add("--batchsizes", nargs="+", type=arguments.COUNT, metavar="B", help="default: 8 32 128 1024 of MLP, else 8 128")
    add("--modes", nargs="+", **utils.one_of(*MODES), default=list(MODES))
    add("--seconds", type=arguments.POSITIVE, default=0.5, help="of a block, at least (default: 0.5)")
    add("--rounds", type=arguments.COUNT, default=7, help="blocks of each side (default: 7)")
    return parser.parse_known_args(argv)


def run(argv: list[str]) -> int:
    """Measure and print what the arguments ask for. Returns the exit status. Raises UserError, OSError."""
    own, flags = command_line(argv)
    arguments.parse(flags)  # a bad flag is said once, and not by every side
    print(TABLE.format(*HEAD))
    status = 0
    for model in own.models:
        for b in own.batchsizes or ([8, 32, 128, 1024] if model == "MLP" else [8, 128]):
            try:
                measure(own, flags, model, b)
            except RuntimeError as error:  # out of memory, or a process killed: the rest goes on
                utils.say("warning", f"not measured: {model} b={b}: {error}")
                status = 1
    return status


if __name__ == "__main__":
    utils.as_command(run)
