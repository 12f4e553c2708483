"""What the tables of a group say, in sentences: each with its n and its spread, none beyond the data.

A sentence is made from the tables alone, as report.md and the CSV files hold them, and is left out where they say
nothing. README.md opens with some that have a title, up to the first full stop (scripts/study.py).
"""

import math

import numpy as np
import pandas as pd

from report.budget_plots import last, rows_of, tops
from report.evidence_of_training import both_rules, critical, over_sizes, solved
from report.words import each, of_seeds, short, steps_of, with_error


def sentences(made):
    """Return the sentences of a Group, those with a title first. made: {name: DataFrame} as report.page makes it."""
    titled = [f"**{title}** {said}" for title, say in TITLED.items() if (said := say(made))]
    return titled + [said for say in OTHERS if (said := say(made))]


def spans(table, column, form):
    """Return "SGD … to …, SHB …": the least and the greatest of a column, of each optimizer."""
    found = table.groupby("optimizer", observed=True, sort=False)[column].agg(["min", "max"]).reset_index()
    return each(found, lambda row: " to ".join(dict.fromkeys([form(row["min"]), form(row["max"])])))


def where(table):
    """Return "b = 128, step 1,600, n = 1 seed, 64 draws" of rows that agree in it."""
    row = table.iloc[0]
    draws = f", {row['draws']:g} draws" if "draws" in table else ""
    return f"b = {row['run_batch_size']:g}, step {row['steps']:,g}, {of_seeds(row['seeds'])}{draws}"


def composition(made):
    """Of what ω consists: the share of E‖ω‖² that is this mini-batch's noise, and δ."""
    every = rows_of(made["budget"], "noise_square_mean")
    table = last(every)
    if table.empty:
        return None
    others = every[(every["steps"] != table["steps"].iloc[0]) & (every["steps"] > 0)]
    text = f"Noise of the mini-batch in hand makes this share of E‖ω‖² ({where(table)}): {each(table, share)}."
    if len(others):
        text += (
            f" At steps {steps_of(others)}: {spans(others.assign(share=shares(others)), 'share', '{:.0f} %'.format)}."
        )
    rest = " and the noise injected" if table["injected_mean"].any() else ""
    delta = each(table, lambda row: with_error(row["delta_mean"], row["delta_se_mean"] / math.sqrt(row["seeds"])))
    text += f" The rest is ‖μ‖²{rest}: the memory less the part of ∇f that it stands for.{kept(table)}"
    return f"{text} δ measured: {delta}."


def kept(table):
    """What share of E‖ω‖² noise of earlier mini-batches would be; "" if no optimizer has a memory."""
    table = table[table["memory_mean"] > 0]
    if table.empty:
        return ""
    part = each(table, lambda row: f"{100 * row['memory_noise_frozen_mean'] / tops(row):.2g} %")
    return f" Noise of earlier mini-batches, had the weights not moved, would make this share: {part}."


def shares(table):
    """Return the share of fresh noise in percent, of a table or of one row."""
    return 100 * table["fresh_mean"] / tops(table)


def share(row):
    """Return the same of one row, with the error that it has from the variance, as text; without memory it is all."""
    part = shares(row)
    if part == 100:
        return "100 % by definition"
    relative = row["c_squared_direct_se_mean"] / row["c_squared_direct_mean"] / math.sqrt(row["seeds"])
    return with_error(part, part * (1 - part / 100) * relative) + " %"


