"""What predicts test accuracy: one row a setting, all of one window, and how well each predictor does."""

from itertools import permutations

import numpy as np
import pandas as pd
from scipy import stats

from report import records, theory
from report.critical import minimum
from report.statistics import POINT, evaluations, fits, longest, measured, over_seeds, own, paired

KEY = ["network", "curve", "label", "optimizer", "lr", "beta1", "b"]
PREDICTORS = ("delta", "delta_formula", "temperature", "lr_over_b", "updates", "lambda_max", "excess_real")
PARTS = ("noise_square", "fresh", "memory_noise", "memory_drift", "memory_cross")  # where the memory is split
RESAMPLES = 2000


def trajectories(runs):
    """Return one row a trajectory: its fit (updates, if any), accuracy, and what may predict it: docs/measuring.md.

    And the rows of all evaluations: steps, accuracy (recalibrated if there is BatchNorm), training_acc.
    """
    curves, rows = records.curves(runs), records.measurements(runs)
    evaluated = evaluations(curves, rows).sort_values([*POINT, "steps"]).set_index(POINT)
    evaluated = evaluated[["steps", "accuracy", "accuracy_recalibrated", "training_acc"]]
    recalibrated = evaluated.pop("accuracy_recalibrated")
    has_batchnorm = recalibrated.groupby(POINT).transform("count") > 0
    evaluated["accuracy"] = recalibrated.where(has_batchnorm, evaluated["accuracy"])
    evaluated, rows = evaluated.dropna(subset="accuracy"), own(rows)
    rows = rows[(rows["batchnorm"] == rows["batchnorm"].max()) & (rows["epoch"] >= 1)]  # eval < train
    table = longest(runs).set_index(POINT).join(fits(curves))
    end = table["fit"].fillna(table["steps"]).rename("end")
    late = last_tenth(evaluated, end)
    rows = rows.join(end, on=POINT).query("steps <= end")

    def of(name, how="mean", whole=()):
        return measured(rows, [name, *whole]).groupby(POINT)[name].agg(how).reindex(table.index)

    lr_eff = table["lr"] / (1 - table["beta1"].where(table["optimizer"] == "shb", 0))
    temperature = lr_eff * (of("variance") + of("injected").fillna(0))
    b = table.index.get_level_values("b")
    found = {"accuracy": late["accuracy"], "gap": late["training_acc"] - late["accuracy"], "updates": end}
    found |= {"lr_eff": lr_eff, "temperature": temperature, "lr_over_b": lr_eff / b}
    found |= {name: of(name) for name in ("delta", "lambda_max", "excess_real")}
    found |= {name: of(name, whole=PARTS) for name in PARTS}
    constants = of("c_squared", "max"), of("full_gradient_norm", "max")
    table = table.assign(**found).reset_index()
    table["delta_formula"] = theory.deltas(table, *constants)
    return table[[*KEY, "seed", "fit", *found, "delta_formula"]], evaluated


def last_tenth(rows, end):
    """Return the means of evaluations over the last tenth of the updates up to `end`, by trajectory."""
    rows = rows.join(end)
    return rows[rows["steps"].between(0.9 * rows["end"], rows["end"])].groupby(POINT).mean()


def settings(rows):
    """Return one row a setting: `trajectories` over seeds. Only one that `fits` with every seed is in `table`."""
    rows = rows.assign(fitted=lambda rows: rows["fit"].notna())
    table = over_seeds(rows, KEY, ["fit", "accuracy", "gap", *PREDICTORS, *PARTS])
    fitted = rows.groupby(KEY, dropna=False)["fitted"].agg(fitted="sum", fits="all").reset_index()
    return table.merge(fitted, on=KEY)


def table(points):
    """Return one row a predictor that four settings that fit have. peak: the maximum of a quadratic in its log.

    Its 95 % interval is by resampling settings, ten or more; what lies outside of the range has no value.
    """
    rows = []
    for name in PREDICTORS:
        known = points[points["fits"] & (points[f"{name}_mean"] > 0)].dropna(subset="accuracy_mean")
        known = known.sort_values(f"{name}_mean")
        x, y = np.log(known[f"{name}_mean"].to_numpy()), known["accuracy_mean"].to_numpy()
        if len(set(x)) < 4:
            continue
        peak, ends = minimum(x, -y, 2), (np.nan, np.nan)
        if len(x) >= 10:
            drawn = np.sort(np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x))))
            ends = np.quantile([minimum(x[i], -y[i], 2) for i in drawn], [0.025, 0.975])
        row = {"predictor": name, "settings": len(x), "rank_correlation": stats.spearmanr(x, y).statistic}
        places = {"peak": peak, "peak_low": ends[0], "peak_high": ends[1]}
        row |= {key: np.exp(at) if x[0] < at < x[-1] else np.nan for key, at in places.items()}
        row["inside"] = bool(x[0] < peak < x[-1])
        row["r_squared"] = np.corrcoef(np.polyval(np.polyfit(x, y, 2), x), y)[0, 1] ** 2
        rows.append(row | left_out(x, y, known["optimizer"].to_numpy()))
    return pd.DataFrame(rows)


def matched(rows, evaluated):
    """Return one row a pair of settings that fit, without injected noise, and agree in one of δ and η_eff/b (`equal`)
    within 5 % in the mean over seeds, while the other differs by half or more.

    first: the setting with more of the other one, `ratio` times the second's. difference, _low, _high: of its
    accuracy less the second's, in points, paired by seed. at_equal_updates: up to where the shorter run fits.
    """
    found = []
    fit = [each for _, each in rows.groupby(KEY, dropna=False) if each["fit"].notna().all()]
    fit = [each for each in fit if "inject" not in each["label"].iloc[0]]
    for equal, other in (("delta", "lr_over_b"), ("lr_over_b", "delta")):
        for one, two in permutations(fit, 2):
            about = {key: one[key].mean() / two[key].mean() for key in (equal, other)}
            if abs(np.log(about[equal])) <= np.log(1.05) and about[other] >= 1.5:
                found.append({"equal": equal, "ratio": about[other]} | compared(evaluated, one, two))
    return pd.DataFrame(found)


def compared(evaluated, one, two):
    """Return how two settings of `trajectories` differ, as `matched` has it."""
    first, second = (f"{each['curve'].iloc[0]}, b {each['b'].iloc[0]}" for each in (one, two))
    row = {"first": first, "second": second}
    end = np.minimum(*(each.set_index("seed")["updates"] for each in (one, two)))
    sides = [last_tenth(evaluated, each.set_index(POINT).join(end.rename("end"))["end"]) for each in (one, two)]
    for name, pair in (("difference", (one, two)), ("at_equal_updates", [side.reset_index() for side in sides])):
        found = paired(*pair, "accuracy")
        row |= {name: found["difference"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        row.setdefault("seeds", found["seeds"])
    return row


def left_out(x, y, groups):
    """Return R² of quadratics that predict each group from the others, and how many of these are extrapolated."""
    predicted, outside = np.full(len(y), np.nan), 0
    for group in set(groups):
        here = groups == group
        if len(set(x[~here])) > 3:
            predicted[here] = np.polyval(np.polyfit(x[~here], y[~here], 2), x[here])
            outside += int(((x[here] < x[~here].min()) | (x[here] > x[~here].max())).sum())
    at = ~np.isnan(predicted)
    r_squared = 1 - ((y[at] - predicted[at]) ** 2).sum() / (len(y[at]) * y[at].var()) if at.any() else np.nan
    return {"left_out": r_squared, "extrapolated": outside}
