"""The records of runs as three pandas DataFrames: `runs`, `curves` (metrics.csv) and `measurements`."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import OPTIMIZERS, defaults, result_arguments
from measure.quantities import EVALUATED, INDEX, MEASURED, columns

# What affects a result, but not the trajectory: how long a run lasts, what is asked of it, and what is measured, as
# is everything whose name begins with `measure`. Any other argument, also one unknown here, separates runs.
NOT_TRAJECTORY = {
    *("mode", "epochs", "max_steps", "steps", "until_loss", "eps", "min_epochs", "recalibrate"),
    *("draws", "draw_batchsizes", "full_grad_batchsize", "probe_images", "exact_memory"),
}

NORMS = "gradient_norms.f32"
EXACT = {"float_precision": "round_trip"} if pd.__version__ < "3" else {}  # of what pandas 3 does anyway
# What runs of one curve over b have in common, and what tells a run, in the rows of all three frames.
CURVE = ["setting", "label", "curve", "optimizer", "lr", "beta1"]
RUN = [*CURVE, "b", "seed", "run", "mode", "status", "full_grad_batchsize"]


def runs(directory):
    """Return one row a run that has ended below `directory`: its arguments, its results, and where it is recorded.

    Runs with one `curve` agree in all that changes the trajectory but b and the seed; those with one `setting` may
    differ in the optimizer, its flags and injected noise too, with one `network` in η as well; label: what tells the
    curves of one setting apart, but for β. What does not affect a run, as β1 of SGD, has no value. args: all of them.
    What cannot be read is printed, `left out: RUN: REASON`.
    """
    rows = []
    for file in sorted(Path(directory).rglob("args.json")):
        name = file.parent.relative_to(directory).as_posix()
        try:
            rows.append(_run(file.parent, name))
        except FileNotFoundError:
            print(f"left out: {name}: unfinished")
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"left out: {name}: {error!r}")
    if not rows:
        return pd.DataFrame(columns=[*RUN, "steps", "epochs", "seconds", "folder", "args"])
    order = {name: i for i, name in enumerate(OPTIMIZERS)}
    table = pd.DataFrame(rows).assign(order=lambda table: table["optimizer"].map(order))
    table = table.sort_values(["setting", "order", "label", "curve", "b", "seed", "run"], ignore_index=True)
    return table.drop(columns="order")


def _run(folder, name):
    """Return the row of one run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    args = defaults() | summary["args"]  # a flag that did not exist yet had its default: what it adds is off
    if not isinstance(args["steps"], list):
        raise ValueError("a record of an older version")
    relevant = result_arguments(Namespace(**args))
    row = relevant | {key: summary[key] for key in ("status", "mode", "steps", "epochs", "seconds")}
    row |= {"lr": _six_digits(args["lr"]), "beta1": _six_digits(relevant.get("beta1", np.nan))}
    row |= {"b": row.pop("batchsize"), "run": name, "folder": folder, "args": args, **_names(relevant)}
    return {key: row.pop(key, None) for key in RUN} | row | summary["results"]


def _names(relevant):
    """Return network, setting, label and curve of a run, from the arguments that affect its result."""
    left_out = {*NOT_TRAJECTORY, "seed", "batchsize", *(key for key in relevant if key.startswith("measure"))}
    own = {key: _text(value) for key, value in relevant.items() if key not in left_out}
    optimizer, flags = own.pop("optimizer"), OPTIMIZERS.get(relevant["optimizer"], {}).values()
    network, lr, more = f"{own.pop('dataset')}, {own.pop('model')}", f", lr {own.pop('lr')}", ""
    default = {key: _text(value) for key, value in defaults().items()}
    label, curve = [optimizer.upper()], []
    for key, text in own.items():
        usual, shown = text == default.get(key), f"{key} {text}"
        if key in flags:
            curve.append(shown)
            label += [shown] if key != "beta1" and not usual else []
        elif key.startswith("inject"):
            label += [] if usual else [shown]
        else:
            more += "" if usual else f", {shown}"
    label, names = " ".join(label), {"network": network + more, "setting": network + lr + more}
    return names | {"label": label, "curve": ", ".join([names["setting"], label, *curve])}


def _six_digits(value):
    """Return the number that is meant: 0.1 · (1 − 0.9), in floats, is 0.01 to everyone."""
    return float(f"{value:.6g}")


def _text(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def curves(runs):
    """Return the rows of every metrics.csv of `runs`, each with the columns RUN of its run."""
    return _rows(runs, "metrics.csv", columns("training"))


def measurements(runs):
    """Return the rows of every measurements.csv; batch_size: that of the mini-batches drawn; b: that of training."""
    return _rows(runs, "measurements.csv", [*INDEX, *columns(*MEASURED), *EVALUATED])


def _rows(runs, name, declared):
    found = []
    for run in runs.to_dict("records"):
        if (run["folder"] / name).exists():
            rows = pd.read_csv(run["folder"] / name, **EXACT)
            found.append(rows.assign(**{key: run[key] for key in RUN}))
    table = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return table.reindex(columns=list(dict.fromkeys([*RUN, *declared, *table.columns])))


def gradient_norms(run):
    """Return ‖g_t‖ of every step of a run, a row of `runs`, float32 (steps,). FileNotFoundError: not recorded."""
    return np.fromfile(run["folder"] / NORMS, "<f4")
