"""Sentences, as in evidence.py, on how many steps ε takes and on how well settings generalize."""

import pandas as pd

from report.budget_plots import rows_of
from report.words import each, of_seeds, steps_of


def reached(made):
    """At which b the smallest ε was reached, and b* where there is one."""
    steps = made["steps"]
    if steps.empty or steps["batch_size"].nunique() < 2:
        return None
    eps, parts = steps["eps"].min(), []
    for name, rows in steps[steps["eps"] == eps].groupby("optimizer", observed=True, sort=False):
        there = rows[rows["reached"] == rows["critical_seeds"]]
        found = ", ".join(f"{b:,}" for b in there["batch_size"])
        parts.append(f"{name.upper()} at {len(there)} of {len(rows)} b" + f" ({found})" * bool(found))
    seeds = sorted(steps["critical_seeds"].unique())
    n, most = "–".join(map(str, sorted({seeds[0], seeds[-1]}))), (steps["checked_max"] * steps["batch_size"]).max()
    return (
        f"The running mean of ‖g_t‖ comes to ε = {eps:g} (n = {n} each, at most {most:,.0f} gradients) with "
        f"{'; '.join(parts)}.{stars(made, eps)}"
    )


def stars(made, eps):
    """What b* there are at this ε, and whether they lie inside the grid."""
    table = made["critical_batch_size"]
    if table.empty:
        return " There is no b*."
    signs = {"": "b* = {}", "<=": "b* ≤ {}", ">=": "b* ≥ {}", "?": "b* near {}, open on both sides"}
    table = table[table["b_star"].notna() & (table["eps"] == eps)]
    edges = table["edge"].fillna("")
    said = [signs[edge].format(b) for edge, b in zip(edges, table["b_star"].map("{:,.0f}".format), strict=True)]
    text = each(table.assign(said=said), lambda row: f"{row['said']} ({row['rule']})")
    return f" {text}." if text else " There is no b*."


def critical(made):
    """Where ε is reached, b*, and the two ways to C²."""
    return " ".join(filter(None, (reached(made), solved(made)))) or None


def solved(made):
    """The C² solved from b*, a bound where b* is one, beside the measured."""
    table = rows_of(made["c_squared"], "solved_over_direct")
    if table.empty:
        return None
    parts, limits = [], {"b* <=": "at most ", "b* >=": "at least ", "b* ?": "open on both sides, "}
    for name, rows in table.groupby("optimizer", observed=True, sort=False):
        star, ratio = rows["c_squared_from"].iloc[0], rows["solved_over_direct"]
        limit = next((text for start, text in limits.items() if star.startswith(start)), "")
        parts.append(f"{name.upper()} {limit}{ratio.min():.2g} to {ratio.max():.2g}")
    return f"C² solved from b* is so many times the measured, over steps {steps_of(table)}: {', '.join(parts)}."


def both_rules(made):
    """The steps to ε by the full gradient beside those by the running mean, for the same runs."""
    full = made["steps_full_gradient"]
    if full.empty:
        return None
    both = full.merge(made["steps"], on=["optimizer", "eps", "batch_size"], suffixes=("", "_running"))
    parts = []
    for (b, eps), rows in both.groupby(["batch_size", "eps"]):
        said = each(rows, lambda row: f"{bracket(row)} and {running(row)}")
        parts.append(f"b = {b:,}, ε = {eps:g}: {said}")
    return (
        f"Updates to ε by ‖∇f‖, between the two at the first measured crossing, and by the running mean "
        f"({of_seeds(both['critical_seeds'].max())}): {'; '.join(parts)}."
    )


def bracket(row):
    """The first step with ‖∇f‖ ≤ ε of a row of `steps_full_gradient`, as text."""
    if row["reached"] < row["critical_seeds"]:
        return f"> {row['checked_mean']:,.0f}"
    return "none" if row["steps_max"] == 0 else f"{row['steps_min']:,.0f}–{row['steps_max']:,.0f}"


def running(row):
    """The steps of the same row by the running mean, as text."""
    all_reached = row["reached_running"] == row["critical_seeds_running"]
    return f"{'' if all_reached else '> '}{row['steps_mean_running']:,.0f}"


def settings(made):
    """Return the sentences of the comparison of all settings. made: {name: DataFrame} of `comparisons.measure`."""
    controls = controlled(made["comparison"])
    titled = [f"**Injected noise.** {controls[0]}", *controls[1:]] if controls else []
    return titled + ranked(made["comparison_correlations"])


def controlled(points):
    """A sentence for each setting with injected noise beside the same without, and beside the other b."""
    found = []
    for row in points[points["injected_noise"] > 0].to_dict("records"):
        same = points[(points["length"] == row["length"]) & (points["injected_noise"] == 0)]
        for key in ("optimizer", "nu", "lr", "beta", "precision"):
            same = same[(same[key] == row[key]) | (same[key].isna() & pd.isna(row[key]))]
        said = [f"b = {row['batch_size']:,} and isotropic noise of norm {row['injected_noise']:g}: {outcome(row)}"]
        same = same.sort_values("batch_size", ascending=False)
        said += [f"b = {other['batch_size']:,}: {outcome(other)}" for other in same.to_dict("records")]
        ratio = same["updates"].max() / row["updates"]
        caution = f" They differ {ratio:.2g}-fold in updates, not in noise alone." if ratio > 1 else ""
        found.append(f"Test accuracy, {row['optimizer'].upper()}, {row['length']}: {'; '.join(said)}.{caution}")
    return found


def outcome(row):
    """Accuracy, updates and δ of a row of the comparison, as text."""
    low, mean, high = (row[f"accuracy_{of}"] for of in ("min", "mean", "max"))
    n = f"n = {row['normal_seeds'] - row['normal_diverged']:g}"
    band = f"{low:.2f} to {high:.2f}, " if high > low else ""
    delta = f", δ {row['delta_mean']:.3g}" if row["delta_step"] == row["updates"] else ""
    return f"{mean:.2f} % ({band}{n}; {row['updates']:,.0f} updates{delta})"


def ranked(correlations):
    """Spearman's ρ of accuracy with δ and with updates, over all settings that may be ranked with one another."""
    if correlations.empty:
        return []
    rows = correlations[correlations["y"] == "accuracy"]
    rows = rows[((rows["x"] == "delta") & (rows["measured_at"] == "end")) | (rows["x"] == "updates")]
    rows = rows.sort_values("points", kind="stable").drop_duplicates(["equal", "precision", "x"], keep="last")
    said, names = [], {"delta": "δ", "updates": "updates"}
    for equal, part in rows.groupby("equal", sort=False):
        rho = [f"{r['spearman']:.2g} with {names[r['x']]} ({r['points']} settings)" for r in part.to_dict("records")]
        said.append(f"at equal {equal}: {', '.join(rho)}")
    return [f"Spearman's ρ of test accuracy, without p as points are not independent: {'; '.join(said)}."] * bool(said)
