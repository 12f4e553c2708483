"""The figures. Each function takes tables that `report.page` makes, and returns a Figure; its title is a question."""

from functools import partial

import numpy as np
from matplotlib import style, ticker
from matplotlib.figure import Figure

from arguments import lagging
from measure.quantities import quantity

COLORS = {"SGD": "#0072B2", "SHB": "#D55E00", "NSHB": "#009E73", "QHM": "#CC79A7"}
MARKERS = {"SGD": "o", "SHB": "s", "NSHB": "^", "QHM": "D"}  # tell curves apart in grey
DASHES = ("-", ":", "-.", (0, (5, 1)))  # of several curves of one optimizer; dashed is a curve's second line
PARTS = {
    "fresh": ("this mini-batch", "#56B4E9"),
    "memory": ("momentum", "#E69F00"),
    "memory_noise": ("noise of earlier mini-batches", "#E69F00"),
    "memory_drift": ("change of ∇f", "#F0E442"),
}
KINDS = {
    "excess_real": ("mini-batch noise", "o", "#0072B2", "excess_predicted"),
    "excess_gaussian": ("Gaussian, same covariance", "s", "#E69F00", "excess_predicted"),
    "excess_isotropic": ("Gaussian, isotropic, same length", "^", "#CC79A7", "excess_predicted_isotropic"),
}
PREDICTORS = {"delta": "δ measured", "temperature": "temperature", "lr_over_b": "η_eff/b", "lambda_max": "λ_max"}
STYLE = {
    **{"font.size": 9, "figure.titlesize": 10, "axes.titlesize": 9, "legend.fontsize": 8, "lines.markersize": 5},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "errorbar.capsize": 2},
}
# Within, figures are drawn and saved with our style, and nothing of the user's matplotlibrc, which may want TeX.
styled = partial(style.context, STYLE, after_reset=True)


def label(name):
    """Return how a quantity is named on an axis or in a head: its symbol, or else its name, and its unit."""
    q, words = quantity(name), name.replace("_", " ")
    words = q.symbol if q.symbol and name != "training_loss" else words
    return words + (f" ({q.unit})" if q.unit else "")


def _early(table):
    """Return what to say below a test accuracy, if anything; the second word of `setting` is the network."""
    steps = table["steps_min" if "steps_min" in table else "steps"].min()
    return "\nlow before update 100: BatchNorm lags" if lagging(table["setting"].iloc[0].split(", ")[1], steps) else ""


def _panels(title, count, width=3.2, **more):
    """Return (Figure, list of its Axes)."""
    fig = Figure(figsize=(0.8 + width * count, 3.2), layout="constrained")
    fig.suptitle(title)
    return fig, list(fig.subplots(1, count, squeeze=False, **more)[0])


def _curves(table):
    """Yield (label, look, rows) of every curve of a table."""
    seen = []
    for name, rows in table.groupby("label", sort=False):
        optimizer = name.split()[0]
        look = {"color": COLORS.get(optimizer, "0.4"), "marker": MARKERS.get(optimizer, "v")}
        yield name, look | {"linestyle": DASHES[seen.count(optimizer) % 4]}, rows
        seen.append(optimizer)


def _name_curves(ax):
    """Name the curves: by a legend if they are three at most, else each at its end."""
    handles, names = ax.get_legend_handles_labels()
    if len(names) <= 3:
        ax.legend()
        return
    lines = [(h[0] if isinstance(h, tuple) else h, name) for h, name in zip(handles, names, strict=True)]
    drawn = [(*line.get_xydata()[-1], name, line) for line, name in lines if len(line.get_xdata())]
    ax.get_ylim()  # the limits that the curves ask for are set now
    below = -np.inf
    for x, y, name, line in sorted(drawn, key=lambda end: end[1]):
        height = ax.transData.transform((x, y))[1] * 72 / ax.figure.dpi
        below = max(height, below + 9)  # in points, so that no name stands on another
        _tag(ax, x, y, name, line.get_color(), below - height - 3)


def _tag(ax, x, y, text, color, shift=3.0):
    """Say in a word what ends at (x, y)."""
    ax.annotate(text, (x, y), (5, shift), textcoords="offset points", color=color, fontsize=7)


def _dashed(ax, rows, x, name, text, color):
    """Draw a second number of a curve as a dashed line of its colour; what it is stands at the end of the first."""
    known = rows.dropna(subset=name)
    ax.plot(known[x], known[name], "--", color=color, marker=".", lw=1)
    if len(known) and text not in {each.get_text() for each in ax.texts}:
        _tag(ax, known[x].iloc[-1], known[name].iloc[-1], text, "0.3")


def _interval(ax, rows, x, name, **look):
    """Draw means of a quantity over `x` with their 95 % t intervals, where they have one."""
    mean = rows[f"{name}_mean"]
    error = np.nan_to_num([mean - rows[f"{name}_low"], rows[f"{name}_high"] - mean])
    ax.errorbar(rows[x], mean, error, **look)


def _band(ax, rows, x, name, **look):
    """Draw the mean of a quantity over seeds, and the band from min to max."""
    ax.plot(rows[x], rows[f"{name}_mean"], **look)
    ax.fill_between(rows[x], rows[f"{name}_min"], rows[f"{name}_max"], color=look["color"], alpha=0.2, lw=0)


