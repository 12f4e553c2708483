"""Steps to ε and SFO complexity from the gradient norms of any run; the critical batch size b* with its interval."""

from argparse import Namespace

import numpy as np
import pandas as pd
from scipy import stats
from scipy.interpolate import CubicSpline

from arguments import defaults, steps_per_epoch
from report import published, records, theory
from report.statistics import POINT, fits, longest, measured, over_seeds, own
from training.stopping import first_check, first_crossing, first_measured, running_means

KEY = [*records.CURVE, "min_epochs", "eps", "b"]
REDRAWS = 10_000
PLACES = ("b_star", "b_star_fit", "b_star_fit_low", "b_star_fit_high")
OTHER_FITS = ((2, 1), (2, 2), (2, 3), (3, 2), (3, 3))  # degree, and how many sizes on each side of the best
FEWEST_UPDATES = 50  # of fewer, b* says how training begins, not how it goes on


def crossings(runs, min_epochs=None, rows=None):
    """Return one row a trajectory with recorded gradient norms, ε and min_epochs: steps until their mean is ≤ ε.

    ε and min_epochs are those of the setting's critical runs: the defaults (the paper's) where there are none,
    `min_epochs` where it is given. steps: no value where ε was not reached; checked: looked at. rows: `measurements`.
    """
    critical, found = runs[runs["mode"] == "critical"], []
    known = longest(runs[[(folder / records.NORMS).exists() for folder in runs["folder"]]])
    fit, full = fits(records.curves(known)), own(records.measurements(runs) if rows is None else rows)
    full = full.dropna(subset="full_gradient_norm").sort_values(["batchnorm", "steps"])  # eval < train
    norms = full.groupby([*POINT, "steps"])["full_gradient_norm"].last()
    for run in known.to_dict("records"):
        asked = critical["args"][critical["setting"] == run["setting"]].tolist() or [defaults()]
        every_eps = sorted({eps for args in asked for eps in args["eps"]}, reverse=True)
        rules = sorted({args["min_epochs"] for args in asked})
        means, point = running_means(records.gradient_norms(run)), tuple(run[key] for key in POINT)
        at = norms.loc[point].to_dict() if point in norms.index else {}
        for rule in rules if min_epochs is None else [min_epochs]:
            check = first_check(rule, steps_per_epoch(Namespace(**run["args"])))
            for eps in every_eps:
                steps = first_crossing(means, 1, eps, check)
                row = {"min_epochs": rule, "eps": eps, "steps": steps, "checked": len(means)}
                row |= {"at_first_check": check > 1 and steps == check, "diverged": run["status"] == "diverged"}
                row["after_fit"] = steps is not None and steps > fit.get(point, np.inf)
                row["steps_to_eps_full"], row["last_above_eps_full"] = first_measured(at, eps)
                found.append({key: run[key] for key in (*records.CURVE, "b", "seed")} | row)
    return pd.DataFrame(found)


def steps_to_eps(runs, min_epochs=None, rows=None):
    """Return one row a curve, min_epochs, ε and b: steps to ε and SFO complexity = steps × b, over seeds.

    How many seeds reached ε, missed it (entering with the steps made, a lower bound), diverged before, had it at the
    first check or after the fit. log_sfo: less what a seed adds at every b. ratio: to the published steps.
    steps_to_eps_full, last_above_eps_full: first measured step with ‖∇f‖ ≤ ε, and the one before it.
    """
    table = crossings(runs, min_epochs, rows)
    if table.empty:
        return table
    reached = table["steps"].notna()
    table["diverged"] &= ~reached
    table["steps"] = table["steps"].astype(float).where(reached, table["checked"].where(~table["diverged"]))
    table = table.assign(reached=reached, missed=~reached, sfo=table["steps"] * table["b"])
    table["log_sfo"] = np.log(table["sfo"]) - _of_seed(table)
    full = ["steps_to_eps_full", "last_above_eps_full"]
    table[full] = table[full].astype(float)
    found = over_seeds(table, KEY, ["steps", "sfo", "log_sfo", *full])
    counts = ["reached", "missed", "diverged", "at_first_check", "after_fit"]
    counts = table.groupby(KEY, dropna=False)[counts].sum().reset_index()
    where = ["curve", "min_epochs", "eps", "b"]
    found = found.merge(counts, on=KEY).merge(published.steps()[[*where, "published"]], how="left", on=where)
    return found.assign(ratio=(found["steps_mean"] / found["published"]).where(found["reached"] == found["seeds"]))


