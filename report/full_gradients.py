"""What critical runs with --full_grad_every measured, full_gradients.csv, as DataFrames. Trusts no file."""

import csv
import statistics

import numpy as np
import pandas as pd

from report import measurements
from state import first_crossing

POINT = ["optimizer", "batch_size", "seed"]
COLUMNS = ["run", *POINT, "diverged", "steps", "batchnorm", "full_gradient_norm"]


def read(critical):
    """Return (rows, {run: why it was not used}) of the critical runs of a Group that measured ‖∇f‖.

    rows: one row per run and measured step, the columns COLUMNS. All are measured every so many epochs, in chunks of
    so many images, as most of the runs are. Of one curve, batch size and seed the first sound run stays.
    """
    asked = [run for run in critical.to_dict("records") if run["args"].get("full_grad_every") is not None]
    settings = [measurements.setting(run, "full_grad_every", "full_grad_batchsize") for run in asked]
    usual = statistics.mode(settings) if asked else None
    found, left_out = {}, {}
    for run, setting in zip(asked, settings, strict=True):
        point, name = tuple(run[key] for key in POINT), f"{run['name']} (full gradient only)"
        if setting != usual:
            left_out[name] = f"it has {setting}; most have {usual}"
        elif point not in found:
            try:
                found[point] = run_rows(run)
            except (ValueError, TypeError, OSError, csv.Error) as error:
                left_out[name] = str(error)[:200]
    return measurements.stacked(list(found.values()), COLUMNS, critical), left_out


def run_rows(run):
    """Return the rows of one run. ValueError, TypeError or OSError for whatever is wrong with them."""
    texts = measurements.table(run["folder"] / "full_gradients.csv")
    every = run.get("full_gradient_every", np.nan)
    if not (1 <= every < 1e12 and every % 1 == 0):
        raise ValueError(f"full_gradient_every is {every!r:.40}, allowed is a whole number of at least 1")
    steps = measurements.number(texts, "steps", True)
    missing = run["steps"] // every + 1 - len(texts)
    complete = missing == 0 or (missing == 1 and run["diverged"])  # it may have diverged at the last measurement
    if not complete or (steps != every * np.arange(len(texts))).any():
        raise ValueError(f"full_gradients.csv does not hold every {every:g}th step from 0 to {run['steps']}")
    norms = measurements.number(texts, "full_gradient_norm", True)
    about = {key: run[key] for key in (*POINT, "diverged")} | {"run": run["name"], "batchnorm": "train"}
    return pd.DataFrame({"steps": steps.astype(int), "full_gradient_norm": norms}).assign(**about)


def crossings(rows, running):
    """Return one row an ε and run: `running`, the crossings of a Group, by ∇f instead of the running mean.

    steps: the first measured step with ‖∇f‖ ≤ ε, without a value if there is none. checked: the last measured step.
    least: the first step that may have been the true one, if ‖∇f‖ was never ≤ ε between two earlier measurements;
    without a `steps`, the last measured one.
    """
    measured = {point: part.sort_values("steps") for point, part in rows.groupby(POINT, observed=True)}
    table = []
    for row in running.to_dict("records"):
        mine = measured.get(tuple(row[key] for key in POINT))
        if mine is None:
            continue
        steps, diverged = mine["steps"].to_numpy(), bool(mine["diverged"].iloc[0])
        index = first_crossing(mine["full_gradient_norm"].to_numpy(), 0, row["eps"], 0)
        step, least = None, None if diverged else steps[-1]
        if index is not None:
            step = steps[index]
            least = steps[index - 1] + 1 if index else 0
        about = {"name": mine["run"].iloc[0], "diverged": diverged, "checked": steps[-1]}
        table.append(row | about | {"steps": step, "least": least})
    found = pd.DataFrame(table, columns=[*running.columns, "least"])
    return found.astype(running.dtypes.to_dict() | {"least": "Int64"})


def norms_for_k(measured, full):
    """Return run, optimizer, steps, batchnorm and ‖∇f‖ of all that was measured by runs that did not diverge.

    measured: of `measurements.read`, sampling runs'. full: of `read`, critical runs'.
    """
    columns = ["run", "optimizer", "steps", "batchnorm", "full_gradient_norm"]
    tables = [table for table in (measured[columns], full[columns][~full["diverged"].astype(bool)]) if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else measured[columns]
