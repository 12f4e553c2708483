"""What the figures have in common: looks, axes, marks, bands, and the file with its legend."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from files import replacing

# Okabe–Ito colours; markers and dashes tell the curves apart in grey too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 3)))
# To make and save a figure in: `with plt.rc_context(STYLE)`.
STYLE = {
    **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "lines.markersize": 5},
    "figure.constrained_layout.use": True,
}
# What stands for a point whose steps are no measurement: the arrow, and its name in the legend.
ARROWS = {
    "lower bound": (r"$\uparrow$", "lower bound: a seed did not reach ε"),
    "upper bound": (r"$\downarrow$", "upper bound: ε reached at the first check"),
    "undetermined": (r"$\updownarrow$", "undetermined: one seed at the first check, one not at all"),
}
MARK = 5  # the zorder by which marks are told from curves


def nth_look(i):
    """Return colour, marker and dashes of the i-th curve; of 36 no two are alike."""
    other = i + i // len(COLORS)
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[other % len(MARKERS)],
        "linestyle": DASHES[other % len(DASHES)],
    }


def looks(optimizers):
    """Return {optimizer: look} for a Categorical column of a Group: the same in all its figures."""
    return {optimizer: nth_look(i) for i, optimizer in enumerate(optimizers.cat.categories)}


def by_optimizer(rows):
    """Yield (name for the legend, look, its rows) of every optimizer among the rows, in the order of the Group."""
    every = looks(rows["optimizer"])
    for optimizer, part in rows.groupby("optimizer", observed=True):
        yield optimizer.upper(), every[optimizer], part


def size_axis(ax, rows):
    """Make x the logarithmic axis of the rows' batch sizes; its ticks are as many of them as there is room for."""
    sizes, ticks = sorted(rows["batch_size"].unique()), []
    for b in sizes:
        if not ticks or 6.01 * np.log(b / ticks[-1]) >= np.log(sizes[-1] / sizes[0]):
            ticks.append(b)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="batch size b (samples)", xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
    ax.set_xticks(ticks, [f"{b:g}" for b in ticks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def readable_ticks(axis):
    """Give a logarithmic axis plain numbers as ticks where it spans less than two decades."""
    low, high = axis.get_view_interval()
    if axis.get_scale() != "log" or isinstance(axis.get_major_locator(), ticker.FixedLocator) or high >= 100 * low:
        return
    steps = ticker.MaxNLocator(5) if high < 10 * low else ticker.LogLocator(subs=(1, 2, 5))
    axis.set_major_locator(steps)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def curve(ax, rows, key, **look):
    """Draw key's mean over seeds against b with its min–max band; broken where it has no value, or only a bound."""
    values = rows[[f"{key}_mean", f"{key}_min", f"{key}_max"]].astype(float)
    if "steps_are" in rows:
        values = values[~rows["steps_are"].isin(ARROWS)].reindex(rows.index)
    mean, low, high = values.to_numpy().T
    if not np.all(np.isnan(mean)):
        ax.plot(rows["batch_size"], mean, **look)
        ax.fill_between(rows["batch_size"], low, high, color=look["color"], alpha=0.25, linewidth=0)


def mark(ax, x, y, label, transform=None, **look):
    """Draw marks over the curves, and name them in the legend."""
    ax.plot(x, y, linestyle="", zorder=MARK, transform=transform or ax.transData, **look)
    ax.plot([], [], linestyle="", zorder=MARK, **look | {"color": "0.3"}, label=label)


def side_by_side(b, i, n):
    """Return where on the axis of batch sizes the i-th of n marks at b goes, so that none hides another."""
    return b * 2 ** (min(0.35, 0.8 / n) * (i - (n - 1) / 2))


def mark_diverged(ax, rows, column, looks):
    """Mark on the floor each b at which `column` counts a diverged seed, the optimizers side by side."""
    for i, (name, look) in enumerate(looks.items()):
        lost = rows["batch_size"][(rows["optimizer"] == name) & (rows[column] > 0)].unique()
        if len(lost):
            x, y = side_by_side(np.sort(lost), i, len(looks)), np.full(len(lost), 0.03)
            look = {"marker": "x", "ms": 8, "mew": 2, "color": look["color"]}
            mark(ax, x, y, "a seed diverged", ax.get_xaxis_transform(), **look)


def save(path, fig, title):
    """Write the figure under its title as PNG and PDF, with one legend below it: each label once, marks last.

    The lines of the title are broken where they are wider than the figure.
    """
    found = {}
    for ax in fig.axes:
        readable_ticks(ax.xaxis)
        readable_ticks(ax.yaxis)
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [label for label, handle in found.items() if getattr(handle, "zorder", 0) != MARK]
    labels += sorted(set(found) - set(labels))
    columns = int(fig.get_figwidth() * 14 / (max(map(len, labels)) + 7))  # fourteen letters an inch
    fig.legend([found[label] for label in labels], labels, loc="outside lower center", ncols=max(1, columns))
    width = int(fig.get_figwidth() * 13)  # thirteen letters an inch
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, width)]
    fig.suptitle("\n".join(lines), fontsize=10)
    for kind in ("png", "pdf"):
        with replacing(path.with_name(f"{path.name}.{kind}")) as file:
            undated = {"CreationDate": None} if kind == "pdf" else {}  # the same figure is the same file
            fig.savefig(file, format=kind, dpi=150, metadata=undated)
    plt.close(fig)