def _of_seed(table):
    """Return what each seed adds to log SFO, mean over the b that count; 0 if it does not stand at all these."""
    counts = (table["reached"] & ~table["at_first_check"]).groupby([table[key] for key in KEY], dropna=False)
    whole = table[counts.transform("all")].assign(log=lambda rows: np.log(rows["sfo"]))
    curve, seed = (whole.groupby(key, dropna=False) for key in (KEY[:-1], [*KEY[:-1], "seed"]))
    balanced = curve["b"].transform("size") == curve["b"].transform("nunique") * curve["seed"].transform("nunique")
    added = seed["log"].transform("mean") - curve["log"].transform("mean")
    return added.where(balanced, 0.0).reindex(table.index, fill_value=0.0)


def minimum(x, y, degree=3):
    """Return where the polynomials through y (sizes,) or (sizes, redraws) are least between the first and last x."""
    design = np.vander(x - x.mean(), degree + 1)
    factors = np.linalg.lstsq(design, y, rcond=None)[0]
    a, b, c = factors[0] if degree == 3 else 0.0, factors[-3], factors[-2]
    with np.errstate(invalid="ignore", divide="ignore"):
        at = x.mean() - c / (b + np.sqrt(b * b - 3 * a * c))  # 3ax² + 2bx + c = 0 with a positive slope
    first, last = design[[0, -1]] @ factors
    return np.where((at > x[0]) & (at < x[-1]), at, np.where(first <= last, x[0], x[-1]))


def interval(redraws):
    """Return the 95 % interval of rows of redraws: from the least lower end to the greatest upper one."""
    ends = np.quantile(redraws, [0.025, 0.975], axis=-1)
    return ends[0].min(), ends[1].max()


def b_star(steps, rows=None):
    """Return one row a curve, min_epochs and ε: the critical batch size, of the lowest mean SFO complexity.

    Of two sizes or more at which every seed reached ε, not at the first check. Columns: docs/measuring.md; inside: the
    sizes on both sides need more; updates: to ε; note: why it is no result; redraws, others: log2 b*, redrawn or by
    OTHER_FITS and a spline. `rows`: of `records.measurements`, with measured C².
    """
    found = []
    for _, grid in steps.groupby(KEY[:-1], dropna=False, sort=False) if len(steps) else ():
        grid = grid.sort_values("b", ignore_index=True)
        whole = (grid["reached"] == grid["seeds"]) & (grid["at_first_check"] == 0)
        if whole.sum() < 2:
            continue
        best = grid.loc[grid["sfo_mean"].where(whole).idxmin()]  # of equal ones the smallest b
        row = {key: best[key] for key in (*KEY[:-1], "seeds")} | {"b_star": best["b"], "sfo": best["sfo_mean"]}
        few = f"below {FEWEST_UPDATES} updates" if best["steps_mean"] < FEWEST_UPDATES else ""
        row |= {"updates": best["steps_mean"], "note": "after the fit" if best["after_fit"] else few}
        row |= _place(grid, whole, best, fit=not row["note"])
        found.append(row | _c_squared(row, rows))
    return pd.DataFrame(found)


