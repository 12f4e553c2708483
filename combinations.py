"""What does not go together in a command line whose single values are allowed. Raises UserError that names it."""

import itertools
from argparse import Namespace

from messages import UserError


def check_injection(args: Namespace) -> None:
    """UserError for injected noise where it cannot be drawn."""
    if args.compile and args.injected_noise:
        reason = "with --compile, whose graph cannot draw anew at each step"
        raise UserError(f"argument --injected_noise: got {args.injected_noise}, allowed is 0 {reason}")


def check_sampling(args: Namespace, images: int) -> None:
    """Fill in `steps`, the last, and `earlier_steps`; UserError for what does not go together."""
    for flag in ("steps", "draw_batchsizes", "measure_batchnorm"):
        given = getattr(args, flag)
        if len(set(given)) < len(given):
            raise UserError(f"argument --{flag}: got {_words(given)}, allowed is each value once")
    *args.earlier_steps, args.steps = sorted(args.steps)
    args.draw_batchsizes.sort()
    if args.mode != "sampling":
        return
    wanting = [flag for flag in ("shape", "smoothing") if getattr(args, flag)]
    if args.draws == 1 or (wanting and args.draws < 4):
        least = f"4 and more with --{wanting[0]}" if wanting else "0, or 2 and more"
        raise UserError(f"argument --draws: got {args.draws}, allowed is {least}")
    if args.smoothing and not 2 <= args.smoothing <= args.draws:
        raise UserError(
            f"argument --smoothing: got {args.smoothing}, allowed is 0, or 2 to the {args.draws} of --draws"
        )
    if args.draw_batchsizes and not args.draws:
        raise UserError(f"argument --draw_batchsizes: got {_words(args.draw_batchsizes)}, allowed only with --draws")
    for b in args.draw_batchsizes:
        if b > images:
            raise UserError(f"argument --draw_batchsizes: got {b}, allowed is at most the {images} training images")
    steps = [0, *args.earlier_steps, args.steps]
    fewest = min((b - a for a, b in itertools.pairwise(steps) if b > a), default=0)
    if args.exact_memory > fewest:
        reason = "the fewest steps before a measurement, or between two"
        raise UserError(f"argument --exact_memory: got {args.exact_memory}, allowed is at most {fewest}, {reason}")


def _words(values: list) -> str:
    return " ".join(map(str, values))
