"""Device, seeding, memory, signals."""

import ctypes
import os
import platform
import random
import shutil
import signal
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from messages import UserError

# --- setting up ---------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the best there is. UserError if this machine does not have it."""
    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    device = torch.device(available[0] if name == "auto" else "cuda:0" if name == "cuda" else name)
    if str(device) not in available:
        raise UserError(f"argument --device: got {name!r}, this machine has {', '.join(available)}")
    return device


def set_up(args: Namespace) -> None:
    """Seed every global generator; set precision and determinism of the backends."""
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

    Or else every step waits for new, cleared pages: on the CPU (ResNet18) 10,000 page faults at b = 8, half a
    million at b = 128, and a fifth to a third of the time. No effect with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # before glibc 2.35 the most there is
        mallopt(trim_threshold, 2**31 - 1)


def environment(device: torch.device) -> dict:
    """What ran this: versions of the libraries, the device by name, the git commit (None outside git)."""
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
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # by torch's CPU allocator
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


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
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)

    @staticmethod
    def forget() -> None:
        """From here on a signal ends the process at once: for what comes when all is written, and may hang."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped if a signal has come: called where the run's state is whole."""
        if self.signum:
            raise Stopped(self.signum)
