"""What all need: errors in one line, a parser of arguments, files written whole, device, seeds, signals. No torch."""

import argparse
import ctypes
import difflib
import functools
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np


class UserError(Exception):
    """A mistake of the user's or of the surroundings: printed as one line, `error: …`; exit status 2."""


def say(kind: str, message: object) -> None:
    """Print `kind: message` on stderr, as one line whatever `message` holds."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


@functools.cache
def warn(message: str) -> None:
    """`say` a warning; the same one only once."""
    say("warning", message)


class Patient(io.FileIO):
    """A stream that discards what cannot be written: the terminal was closed, `tee` has ended, the disk is full."""

    def write(self, content):
        """Claims to have written all of it."""
        with suppress(OSError):
            return super().write(content)
        return len(content)


def usable_streams() -> None:
    """Make stdout and stderr such that printing never fails; those of a notebook stay as they are.

    A closed stream discards. Otherwise the next file opened would get its number, and what libraries print with it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (open until the process ends)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream in (sys.__stdout__, sys.__stderr__):
            stream.flush()
            file = io.BufferedWriter(Patient(number, "w", closefd=False))
            by_line = stream.line_buffering or stream.write_through  # PYTHONUNBUFFERED
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=by_line))


def as_command(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with what `main` makes of its arguments; a user's mistake is one line and exit status 2."""
    usable_streams()
    handle(signal.SIG_DFL)  # Ctrl-C: no traceback
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        say("error", error)
        sys.exit(2)


SYNONYMS = {"learning_rate": "lr", "eta": "lr", "momentum": "beta1", "bs": "batchsize", "epsilon": "eps"}
SYNONYMS |= {"compile": "cuda_graph", "full_grad_every": "measure_every", "shape": "measure", "smoothing": "measure"}


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line; - and _ mean the same in flags, and --resume=True is --resume."""

    def parse_known_args(self, args=None, namespace=None):
        """Called by argparse's parse_args, too."""
        self.given = [word for word in map(self._usual, args) if word is not None]
        return super().parse_known_args(self.given, namespace)

    def _usual(self, word: str) -> str | None:
        name, equals, value = word.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        action = self._action(name)
        if action and action.nargs == 0 and value.lower() in ("true", "false"):
            return name if value.lower() == "true" else None
        return name + equals + value

    def error(self, message: str):
        """Called by argparse."""
        foreign = [word for word in self.given if word[:2] == "--" and not self._action(word)]
        if message.startswith("the following arguments are required") and foreign:
            message = f"unrecognized arguments: {foreign[0]}"
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        if not unrecognized:
            raise UserError(message)
        word = words.split(" ")[0]
        flag = word.partition("=")[0].lstrip("-")
        meant = SYNONYMS.get(flag) or closest(flag, [action.dest for action in self._actions])
        hint = self._stray(word) if word[:1] != "-" else f"; did you mean --{meant}?" if meant else ""
        raise UserError(f"{message}{hint}; --help lists what is allowed")

    def _action(self, word: str) -> argparse.Action | None:
        return self._option_string_actions.get(word.partition("=")[0])

    def _stray(self, word: str) -> str:
        """What to do about a value that belongs to no flag: too many for the one before it."""
        at = next(i for i, each in enumerate(self.given) if each.startswith(word))
        flags = [each for each in self.given[:at] if each.startswith("--")]
        action = self._action(flags[-1]) if flags else None
        if action is None or action.nargs == 0:
            return ""
        flag, equals, value = flags[-1].partition("=")
        if action.nargs == "+" and equals:
            return f"; several values stand without =: {flag} {value} {word}"
        return f"; {flag} takes one value, and scripts/sweep.sh makes a run for each of several"


def closest(word: str, known: list[str]) -> str | None:
    """The one that may have been meant."""
    folded = {name.lower(): name for name in known}
    return next((folded[name] for name in difflib.get_close_matches(word.lower(), folded, 1)), None)


def one_of(*allowed: str) -> dict:
    """Options of add_argument for one of some names; a wrong one is answered by the one that was meant."""

    def convert(text: str):
        if text not in allowed:
            meant = closest(text, allowed)
            hint = f"; did you mean {meant}?" if meant else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {', '.join(allowed)}{hint}")
        return text

    return {"type": convert, "choices": allowed}


def number(kind: type, allowed: str, check: Callable):
    """A converter for argparse that names what was given and what is allowed."""

    def convert(text: str):
        try:
            value = kind(text)
            good = math.isfinite(value) and check(value)
        except (ValueError, OverflowError):
            good = False
        if not good:
            hint = "; where several are allowed, spaces separate them" if "," in text else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {allowed}{hint}")
        return value

    return convert


def path(text: str) -> Path:
    """A converter for the path of a directory or file."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a path, of a directory or file")
    return Path(text).expanduser()  # a shell leaves the ~ of --runs_dir=~/runs to us


@contextmanager
def replacing(path: Path, keep: Path | None = None):
    """A binary file to write that takes the place of `path` once it is on disk, or never. keep: where that goes."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value):
    """`value` for JSON: paths become strings, numbers that are not finite become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(plain(content), indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def pick_device(name: str):
    """The torch.device called `name`; `auto` is CUDA or the CPU. UserError if this machine does not have it."""
    import torch

    available = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    device = torch.device(available[0] if name == "auto" else "cuda:0" if name == "cuda" else name)
    if str(device) not in available:
        raise UserError(f"argument --device: got {name!r}, this machine has {', '.join(available)}")
    return device


def set_up(args: Namespace) -> None:
    """Seed every global generator; set precision and determinism of the backends."""
    import torch

    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    if args.precision == "ieee":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # glibc keeps what a step frees, or each step waits for cleared pages, a fifth to a third of it (ResNet18).
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the max before glibc 2.35
        mallopt(trim_threshold, 2**31 - 1)


def git_commit() -> str | None:
    """The commit of this repository; None outside git, also where another repository holds an unpacked copy of it."""
    git = ["git", "-C", str(Path(__file__).parent), "--git-dir=.git", "--work-tree=."]  # whatever GIT_DIR a hook has
    git += ["describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return done.stdout.strip() if done and done.returncode == 0 else None


def environment(device) -> dict:
    """What ran this: versions of the libraries, the device by name, the git commit (None outside git)."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # which vector instructions, and so which order of sums
        "git_commit": git_commit(),
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, NumPy or Python say when there is too little memory, on any device."""
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler: Callable | signal.Handlers) -> dict:
    """Have `handler` get the signals to stop but those ignored, as under nohup. Returns {signal: handler before}."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in heeded}


@contextmanager
def handling(handler: Callable):
    """`handle`, and the handlers before again at the end: the process may go on, as a notebook does."""
    before = handle(handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


class Stopped(Exception):
    """A signal to stop came: the number of the signal is the argument."""


class Signals:
    """Remembers the first signal to stop until `check` is called; a second one ends the process at once."""

    signum = None

    def remember(self, signum, frame):
        """The handler."""
        self.signum = signum
        handle(signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped if a signal has come: called where the run's state is whole."""
        if self.signum:
            raise Stopped(self.signum)
