"""A run's directory, `<runs_dir>/<name>/` (docs/record.md). Sweeps ask it how a run stands: no torch on import."""

import csv
import fcntl
import io
import os
import sys
import time
import uuid
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from arguments import ENDLESS, defaults, lagging, planned_steps, result_arguments
from measure.quantities import EVALUATED, INDEX, MEASURED, columns
from training.dashboard import Dashboard
from utils import UserError, environment, out_of_memory, plain, read_json, replacing, warn, write_json

METRICS = (
    *("steps", "epoch", "training_loss", "training_acc", "g-norm", "min_g-norm", "max_g-norm", "ave-norm"),
    *(*EVALUATED, "seconds"),
)
MEASUREMENTS = (*INDEX, *columns(*MEASURED), *EVALUATED)
FORMAT = (5, METRICS, MEASUREMENTS)  # of a checkpoint; to continue from it is to add to files of these columns
EXTENSIBLE = {"epochs", "max_steps", "eps"}  # a resumed run can be given more of these


def run_state(args: Namespace) -> str:
    """`new`, `unfinished`, or the status with which the run `args` names has ended. UserError as `ended_run`."""
    summary = ended_run(args)
    return summary["status"] if summary else "unfinished" if (args.runs_dir / args.name).exists() else "new"


def ended_run(args: Namespace) -> dict | None:
    """The summary of the run `args` names, if it has ended and `args` ask for nothing more. UserError if refused."""
    summary = read_summary(args.runs_dir / args.name)
    if summary is None:
        return None
    if reason := _other_arguments(summary["args"], summary["steps"], args):
        _refuse(f"{args.runs_dir / args.name} {reason}")
    if args.mode == "critical" and not set(args.eps) <= set(summary["args"]["eps"]):
        return None
    by_rule = args.mode == "critical" or args.until_loss is not None
    final = summary["status"] == "diverged" or (summary["status"] == "finished" and by_rule)
    return summary if final or planned_steps(args) <= summary["steps"] else None


def _other_arguments(before: dict, steps: int, args: Namespace) -> str:
    """Why `args` cannot continue a run that made `steps` with the arguments `before`; empty if they can."""
    now, before = plain(result_arguments(args)), defaults() | before  # a flag that is newer had its default
    named = [f"--{k} {v} (was {before.get(k)})" for k, v in now.items() if k not in EXTENSIBLE and before.get(k) != v]
    if named:
        return f"was begun with other arguments: {', '.join(named)}; give the same"
    if planned_steps(args) >= steps:
        return ""
    given = f"--max_steps {args.max_steps}" if (args.max_steps or ENDLESS) < steps else f"--epochs {args.epochs}"
    return f"is at step {steps} already, beyond {given}; give as much or more"


def _refuse(reason: str) -> NoReturn:
    raise UserError(f"argument --resume: {reason}, or give another --name")


def read_summary(directory: Path) -> dict | None:
    """summary.json of a run that has ended; None where there is none, or where it is damaged (with a warning)."""
    path = directory / "summary.json"
    summary = read_json(path)
    if summary.keys() >= {"status", "steps", "args"}:
        return summary
    if path.exists():
        warn(f"{path} is damaged; the run counts as unfinished")
    return None


class Growing:
    """A file that is appended to, of `size` bytes; `check` is called before every write."""

    def __init__(self, path: Path, check: Callable[[], None]):
        self.path, self.check, self.size = path, check, 0

    def append(self, content: bytes) -> None:
        """Add to its end."""
        self.check()
        with open(self.path, "ab") as file:
            file.write(content)
        self.size += len(content)

    def read(self) -> bytes:
        """All that was written."""
        return self.path.read_bytes()[: self.size] if self.size else b""

    def sync(self) -> None:
        """Have what is written on disk."""
        if self.size:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def size_on_disk(self) -> int:
        """Bytes that the file holds now; 0 where there is none."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes, or no file if it is 0. UserError if the file holds fewer."""
        if (found := self.size_on_disk()) < size:
            _refuse(f"{self.path} holds {found} bytes, the checkpoint counts on {size}; delete the directory")
        if size:
            os.truncate(self.path, size)
        else:
            self.path.unlink(missing_ok=True)
        self.size = size


