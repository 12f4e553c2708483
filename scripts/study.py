"""The study behind results/: its runs, by scripts/sweep.py, then figures.py on all of them.

What is done is skipped; Ctrl-C, and the same command again goes on. The records go to --runs_dir; those of the study
in the repository lie in results/runs, without weights and ω. At full scale, on a GPU:
    bash scripts/results.sh --model ResNet18 --seeds "0 1 2" --batchsizes "8 16 32 64 128 256 512 1024 2048 4096 8192"
Exit status: 0 every part is done, 1 a part is not, 2 bad argument, 130 stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sweep  # noqa: E402

from arguments import steps_per_epoch  # noqa: E402
from converters import Parser, one_of  # noqa: E402
from datasets import DATASETS  # noqa: E402
from files import replacing, write_table  # noqa: E402
from messages import UserError  # noqa: E402
from models import NETWORKS  # noqa: E402
from state import read_summary  # noqa: E402

EPS = ("1.15", "1.1", "1.05")  # ‖∇f‖ is 1.16 before the first update: by it a greater ε needs none
EPS_DRAWN = ("4", "3.5", "3", *EPS)  # ‖g‖ is between 1.3 and 5.9 there: the greater are in the histories of the runs
SMALL = ("1", "2", "4", "8")  # of SHB alone: SGD and NSHB come to no ε of EPS at small b
NOISE_TO_INJECT = "3.1"  # √(V_64 − V_512) of SGD at step 400, by the noise part
EPOCHS = 2  # of `normal`
# The titles of the sentences that open README.md.
SHOWN = ("What ω is.", "Does it smooth?", "The theory's constants.", "Two ways to C².", "Accuracy and δ.")
TERMINATED = []  # one entry for each SIGTERM
DRAWN = ("--draws=64", "--draw_batchsizes", "8", "32", "512")


def command_line(argv: list[str]) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="scripts/results.sh", description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", **one_of(*DATASETS), default="CIFAR100", help="default: CIFAR100")
    add("--model", **one_of(*NETWORKS), default="ResNet20", help="default: ResNet20")
    add("--seeds", type=sweep.words, metavar="LIST", default=["0", "1"], help="default: 0 1")
    add(
        "--batchsizes",
        type=sweep.words,
        metavar="LIST",
        default=["16", "32", "64", "128", "256", "512", "1024", "2048", "4096"],
        help="of `critical`",
    )
    add("--parts", type=sweep.words, metavar="LIST", help=f"default: {' '.join(PARTS)}")
    add("--runs_dir", type=Path, default=ROOT / "results" / "runs", metavar="DIR", help="default: results/runs")
    add("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    add("--jobs_per_gpu", default="1", metavar="N", help="as of scripts/sweep.sh")
    add("--dry_run", action="store_true", help="name every run and its state, and do nothing")
    own = parser.parse_args(argv)
    unknown = [part for part in own.parts or [] if part not in PARTS]
    if unknown:
        raise UserError(f"argument --parts: got {unknown[0]!r}, allowed are {', '.join(PARTS)}")
    for b in own.batchsizes:
        if not (b.isdecimal() and int(b)):
            raise UserError(f"argument --batchsizes: got {b!r}, allowed are whole numbers of at least 1")
    return own


# --- the parts: command lines of scripts/sweep.py, without --dataset, --model and --runs_dir --------------------


def critical(own: argparse.Namespace) -> list[list[str]]:
    """Steps to each ε for every b, within an epoch. SHB takes fewer gradients the smaller b, down to b = 2."""
    line = ["critical", f"--seeds={' '.join(own.seeds)}", "--min_epochs=0", "--eps", *EPS]
    lines = [[*line, f"--batchsizes={b}", f"--max_steps={epoch(own, b)}"] for b in own.batchsizes]
    small = " ".join(b for b in SMALL if b not in own.batchsizes)
    return lines + [[*line, f"--batchsizes={small}", "--optimizers=shb", "--max_steps=2500"]] * bool(small)


def stop(own: argparse.Namespace) -> list[list[str]]:
    """The same ε by the full gradient, which is measured ten times an epoch, at one b and for half an epoch."""
    line = ["critical", f"--seeds={own.seeds[0]}", "--batchsizes=128", "--min_epochs=0", "--eps", *EPS]
    return [[*line, "--full_grad_every=0.1", f"--max_steps={epoch(own, '128') // 2}"]]


def noise(own: argparse.Namespace) -> list[list[str]]:
    """The noise budget over training, C² over b, shape: all optimizers at b = 128, SGD at two more."""
    line = ["sampling", f"--seeds={own.seeds[0]}", *DRAWN, "--shape", "--steps", "0", "50", "400"]
    small, large = ["4000", "--batchsizes=16", "--optimizers=sgd"], ["--batchsizes=1024", "--optimizers=sgd"]
    return [[*line, "1600", "--batchsizes=128"], [*line, "1600", *small], [*line, *large]]


def landscape(own: argparse.Namespace) -> list[list[str]]:
    """Smoothing and sharpness of all optimizers at b = 128."""
    line = ["sampling", f"--seeds={own.seeds[0]}", "--batchsizes=128", "--steps", "400", "1600", "--draws=32"]
    return [[*line, "--smoothing=32", "--sharpness", "--probe_images=500"]]


def paper(own: argparse.Namespace) -> list[list[str]]:
    """The direct C² and K of the paper's own network."""
    line = ["sampling", "--model=ResNet18", f"--seeds={own.seeds[0]}", "--batchsizes=128", "--optimizers=shb"]
    return [[*line, "--steps", "0", "100", "--draws=16"]]


