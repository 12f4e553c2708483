"""The figures: each function takes tables of `tables` and returns a matplotlib Figure, None if nothing is to draw."""

import matplotlib.pyplot as plt
import numpy as np

from report.axes import (
    ARROWS,
    MARK,
    by_optimizer,
    curve,
    looks,
    mark,
    mark_diverged,
    nth_look,
    side_by_side,
    size_axis,
)
from report.tables import DELTAS

DELTA_LABEL = "degree of smoothing δ (parameter distance)"


def steps(rows, constants, published_steps, bracketed, constants_full):
    """Draw steps to ε and SFO complexity against b: a column per optimizer, a curve per ε.

    bracketed, constants_full: `steps_full_gradient` and the constants by it; drawn as brackets beside the curves.
    """
    if rows["batch_size"].nunique() < 2:
        return None
    names = list(rows["optimizer"].unique())
    every = {eps: nth_look(i) | {"label": f"ε = {eps:g}"} for i, eps in enumerate(sorted(set(rows["eps"])))}
    size = (1 + 3.2 * len(names), 6.5)
    fig, axes = plt.subplots(2, len(names), figsize=size, sharex=True, sharey="row", squeeze=False)
    for look in every.values():  # the legend's order
        axes[0, 0].plot([], [], **look)
    for line, key in zip(axes, ("steps", "sfo"), strict=True):
        for ax, name in zip(line, names, strict=True):
            size_axis(ax, rows)
            mine = rows[rows["optimizer"] == name]
            for eps, look in every.items():
                part = mine[mine["eps"] == eps]
                curve(ax, part, key, **look)
                mark_b_star(ax, part, key, constants[(constants["optimizer"] == name) & (constants["eps"] == eps)])
                theirs = published_steps[(published_steps["optimizer"] == name) & (published_steps["eps"] == eps)]
                if len(theirs):
                    y = theirs["steps"] * (theirs["batch_size"] if key == "sfo" else 1)
                    ax.plot(theirs["batch_size"], y, marker=".", color="0.4", lw=0.8, label="published SHB")
            mark_bounds(ax, mine, key, every)
            stars = constants_full[constants_full["optimizer"] == name].set_index("eps")["b_star"]
            mark_brackets(ax, bracketed[bracketed["optimizer"] == name], key, every, stars)
            ax.set(yscale="log", title=name.upper() if key == "steps" else "")
            ax.label_outer()
    for ax, name in zip(axes[0], names, strict=True):
        mark_diverged(ax, rows, "diverged", {name: {"color": "0.3"}})
    axes[0, 0].set_ylabel("steps until mean ‖g‖ ≤ ε")
    axes[1, 0].set_ylabel("SFO complexity (gradients)")
    return fig


def mark_bounds(ax, rows, key, every):
    """Draw an arrow where steps of one optimizer are only a bound; those of one b side by side, so that all show."""
    for b, here in rows[rows["steps_are"].isin(ARROWS)].groupby("batch_size"):
        for i, row in enumerate(here.to_dict("records")):
            marker, label = ARROWS[row["steps_are"]]
            look = {"marker": marker, "ms": 9, "color": every[row["eps"]]["color"]}
            mark(ax, side_by_side(b, i, len(here)), row[f"{key}_mean"], label, **look)


def mark_brackets(ax, rows, key, every, stars):
    """Draw one optimizer's steps by the full gradient: from after the measurement before to the first one ≤ ε.

    stars: {ε: b* by it}, framed at the upper end. The brackets of one b stand side by side, so that all show.
    """
    shown = rows[rows["steps_are"].isin(("measured", "lower bound"))]
    for b, here in shown.groupby("batch_size"):
        for i, row in enumerate(here.to_dict("records")):
            x, low, high = side_by_side(b, i, len(here)), row[f"{key}_min"], row[f"{key}_max"]
            look = {"color": every[row["eps"]]["color"], "zorder": MARK - 1}
            if row["steps_are"] == "lower bound":
                ax.plot(x, row[f"{key}_mean"], marker=6, ms=7, mfc="none", linestyle="", **look)
                continue
            ax.plot([x, x], [low, high], marker="_", ms=8, mew=1.5, lw=1.5, **look)
            shape = {"marker": every[row["eps"]]["marker"], "ms": 4, "mfc": "white"}
            ax.plot(x, high, linestyle="", **shape, **look)
            if row["batch_size"] == stars[row["eps"]]:
                mark(ax, x, row[f"{key}_mean"], "measured b*, by ‖∇f‖", marker="D", ms=11, mfc="none", color="k")
    if "measured" in set(shown["steps_are"]):
        look = {"marker": r"$\mathsf{I}$", "ms": 9, "linestyle": "", "color": "0.3"}
        ax.plot([], [], **look, label="bracket: steps until ‖∇f‖ ≤ ε, between two measurements")
    if "lower bound" in set(shown["steps_are"]):
        ax.plot([], [], marker=6, ms=7, mfc="none", linestyle="", color="0.3", label="by ‖∇f‖: lower bound")


