"""Seeding, signals, checkpoints, and the record a run leaves: local files, wandb, progress."""

import csv
import ctypes
import fcntl
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from arguments import (
    ENDLESS,
    EXIT_STATUS,
    UserError,
    begun_with,
    differences,
    ended_run,
    lower_cap,
    plain,
    planned_steps,
    read_summary,
    refuse,
    result_arguments,
    warn,
)

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # newest first
CHECKPOINT_FORMAT = 2  # 1 was written after the last window had been counted
NORMS = "gradient_norms.f32"


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
        "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
    }


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

    def check(self) -> None:
        """Raise Stopped if a signal has come: called where the run's state is whole."""
        if self.signum:
            raise Stopped(self.signum)


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


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(plain(content), indent=1, allow_nan=False).encode() + b"\n")


# --- the record ---------------------------------------------------------------------------------------------


class Record:
    """One run's directory, `<runs_dir>/<name>/`, owned by this process from `claim` on; its wandb run.

    `rows` is metrics.csv in memory, and goes into every checkpoint, so that the file can always be restored.
    """

    def __init__(self, args: Namespace):
        self.args, self.directory = args, args.runs_dir / args.name
        self.rows: list[str] = []
        self.seconds, self._started = 0.0, time.monotonic()
        self.wandb, self.bar = None, None

    def check(self) -> dict | None:
        """The summary of this run if it has ended and going on would add nothing. Writes nothing.

        Raises UserError if the run exists and --resume is not given, another process owns it, it was made with
        other arguments, or its directory cannot be used.
        """
        lock = self.directory / ".lock"
        with self._usable():
            if lock.exists():
                with open(lock) as file:
                    self._lock(file)
            self._refuse_existing()
            return ended_run(self.args) if self.args.resume else None

    def claim(self) -> None:
        """Make the directory this process's own. UserError if that cannot be."""
        with self._usable():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.directory / ".lock", "a")  # noqa: SIM115 (held until the process ends)
            self._lock(self._lock_file)
            self._refuse_existing()  # a moment ago it did not exist, but another process may have come between

    @contextmanager
    def _usable(self):
        try:
            yield
        except OSError as error:
            message = f"argument --runs_dir: {self.directory} cannot be used ({error}); name a writable directory"
            raise UserError(message) from error

    def _refuse_existing(self) -> None:
        if self.args.resume or not self.directory.exists() or not set(os.listdir(self.directory)) - {".lock"}:
            return
        summary, before = read_summary(self.directory), begun_with(self.directory)
        reason = differences(before, self.args) if before else ""
        if summary and not reason:
            reason = lower_cap(summary["steps"], self.args)
        advice = f" and {reason}, or another --name" if reason else "; --resume goes on with it, another --name begins"
        state = summary["status"] if summary else "unfinished"
        raise UserError(f"argument --name: {self.directory} exists already ({state}){advice}")

    def _lock(self, file) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"argument --name: {self.directory} belongs to another, running process") from error

    def begin(self, device: torch.device, step: int) -> None:
        """Start logging at `step`: args.json, metrics.csv as far as it is known, wandb, progress."""
        content = {"args": vars(self.args), "environment": environment(device)}
        write_json(self.directory / "args.json", content)
        with replacing(self.directory / "metrics.csv") as file:
            file.write("".join(self.rows).encode())
        self._csv = open(self.directory / "metrics.csv", "a", encoding="utf-8")  # noqa: SIM115
        config = plain(result_arguments(self.args) | {"environment": content["environment"]})
        if "steps" in config:
            config["sampling_steps"] = config.pop("steps")  # `steps` is the axis of every metric
        self.wandb = start_wandb(self.args, self.directory, config)
        total = planned_steps(self.args)
        self.bar = tqdm(
            total=None if total == ENDLESS else total, initial=step, unit="step", disable=not sys.stderr.isatty()
        )

    def log(self, row: dict, show: bool) -> None:
        """One row of metrics.csv and of wandb, beginning with `steps`. show: print it too."""
        row = row | {"seconds": round(self.elapsed(), 3)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.rows:
            writer.writerow(row)
        writer.writerow(row.values())
        self.rows.append(text.getvalue())
        self._csv.write(self.rows[-1])
        self._csv.flush()
        self.to_wandb(lambda run: run.log(row))
        if show:
            line = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "steps")
            with tqdm.external_write_mode():
                print(f"step {row['steps']} {line}", flush=True)

    def append_norms(self, norms: np.ndarray) -> None:
        """Add gradient norms to the history, 4 bytes a step: little-endian float32."""
        with open(self.directory / NORMS, "ab") as file:
            file.write(norms.astype("<f4").tobytes())

    def norms(self, count: int) -> np.ndarray:
        """The first `count` gradient norms of the history, float32."""
        return np.fromfile(self.directory / NORMS, "<f4", count) if count else np.zeros(0, "<f4")

    def save_omega(self, omega: np.ndarray, step: int) -> None:
        """Keep ω of step `step`, flat float32, and show its histogram in wandb."""
        with replacing(self.directory / "omega.npy") as file:
            np.save(file, omega, allow_pickle=False)

        def histogram(run) -> None:
            from wandb import Histogram

            run.log({"steps": step, "omega": Histogram(np_histogram=np.histogram(omega, bins=100))})

        self.to_wandb(histogram)

    def elapsed(self) -> float:
        """Seconds that this run has taken, over all its parts."""
        return self.seconds + time.monotonic() - self._started

    def finish(self, status: str, steps: int, epochs: float, results: dict) -> None:
        """Write summary.json, which ends the run, and close wandb."""
        summary = {"status": status, "mode": self.args.mode, "steps": steps, "epochs": epochs}
        summary |= {"seconds": self.elapsed(), "args": vars(self.args), "results": results}
        write_json(self.directory / "summary.json", summary)
        flat = {k: v for k, v in plain(results).items() if not isinstance(v, dict)}
        flat.pop("accuracy", None)  # define_metric has its last and its greatest value there
        for name in ("steps_to_eps", "sfo"):
            flat |= {f"{name}/{eps}": v for eps, v in results.get(name, {}).items()}
        self.to_wandb(lambda run: run.summary.update(flat | {"status": status}))
        self.close(exit_code=EXIT_STATUS[status])
        print(f"{status} after {steps} steps: {self.directory}")
        for key, value in plain(results).items():
            print(f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}")
        if results.get("at_first_check"):
            print("  (at_first_check: reached when first looked at, perhaps before; these steps are upper bounds)")

    def close(self, exit_code: int) -> None:
        """End progress and wandb, and say how an offline wandb run is synchronized."""
        self.bar.close()
        offline = self.wandb is not None and self.wandb.settings.mode == "offline"
        path = Path(self.wandb.dir).parent if offline else None
        self.to_wandb(lambda run: run.finish(exit_code=exit_code))
        if path:
            print(f"wandb: to upload this run, `wandb sync {path}`")

    def to_wandb(self, call: Callable) -> None:
        """Let `call` use the wandb run; whatever goes wrong there is said once and ends wandb, not the training."""
        if self.wandb is not None:
            try:
                call(self.wandb)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                warn(f"wandb failed ({reason}); going on without it, the local record is complete")
                self.wandb = None
                with suppress(Exception):  # it says again at exit what has just been said
                    sys.modules["wandb"].teardown()

    # --- checkpoints: the newest, and the one before, kept until the newest is whole ---

    def save_checkpoint(self, content: dict) -> None:
        """Write a checkpoint of tensors and plain values, with what this record needs to go on from it."""
        newest, previous = (self.directory / name for name in CHECKPOINTS)
        norms = self.directory / NORMS
        if norms.exists():  # what the checkpoint counts on must be on disk before it
            with open(norms, "rb") as file:
                os.fsync(file.fileno())
        content = content | {"args": plain(vars(self.args)), "rows": self.rows, "seconds": self.elapsed()}
        content["format"] = CHECKPOINT_FORMAT
        try:
            with replacing(newest, keep=previous) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk behind its own error
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            message = f"no checkpoint could be written ({cause}); the last good one is kept, --resume goes on from it"
            raise OSError(message) from error

    def load_checkpoint(self) -> dict | None:
        """The newest good checkpoint, on the CPU; None if there is none at all.

        A damaged one is named in a warning, and removed if the one before is good: else the next checkpoint would
        take that one's place with the damaged one. Raises UserError if all are damaged, if the run has ended and
        they are gone, or if the arguments differ.
        """
        damaged = {}
        for path in (self.directory / name for name in CHECKPOINTS):
            if path.exists():
                try:
                    content = _read_checkpoint(path)
                    if content.get("format") != CHECKPOINT_FORMAT:
                        refuse("was checkpointed by another version of this code; go on with that one", self.args)
                    refuse(differences(content["args"], self.args), self.args)
                    refuse(lower_cap(content["step"], self.args), self.args)
                    self._cut_norms(content["norms_recorded"])
                except UserError:
                    raise
                except Exception as error:  # whatever garbage in a file brings about
                    damaged[path] = f"{path} is damaged ({type(error).__name__}: {error})"
                    continue
                for other, reason in damaged.items():
                    warn(f"{reason}; going on from {path.name}")
                    other.unlink()
                self.rows, self.seconds = content["rows"], content["seconds"]
                self.args.eps = sorted({*self.args.eps, *content["args"]["eps"]}, reverse=True)
                return content
        if damaged or read_summary(self.directory):
            reasons = "; ".join(damaged.values()) or "the run has ended, and its checkpoint is gone"
            raise UserError(
                f"argument --resume: no good checkpoint in {self.directory}: {reasons}; "
                "delete the directory to start again, or give another --name"
            )
        self._cut_norms(0)
        return None

    def _cut_norms(self, count: int) -> None:
        path = self.directory / NORMS
        size = path.stat().st_size if path.exists() else 0
        if size < 4 * count:
            raise ValueError(f"{path} holds {size // 4} gradient norms of the {count} there were")
        if size > 4 * count:
            os.truncate(path, 4 * count)


