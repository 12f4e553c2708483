"""Runs main.py's experiments on the CPU, in a process forked from one that has torch loaded, and sabotages them.

Also what the tests of records share: three runs, one of each mode, and what must not depend on interruptions.
"""

import atexit
import csv
import errno
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import sklearn.datasets
import torch
import torch._dynamo  # an optimizer loads it, which takes a second
from conftest import PATIENCE, Tiny, summary

import arguments
import main
import models
from training import dashboard
from training.record import Record
from utils import UserError

torch.set_num_threads(1)
_digits = sklearn.datasets.load_digits()
sklearn.datasets.load_digits = lambda: _digits  # read once, before forking

BASE = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--lr", 0.02, "--name", "r"]
MODES = {  # 23 steps an epoch
    "normal": ["--mode", "normal", "--epochs", 14, "--measure_every", 4],
    "critical": ["--mode", "critical", "--eps", 0.9, 0.6, 0.01, "--min_epochs", 2, "--max_steps", 430],
    "sampling": ["--mode", "sampling", "--steps", 0, 100, 310, "--draws", 3, "--full_grad_batchsize", 100],
}

# --- what is done to a run, each with the text behind the = ------------------------------------------------


def signal_at(n, act=lambda: send(signal.SIGTERM)):
    """At the n-th check for signals: between two steps, two batches of the test or two chunks of ∇f."""
    counter = itertools.count(1)

    class Acting(main.Signals):
        def check(self):
            if next(counter) == int(n):
                act()
            super().check()

    main.Signals = Acting


def send(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


def die_in_write(n):
    """SIGKILL with half of the n-th checkpoint written."""
    save, counter = torch.save, itertools.count(1)

    def half(content, file):
        save(content, file)
        if next(counter) == int(n):
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            send(signal.SIGKILL)

    torch.save = half


def die_at_rename(value):
    """SIGKILL after a file has taken that name for the n-th time; before, for the summary."""
    (name, n), replace, counter = value.split(","), os.replace, itertools.count(1)

    def dying(source, target):
        now = Path(target).name == name and next(counter) == int(n)
        if not (now and name == "summary.json"):
            replace(source, target)
        if now:
            send(signal.SIGKILL)

    os.replace = dying


def wandb_hangs(limit):
    """SIGSTOP to wandb-core as the run ends."""
    finish, dashboard.FINISH_LIMIT = Record.finish, float(limit)

    def stopping(*arguments):
        for core in cores(os.getpid()):
            os.kill(core, signal.SIGSTOP)
            print("stopped", core)
        finish(*arguments)

    Record.finish = stopping


def cores(pid):
    """The wandb-core processes of a process."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(core) for core in children if b"wandb-core" in Path(f"/proc/{core}/cmdline").read_bytes()]


def in_use():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[0])


MEDDLING = {
    "metrics deleted": lambda: os.unlink("runs/r/metrics.csv"),
    "metrics lengthened": lambda: os.truncate("runs/r/metrics.csv", 10_000),
    "norms cut": lambda: os.truncate("runs/r/gradient_norms.f32", 10),
}
SABOTAGE = {f.__name__: f for f in (signal_at, die_in_write, die_at_rename, wandb_hangs)} | {
    "kill_at": lambda n: signal_at(n, lambda: send(signal.SIGKILL)),
    "meddle": lambda kind: signal_at(250, MEDDLING[kind]),
    "slow_write": lambda _: setattr(torch, "save", lambda *_: print("writing", flush=True) or time.sleep(600)),
    "file_limit": lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size))),
    "memory": lambda size: resource.setrlimit(resource.RLIMIT_AS, (in_use() + int(size), resource.RLIM_INFINITY)),
    "no_locks": lambda _: setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))),
    "other_pixels": lambda _: _digits.images.put(0, 9),
    "torch_version": lambda version: setattr(torch, "__version__", version),
    "nobody": lambda _: os.setgid(65534) or os.setuid(65534),
    "terminal": lambda _: setattr(sys, "stdin", os.fdopen(os.dup(1))),  # where the log is one
    "import_from": lambda path: sys.path.insert(0, path),
}

# --- running it ----------------------------------------------------------------------------------------------


def _run(argv, directory, sabotage, log_path, env):
    os.chdir(directory)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for name, value in env.items():
        os.environ.pop(name, None)
        os.environ |= {name: value} if value is not None else {}
    models.build = lambda name, num_classes: Tiny(num_classes)
    if sabotage:
        kind, _, value = sabotage.partition("=")
        SABOTAGE[kind](value)
    try:
        args = arguments.parse(["--device", "cpu", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    status = main.run_and_report(args)
    atexit._run_exitfuncs()  # wandb's too, which multiprocessing would leave out
    sys.exit(status)


# The server that forks looks for what to preload in PYTHONPATH alone, and says nothing if it is not there.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [Path(__file__).parent, Path(main.__file__).parent]))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


def start(argv, directory, sabotage="", log="log", **env):
    """A process running main.py with `argv` in `directory`, its output appended to the file `log` there."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_run, args=([str(a) for a in argv], str(directory), sabotage, str(log), env))
    process.start()
    return process


def run(argv, directory, sabotage="", log="log", **env):
    """`start` to the end; the exit status (negative: the signal) and what it printed."""
    log = Path(directory) / log
    before = log.stat().st_size if log.exists() else 0
    process = start(argv, directory, sabotage, log, **env)
    process.join(PATIENCE)
    assert process.exitcode is not None, f"still running after {PATIENCE} s"
    return process.exitcode, log.read_bytes()[before:].decode()


def wait_for(path, text, process):
    """Wait until the file holds `text`."""
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, path.read_text() if path.exists() else path
        time.sleep(0.005)


# --- what a run leaves ---------------------------------------------------------------------------------------


def half_done(directory, mode, *more, at=150):
    """The directory of a run stopped by SIGTERM at its `at`-th check."""
    status, log = run([*BASE, *MODES[mode], *more], directory, f"signal_at={at}")
    assert status == 143, log
    return directory / "runs" / "r"


def files(directory):
    """The content of every file."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def outcome(directory):
    """Everything a run leaves that must not depend on how often it was interrupted."""
    found = {name: content for name, content in files(directory).items() if "json" not in name and ".pt" not in name}
    rows = csv.DictReader(found["metrics.csv"].decode().splitlines())
    found["metrics.csv"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    found["summary"] = summary(directory)
    del found["summary"]["seconds"], found["summary"]["args"]["checkpoint_every"], found["summary"]["args"]["resume"]
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    del content["seconds"], content["sizes"], content["args"]
    return found | {"checkpoint": bits(content)}


def bits(value):
    """A value of a checkpoint, so that equal means the same bits."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return sorted((str(k), bits(v)) for k, v in value.items())
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


@functools.cache
def reference(mode):
    """The outcome of a run of MODES when nothing happens."""
    with tempfile.TemporaryDirectory() as directory:
        status, log = run([*BASE, *MODES[mode]], directory)
        assert status == 0, log
        return outcome(Path(directory) / "runs" / "r")


def about(directory):
    """Its args.json."""
    return json.loads((directory / "args.json").read_text())
