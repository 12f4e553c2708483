"""Sentences, as in evidence.py, on how many steps ε takes, what changes with b, and how well settings generalize."""

import numpy as np
import pandas as pd

from report import theory
from report.budget_plots import of_one_mode, rows_of
from report.words import each, of_seeds, span_of_seeds, steps_of, with_error


def critical(made):
    """Where the smallest ε is reached, its b* and the theory's, and the same of the smallest ε that all b reach."""
    steps = made["steps"]
    if steps.empty or steps["batch_size"].nunique() < 2:
        return None
    found = (reached(steps, made["critical_batch_size"]), reached_by_all(steps, made))
    return " ".join(filter(None, found))


def reached(steps, stars):
    """At which b the smallest ε was reached, its b* where there is one, and the theory's."""
    eps, parts = steps["eps"].min(), []
    stars = stars[stars["eps"] == eps]
    for name, rows in steps[steps["eps"] == eps].groupby("optimizer", observed=True, sort=False):
        there = rows[rows["reached"] == rows["critical_seeds"]]
        found = ", ".join(f"{b:,}" for b in there["batch_size"])
        own = [star(row) for row in running_mean(stars).to_dict("records") if row["optimizer"] == name]
        said = f"{name.upper()} at {len(there)} of {len(rows)} b" + f" ({found})" * bool(found)
        parts.append(", ".join([said, *filter(None, own)]))
    seeds = sorted(steps["critical_seeds"].unique())
    n, most = "–".join(map(str, sorted({seeds[0], seeds[-1]}))), (steps["checked_max"] * steps["batch_size"]).max()
    parts += foretold(running_mean(stars))
    return (
        f"The running mean of ‖g_t‖ comes to ε = {eps:g} (n = {n} each, at most {most:,.0f} gradients) with "
        f"{'; '.join(parts)}.{by_full_gradient(stars)}"
    )


def running_mean(stars):
    """The rows by the paper's rule."""
    return stars[stars["rule"] == "running mean"]


def star(row):
    """Return "b* ≤ 16" of a row of `critical_batch_size`; None if it has no b*."""
    signs = {"": "b* = {}", "<=": "b* ≤ {}", ">=": "b* ≥ {}", "?": "b* near {}, open on both sides"}
    edge = "" if pd.isna(row["edge"]) else row["edge"]
    return None if pd.isna(row["b_star"]) else signs[edge].format(f"{row['b_star']:,.0f}")


def by_full_gradient(stars):
    """The b* by the norm of the full gradient; "" if there is none."""
    found = stars[(stars["rule"] == "full gradient") & stars["b_star"].notna()]
    return f" By ‖∇f‖: {each(found, star)}." if len(found) else ""


def foretold(stars):
    """The b* of the theory, by the C² that is solved from b* at another ε; one entry for each such ε."""
    stars = stars[stars["bound"].notna() & (stars["reference_eps"] != stars["eps"])]
    return [
        f"the theory's b*, from that at ε = {eps:g}: "
        + each(rows, lambda row: f"{limit(row['c_squared_from'])}{row['bound']:,.0f}")
        for eps, rows in stars.groupby("reference_eps")
    ]


def limit(star):
    """What is to be said before a number that is solved from this b*, "b* <= 16", for the bound that it is."""
    words = {"b* <=": "at most ", "b* >=": "at least ", "b* ?": "open on both sides, "}
    return next((text for start, text in words.items() if star.startswith(start)), "")


def reached_by_all(steps, made):
    """The smallest ε that was reached at every b, if that is not the smallest ε, and its b*."""
    whole = (steps["reached"] == steps["critical_seeds"]).groupby(steps["eps"]).all()
    if whole.iloc[0] or not whole.any():
        return None
    eps, stars, budget = whole.index[whole][0], made["critical_batch_size"], made["budget"]
    stars = stars[(stars["eps"] == eps) & stars["b_star"].notna()]
    own = running_mean(stars)
    said = f"At every b it comes to ε = {eps:g}{': ' * bool(len(own))}{each(own, star)}.{by_full_gradient(stars)}"
    norm = np.nan if budget.empty else budget["full_gradient_norm_max"][budget["steps"] == 0].max()
    below = f" That ε is above ‖∇f‖ = {norm:.3g} before the first update: only the noise in g_t has to fall to it."
    once = " At b* the first mini-batch is enough, before any update."
    return said + below * bool(norm <= eps) + once * at_once(own, steps)


def at_once(stars, steps):
    """Whether the first mini-batch is enough at every b* of these rows."""
    took = stars.merge(steps, left_on=["optimizer", "eps", "b_star"], right_on=["optimizer", "eps", "batch_size"])
    return bool(len(took) and (took["steps_max"] == 1).all())


