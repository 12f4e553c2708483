"""How fast a step is: ours beside the bare PyTorch step and the textbook's loop, on random inputs.

bare      forward, backward and update by torch.optim.SGD, on one batch that is on the device: what no loop can beat
textbook  torch.optim.SGD, loss.item() every step, and a DataLoader, of images with torchvision's PIL transforms in two
          workers; in critical mode also a norm with .item() for each parameter, and the mean of a growing list
ours      main.normal and main.critical as they are, records included, but without wandb and evaluation

Each side and round is a process of its own, which times a block of as many steps; the sides take turns. Shown are
medians over the rounds, also of the ratios, and quartiles; MB is the peak of a process: resident, or reserved on CUDA.
Any other flag goes to main.py (--device, --cuda_graph).
Exit status: 0 all is measured, 1 something is not, 2 bad argument.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, count, repeat
from math import ceil
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import numpy as np
import torch
import torch._dynamo  # an optimizer loads it, in a second: here, so that a forked side need not
import torch.nn.functional as F
import torchvision.transforms as T
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR100

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
WARM = 6  # steps before a block: of the textbook's batches, four are ready beforehand
TABLE = "{:16} {:>5} {:8} {:8} {:>9} {:>19} {:>9} {:>6}  {}"
HEAD = ("network", "b", "mode", "side", "ms a step", "(quartiles)", "inputs/s", "MB", "ours is as fast")


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


def loader(args: Namespace, data: Data) -> DataLoader:
    """The textbook's."""
    if len(data.spec.shape) == 1:
        return DataLoader(TensorDataset(data.x_train.cpu(), data.y_train.cpu()), args.batchsize, shuffle=True)
    steps = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(data.spec.angle)]
    steps += [T.ToTensor(), T.Normalize(data.spec.mean, data.spec.std)]
    images = CIFAR100.__new__(CIFAR100)  # torchvision's own, but not from its files
    images.data, images.targets = data.x_train.cpu().numpy(), data.y_train.tolist()
    images.transform, images.target_transform = T.Compose(steps), None
    workers = {"num_workers": 2, "persistent_workers": True, "pin_memory": data.device.type == "cuda"}
    return DataLoader(images, args.batchsize, shuffle=True, **workers)


def textbook(args: Namespace, data: Data, clock: Clock) -> None:
    """Training as it is commonly written."""
    model = models.build(args.model, data.spec.classes).to(data.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.beta1)
    losses, norms = [], []
    for made, (x, y) in enumerate(chain.from_iterable(repeat(loader(args, data))), 1):
        x, y = x.to(data.device, non_blocking=True), y.to(data.device, non_blocking=True)
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


SIDES = {"bare": bare, "textbook": textbook, "ours": ours}


def random_data(args: Namespace, device: torch.device) -> Data:
    """As many random inputs and labels as the data set has; one to test on, as none is evaluated."""
    spec, rng = DATASETS[args.dataset], np.random.default_rng(0)
    size = (spec.train_images, *spec.shape)
    x = rng.normal(size=size).astype(np.float32) if len(spec.shape) == 1 else rng.integers(0, 256, size, np.uint8)
    y = rng.integers(0, spec.classes, spec.train_images)
    return Data(spec, {"x_train": x, "y_train": y, "x_test": x[:1], "y_test": y[:1]}, device, args.seed)


def timed(side: str, argv: list[str], steps: int) -> dict:
    """Seconds a step over a block of `steps`, peak memory in bytes, and the environment. argv: as main.py's."""
    with tempfile.TemporaryDirectory() as directory:
        args = arguments.parse([*argv, "--runs_dir", directory])
        device = utils.pick_device(args.device)
        if side != "textbook":
            utils.set_up(args)  # bare has our settings of memory and backends
        clock = Clock(device, steps)
        with suppress(utils.Stopped):
            SIDES[side](args, random_data(args, device), clock)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else resident
    seconds = (clock.times[1] - clock.times[0]) / steps
    return {"seconds_a_step": seconds, "peak_bytes": peak, "environment": utils.environment(device)}