def _size_axis(ax, sizes, name="batch size b"):
    """Make x the logarithmic axis of these batch sizes."""
    ax.set_xscale("log", base=2)
    ax.set(xlabel=name, xlim=(min(sizes) / 1.5, max(sizes) * 1.5))
    ax.xaxis.set_major_locator(ticker.LogLocator(base=2, numticks=8))
    ax.xaxis.set_major_formatter("{x:g}")


def _log(ax, name="y"):
    """Make an axis logarithmic, with plain numbers as ticks where it spans less than two decades."""
    ax.set(**{f"{name}scale": "log"})
    axis, (low, high) = getattr(ax, f"{name}axis"), getattr(ax, f"get_{name}lim")()
    if high < 100 * low:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 5 * low else ticker.MaxNLocator(5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def training(table):
    """Draw loss, accuracy and ‖g‖ over training, of one batch size: mean, and band from min to max over seeds."""
    fig, axes = _panels("How do loss, accuracy and gradient norm change in training?", 3, 2.6)
    for ax, shown in zip(axes, ("training_loss", "accuracy", "g-norm"), strict=True):
        for name, look, rows in _curves(table.dropna(subset=f"{shown}_mean")):
            _band(ax, rows, "epoch", shown, **(look if len(rows) < 20 else look | {"marker": ""}), label=name)
            if shown == "accuracy":
                _dashed(ax, rows, "epoch", "accuracy_recalibrated_mean", "recalibrated", look["color"])
        ax.set(xlabel=f"epoch, b = {table['b'].iloc[0]}", ylabel=label(shown))
        known = table.dropna(subset="accuracy_mean")
        if shown == "accuracy" and len(known):
            ax.set_xlabel(ax.get_xlabel() + _early(known))
    _log(axes[2])
    _name_curves(max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1])))
    return fig


def accuracy(table, event):
    """Draw test accuracy over b at one event; × where a seed diverged, hollow where one did not fit."""
    fig, (ax,) = _panels("How does test accuracy depend on the batch size?", 1, 4)
    for name, look, rows in _curves(table):
        color, known = look["color"], rows.dropna(subset="accuracy_mean")
        fits, unfit = known[known["unfit"] == 0], known[known["unfit"] > 0]
        _band(ax, fits, "b", "accuracy", **look, label=name)
        _dashed(ax, unfit if fits.empty else fits, "b", "accuracy_recalibrated_mean", "recalibrated", color)
        ax.plot(unfit["b"], unfit["accuracy_mean"], look["marker"], mfc="none", color=color)
        lost = rows["b"][rows["diverged"] > 0]
        ax.plot(lost, 0.03 + 0 * lost, "x", color=color, transform=ax.get_xaxis_transform(), clip_on=False)
    _size_axis(ax, table["b"])
    ax.set_xlabel(ax.get_xlabel() + _early(table.dropna(subset="accuracy_mean")))
    ax.set_ylabel(f"test {label('accuracy')} at {event}")
    _name_curves(ax)
    return fig


def sfo(steps, stars):
    """Draw SFO complexity over b, a panel an ε, three at most; ○ at the best b, line: b*'s interval."""
    every = sorted(steps["eps"].unique(), reverse=True)
    shown = [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})]
    fig, axes = _panels("Which batch size needs the fewest gradients to reach ε?", len(shown), 3)
    for ax, eps in zip(axes, shown, strict=True):
        for name, look, rows in _curves(steps[steps["eps"] == eps]):
            at_once, missed = rows["at_first_check"] > 0, rows["reached"] < rows["seeds"]
            _band(ax, rows[~at_once & ~missed], "b", "sfo", **look, label=name)
            for bounds, marker in ((rows[missed & ~at_once], r"$\uparrow$"), (rows[at_once], r"$\downarrow$")):
                ax.plot(bounds["b"], bounds["sfo_mean"], linestyle="", marker=marker, ms=8, color=look["color"])
            paper = rows.assign(paper=rows["published"] * rows["b"])
            _dashed(ax, paper, "b", "paper", "paper", "k")
        if len(stars):
            best = stars[(stars["eps"] == eps) & (stars["note"] == "") & stars["curve"].isin(steps["curve"])]
            ax.plot(best["b_star"], best["sfo"], "o", ms=11, mfc="none", color="k")
            ax.hlines(best["sfo"], best["b_star_fit_low"], best["b_star_fit_high"], color="k", lw=2)
        _size_axis(ax, steps["b"])
        _log(ax)
        ax.set(title=f"ε = {eps:g}", ylabel="SFO complexity (gradients)" if ax is axes[0] else "")
    _name_curves(axes[0])
    return fig


def delta(table, event):
    """Draw δ over b at one event: measured with 95 % intervals, and by the formula with measured C² and K, dashed."""
    fig, (ax,) = _panels("How does the degree of smoothing δ depend on the batch size?", 1, 4)
    for name, look, rows in _curves(table):
        _interval(ax, rows, "b", "delta", **look, label=name)
        _dashed(ax, rows, "b", "delta_formula", "formula", look["color"])
    _size_axis(ax, table["b"])
    _log(ax)
    ax.set_ylabel(f"{label('delta')} at {event}")
    _name_curves(ax)
    return fig