def mark_b_star(ax, rows, key, stars):
    """Circle the measured b* of one optimizer and ε, and mark the theory's bound: at the edge if beyond the grid.

    rows, stars: of `tables.steps` and `tables.constants`, those of this optimizer and ε.
    """
    known = rows[(rows["steps_are"] == "measured") & (rows["diverged"] == 0)].set_index("batch_size")[f"{key}_mean"]
    low, high = ax.get_xlim()
    for star in stars.dropna(subset="b_star").to_dict("records"):
        b, bound = star["b_star"], star["bound"]
        mark(ax, b, known[b], "measured b*", marker="o", ms=12, mfc="none", color="k")
        if bound is None:
            continue
        y = np.exp(np.interp(np.log(bound), np.log(known.index), np.log(known)))
        if low < bound < high:
            look = {"marker": "s", "ms": 9, "mfc": "none", "color": "k"}
            mark(ax, bound, y, "theory's bound; C² from b* at the reference ε", **look)
        else:
            x, arrow = (0.03, r"$\leftarrow$") if bound <= low else (0.97, r"$\rightarrow$")
            look = {"marker": arrow, "ms": 11, "color": "k", "transform": ax.get_yaxis_transform()}
            mark(ax, x, y, "theory's bound lies beyond the grid", **look)


def accuracy(points):
    """Draw final test accuracy and training loss against b."""
    points = points[points["normal_seeds"] > 0]
    if points["batch_size"][points["accuracy_mean"].notna()].nunique() < 2:
        return None
    fig, axes = plt.subplots(1, 2, figsize=(8, 4))
    for ax, key in zip(axes, ("accuracy", "training_loss"), strict=True):
        size_axis(ax, points)
        for name, look, part in by_optimizer(points):
            curve(ax, part, key, **look, label=name)
    mark_diverged(axes[0], points, "normal_diverged", looks(points["optimizer"]))
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].set(ylabel="training loss (nats)", yscale="log")
    return fig


def delta(points):
    """Draw δ against b: measured as large hollow marks, our formula as a line, the paper's constants in grey."""
    known = points[["delta_measured_mean", "delta_formula"]].notna().any(axis=1)
    if points["batch_size"][known].nunique() < 2:
        return None
    fig, ax = plt.subplots(figsize=(6.5, 5))
    size_axis(ax, points)
    for name, look, part in by_optimizer(points[points["sampling_seeds"] > 0]):
        curve(ax, part, "delta_measured", **look, label=f"{name}, measured", mfc="none", ms=9, lw=0.6)
    for name, look, part in by_optimizer(points.dropna(subset="delta_formula")):
        source = part["delta_formula_from"].iloc[0]
        label = f"{name}, formula" if "* = " in source else f"{name}, formula (C² from {source})"
        width = 4 if name == "SGD" else 1.5  # NSHB's may lie on SGD's
        ax.plot(part["batch_size"], part["delta_formula"], **look, lw=width, label=label)
    for name, look, part in by_optimizer(points.dropna(subset="delta_published_constants")):
        grey = look | {"color": "0.6", "lw": 0.9, "ms": 3, "label": f"{name}, paper's C², K"}
        ax.plot(part["batch_size"], part["delta_published_constants"], **grey)
    mark_diverged(ax, points, "sampling_diverged", looks(points["optimizer"]))
    ax.set(ylabel=DELTA_LABEL, yscale="log")
    return fig


def accuracy_delta(points, correlations):
    """Draw test accuracy against δ, one panel for the formula's δ and one for the measured, of two points at least."""
    points = points[points["normal_diverged"] == 0].dropna(subset="accuracy_mean")
    shown = [key for key in DELTAS if points[key].notna().sum() >= 2]
    if not shown:
        return None
    fig, axes = plt.subplots(1, len(shown), figsize=(1 + 4 * len(shown), 4.4), sharey=True, squeeze=False)
    for ax, key in zip(axes[0], shown, strict=True):
        for name, look, part in by_optimizer(points.dropna(subset=shown, how="all")):
            part = part.dropna(subset=key)  # none may be left: the legend has all in one order
            y = part["accuracy_mean"]
            error = [y - part["accuracy_min"], part["accuracy_max"] - y]
            ax.errorbar(part[key], y, error, **look | {"linestyle": "", "capsize": 2, "label": name})
        title = ["δ from the formula" if key == "delta_formula" else "δ measured, lr × ‖ω‖"]
        for c in correlations.to_dict("records"):
            if c["delta"] == key.removesuffix("_mean"):
                who = c["optimizer"].upper()
                title.append(f"{who}: Pearson {c['pearson']:+.2f}, Spearman {c['spearman']:+.2f}, n = {c['points']}")
        ax.set(title="\n".join(title), xscale="log", xlabel=DELTA_LABEL)
    axes[0, 0].set_ylabel("test accuracy (%)")
    return fig


