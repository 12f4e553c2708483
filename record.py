"""A run's directory, `<runs_dir>/<name>/`: its lock, its rows, its checkpoints."""

import csv
import fcntl
import io
import os
import sys
import time
import uuid
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from arguments import (
    ENDLESS,
    UserError,
    differences,
    ended_run,
    lower_cap,
    plain,
    planned_steps,
    read_args,
    read_summary,
    refuse,
    result_arguments,
    warn,
)
from dashboard import Dashboard
from utils import environment, out_of_memory, replacing, to_json, write_json

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # newest first
CHECKPOINT_FORMAT = 2  # 1 was written after the last window had been counted
CHECKPOINT_KEYS = {"format", "args", "step", "rows", "seconds", "norms_recorded", "norms_checksum", "data_checksum"}
NORMS = "gradient_norms.f32"


class Record:
    """One run's directory, owned by this process from `claim` on; its wandb run and its progress bar.

    `rows` is metrics.csv in memory, and goes into every checkpoint, so that the file can always be restored.
    """

    def __init__(self, args: Namespace):
        self.args, self.directory = args, args.runs_dir / args.name
        self.history = History(self.directory / NORMS)
        self.rows: list[str] = []
        self.seconds, self._started = 0.0, time.monotonic()
        self.data_checksum, self._omega_checksum = None, None

    # --- whose it is ---

    def check(self) -> dict | None:
        """The summary of this run if it has ended and going on would add nothing. Writes nothing.

        Raises UserError if the run exists and --resume is not given, another process owns it, it was made with
        other arguments, or its directory cannot be used.
        """
        lock = self.directory / ".lock"
        with self._usable():
            if lock.exists():
                with open(lock, "a") as file:  # to append, since NFS locks no file that is only read
                    self._lock(file)
            self._refuse_existing()
            return ended_run(self.args) if self.args.resume else None

    def claim(self, data_checksum: int) -> None:
        """Make the directory this process's own, for a run on data of this checksum. UserError if that cannot be."""
        self.data_checksum = data_checksum
        with self._usable():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.directory / ".lock", "a")  # noqa: SIM115 (held until the process ends)
            self._lock(self._lock_file)
            self.still_ours()
            self._refuse_existing()  # a moment ago it did not exist, but another process may have come between

    def still_ours(self) -> None:
        """OSError if since `claim` the directory was deleted or replaced: another run may be writing there."""
        try:
            found = os.stat(self.directory / ".lock")
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self._lock_file.fileno())):
            raise OSError(f"{self.directory} or its .lock was deleted or replaced in mid-run; nothing more is written")

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
        summary, before = read_summary(self.directory), read_args(self.directory).get("args")
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
        except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP: Lustre and NFS as they are mounted on some clusters
            warn(f"{self.directory} cannot be locked ({error.strerror}): see to it that no second process uses it")

    # --- what it holds ---

    def begin(self, device: torch.device, step: int) -> None:
        """Start logging at `step`: args.json, metrics.csv as far as it is known, wandb, progress."""
        self.still_ours()
        before = read_args(self.directory)
        same_run = before.get("args", {}).get("name") == self.args.name  # and no copy under another name
        parts = [part for part in environments(before) if part["first_step"] < step]
        now = {"first_step": step} | environment(device)
        if parts:
            warn_of_other_bits(parts[-1], now)
        given = os.environ.get("WANDB_RUN_ID")  # by a wandb agent, whose sweep knows the run by it
        run_id = given or (same_run and before.get("wandb_id")) or uuid.uuid4().hex[:12]
        self._about = {"args": vars(self.args), "data_checksum": self.data_checksum}
        self._about |= {"wandb_id": run_id, "environments": [*parts, now]}
        self._restore("args.json", to_json(self._about))
        self._restore("metrics.csv", "".join(self.rows).encode())
        self._csv = open(self.directory / "metrics.csv", "a", encoding="utf-8")  # noqa: SIM115
        config = plain(result_arguments(self.args) | {"environment": now})
        if "steps" in config:
            config["sampling_steps"] = config.pop("steps")  # `steps` is the axis of every metric
        known = [{key: float(v) for key, v in row.items()} for row in csv.DictReader("".join(self.rows).splitlines())]
        self.dashboard = Dashboard(self.args, self.directory, config, run_id, known)
        total = planned_steps(self.args)
        self.bar = tqdm(
            total=None if total == ENDLESS else total, initial=step, unit="step", disable=not sys.stderr.isatty()
        )

    def log(self, row: dict, show: bool) -> None:
        """One row of metrics.csv and of wandb, beginning with `steps`. show: print it too."""
        self.still_ours()
        row = row | {"seconds": round(self.elapsed(), 3)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.rows:
            writer.writerow(row)
        writer.writerow(row.values())
        self.rows.append(text.getvalue())
        self._csv.write(self.rows[-1])
        self._csv.flush()
        self.dashboard.log(row)
        if show:
            line = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "steps")
            with tqdm.external_write_mode():
                print(f"step {row['steps']} {line}", flush=True)

    def append_norms(self, norms: np.ndarray) -> None:
        """Add gradient norms to the history."""
        self.still_ours()
        self.history.append(norms)

    def save_omega(self, omega: np.ndarray, step: int) -> None:
        """Keep ω of step `step`, flat float32, and show its histogram in wandb."""
        self.still_ours()
        path = self.directory / "omega.npy"
        with replacing(path) as file:
            np.save(file, omega, allow_pickle=False)
        self._omega_checksum = checksum(path)
        counts = np.histogram(omega, bins=100)

        def histogram(run) -> None:
            from wandb import Histogram

            run.log({"steps": step, "omega": Histogram(np_histogram=counts)})

        self.dashboard.send(histogram)

    def elapsed(self) -> float:
        """Seconds that this run has taken, over all its parts."""
        return self.seconds + time.monotonic() - self._started

    # --- its end ---

    def finish(self, status: str, steps: int, epochs: float, results: dict) -> None:
        """See to it that every file is as it was written; write summary.json, which ends the run; print it.

        Raises OSError if a file was changed that cannot be restored, and that --resume makes again.
        """
        self.still_ours()
        for name, content in (("args.json", to_json(self._about)), ("metrics.csv", "".join(self.rows).encode())):
            if self._restore(name, content):
                warn(f"something else changed {self.directory / name}; it is restored")
        if not self.history.intact():
            self.history.give_up()
        omega = self.directory / "omega.npy"
        if self._omega_checksum is not None and checksum(omega) != self._omega_checksum:
            raise OSError(f"something else changed {omega}; the same command with --resume measures ω again")
        summary = {"status": status, "mode": self.args.mode, "steps": steps, "epochs": epochs}
        summary |= {"seconds": self.elapsed(), "args": vars(self.args), "results": results}
        write_json(self.directory / "summary.json", summary)
        self.bar.close()
        print_results(f"{status} after {steps} steps: {self.directory}", plain(results))
        totals = {k: v for k, v in plain(results).items() if not isinstance(v, dict)}
        totals.pop("accuracy", None)  # define_metric has its last and its greatest value there
        for name in ("steps_to_eps", "sfo"):
            totals |= {f"{name}/{eps}": v for eps, v in results.get(name, {}).items()}
        self.dashboard.send(lambda run: run.summary.update(totals | {"status": status}))

    def close(self, exit_code: int) -> None:
        """End progress and wandb, which may take FINISH_LIMIT seconds if it hangs: nothing else is left to do."""
        self.bar.close()
        self.dashboard.close(exit_code)

    def _restore(self, name: str, content: bytes) -> bool:
        """Make the file `name` hold `content`; whether it did not."""
        path = self.directory / name
        if path.is_file() and path.read_bytes() == content:
            return False
        with replacing(path) as file:
            file.write(content)
        return True

    # --- checkpoints: the newest, and the one before, kept until the newest is whole ---

    def save_checkpoint(self, content: dict) -> None:
        """Write a checkpoint of tensors and plain values, with what this record needs to go on from it."""
        self.still_ours()
        newest, previous = (self.directory / name for name in CHECKPOINTS)
        self.history.sync()  # what the checkpoint counts on must be on disk before it
        content = content | {"args": plain(vars(self.args)), "rows": self.rows, "seconds": self.elapsed()}
        content |= {"data_checksum": self.data_checksum, "norms_checksum": self.history.checksum}
        content["format"] = CHECKPOINT_FORMAT
        try:
            with replacing(newest, keep=previous) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk behind its own error
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "the last good one is kept, --resume goes on from it"
            if not (newest.exists() or previous.exists()):
                kept = "there is none before it, --resume starts again"
            raise OSError(f"no checkpoint could be written ({cause}); {kept}") from error

    def load_checkpoint(self) -> dict | None:
        """The newest good checkpoint, on the CPU; None if there is none at all.

        A damaged one is named in a warning, and removed if the one before is good: else the next checkpoint would
        take that one's place with the damaged one. Where none fits the history of gradient norms, the newest is
        taken, and the history given up. Raises UserError if all are damaged, if the run has ended and they are
        gone, or if the arguments or the data differ.
        """
        damaged, fallback = {}, None
        for path in (self.directory / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                content = _read_checkpoint(path)
            except Exception as error:  # whatever garbage in a file brings about
                if out_of_memory(error):
                    raise
                damaged[path] = f"{path} is damaged ({type(error).__name__}: {error})"
                continue
            self._refuse_others(content)
            if self.history.cut(content["norms_recorded"], content["norms_checksum"]):
                for other, reason in damaged.items():
                    warn(f"{reason}; going on from {path.name}")
                    other.unlink()
                return self._go_on(content)
            damaged[path] = f"{path} counts on other gradient norms than {NORMS} holds"
            fallback = fallback or content
        if fallback:
            self._refuse_new_eps(fallback)
            self.history.give_up(fallback["norms_recorded"])
            return self._go_on(fallback)
        if damaged or read_summary(self.directory):
            reasons = "; ".join(damaged.values()) or "the run has ended, and its checkpoint is gone"
            raise UserError(
                f"argument --resume: no good checkpoint in {self.directory}: {reasons}; "
                "delete the directory to start again, or give another --name"
            )
        self.history.cut(0, 0)
        return None

    def _refuse_others(self, content: dict) -> None:
        if content["format"] != CHECKPOINT_FORMAT:
            refuse("was checkpointed by another version of this code; go on with that one", self.args)
        refuse(differences(content["args"], self.args), self.args)
        refuse(lower_cap(content["step"], self.args), self.args)
        before = content["data_checksum"]
        if before != self.data_checksum:
            refuse(
                f"was begun with other data than lies in --data_dir {self.args.data_dir} now (checksum {before}, "
                f"now {self.data_checksum}); give the same",
                self.args,
            )

    def _refuse_new_eps(self, content: dict) -> None:
        new = sorted(set(self.args.eps) - set(content["args"]["eps"]))
        refuse(f"has lost gradient norms, in which a new --eps {new} would be looked for" if new else "", self.args)

    def _go_on(self, content: dict) -> dict:
        if np.isnan(self.history.read()).any():
            self._refuse_new_eps(content)
        self.rows, self.seconds = content["rows"], content["seconds"]
        self.args.eps = sorted({*self.args.eps, *content["args"]["eps"]}, reverse=True)
        return content


class History:
    """gradient_norms.f32: ‖g_t‖ of every step, 4 bytes a step, little-endian float32.

    count, checksum: of all that was written, by which the file is told from one that something else has changed.
    """

    def __init__(self, path: Path):
        self.path, self.count, self.checksum = path, 0, 0

    def append(self, norms: np.ndarray) -> None:
        """Add the norms of the next steps."""
        content = norms.astype("<f4").tobytes()
        with open(self.path, "ab") as file:
            file.write(content)
        self.count += len(norms)
        self.checksum = zlib.crc32(content, self.checksum)

    def read(self) -> np.ndarray:
        """All norms, float32; NaN where they were lost."""
        return np.fromfile(self.path, "<f4", self.count) if self.count else np.zeros(0, "<f4")

    def sync(self) -> None:
        """Have what is written on disk."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def intact(self) -> bool:
        """Whether the file holds what was written, and no more."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size == 4 * self.count and checksum(self.path, size) == self.checksum

    def cut(self, count: int, expected: int) -> bool:
        """Take the file for the first `count` norms, if they have the `expected` checksum, and cut off the rest.

        False, and nothing is changed, if it does not hold them.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        found = checksum(self.path, 4 * count) if size >= 4 * count else None
        if found != expected:
            return False
        if size > 4 * count:
            os.truncate(self.path, 4 * count)
        self.count, self.checksum = count, found
        return True

    def give_up(self, count: int | None = None) -> None:
        """Put NaN in the place of all norms (now `count` of them), and the damaged file beside it."""
        count = self.count if count is None else count
        aside = self.path.with_name("gradient_norms.damaged.f32")
        with replacing(self.path, keep=aside) as file:
            file.write(np.full(count, np.nan, "<f4").tobytes())
        self.count, self.checksum = count, checksum(self.path)
        warn(
            f"something else changed {self.path}: it now holds nan for the {count} steps so far, {aside.name} what "
            "was found; no other number depends on it, but no further --eps can be looked for in it"
        )


def checksum(path: Path, size: int | None = None) -> int | None:
    """The CRC-32 of a file, or of its first `size` bytes; of none, 0; None if there is no such file."""
    if size == 0:
        return 0
    if not path.is_file():
        return None
    return zlib.crc32(np.fromfile(path, np.uint8, -1 if size is None else size))


def environments(about: dict) -> list[dict]:
    """What ran each part of a run, by its args.json; that of a record from before there were parts is one."""
    parts = about.get("environments")
    if parts is None and isinstance(about.get("environment"), dict):
        parts = [{"first_step": 0} | about["environment"]]
    known = isinstance(parts, list) and all(isinstance(p, dict) and "first_step" in p for p in parts)
    return parts if known else []


def warn_of_other_bits(before: dict, now: dict) -> None:
    """One warning if what runs this part of a run computes other bits than what ran the part before it."""
    keys = ["torch", "numpy", "device", "git_commit"]
    keys += ["threads", "cpu"] if now["device"] == "cpu" else []
    changed = [f"{key} {now[key]} (was {before[key]})" for key in keys if before.get(key, now[key]) != now[key]]
    if changed:
        warn(f"resumed with {', '.join(changed)}: the last bits may differ from an uninterrupted run's; see args.json")


def print_results(heading: str, results: dict) -> None:
    """Show how a run ended."""
    print(heading)
    for key, value in results.items():
        print(f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}")
    if results.get("at_first_check"):
        print("  (at_first_check: reached when first looked at, perhaps before; these steps are upper bounds)")
    sys.stdout.flush()


def _read_checkpoint(path: Path) -> dict:
    if not path.is_file():
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    missing = {"format", "args", "step", "rows", "seconds", "norms_recorded", "norms_checksum", "data_checksum"} - set(
        content
    )
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return content