def omega(table):
    """Draw the parts of E‖ω‖² over training, a panel a curve; the line across a bar is E‖ω‖² as measured."""
    split = table["memory_noise_mean"].notna().any()
    parts = ["fresh", *(("memory_noise", "memory_drift") if split else ("memory",))]
    fig, axes = _panels("What is the search direction noise ω made of?", table["label"].nunique(), 2.6)
    for ax, (name, _, rows) in zip(axes, _curves(table), strict=True):
        rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, 8).round().astype(int))]
        x, bottom = np.arange(len(rows)), np.zeros(len(rows))
        for part in parts:
            height = rows[f"{part}_mean"].fillna(0).to_numpy()
            ax.bar(x, height, 0.7, bottom, color=PARTS[part][1], edgecolor="k", lw=0.5, label=PARTS[part][0])
            bottom = bottom + height
        ax.hlines(rows["noise_square_mean"], x - 0.45, x + 0.45, color="k", lw=1.2)
        ax.set_xticks(x, [f"{step:,}" for step in rows["steps"]], rotation=45 if len(x) > 5 else 0)
        ax.set(title=name, xlabel=f"{label('steps')}, b = {rows['b'].iloc[0]}")
        ax.set_ylim(0, 1.05 * max(bottom.max(), rows["noise_square_mean"].max()))
    axes[0].set_ylabel(label("noise_square"))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def c_squared(table, event, stars):
    """Draw C² over training, and, if several were drawn, over batch sizes at one event; ◇ where b* puts it."""
    b, several = table["b"].iloc[0], table["batch_size"].nunique() > 1
    title = f"Is C² the same {'at every batch size and ' if several else ''}all through training?"
    fig, axes = _panels(title, 1 + several, sharey=True)
    left, right = axes[0], axes[-1]
    for name, look, rows in _curves(table):
        _interval(right, rows[rows["batch_size"] == b], "steps", "c_squared", **look, label=name)
        if several:
            _interval(left, rows[rows["at_event"]], "batch_size", "c_squared", **look, label=name)
            for star in stars[stars["curve"] == rows["curve"].iloc[0]][:1].to_dict("records") if len(stars) else ():
                at = star["b_star"], star["c_squared_from_b_star"]
                left.plot(*at, "D", mfc="white", color=look["color"])
                _tag(left, *at, "from b*", look["color"])
    if several:
        sizes = [*table["batch_size"], *(stars["b_star"] if len(stars) else [])]
        _size_axis(left, sizes, f"batch size drawn, at {event}")
    right.set_xlabel(f"{label('steps')}, b = {b}")
    left.set_ylabel(label("c_squared"))
    _log(left)
    _name_curves(right)
    return fig


def smoothing(table, event):
    """Draw the loss that one step's noise adds, of three kinds, and the prediction as a line; ↓ an upper limit."""
    fig, (ax,) = _panels("Which noise smooths the loss?", 1, 4.4)
    for i, (kind, (name, marker, color, predicted)) in enumerate(KINDS.items()):
        rows = table.assign(at=np.arange(len(table)) + 0.22 * (i - 1))
        limit = rows[f"{kind}_low"] <= 0  # a logarithmic axis has no zero for the interval to reach
        _interval(ax, rows[~limit], "at", kind, fmt=marker, color=color, label=name)
        ax.plot(rows["at"][limit], rows[f"{kind}_high"][limit], ls="", marker=r"$\downarrow$", ms=8, color=color)
        ax.hlines(rows[f"{predicted}_mean"], rows["at"] - 0.09, rows["at"] + 0.09, color="k", lw=1.2, zorder=3)
    ax.set_xticks(np.arange(len(table)), table["label"])
    ax.set(xlim=(-0.6, len(table) - 0.4), ylabel=f"{quantity('excess_real').meaning} (nats)")
    ax.set_xlabel(f"at {event}, b = {table['b'].iloc[0]}")
    _log(ax)
    ax.legend()
    return fig


def predictors(points):
    """Draw accuracy over each predictor, four at most: the settings that fit, the same in each panel."""
    names = [name for name in PREDICTORS if points[f"{name}_mean"].notna().any()]
    fig, axes = _panels("Which of these orders test accuracy?", len(names), 2.6, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        for optimizer, rows in points[points["fits"]].groupby("optimizer", sort=False):
            look = {"color": COLORS.get(optimizer.upper(), "0.4"), "fmt": MARKERS.get(optimizer.upper(), "v")}
            injected = rows["label"].str.contains("inject")
            for part, more in ((rows[~injected], {"label": optimizer.upper()}), (rows[injected], {"mfc": "white"})):
                _interval(ax, part, f"{name}_mean", "accuracy", **look, **more)
        ax.set_xlabel(PREDICTORS[name])
        _log(ax, "x")
    axes[0].set_ylabel(f"test {label('accuracy')}")
    _name_curves(axes[-1])
    return fig
