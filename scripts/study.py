"""The study behind results/: its runs, by scripts/sweep.py, then figures.py on all of them.

What is done is skipped; Ctrl-C lets the runs write their checkpoints, and the same command goes on. The records go to
--runs_dir; those of the study in the repository lie in results/runs, without weights and ω. At full scale, on a GPU:
    bash scripts/results.sh --model ResNet18
Exit status: 0 every part is done, 1 a part is not, 2 bad argument, 130 stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import sweep

from datasets import DATASETS
from models import NETWORKS
from utils import Parser, UserError, one_of

# --- the parts: command lines of scripts/sweep.py, without --dataset, --model, --seeds and --runs_dir -----------


def noise() -> list[list[str]]:
    """The noise budget over training, C² over b, shape: all optimizers at b = 128, SGD at two more."""
    line = ["sampling", "--measure", "noise", "shape", "--draws=64", "--draw_batchsizes", "8", "32", "512", "--steps"]
    line += ["0", "50", "400"]
    small, large = ["4000", "--batchsizes=16", "--optimizers=sgd"], ["--batchsizes=1024", "--optimizers=sgd"]
    return [[*line, "1600", "--batchsizes=128"], [*line, "1600", *small], [*line, *large]]


def landscape() -> list[list[str]]:
    """Smoothing and sharpness of all optimizers at b = 128."""
    line = ["sampling", "--batchsizes=128", "--steps", "400", "1600", "--draws=32", "--probe_images=500"]
    return [[*line, "--measure", "noise", "smoothing", "sharpness"]]


def paper() -> list[list[str]]:
    """The direct C² and K of the paper's own network."""
    line = ["sampling", "--model=ResNet18", "--batchsizes=128", "--optimizers=shb"]
    return [[*line, "--steps", "0", "100", "--draws=16"]]


PARTS = {part.__name__: part for part in (noise, landscape, paper)}


# --- around them ------------------------------------------------------------------------------------------------


def command_line(argv: list[str]) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="scripts/results.sh", description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", **one_of(*DATASETS), default="CIFAR100", help="default: CIFAR100")
    add("--model", **one_of(*NETWORKS), default="ResNet20", help="default: ResNet20")
    add("--seeds", default="0", metavar="LIST", help="default: 0")
    add("--parts", type=sweep.words, default=list(PARTS), metavar="LIST", help=f"default: {' '.join(PARTS)}")
    add("--runs_dir", type=Path, default=ROOT / "results" / "runs", metavar="DIR", help="default: results/runs")
    add("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    add("--jobs_per_gpu", default="1", metavar="N", help="as of scripts/sweep.sh")
    add("--dry_run", action="store_true", help="name every run and its state, and do nothing")
    own = parser.parse_args(argv)
    for part in own.parts:
        if part not in PARTS:
            raise UserError(f"argument --parts: got {part!r}, allowed are {', '.join(PARTS)}")
    return own


def lines(own: argparse.Namespace) -> list[list[str]]:
    """The command lines of scripts/sweep.py that make the parts. A part may name a network of its own."""
    common = [f"--dataset={own.dataset}", f"--model={own.model}", f"--seeds={own.seeds}", f"--runs_dir={own.runs_dir}"]
    return [[mode, *common, *flags] for part in own.parts for mode, *flags in PARTS[part]()]


def main(argv: list[str]) -> int:
    """Make the parts one after another, then the figures. Returns the exit status. Raises UserError, OSError."""
    own, status = command_line(argv), 0
    for line in lines(own):
        sweep.plan(*sweep.command_line(line))  # a bad argument ends it here, and not in the third part
    for line in lines(own):
        print(f"\nsweep.sh {' '.join(line)}", flush=True)
        more = [f"--jobs_per_gpu={own.jobs_per_gpu}", *["--dry_run"] * own.dry_run]
        ended = sweep.main([*line, *more])
        if ended not in (0, 1):
            return ended
        status = max(status, ended)
    if own.dry_run:
        return status
    figures = [sys.executable, str(ROOT / "figures.py"), str(own.runs_dir), "--out", str(own.out)]
    return max(status, subprocess.run(figures).returncode)


if __name__ == "__main__":
    sweep.as_command(main)
