"""The paper's grid: one main.py run for each optimizer, batch size and seed, side by side on the GPUs there are.

Any flag that is not listed here goes to main.py, for every run. Points of the lists that differ only in what their
optimizer does not take, as SGD no β, are one run. Each run logs to RUNS_DIR/NAME.log. Ctrl-C (or SIGTERM) lets every
run write its checkpoint; the same command goes on from there and skips what is finished. Runs start in the order of
the lists. PYTHON names the interpreter of the runs. For several at a time on a CPU set
OMP_NUM_THREADS to its cores divided by their number, or they wait for one another.
Exit status: 0 every run has ended well, 1 some have not, 2 bad argument, 130 stopped.
"""

import argparse
import functools
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the first run: no traceback
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from slots import Run, last_words, tell, work  # noqa: E402

from arguments import EXIT_STATUS, Parser, number, parse, result_arguments  # noqa: E402
from messages import UserError, say, usable_streams  # noqa: E402
from state import read_summary, run_state  # noqa: E402

# The grid: flags of main.py with their usual values; the last flag's vary fastest. Here a flag has an s at its end.
# An empty list is not swept: the flag that goes to main.py, or its default, then holds for every run.
LISTS = {
    "batchsize": "8 16 32 64 128 256 512 1024 2048 4096 8192",
    "seed": "0 1 2",
    **dict.fromkeys(("lr", "beta1", "nu", "injected_noise"), ""),
    "optimizer": "sgd shb nshb",
}


def words(text: str) -> list[str]:
    """A converter for argparse: a list of at least one word."""
    found = text.replace(",", " ").split()
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a list, separated by spaces or commas")
    return found