def solved(made):
    """The C² solved from b*, a bound where b* is one, beside the measured: the least and the greatest of its steps."""
    table = rows_of(made["c_squared"], "solved_over_direct")
    if table.empty:
        return None
    stars = running_mean(made["critical_batch_size"])
    stars = stars[(stars["eps"] == stars["reference_eps"]) & stars["b_star"].notna()]
    parts = []
    for name, rows in table.groupby("optimizer", observed=True, sort=False):
        own, ratio = stars[stars["optimizer"] == name], rows["solved_over_direct"]
        once = ", the first mini-batch" * at_once(own, made["steps"])
        source = "".join(f" ({star(row)} at ε = {row['eps']:g}{once})" for row in own.to_dict("records"))
        bound = limit(rows["c_squared_from"].iloc[0])
        parts.append(f"{name.upper()}{source} {bound}{ratio.min():.2g} to {ratio.max():.2g}")
    b, n = table["run_batch_size"].iloc[0], of_seeds(table["seeds"].max())
    return (
        f"Solved from b*, C² is so many times the measured (b = {b:g}, {n}, least and greatest over steps "
        f"{steps_of(table)}): {', '.join(parts)}."
    )


def over_sizes(made):
    """How C² and δ change with the b that a run trains with, at each step that an optimizer has at several b."""
    table = made["budget"]
    if table.empty:
        return None
    table = of_one_mode(table[table["steps"] > 0])
    sizes = table.groupby(["steps", "optimizer"], observed=True)["run_batch_size"].transform("nunique")
    rows, said = table[sizes > 1], []
    for step, part in rows.groupby("steps"):
        c_squared, delta = (of_sizes(part, column) for column in ("c_squared_direct", "delta"))
        said.append(f"C² after {step:,} updates: {c_squared}. δ there: {delta}.")
    return f"Measured with other b ({span_of_seeds(rows['seeds'])}; b in brackets): {' '.join(said)}" if said else None


def of_sizes(rows, column):
    """Return "SGD 234 ± 14 (32), 625 ± 24 (128); SHB …" of a column of the budget, with the error of its draws."""
    said = []
    for name, part in rows.groupby("optimizer", observed=True, sort=False):
        errors = part[f"{column}_se_mean"] / part["seeds"] ** 0.5
        values = zip(part[f"{column}_mean"], errors, part["run_batch_size"], strict=True)
        said.append(f"{name.upper()} " + ", ".join(f"{with_error(value, se)} ({b:g})" for value, se, b in values))
    return "; ".join(said)


def both_rules(made):
    """The steps to ε by the full gradient beside those by the running mean, of all seeds that have them."""
    full = made["steps_full_gradient"]
    if full.empty:
        return None
    both = full.merge(made["steps"], on=["optimizer", "eps", "batch_size"], suffixes=("", "_running"))
    parts = []
    for (b, eps), rows in both.groupby(["batch_size", "eps"]):
        said = each(rows, lambda row: f"{bracket(row)} and {running(row)}")
        parts.append(f"b = {b:,}, ε = {eps:g}: {said}")
    seeds = of_seeds(both["critical_seeds"].max()), of_seeds(both["critical_seeds_running"].max())
    return (
        f"Updates to ε by ‖∇f‖, between the two at the first measured crossing ({seeds[0]}), and by the running mean "
        f"({seeds[1]}): {'; '.join(parts)}."
    )


def bracket(row):
    """The first step with ‖∇f‖ ≤ ε of a row of `steps_full_gradient`, as text."""
    if row["reached"] < row["critical_seeds"]:
        return f"> {row['checked_mean']:,.0f}"
    return "none" if row["steps_max"] == 0 else f"{row['steps_min']:,.0f}–{row['steps_max']:,.0f}"


def running(row):
    """The steps of the same row by the running mean, as text: the least and the greatest of its seeds."""
    low, high = (f"{row[f'steps_{of}_running']:,.0f}" for of in ("min", "max"))
    if row["reached_running"] < row["critical_seeds_running"]:
        return f"{'≥' if row['reached_running'] else '>'} {low}"
    return low if low == high else f"{low} to {high}"


def settings(made):
    """Return the sentences of the comparison of all settings. made: {name: DataFrame} of `comparisons.measure`."""
    controls = controlled(made["comparison"])
    titled = [f"**Injected noise.** {controls[0]}", *controls[1:]] if controls else []
    return ranked(made) + titled + beside(made["comparison"])


