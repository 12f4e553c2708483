"""From the rows of runs to means over seeds: each trajectory once, min and max, and 95 % t intervals."""

import numpy as np
import pandas as pd
from scipy import stats

from arguments import OPTIMIZERS
from report.records import CURVE

POINT = ["curve", "b", "seed"]  # a trajectory
PLACE = [*POINT, "batchnorm", "steps", "batch_size", "layer"]  # where on it something is measured
FIT = 0.01  # a run fits its data after the first epoch whose mean training loss is below this
MEASUREMENT = [*CURVE, "b", "full_grad_batchsize", "batchnorm", "steps", "epoch"]  # what seeds are averaged at

# What the error of one seed is of, where it is not of every draw: as many random vectors, whatever the draws; or one
# value in so many draws, as pairs, or vectors that are taken with their mirror images.
VECTORS = {"hessian_trace": 16, "average_sharpness": 16, "batch_sharpness": 32}
PAIRS = {"excess_predicted", "excess_predicted_isotropic", "excess_gaussian", "excess_isotropic"}  # 16 at most


def _values(name, draws):
    """Return of how many independent values the error of one seed is."""
    if name in PAIRS:
        return (draws // 2).clip(upper=16)
    return VECTORS.get(name, draws // 4 if name == "augmentation_variance" else draws)


def longest(runs):
    """Return one run a trajectory, the one with the most steps: a shorter one only repeats its beginning."""
    return runs.sort_values("steps", ascending=False, kind="stable").drop_duplicates(POINT).sort_index()


def hours(runs):
    """Return the hours of `runs`, each trajectory counted once, as its longest run: repeating it adds nothing."""
    return runs.groupby(POINT)["seconds"].max().sum() / 3600


def fits(curves):
    """Return, by trajectory (POINT), the updates after which it fits: the first epoch with mean loss < FIT."""
    ends = curves[(curves["epoch"] % 1 == 0) & (curves["training_loss"] < FIT)]
    return ends.groupby(POINT)["steps"].min().rename("fit")


def measured(rows, quantity):
    """Return the rows of `records.measurements` that hold `quantity`, or several; of one PLACE that of most draws."""
    known = rows.dropna(subset=quantity).sort_values("draws", ascending=False, kind="stable")
    return known.drop_duplicates(PLACE).sort_index()


def own(rows):
    """Return the rows about the whole vector and batches of the size that training takes."""
    return rows[(rows["layer"] == "all") & (rows["batch_size"] == rows["b"])]


def evaluations(curves, rows):
    """Return the `curves` rows with a test accuracy; recalibrated from `measurements` rows where they have none."""
    at = [*POINT, "steps"]
    found = curves.dropna(subset="accuracy").drop_duplicates(at).set_index(at)
    more = rows.groupby(at)[["accuracy_recalibrated", "test_loss_recalibrated"]].first()
    return found.fillna(more).reset_index()


def over_seeds(rows, key, quantities):
    """Return one row a `key`, rows in which a seed stands once: seeds, draws, and of each quantity six.

    NAME_mean, NAME_min, NAME_max over seeds; NAME_low, NAME_high: 95 % t interval of the mean; NAME_se: of the seeds'
    values, or of one seed's draws or random vectors (t over their number − 1). draws: the fewest of any seed.
    """
    order = {name: i for i, name in enumerate(OPTIMIZERS)}
    groups = rows.assign(order=rows["optimizer"].map(order)).groupby(["order", *key], dropna=False)
    table = pd.DataFrame({"seeds": groups["seed"].nunique()})
    if "draws" in rows:
        table["draws"] = groups["draws"].min()
    for name in quantities:
        values, count = groups[name], groups[name].count()
        error, freedom = values.std() / np.sqrt(count), count - 1
        if f"{name}_se" in rows:
            error = error.where(count > 1, groups[f"{name}_se"].first())
            freedom = freedom.where(count > 1, _values(name, table["draws"]) - 1)
        half = error * stats.t.ppf(0.975, freedom.where(freedom > 0))
        mean = values.mean()
        found = {"mean": mean, "min": values.min(), "max": values.max(), "se": error}
        found |= {"low": mean - half, "high": mean + half}
        table = table.join(pd.DataFrame(found).add_prefix(f"{name}_"))
    return table.reset_index().drop(columns="order")


def at_common(rows, by=("steps", "epoch")):
    """Return (the rows at one event, its name): the last that nine in ten of the most settings (curve, b) share.

    Events are values of the columns `by`, the first preferred; nothing is compared before the first update.
    """
    later = rows[rows["steps"] > 0]
    if later.empty:
        return later, ""
    shared = {column: later.drop_duplicates(["curve", "b", column]).groupby(column).size() for column in by}
    column = max(by, key=lambda column: shared[column].max())
    value = shared[column][shared[column] >= 0.9 * shared[column].max()].index.max()
    return rows[rows[column] == value], f"{'epoch' if column == 'epoch' else 'step'} {value:,g}"


def paired(rows, others, quantity):
    """Return difference `rows` − `others` of a quantity, paired by seed: mean, 95 % t interval, seeds; see `level`."""
    one, other = (table.set_index("seed")[quantity].dropna() for table in (rows, others))
    differences = (one - other).dropna()
    mean, error = differences.mean(), differences.sem()
    half = error * stats.t.ppf(0.975, max(1, len(differences) - 1))  # of one seed there is no error
    return {"difference": mean, "low": mean - half, "high": mean + half, "se": error, "seeds": len(differences)}


def level(rows, others, quantity, margin=0.5):
    """Return p of "they differ by `margin` or more", paired by seed: level if p < 0.05 (two one-sided t tests)."""
    found = paired(rows, others, quantity)
    with np.errstate(divide="ignore"):  # no spread at all: surely inside, or surely not
        return stats.t.cdf(np.divide(abs(found["difference"]) - margin, found["se"]), max(1, found["seeds"] - 1))