def apart(*what) -> dict:
    """What `timed` finds in a process forked from this one, which has never computed. RuntimeError if it dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        return executor.submit(timed, *what).result()


def measure(own: Namespace, flags: list[str], model: str, b: int) -> tuple[list[dict], dict]:
    """A row for each side and mode, of one network at one batch size; and what ran them."""
    dataset = "mnist1d" if models.takes(model, DATASETS["mnist1d"].shape) else "CIFAR100"
    common = ["--dataset", dataset, "--model", model, "--batchsize", str(b), *FIXED, *flags]
    argv = {mode: [*common, *MODES[mode]] for mode in own.modes}
    sides = [("bare", own.modes[0])] + [(side, mode) for mode in own.modes for side in ("textbook", "ours")]
    step = apart("bare", argv[own.modes[0]], 3)["seconds_a_step"]
    # Whole blocks of the augmentation, or some would pay for one and others not: nothing beside steps that long.
    whole = max(1, BLOCK // b) if step < own.seconds else 1
    steps = whole * ceil(own.seconds / step / whole)
    found = {side: [] for side in sides}
    for turn in range(own.rounds):
        for side, mode in sides[:: -1 if turn % 2 else 1]:
            found[side, mode].append(apart(side, argv[mode], steps))
    seconds = {side: np.array([one["seconds_a_step"] for one in rounds]) for side, rounds in found.items()}
    rows = []
    for side, mode in sides:
        low, middle, high = np.percentile(seconds[side, mode], (25, 50, 75)).tolist()
        row = {"model": model, "batchsize": b, "mode": mode, "side": side, "steps": steps, "seconds_a_step": middle}
        row |= {"quartiles": [low, high], "peak_bytes": max(one["peak_bytes"] for one in found[side, mode])}
        for other in (sides[0], ("textbook", mode)) if side == "ours" else ():
            row[f"over_{other[0]}"] = float(np.median(seconds[other] / seconds["ours", mode]))
        rows.append(row)
    return rows, found[sides[0]][0]["environment"]


def line(row: dict) -> str:
    """A row as it is shown."""
    middle, low, high = (f"{1e3 * seconds:.4g}" for seconds in (row["seconds_a_step"], *row["quartiles"]))
    speed, memory = round(row["batchsize"] / row["seconds_a_step"]), round(row["peak_bytes"] / 1e6)
    ratios = ", ".join(f"{row[key]:.2f} × {key[5:]}" for key in row if key.startswith("over_"))
    where = (row[key] for key in ("model", "batchsize", "mode", "side"))
    return TABLE.format(*where, middle, f"({low}-{high})", speed, memory, ratios)


def command_line(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The arguments, and the flags for main.py, which checks them. Raises UserError."""
    whole = utils.number(int, "a whole number of at least 1", lambda v: v >= 1)
    positive = utils.number(float, "a finite number above 0", lambda v: v > 0)
    form = argparse.RawDescriptionHelpFormatter
    parser = utils.Parser(allow_abbrev=False, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--models", nargs="+", **utils.one_of(*models.NETWORKS), default=["MLP", "ResNet20"])
    add("--batchsizes", nargs="+", type=whole, metavar="B", help="default: 8 32 128 1024 of MLP, else 8 128")
    add("--modes", nargs="+", **utils.one_of(*MODES), default=list(MODES))
    add("--seconds", type=positive, default=0.5, help="of a block, at least (default: 0.5)")
    add("--rounds", type=whole, default=7, help="blocks of each side (default: 7)")
    add("--out", type=utils.path, default=Path("bench.json"), metavar="FILE", help="where the JSON goes")
    return parser.parse_known_args(argv)


def run(argv: list[str]) -> int:
    """Measure, print and write what the arguments ask for. Returns the exit status. Raises UserError, OSError."""
    own, flags = command_line(argv)
    arguments.parse(flags)  # a bad flag is said once, and not by every side
    content = {"environment": None, "arguments": argv, "rows": [], "failed": []}
    print(TABLE.format(*HEAD))
    for model in own.models:
        for b in own.batchsizes or ([8, 32, 128, 1024] if model == "MLP" else [8, 128]):
            try:
                rows, content["environment"] = measure(own, flags, model, b)
                content["rows"] += rows
                print(*map(line, rows), sep="\n", flush=True)
            except RuntimeError as error:  # out of memory, or a process killed: the rest goes on
                content["failed"].append(f"{model} b={b}: {error}")
                utils.say("warning", f"not measured: {content['failed'][-1]}")
            utils.write_json(own.out, content)  # so that what is measured outlives whatever comes
    return int(bool(content["failed"]))


if __name__ == "__main__":
    utils.usable_streams()
    try:
        sys.exit(run(sys.argv[1:]))
    except (utils.UserError, OSError) as error:
        utils.say("error", error)
        sys.exit(2)