def flatness(made):
    """Whether b·V_b is flat in b, as the variance C²/b of the theory needs."""
    table = rows_of(made["direct"], "c_squared_direct_mean")
    if table.empty or table["batch_size"].nunique() < 2:
        return None
    ends = table[table["batch_size"].isin([table["batch_size"].min(), table["batch_size"].max()])]
    pairs = ends.sort_values("batch_size").groupby(["optimizer", "steps"], observed=True)
    values = ["c_squared_direct_mean", "c_squared_direct_se"]
    found = pairs[values].agg(list).map(tuple).drop_duplicates()  # before the first update all have the same weights
    ratios = found[values[0]].map(lambda pair: pair[1] / pair[0])
    errors = found.apply(lambda row: math.hypot(*(se / mean for mean, se in zip(*row, strict=True))), axis=1)
    beyond = int(((ratios - 1).abs() > 1.96 * errors * ratios).sum())
    low, high = ends["batch_size"].min(), ends["batch_size"].max()
    return (
        f"C² from batches of {high:g} is {ratios.min():.3g} to {ratios.max():.3g} times C² from batches of {low:g} at "
        f"the same weights; at {beyond} of {len(ratios)} points of optimizer and step (once where they share weights) "
        f"that is more than 1.96 standard errors from 1."
    )


def growth(made):
    """How C² changes over training, though the theory has one C² for all of it."""
    table = rows_of(made["c_squared"], "c_squared_direct_mean")
    if table.empty or table["steps"].nunique() < 2:
        return None
    at, later = f"C² measured at b = {table['run_batch_size'].iloc[0]:g}", table[table["steps"] > 0]
    if len(later) < len(table):
        at += f", before the first update {spans(table[table['steps'] == 0], 'c_squared_direct_mean', short)}"
    return f"{at}; over steps {steps_of(later)}: {spans(later, 'c_squared_direct_mean', short)}."


def published(made):
    """The paper's C² and K, which it has from b* and not from a measurement, beside the measured."""
    table = rows_of(made["c_squared"], "published_c_squared")
    if table.empty:
        return None
    parts = []
    for name, rows in table.groupby("optimizer", observed=True, sort=False):
        errors = zip(rows["c_squared_direct_mean"], rows["c_squared_direct_se"], rows["steps"], strict=True)
        ours = ", ".join(f"{with_error(mean, se)} at step {step:,}" for mean, se, step in errors)
        row = rows.iloc[0]
        text = f"{name.upper()} C² {ours}, the paper's {short(row['published_c_squared'])}"
        if pd.notna(row["published_k"]) and pd.notna(row["k"]):
            text += f"; K at least {row['k']:.3g} (step {row['k_step']:,.0f}), the paper's {row['published_k']:.3g}"
        parts.append(text)
    b, n = table["run_batch_size"].iloc[0], of_seeds(table["seeds"].max())
    return (
        f"Measured beside the published (b = {b:g}, {n}): {'; '.join(parts)}; "
        f"the paper's C² is solved from b*, late in training."
    )


def bounds(made):
    """How far the theory's δ lies above the measured, over the steps."""
    table = rows_of(made["delta_bound"], "bound_over_measured")
    if table.empty:
        return None
    ratio, n = spans(table, "bound_over_measured", "{:.3g}".format), of_seeds(table["seeds"].max())
    closing = ""
    if "sgd" in set(table["optimizer"]):
        closing = " SGD's least is 1 by construction, at the step where its C² is greatest."
    return (
        f"An upper bound, which with the greatest C² and K measured is so many times the measured δ (b = "
        f"{table['run_batch_size'].iloc[0]:g}, {n}, least and greatest over steps "
        f"{steps_of(table)}): {ratio}.{closing}"
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
        f"Across draws of g − ∇f, D'Agostino's test at 5 % rejects this share of the coordinates ({where(table)}; a "
        f"normal vector: 5.7 % at 64 draws): {rejected}. The noise has an effective rank of {rank} in {entries:,.0f} "
        f"dimensions."
    )


