"""A run's checkpoints: the newest, and the one before, kept until the newest is whole."""

import zipfile
from pathlib import Path

import torch

from files import replacing
from messages import UserError, warn
from state import read_summary
from utils import out_of_memory

NAMES = ("checkpoint.pt", "checkpoint.previous.pt")  # newest first
FORMAT = 4  # 1 was written after the last window had been counted, 2 held the rows of metrics.csv, 3 knew fewer files
KEYS = {"format", "args", "step", "seconds", "files", "data_checksum"}


def write(directory: Path, content: dict) -> None:
    """Write a checkpoint of tensors and plain values. OSError if the disk does not take it."""
    newest, previous = (directory / name for name in NAMES)
    try:
        with replacing(newest, keep=previous) as file:
            torch.save(content | {"format": FORMAT}, file)
    except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk behind its own error
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "the last good one is kept, --resume goes on from it"
        if not (newest.exists() or previous.exists()):
            kept = "there is none before it, --resume starts again"
        raise OSError(f"no checkpoint could be written ({cause}); {kept}") from error


def read_newest(directory: Path, check, fits) -> dict | None:
    """The newest good checkpoint, on the CPU; None if there is none at all.

    check(content) raises UserError where a run must not go on from it. fits(content) says which of the files that
    grow do not hold what it counts on. A damaged checkpoint is named in a warning, and removed if the one before is
    good: else the next one would take that one's place with the damaged one. Where none fits, the newest is taken.
    Raises UserError if all are damaged, or if the run has ended and they are gone.
    """
    damaged, fallback = {}, None
    for path in (directory / name for name in NAMES):
        if not path.exists():
            continue
        try:
            content = _read(path)
        except Exception as error:  # whatever garbage in a file brings about
            if out_of_memory(error):
                raise
            damaged[path] = f"{path} is damaged ({type(error).__name__}: {error})"
            continue
        check(content)
        unfit = fits(content)
        if not unfit:
            for other, reason in damaged.items():
                warn(f"{reason}; going on from {path.name}")
                other.unlink()
            return content
        damaged[path] = f"{path} counts on another {' and '.join(unfit)}"
        fallback = fallback or content
    if fallback is None and (damaged or read_summary(directory)):
        reasons = "; ".join(damaged.values()) or "the run has ended, and its checkpoint is gone"
        raise UserError(
            f"argument --resume: no good checkpoint in {directory}: {reasons}; "
            "delete the directory to start again, or give another --name"
        )
    return fallback


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    old = content.get("format") != FORMAT  # which holds other keys, and is refused with a better reason
    missing = KEYS - set(content)
    if missing and not old:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return content
