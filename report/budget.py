"""The noise budget of a group of runs as DataFrames: what ω is made of, C² measured and solved, δ beside its bound.

All of it is from measurements.csv and shape.csv of sampling runs with --draws. A row of a table is of one
optimizer, batch size of training, BatchNorm mode and step; bands are over seeds, as in report/tables.py.
"""

import numpy as np
import pandas as pd

from report import measurements, tables, theory

NAMES = {"c_squared": "c_squared_direct", "c_squared_se": "c_squared_direct_se"}  # beside the C² solved from b*
KEY = ["optimizer", "run_batch_size", "batchnorm", "steps"]
BUDGET = ["noise_square", "delta", "delta_se", "delta_renamed", "fresh", "memory", "injected", "variance"]
BUDGET += [*measurements.OF_TRAINING, "c_squared_direct"]
BUDGET += ["c_squared_direct_se", "noise_scale", "batchnorm_bias", "full_gradient_norm", "accuracy"]
EMPTY = ("budget", "direct", "c_squared", "delta_bound", "shape")


def measure(made, group):
    """Return ({name: DataFrame} of the budget of a Group, {run: why rows of its are in none of them}).

    made: of `tables.measure`. The tables are empty where no run has drawn. direct: C²_b, a row more per b drawn.
    """
    rows, left_out = measurements.of_usual_draws(made["measurements"].rename(columns=NAMES), [*KEY, "batch_size"])
    shapes, no_shape = measurements.of_usual_draws(made["shapes"], KEY)
    if rows.empty:
        return dict.fromkeys(EMPTY, pd.DataFrame()), {}
    own = rows[rows["batch_size"] == rows["run_batch_size"]]
    found = {"budget": over_seeds(own, BUDGET), "direct": direct(rows, [*KEY, "batch_size"])}
    at_own = direct(own, KEY)
    found["c_squared"] = c_squared(at_own, made["constants"])
    found["delta_bound"] = delta_bound(own, at_own, made, group)
    found["shape"] = over_seeds(shapes, [*measurements.SHAPE, *measurements.TESTED]) if len(shapes) else shapes
    return found, no_shape | left_out


def over_seeds(rows, columns):
    """Return one row per KEY: seeds, draws, and the bands of the columns."""
    seeds = rows.groupby(KEY, observed=True)
    table = pd.DataFrame({"seeds": seeds.size(), "draws": seeds["draws"].first()})
    for column in columns:
        table = table.join(tables.band(seeds, column))
    return table.reset_index()


def pooled_error(errors):
    """Return the standard error of a mean over independent seeds, from the standard error of each."""
    return np.sqrt((errors.to_numpy() ** 2).sum()) / len(errors)


def direct(rows, key):
    """Return one row per `key`: the direct C², its band over seeds, and the standard error of the mean.

    The standard error is of the draws: it says nothing of how seeds differ.
    """
    seeds = rows.groupby(key, observed=True)
    table = pd.DataFrame({"seeds": seeds.size()}).join(tables.band(seeds, "c_squared_direct"))
    table["c_squared_direct_se"] = seeds["c_squared_direct_se"].agg(pooled_error)
    return table.reset_index()


def c_squared(at_own, constants):
    """Return the direct C² of `direct`, a row per KEY, beside that solved from b*, K, and the published.

    solved_over_direct: how many times too large the solved is. constants: of `tables.constants`.
    """
    columns = ["c_squared", "c_squared_from", "k", "k_run", "k_step", "published_c_squared", "published_k"]
    theirs = constants.drop_duplicates("optimizer").set_index("optimizer")[columns]
    table = at_own.join(theirs, on="optimizer")
    solved = table["c_squared"].astype(float)
    table.insert(table.columns.get_loc("k"), "solved_over_direct", solved / table["c_squared_direct_mean"])
    return table


def delta_bound(own, at_own, made, group):
    """Return the measured δ beside the formula's, and the terms of its bound beside what they bound, a row per KEY.

    The formula's C² must hold at every x, so it is the greatest mean over seeds of any measured step, of the same
    optimizer, b and mode; K is the greatest ‖∇f‖ of the optimizer in this mode. c_squared_term bounds `fresh` and
    the noise in the memory, k_term the rest of `memory`; both are parts of ψ² (`theory.terms`), as δ = ηψ.
    """
    seeds = own.groupby(KEY, observed=True)
    table = pd.DataFrame({"seeds": seeds.size()}).join(tables.band(seeds, "delta"))
    table["delta_se"] = seeds["delta_se"].agg(pooled_error)
    for part in ("fresh", "memory"):
        table = table.join(tables.band(seeds, part))
    greatest = at_own.groupby(KEY[:3], observed=True)["c_squared_direct_mean"].max()
    bounds = [bound(*point[:3], greatest[point[:3]], made, group) for point in table.index]
    table = table.reset_index().join(pd.DataFrame(bounds))
    table["bound_over_measured"] = table["delta_bound"] / table["delta_mean"]
    return table


def bound(optimizer, b, batchnorm, c_squared_direct, made, group):
    """Return the formula's δ, its terms, and the C² and K in them; where there is no formula, without values."""
    runs, rows = made["runs"], made["norms_for_k"]
    mine = runs[runs["optimizer"] == optimizer], rows[rows["optimizer"] == optimizer]
    k = tables.largest_full_gradient(*mine, batchnorm)["k"]
    found = {"c_squared_greatest": c_squared_direct, "k_greatest": k}
    if optimizer not in theory.OPTIMIZERS or np.isnan(c_squared_direct):
        return found | dict.fromkeys(("c_squared_term", "k_term", "delta_bound"), np.nan)
    variance, rest = theory.terms(optimizer, b, c_squared_direct, k, group.beta)
    found |= {"c_squared_term": float(variance), "k_term": float(rest)}
    smoothing = theory.degree_of_smoothing(optimizer, group.lr, b, c_squared_direct, k, group.beta)
    return found | {"delta_bound": float(smoothing)}
