"""What everything needs: errors said in one line, files written whole, device, seeds, signals. Loads no torch."""

import ctypes
import functools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# --- what is said to the user -------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's or of the surroundings: printed as one line, `error: …`; exit status 2."""


def say(kind: str, message: object) -> None:
    """Print `kind: message` on stderr, as one line whatever `message` holds."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


@functools.cache
def warn(message: str) -> None:
    """`say` a warning; the same one only once."""
    say("warning", message)


def usable_streams() -> None:
    """Make stdin, stdout and stderr such that printing never fails: a closed one discards, no letter is refused.

    Otherwise the next file opened would get the closed one's number, and what libraries print with it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


# --- files --------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, keep: Path | None = None):
    """A binary file to write that takes the place of `path` when it is complete and on disk, or never.

    keep: where the file that was at `path` goes then, instead of being lost.
    """
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
    """The object in a JSON file. OSError if it cannot be read, ValueError if it holds none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


# --- setting up ---------------------------------------------------------------------------------------------


def pick_device(name: str):
    """The torch.device called `name`; `auto` is the best there is. UserError if this machine does not have it."""
    import torch

    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
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
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of returning it to the system at once.

    Otherwise every step waits for new, cleared pages: on the CPU (ResNet18) 10,000 page faults at b = 8, half a
    million at b = 128, and a fifth to a third of the time. No effect with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the max before glibc 2.35
        mallopt(trim_threshold, 2**31 - 1)


def environment(device) -> dict:
    """What ran this: versions of the libraries, the device by name, the git commit (None outside git)."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # which vector instructions, and so which order of sums
        "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, NumPy or Python say when there is too little memory, on any device."""
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


# --- signals ------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or SIGINT came; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Remembers the first SIGTERM or SIGINT until `check` is called; a second one ends the process at once."""

    def __init__(self):
        self.signum = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._remember)

    def _remember(self, signum, frame):
        self.signum = signum
        self.forget()

    @staticmethod
    def forget() -> None:
        """From here on a signal ends the process at once."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped if a signal has come: called where the run's state is whole."""
        if self.signum:
            raise Stopped(self.signum)
