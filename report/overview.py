"""The theory beside the measurement, an optimizer at a time: C² both ways, K, δ, and what the noise does to the loss.

One table and one figure, made from the tables of a Group: report/budget.py and report/landscapes.py say where each
number comes from. All is of the b that was measured most often, in training-mode BatchNorm where that was measured.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from report.axes import COLORS, MARK, mark
from report.budget_plots import last, rows_of
from report.landscape_plots import KINDS

# Which way a C² that follows from a b* at the edge of the grid is bounded: C² grows with b*.
EDGES = {"b* <=": r"$\downarrow$", "b* >=": r"$\uparrow$", "b* ?": r"$\updownarrow$"}
SMOOTHED = (*KINDS, "predicted")
THEIRS = ("c_squared", "c_squared_from", "solved_over_direct", "published_c_squared", "k", "published_k")


def overview(made):
    """Return a row per optimizer. made: {name: DataFrame} of a Group, with the tables of the budget.

    steps: the last measured by all; delta, delta_bound and c_squared_direct are of it, as are the smoothing columns
    where smoothing_steps says nothing else. c_squared_least, _most: over all steps. c_squared, c_squared_from: solved
    from b*. Empty where no noise was measured.
    """
    every, table = (
        rows_of(made["c_squared"], "c_squared_direct_mean"),
        last(rows_of(made["delta_bound"], "delta_mean")),
    )
    if every.empty or table.empty:
        return pd.DataFrame()
    at = ["optimizer", "run_batch_size", "batchnorm", "steps"]
    table = table[[*at, "seeds", "delta_mean", "delta_se", "delta_bound", "bound_over_measured"]]
    table = table.merge(every[[*at, "c_squared_direct_mean", "c_squared_direct_se", *THEIRS]], how="left", on=at)
    span = every.groupby("optimizer", observed=True)["c_squared_direct_mean"].agg(["min", "max"])
    table = table.merge(span, how="left", on="optimizer")
    smoothed = last(rows_of(made["smoothing"], "real_mean"))
    if len(smoothed):
        smoothed = smoothed.assign(smoothing_steps=smoothed["steps"])
        columns = [f"{kind}_{of}" for kind in SMOOTHED for of in ("mean", "se")]
        table = table.merge(smoothed[["optimizer", "smoothing_steps", *columns]], how="left", on="optimizer")
    names = {f"{stem}_mean": stem for stem in ("delta", "c_squared_direct", *SMOOTHED)}
    table = table.astype(dict.fromkeys(("c_squared", "solved_over_direct", "published_c_squared"), float))
    return table.rename(columns=names | {"min": "c_squared_least", "max": "c_squared_most"})


def figure(table):
    """Draw the three comparisons side by side; None where there is no table."""
    if table.empty:
        return None
    smoothed = "real" in table and table["real"].notna().any()
    fig, axes = plt.subplots(1, 2 + smoothed, figsize=(3.6 * (2 + smoothed), 3.6))
    for ax in axes:
        ax.set_xticks(range(len(table)), table["optimizer"].str.upper())
        ax.set(yscale="log", xlim=(-0.6, len(table) - 0.4))
        ax.margins(y=0.12)
        step = table["steps" if ax in axes[:2] else "smoothing_steps"].max()
        ax.set_title(f"b = {table['run_batch_size'].iloc[0]:g}, step {step:,.0f}")
    variance(axes[0], table)
    smoothing(axes[1], table)
    if smoothed:
        excess(axes[2], table)
    return fig


def variance(ax, table):
    """C²: measured, with the span over training; solved from b*; the paper's."""
    x = np.arange(len(table))
    ax.vlines(x, table["c_squared_least"], table["c_squared_most"], color=COLORS[0], lw=6, alpha=0.4)
    ax.plot(x, table["c_squared_direct"], "o", color=COLORS[0], label="C² measured; wide bar: all measured steps")
    for at, row in zip(x, table.to_dict("records"), strict=True):
        if pd.notna(row["c_squared"]):
            edge = next((arrow for text, arrow in EDGES.items() if str(row["c_squared_from"]).startswith(text)), "D")
            look = {"marker": edge, "ms": 6 if edge == "D" else 12, "color": COLORS[1], "linestyle": ""}
            ax.plot(at + 0.2, row["c_squared"], **look, label="C² solved from b*" + ", a bound" * (edge != "D"))
    if table["published_c_squared"].notna().any():
        mark(ax, x - 0.2, table["published_c_squared"], "C² published", marker="x", ms=7, color="k")
    ax.set_ylabel("C² (gradient norm squared)")


def smoothing(ax, table):
    """δ: measured, and by the formula with the measured C² and K."""
    x = np.arange(len(table))
    error = 1.96 * table["delta_se"]
    ax.errorbar(x, table["delta"], error, fmt="o", color=COLORS[0], capsize=3, label="δ measured")
    if table["delta_bound"].notna().any():
        limit(ax, x + 0.25, table["delta_bound"], color=COLORS[1], label="the formula's δ, an upper bound")
    ax.set_ylabel("δ = η E‖ω‖ (parameter distance)")


def limit(ax, x, y, **look):
    """Draw upper limits: a bar at the value, and an arrow down from it."""
    ax.errorbar(x, y, y / 3, uplims=True, marker="_", ms=9, lw=1.2, linestyle="", capsize=3, **look)


def excess(ax, table):
    """What one step's noise adds to the loss on average; where its interval reaches to zero, an upper bound."""
    places = dict(zip(KINDS, (-0.2, 0, 0.2), strict=True))
    for kind, look in KINDS.items():
        error = 1.96 * table[f"{kind}_se"]
        open_below = table[kind] - error <= 0
        x = np.arange(len(table)) + places[kind]
        known = table[kind].where(~open_below)
        ax.errorbar(x, known, error, **look, linestyle="", capsize=3)
        if open_below.any():
            limit(ax, x, (table[kind] + error).where(open_below), color=look["color"])
    x = np.arange(len(table))
    ax.hlines(table["predicted"], x - 0.3, x + 0.1, color="k", lw=1.5, zorder=MARK - 4, label="η² tr(HΣ)/2")
    ax.set_ylabel("excess loss (nats)")
