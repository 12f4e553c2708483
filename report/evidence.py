"""What the tables of a group say, in sentences: each with its n and its spread, none beyond the data.

A sentence is made from the tables alone, as report.md and the CSV files hold them, and is left out where they say
nothing. README.md opens with those of results/ that have a title; a test compares the two.
"""

import math

import pandas as pd

from report.budget_plots import last, rows_of, tops
from report.evidence_of_training import both_rules, reached
from report.words import each, short


def sentences(made):
    """Return the sentences of a Group, those with a title first. made: {name: DataFrame} as report.page makes it."""
    titled = [f"**{title}** {said}" for title, say in TITLED.items() if (said := say(made))]
    return titled + [said for say in OTHERS if (said := say(made))]


def spans(table, column, form):
    """Return "SGD … to …, SHB …": the least and the greatest of a column, of each optimizer."""
    found = table.groupby("optimizer", observed=True, sort=False)[column].agg(["min", "max"]).reset_index()
    return each(found, lambda row: f"{form(row['min'])} to {form(row['max'])}")


def where(table):
    """Return "b = 128, step 1,600, n = 1 seed, 64 draws" of rows that agree in it."""
    row = table.iloc[0]
    seeds = f"n = {row['seeds']:g} seed{'s' if row['seeds'] > 1 else ''}"
    draws = f", {row['draws']:g} draws" if "draws" in table else ""
    return f"b = {row['run_batch_size']:g}, step {row['steps']:,g}, {seeds}{draws}"


def composition(made):
    """Of what ω consists: the share of E‖ω‖² that is this mini-batch's noise."""
    table = last(rows_of(made["budget"], "noise_square_mean"))
    if table.empty:
        return None
    share = each(table.assign(share=100 * table["fresh_mean"] / tops(table)), lambda row: f"{row['share']:.3g} %")
    rest = " and the noise injected" if table["injected_mean"].any() else ""
    delta = each(table, lambda row: f"{row['delta_mean']:.3g} ± {1.96 * row['delta_se_mean']:.1g}")
    return (
        f"Noise of the mini-batch in hand makes this share of E‖ω‖² ({where(table)}): {share}. The rest is "
        f"‖μ‖², momentum's memory against the present gradient{rest}. δ measured: {delta}."
    )


def flatness(made):
    """Whether b·V_b is flat in b, as the variance C²/b of the theory needs."""
    table = rows_of(made["direct"], "c_squared_direct_mean")
    if table.empty or table["batch_size"].nunique() < 2:
        return None
    ends = table[table["batch_size"].isin([table["batch_size"].min(), table["batch_size"].max()])]
    pairs = ends.sort_values("batch_size").groupby(["optimizer", "steps"], observed=True)
    ratios = pairs["c_squared_direct_mean"].agg(lambda pair: pair.iloc[1] / pair.iloc[0])
    errors = pairs[["c_squared_direct_mean", "c_squared_direct_se"]].apply(
        lambda pair: math.hypot(*(pair["c_squared_direct_se"] / pair["c_squared_direct_mean"]))
    )
    beyond = int(((ratios - 1).abs() > 1.96 * errors * ratios).sum())
    low, high = ends["batch_size"].min(), ends["batch_size"].max()
    return (
        f"C² from batches of {high:g} is {ratios.min():.3g} to {ratios.max():.3g} times C² from batches of {low:g} at "
        f"the same weights; at {beyond} of {len(ratios)} points of optimizer and step that is more than 1.96 standard "
        f"errors from 1."
    )


def growth(made):
    """How C² changes over training, though the theory has one C² for all of it."""
    table = rows_of(made["c_squared"], "c_squared_direct_mean")
    if table.empty or table["steps"].nunique() < 2:
        return None
    return f"C² measured, over steps {steps_of(table)}: {spans(table, 'c_squared_direct_mean', short)}."


def steps_of(table):
    """Return "0, 50, 1,600"."""
    return ", ".join(f"{step:,}" for step in sorted(table["steps"].unique()))


def solved(made):
    """The C² solved from b* beside the measured."""
    table = rows_of(made["c_squared"], "solved_over_direct")
    if table.empty:
        return None
    ratio = spans(table, "solved_over_direct", "{:.2g}".format)
    return f"C² solved from b* is this many times the measured, over the steps: {ratio}."