def _read_checkpoint(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


# --- wandb --------------------------------------------------------------------------------------------------


def start_wandb(args: Namespace, directory: Path, config: dict):
    """A wandb run that logs against `steps`, or None (disabled, not installed, or it does not start)."""
    has_entity = args.wandb_entity != "XXXXXX"
    if args.wandb_mode == "disabled":
        return None
    os.environ.setdefault("WANDB_CACHE_DIR", str((directory / "wandb").absolute()))
    os.environ.pop("WANDB_MODE", None)  # it has had its say in args.wandb_mode
    tags = [args.dataset, args.model, args.optimizer, f"lr {args.lr:g}", f"b {args.batchsize}"]
    tags += [f"β {args.beta1:g}"] if "beta1" in result_arguments(args) else []
    for attempt in dict.fromkeys((args.wandb_mode, "offline")):
        stdin = sys.stdin
        try:
            import wandb

            sys.stdin = open(os.devnull)  # noqa: SIM115 (without a key it must fail, not ask and wait)
            run = wandb.init(
                entity=args.wandb_entity if has_entity else None,
                project=args.wandb_project,
                mode=attempt,
                dir=directory,
                name=args.name,
                group=args.name.removesuffix(f"-seed{args.seed}"),
                job_type=args.mode,
                tags=tags,
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
            run.define_metric("steps")
            run.define_metric("*", step_metric="steps")
            run.define_metric("accuracy", step_metric="steps", summary="last,max")
            if attempt == "offline":
                print(f"wandb: logging offline{'' if has_entity else ' (no --wandb_entity)'}")
            return run
        except Exception as error:
            warn(f"wandb did not start in mode {attempt!r} ({type(error).__name__}: {error})")
        finally:
            sys.stdin = stdin
    return None
