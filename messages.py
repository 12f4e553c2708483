"""What is said to the user: one line each, on streams that take it."""

import functools
import os
import sys


class UserError(Exception):
    """A mistake of the user's or of the surroundings: printed as one line, `error: …`; exit status 2."""


def say(kind: str, message: object) -> None:
    """Print `kind: message` on stderr, as one line whatever `message` holds."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


@functools.cache
def warn(message: str) -> None:
    """`say` a warning; the same one only once, however often it is come upon."""
    say("warning", message)


def usable_streams() -> None:
    """Make stdin, stdout and stderr such that nothing said fails: one that is closed says nothing, no letter is odd.

    Or else the next file opened would get the closed one's number, and what libraries print with it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
