"""What the noise does to the loss, and how sharp the loss is: landscape.csv as DataFrames. Trusts no such file."""

import csv
import statistics

import numpy as np
import pandas as pd

from report import measurements, tables
from report.budget import KEY, pooled_error
from report.records import HUGE

SMOOTHING = ("excess", "real", "gaussian", "isotropic", "predicted", "predicted_isotropic")
SHARPNESS = ("trace", "average_sharpness", "batch_sharpness")
ALONE = {"smoothing": ("displacement", "fluctuation_norm", "loss_z"), "sharpness": ("lambda_max",)}
UNKNOWN = ("lambda_max", "batch_sharpness")  # where the Hessian, or every gradient, is zero
ESTIMATED = {"smoothing": SMOOTHING, "sharpness": SHARPNESS}  # with a standard error


def measure(group):
    """Return ({smoothing, sharpness: DataFrame}, {run and file: why it was not used}) of the sampling runs of a Group.

    A row is of one optimizer, b of training, BatchNorm mode and step: seeds, the band of every number over seeds, and
    the standard error of its mean, which is of the draws and random vectors and says nothing of how seeds differ.
    A table is empty where nothing was measured.
    """
    found, left_out = {"smoothing": [], "sharpness": []}, {}
    runs = group.sampling[~group.sampling["diverged"]].to_dict("records")
    runs = [run for run in runs if run["args"].get("smoothing") or run["args"].get("sharpness")]
    settings = [measurements.setting(run, "probe_images", "smoothing") for run in runs]
    usual = statistics.mode(settings) if runs else None
    for run, setting in zip(runs, settings, strict=True):
        asked = {"smoothing": run["args"].get("smoothing"), "sharpness": run["args"].get("sharpness")}
        try:
            if setting != usual:
                raise ValueError(f"it has {setting}; most have {usual}")
            texts = measurements.table(run["folder"] / "landscape.csv")
            read = {name: rows_of(run, texts, name) for name in found if asked[name]}
        except (ValueError, TypeError, OSError, csv.Error) as error:
            left_out[f"{run['name']} (landscape.csv only)"] = str(error)[:200]
            continue
        for name, rows in read.items():
            found[name].append(rows)
    made = {name: over_seeds(rows, name, group.runs) for name, rows in found.items()}
    return made | {"sharpness": with_thresholds(made["sharpness"], group)}, left_out


def rows_of(run, texts, name):
    """Return the columns of one table from one run's file. ValueError for whatever is wrong with them."""
    rows = measurements.head(run, texts)
    for key in ESTIMATED[name]:
        rows[key] = measurements.number(texts, key, key not in UNKNOWN, low=-HUGE)
        rows[f"{key}_se"] = measurements.number(texts, f"{key}_se", key not in UNKNOWN)
    for key in ALONE[name]:
        rows[key] = measurements.number(texts, key, key not in UNKNOWN, low=-HUGE)
    rows["probe_images"] = measurements.number(texts, "probe_images", True)
    if rows.duplicated(["steps", "batchnorm"]).any():
        raise ValueError("a step and batchnorm is there twice")
    return rows


def over_seeds(parts, name, runs):
    """Return the table of the rows of all runs."""
    if not parts:
        return pd.DataFrame()
    rows = pd.concat(parts, ignore_index=True).astype({"optimizer": runs["optimizer"].dtype})
    rows = rows.drop_duplicates([*KEY, "seed"])  # two runs of one seed have the same weights at the same step
    seeds = rows.groupby(KEY, observed=True)
    table = pd.DataFrame({"seeds": seeds.size(), "probe_images": seeds["probe_images"].first()})
    for key in (*ESTIMATED[name], *ALONE[name]):
        table = table.join(tables.band(seeds, key))
        if key in ESTIMATED[name]:
            table[f"{key}_se"] = seeds[f"{key}_se"].agg(pooled_error)
    return table.reset_index()


def thresholds(lr, beta):
    """Return {optimizer: (largest stable λ, level of batch sharpness at small b)} for full-batch steps.

    A quadratic of curvature λ is descended stably up to 2/η by SGD, 2(1 + β)/η by SHB, and 2(1 + β)/(η(1 − β)) by
    NSHB, which at η is SHB at η(1 − β) [Polyak 1964; derived]. Batch sharpness is said to settle at 2/η (SGD) and
    2(1 − β)/η (SHB at small b) [Andreyev and Beneventano; 2604.14108]; for NSHB that is 2/η again [derived].
    """
    stable = {"sgd": 2 / lr, "shb": 2 * (1 + beta) / lr, "nshb": 2 * (1 + beta) / (lr * (1 - beta))}
    small = {"sgd": 2 / lr, "shb": 2 * (1 - beta) / lr, "nshb": 2 / lr}
    return {name: (stable[name], small[name]) for name in stable}


def with_thresholds(table, group):
    """Return the sharpness table with the two levels of `thresholds`, without a value for other optimizers."""
    if table.empty:
        return table
    known = thresholds(group.lr, group.beta)
    pairs = [known.get(name, (np.nan, np.nan)) for name in table["optimizer"]]
    return table.assign(**dict(zip(("stable_up_to", "batch_sharpness_level"), np.array(pairs).T, strict=True)))