def control(own: argparse.Namespace) -> list[list[str]]:
    """Large b with isotropic noise that makes it as noisy as a small b, and that small b, at equal epochs; their δ."""
    line = ["normal", "--optimizers=sgd", f"--seeds={' '.join(own.seeds)}", f"--epochs={EPOCHS}"]
    measured = ["sampling", "--optimizers=sgd", f"--seeds={own.seeds[0]}", "--draws=16", "--steps"]
    large, small = ["--batchsizes=512", f"--injected_noises=0 {NOISE_TO_INJECT}"], ["--batchsizes=64"]
    lines = [[*line, *large], [*line, *small]]
    return lines + [[*measured, str(EPOCHS * epoch(own, b)), *of] for b, of in (("512", large), ("64", small))]


def accuracy(own: argparse.Namespace) -> list[list[str]]:
    """Test accuracy at equal epochs and at equal updates, those of b = 512; δ where the runs of both ended."""
    updates, seeds = EPOCHS * epoch(own, "512"), f"--seeds={' '.join(own.seeds)}"
    line = ["normal", seeds, f"--epochs={EPOCHS}"]
    measured = ["sampling", seeds, "--draws=16", "--steps", str(updates)]
    lines = [[*line, "--batchsizes=512 128 32"], [*line, "--batchsizes=128 32", f"--max_steps={updates}"]]
    lines += [[*measured, "--batchsizes=512"]]
    return lines + [[*measured, str(EPOCHS * epoch(own, b)), f"--batchsizes={b}"] for b in ("128", "32")]


PARTS = {each.__name__: each for each in (noise, landscape, paper, stop, control, critical, accuracy)}


def epoch(own: argparse.Namespace, b: str) -> int:
    """Updates in an epoch."""
    return steps_per_epoch(argparse.Namespace(dataset=own.dataset, batchsize=int(b)))


# --- around them ------------------------------------------------------------------------------------------------


def lines(own: argparse.Namespace, part: str) -> list[list[str]]:
    """The command lines of scripts/sweep.py that make a part."""
    common = [f"--dataset={own.dataset}", f"--model={own.model}", f"--runs_dir={own.runs_dir}"]
    return [[mode, *common, *flags] for mode, *flags in PARTS[part](own)]


