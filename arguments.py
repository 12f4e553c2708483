"""The command line: every flag, checked before anything slow or lasting happens, and the state of a run."""

import argparse
import difflib
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

TRAINING_IMAGES = {"CIFAR100": 50_000, "CIFAR10": 50_000, "digits": 1_437}
ENDLESS = 2**62  # more steps than a run can make
MODELS = ("ResNet18", "WideResNet-28-10", "MobileNetv2", "ResNet20")
WANDB_MODES = ("online", "offline", "disabled")
EXIT_STATUS = {"finished": 0, "not_reached": 0, "diverged": 3}

# What has no say in the result: where and how a run is made, and what is logged.
ADMINISTRATION = {
    *("device", "data_dir", "runs_dir", "name", "resume", "checkpoint_every", "print_name"),
    *("wandb_entity", "wandb_project", "wandb_mode", "save_memory"),
}
# What a run can still be given more of when it is resumed; of the caps, `lower_cap` refuses less.
EXTENSIBLE = {"epochs", "max_steps", "eps"}
ONE_MODE_ONLY = {
    "epochs": "normal",
    "eps": "critical",
    "min_epochs": "critical",
    "steps": "sampling",
    "full_grad_batchsize": "sampling",
}
# What else people call the flags.
SYNONYMS = {"learning_rate": "lr", "eta": "lr", "momentum": "beta1", "bs": "batchsize", "epsilon": "eps"}


class UserError(Exception):
    """A mistake of the user's or of the surroundings: printed as one line, `error: …`; exit status 2."""


def say(kind: str, message: object) -> None:
    """Print `kind: message` on stderr, as one line whatever `message` holds."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


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


@functools.cache
def warn(message: str) -> None:
    """`say` a warning; the same one only once, however often it is come upon."""
    say("warning", message)


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
    add("--dataset", **one_of(*TRAINING_IMAGES), default="CIFAR100", help="digits needs no download")
    add("--model", **one_of(*MODELS), default="ResNet18", help="network")
    add("--optimizer", **one_of("sgd", "shb", "nshb"), default="shb", help="search direction")
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
    add("--print_name", action="store_true", help="print the run's state and directory, and do nothing else")
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
    images = TRAINING_IMAGES[args.dataset]
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
    left_out |= {"beta1"} if args.optimizer == "sgd" else set()
    return {key: value for key, value in vars(args).items() if key not in left_out}


def run_state(args: argparse.Namespace) -> str:
    """`new`, `unfinished`, or the status that the run `args` names has ended with. UserError as `ended_run`."""
    summary = ended_run(args)
    if summary:
        return summary["status"]
    return "unfinished" if (args.runs_dir / args.name).exists() else "new"


def ended_run(args: argparse.Namespace) -> dict | None:
    """The summary of the run that `args` names, if it has ended and going on with `args` would add nothing.

    Raises UserError if it was made with other arguments, or went further than `args` allow.
    """
    summary = read_summary(args.runs_dir / args.name)
    if summary is None:
        return None
    refuse(differences(summary["args"], args) or lower_cap(summary["steps"], args), args)
    further_eps = args.mode == "critical" and not set(args.eps) <= set(summary["args"].get("eps", []))
    final = summary["status"] == "diverged" or (args.mode == "critical" and summary["status"] == "finished")
    return summary if not further_eps and (final or planned_steps(args) <= summary["steps"]) else None


def planned_steps(args: argparse.Namespace) -> int:
    """The updates after which a run ends at the latest; ENDLESS for `critical` without --max_steps."""
    own = {"normal": args.epochs * steps_per_epoch(args), "critical": ENDLESS, "sampling": args.steps}[args.mode]
    return min(own, args.max_steps or ENDLESS)


def steps_per_epoch(args: argparse.Namespace) -> int:
    """Updates in one pass over the training images, the partial last batch included."""
    return -(-TRAINING_IMAGES[args.dataset] // args.batchsize)


def differences(before: dict, args: argparse.Namespace) -> str:
    """The arguments in `args` that would make another result than those `before`, as text; empty if none."""
    now = plain(result_arguments(args))
    named = [f"--{k} {v} (was {before.get(k)})" for k, v in now.items() if k not in EXTENSIBLE and before.get(k) != v]
    return f"was begun with other arguments: {', '.join(named)}; give the same" if named else ""


def lower_cap(steps: int, args: argparse.Namespace) -> str:
    """What in `args` would end a run before the `steps` it has made already, as text; empty if nothing."""
    if planned_steps(args) >= steps:
        return ""
    by_cap = (args.max_steps or ENDLESS) < steps
    given = f"--max_steps {args.max_steps}" if by_cap else f"--epochs {args.epochs}"
    return f"is at step {steps} already, beyond {given}; give as much or more"


def refuse(reason: str, args: argparse.Namespace) -> None:
    """Raise UserError if there is a `reason` not to go on with the run that `args` names."""
    if reason:
        raise UserError(f"argument --resume: {args.runs_dir / args.name} {reason}, or another --name")


def read_args(directory: Path) -> dict:
    """args.json of the run in `directory`; empty where it is missing or damaged."""
    try:
        content = read_json(directory / "args.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content.get("args"), dict) else {}


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


def plain(value):
    """`value` for JSON: paths become strings, numbers that are not finite become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_summary(directory: Path) -> dict | None:
    """summary.json of a run that has ended; None where there is none, or it is damaged (which is said)."""
    file = directory / "summary.json"
    try:
        summary = read_json(file)
        known = summary.get("status") in EXIT_STATUS
        if not (known and isinstance(summary.get("args"), dict) and isinstance(summary.get("steps"), int)):
            raise ValueError("its status, arguments or steps are not there")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        warn(f"{file} is damaged ({error}); the run counts as unfinished")
        return None
    return summary