def beside(points):
    """A sentence of the optimizers' accuracies beside one another, where each has one setting of a b and length."""
    points = points[(points["injected_noise"] == 0) & (points["normal_diverged"] == 0)].dropna(subset="accuracy_mean")
    said, seeds = [], set()
    for (length, b), rows in theory.in_order(points).groupby(["length", "batch_size"]):
        if len(rows) > 1 and rows["optimizer"].is_unique:
            seeds |= set(rows["normal_seeds"])
            said.append(f"{length}, b = {b:,}: {each(rows, accuracy)}")
    return [f"Test accuracy in per cent ({span_of_seeds(seeds)}): {'; '.join(said)}."] if said else []


def accuracy(row):
    """Return "13.99 (12.02 to 15.95)" of a row of the comparison; the mean alone where all seeds have the same."""
    low, mean, high = (row[f"accuracy_{of}"] for of in ("min", "mean", "max"))
    return f"{mean:.2f}" + f" ({low:.2f} to {high:.2f})" * (high > low)


def controlled(points):
    """A sentence for each setting with injected noise beside the same without, and beside the b of the nearest δ."""
    found = []
    for row in points[points["injected_noise"] > 0].to_dict("records"):
        same = points[(points["length"] == row["length"]) & (points["injected_noise"] == 0)]
        for key in ("optimizer", "nu", "lr", "beta", "precision"):
            same = same[(same[key] == row[key]) | (same[key].isna() & pd.isna(row[key]))]
        said = [f"b = {row['batch_size']:,} and isotropic noise of norm {row['injected_noise']:g}: {outcome(row)}"]
        other_b = same["batch_size"] != row["batch_size"]
        away = (same["delta_mean"] - row["delta_mean"]).abs().where(other_b & (same["delta_step"] == same["updates"]))
        near = away == away.min() if away.notna().any() else other_b
        same = same[near | ~other_b].sort_values("batch_size", ascending=False)
        said += [f"b = {other['batch_size']:,}: {outcome(other)}" for other in same.to_dict("records")]
        longest = same.loc[same["updates"].idxmax()] if len(same) else row
        ratio, b = longest["updates"] / row["updates"], longest["batch_size"]
        caution = f"; b = {b:,} has {ratio:.2g} times the updates of the first" if ratio > 1 else ""
        found.append(f"Test accuracy, {row['optimizer'].upper()}, {row['length']}: {'; '.join(said)}{caution}.")
    return found


def outcome(row):
    """Accuracy, updates and δ of a row of the comparison, as text."""
    low, mean, high = (row[f"accuracy_{of}"] for of in ("min", "mean", "max"))
    n = f"n = {row['normal_seeds'] - row['normal_diverged']:g}"
    band = f"{low:.2f} to {high:.2f}, " if high > low else ""
    delta = f", δ {row['delta_mean']:.3g}" if row["delta_step"] == row["updates"] else ""
    return f"{mean:.2f} % ({band}{n}; {row['updates']:,.0f} updates{delta})"


def ranked(made):
    """Spearman's ρ of accuracy with δ, and with updates or b over the same settings: those that may be ranked."""
    correlations, settled = made["comparison_correlations"], made["comparison"].dropna(subset="accuracy_mean")
    if correlations.empty:
        return []
    rows = correlations[correlations["y"] == "accuracy"]
    with_delta = rows[(rows["x"] == "delta") & (rows["measured_at"] == "end")]
    said = []
    for (equal, precision), part in with_delta.groupby(["equal", "precision"], sort=False):
        others = rows[(rows["equal"] == equal) & (rows["precision"] == precision)]
        widest = part[part["optimizer"] == part["optimizer"].iloc[-1]]  # "all", or the only one
        said.append(f"{equal} each, {'; '.join(over(row, others) for row in widest.to_dict('records'))}")
    n = span_of_seeds(settled["normal_seeds"])
    rule = f"Spearman's ρ of test accuracy ({n} a setting; no p, as points are not independent)"
    return [f"**Accuracy and δ.** {rule}: {'; '.join(said)}."] * bool(said)


def over(delta, others):
    """Return ρ with δ of a row of the correlations, as text, and with updates over the same settings.

    Where these have equal updates, it is with b: at equal epochs b ranks them as updates do, the other way round. The
    sets that are ranked lie within one another, so that one of as many settings is the same.
    """
    same = others[(others["optimizer"] == delta["optimizer"]) & (others["points"] == delta["points"])]
    found = same.set_index("x")["spearman"]
    named = [(x, name) for x, name in (("updates", "updates"), ("batch_size", "b")) if x in found]
    rho = [f"{delta['spearman']:.2g} with δ at the end"] + [f"{found[x]:.2g} with {name}" for x, name in named[:1]]
    which = f"{delta['points']} settings"
    if delta["injected_noise"] == "none" and "some" in set(others["injected_noise"]):
        which = f"the {delta['points']} without injected noise"
    return f"over {which} {', '.join(rho)}"