class Rows(Growing):
    """A CSV file with fixed columns, whose first line names them; an empty cell was not measured."""

    def __init__(self, path: Path, check: Callable[[], None], names: tuple[str, ...]):
        super().__init__(path, check)
        self.names = names

    def append_row(self, row: dict) -> None:
        """Add a row; what it lacks, or is None, is an empty cell. ValueError if it has another column."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.names, lineterminator="\n")
        if self.size == 0:
            writer.writeheader()
        writer.writerow(row)
        self.append(text.getvalue().encode())

    def rows(self) -> list[dict[str, str]]:
        """All rows so far, as text."""
        return list(csv.DictReader(self.read().decode().splitlines()))


class Record:
    """One run's directory, this process's own from `claim` on, with its growing files, wandb run and progress bar."""

    def __init__(self, args: Namespace):
        self.args, self.directory = args, args.runs_dir / args.name
        self.metrics = Rows(self.directory / "metrics.csv", self._check_still, METRICS)
        self.norms = Growing(self.directory / "gradient_norms.f32", self._check_still)  # ‖g_t‖ as "<f4", every step
        self.measurements = Rows(self.directory / "measurements.csv", self._check_still, MEASUREMENTS)
        self._growing = (self.metrics, self.norms, self.measurements)
        self._lock_path = self.directory / ".lock"
        self._checkpoints = (self.directory / "checkpoint.pt", self.directory / "checkpoint.previous.pt")
        self.seconds, self._started = 0.0, time.monotonic()  # of the parts before; of this one
        self.data_checksum, self._omega, self._omega_step = None, None, None

    def check(self) -> dict | None:
        """`ended_run` with --resume; UserError also if the run is another process's. Writes nothing."""
        with _usable(self.directory):
            if self._lock_path.exists():
                with open(self._lock_path, "a") as file:  # to append, since NFS locks no file that is only read
                    self._lock(file)
            self._refuse_existing()
            return ended_run(self.args) if self.args.resume else None

    def claim(self, data_checksum: int) -> None:
        """Make the directory this process's own, for a run on data of this checksum. UserError if that fails."""
        self.data_checksum = data_checksum
        with _usable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self._lock_path, "a")  # noqa: SIM115 (held until the process ends)
            self._lock(self._lock_file)
            self._refuse_existing()  # `check` saw none, but another process may have come between

    def _lock(self, file) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"argument --name: {self.directory} belongs to another, running process") from error
        except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP: Lustre and NFS as some clusters mount them
            warn(f"{self.directory} cannot be locked ({error.strerror}): see that no second process uses it")

    def _check_still(self) -> None:
        """OSError if the directory was deleted or replaced since `claim`: another run may be writing there."""
        path, mine = self._lock_path, os.fstat(self._lock_file.fileno())
        if not (path.exists() and os.path.samestat(path.stat(), mine)):
            raise OSError(f"{self.directory} or its .lock was deleted or replaced in mid-run; nothing more is written")

    def _refuse_existing(self) -> None:
        if self.args.resume or not self.directory.exists() or not set(os.listdir(self.directory)) - {".lock"}:
            return
        status = (read_summary(self.directory) or {"status": "unfinished"})["status"]
        advice = "--resume continues it, another --name begins a new one"
        raise UserError(f"argument --name: {self.directory} exists already ({status}); {advice}")

    def begin(self, device, step: int) -> None:
        """Start logging at `step` on a torch.device. An agent, not a shell, names the wandb run by WANDB_RUN_ID."""
        self._check_still()
        before = read_json(self.directory / "args.json")
        same_run = before.get("args", {}).get("name") == self.args.name  # and no copy under another name
        parts = [part for part in before.get("environments", []) if part["first_step"] < step]
        now = {"first_step": step} | environment(device)
        own_id = (same_run and before.get("wandb_id")) or uuid.uuid4().hex[:12]
        run_id = (os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")) or own_id
        about = {"args": vars(self.args), "data_checksum": self.data_checksum}
        write_json(self.directory / "args.json", about | {"wandb_id": run_id, "environments": [*parts, now]})
        config = plain(result_arguments(self.args) | {"environment": now})
        if "steps" in config:
            config["sampling_steps"] = config.pop("steps")  # `steps` is the axis of every metric
        self.dashboard = Dashboard(self.args, self.directory, config, run_id)
        path = self.directory / "omega.npy"
        omega = {self._omega_step: np.load(path)} if self._omega_step is not None and path.exists() else {}
        self.dashboard.replay(self.metrics.rows(), self.measurements.rows(), omega)
        total = None if planned_steps(self.args) == ENDLESS else planned_steps(self.args)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())

    def log(self, row: dict | None, measured: list[dict], say: bool) -> None:
        """Log one step: a row of METRICS without `seconds` (None at step 0) and rows of MEASUREMENTS. say: print."""
        if row is not None:
            row = row | {"seconds": round(self.elapsed(), 3)}
            self.metrics.append_row(row)
        for each in measured:
            self.measurements.append_row(each)
        self.dashboard.log(row or {}, measured, self._omega)
        self._omega = None
        if row and say:
            line = " ".join(f"{key} {row[key]:.4g}" for key in METRICS[1:] if row.get(key) is not None)
            doubt = lagging(self.args.model, row["steps"]) if "accuracy" in line else ""
            with tqdm.external_write_mode():
                print(f"step {row['steps']} {line}{doubt and f' (accuracy {doubt})'}", flush=True)

    def save_omega(self, omega: np.ndarray, step: int) -> None:
        """Keep ω of step `step`, flat float32, in omega.npy; the next `log` shows its histogram in wandb."""
        self._check_still()
        with replacing(self.directory / "omega.npy") as file:
            np.save(file, omega, allow_pickle=False)
        self._omega, self._omega_step = omega, step

    def elapsed(self) -> float:
        """Seconds that this run has taken, over all its parts."""
        return self.seconds + time.monotonic() - self._started

    def finish(self, status: str, steps: int, epochs: float, results: dict) -> None:
        """Write summary.json, which ends the run. OSError if a file does not hold what was written to it."""
        self._check_still()
        for file in self._growing:
            if file.size_on_disk() != file.size:
                raise OSError(f"something else changed {file.path}: it has not the {file.size} bytes written to it")
        summary = {"status": status, "mode": self.args.mode, "steps": steps, "epochs": epochs}
        summary |= {"seconds": self.elapsed(), "args": vars(self.args), "results": results}
        write_json(self.directory / "summary.json", summary)
        self.bar.close()
        self.dashboard.log_results(status, plain(results))

    def close(self, exit_code: int) -> None:
        """End progress and wandb, which may take FINISH_LIMIT seconds if it hangs: nothing else is left to do."""
        self.bar.close()
        self.dashboard.close(exit_code)
        self._lock_file.close()  # the process may go on, as a notebook does

    def save_checkpoint(self, content: dict) -> None:
        """Write a checkpoint of tensors and plain values; the one before is kept. OSError if the disk is full."""
        import torch

        self._check_still()
        for file in self._growing:
            file.sync()  # what the checkpoint counts on must be on disk before it
        content = content | {"format": FORMAT, "args": plain(vars(self.args)), "seconds": self.elapsed()}
        content |= {"sizes": {file.path.name: file.size for file in self._growing}}
        content |= {"data_checksum": self.data_checksum, "omega_step": self._omega_step}
        newest, previous = self._checkpoints
        try:
            with replacing(newest, keep=previous) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk behind its own error
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(f"no checkpoint could be written ({cause}); the one before, if any, is kept") from error

    def load_checkpoint(self) -> dict | None:
        """The newest whole checkpoint, on the CPU, the files cut back to its sizes; None if none. UserError if bad."""
        content = self._newest_whole()
        for file in self._growing:
            file.cut(content["sizes"][file.path.name] if content else 0)
        if content:
            self.seconds, self._omega_step = content["seconds"], content["omega_step"]
            if self.args.mode == "critical":
                self.args.eps = sorted({*self.args.eps, *content["args"]["eps"]}, reverse=True)
        return content

    def _newest_whole(self) -> dict | None:
        import torch

        reason = ""
        for path in filter(Path.exists, self._checkpoints):
            try:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():  # torch.load does not compare the checksums
                        raise ValueError("a checksum differs")
                content = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever garbage in a file brings about
                if out_of_memory(error):
                    raise
                reason = f"{path} is damaged ({type(error).__name__}: {error})"
                continue
            if content.get("format") != FORMAT:
                _refuse(f"{self.directory} was checkpointed by another version of this code; continue with that one")
            if other := _other_arguments(content["args"], content["step"], self.args):
                _refuse(f"{self.directory} {other}")
            if content["data_checksum"] != self.data_checksum:
                _refuse(f"{self.directory} was begun with other data than --data_dir {self.args.data_dir} has")
            if reason:
                warn(f"{reason}; continuing from {path.name}")
                self._checkpoints[0].unlink()  # or else the next write would keep it in the place of the good one
            return content
        if reason or read_summary(self.directory):
            reason = reason or "the run has ended, and its checkpoint is gone"
            _refuse(f"no good checkpoint in {self.directory}: {reason}; delete the directory")
        return None


@contextmanager
def _usable(directory: Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"argument --runs_dir: {directory} cannot be used ({error}); name a writable one") from error
