"""Files that are written whole or not at all, and files that grow and are told from damaged ones. No torch."""

import csv
import io
import json
import math
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CHUNK = 1 << 20  # bytes read at once


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


def plain(value):
    """`value` for JSON: paths become strings, numbers that are not finite become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def to_json(content: dict) -> bytes:
    """`content` as the text of a JSON file."""
    return json.dumps(plain(content), indent=1, allow_nan=False).encode() + b"\n"


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(to_json(content))


def write_table(path: Path, table) -> None:
    """Write a pandas DataFrame as CSV, whole or not at all."""
    with replacing(path) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError if it cannot be read, ValueError if it is no file or holds none."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


def checksum(path: Path, size: int | None = None) -> int | None:
    """The CRC-32 of a file, or of its first `size` bytes; None if it is no file or holds fewer."""
    if size == 0:
        return 0
    if not path.is_file():
        return None
    size = path.stat().st_size if size is None else size
    value, left = 0, size
    with open(path, "rb") as file:
        while left:
            content = file.read(min(CHUNK, left))
            if not content:
                return None
            value = zlib.crc32(content, value)
            left -= len(content)
    return value


class Growing:
    """A file that is appended to, and cut back on resuming.

    size, checksum: of all that was written, by which the file is told from one that something else has changed.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.checksum = path, 0, 0
        self._file = None

    def append(self, content: bytes) -> None:
        """Add `content`. The file stays open: one that takes its name in the meantime gets nothing of it."""
        if self._file is None:
            self._file = open(self.path, "a+b")  # noqa: SIM115 (held until the process ends)
        self._file.write(content)
        self._file.flush()
        self.size += len(content)
        self.checksum = zlib.crc32(content, self.checksum)

    def read(self) -> bytes:
        """All that was written."""
        return self.path.read_bytes()[: self.size] if self.size else b""

    def sync(self) -> None:
        """Have what is written on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def intact(self) -> bool:
        """Whether the file holds what was written, and no more."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size == self.size and self.begins_with(self.size, self.checksum)

    def restore(self) -> bool:
        """Put the file back where it was renamed, replaced or deleted; False where its content itself is damaged."""
        if self._file is None:
            return False
        self._file.seek(0)
        content = self._file.read()
        if len(content) != self.size or zlib.crc32(content) != self.checksum:
            return False
        self.replace(content)
        return True

    def begins_with(self, size: int, expected: int) -> bool:
        """Whether the first `size` bytes have the checksum `expected`."""
        return checksum(self.path, size) == expected

    def cut(self, size: int) -> None:
        """Take the file for its first `size` bytes, and cut off the rest."""
        self._close()
        if self.path.is_file() and self.path.stat().st_size > size:
            os.truncate(self.path, size)
        self.size, self.checksum = size, checksum(self.path, size)

    def give_up(self, size: int) -> Path:
        """Begin again with what stands for `size` lost bytes; the path that what was found has now."""
        return self.replace(self.blank(size))

    def blank(self, size: int) -> bytes:
        """What stands for `size` lost bytes."""
        return b""

    def replace(self, content: bytes) -> Path:
        """Hold `content`, and put what was found beside it, as `x.damaged.y` for x.y."""
        self._close()
        aside = self.path.with_suffix(f".damaged{self.path.suffix}")
        with replacing(self.path, keep=aside) as file:
            file.write(content)
        self.size, self.checksum = len(content), zlib.crc32(content)
        return aside

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Norms(Growing):
    """gradient_norms.f32: ‖g_t‖ of every step, 4 bytes a step, little-endian float32."""

    def append_norms(self, norms: np.ndarray) -> None:
        """Add the norms of the next steps."""
        self.append(norms.astype("<f4").tobytes())

    def norms(self) -> np.ndarray:
        """All norms, float32; NaN where they were lost."""
        return np.frombuffer(self.read(), "<f4")

    def blank(self, size: int) -> bytes:
        """What stands for `size` lost bytes: NaN for every step."""
        return np.full(size // 4, np.nan, "<f4").tobytes()


class Rows(Growing):
    """A CSV file of one kind of row, whose first line names the columns."""

    def append_row(self, row: dict) -> None:
        """Add a row. ValueError if its keys are not the columns of the rows before, in their order."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.size == 0:
            self.columns = list(row)
            writer.writerow(row)
        if list(row) != self.columns:
            raise ValueError(f"{self.path.name} has the columns {self.columns}, not {list(row)}")
        writer.writerow(row.values())
        self.append(text.getvalue().encode())

    def rows(self) -> list[dict[str, str]]:
        """All rows."""
        return list(csv.DictReader(self.read().decode().splitlines()))

    def cut(self, size: int) -> None:
        """As `Growing.cut`."""
        super().cut(size)
        header = self.read().split(b"\n", 1)[0]
        self.columns = header.decode().split(",")
