"""Converters for argparse, and a parser, that name what was given and what is allowed."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path

from messages import UserError

# What else people call the flags.
SYNONYMS = {"learning_rate": "lr", "eta": "lr", "momentum": "beta1", "bs": "batchsize", "epsilon": "eps"}


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, instead of printing the usage and exiting."""

    def error(self, message: str):
        """Called by argparse."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UserError(message)
        flag = re.split("[ =]", unknown)[0].lstrip("-")
        known = [action.dest for action in self._actions]
        meant = SYNONYMS.get(flag) or next(iter(difflib.get_close_matches(flag, known, 1)), None)
        hint = f"; did you mean --{meant}?" if meant else ""
        raise UserError(f"{message}{hint}; --help lists what is allowed")


def one_of(*allowed: str):
    """A converter for argparse that takes one of some names, and guesses which was meant by another."""

    def convert(text: str):
        if text not in allowed:
            folded = {name.lower(): name for name in allowed}
            meant = difflib.get_close_matches(text.lower(), folded, 1)
            hint = f"; did you mean {folded[meant[0]]}?" if meant else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {', '.join(allowed)}{hint}")
        return text

    return {"type": convert, "choices": allowed}


def number(kind: type, allowed: str, check: Callable):
    """A converter for argparse that names what was given and what is allowed."""

    def convert(text: str):
        try:
            value = kind(text)
            good = math.isfinite(value) and check(value)
        except (ValueError, OverflowError):
            good = False
        if not good:
            hint = "; where several are allowed, spaces separate them" if "," in text else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {allowed}{hint}")
        return value

    return convert


def run_name(text: str) -> str:
    """A converter for the name of a run, an account or a project."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,127}", text):
        raise argparse.ArgumentTypeError(
            f"got {text[:40]!r}, allowed are up to 128 of the characters A-Z a-z 0-9 _ . , = + - with a letter, "
            "digit or _ in front"
        )
    return text


def device(text: str) -> str:
    """A converter for the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d{0,2}))?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are auto, cpu, mps, cuda, cuda:0, cuda:1, …")
    return text


def path(text: str) -> Path:
    """A converter for the path of a directory or file."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a path, of a directory or file")
    return Path(text)
