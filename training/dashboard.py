"""wandb: one run of ours is one run there, and no trouble with it reaches the training."""

import atexit
import logging
import os
import queue
import shlex
import shutil
import sys
import threading
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np

from arguments import result_arguments
from measure.quantities import INDEX, quantity
from utils import warn

FINISH_LIMIT = 30.0  # seconds that wandb may take to end, once everything else is done
CONSTANT = {"draws", "entries", "probe_images"}  # the same at every step of a run


class Dashboard:
    """The wandb run of one run of ours, told by a thread of its own; it does nothing where wandb does not start.

    Online, rows that wandb has already are not logged again. Offline, `wandb sync` keeps only the last directory of a
    run: so the newest part logs all rows again, and at its end the earlier directories are removed.
    """

    def __init__(self, args: Namespace, directory: Path, config: dict, run_id: str):
        self._args, self._logged = args, -1
        self._hidden = {*INDEX, *CONSTANT, f"delta_as_{args.optimizer}", f"delta_as_{args.optimizer}_se"}  # the same δ
        self._earlier = list(directory.glob(f"wandb/offline-run-*-{run_id}*"))
        self._run = start_wandb(args, directory, config, run_id)
        self._calls = queue.SimpleQueue()
        self._part = Path(self._run.dir).parent if self._run else None
        self._offline = self._run is not None and self._run.settings.mode == "offline"
        if self._run and not self._offline:
            self._earlier = []  # nobody knows whether they were uploaded
            self._logged = self._run.summary.get("steps", -1)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def replay(self, metrics: list[dict], measured: list[dict], omega: dict[int, np.ndarray]) -> None:
        """Log the rows of metrics.csv and measurements.csv, as text, and ω by its step, of the parts before."""
        if self._run is None:
            return
        steps = {int(row["steps"]): (_numbers(row), []) for row in metrics}
        for row in measured:
            steps.setdefault(int(row["steps"]), ({}, []))[1].append(_numbers(row))
        for step in sorted(steps):
            self.log(*steps[step], omega.get(step))

    def log(self, row: dict, measured: list[dict], omega: np.ndarray | None = None) -> None:
        """Log one step as one row: its rows of metrics.csv and measurements.csv, and the histogram of ω."""
        where = row or measured[0]
        if self._run is None or where["steps"] <= self._logged:
            return
        shown = {name: where[name] for name in ("steps", "epoch")}
        shown |= {_key(name): value for name, value in row.items() if value is not None}
        for each in (each for each in measured if each["layer"] == "all"):
            shown |= self._charted(each)
        if omega is not None:
            from wandb import Histogram

            shown["omega"] = Histogram(np_histogram=np.histogram(omega, bins=100))
        self._calls.put(lambda run: run.log(shown))

    def _charted(self, row: dict) -> dict:
        """What is shown of a row of measurements.csv; of a batch size other than training's, only the variance."""
        other_size = row["batch_size"] != self._args.batchsize
        suffix = f"_b{row['batch_size']}" if other_size else ""
        suffix += "" if row["batchnorm"] == self._args.measure_batchnorm[0] else f"_{row['batchnorm']}"
        found = {}
        for column in [name for name in row if row[name] is not None and name not in self._hidden]:
            group = quantity(column).group
            if group == "training":  # the test accuracy, which no batch size changes
                found[_key(column)] = row[column]
            elif group == "variance" or not other_size:
                found[_key(column) + suffix] = row[column]
        return found

    def log_results(self, status: str, results: dict) -> None:
        """Put how the run ended into its summary; what has a value for each ε becomes key/ε."""
        totals = {"status": status}
        for name, value in results.items():
            if isinstance(value, dict):
                totals |= {f"{_key(name)}/{eps}": each for eps, each in value.items()}
            elif name not in self._hidden:
                totals[_key(name)] = value
        self._calls.put(lambda run: run.summary.update(totals))

    def close(self, exit_code: int) -> None:
        """End the wandb run, within FINISH_LIMIT seconds, and say how what is not uploaded yet can be."""
        self._calls.put(lambda run: run.finish(exit_code=exit_code))
        self._calls.put(lambda _: [shutil.rmtree(directory, ignore_errors=True) for directory in self._earlier])
        self._calls.put(None)
        self._thread.join(FINISH_LIMIT + 0.002 * self._calls.qsize())  # a replay takes time
        if hanging := self._thread.is_alive():
            warn(f"wandb has not ended after {FINISH_LIMIT:g} s; going on without it, the local record is complete")
            atexit.register(os._exit, exit_code)  # or else its own hook would wait for ever
        if self._part and (self._offline or hanging or self._run is None):
            flag = "" if self._offline else "--include-online "
            print(f"wandb: to upload this run, `wandb sync {flag}{shlex.quote(str(self._part))}`", flush=True)

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                if self._run is not None:
                    call(self._run)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                warn(f"wandb failed ({reason}); going on without it, the local record is complete")
                self._run = None
                with suppress(Exception):  # it says again at exit what has just been said
                    sys.modules["wandb"].teardown()


def _key(column: str) -> str:
    """The wandb key of a column or of its standard error. KeyError if the number is not declared."""
    number = quantity(column)
    return number.key + column.removeprefix(number.name)


def _numbers(row: dict[str, str]) -> dict:
    """A row of a CSV file as it was before it was text."""
    kinds = {"batchnorm": str, "layer": str, "steps": int, "batch_size": int}
    return {name: kinds.get(name, float)(text) if text else None for name, text in row.items()}


def start_wandb(args: Namespace, directory: Path, config: dict, run_id: str):
    """A wandb run that logs against `steps`, or None (disabled, not installed, or it does not start)."""
    if args.wandb_mode == "disabled":
        return None
    os.environ.setdefault("WANDB_CACHE_DIR", str((directory / "wandb").absolute()))
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        os.environ.pop(name, None)  # args.wandb_mode has taken it into account
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds that a kill can cost, not 15
    logging.raiseExceptions = False  # on a full disk wandb's logs would bury our own line under tracebacks
    has_entity = args.wandb_entity != "XXXXXX"
    about = {"entity": args.wandb_entity if has_entity else None, "project": args.wandb_project, "name": args.name}
    about |= {"group": args.name.removesuffix(f"-seed{args.seed}"), "job_type": args.mode, "config": config}
    about["tags"] = [args.dataset, args.model, args.optimizer, f"lr {args.lr:g}", f"b {args.batchsize}"]
    about["tags"] += [f"β {args.beta1:g}"] if "beta1" in result_arguments(args) else []
    for mode in dict.fromkeys((args.wandb_mode, "offline")):
        stdin = sys.stdin
        try:
            import wandb

            sys.stdin = open(os.devnull)  # noqa: SIM115 (without a key it must fail, not ask and wait)
            settings = wandb.Settings(silent=True, console="off")
            run = wandb.init(**about, mode=mode, dir=str(directory), id=run_id, resume="allow", settings=settings)
            run.define_metric("steps")
            run.define_metric("*", step_metric="steps")
            if mode == "offline":
                print(f"wandb: logging offline{'' if has_entity else ' (no --wandb_entity)'}")
            return run
        except Exception as error:
            warn(f"wandb did not start in mode {mode!r} ({type(error).__name__}: {error})")
        finally:
            sys.stdin = stdin
    return None