def planned(own: argparse.Namespace, part: str) -> list[sweep.Run]:
    """The runs of a part, and how each stands. Raises UserError if main.py refuses them."""
    runs = [run for line in lines(own, part) for run in sweep.expand(*sweep.command_line(line))]
    sweep.plan(runs)
    return runs


def cost(own: argparse.Namespace) -> list[dict]:
    """For each part: its runs, those that have ended, and their hours here by their own records."""
    rows = []
    for part in PARTS:
        runs = planned(own, part)
        ended = [read_summary(run.log.with_suffix("")) for run in runs if run.state in sweep.EXIT_STATUS]
        hours = sum(summary["seconds"] for summary in ended) / 3600
        rows.append({"part": part, "runs": len(runs), "ended": len(ended), "hours": f"{hours:.2f}"})
    return rows


def thresholds(costs: list[dict]) -> list[str]:
    """The ε at which figures.py is to draw, as its flag; none while there is no history to find them in."""
    known = sum(row["ended"] for row in costs if row["part"] in ("critical", "stop"))
    return ["--eps", *EPS_DRAWN] if known else []


def wait_for(command: list[str]) -> int:
    """Run a command to its end, and return its exit status as a shell has it, or 143 if SIGTERM came before it.

    A SIGTERM goes on to it. A Ctrl-C reaches it from the terminal: the sweep then lets every run write its checkpoint.
    """
    if TERMINATED:
        return 128 + signal.SIGTERM
    process, told = subprocess.Popen(command), 0
    while process.poll() is None:
        time.sleep(0.1)
        if told < len(TERMINATED):
            process.terminate()
            told += 1
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def words(report: str) -> str:
    """What a report.md says under the titles SHOWN: of each the last group's, to the first full stop."""
    groups, found, lines = report.split("\n## ")[1:], {}, []
    for group in groups:
        said = group.partition("### in words\n")[2].partition("\n### ")[0]
        for sentence in said.splitlines():
            if sentence.startswith("- **") and sentence.split("**")[1] in SHOWN:
                first = sentence.partition(". ")[0].removesuffix(".") + "."
                found[sentence.split("**")[1]] = (group.splitlines()[0], first)
    for group in groups:
        slug = group.splitlines()[0]
        said = [sentence for of, sentence in found.values() if of == slug]
        lines += ["", f"{slug}:"] if said else []
        for sentence in said:
            lines += textwrap.wrap(sentence, 128, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines[1:]) + "\n"


def show(readme: Path, report: Path) -> None:
    """Put the words of a report.md between the marks in README.md."""
    before, begin, rest = readme.read_text().partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end -->")
    with replacing(readme) as file:
        file.write((before + begin + words(report.read_text()) + end + after).encode())


def main(argv: list[str]) -> int:
    """Make the parts one after another, then the figures. Returns the exit status. Raises UserError, OSError."""
    own, status = command_line(argv), 0
    python, more = os.environ.get("PYTHON") or sys.executable, ["--dry_run"] if own.dry_run else []
    for part in PARTS:
        planned(own, part)  # a bad argument ends it here, and not in the third part
    for part in own.parts or PARTS:
        for line in lines(own, part):
            command = [python, str(ROOT / "scripts" / "sweep.py"), *line, f"--jobs_per_gpu={own.jobs_per_gpu}", *more]
            print(f"\n{part}: sweep.sh {' '.join(line)}", flush=True)
            ended = wait_for(command)
            if ended not in (0, 1):
                return ended
            status = max(status, ended)
    if own.dry_run:
        return status
    costs = cost(own)
    ended = wait_for([python, str(ROOT / "figures.py"), str(own.runs_dir), "--out", str(own.out), *thresholds(costs)])
    write_table(own.out / "cost.csv", pd.DataFrame(costs))
    if own.out == ROOT / "results" and not ended:
        show(ROOT / "README.md", own.out / "report.md")
    return max(status, ended)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: TERMINATED.append(signum))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda signum, frame: None)  # what it waits for ends, and says so
    sweep.as_command(main)
