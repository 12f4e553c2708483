"""Python programs that are run side by side to their end, or to a deadline."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 60  # seconds that a stopped program has, for its checkpoint


def run(commands: list[list], log: Path, deadline: float) -> None:
    """Run them all, with what they say in `log`. RuntimeError with its last line if one goes wrong.

    At `deadline`, by time.monotonic(), it raises TimeoutExpired. Whenever it is left early, what still runs gets
    SIGTERM and GRACE seconds.
    """
    processes = []
    with open(log, "ab") as file:
        options = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL, "start_new_session": True}
        try:
            for words in commands:
                command = [sys.executable, *map(str, words)]
                processes.append(subprocess.Popen(command, preexec_fn=_end_with_parent, **options))
            for process in processes:
                process.wait(max(0, deadline - time.monotonic()))
        finally:
            _stop(processes)
    for process in processes:
        if process.returncode:
            said = [line for line in log.read_text(errors="replace").splitlines() if line] or ["nothing"]
            raise RuntimeError(f"exit status {process.returncode}, see {log}: {said[-1]}")


def _end_with_parent() -> None:
    # In the child: SIGTERM when this program is gone, or else a run would keep the GPU and its record.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # all that it has started, too
        process.wait()