def published(made):
    """The paper's C² and K, which it has from b* and not from a measurement, beside the measured."""
    table = rows_of(made["c_squared"], "published_c_squared")
    if table.empty:
        return None
    parts = []
    for name, rows in table.groupby("optimizer", observed=True, sort=False):
        low, high = (short(rows["c_squared_direct_mean"].agg(of)) for of in ("min", "max"))
        ours = low if low == high else f"{low} to {high}"
        row = rows.iloc[0]
        text = f"{name.upper()} measured C² {ours}, the paper's {short(row['published_c_squared'])}"
        if pd.notna(row["published_k"]) and pd.notna(row["k"]):
            text += f"; K measured {row['k']:.3g} at step {row['k_step']:,.0f}, the paper's {row['published_k']:.3g}"
        parts.append(text)
    b = table["run_batch_size"].iloc[0]
    return f"Beside the published constants (b = {b:g}, steps {steps_of(table)}): {'; '.join(parts)}."


def bounds(made):
    """How far the theory's δ lies above the measured."""
    table = last(rows_of(made["delta_bound"], "bound_over_measured"))
    if table.empty:
        return None
    ratio = each(table, lambda row: f"{row['bound_over_measured']:.3g}")
    closing = ""
    if "sgd" in set(table["optimizer"]):
        closing = " SGD's is 1 by construction at the step where its C² is greatest."
    return (
        f"With the greatest C² and K measured it is this many times the measured δ ({where(table)}): {ratio}.{closing}"
    )


def normality(made):
    """Whether mini-batch noise is Gaussian, and in how many directions it lies."""
    table = last(rows_of(made["shape"], "rejected_mean"))
    if table.empty:
        return None
    rejected = each(table, lambda row: f"{100 * row['rejected_mean']:.2g} %")
    rank = each(table, lambda row: short(row["effective_rank_mean"]))
    entries = table["entries_mean"].iloc[0]
    return (
        f"Across draws, D'Agostino's test at 5 % rejects this share of the coordinates ({where(table)}; a normal "
        f"vector: 5.7 % at 64 draws): {rejected}. The noise has an effective rank of {rank} in {entries:,.0f} "
        f"dimensions."
    )


def excess(made):
    """Whether the noise of a step smooths: what it adds to the loss, beside the controls, the prediction and δ."""
    table = last(rows_of(made["smoothing"], "real_mean"))
    if table.empty:
        return None
    kinds = {"a Gaussian of the same covariance": "gaussian", "isotropic noise of the same length": "isotropic"}
    kinds |= {"tr(HΣ) predicts": "predicted"}
    controls = "; ".join(f"{name}: {each(table, with_error(kind))}" for name, kind in kinds.items())
    text = (
        f"Averaged over the mini-batch noise of one step, the loss of training images is higher than where the step's "
        f"mean leads by ({where(table)}): {each(table, with_error('real'))}. {controls[0].upper()}{controls[1:]}."
    )
    known = made["budget"].merge(table[["optimizer", "run_batch_size", "batchnorm", "steps"]])
    if len(known) == len(table) > 1 and table["predicted_mean"].gt(0).all():
        factors = [values.max() / values.min() for values in (known["delta_mean"], table["predicted_mean"])]
        text += f" Between them δ differs by a factor of {factors[0]:.3g}, tr(HΣ) η²/2 by {factors[1]:.3g}."
    return text


def with_error(key):
    """Return a function for `each`: the mean of a column, ± its 95 % error."""
    return lambda row: f"{row[f'{key}_mean']:.2g} ± {1.96 * row[f'{key}_se']:.1g}"


def displacement(made):
    """What momentum's memory does to the loss, which is a displacement and no smoothing."""
    table = last(rows_of(made["smoothing"], "displacement_mean"))
    table = table[table["displacement_mean"] != 0] if len(table) else table
    if table.empty:
        return None
    moved = each(table, lambda row: f"{row['displacement_mean']:.2g}")
    return f"Momentum's memory moves the mean of the step, and the loss there by ({where(table)}): {moved}."


def curvature(made):
    """How sharp the loss is, beside the largest curvature at which full-batch steps are stable."""
    table = last(rows_of(made["sharpness"], "lambda_max_mean"))
    if table.empty:
        return None
    sharp = each(table, lambda row: f"{short(row['lambda_max_mean'])} of {short(row['stable_up_to'])}")
    batch = each(table, lambda row: f"{row['batch_sharpness_mean']:.3g} ± {1.96 * row['batch_sharpness_se']:.1g}")
    return f"λ_max, and up to where full-batch steps are stable ({where(table)}): {sharp}. Batch sharpness: {batch}."


TITLED = {
    "What ω is.": composition,
    "Does it smooth?": excess,
    "The theory's constants.": published,
    "The theory's δ.": bounds,
    "Critical batch sizes.": reached,
}
OTHERS = (displacement, curvature, both_rules, growth, flatness, solved, normality)
