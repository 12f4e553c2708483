"""The figures of the noise budget: each function takes tables of `budget` and returns a Figure, None for none.

A panel is of one optimizer and BatchNorm mode, all of one batch size of training. Steps are evenly spaced.
"""

import matplotlib.pyplot as plt

from report.axes import MARK, by_optimizer, looks, mark, nth_look, size_axis
from report.plots import DELTA_LABEL

WIDTH = 0.7  # of a bar, of the distance between steps
# The parts of E‖ω‖²: grey, edge and hatch tell them apart without colour.
FRESH = {"color": "#56B4E9", "edgecolor": "k", "lw": 0.6, "label": "fresh: $w^2V_b$, of this mini-batch"}
FROZEN = {"color": "#E69F00", "edgecolor": "k", "lw": 0.6, "hatch": "//", "label": "memory: its noise, were x frozen"}
STALE = {"color": "0.85", "edgecolor": "k", "lw": 0.6, "hatch": "xx", "label": "memory: staleness, the rest"}
LESS = {"color": "#F7DDA8", "edgecolor": "k", "lw": 0.6, "hatch": "..", "label": "memory, less than its frozen noise"}
INJECTED = {"color": "#CC79A7", "edgecolor": "k", "lw": 0.6, "hatch": "--", "label": "injected: $R^2$"}
LINE = {"color": "#A00000", "lw": 2, "linestyle": "--", "label": "where memory would end, were x frozen"}
ABOVE = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "zorder": 4}
NORMAL = "the test's level, 5 % (a normal law gives 5.7 % at 64 draws); kurtosis of a normal law, 0"
LEVEL = {"color": "0.3", "lw": 1, "linestyle": (0, (5, 2))}


def shown_size(table):
    """Return the batch size of training that the figures show: the one measured most often, the smallest of equals."""
    return int(table.groupby("run_batch_size")["seeds"].sum().idxmax())


def of_shown_size(table):
    """Return the rows of the table that the figures show."""
    return table[table["run_batch_size"] == shown_size(table)]


def of_one_mode(table):
    """Return the rows in training-mode BatchNorm, or those in evaluation mode where there are no others."""
    return table[table["batchnorm"] == ("train" if (table["batchnorm"] == "train").any() else "eval")]


def rows_of(table, column):
    """Return the rows in which `column` is known: of the b that the figures show, in training mode if there is one."""
    if column not in table:
        return table[:0]
    table = of_one_mode(table)
    return of_shown_size(table[table[column].notna()]) if table[column].notna().any() else table[:0]


def last(table):
    """Return the rows of the greatest step that every optimizer of the table has."""
    if table.empty:
        return table
    common = set.intersection(*table.groupby("optimizer", observed=True)["steps"].agg(set))
    return table[table["steps"] == max(common)] if common else table[:0]


def panels(table, sharey, lines=1):
    """Return (Figure, [(Axes, optimizer, rows)]), a column per optimizer; lines of panels for each mode."""
    table = of_shown_size(table)
    names = list(table["optimizer"].cat.remove_unused_categories().cat.categories)
    modes = [mode for mode in modes_of(table) for _ in range(lines)]
    size = (1 + 3 * len(names), 1.3 + 2.8 * len(modes))
    fig, axes = plt.subplots(len(modes), len(names), figsize=size, sharey=sharey, squeeze=False)
    found = []
    for line, mode in zip(axes, modes, strict=True):
        for ax, name in zip(line, names, strict=True):
            rows = table[(table["optimizer"] == name) & (table["batchnorm"] == mode)]
            ax.set_title(f"{name.upper()}, b = {shown_size(table)}, BatchNorm {mode}")
            found.append((ax, name, rows))
    return fig, found


def modes_of(table):
    """Return the BatchNorm modes of a table, the paper's first: train, eval."""
    return sorted(table["batchnorm"].unique(), reverse=True)


def step_axis(ax, steps):
    """Make x the measured steps, evenly spaced; return {step: x}."""
    steps = sorted(set(steps))
    ax.set_xticks(range(len(steps)), [f"{step:,}" for step in steps])
    ax.set(xlabel="step t (updates made)", xlim=(-0.6, len(steps) - 0.4))
    return {step: x for x, step in enumerate(steps)}


def budget(table):
    """Draw the parts of E‖ω‖² over training, stacked, and below them their shares: late they are small."""
    if table.empty:
        return None
    fig, found = panels(table, sharey=False, lines=2)
    steps = of_shown_size(table)["steps"]
    for ax, _, rows in found:
        at = step_axis(ax, steps)
        if ax.get_subplotspec().rowspan.start % 2:
            stack(ax, rows, at, 100 / tops(rows))
            ax.set_ylim(0, 100)
            label_left(ax, "share of the bar above (%)")
            continue
        stack(ax, rows, at, [1] * len(rows))
        mark_whole(ax, rows, at)
        ax.use_sticky_edges = False  # a part of no height would hold the limit where it is, below the number
        ax.margins(y=0.12)
        ax.set_ylim(bottom=0)
        label_left(ax, "parts of E‖ω‖² (gradient norm²)")
    return fig


def tops(rows):
    """Return where the bars of E‖ω‖² end."""
    return rows["fresh_mean"] + rows["memory_mean"] + rows["injected_mean"]