def command_line(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is the sweep's own in `argv`, and the flags for main.py, which checks them. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="scripts/sweep.sh", description=__doc__, formatter_class=form, allow_abbrev=False)
    few = number(int, "a whole number from 1 to 99", lambda v: 1 <= v <= 99)
    whole = number(int, "a whole number of at least 0", lambda v: v >= 0)
    add = parser.add_argument
    add("mode", help="normal, critical or sampling; it comes first")
    for flag, values in LISTS.items():
        add(f"--{flag}s", type=words, metavar="LIST", help=f"default: {values or 'none, not swept'}")
    add("--gpus", type=words, metavar="LIST", help="default: CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists")
    add("--jobs_per_gpu", type=few, default=1, metavar="N", help="on a CPU: in all; default: 1")
    add("--dry_run", action="store_true", help="name every run and its state, and do nothing")
    add("--count", action="store_true", help="print how many runs there are, and do nothing")
    add("--task", type=whole, metavar="K", help="become run K, counted from 0: for the arrays of a cluster")
    own, flags = parser.parse_known_args([_underscored(word) for word in argv])
    if own.mode != argv[0]:
        raise UserError(f"argument mode: got {argv[0]!r} in its place, allowed are normal, critical, sampling")
    return own, flags


def _underscored(word: str) -> str:
    """In the names of flags, - and _ mean the same, as they do to main.py."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def grid(own: argparse.Namespace) -> list[tuple[str, ...]]:
    """The points of the grid in the order of their start, each as flags of main.py. own: of `command_line`.

    Longest first, so that no long run is left over when the other slots are idle. A small batch makes for many
    steps; but `sampling` takes the same number of steps at each b, and there the large batches are the long ones.
    """
    swept = []
    for flag, usual in LISTS.items():
        values = usual.split()
        if flag == "batchsize" and own.mode == "sampling":
            values.reverse()
        values = getattr(own, f"{flag}s") or values
        if values:
            swept.append([f"--{flag}={value}" for value in values])
    return list(itertools.product(*swept))


def expand(own: argparse.Namespace, flags: list[str]) -> list[Run]:
    """A run for each `distinct` point of the grid. UserError if `flags` hold what each run has its own of."""
    points = grid(own)
    set_here = {"--mode", "--name", "--resume"} | {flag.partition("=")[0] for flag in points[0]}
    for flag in flags:
        if flag.partition("=")[0] in set_here:
            lists = ", ".join(f"--{name}s" for name in LISTS)
            raise UserError(f"argument {flag}: the sweep sets it for each run; allowed are its lists, {lists}")
    begin = [os.environ.get("PYTHON") or sys.executable, str(ROOT / "main.py"), *flags, f"--mode={own.mode}"]
    return [Run([*begin, *point, "--resume"], " ".join([own.mode, *point])) for point in distinct(own.mode, points)]


def distinct(mode: str, points: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The points without the flags that have no say in their run, those that become the same only once.

    A point that is listed twice stays twice: `plan` refuses that, as it is a slip.
    """
    first, found = {}, []
    for point in points:
        optimizer = [word for word in point if word.startswith("--optimizer=")]
        idle = without_a_say(f"--mode={mode}", *optimizer)
        counting = tuple(word for word in point if word.partition("=")[0] not in idle)
        if first.setdefault(counting, point) == point:
            found.append(counting)
    return found


@functools.cache
def without_a_say(*words: str) -> set[str]:
    """The flags that change no run of this mode and optimizer, as --beta1 for sgd; none if main.py refuses these."""
    try:
        args = parse([*words])
    except UserError:
        return set()
    return {f"--{flag}" for flag in vars(args).keys() - result_arguments(args).keys()}


def look(run: Run) -> None:
    """Fill in what a run is called, how it stands by its record, or why main.py refuses it."""
    try:
        args = parse(run.command[2:])
        run.state = run_state(args)
        summary = read_summary(args.runs_dir / args.name) or {}
    except (UserError, OSError) as error:
        run.state, run.note = "refused", f"error: {error}"
        return
    run.label, run.log = args.name, args.runs_dir / f"{args.name}.log"
    results = summary.get("results")
    early = results.get("at_first_check") if isinstance(results, dict) else None
    run.note = ""
    if early and run.state in EXIT_STATUS:
        run.note = f"an upper bound, as reached at the first check: eps {' '.join(map(str, early))}"


def plan(runs: list[Run]) -> None:
    """Look at every run. Raises UserError if main.py refuses all of them, or two would have the same directory."""
    known = set()
    for run in runs:
        look(run)
        if run.state == "refused":
            continue
        if run.log in known:
            raise UserError(f"two runs of this sweep would be {run.label}: is a value listed twice?")
        known.add(run.log)
    if not known:  # a bad argument
        raise UserError(runs[0].note.removeprefix("error: "))


def ended(run: Run) -> None:
    """Fill in the state of a run that has ended, from its exit status."""
    if run.status in EXIT_STATUS.values():
        look(run)
    elif run.status in (130, 143):
        run.state = "stopped"
    elif run.status == 2:
        run.state, run.note = "refused", last_words(run.log)
    else:
        run.state, run.note = "failed", f"see {run.log}: {last_words(run.log)}"


def pick_gpus(chosen: list[str] | None) -> list[str]:
    """The GPUs to use: `chosen`, or those of CUDA_VISIBLE_DEVICES, or all there are.

    Raises UserError if one of `chosen` is not of this machine: CUDA would see none, and the run take the CPU.
    """
    failed, output = subprocess.getstatusoutput("nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null")
    found = [] if failed else output.split()  # where the driver is broken, it complains on stdout
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    usual = found if visible is None else visible.replace(",", " ").split()
    if chosen is None or chosen == usual:
        return usual
    named = subprocess.getoutput("nvidia-smi -L 2>/dev/null")
    for gpu in chosen:
        by_uuid = gpu.startswith(("GPU-", "MIG-")) and f"UUID: {gpu}" in named
        if gpu not in found and not by_uuid:
            listed = ", ".join(found) or "none"
            raise UserError(f"argument --gpus: got {gpu!r}, allowed is what nvidia-smi lists: {listed}")
    return chosen


def sweep(runs: list[Run], same: int, slots: list[str], dry: bool, go_on: str) -> int:
    """Show the plan, carry it out unless `dry`, and show what has become of it. Returns the exit status.

    same: the points of the grid that are no runs of their own.
    """
    plan(runs)
    todo = [run for run in runs if run.state in ("new", "unfinished")]
    for run in runs:
        tell(f"{run.state:12} {run}")
    if same:
        tell(f"dropped: {same} points that differ from another only in a flag that their optimizer does not take")
    tell(f"{len(runs)} runs, {len(todo)} to do, {len(slots)} at a time")
    if dry:
        return 0
    for run in todo:
        run.log.parent.mkdir(parents=True, exist_ok=True)
    outcome = work(todo, slots, ended)
    if outcome != "killed":
        tell(f"\n{'outcome':12} {'status':>6} {'time':>9}  run")
        for run in runs:
            tell(f"{run.state:12} {run.status:>6} {run.time!s:>9}  {run}")
    if outcome != "done":
        tell(f"{outcome}; to go on, run the same command again: {go_on}")
        return 130
    return 0 if all(EXIT_STATUS.get(run.state) == 0 for run in runs) else 1


def main(argv: list[str]) -> int:
    """Do what the command line asks for. Returns the exit status. Raises UserError, OSError."""
    own, flags = command_line(argv)
    runs = expand(own, flags)
    if own.count:
        print(len(runs))
        return 0
    if own.task is not None:
        if own.task >= len(runs):
            raise UserError(f"argument --task: got {own.task}, allowed is 0 to {len(runs) - 1}")
        command = runs[own.task].command
        os.execvp(command[0], command)
    slots = (pick_gpus(own.gpus) or [""]) * own.jobs_per_gpu
    same = len(grid(own)) - len(runs)
    return sweep(runs, same, slots, own.dry_run, shlex.join([str(ROOT / "scripts" / "sweep.sh"), *argv]))


def as_command(main: Callable[[list[str]], int]) -> None:
    """End the process with what `main` makes of its arguments; a user's mistake is one line and exit status 2."""
    usable_streams()
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        say("error", error)
        sys.exit(2)


if __name__ == "__main__":
    as_command(main)
