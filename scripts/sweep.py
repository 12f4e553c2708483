"""The paper's grid: one main.py run for each optimizer, batch size and seed, side by side on the GPUs there are.

A list is --batchsizes "64 128" or 64 128. Any flag that is not listed here goes to main.py, for every run.
What an optimizer does not take, as SGD no β, is dropped for it, and points that become one run are made once. Each
run logs to RUNS_DIR/NAME.log. Ctrl-C (or SIGTERM) lets every run write its checkpoint; the same command goes on from
there and skips what is finished. PYTHON names the interpreter. For several runs at a time on a CPU set
OMP_NUM_THREADS to its cores divided by their number, or they wait for one another.
Exit status: 0 every run has ended well, 1 some have not, 2 bad argument, 130 stopped.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from pool import Run, last_words, work

from arguments import COUNT, EXIT_STATUS, WHOLE, parse, unaffected
from training.record import read_summary, run_state
from utils import Parser, UserError, as_command

# The grid: flags of main.py with their usual values, the last flag's varying fastest. Here each may have an s at its
# end. Without values it is not swept: main.py's default then holds for every run.
LISTS = {
    "batchsize": "8 16 32 64 128 256 512 1024 2048 4096 8192",
    "seed": "0 1 2",
    **dict.fromkeys(("lr", "beta1", "nu", "inject", "inject_batchsize"), ""),
    "optimizer": "sgd shb nshb",
}


def words(text: str) -> list[str]:
    """A converter for argparse: a list of at least one word."""
    found = text.replace(",", " ").split()
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a list, separated by spaces or commas")
    return found


def command_line(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is the sweep's own, and the flags for main.py, which checks them. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="scripts/sweep.sh", description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("mode", help="normal, critical or sampling; it comes first")
    for flag, values in LISTS.items():
        options = {"type": words, "nargs": "+", "action": "extend", "default": [], "metavar": "LIST"}
        add(f"--{flag}s", f"--{flag}", **options, help=f"default: {values or 'none, not swept'}")
    add("--gpus", type=words, metavar="LIST", help="default: CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists")
    add("--jobs_per_gpu", type=COUNT, default=1, metavar="N", help="on a CPU: in all; default: 1")
    add("--dry_run", action="store_true", help="name every run and its state, and do nothing")
    add("--count", action="store_true", help="print how many runs there are, and do nothing")
    add("--task", type=WHOLE, metavar="K", help="become run K, counted from 0: for the arrays of a cluster")
    own, flags = parser.parse_known_args(argv)
    if own.mode != argv[0]:
        raise UserError(f"argument mode: got {argv[0]!r} in its place, allowed are normal, critical, sampling")
    for flag in LISTS:
        setattr(own, f"{flag}s", [*itertools.chain(*getattr(own, f"{flag}s"))])  # of the lists in each word
    for flag in {"--mode", "--name", "--resume"} & {word.partition("=")[0] for word in flags}:
        raise UserError(f"argument {flag}: the sweep sets it for each run")
    return own, flags


def points(own: argparse.Namespace) -> list[dict[str, str]]:
    """The points of the grid, each {flag: value}, longest first, so that no long run is left over. UserError."""
    swept = {flag: getattr(own, f"{flag}s") or usual.split() for flag, usual in LISTS.items()}
    if own.mode == "sampling" and not own.batchsizes:
        swept["batchsize"].reverse()  # as many steps at each b: the large batches take longest
    swept = {flag: values for flag, values in swept.items() if values}
    idle = {name: unaffected(parse([f"--mode={own.mode}", f"--optimizer={name}"])) for name in swept["optimizer"]}
    refused = set.intersection(*map(set, idle.values()))  # what no optimizer takes stays, for main.py to refuse it
    found = []
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        dropped = idle[point["optimizer"]].keys() - refused
        found.append({flag: value for flag, value in point.items() if flag not in dropped})
    return found


def plan(own: argparse.Namespace, flags: list[str]) -> list[Run]:
    """The runs of the grid, each once, and how each stands. UserError if main.py refuses them all."""
    begin = [os.environ.get("PYTHON") or sys.executable, str(ROOT / "main.py"), *flags, f"--mode={own.mode}"]
    runs = {}
    for point in points(own):
        swept = [f"--{flag}={value}" for flag, value in point.items()]
        run = Run([*begin, *swept, "--resume"], " ".join([own.mode, *swept]))
        look(run)
        runs.setdefault(run.label, run)
    runs = list(runs.values())
    if all(run.state == "refused" for run in runs):  # a bad argument
        raise UserError(runs[0].note.removeprefix("error: "))
    return runs


def look(run: Run) -> None:
    """Fill in what a run is called, how it stands by its record, or why main.py refuses it."""
    run.note = ""
    try:
        args = run.args = parse(run.command[2:])
        run.label, run.log = args.name, args.runs_dir / f"{args.name}.log"
        run.state = run_state(args)
        summary = read_summary(args.runs_dir / args.name) if run.state in EXIT_STATUS else None
    except (UserError, OSError) as error:
        run.state, run.note = "refused", f"error: {error}"
        return
    if early := summary and summary["results"].get("at_first_check"):
        run.note = f"an upper bound, as reached at the first check: eps {' '.join(map(str, early))}"


def judge(run: Run) -> None:
    """Fill in the state of a run that has ended, from its exit status."""
    if run.status in EXIT_STATUS.values():
        look(run)
    elif run.status in (129, 130, 143):
        run.state = "stopped"
    elif run.status == 2:
        run.state, run.note = "refused", last_words(run.log)
    else:
        run.state, run.note = "failed", f"see {run.log}: {last_words(run.log)}"


def pick_gpus(chosen: list[str] | None) -> list[str]:
    """`chosen`, or CUDA_VISIBLE_DEVICES, or all. UserError if one is not there: its run would take the CPU."""
    listed = subprocess.getoutput("nvidia-smi -L 2>/dev/null")
    found, uuids = re.findall(r"^GPU (\d+):", listed, re.MULTILINE), re.findall(r"UUID: ([\w/-]+)", listed)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    usual = found if visible is None else visible.replace(",", " ").split()
    for gpu in chosen or []:
        if gpu not in (*found, *uuids, *usual):
            allowed = f"allowed is what nvidia-smi lists: {', '.join(found) or 'none'}"
            raise UserError(f"argument --gpus: got {gpu!r}, {allowed}")
    return usual if chosen is None else chosen


def main(argv: list[str]) -> int:
    """Show the plan, carry it out, and show what has become of it. Returns the exit status."""
    own, flags = command_line(argv)
    runs = plan(own, flags)
    if own.count:
        print(len(runs))
        return 0
    if own.task is not None:
        if own.task >= len(runs):
            raise UserError(f"argument --task: got {own.task}, allowed is 0 to {len(runs) - 1}")
        command = runs[own.task].command
        os.execvp(command[0], command)
    on_cpu = all(run.args.device == "cpu" for run in runs if run.args)
    gpus = [] if on_cpu and not own.gpus else pick_gpus(own.gpus)
    # The GPU of each slot. On a CPU runs are forked (None), unless the system's libraries forbid it.
    slots = (gpus or [None if sys.platform == "linux" else ""]) * own.jobs_per_gpu
    todo = [run for run in runs if run.state in ("new", "unfinished")]
    for run in runs:
        print(f"{run.state:12} {run}", flush=True)
    if same := len(points(own)) - len(runs):
        print(f"dropped: {same} points that are the same run as another, as SGD with two β", flush=True)
    print(f"{len(runs)} runs, {len(todo)} to do, {len(slots)} at a time", flush=True)
    if own.dry_run:
        return 0
    for run in todo:
        run.log.parent.mkdir(parents=True, exist_ok=True)
    outcome = work(todo, slots, judge)
    if outcome != "killed":
        print(f"\n{'outcome':12} {'status':>6} {'time':>9}  run", flush=True)
        for run in runs:
            print(f"{run.state:12} {run.status:>6} {run.time!s:>9}  {run}", flush=True)
    if outcome != "done":
        again = shlex.join([str(ROOT / "scripts" / "sweep.sh"), *argv])
        print(f"{outcome}; to go on, run the same command again: {again}", flush=True)
        return 130
    return 0 if all(EXIT_STATUS.get(run.state) == 0 for run in runs) else 1


if __name__ == "__main__":
    as_command(main)
