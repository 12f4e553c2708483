"""What a run's directory says, read without torch: its arguments, how it stands, and whether it may go on."""

from argparse import Namespace
from pathlib import Path

import numpy as np

from arguments import ENDLESS, EXIT_STATUS, defaults, planned_steps, result_arguments
from files import plain, read_json
from messages import UserError, warn

# What a run can still be given more of when it is resumed; of the caps, `lower_cap` refuses less.
EXTENSIBLE = {"epochs", "max_steps", "eps"}


def run_state(args: Namespace) -> str:
    """`new`, `unfinished`, or the status that the run `args` names has ended with. UserError as `ended_run`."""
    summary = ended_run(args)
    if summary:
        return summary["status"]
    return "unfinished" if (args.runs_dir / args.name).exists() else "new"


def ended_run(args: Namespace) -> dict | None:
    """The summary of the run that `args` names, if it has ended and going on with `args` would add nothing.

    Raises UserError if it was made with other arguments, or went further than `args` allow.
    """
    summary = read_summary(args.runs_dir / args.name)
    if summary is None:
        return None
    refuse(differences(summary["args"], args) or lower_cap(summary["steps"], args), args)
    if args.mode == "critical" and not set(args.eps) <= set(summary["args"].get("eps", [])):
        return None
    final = summary["status"] == "diverged" or (args.mode == "critical" and summary["status"] == "finished")
    return summary if final or planned_steps(args) <= summary["steps"] else None


def differences(before: dict, args: Namespace) -> str:
    """The arguments in `args` that would make another result than those `before`, as text; empty if none.

    A flag that did not yet exist `before` had its default: what it adds is off.
    """
    now, before = plain(result_arguments(args)), defaults() | before
    named = [f"--{k} {v} (was {before.get(k)})" for k, v in now.items() if k not in EXTENSIBLE and before.get(k) != v]
    return f"was begun with other arguments: {', '.join(named)}; give the same" if named else ""


def lower_cap(steps: int, args: Namespace) -> str:
    """What in `args` would end a run before the `steps` it has made already, as text; empty if nothing."""
    if planned_steps(args) >= steps:
        return ""
    by_cap = (args.max_steps or ENDLESS) < steps
    given = f"--max_steps {args.max_steps}" if by_cap else f"--epochs {args.epochs}"
    return f"is at step {steps} already, beyond {given}; give as much or more"


def refuse(reason: str, args: Namespace) -> None:
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


def environments(about: dict) -> list[dict]:
    """What ran each part of a run, by its args.json; that of a record from before there were parts is one."""
    parts = about.get("environments")
    if parts is None and isinstance(about.get("environment"), dict):
        parts = [{"first_step": 0} | about["environment"]]
    known = isinstance(parts, list) and all(isinstance(p, dict) and "first_step" in p for p in parts)
    return parts if known else []


def warn_of_other_bits(before: dict, now: dict) -> None:
    """One warning if what runs this part of a run computes other bits than what ran the part before it."""
    keys = ["torch", "numpy", "device", "git_commit"]
    keys += ["threads", "cpu"] if now["device"] == "cpu" else []
    changed = [f"{key} {now[key]} (was {before[key]})" for key in keys if before.get(key, now[key]) != now[key]]
    if changed:
        warn(f"resumed with {', '.join(changed)}: the last bits may differ from an uninterrupted run's; see args.json")


def first_crossing(means: np.ndarray, first: int, eps: float, first_check: int) -> int | None:
    """The first step, not before `first_check`, at which the running mean of ‖g_t‖ is ≤ ε (paper, section 2).

    means: of consecutive steps, beginning with step number `first`. None if there is no such step.
    """
    start = max(0, first_check - first)
    below = np.flatnonzero(means[start:] <= eps)
    return first + start + int(below[0]) if below.size else None