def excess(made):
    """Whether the noise of a step smooths: what it adds to the loss, beside the controls, the prediction and δ."""
    every = rows_of(made["smoothing"], "real_mean")
    table = last(every)
    if table.empty:
        return None
    others = every[every["steps"] != table["steps"].iloc[0]]
    earlier = "".join(f" At step {step:,}: {each(rows, known('real'))}." for step, rows in others.groupby("steps"))
    isotropic = each(table, lambda row: f"{row['isotropic_mean']:.2g}")
    images, mode = f"{table['probe_images'].iloc[0]:,.0f} training images", table["batchnorm"].iloc[0]
    at = f"{where(table)}; BatchNorm in {mode} mode"
    return (
        f"The mini-batch noise of one step, without what momentum keeps of it, changes the loss of {images}, on "
        f"average, by ({at}): {each(table, known('real'))}; isotropic noise of the same length by {isotropic}."
        f"{earlier}{beside_delta(made, table)}"
    )


def controls(made):
    """The other control and the prediction, beside the noise of `excess`."""
    table = last(rows_of(made["smoothing"], "real_mean"))
    if table.empty:
        return None
    error = np.hypot(table["real_se"], table["predicted_se"])
    away = table["optimizer"][(table["real_mean"] - table["predicted_mean"]).abs() > 1.96 * error].str.upper()
    apart = f", from which real noise is more than 1.96 standard errors away for {', '.join(away)}" * bool(len(away))
    return (
        f"Gaussian noise of the same covariance changes that loss by ({where(table)}): "
        f"{each(table, known('gaussian'))}. η² tr(HΣ)/2 is {each(table, known('predicted'))}{apart}."
    )


def known(key):
    """Return a function for `each`: a column's mean and its 95 % error."""
    return lambda row: with_error(row[f"{key}_mean"], row[f"{key}_se"])


def beside_delta(made, table):
    """How many times the first optimizer's δ, and its smoothing, are those of each other; "" where not known."""
    both = table.merge(made["budget"], on=["optimizer", "run_batch_size", "batchnorm", "steps"])
    if len(both) < 2 or not table["predicted_mean"].gt(0).all():
        return ""
    first = both.iloc[0]

    def times(row):
        ratio = {key: first[f"{key}_mean"] / row[f"{key}_mean"] for key in ("delta", "predicted", "fluctuation_norm")}
        return f"{ratio['delta']:.3g}, {ratio['predicted']:.2g} and {ratio['fluctuation_norm'] ** 2:.2g}"

    return (
        f" {first['optimizer'].upper()}'s δ, η² tr(HΣ)/2 and squared length of this noise are so many times the "
        f"other's, each at its own weights: {each(both.iloc[1:], times)}."
    )


def displacement(made):
    """What momentum's memory does to the loss, which is a displacement and no smoothing."""
    table = last(rows_of(made["smoothing"], "displacement_mean"))
    table = table[table["displacement_mean"] != 0] if len(table) else table
    if table.empty:
        return None
    moved = each(table, lambda row: f"{row['displacement_mean']:.2g}")
    return (
        f"The mean of a step with momentum leads to a loss above that after a full-gradient step of the same η by "
        f"({where(table)}): {moved}."
    )


def curvature(made):
    """How sharp the loss is, beside the largest curvature at which full-batch steps are stable."""
    table = last(rows_of(made["sharpness"], "lambda_max_mean"))
    if table.empty:
        return None
    sharp = each(table, lambda row: f"{short(row['lambda_max_mean'])} of {short(row['stable_up_to'])}")
    batch = each(table, lambda row: f"{known('batch_sharpness')(row)} of {short(row['batch_sharpness_level'])}")
    at = f"{where(table)}, {table['probe_images'].iloc[0]:,.0f} training images"
    return (
        f"λ_max, and up to where full-batch steps are stable ({at}): {sharp}. Batch sharpness, and where it is said "
        f"to settle: {batch}."
    )


TITLED = {
    "What ω is.": composition,
    "Does it smooth?": excess,
    "The theory's constants.": published,
    "The theory's δ.": bounds,
    "Critical batch sizes.": critical,
    "Two ways to C².": solved,
}
OTHERS = (controls, displacement, curvature, both_rules, growth, flatness, over_sizes, normality)
