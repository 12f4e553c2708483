"""Whose a run's directory is: a lock, held as long as the process lives."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from messages import UserError, warn


class Owner:
    """The lock of one directory, for this process."""

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / ".lock"

    def check(self) -> None:
        """UserError if another process owns the directory, or it cannot be used. Writes nothing."""
        with usable(self.directory):
            if self.path.exists():
                with open(self.path, "a") as file:  # to append, since NFS locks no file that is only read
                    self._lock(file)

    def claim(self) -> None:
        """Make the directory, if need be, and own it from now on. UserError if that cannot be."""
        with usable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a")  # noqa: SIM115 (held until the process ends)
            self._lock(self.file)
            self.check_still()

    def check_still(self) -> None:
        """OSError if since `claim` the directory was deleted or replaced: another run may be writing there."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self.file.fileno())):
            raise OSError(f"{self.directory} or its .lock was deleted or replaced in mid-run; nothing more is written")

    def _lock(self, file) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"argument --name: {self.directory} belongs to another, running process") from error
        except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP: Lustre and NFS as they are mounted on some clusters
            warn(f"{self.directory} cannot be locked ({error.strerror}): see to it that no second process uses it")


@contextmanager
def usable(directory: Path):
    """UserError for what goes wrong in using a run's directory."""
    try:
        yield
    except OSError as error:
        message = f"argument --runs_dir: {directory} cannot be used ({error}); name a writable directory"
        raise UserError(message) from error
