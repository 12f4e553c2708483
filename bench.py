"""How fast, and in how much memory: this repository beside the textbook loop and the bare step.

textbook  torchvision's data set with PIL transforms in two DataLoader workers, torch.optim.SGD, loss.item() every
          step; in critical mode also a norm with .item() for each parameter, and the mean of a growing list
bare      forward, backward and update on one batch that is on the device already: what no loop can beat
ours      main.normal and main.critical as they are, records included, wandb and evaluation not; in sampling the
          full gradient, beside bare forward and backward passes over as many images. graphed: under --compile;
          saving: under --save_memory, which measures no more than normal of ours and saving, and
          counts what their passes allocate, at b = 8192 too

The sides take turns, in blocks of as many steps; before each block come a few steps that are not timed, and the
device is synchronized before a clock is read. Shown are medians over the blocks, and quartiles. Each side has a
process of its own, which waits while another's turn is: in one process they would share freed memory, and how
that is kept is most of what ours gains on a CPU. The bare step uses our memory layout and settings.
Every side stands at step 1 thousand; critical, at the smallest batch size, also at step 1 million. Peak memory is
that of a side's process at the end: resident on the CPU (without DataLoader's workers), reserved on CUDA.
The images are CIFAR-100's if <data_dir>/CIFAR100.npz exists, else random ones of that shape: no download.

Before a release: `python bench.py --quick --check`, on a machine that does nothing else. It takes less than two
minutes on two cores, and exits with 1 if a ratio is below its generous bound. It measures time: not for CI.
"""

import argparse
import copy
import io
import os
import resource
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from itertools import islice
from math import ceil
from multiprocessing import get_context, parent_process, set_start_method
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100

import arguments
import data as datasets
import main
import models
import noise
import training
import utils
from record import Record
from shb import SHB

QUICK = {"models": ["ResNet20"], "batchsizes": [8, 128], "seconds": 0.5, "rounds": 3, "full_grad_batchsize": 125}
MODES, EARLY, LATE = ("normal", "critical", "sampling"), 1000, 1_000_000  # EARLY, LATE: steps made before
# What ours has to be of another side, at least, in speed and in (the other's over its own) memory.
BOUNDS = {"over_textbook": 0.9, "over_bare": 0.7, "over_normal": 0.85, "over_early": 0.8}
BOUNDS |= {"bare_memory": 0.75, "early_memory": 0.85}