def stack(ax, rows, at, scales):
    """Draw the parts as bars, each step's times its scale. A memory below its frozen noise is one bar."""
    for row, scale in zip(rows.to_dict("records"), scales, strict=True):
        parts = ("fresh", "memory_noise_frozen", "memory", "injected")
        fresh, frozen, memory, injected = (scale * row[f"{part}_mean"] for part in parts)
        x = at[row["steps"]]
        ax.bar(x, fresh, WIDTH, **FRESH)
        if row["staleness_mean"] >= 0:
            ax.bar(x, frozen, WIDTH, fresh, **FROZEN)
            ax.bar(x, memory - frozen, WIDTH, fresh + frozen, **STALE)
        else:
            ax.bar(x, memory, WIDTH, fresh, **LESS)
        if injected > 0:
            ax.bar(x, injected, WIDTH, fresh + memory, **INJECTED)


def mark_whole(ax, rows, at):
    """Draw E‖ω‖² as measured, its number above the bar, and where a memory below its frozen noise would end."""
    x, whole = rows["steps"].map(at), rows["noise_square_mean"]
    error = [whole - rows["noise_square_min"], rows["noise_square_max"] - whole]
    look = {"marker": "D", "ms": 5, "mfc": "white", "color": "k", "linestyle": "", "capsize": 3}
    ax.errorbar(x, whole, error, **look, label="E‖ω‖² measured, least and greatest seed")
    heights = rows["noise_square_max"].clip(lower=tops(rows))
    for middle, top, value in zip(x, heights, whole, strict=True):
        ax.annotate(f"{value:.3g}" if value < 1000 else f"{value:,.0f}", (middle, top), **ABOVE)
    below = rows[(rows["staleness_mean"] < 0) & (rows["memory_mean"] > 0)]  # before the first step there is none
    for middle, end in zip(
        below["steps"].map(at), below["fresh_mean"] + below["memory_noise_frozen_mean"], strict=True
    ):
        ax.plot([middle - WIDTH / 2, middle + WIDTH / 2], [end, end], **LINE)


def c_squared(table):
    """Draw the direct C²_b against the b drawn, with 95 % intervals, a curve per step. Flat if V_b is C²/b."""
    if table.empty or of_shown_size(table)["batch_size"].nunique() < 2:
        return None
    fig, found = panels(table, sharey=True)
    every = {step: nth_look(i) for i, step in enumerate(sorted(of_shown_size(table)["steps"].unique()))}
    for ax, _, rows in found:
        size_axis(ax, of_shown_size(table))
        for step, part in rows.groupby("steps"):
            mean, error = part["c_squared_direct_mean"], 1.96 * part["c_squared_direct_se"]
            ax.errorbar(part["batch_size"], mean, error, **every[step], capsize=3, label=f"step {step:,}")
        ax.set_yscale("log")
        label_left(ax, "$C^2_b$ (gradient norm squared)")
    ax.set_ylim(bottom=of_shown_size(table)["c_squared_direct_mean"].min() / 2)  # a bar may reach to zero
    return fig


def delta_bound(table):
    """Draw measured δ over training with 95 % intervals, and the formula's with the direct C² and K: a bound."""
    if table.empty:
        return None
    fig, found = panels(table, sharey=True)
    every = looks(table["optimizer"])
    for ax, name, rows in found:
        at = step_axis(ax, of_shown_size(table)["steps"])
        x, look = rows["steps"].map(at), every[name]
        measured = look | {
            "linestyle": "-",
            "mfc": "white",
            "ms": 7,
            "capsize": 3,
            "label": f"{name.upper()}, measured",
        }
        ax.errorbar(x, rows["delta_mean"], 1.96 * rows["delta_se"], **measured)
        ax.plot(x, rows["delta_bound"], color=look["color"], lw=1, linestyle="--")
        if rows["delta_bound"].notna().any():
            style = {"marker": r"$\downarrow$", "ms": 10, "color": look["color"]}
            mark(ax, x, rows["delta_bound"], "the formula's δ, an upper bound", **style)
        ax.set_yscale("log")
        label_left(ax, DELTA_LABEL)
    return fig


def shape(table):
    """Draw normality and isotropy of the mini-batch noise over training: a line of panels per BatchNorm mode."""
    if table.empty:
        return None
    table = of_shown_size(table)
    keys = {"rejected": "share of coordinates rejected (%)", "kurtosis": "mean excess kurtosis across draws"}
    keys["effective_rank"] = "effective rank (directions)"
    if table["rejected_mean"].isna().all():  # too few draws for the test
        del keys["rejected"]
    modes = modes_of(table)
    size = (1 + 3.2 * len(keys), 1.3 + 3 * len(modes))
    fig, axes = plt.subplots(len(modes), len(keys), figsize=size, squeeze=False)
    for line, mode in zip(axes, modes, strict=True):
        for ax, (key, label) in zip(line, keys.items(), strict=True):
            draw_shape(ax, table[table["batchnorm"] == mode], key, step_axis(ax, table["steps"]))
            ax.set(ylabel=label, title=f"b = {shown_size(table)}, BatchNorm {mode}")
    return fig


def draw_shape(ax, rows, key, at):
    """Draw one number over the steps, mean and band over seeds, and what a normal or an isotropic law gives."""
    scale = 100 if key == "rejected" else 1
    for name, look, part in by_optimizer(rows):
        x, mean, low, high = part["steps"].map(at), *(scale * part[f"{key}_{of}"] for of in ("mean", "min", "max"))
        ax.plot(x, mean, **look, label=name)
        ax.fill_between(x, low, high, color=look["color"], alpha=0.25, linewidth=0)
    if key == "effective_rank":
        ax.set_yscale("log")
    else:
        ax.axhline(5 if key == "rejected" else 0, **LEVEL, zorder=MARK, label=NORMAL)
    if key == "rejected":
        ax.set_ylim(bottom=0)


def label_left(ax, label):
    """Label the y axis of a panel that is at the left of its line."""
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel(label)
