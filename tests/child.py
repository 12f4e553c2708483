"""Runs main.py's experiments on the CPU, in a process forked from one that has torch loaded, and sabotages them."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets
import torch
import torch._dynamo  # an optimizer loads it, which takes a second
from conftest import PATIENCE, Tiny

import arguments
import checkpoints
import main
import messages
import models
import record
import training
import utils

torch.set_num_threads(1)
_digits = sklearn.datasets.load_digits()
sklearn.datasets.load_digits = lambda: _digits  # read once, before forking
_replace, _save, _evaluate, _after = os.replace, torch.save, training.Training.evaluate, {"n": 0}


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(content, file):
    """SIGKILL with half a checkpoint written, the third time."""
    _save(content, file)
    _after["n"] += 1
    if _after["n"] == 3:
        file.flush()
        os.truncate(file.fileno(), file.tell() // 2)
        _kill()


def die_between_renames(source, target):
    """SIGKILL when the newest checkpoint has become the one before and the new one is not in place."""
    _replace(source, target)
    if Path(target).name == checkpoints.NAMES[1]:
        _kill()


def die_after_rename(source, target):
    """SIGKILL right after a checkpoint is in place, the third time."""
    _replace(source, target)
    _after["n"] += Path(target).name == checkpoints.NAMES[0]
    if _after["n"] == 3:
        _kill()


def slow_write(content, file):
    """A checkpoint that takes ten minutes."""
    print("writing", flush=True)
    time.sleep(600)


def lucky(run):
    """A test of the network that finds everything right, in the middle of an epoch."""
    accuracy, loss = _evaluate(run)
    return (100.0 if run.step % run.steps_per_epoch else accuracy), loss


class Signalling(utils.Signals):
    """A SIGTERM at the n-th check: between two steps, two batches of the test, or two chunks of ∇f."""

    at = 0

    def check(self):
        _after["n"] += 1
        if _after["n"] == Signalling.at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        super().check()


def cores(pid):
    """The wandb-core processes of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(core) for core in children if b"wandb-core" in Path(f"/proc/{core}/cmdline").read_bytes()]


def stop_core():
    """SIGSTOP to the wandb-core of this process."""
    for core in cores(os.getpid()):
        os.kill(core, signal.SIGSTOP)


def replace_metrics():
    """As editors do: to another file, then renamed."""
    Path("edited").write_text(Path("runs/r/metrics.csv").read_text()[:-10] + "oops")
    os.replace("edited", "runs/r/metrics.csv")


MEDDLING = {
    "replace_metrics": replace_metrics,
    "delete_metrics": lambda: os.unlink("runs/r/metrics.csv"),
    "delete_args": lambda: os.unlink("runs/r/args.json"),
    "cut_metrics": lambda: os.truncate("runs/r/metrics.csv", 10),
    "cut_norms": lambda: os.truncate("runs/r/gradient_norms.f32", 10),
    "delete_full_gradients": lambda: os.unlink("runs/r/full_gradients.csv"),
    "delete_norms": lambda: os.unlink("runs/r/gradient_norms.f32"),
}


class Meddling(utils.Signals):
    """One of MEDDLING at the 250th check, when each file is there."""

    def check(self):
        _after["n"] += 1
        if _after["n"] == 250:
            MEDDLING[Meddling.kind]()
        super().check()


def no_locks(*_):
    """As on NFS or Lustre mounted without them."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def lose_omega(*arguments, **named):
    """ω is gone as soon as it is saved."""
    _save_omega(*arguments, **named)
    os.unlink("runs/r/omega.npy")


_save_omega = record.Record.save_omega


def _run(argv, directory, sabotage, log_path):
    os.chdir(directory)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    models.build = lambda name, num_classes: Tiny(num_classes)
    kind, _, value = sabotage.partition("=")
    if kind in ("die_in_write", "slow_write"):
        torch.save = globals()[kind]
    elif kind.startswith("die"):
        os.replace = globals()[kind]
    elif kind == "lucky":
        training.Training.evaluate = lucky
    elif kind == "signal_at":
        Signalling.at, utils.Signals = int(value), Signalling
    elif kind == "file_limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
    elif kind in MEDDLING:
        Meddling.kind, utils.Signals = kind, Meddling
    elif kind == "no_locks":
        fcntl.flock = no_locks
    elif kind == "lose_omega":
        record.Record.save_omega = lose_omega
    elif kind == "other_pixels":
        _digits.images[0, 0, 0] += 1
    elif kind == "threads":
        torch.set_num_threads(int(value))
    elif kind == "memory":  # so many bytes more than now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + int(value), resource.RLIM_INFINITY))
    elif kind == "nobody":
        os.setgid(65534)
        os.setuid(65534)
    try:
        args = arguments.parse(["--device", "cpu", *argv])
    except messages.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main.run_and_report(args))


# The server that forks looks for what to preload in PYTHONPATH alone, and says nothing if it is not there.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [Path(__file__).parent, Path(main.__file__).parent]))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


def start(argv, directory, sabotage="", log="log"):
    """A process running main.py with `argv` in `directory`, its output appended to the file `log` there."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_run, args=([str(a) for a in argv], str(directory), sabotage, str(log)))
    process.start()
    return process


def run(argv, directory, sabotage="", log="log"):
    """`start` to the end; the exit status (negative: the signal) and what it printed."""
    log = Path(directory) / log
    before = log.stat().st_size if log.exists() else 0
    process = start(argv, directory, sabotage, log)
    process.join(PATIENCE)
    assert process.exitcode is not None, f"still running after {PATIENCE} s"
    return process.exitcode, log.read_bytes()[before:].decode()