def textbook(args: argparse.Namespace, data: datasets.Data) -> Callable[[int], None]:
    """Training as it is commonly written: a function that makes so many more steps."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    model, device = models.build(args.model, data.spec.classes).to(data.device), data.device
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.beta1)
    augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(data.spec.angle)]
    scale = [T.ToTensor(), T.Normalize(data.spec.mean, data.spec.std)]
    images = CIFAR100.__new__(CIFAR100)  # torchvision's own, but not from its files
    images.data, images.targets = data.pixels.view(-1, 32, 32, 3).cpu().numpy(), data.y_train.tolist()
    images.transform, images.target_transform = T.Compose(augment * data.spec.augmented + scale), None
    pinned = data.device.type == "cuda"
    loader = DataLoader(images, args.batchsize, True, num_workers=2, persistent_workers=True, pin_memory=pinned)
    batches = (batch for epoch in iter(int, 1) for batch in loader)
    losses, norms = [], [9.0] * args.start

    def block(steps: int) -> None:
        for x, y in islice(batches, steps):
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

    return block


def bare(args: argparse.Namespace, data: datasets.Data) -> Callable[[int], None]:
    """Nothing but the network, on one batch; in sampling without updates, so that gradients add up."""
    torch.manual_seed(args.seed)
    model = models.build(args.model, data.spec.classes).to(data.device, memory_format=data.layout)
    optimizer = SHB(model.parameters(), lr=args.lr, momentum=args.beta1)
    x, y = next(data.epoch(0, args.batchsize))

    def block(steps: int) -> None:
        for _ in range(steps):
            F.cross_entropy(model(x), y).backward()
            if args.mode != "sampling":
                optimizer.step()
                optimizer.zero_grad()

    return block


def ours(args: argparse.Namespace, data: datasets.Data) -> Callable[[int], None]:
    """main.py's own loop over its own Training, stopped and continued. RuntimeError if training diverges."""
    # Where a block ends, the epoch begun goes on in the next, and there is nothing to evaluate, as in a longer run.
    view, begun = copy.copy(data), {}

    def epoch(number: int, batchsize: int, start: int):
        if start == 0 or number not in begun:
            begun.clear()
            begun[number] = data.epoch(number, batchsize, start)
        return begun[number]

    view.epoch, view.test = epoch, lambda batchsize: ()
    record = Record(args)
    record.claim(data.checksum)
    run = training.Training(args, view, record, None)
    run.save = lambda: None  # it is written every five minutes, and not after every block
    run.step, run.sums = args.start, {"steps": args.start, "norm": 9.0 * args.start, "max_norm": 9.0}
    with redirect_stderr(io.StringIO()):  # not a terminal: no progress bar
        record.begin(data.device, 0)
    rng = np.random.default_rng(0)
    columns = ("training_loss", "g-norm", "min_g-norm", "max_g-norm", "ave-norm")
    for window in range(args.start // training.WINDOW):  # the record as it is after so many steps
        row = {"steps": training.WINDOW * (window + 1), "epoch": rng.random()}
        record.log(row | dict(zip(columns, rng.random(5).tolist(), strict=True)), show=False)
    if args.mode == "critical":
        record.append_norms(np.full(args.start, 9.0))

    def block(steps: int) -> None:
        if args.mode == "sampling":
            chunks = islice(data.full_pass(0, args.batchsize), steps)
            noise.full_gradient(run.model, chunks, steps * args.batchsize)
            return
        args.max_steps = run.step + steps
        with redirect_stdout(io.StringIO()):
            (main.normal if args.mode == "normal" else main.critical)(run)
        if run.step != args.max_steps:
            raise RuntimeError(f"training diverged at step {run.diverged_at}: nothing to measure")

    return block


SIDES = {"textbook": textbook, "bare": bare, "ours": ours, "graphed": ours, "saving": ours}


def load(args: argparse.Namespace, images: int = 50_000) -> datasets.Data:
    """CIFAR-100 if it is cached and all of it wanted, else so many random images."""
    device, rng = utils.pick_device(args.device), np.random.default_rng(0)
    if images == 50_000 and (args.data_dir / "CIFAR100.npz").exists():
        return datasets.load("CIFAR100", args.data_dir, device, args.seed)
    x, y = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, images)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:10_000], "y_test": y[:10_000]}
    return datasets.Data(datasets.SPECS["CIFAR100"], arrays, device, args.seed)


STATE = {}  # of a process of its own for one side: the function that makes steps, and the device


def begin(name: str, args: argparse.Namespace) -> float:
    """Set up one side in this process. Returns seconds from loading data to the first step made."""
    start, device = time.perf_counter(), utils.pick_device(args.device)
    if name != "textbook":
        utils.set_up(args)
    set_start_method(None, force=True)  # or else DataLoader's workers would start as this process did
    data = load(args, args.batchsize if name == "bare" else 50_000)
    STATE.update(block=SIDES[name](args, data), device=device, lead=5 if name == "textbook" else 1)
    timed(1)
    seconds = time.perf_counter() - start
    make_room()
    return seconds


def timed(steps: int) -> float:
    """Seconds a step of this process's side, from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    STATE["block"](steps)
    synchronize()
    return (time.perf_counter() - start) / steps


def synchronize() -> None:
    """Wait for this process's device."""
    if STATE["device"].type == "cuda":
        torch.cuda.synchronize(STATE["device"])
    elif STATE["device"].type == "mps":
        torch.mps.synchronize()


def make_room() -> None:
    """Leave the device's unused memory to the other sides."""
    if STATE["device"].type == "cuda":
        torch.cuda.empty_cache()


