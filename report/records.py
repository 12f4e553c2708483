"""The records of runs as a pandas DataFrame, one row a run. Reads files only, never wandb, and trusts none of them.

In a notebook: `runs = report.records.load("runs")`.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import OPTIMIZERS
from datasets import DATASETS
from files import read_json
from report import published
from state import first_crossing

PARTS = ("noise_norm", "gradient_noise_norm", "direction_norm", "full_gradient_norm", "cosine")
OMEGA = ("omega_mean", "omega_std", "omega_skewness", "omega_excess_kurtosis", "omega_entries")
# What a run of each mode must have measured, unless it diverged.
NEEDED = {
    "normal": ("accuracy", "best_accuracy", "training_loss", "max_gradient_norm"),
    "critical": ("max_gradient_norm",),
    "sampling": ("delta", "noise_norm", "full_gradient_norm", *OMEGA),
}
RESULTS = list(dict.fromkeys([key for keys in NEEDED.values() for key in keys] + [*PARTS]))  # always have a column
# The arguments in which all runs of one mode must agree to share a figure. earlier_steps and draws are not among them:
# what a summary holds is of the last step and the training batch, and the rows of measurements.csv say their own.
SHARED = {
    "normal": ("epochs", "max_steps", "precision"),
    "critical": ("min_epochs", "precision"),
    "sampling": ("steps", "max_steps", "full_grad_batchsize", "precision"),
}
HUGE = 1e300
NAME = r"\w[\w.+-]{0,99}"  # becomes part of file names
# What `take` allows in a record.
STATUS = "finished|not_reached|diverged"
ARGUMENTS = {
    **{"dataset": NAME, "model": NAME, "optimizer": NAME, "lr": (1 / HUGE, HUGE)},
    **{"batchsize": range(1, 10**6), "seed": range(2**63)},
}


def load(runs_dir):
    """Return the runs that ended below `runs_dir`, at any depth, as a DataFrame of one row a run.

    What is unfinished or damaged is left out, and printed: `left out: NAME: REASON`.
    Columns: name (the folder's, below runs_dir), folder (Path), mode, status, diverged (bool), steps, args (dict of
    all arguments), and of these dataset, model, optimizer, lr, batch_size, seed; batchnorm, the mode of sampling's
    results; beta and nu, without a value where the optimizer takes none; curve, the optimizer with its ν and injected
    noise: what runs of one curve share. to_eps: {ε: first step or None}; first_check: the first step at which ε was
    looked at.
    Every number of the results has a column of its own, without a value where a run has none.
    `gradient_norms` and `omega` read the large files of one run.
    """
    runs, left_out = read(runs_dir)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    return runs


def read(runs_dir):
    """Return (the DataFrame of `load`, {name: reason} of the runs left out)."""
    rows, left_out = [], {}
    files = [path for path in Path(runs_dir).rglob("*.json") if path.name in ("args.json", "summary.json")]
    for folder in sorted({path.parent for path in files}):
        name = ascii(str(folder.relative_to(runs_dir)))[1:-1]  # control characters must not reach a terminal
        try:
            rows.append(read_run(folder, name))
        except (ValueError, TypeError, OSError) as error:
            left_out[name] = str(error)[:200]
    runs = pd.DataFrame(rows)
    return runs.reindex(columns=runs.columns.union(RESULTS, sort=False)), left_out


def read_run(folder, name):
    """Return the row of one run as a dict. ValueError, TypeError or OSError for whatever is wrong with its record."""
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError("unfinished, it has no summary.json")
    if path.stat().st_size > 1 << 20:
        raise ValueError("summary.json is larger than 1 MiB")
    summary = read_json(path)
    args, results = summary.get("args"), summary.get("results")
    if not isinstance(args, dict) or not isinstance(results, dict):
        raise ValueError("summary.json is not an object that holds args and results")
    mode, status = take(summary, "mode", "|".join(NEEDED)), take(summary, "status", STATUS)
    diverged = status == "diverged"
    fewest = 0 if diverged or mode == "sampling" else 1
    steps = take(summary, "steps", range(fewest, 10**12))
    run = {"name": name, "folder": folder, "mode": mode, "status": status, "diverged": diverged, "steps": steps}
    run |= {key: take(args, key, allowed) for key, allowed in ARGUMENTS.items()}
    run |= {"batch_size": run.pop("batchsize"), "lr": six_digits(run["lr"]), **momentum(args), "args": args}
    run["settings"] = ", ".join(f"{key} {args.get(key)!r:.40}" for key in SHARED[mode])
    run["batchnorm"] = first_batchnorm(args)
    if run["batchnorm"] != "train":
        run["settings"] += f", batchnorm {run['batchnorm']}"
    run["as_published"] = all(args.get(key) == value for key, value in published.SETTINGS[mode].items())
    critical = mode == "critical"
    run["first_check"] = first_check(run, summary) if critical else None
    run["to_eps"] = to_eps(results, steps) if critical else {}
    check_results(results, () if diverged else NEEDED[mode])
    for key, value in results.items():
        if key not in run and type(value) in (int, float) and abs(value) < HUGE:
            run[key] = float(value)
    return run


def check_results(results, needed):
    """Raise ValueError if one of the results in `needed`, or another that is used where a run has it, is unsound."""
    for key in (*needed, "max_gradient_norm", *PARTS):
        if key == "omega_entries":
            take(results, key, range(10**12))
        elif key in needed or results.get(key) is not None:
            take(results, key, (0 if key.endswith("norm") else -HUGE, HUGE))


def take(mapping, key, allowed):
    """Return mapping[key] if it is in `allowed`: a regular expression, a range, or (low, below); else ValueError."""
    value = mapping.get(key)
    if isinstance(allowed, str):
        good = isinstance(value, str) and re.fullmatch(allowed, value)
    elif isinstance(allowed, range):
        good = type(value) is int and value in allowed
    else:
        good = type(value) in (int, float) and allowed[0] <= value < allowed[1]
    if not good:
        raise ValueError(f"{key} is {value!r:.40}, allowed is {allowed}")
    return value


def six_digits(value):
    """Return the value that is meant: 0.1 · (1 − 0.9), in floats, is 0.01 to everyone."""
    return float(f"{value:.6g}")


def momentum(args):
    """Return beta, nu and curve of a run. An optimizer unknown here takes what is recorded; where none is, NaN."""
    optimizer, beta, nu = args["optimizer"], np.nan, np.nan
    known = OPTIMIZERS.get(optimizer, {}).values()
    if args.get("beta1") is not None or "beta1" in known:
        beta = six_digits(take(args, "beta1", (0, 1)))
    if optimizer in OPTIMIZERS and "beta1" not in known:
        beta = np.nan
    curve = optimizer
    if args.get("nu") is not None and (optimizer not in OPTIMIZERS or "nu" in known):
        nu = six_digits(take(args, "nu", (-HUGE, HUGE)))
        curve = f"{optimizer} nu {nu:g}"
    if args.get("injected_noise"):
        curve += f" + noise {take(args, 'injected_noise', (0, HUGE)):g}"
    return {"beta": beta, "nu": nu, "curve": curve}


def first_batchnorm(args):
    """Return the BatchNorm mode of a run's results: the first of --measure_batchnorm, train before there was a choice.

    ValueError for another than train or eval.
    """
    modes = args.get("measure_batchnorm") or ["train"]
    first = modes[0] if isinstance(modes, list) else modes
    return take({"measure_batchnorm": first}, "measure_batchnorm", "train|eval")


def first_check(run, summary):
    """Return the first step at which ε is looked at: the end of --min_epochs epochs, 1 at least.

    The steps of an epoch follow from the training images; of a data set unknown here, from those of the whole run.
    """
    epoch = 1
    if run["dataset"] in DATASETS:
        epoch = -(-DATASETS[run["dataset"]].train_images // run["batch_size"])
    elif run["steps"]:
        epoch = round(run["steps"] / take(summary, "epochs", (1e-9, HUGE)))
    return max(1, int(take(summary["args"], "min_epochs", (0, 1e6)) * epoch))


def to_eps(results, steps):
    """Return {ε: first step with a mean gradient norm of at most ε, or None} from the results of a critical run."""
    reached = results.get("steps_to_eps")
    if not isinstance(reached, dict) or not reached:
        raise ValueError("steps_to_eps is not an object with entries")
    known = {}
    for key, step in reached.items():
        eps = take({"eps": float(key)}, "eps", (1 / HUGE, HUGE))
        known[eps] = None if step is None else take(reached, key, range(1, steps + 1))
    return known


def gradient_norms(folder, steps):
    """Return ‖g_t‖ of every step of a critical run, float32 (steps,). ValueError or OSError where it is not sound."""
    path = folder / "gradient_norms.f32"
    if not path.is_file() or path.stat().st_size != 4 * steps:
        raise ValueError(f"gradient_norms.f32 does not hold {steps} float32")
    norms = np.fromfile(path, "<f4")
    if not np.all(np.isfinite(norms) & (norms >= 0)):
        raise ValueError("gradient_norms.f32 is not all finite and >= 0")
    return norms


def omega(folder, entries):
    """Return ω of a sampling run, float32 (entries,), from omega.npy. ValueError or OSError where it is not sound."""
    path = folder / "omega.npy"
    if not path.is_file():  # a pipe, for instance, would be waited for
        raise ValueError("omega.npy is no regular file, or missing")
    try:
        values = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except OverflowError as error:
        raise ValueError(f"omega.npy is damaged ({error})") from error
    if values.dtype != np.float32 or values.shape != (entries,):
        raise ValueError(f"omega.npy is {values.dtype} {values.shape}, not float32 (omega_entries,)")
    return values


def first_steps(run, every_eps):
    """Return {ε: first step or None} for any ε, by main.py's rule, from the history of `run`, a row as a dict.

    The rule: the first step, from the first check on, at which the mean of all norms so far (float64) is at most ε.
    Raises what `gradient_norms` does.
    """
    sums = np.cumsum(gradient_norms(run["folder"], run["steps"]), dtype=np.float64)
    means = sums / np.arange(1, len(sums) + 1)
    return {eps: first_crossing(means, 1, eps, int(run["first_check"])) for eps in every_eps}


def with_eps(runs, wanted):
    """Return (runs whose to_eps answers for the ε in `wanted` and no other, {run and ε: why it cannot answer})."""
    every, unable = [], {}
    for run in runs.to_dict("records"):
        known = {eps: step for eps, step in run["to_eps"].items() if eps in wanted}
        missing = [eps for eps in wanted if eps not in known]
        try:
            if missing and run["mode"] == "critical":
                known |= first_steps(run, missing)
        except (ValueError, OSError) as error:
            shown = ", ".join(f"{eps:g}" for eps in missing)
            unable[f"{run['name']} (ε = {shown} only)"] = f"not in its record, and {error}"
        every.append(known)
    return runs.assign(to_eps=every), unable
