"""Runs side by side: forked, once torch is loaded, on a CPU; processes on GPUs, as CUDA survives no fork."""

import contextlib
import importlib
import os
import shlex
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from utils import STOPPING, handle, handling


@dataclass
class Run:
    """A command line of main.py, interpreter and program in front, and what has become of it."""

    command: list[str]
    label: str
    args: Namespace | None = None  # as main.py reads them, unless it refuses them
    log: Path | None = None
    state: str = ""
    note: str = ""
    status: int | str = "-"  # as a shell has it: 128 + n after signal n
    time: timedelta | str = "-"
    pid: int = 0
    began: float = 0.0  # by time.monotonic

    def __str__(self):
        return f"{self.label}: {self.note}" if self.note else self.label


def load() -> None:
    """Import what a run does; compute nothing: once OpenMP has, with two threads, a forked child with two hangs."""
    for name in ("torch._dynamo", "main", "training.loop"):  # any optimizer of torch loads _dynamo, in a second
        importlib.import_module(name)


def start(run: Run, gpu: str | None) -> None:
    """Start a run; one whose log cannot be written has failed. gpu: its GPU, or None to fork it."""
    run.began = time.monotonic()
    try:
        with open(run.log, "ab", buffering=0) as log:
            log.write(os.fsencode(f"$ {shlex.join(run.command)}\n"))
            # A signal between fork and setting its handlers back would be lost in the child.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
            run.pid = os.fork()
            if run.pid == 0:
                _become(run.command, gpu, log.fileno(), mask)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        run.state = "started"
    except OSError as error:
        run.state, run.note = "failed", str(error)


def _become(command: list[str], gpu: str | None, log: int, mask: set) -> None:
    """Be the run `command`, in a child that was forked this moment. Does not return."""
    status = 1
    try:
        os.setsid()  # the terminal's Ctrl-C must reach a run once, through us
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, number)
        handle(signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if gpu is not None:
            os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # GPUs are counted as nvidia-smi does
            os.execvp(command[0], command)
        sys.stdout.reconfigure(line_buffering=True)
        status = importlib.import_module("main").cli(command[2:])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def last_words(log: Path) -> str:
    """The error that the last run in `log` ended with, whatever libraries print at exit; else its last line."""
    try:
        lines = log.read_text(errors="replace").split("\n$ ")[-1].splitlines()
    except OSError as error:  # it was deleted: no trouble for the other runs
        return str(error)
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def ended(run: Run) -> bool:
    """Whether a run that was started is over; its exit status and time are filled in then."""
    pid, status = os.waitpid(run.pid, os.WNOHANG)
    if pid:
        code = os.waitstatus_to_exitcode(status)
        run.status = code if code >= 0 else 128 - code
        run.time = timedelta(seconds=int(time.monotonic() - run.began))
    return bool(pid)


def work(todo: list[Run], slots: list[str | None], judge: Callable[[Run], None]) -> str:
    """Start the runs in order until all are `done`, or at a signal `stopped`, or at a second one `killed`.

    slots: the GPU of each; None forks its runs. judge: fills in the state of a run that has ended.
    """
    heard = []  # the signals to stop at that have come; nothing is interrupted in the middle
    with handling(lambda signum, frame: heard.append(signum)):
        if todo and None in slots:
            load()
        waiting, busy, told = todo.copy(), {}, False
        while busy or (waiting and not heard):
            for slot, gpu in enumerate(slots):
                if slot in busy and ended(busy[slot]):
                    run = busy.pop(slot)
                    judge(run)
                    print(f"{run.state} {run}", flush=True)
                if slot not in busy and waiting and not heard:
                    run = waiting.pop(0)
                    start(run, gpu)
                    if run.pid:
                        busy[slot] = run
                    where = f" on GPU {gpu}" if gpu else ""
                    print(f"[{len(todo) - len(waiting)}/{len(todo)}] {run.state} {run}{where}", flush=True)
            if len(heard) > 1:
                for run in busy.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(run.pid, signal.SIGKILL)  # what it has started, too
                    os.kill(run.pid, signal.SIGKILL)  # one that has no group of its own yet
                return "killed"
            if heard and not told:
                for run in busy.values():
                    os.kill(run.pid, signal.SIGTERM)
                told = True
                print("stopping: each run writes its checkpoint; a second signal ends them at once", flush=True)
            time.sleep(0.02)
        return "stopped" if heard else "done"
