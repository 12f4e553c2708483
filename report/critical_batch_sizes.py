"""The critical batch size four ways: argmin of SFO by two rules, 20 % departure, noise scale (measure.md, 7)."""

import numpy as np
import pandas as pd

from report import measurements

DEPARTED = 1.2  # times the SFO complexity of perfect scaling [Zhang et al. 2024]
RULES = {"": ("steps", "constants"), "_full": ("steps_full_gradient", "constants_full_gradient")}


def critical_batch_size(rows):
    """Return b* and its uncertainty, a dict, from one optimizer's and ε's rows of `steps`; {} if it has none.

    Eligible are the points all of whose seeds reached ε, and after the first check; two at least. range: the b
    whose seeds' SFO overlaps that at b*; none for one seed, unless its SFO is bracketed. undecided: the b that are
    not eligible and whose SFO may be as small. edge: "<=" or ">=" where the next b below or above b* is not known to
    need more, so that b* is only a bound; "?" where neither is.
    """
    rows = rows.sort_values("batch_size", ignore_index=True)
    whole = (rows["reached"] == rows["critical_seeds"]) & (rows["at_first_check"] == 0)
    if whole.sum() < 2:
        return {}
    at = rows["sfo_mean"][whole].idxmin()  # of equal ones, the smallest b
    best, limit = rows.loc[at], rows["sfo_max"][at]
    undecided = ~whole & (least_sfo(rows) <= limit)
    has_spread = best["critical_seeds"] > 1 or "sfo_least" in rows
    near = whole & (rows["sfo_min"] <= limit).fillna(False) & has_spread
    open_below = at == 0 or undecided[at - 1]
    open_above = at == len(rows) - 1 or undecided[at + 1]
    edge = "<=" if open_below else ">=" if open_above else ""
    return {
        "b_star": int(best["batch_size"]),
        "edge": "?" if open_below and open_above else edge,
        "range": " ".join(rows["batch_size"][near].astype(str)),
        "critical_seeds": int(best["critical_seeds"]),
        "undecided": " ".join(rows["batch_size"][undecided].astype(str)),
    }


def least_sfo(rows):
    """Return what the mean SFO complexity of rows of `steps` is at least; 0 where a seed was there at first look."""
    least = rows["sfo_least"] if "sfo_least" in rows else rows["sfo_mean"]
    return least.where(rows["at_first_check"] == 0).fillna(0)


def by_rule(made):
    """Return the `constants` by both rules one below the other; empty if there is no b*."""
    rules = {"running mean": made["constants"], "full gradient": made["constants_full_gradient"]}
    known = [table.dropna(subset="eps").assign(rule=rule) for rule, table in rules.items()]
    stars = pd.concat([table for table in known if len(table)] or known[:1], ignore_index=True)
    stars.insert(2, "rule", stars.pop("rule"))
    return stars if stars["b_star"].notna().any() else stars[:0]


def departure(rows):
    """Return where steps exceed perfect scaling by 20 %, a dict, from one optimizer's and ε's rows of `tables.steps`.

    Perfect scaling is the SFO complexity at the smallest b all of whose seeds reached ε after the first check
    (reference). It is exceeded at a b in (above, at_most]: above ends the unbroken row of b, from the reference on,
    that are within 1.2 times it; at_most is the first b beyond, None if there is none. In between lie the b that are
    not decided, be it that a seed missed ε or diverged, or that the bracket of the full gradient is too wide. {} if
    fewer than two b were measured.
    """
    rows = rows.sort_values("batch_size", ignore_index=True)
    whole = (rows["reached"] == rows["critical_seeds"]) & (rows["at_first_check"] == 0)
    if whole.sum() < 2:
        return {}
    rows = rows[whole.idxmax() :].reset_index(drop=True)
    none_lost = rows["diverged"] == 0
    all_reached = rows["reached"] == rows["critical_seeds"]
    least = least_sfo(rows).where(none_lost, 0)
    most = rows["sfo_mean"].where(none_lost & all_reached, np.inf)
    beyond = least > DEPARTED * most[0]
    within = most <= DEPARTED * least[0]
    within[0] = True
    last_within = int(within.cummin().sum()) - 1
    sizes = rows["batch_size"]
    return {
        "reference": int(sizes[0]),
        "above": int(sizes[last_within]),
        "at_most": int(sizes[beyond.idxmax()]) if beyond.any() else None,
    }


def interval(found):
    """Return a `departure` as text, (above, at_most] or > above; None if it is not known."""
    if not found:
        return None
    return f"> {found['above']}" if found["at_most"] is None else f"({found['above']}, {found['at_most']}]"


def noise_scale(rows, optimizer, batchnorm):
    """Return B_simple = C²/‖∇f‖² [McCandless et al. 2018] at the measured steps of an optimizer's sampling runs.

    simple_noise_scale: mean over runs at the last of the steps; _min, _max: the least and the greatest of any step
    and run. rows: of `measurements.read`; those of each run's own b, in this BatchNorm mode, count. {} if none does.
    """
    own = rows[(rows["batchnorm"] == batchnorm) & (rows["batch_size"] == rows["run_batch_size"])]
    own, _ = measurements.of_usual_draws(own, ["optimizer", "batch_size", "steps"])
    own = own[own["optimizer"] == optimizer]
    own = own.dropna(subset="noise_scale")
    if own.empty:
        return {}
    steps = sorted(own["steps"].unique())
    return {
        "simple_noise_scale": float(own["noise_scale"][own["steps"] == steps[-1]].mean()),
        "simple_noise_scale_min": float(own["noise_scale"].min()),
        "simple_noise_scale_max": float(own["noise_scale"].max()),
        "simple_noise_scale_steps": " ".join(map(str, steps)),
    }


def four_ways(made, batchnorm):
    """Return one row per optimizer and ε: its critical batch size by each of the ways, beside one another.

    made: of `tables.measure`. b_star: as `critical_batch_size`, with its edge. departure: `interval`, and
    the b that it refers to. _full: by the full gradient. batchnorm: the mode of the sampling runs' results. Empty if
    none of the ways has a value.
    """
    table = []
    for (optimizer, eps), _ in made["steps"].groupby(["optimizer", "eps"], observed=True):
        row = {"optimizer": optimizer, "eps": eps}
        for suffix, (steps, constants) in RULES.items():
            star = of(made[constants], optimizer, eps).to_dict("records")
            known = star and pd.notna(star[0]["b_star"])
            row[f"b_star{suffix}"] = f"{star[0]['edge']} {star[0]['b_star']}".strip() if known else None
            row[f"range{suffix}"] = star[0]["range"] if known else None
            found = departure(of(made[steps], optimizer, eps))
            row[f"departure{suffix}"] = interval(found)
            row[f"departure_reference{suffix}"] = found.get("reference")
        keys = ("", "_min", "_max", "_steps")
        scale = dict.fromkeys(f"simple_noise_scale{key}" for key in keys)
        table.append(row | scale | noise_scale(made["measurements"], optimizer, batchnorm))
    table = pd.DataFrame(table, dtype=object)
    known = table.drop(columns=["optimizer", "eps"], errors="ignore").notna().any(axis=None)
    return table if known else table[:0]


def of(table, optimizer, eps):
    """Return the rows of one optimizer and ε."""
    return table[(table["optimizer"] == optimizer) & (table["eps"] == eps)]
