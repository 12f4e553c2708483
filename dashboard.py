"""wandb: one run of ours is one run there, and no trouble with it reaches the training."""

import atexit
import json
import logging
import os
import queue
import shlex
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from arguments import result_arguments
from files import replacing
from messages import warn

FINISH_LIMIT = 30.0  # seconds that wandb may take to end, once everything else is done


class Dashboard:
    """The wandb run of one run of ours; it does nothing where wandb is disabled, not installed or does not start.

    A thread of its own talks to wandb, so that nobody waits for a wandb that hangs. Every part of a run that is
    stopped and resumed has the same `run_id`, and adds to the same wandb run. There each row is to stand once, so of
    `rows`, those known so far, and of those to come, what an earlier part has logged already is left out.
    """

    def __init__(self, args: Namespace, directory: Path, config: dict, run_id: str, rows: list[dict]):
        last_steps = [] if args.wandb_mode == "disabled" else mend_parts(directory, run_id)
        self._logged = max(last_steps, default=-1)
        self._run = start_wandb(args, directory, config, run_id)
        self._offline = self._run is not None and self._run.settings.mode == "offline"
        self._parts = Path(self._run.dir).parents[1] if self._run else None
        self._run_id = run_id
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        if last_steps:  # else there was none before, or it was uploaded and cleaned away
            for row in rows:
                self.log(row)

    def log(self, row: dict) -> None:
        """Log a row of metrics, beginning with `steps`."""
        if row["steps"] > self._logged:
            self.send(lambda run: run.log(row))

    def log_histogram(self, key: str, values: np.ndarray, step: int) -> None:
        """Log the histogram of an array as it is at `step`."""
        counts = np.histogram(values, bins=100)

        def log(run) -> None:
            from wandb import Histogram

            run.log({"steps": step, key: Histogram(np_histogram=counts)})

        self.send(log)

    def log_results(self, results: dict) -> None:
        """Put how the run ended into its summary; what has a value for each ε becomes key/ε."""
        totals = {}
        for key, value in results.items():
            if isinstance(value, dict):
                totals |= {f"{key}/{name}": each for name, each in value.items()}
            elif key != "accuracy":  # define_metric has its last and its greatest value there
                totals[key] = value
        self.send(lambda run: run.summary.update(totals))

    def send(self, call: Callable) -> None:
        """Have `call` use the wandb run, sooner or later; what goes wrong there is said once, and ends wandb."""
        if self._run is not None:
            self._calls.put(call)

    def close(self, exit_code: int) -> None:
        """End the wandb run, within FINISH_LIMIT seconds, and say how what is not uploaded yet can be."""
        self.send(lambda run: run.finish(exit_code=exit_code))
        self._calls.put(None)
        self._thread.join(FINISH_LIMIT)
        complete = self._run is not None and not self._thread.is_alive()
        if self._thread.is_alive():
            warn(f"wandb has not ended after {FINISH_LIMIT:g} s; going on without it, the local record is complete")
            atexit.register(_leave, exit_code)
        if self._parts and (self._offline or not complete):
            kind, flag = ("offline-run", "") if self._offline else ("run", "--include-online ")
            parts = f"{shlex.quote(str(self._parts))}/{kind}-*-{self._run_id}"
            print(f"wandb: to upload this run, `wandb sync {flag}{parts}`", flush=True)

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


def mend_parts(directory: Path, run_id: str) -> list[int]:
    """Make the files that wandb keeps of this run's earlier parts fit to be uploaded; the last step each holds."""
    try:
        return [mend(path) for path in directory.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")]
    except Exception as error:  # another version of wandb may write anything else
        warn(f"wandb's earlier files cannot be read ({type(error).__name__}: {error}); rows may be in it twice")
        return []


def mend(path: Path) -> int:
    """Cut off what a kill has left half written at the end of a file of wandb's; the last step that it then holds.

    `wandb sync` stops at such an end, and leaves out all later parts. The file is in LevelDB's log format: after 7
    bytes of header, blocks of 32 KiB, of chunks with a checksum (4 bytes), a length (2) and a kind (1) in front.

    wandb-core outlives a run that is killed, and under load writes on when the next part begins. What it writes then
    goes to the file that is replaced: otherwise its rows would be there twice.
    """
    content, at, end, record, last = path.read_bytes(), 7, 7, b"", 0
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # a whole record, or its last chunk
            last, record, end = max(last, _steps(record)), b"", at
    with replacing(path) as file:
        file.write(content[:end])
    return last


def _steps(record: bytes) -> int:
    from wandb.proto.wandb_internal_pb2 import Record

    items = {(item.key or "/".join(item.nested_key)): item for item in Record.FromString(record).history.item}
    return json.loads(items["steps"].value_json) if "steps" in items else 0


def _leave(status: int) -> None:
    """End the process: the hook that wandb has at exit would wait for ever for what has not ended in time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_wandb(args: Namespace, directory: Path, config: dict, run_id: str):
    """A wandb run that logs against `steps`, or None (disabled, not installed, or it does not start)."""
    has_entity = args.wandb_entity != "XXXXXX"
    if args.wandb_mode == "disabled":
        return None
    os.environ.setdefault("WANDB_CACHE_DIR", str((directory / "wandb").absolute()))
    os.environ.pop("WANDB_MODE", None)  # it has had its say in args.wandb_mode
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds that a kill can cost, not 15
    logging.raiseExceptions = False  # on a full disk wandb's logs would bury our own line under tracebacks
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
                id=run_id,
                resume="allow",
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