def omega(table, omega_histogram, omega_qq):
    """Draw histogram and Q–Q plot of one ω per optimizer, those of `table` that were read whole."""
    drawn = table.dropna(subset="beyond_6_std").sort_values("optimizer").to_dict("records")
    if not drawn:
        return None
    every = looks(table["optimizer"])
    fig, axes = plt.subplots(2, len(drawn), figsize=(1 + 3.2 * len(drawn), 7), sharey="row", squeeze=False)
    for (top, bottom), run in zip(axes.T, drawn, strict=True):
        look = every[run["optimizer"]]
        bars = omega_histogram[omega_histogram["name"] == run["name"]]
        edges = [*bars["left"], bars["right"].iloc[-1]]
        top.stairs(bars["density"], edges, fill=True, color=look["color"], alpha=0.5, label="entries of ω")
        middle = (bars["left"] + bars["right"]) / 2
        top.plot(middle, bars["normal"], "k--", lw=1, label="normal density, one scale for all")
        title = f"{run['optimizer'].upper()}, b = {run['batch_size']}, seed {run['seed']}"
        title += f"\n{run['omega_entries']:,} entries"
        top.set(yscale="log", xlabel="(ω_i − mean) / std", ylim=(1e-8, 3e5), title=title)
        lines = [f"{key} {run['omega_' + key.replace(' ', '_')]:.3g}" for key in ("mean", "std", "skewness")]
        lines.append(f"excess kurtosis {run['omega_excess_kurtosis']:.3g}")
        lines.append(f"cut off, beyond ±6 std: {100 * run['beyond_6_std']:.2g} %")
        top.text(0.02, 0.98, "\n".join(lines), transform=top.transAxes, va="top", fontsize=8)
        quantiles = omega_qq[omega_qq["name"] == run["name"]]
        normal = quantiles["normal_quantile"]
        style = {"color": look["color"], "marker": look["marker"], "linestyle": "", "ms": 3}
        bottom.plot(normal, quantiles["omega_quantile"], **style, label="quantiles of ω")
        bottom.plot(normal, normal, "k--", lw=1)
        bottom.set(xlabel="quantile of the normal")
    axes[0, 0].set_ylabel("density of standardized entries")
    axes[1, 0].set_ylabel("quantile of standardized entries")
    return fig


def gradients(bins, runs, crossings, full):
    """Draw gradient norm and running mean over steps, a panel per run in `bins`, a line of panels per optimizer.

    full: of `full_gradients.read`; what a run measured of ‖∇f‖ is drawn too.
    """
    if bins.empty:
        return None
    drawn = runs[runs["name"].isin(bins["name"])].sort_values(["optimizer", "batch_size"])
    lines = [list(mine.to_dict("records")) for _, mine in drawn.groupby("optimizer", observed=True)]
    width, every_eps = max(map(len, lines)), sorted(crossings["eps"].unique())
    size = (1 + 3.2 * width, 1 + 2.6 * len(lines))
    fig, axes = plt.subplots(len(lines), width, figsize=size, sharey=True, squeeze=False)
    for line, shown in zip(axes, lines, strict=True):
        line[0].set_ylabel("gradient norm ‖g‖")
        for ax in line[len(shown) :]:
            ax.set_axis_off()
        for ax, run in zip(line, shown, strict=False):
            reached = crossings[crossings["name"] == run["name"]].dropna(subset="steps")
            color = looks(runs["optimizer"])[run["optimizer"]]["color"]
            draw_history(ax, bins[bins["name"] == run["name"]], every_eps, reached, color)
            mine = full[(full["run"] == run["name"]) & (full["steps"] > 0)]
            if len(mine):
                ax.plot(mine["steps"], mine["full_gradient_norm"], "k+", ms=6, label="full gradient ‖∇f‖")
            title = f"{run['optimizer'].upper()}, b = {run['batch_size']}, seed {run['seed']}"
            ax.set(xscale="log", yscale="log", xlabel="step", title=title)
    return fig


def draw_history(ax, bins, every_eps, reached, color):
    """Draw one run's gradient norms and running mean, a line at each ε, and the step at which it was reached."""
    style = {"color": color, "alpha": 0.4, "lw": 0.7, "step": "pre"}
    ax.fill_between(bins["last_step"], bins["norm_min"], bins["norm_max"], **style, label="‖g‖, least to greatest")
    ax.plot(bins["last_step"], bins["running_mean"], "k", lw=1.2, label="running mean of ‖g‖")
    for i, eps in enumerate(every_eps):
        style = {"color": "0.3", "lw": 0.8, "linestyle": nth_look(i)["linestyle"]}
        ax.axhline(eps, **style, label=f"ε = {eps:g}")
        here = reached[reached["eps"] == eps]
        if len(here):
            ax.plot(here["steps"], here["eps"], "ok", mfc="white", ms=6, zorder=5, label="ε reached")