def _place(grid, whole, best, fit):
    """Return the columns about where b* lies: by the grid, and by a fit if there may be one."""
    here = grid[whole]
    x, y, n = np.log2(here["b"].to_numpy(float)), here["log_sfo_mean"].to_numpy(), here["seeds"].to_numpy()
    at, freedom = here.index.get_loc(best.name), (n - 1).sum() * (1 - 1 / len(n))  # a seed's own level: 1 of n − 1
    error = np.sqrt(np.nansum((n - 1) * n * here["log_sfo_se"] ** 2) / max(freedom, 1) / n)
    alike = y - y[at] <= (stats.t.ppf(0.975, freedom) * np.hypot(error, error[at]) if freedom else 0)
    # What a size needs at least is not known where a seed diverged, or had ε when it was first looked at.
    least = (grid["at_first_check"] == 0) & (grid["diverged"] == 0) & (grid["sfo_mean"] > best["sfo_max"])
    more = pd.concat([here["b"][~alike], grid["b"][least & ~whole]])
    low, high = more[more < best["b"]].max(), more[more > best["b"]].min()
    row = {"inside": low < high, "alike": " ".join(map(str, here["b"][alike])) if freedom else ""}
    row |= dict(zip(PLACES[1:], (np.nan, low, high), strict=True)) | {"other_fits": np.nan}
    if not fit or min(at, len(x) - 1 - at) < 2:
        return row
    near, fine = {k: slice(max(0, at - k), at + k + 1) for k in (1, 2, 3)}, np.linspace(x[0], x[-1], 4001)
    others = [minimum(x[near[k]], y[near[k]], degree) for degree, k in OTHER_FITS]
    others = np.array([*others, fine[CubicSpline(x, y)(fine).argmin()]])
    middle, first, last = others[4], *x[near[3]][[0, -1]]
    if not first < middle < last:
        return row
    drawn = np.full((2, REDRAWS), np.nan)
    for i, part in enumerate((near[3], near[2]) if freedom else ()):
        # No curve is a cubic, and steep on one side it is far from one: what it leaves of y replaces a smaller error.
        left = y[part] - np.polyval(np.polyfit(x[part] - x[part].mean(), y[part], 3), x[part] - x[part].mean())
        wide = np.maximum(error[part], np.sqrt(left @ left / max(1, len(left) - 4)))
        t = np.random.default_rng(round(1e6 * best["eps"])).standard_t(freedom, (REDRAWS, len(left)))
        drawn[i] = minimum(x[part], (y[part] + wide * t).T)
    low, high = interval(drawn)
    ends = middle, low if low > first else np.nan, high if high < last else np.nan
    row |= dict(zip(PLACES[1:], np.exp2(ends), strict=True)) | {"redraws": drawn, "others": others}
    return row | {"other_fits_low": 2 ** others.min(), "other_fits_high": 2 ** others.max()}


def _c_squared(star, rows):
    """Return C² from b*, C² measured at the size b_star and the formula's b* for it, and what the paper has."""
    about, at = (star["optimizer"], star["lr"]), (star["eps"], np.nan_to_num(star["beta1"]))
    names = ("from_b_star", "fit", "fit_low", "fit_high")
    found = {f"c_squared_{k}": theory.c_squared(*about, star[b], *at) for k, b in zip(names, PLACES, strict=True)}
    paper = published.CONSTANTS.get(star["curve"], {})
    found["published_b_star"] = paper.get("b_star", {}).get(star["eps"], np.nan)
    found["published_c_squared"] = paper.get("c_squared", np.nan) if star["eps"] == 0.5 else np.nan
    if rows is None or rows.empty:
        return found
    here = rows[(rows["curve"] == star["curve"]) & (rows["b"] == star["b_star"]) & (rows["steps"] <= star["updates"])]
    here = own(measured(here, "c_squared"))
    values = here[here["batchnorm"] == here["batchnorm"].max()].groupby("steps")["c_squared"].mean()  # eval < train
    if len(values):
        found |= {"c_squared_run": values.mean(), "c_squared_at_eps": values.iloc[-1], "c_squared_max": values.max()}
        found["b_star_formula"] = theory.critical_batch_size(*about, values.mean(), *at)
    return found


def slope_weights(every_eps):
    """Return what log2 b* at each ε contributes to the power p of b* ~ (1/ε)^p, the slope of a regression."""
    x = np.log2(np.mean(every_eps) / np.array(every_eps))
    x -= x.mean()
    return x / (x @ x)


def power(stars):
    """Return one row a curve and min_epochs with two fitted ε: the power of 1/ε in b*; argmin: in the paper's b*."""
    rows = []
    for _, part in stars.groupby(KEY[:-2], dropna=False, sort=False) if len(stars) else ():
        part = part.dropna(subset="b_star_fit")
        if len(part) < 2:
            continue
        weights = slope_weights(part["eps"])
        slope, argmin = weights @ np.log2(part[["b_star_fit", "b_star"]].to_numpy(float))
        low, high = interval(np.tensordot(weights, np.stack(part["redraws"]), 1))
        others = weights @ np.stack(part["others"])
        row = {key: part[key].iloc[0] for key in KEY[:-2]} | {"every_eps": " ".join(f"{e:g}" for e in part["eps"])}
        row |= {"power": slope, "power_low": low, "power_high": high, "argmin": argmin, "other_fits": np.nan}
        rows.append(row | {"other_fits_low": others.min(), "other_fits_high": others.max()})
    return pd.DataFrame(rows)
