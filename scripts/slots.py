"""Runs side by side, one at a time in each slot: their start, their log, their end, and stopping them together."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path


@dataclass
class Run:
    """A command to run, and what has become of it."""

    command: list[str]
    label: str
    log: Path | None = None
    state: str = ""
    note: str = ""
    status: int | str = "-"  # as a shell has it: 128 + n after signal n
    time: timedelta | str = "-"
    process: subprocess.Popen | None = None
    began: float = 0.0  # by time.monotonic

    def __str__(self):
        return f"{self.label}: {self.note}" if self.note else self.label


def tell(line: str) -> None:
    """Print, though nobody may read it: in `sweep.sh | tee` Ctrl-C ends tee, and the runs must still be told."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listen() -> list[int]:
    """The signals to stop at that have come. The list grows; nothing is interrupted in the middle."""
    heard = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(signum, lambda signum, frame: heard.append(signum))
    return heard


def start(run: Run, gpu: str) -> None:
    """Start a run; one that cannot be started has failed. gpu: empty where the run is to choose."""
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | os.environ  # GPUs are counted as nvidia-smi does
    environment["PYTHONUNBUFFERED"] = "1"
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    run.began = time.monotonic()
    try:
        with open(run.log, "ab", buffering=0) as log:
            log.write(os.fsencode(f"$ {shlex.join(run.command)}\n"))
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # A session of its own: the terminal's Ctrl-C must reach a run once, through us.
            run.process = subprocess.Popen(run.command, **streams, env=environment, start_new_session=True)
    except OSError as error:
        run.state, run.note = "failed", str(error)


def last_words(log: Path) -> str:
    """The error that the last run in `log` has told, whatever libraries say at exit; without one, its last line."""
    try:
        lines = log.read_text(errors="replace").split("\n$ ")[-1].splitlines()
    except OSError as error:
        return str(error)
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def work(todo: list[Run], slots: list[str], ended: Callable[[Run], None]) -> str:
    """Start the runs in order until all are `done`, or at a signal `stopped`, or at a second one `killed`.

    slots: the GPU of each. ended: called with each run that has, its status and time filled in.
    """
    heard = listen()
    waiting, busy, told = todo.copy(), {}, False
    while busy or (waiting and not heard):
        for slot, gpu in enumerate(slots):
            if slot in busy and busy[slot].process.poll() is not None:
                run = busy.pop(slot)
                code = run.process.returncode
                run.status = code if code >= 0 else 128 - code
                run.time = timedelta(seconds=int(time.monotonic() - run.began))
                ended(run)
                tell(f"{run.state} {run}")
            if slot not in busy and waiting and not heard:
                run = waiting.pop(0)
                start(run, gpu)
                if run.process:
                    busy[slot] = run
                    run.state = "started"
                where = f" on GPU {gpu}" if gpu else ""
                tell(f"[{len(todo) - len(waiting)}/{len(todo)}] {run.state} {run}{where}")
        if busy and len(heard) > 1:
            for run in busy.values():
                with contextlib.suppress(OSError):  # it has ended this moment
                    os.killpg(run.process.pid, signal.SIGKILL)
            return "killed"
        if heard and not told:
            for run in busy.values():
                run.process.terminate()
            told = True
            tell("stopping: each run writes its checkpoint; a second signal ends them at once")
        time.sleep(0.1)
    return "stopped" if heard else "done"