def timed_block(steps: int) -> float:
    """As `timed`, after as many untimed batches as DataLoader's workers have ready after a pause."""
    timed(STATE["lead"])
    seconds = timed(steps)
    make_room()
    return seconds


def leave_with_parent() -> None:
    """End this process when the one that measures is gone, however it ended."""
    gone = parent_process().sentinel
    threading.Thread(target=lambda: (wait([gone]), os._exit(1)), daemon=True).start()


def peak() -> int:
    """Peak memory of this process in bytes: resident on the CPU; on CUDA what it reserved, as a graph's counts too."""
    if STATE["device"].type == "cuda":
        return torch.cuda.max_memory_reserved(STATE["device"])
    if STATE["device"].type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alternate(pools: dict, size: int, images: int, seconds: float, rounds: int) -> dict:
    """For each side, the seconds that a step of `images` of `size` images took in each of `rounds` blocks.

    A block lasts about `seconds` on the first side, and has as many steps on every other.
    """
    probe = next(iter(pools.values())).submit(timed_block, 1).result()
    # Whole augmentation blocks, or else some would pay for one and others not: nothing beside steps that long.
    whole = max(1, datasets.BLOCK // images) if probe < seconds else 1
    steps = min(whole * ceil(seconds / probe / whole), size // images)
    times = {side: [] for side in pools}
    for turn in range(rounds):
        for side in list(pools)[:: -1 if turn % 2 else 1]:
            times[side].append(pools[side].submit(timed_block, steps).result())
    return times


def measure(args: argparse.Namespace, data: datasets.Data, model: str, images: int, sides: list[tuple]) -> list[dict]:
    """One row a side, all with one network and `images` images a step. sides: name, mode, steps made before."""
    context = get_context("forkserver")  # its children start small, whatever this process has become
    context.set_forkserver_preload(["torch", "torchvision", "torch.utils.data"])
    held = sum(t.nbytes for t in (data.pixels, data.y_train, data.x_test, data.y_test))
    each, rows = {}, []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        for side in sides:
            name, mode, start = side
            argv = ["--model", model, "--batchsize", images, "--mode", mode, "--device", args.device, "--lr", 1e-4]
            argv += ["--data_dir", args.data_dir, "--runs_dir", directory, "--name", f"{name}-{mode}-{start}"]
            argv += ["--eps", 1e-9, 2e-9, 3e-9, "--epochs", 10**9, "--checkpoint_every", 1e9]
            argv += ["--wandb_mode", "disabled", *["--compile"] * (name == "graphed")]
            argv += ["--save_memory"] * (name == "saving")
            each[side] = arguments.parse([*map(str, argv)])
            each[side].start = start
        pools = {side: stack.enter_context(ProcessPoolExecutor(1, context, leave_with_parent)) for side in sides}
        first = {side: pools[side].submit(begin, side[0], each[side]).result() for side in sides}
        times = alternate(pools, data.size, images, args.seconds, args.rounds)
        peaks = {side: pools[side].submit(peak).result() for side in sides}
        for side in sides:
            low, seconds, high = np.percentile(times[side], (25, 50, 75)).tolist()
            row = dict(zip(("side", "mode", "start"), side, strict=True)) | {"model": model, "images_a_step": images}
            row |= {"seconds_a_step": seconds, "quartiles": [low, high], "steps_a_second": 1 / seconds}
            row |= {"images_a_second": images / seconds, "us_an_image": 1e6 * seconds / images, "ratios": {}}
            row |= {"peak_bytes": peaks[side], "seconds_to_first_step": first[side]}
            name, mode, start = side
            bare_mode = "sampling" if mode == "sampling" else "normal"
            others = {"textbook": ("textbook", mode, start), "bare": ("bare", bare_mode, EARLY)}
            others |= {"normal": (name, "normal", EARLY), "early": (name, mode, EARLY)}
            for key, other in others.items():
                if name in ("ours", "graphed") and other in times and other != side:
                    row["ratios"][f"over_{key}"] = float(np.median(times[other])) / seconds
                    if key in ("bare", "early"):
                        allowed = peaks[other] + held * (key == "bare")
                        row["ratios"][f"{key}_memory"] = allowed / peaks[side]
            if name == "ours" and mode == "critical":
                row["record_bytes_a_million_steps"] = record_size(each[side], data)
            rows.append(row)
    return rows


def record_size(args: argparse.Namespace, data: datasets.Data) -> float:
    """Bytes that a million steps add to a record of critical: gradient norms, and rows by the window and epoch."""
    lines = (args.runs_dir / args.name / "metrics.csv").read_bytes().splitlines(keepends=True)[1:]
    return 4e6 + (1e6 / training.WINDOW + 1e6 * args.batchsize / data.size) * sum(map(len, lines)) / len(lines)


class LiveBytes(TorchDispatchMode):
    """Counts the tensors made while it is active: `live`, their bytes now, and `most`, the most there were."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage until it is freed, if it is new."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """Take a freed storage away."""
        self.known.discard(key)
        self.live -= size


def counted(model: str, images: int, side: str) -> dict:
    """Bytes that a forward and backward pass of `images` images allocates, weights not counted; exact, and at no cost.

    kept_bytes: alive between the two passes. most_bytes: at most. The networks hold no data (torch's meta device);
    what a convolution's kernel needs for itself is not in it.
    """
    with torch.device("meta"):
        network = models.build(model, 100)
        x, y = torch.empty(images, 3, 32, 32), torch.empty(images, dtype=torch.int64)
    if side == "saving":
        models.save_memory(network)
    with LiveBytes() as count:
        loss = F.cross_entropy(network(x), y)
        kept = count.live
        torch.autograd.grad(loss, list(network.parameters()))
    return {"model": model, "side": side, "images": images, "kept_bytes": kept, "most_bytes": count.most}


def label(row: dict) -> str:
    """What a row is about."""
    late = f" at step {row['start']:,}" if row["start"] == LATE else ""
    return f"{row['model']} b={row['images_a_step']} {row['side']} {row['mode']}{late}"


def line(row: dict) -> str:
    """A row as a line of the table."""
    low, median, high = (1e3 * t for t in (row["quartiles"][0], row["seconds_a_step"], row["quartiles"][1]))
    text = f"{label(row):49} {median:9.3f} {f'({low:.3f}-{high:.3f})':>19} {row['steps_a_second']:8.4g}"
    text += f" {row['images_a_second']:8.0f} {row['peak_bytes'] / 1e6:7.0f} {row['seconds_to_first_step']:6.1f}"
    return text + "".join(f" {row['ratios'].get(key, float('nan')):7.3f}" for key in BOUNDS).replace("nan", "  -")


HEADER = f"{'':49} {'ms a step':>9} {'(quartiles)':>19} {'steps/s':>8} {'images/s':>8} {'peak MB':>7} {'1st, s':>6}"
HEADER += "".join(f" {word:>7}" for word in ("/textb.", "/bare", "/normal", "/early", "memory", "/early"))


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked arguments. Raises UserError."""
    count = arguments.number(int, "a whole number of at least 1", lambda v: v >= 1)
    images = arguments.number(int, "a whole number from 1 to 50000", lambda v: 1 <= v <= 50_000)
    positive = arguments.number(float, "a finite number above 0", lambda v: v > 0)
    parser = arguments.Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=arguments.MODELS, default=["ResNet18"])
    add("--batchsizes", nargs="+", type=images, default=[8, 128], metavar="B")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--full_grad_batchsize", "--full-grad-batchsize", type=images, default=1000, metavar="B", help="for sampling")
    add("--device", type=arguments.device, default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--data_dir", "--data-dir", type=arguments.path, default=Path("data"), metavar="DIR")
    add("--seconds", type=positive, default=2.0, help="of a block, at least")
    add("--rounds", type=count, default=7, help="blocks of each side")
    add("--compile", action="store_true", help="CUDA: measure the captured graph too")
    add("--save_memory", "--save-memory", action="store_true", help="measure only what it saves, and costs")
    add("--out", type=arguments.path, default=Path("bench.json"), metavar="FILE", help="where the JSON goes")
    add("--quick", action="store_true", help="other defaults: under two minutes on two cores")
    add("--check", action="store_true", help="exit with 1 if a ratio is below its bound")
    parser.set_defaults(seed=0, precision="default", deterministic=False, **(QUICK if "--quick" in argv else {}))
    args = parser.parse_args(argv)
    if args.compile and utils.pick_device(args.device).type != "cuda":
        raise arguments.UserError("argument --compile: it captures a CUDA graph, and the device is another")
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise arguments.UserError(f"argument --out: got '{args.out}', allowed is a file in a directory to write to")
    return args


def points(args: argparse.Namespace) -> list[tuple]:
    """What is to be measured together: a network, images a step, and the sides as `measure` takes them."""
    if args.save_memory:
        sides = [("ours", "normal", EARLY), ("saving", "normal", EARLY)]
        return [(model, images, sides) for model in args.models for images in args.batchsizes]
    names, found = ("textbook", "ours", *["graphed"] * args.compile), []
    for model in args.models:
        for images in args.batchsizes:
            sides = [(name, mode, EARLY) for mode in MODES[:2] if mode in args.modes for name in names]
            if "critical" in args.modes and images == min(args.batchsizes):
                sides += [(name, "critical", LATE) for name in names]
            found += [(model, images, [("bare", "normal", EARLY), *sides])] if sides else []
        if "sampling" in args.modes:
            sides = [("bare", "sampling", EARLY), ("ours", "sampling", EARLY)]
            found.append((model, args.full_grad_batchsize, sides))
    return found


def run(argv: list[str]) -> int:
    """Measure, print and write what the arguments ask for. Returns the exit status; raises UserError."""
    args = parse(argv)
    device, rows = utils.pick_device(args.device), []
    utils.set_up(args)
    data, failed = load(args), []
    machine = utils.environment(device) | {"cores": os.cpu_count(), "real": (args.data_dir / "CIFAR100.npz").exists()}
    content = {"environment": machine, "arguments": vars(args), "rows": rows, "failed": failed}
    print(f"{machine}\n{HEADER}")
    for model, images, sides in points(args):
        try:
            found = measure(args, data, model, images, sides)
        except RuntimeError as error:  # out of memory, a side's process killed, training diverged: the rest goes on
            failed.append(f"{model} b={images} {sides[-1][1]}: {type(error).__name__}: {error}")
            arguments.say("warning", f"not measured: {failed[-1]}")
            continue
        rows += found
        print(*map(line, found), sep="\n", flush=True)
        utils.write_json(args.out, content)  # so that what is measured outlives whatever comes
    sizes = [*args.batchsizes, 8192] if args.save_memory else []
    content["counted"] = [
        counted(model, b, name) for model in args.models for b in sizes for name in ("ours", "saving")
    ]
    for row in content["counted"]:
        text = f"{row['kept_bytes'] / 1e9:.3g} GB kept for the backward pass, {row['most_bytes'] / 1e9:.3g} GB at most"
        print(f"{row['model']} b={row['images']} {row['side']}: {text} (counted, not measured)")
    # Few blocks contain the start of an epoch, so it is shown by itself.
    STATE.update(block=lambda number: next(data.epoch(number, 1)), device=device)
    epoch = min(timed(1) for _ in range(5))
    utils.write_json(args.out, content | {"seconds_to_begin_an_epoch": epoch})
    print(f"to begin an epoch: {1e3 * epoch:.1f} ms\nwritten: {args.out}")
    ratios = [(label(row), key, value) for row in rows for key, value in row["ratios"].items()]
    low = [f"{name}: {key} is {value:.3f}, below {BOUNDS[key]}" for name, key, value in ratios if value < BOUNDS[key]]
    if args.check:
        missing = [f"not measured: {point}" for point in failed]
        print("check: " + ("; ".join(low + missing) or "every ratio is within its bound"))
    return int(bool(failed) or (args.check and bool(low)))


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except arguments.UserError as error:
        arguments.say("error", error)
        sys.exit(2)
