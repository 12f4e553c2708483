"""The command line: every flag, checked before anything slow or lasting happens. No torch."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from datasets import DATASETS
from messages import UserError
from models import NETWORKS

ENDLESS = 2**62  # more steps than a run can make
EXIT_STATUS = {"finished": 0, "not_reached": 0, "diverged": 3}
WANDB_MODES = ("online", "offline", "disabled")

# The optimizers of shb.py, each the class of that name in capitals, and the arguments of its class that have a flag.
# They are listed here because torch takes seconds to load.
OPTIMIZERS = {"sgd": {}, "shb": {"momentum": "beta1"}, "nshb": {"momentum": "beta1"}}

OPTIMIZER_FLAGS = {flag for flags in OPTIMIZERS.values() for flag in flags.values()}

# What has no say in the result: where and how a run is made, and what is logged.
ADMINISTRATION = {
    *("device", "data_dir", "runs_dir", "name", "resume", "checkpoint_every"),
    *("wandb_entity", "wandb_project", "wandb_mode", "save_memory"),
}
ONE_MODE_ONLY = {
    "epochs": "normal",
    "eps": "critical",
    "min_epochs": "critical",
    "steps": "sampling",
    "full_grad_batchsize": "sampling",
}
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


def _name(text: str) -> str:
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py; its defaults are those of the authors' command line where they have the flag."""
    positive = number(float, "a finite number above 0, at most 1e38", lambda v: 0 < v <= 1e38)
    count = number(int, "a whole number of at least 1", lambda v: 1 <= v < 2**53)
    whole = number(int, "a whole number of at least 0", lambda v: 0 <= v < 2**53)
    beta = number(float, "a number from 0 up to, but not including, 1", lambda v: 0 <= v < 1)
    seed = number(int, "a whole number from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63)

    parser = Parser(
        prog="main.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Search direction noise and critical batch sizes of SGD with and without momentum.",
        epilog="In the names of flags, - and _ mean the same. Exit status: 0 finished, 3 diverged, 2 error, "
        "130 or 143 stopped with a checkpoint.",
    )
    add = parser.add_argument_group("the experiment (paper, section 2)").add_argument
    add("--mode", **one_of("normal", "critical", "sampling"), default="normal", help="which of the three")
    add("--dataset", **one_of(*DATASETS), default="CIFAR100", help="digits needs no download")
    add("--model", **one_of(*NETWORKS), default="ResNet18", help="network")
    add("--optimizer", **one_of(*OPTIMIZERS), default="shb", help="search direction")
    add("--epochs", type=count, default=200, metavar="N", help="normal: passes over the training images")
    add("--lr", type=positive, default=0.1, metavar="ETA", help="learning rate")
    add("--batchsize", type=count, default=8, metavar="B", help="images a step")
    add("--beta1", type=beta, default=0.9, metavar="BETA", help="momentum factor of shb and nshb")
    add("--eps", type=positive, nargs="+", default=[0.5], help="critical: one or more thresholds")
    add("--min_epochs", type=whole, default=11, metavar="N", help="critical: passes before the check starts")
    add("--steps", type=whole, default=10_000, metavar="N", help="sampling: updates before the measurement")
    add(
        "--full_grad_batchsize",
        type=count,
        default=1000,
        metavar="B",
        help="sampling: chunk of the full gradient, in images",
    )
    add("--max_steps", type=count, metavar="N", help="ends any mode after so many updates")
    add("--seed", type=seed, default=0, help="of weights, shuffling, augmentation, measuring")

    add = parser.add_argument_group("how it runs").add_argument
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add(
        "--precision",
        **one_of("default", "ieee", "bf16"),
        default="default",
        help="default: PyTorch's, as the paper (TF32 convolutions on CUDA); ieee: float32 throughout; bf16: autocast",
    )
    add("--compile", action="store_true", help="CUDA: replay the step as one captured graph")
    add("--deterministic", action="store_true", help="CUDA: same seed, same bits, slower")
    add("--save_memory", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--data_dir", type=path, default="data", metavar="DIR", help="where the data sets are cached")

    add = parser.add_argument_group("the record").add_argument
    add("--runs_dir", type=path, default="runs", metavar="DIR", help="where runs are recorded")
    add("--name", type=_name, help="directory of this run below runs_dir (default: made of its arguments)")
    add("--resume", action="store_true", help="go on from the newest good checkpoint; start if there is none")
    add(
        "--checkpoint_every",
        type=number(float, "a finite number of seconds of at least 0", lambda v: v >= 0),
        default=300.0,
        metavar="SECONDS",
        help="between two checkpoints",
    )
    add("--wandb_entity", type=_name, default="XXXXXX", help="account to log to; XXXXXX: none, log offline")
    add("--wandb_project", type=_name, default="role_of_momentum", help="project to log to")
    add(
        "--wandb_mode",
        **one_of(*WANDB_MODES),
        help="default: WANDB_MODE, or by the entity",
    )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked arguments, `name` filled in. Raises UserError naming argument, value and what is allowed."""
    normalized = [
        re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word, flags=re.DOTALL) for word in argv
    ]
    args = build_parser().parse_args(normalized)
    images = DATASETS[args.dataset].train_images
    for flag in ("batchsize", "full_grad_batchsize"):
        if getattr(args, flag) > images and (flag == "batchsize" or args.mode == "sampling"):
            raise UserError(
                f"argument --{flag}: got {getattr(args, flag)}, allowed is at most the {images} training images "
                f"of {args.dataset}"
            )
    args.eps = sorted(set(args.eps), reverse=True)
    args.wandb_mode = args.wandb_mode or _wandb_mode(args.wandb_entity)
    args.name = args.name or _default_name(args)
    return args


def _wandb_mode(entity: str) -> str:
    given = os.environ.get("WANDB_MODE") or ("offline" if entity == "XXXXXX" else "online")
    mode = {"dryrun": "offline", "run": "online"}.get(given, given)  # wandb's older names
    if mode not in WANDB_MODES:
        raise UserError(f"argument --wandb_mode: the variable WANDB_MODE is {given!r}, allowed are {WANDB_MODES}")
    return mode


def _default_name(args: argparse.Namespace) -> str:
    """What makes the result, the usual only by its value, the rest only where it is not the default.

    Not so ε, and the cap of `critical`: more of them can be added to one and the same run.
    """
    relevant = result_arguments(args)
    usual = ("mode", "dataset", "model", "optimizer", "batchsize", "lr", "beta1", "seed")
    added_later = ("eps", "max_steps") if args.mode == "critical" else ()
    parts = [args.mode, args.dataset, args.model, args.optimizer, f"b{args.batchsize}", f"lr{_short(args.lr)}"]
    parts += [f"beta{_short(args.beta1)}"] if "beta1" in relevant else []
    parser = build_parser()
    for key, value in relevant.items():
        if key not in (*usual, *added_later) and value != parser.get_default(key):
            parts.append(key if value is True else f"{key}{value}")
    return "-".join([*parts, f"seed{args.seed}"])


def _short(value: float) -> str:
    """The shortest text that is `value` again, 1 and not 1.0."""
    return repr(value).removesuffix(".0")


def result_arguments(args: argparse.Namespace) -> dict:
    """The arguments that have a say in what the run `args` computes: none of other modes, no β for SGD."""
    left_out = {key for key, mode in ONE_MODE_ONLY.items() if mode != args.mode} | ADMINISTRATION
    left_out |= OPTIMIZER_FLAGS - set(OPTIMIZERS[args.optimizer].values())
    return {key: value for key, value in vars(args).items() if key not in left_out}


def planned_steps(args: argparse.Namespace) -> int:
    """The updates after which a run ends at the latest; ENDLESS for `critical` without --max_steps."""
    own = {"normal": args.epochs * steps_per_epoch(args), "critical": ENDLESS, "sampling": args.steps}[args.mode]
    return min(own, args.max_steps or ENDLESS)


def steps_per_epoch(args: argparse.Namespace) -> int:
    """Updates in one pass over the training images, the partial last batch included."""
    return -(-DATASETS[args.dataset].train_images // args.batchsize)
