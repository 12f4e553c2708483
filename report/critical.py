"""Steps to ε and SFO complexity from the gradient norms of any run, and the critical batch size b*."""

from argparse import Namespace

import numpy as np
import pandas as pd

from arguments import defaults, steps_per_epoch
from report import published, records, theory
from report.statistics import longest, over_seeds
from training.stopping import first_check, first_crossing, running_means

KEY = [*records.CURVE, "min_epochs", "eps", "b"]


def crossings(runs, min_epochs=None):
    """Return one row a trajectory with recorded gradient norms, ε and min_epochs: steps until their mean is ≤ ε.

    Each run answers for every ε and min_epochs of the critical runs of its setting: the defaults (the paper's) where
    there are none, `min_epochs` where it is given. steps: no value where ε was not reached; checked: steps looked at.
    """
    critical, rows = runs[runs["mode"] == "critical"], []
    known = runs[[(folder / records.NORMS).exists() for folder in runs["folder"]]]
    for run in longest(known).to_dict("records"):
        asked = critical["args"][critical["setting"] == run["setting"]].tolist() or [defaults()]
        every_eps = sorted({eps for args in asked for eps in args["eps"]}, reverse=True)
        rules = sorted({args["min_epochs"] for args in asked})
        means = running_means(records.gradient_norms(run))
        for rule in rules if min_epochs is None else [min_epochs]:
            check = first_check(rule, steps_per_epoch(Namespace(**run["args"])))
            for eps in every_eps:
                steps = first_crossing(means, 1, eps, check)
                row = {"min_epochs": rule, "eps": eps, "steps": steps, "checked": len(means)}
                row |= {"at_first_check": check > 1 and steps == check, "diverged": run["status"] == "diverged"}
                rows.append({key: run[key] for key in (*records.CURVE, "b", "seed")} | row)
    return pd.DataFrame(rows)


def steps_to_eps(runs, min_epochs=None):
    """Return one row a curve, min_epochs, ε and b: steps to ε and SFO complexity = steps × b, over seeds.

    seeds, and how many of them reached ε, missed it, diverged before, or had it at the first check, where steps are
    an upper bound. A seed that missed ε enters with the steps it made: the row is a lower bound. published: the
    paper's steps, and ratio, ours over them, where all seeds reached ε.
    """
    table = crossings(runs, min_epochs)
    if table.empty:
        return table
    reached = table["steps"].notna()
    table["diverged"] &= ~reached
    table["steps"] = table["steps"].astype(float).where(reached, table["checked"].where(~table["diverged"]))
    table = table.assign(reached=reached, missed=~reached, sfo=table["steps"] * table["b"])
    found = over_seeds(table, KEY, ["steps", "sfo"])
    counts = ["reached", "missed", "diverged", "at_first_check"]
    counts = table.groupby(KEY, dropna=False)[counts].sum().reset_index()
    found = found.merge(counts, on=KEY).merge(published.steps(), how="left", on=["curve", "min_epochs", "eps", "b"])
    return found.assign(ratio=(found["steps_mean"] / found["published"]).where(found["reached"] == found["seeds"]))


def b_star(steps):
    """Return one row a curve, min_epochs and ε: the critical batch size, that of the lowest mean SFO complexity.

    Eligible are the b at which every seed reached ε, and not at the first check; two at least. inside: whether both
    neighbours of b* in the grid are known to need more; if not, it is only a bound. c_squared_from_b_star: solved by
    the formula, where the optimizer has one. published_b_star, published_c_squared: the paper's.
    """
    if steps.empty:
        return steps
    rows = []
    for _, grid in steps.groupby(KEY[:-1], dropna=False, sort=False):
        grid = grid.sort_values("b", ignore_index=True)
        whole = (grid["reached"] == grid["seeds"]) & (grid["at_first_check"] == 0)
        if whole.sum() < 2:
            continue
        at = grid["sfo_mean"].where(whole).idxmin()  # of equal ones the smallest b
        # What a neighbour needs is not known where a seed diverged, or had ε when it was first looked at.
        known = (grid["at_first_check"] == 0) & (grid["diverged"] == 0)
        more = whole | (known & (grid["sfo_mean"] > grid["sfo_max"][at]))
        best, inside = grid.loc[at], 0 < at < len(grid) - 1 and bool(more[at - 1] and more[at + 1])
        paper, beta = published.CONSTANTS.get(best["curve"], {}), np.nan_to_num(best["beta1"])
        solved = np.nan
        if best["optimizer"] in theory.FORMULAS and not (best["optimizer"] == "shb" and beta == 0):
            solved = theory.c_squared(best["optimizer"], best["lr"], best["b"], best["eps"], beta)
        row = {key: best[key] for key in KEY[:-1]} | {"b_star": best["b"], "inside": inside}
        row |= {"sfo": best["sfo_mean"], "seeds": best["seeds"], "c_squared_from_b_star": solved}
        row |= {"published_b_star": paper.get("b_star", {}).get(best["eps"], np.nan)}
        rows.append(row | {"published_c_squared": paper.get("c_squared", np.nan) if best["eps"] == 0.5 else np.nan})
    return pd.DataFrame(rows)
