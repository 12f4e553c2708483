"""How fast, and in how much memory: this repository beside the textbook loop and the bare step.

textbook  torchvision's PIL transforms in two DataLoader workers, torch.optim.SGD, loss.item() every step; in critical
          mode also a norm with .item() for each parameter, and the mean of a growing list
bare      forward, backward and update on one batch that is on the device already: what no loop can beat
ours      main.normal and main.critical as they are, records included, wandb and the test not; in sampling the full
          gradient, beside bare forward and backward passes over as many images
graphed   ours with --compile
saving    ours with --save_memory, which measures no more than normal of ours and saving, and counts what their
          forward passes keep, at b = 8192 too

Each side and round is a process of its own (bench_sides.py): it sets up, makes some steps, times a block of steps, and
ends. The sides take turns, in blocks of as many steps. Shown are medians over the rounds, and quartiles. Every block
begins at step 1 thousand; critical, at the smallest batch size, also at step 1 million. Memory is the peak of a
process: resident on the CPU (without DataLoader's workers), reserved on CUDA. Every side holds the images, and the
bare step has our memory layout and settings. The images are CIFAR-100's if <data_dir>/CIFAR100.npz exists, else
random ones.

Before a release: `python bench.py --quick --check`, on a machine that does nothing else. It exits with 1 if a ratio is
below its generous bound. It measures time: not for CI.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import arguments
import datasets
import models
import utils
from data import BLOCK
from files import write_json
from messages import UserError, say, usable_streams
from models.recomputed import save_memory

SIDE = Path(__file__).with_name("bench_sides.py")
MODES, EARLY, LATE = ("normal", "critical", "sampling"), 1000, 1_000_000  # EARLY, LATE: where a block begins
QUICK = {"models": ["ResNet20"], "batchsizes": [8, 128], "seconds": 0.5, "rounds": 3, "full_grad_batchsize": 125}
# What ours has to be of another side, at least, in speed and in (the other's over its own) memory.
BOUNDS = {"over_textbook": 0.9, "over_bare": 0.7, "over_normal": 0.85, "over_early": 0.8}
BOUNDS |= {"bare_memory": 0.75, "early_memory": 0.85}
FLAGS = {"graphed": ["--compile"], "saving": ["--save_memory"]}  # of ours


def apart(side: str, mode: str, start: int, steps: int, flags: list) -> dict:
    """What a side finds in a process of its own. RuntimeError with its last words if it fails."""
    words = [SIDE, "ours" if side in FLAGS else side, start, steps, "--mode", mode, *flags, *FLAGS.get(side, [])]
    read, write = os.pipe()  # nothing goes through it: that it ends tells the other process that this one is gone
    with open(read), open(write, "w"), tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, *map(str, words), "--runs_dir", directory]
        done = subprocess.run(command, stdin=read, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1])
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def alternate(args: argparse.Namespace, model: str, images: int, sides: list[tuple]) -> list[dict]:
    """One row a side, all with one network and `images` images a step. sides: name, mode, where the block begins."""
    flags = ["--model", model, "--batchsize", images, "--device", args.device, "--data_dir", args.data_dir]
    flags += ["--lr", 1e-4, "--eps", 1e-9, 2e-9, 3e-9, "--epochs", 10**9, "--checkpoint_every", 1e9]
    flags += ["--wandb_mode", "disabled"]
    step = apart(*sides[0], 1, flags)["seconds_a_step"]
    # Whole augmentation blocks, or else some would pay for one and others not: nothing beside steps that long.
    whole = max(1, BLOCK // images) if step < args.seconds else 1
    steps = whole * ceil(args.seconds / step / whole)
    found = {side: [] for side in sides}
    for turn in range(args.rounds):
        for side in sides[:: -1 if turn % 2 else 1]:
            found[side].append(apart(*side, steps, flags))
    rows = []
    for (name, mode, start), rounds in found.items():
        low, seconds, high = np.percentile([one["seconds_a_step"] for one in rounds], (25, 50, 75)).tolist()
        row = {"side": name, "mode": mode, "start": start, "model": model, "images_a_step": images}
        row |= {"seconds_a_step": seconds, "quartiles": [low, high], "steps_a_second": 1 / seconds}
        row |= {"images_a_second": images / seconds, "peak_bytes": max(one["peak_bytes"] for one in rounds)}
        row["seconds_to_first_step"] = float(np.median([one["seconds_to_first_step"] for one in rounds]))
        rows.append(row)
    for row in rows:
        row["ratios"] = ratios(row, rows) if row["side"] in ("ours", "graphed") else {}
    return rows


def ratios(row: dict, rows: list[dict]) -> dict[str, float]:
    """What a row of ours is of the others of its point, in speed and memory."""
    side, mode, start = row["side"], row["mode"], row["start"]
    others = {"textbook": ("textbook", mode, start), "bare": ("bare", mode.replace("critical", "normal"), EARLY)}
    others |= {"normal": (side, "normal", EARLY), "early": (side, mode, EARLY)}
    found = {}
    for key, place in others.items():
        for other in rows:
            if place == (other["side"], other["mode"], other["start"]) and other is not row:
                found[f"over_{key}"] = other["seconds_a_step"] / row["seconds_a_step"]
                found[f"{key}_memory"] = other["peak_bytes"] / row["peak_bytes"]
    return {key: found[key] for key in BOUNDS if key in found}


def counted(model: str, images: int, side: str) -> dict:
    """Bytes that a forward pass of `images` images keeps for the backward pass, beside weights and images.

    Exact and at no cost: the network holds no data (torch's meta device).
    """
    saved = []
    with torch.device("meta"):
        network = models.build(model, 100)
        x, y = torch.empty(images, 3, 32, 32), torch.empty(images, dtype=torch.int64)
    if side == "saving":
        save_memory(network)
    with saved_tensors_hooks(saved.append, lambda nothing: None):
        F.cross_entropy(network(x), y)
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    for tensor in (x, y, *network.state_dict().values()):
        sizes.pop(tensor.untyped_storage()._cdata, None)
    return {"model": model, "side": side, "images": images, "kept_bytes": sum(sizes.values())}


def label(row: dict) -> str:
    """What a row is about."""
    late = f" at step {row['start']:,}" if row["start"] == LATE else ""
    return f"{row['model']} b={row['images_a_step']} {row['side']} {row['mode']}{late}"


def line(row: dict) -> str:
    """A row as it is shown."""
    low, high = (1e3 * seconds for seconds in row["quartiles"])
    text = f"{label(row):49} {1e3 * row['seconds_a_step']:9.3f} ms {f'({low:.3f}-{high:.3f})':>19}"
    text += f" {row['steps_a_second']:8.4g} steps/s {row['images_a_second']:6.0f} images/s"
    text += f" {row['peak_bytes'] / 1e6:6.0f} MB, first step after {row['seconds_to_first_step']:.1f} s"
    return text + "".join(f", {key} {ratio:.3f}" for key, ratio in row["ratios"].items())


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked arguments. Raises UserError."""
    at_least_1 = arguments.number(int, "a whole number of at least 1", lambda v: v >= 1)
    images = arguments.number(int, "a whole number from 1 to 50000", lambda v: 1 <= v <= 50_000)
    positive = arguments.number(float, "a finite number above 0", lambda v: v > 0)
    parser = arguments.Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", **arguments.one_of(*models.NETWORKS), default=["ResNet18"])
    add("--batchsizes", nargs="+", type=images, default=[8, 128], metavar="B")
    add("--modes", nargs="+", **arguments.one_of(*MODES), default=list(MODES))
    add("--full_grad_batchsize", "--full-grad-batchsize", type=images, default=1000, metavar="B", help="for sampling")
    add("--device", type=arguments.device, default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--data_dir", "--data-dir", type=arguments.path, default=Path("data"), metavar="DIR")
    add("--seconds", type=positive, default=2.0, help="of a block, at least")
    add("--rounds", type=at_least_1, default=7, help="blocks of each side")
    add("--compile", action="store_true", help="CUDA: measure the captured graph too")
    add("--save_memory", "--save-memory", action="store_true", help="measure only what it saves, and costs")
    add("--out", type=arguments.path, default=Path("bench.json"), metavar="FILE", help="where the JSON goes")
    add("--quick", action="store_true", help="other defaults: some minutes on two cores")
    add("--check", action="store_true", help="exit with 1 if a ratio is below its bound")
    parser.set_defaults(**(QUICK if "--quick" in argv else {}))
    args = parser.parse_args(argv)
    if args.compile and utils.pick_device(args.device).type != "cuda":
        raise UserError("argument --compile: it captures a CUDA graph, and the device is another")
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UserError(f"argument --out: got '{args.out}', allowed is a file in a directory to write to")
    return args


def points(args: argparse.Namespace) -> list[tuple]:
    """What is to be measured together: a network, images a step, and the sides as `alternate` takes them."""
    names, found = ("textbook", "ours", *["graphed"] * args.compile), []
    for model in args.models:
        for images in args.batchsizes:
            sides = [(name, mode, EARLY) for mode in MODES[:2] if mode in args.modes for name in names]
            if "critical" in args.modes and images == min(args.batchsizes):
                sides += [(name, "critical", LATE) for name in names]
            if args.save_memory:
                found.append((model, images, [("ours", "normal", EARLY), ("saving", "normal", EARLY)]))
            elif sides:
                found.append((model, images, [("bare", "normal", EARLY), *sides]))
        if "sampling" in args.modes and not args.save_memory:
            sides = [("bare", "sampling", EARLY), ("ours", "sampling", EARLY)]
            found.append((model, args.full_grad_batchsize, sides))
    return found


def run(argv: list[str]) -> int:
    """Measure, print and write what the arguments ask for. Returns the exit status; raises UserError."""
    args = parse(argv)
    rows, failed, real = [], [], (args.data_dir / "CIFAR100.npz").exists()
    if real:
        datasets.read("CIFAR100", args.data_dir)  # or else every side would say that it is damaged
    machine = utils.environment(utils.pick_device(args.device)) | {"cores": os.cpu_count(), "real": real}
    content = {"environment": machine, "arguments": vars(args), "rows": rows, "failed": failed}
    print(machine, flush=True)
    for model, images, sides in points(args):
        try:
            found = alternate(args, model, images, sides)
        except RuntimeError as error:  # out of memory, a side's process killed, training diverged: the rest goes on
            failed.append(f"{model} b={images} {sides[-1][1]}: {error}")
            say("warning", f"not measured: {failed[-1]}")
            continue
        rows += found
        print(*map(line, found), sep="\n", flush=True)
        write_json(args.out, content)  # so that what is measured outlives whatever comes
    sizes = [*args.batchsizes, 8192] if args.save_memory else []
    content["counted"] = [
        counted(model, b, side) for model in args.models for b in sizes for side in ("ours", "saving")
    ]
    for row in content["counted"]:
        text = f"{row['kept_bytes'] / 1e9:.3g} GB kept for the backward pass (counted, not measured)"
        print(f"{row['model']} b={row['images']} {row['side']}: {text}")
    write_json(args.out, content)
    print(f"written: {args.out}")
    low = []
    for row in rows:
        for key, ratio in row["ratios"].items():
            if ratio < BOUNDS[key]:
                low.append(f"{label(row)}: {key} is {ratio:.3f}, below {BOUNDS[key]}")
    if args.check:
        low += [f"not measured: {point}" for point in failed]
        print("check: " + ("; ".join(low) or "every ratio is within its bound"))
    return int(bool(failed) or (args.check and bool(low)))


if __name__ == "__main__":
    usable_streams()
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        say("error", error)
        sys.exit(2)
