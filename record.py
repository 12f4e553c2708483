"""A run's directory, `<runs_dir>/<name>/`: its lock, its rows, its checkpoints, its end."""

import os
import sys
import time
import uuid
from argparse import Namespace

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import state
from arguments import ENDLESS, planned_steps, result_arguments
from dashboard import Dashboard
from files import Growing, Norms, Rows, checksum, plain, replacing, to_json, write_json
from messages import UserError, warn
from owner import Owner, usable
from utils import environment


class Record:
    """One run's directory, owned by this process from `claim` on; its wandb run and its progress bar.

    metrics, norms, full_gradients, measurements, shape, landscape: the files that grow, each of one kind of row; a
    checkpoint says how far it counts on them.
    """

    def __init__(self, args: Namespace):
        self.args, self.directory = args, args.runs_dir / args.name
        self.owner = Owner(self.directory)
        self.metrics = Rows(self.directory / "metrics.csv")
        self.norms = Norms(self.directory / "gradient_norms.f32")
        self.full_gradients = Rows(self.directory / "full_gradients.csv")
        self.measurements = Rows(self.directory / "measurements.csv")
        self.shape = Rows(self.directory / "shape.csv")
        self.landscape = Rows(self.directory / "landscape.csv")
        self.growing = (self.metrics, self.norms, self.full_gradients, self.measurements, self.shape, self.landscape)
        self.seconds, self._started = 0.0, time.monotonic()
        self.data_checksum, self._omega_checksum = None, None

    # --- whose it is ---

    def check(self) -> dict | None:
        """The summary of this run if it has ended and going on would add nothing. Writes nothing.

        Raises UserError if the run exists and --resume is not given, another process owns it, it was made with
        other arguments, or its directory cannot be used.
        """
        self.owner.check()
        with usable(self.directory):
            self._refuse_existing()
            return state.ended_run(self.args) if self.args.resume else None

    def claim(self, data_checksum: int) -> None:
        """Make the directory this process's own, for a run on data of this checksum. UserError if that cannot be."""
        self.data_checksum = data_checksum
        self.owner.claim()
        with usable(self.directory):
            self._refuse_existing()  # a moment ago it did not exist, but another process may have come between

    def _refuse_existing(self) -> None:
        if self.args.resume or not self.directory.exists() or not set(os.listdir(self.directory)) - {".lock"}:
            return
        summary, before = state.read_summary(self.directory), state.read_args(self.directory).get("args")
        reason = state.differences(before, self.args) if before else ""
        if summary and not reason:
            reason = state.lower_cap(summary["steps"], self.args)
        advice = f" and {reason}, or another --name" if reason else "; --resume goes on with it, another --name begins"
        status = summary["status"] if summary else "unfinished"
        raise UserError(f"argument --name: {self.directory} exists already ({status}){advice}")

    # --- what it holds ---

    def begin(self, device: torch.device, step: int) -> None:
        """Start logging at `step`: args.json, wandb, progress."""
        self.owner.check_still()
        before = state.read_args(self.directory)
        same_run = before.get("args", {}).get("name") == self.args.name  # and no copy under another name
        parts = [part for part in state.environments(before) if part["first_step"] < step]
        now = {"first_step": step} | environment(device)
        if parts:
            state.warn_of_other_bits(parts[-1], now)
        given = os.environ.get("WANDB_RUN_ID")  # by a wandb agent, whose sweep knows the run by it
        run_id = given or (same_run and before.get("wandb_id")) or uuid.uuid4().hex[:12]
        self._about = {"args": vars(self.args), "data_checksum": self.data_checksum}
        self._about |= {"wandb_id": run_id, "environments": [*parts, now]}
        self._write_about()
        config = plain(result_arguments(self.args) | {"environment": now})
        if "steps" in config:
            config["sampling_steps"] = config.pop("steps")  # `steps` is the axis of every metric
        known = [{key: float(value) for key, value in row.items()} for row in self.metrics.rows()]
        self.dashboard = Dashboard(self.args, self.directory, config, run_id, known)
        total = planned_steps(self.args)
        self.bar = tqdm(
            total=None if total == ENDLESS else total, initial=step, unit="step", disable=not sys.stderr.isatty()
        )

    def log(self, row: dict, say: bool, shown: dict) -> None:
        """One row of metrics.csv, beginning with `steps`, and of wandb, with what is shown there beside it.

        say: print it too.
        """
        self.owner.check_still()
        row = row | {"seconds": round(self.elapsed(), 3)}
        self.metrics.append_row(row)
        self.show(row | shown)
        if say:
            line = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "steps")
            with tqdm.external_write_mode():
                print(f"step {row['steps']} {line}", flush=True)

    def show(self, row: dict) -> None:
        """One row of wandb, beginning with `steps`."""
        self.dashboard.log(row)

    def append(self, file: Rows, rows: list[dict]) -> None:
        """Add to a file that grows what was measured at one step."""
        self.owner.check_still()
        for row in rows:
            file.append_row(row)

    def append_norms(self, norms: np.ndarray) -> None:
        """Add the gradient norms of the next steps to the history."""
        self.owner.check_still()
        self.norms.append_norms(norms)

    def save_omega(self, omega: np.ndarray, step: int) -> None:
        """Keep ω of step `step`, flat float32, and show its histogram in wandb."""
        self.owner.check_still()
        path = self.directory / "omega.npy"
        with replacing(path) as file:
            np.save(file, omega, allow_pickle=False)
        self._omega_checksum = checksum(path)
        self.dashboard.log_histogram("omega", omega, step)

    def elapsed(self) -> float:
        """Seconds that this run has taken, over all its parts."""
        return self.seconds + time.monotonic() - self._started

    # --- its end ---

    def finish(self, status: str, steps: int, epochs: float, results: dict) -> None:
        """See to it that every file is as it was written, and write summary.json, which ends the run.

        Raises OSError if a file was changed that cannot be restored, and that --resume makes again.
        """
        self.owner.check_still()
        if self._write_about():
            warn(f"something else changed {self.directory / 'args.json'}; it is restored")
        for file in self.growing:
            if file.intact():
                continue
            if file.restore():
                warn(f"something else changed {file.path}; it is restored")
            else:
                _give_up(file, file.size)
        omega = self.directory / "omega.npy"
        if self._omega_checksum is not None and checksum(omega) != self._omega_checksum:
            raise OSError(f"something else changed {omega}; the same command with --resume measures ω again")
        summary = {"status": status, "mode": self.args.mode, "steps": steps, "epochs": epochs}
        summary |= {"seconds": self.elapsed(), "args": vars(self.args), "results": results}
        write_json(self.directory / "summary.json", summary)
        self.bar.close()
        self.dashboard.log_results(plain(results) | {"status": status})

    def close(self, exit_code: int) -> None:
        """End progress and wandb, which may take FINISH_LIMIT seconds if it hangs: nothing else is left to do."""
        self.bar.close()
        self.dashboard.close(exit_code)

    def _write_about(self) -> bool:
        """Make args.json hold what it should; whether it did not."""
        path, content = self.directory / "args.json", to_json(self._about)
        if path.is_file() and path.read_bytes() == content:
            return False
        with replacing(path) as file:
            file.write(content)
        return True

    # --- its checkpoints ---

    def save_checkpoint(self, content: dict) -> None:
        """Write a checkpoint of tensors and plain values, with what this record needs to go on from it."""
        self.owner.check_still()
        for file in self.growing:
            file.sync()  # what the checkpoint counts on must be on disk before it
        content = content | {"args": plain(vars(self.args)), "seconds": self.elapsed()}
        content |= {"files": {file.path.name: [file.size, file.checksum] for file in self.growing}}
        checkpoints.write(self.directory, content | {"data_checksum": self.data_checksum})

    def load_checkpoint(self) -> dict | None:
        """The newest good checkpoint, on the CPU, and every file that grows cut to what it counts on; None if none.

        A file that does not hold that is given up. Raises UserError as `checkpoints.read_newest`, if the arguments or
        the data differ, or if a new ε would be looked for in norms that are lost.
        """
        content = checkpoints.read_newest(self.directory, self._refuse_others, self._unfit)
        if content is None:
            for file in self.growing:
                file.cut(0)
            return None
        unfit = self._unfit(content)
        if {self.norms.path.name, self.full_gradients.path.name} & set(unfit):
            self._refuse_new_eps(content)
        for file in self.growing:
            size = _counted_on(content, file)[0]
            if file.path.name in unfit:
                _give_up(file, size)
            else:
                file.cut(size)
        measured = "steps_to_eps_full" in content["results"] and content["step"] > 0
        first = [row["steps"] for row in self.full_gradients.rows()[:1]]
        lost = measured and first != ["0"]  # as it is unless the file was given up once
        if lost or np.isnan(self.norms.norms()).any():
            self._refuse_new_eps(content)
        self.seconds = content["seconds"]
        self.args.eps = sorted({*self.args.eps, *content["args"]["eps"]}, reverse=True)
        return content

    def _unfit(self, content: dict) -> list[str]:
        """The files that grow and do not hold what a checkpoint counts on."""
        return [file.path.name for file in self.growing if not file.begins_with(*_counted_on(content, file))]

    def _refuse_new_eps(self, content: dict) -> None:
        new = sorted(set(self.args.eps) - set(content["args"]["eps"]))
        state.refuse(
            f"has lost gradient norms, in which a new --eps {new} would be looked for" if new else "", self.args
        )

    def _refuse_others(self, content: dict) -> None:
        if content.get("format") != checkpoints.FORMAT:
            state.refuse("was checkpointed by another version of this code; go on with that one", self.args)
        state.refuse(state.differences(content["args"], self.args), self.args)
        state.refuse(state.lower_cap(content["step"], self.args), self.args)
        before, now = content["data_checksum"], self.data_checksum
        if before != now:
            reason = f"was begun with other data than lies in --data_dir {self.args.data_dir} now"
            state.refuse(f"{reason} (checksum {before}, now {now}); give the same", self.args)


def _counted_on(content: dict, file: Growing) -> tuple[int, int]:
    """The size and checksum that a checkpoint says of a file; it counts on nothing of one that came later."""
    return tuple(content["files"].get(file.path.name, (0, 0)))


def _give_up(file: Growing, size: int) -> None:
    """Have a file that something else has changed begin again, and say what is lost."""
    aside = file.give_up(size)
    lost = "the rows so far are lost"
    if isinstance(file, Norms):
        lost = f"it now holds nan for the {size // 4} steps so far; no further --eps can be looked for in it"
    warn(f"something else changed {file.path}: {lost}; {aside.name} is what was found, no other number depends on it")
