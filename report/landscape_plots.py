"""The figures of what the noise does to the loss, and of sharpness, from the tables of `landscapes`."""

import matplotlib.pyplot as plt
import numpy as np

from report.axes import COLORS, MARK, by_optimizer, looks
from report.budget_plots import label_left, modes_of, of_shown_size, panels, shown_size, step_axis

# The kinds of noise, in the order in which they stand beside each other.
KINDS = {
    "real": {"color": COLORS[0], "marker": "o", "label": "noise of the mini-batches"},
    "gaussian": {"color": COLORS[1], "marker": "s", "label": "Gaussian of the same covariance"},
    "isotropic": {"color": COLORS[2], "marker": "^", "label": "isotropic of the same length"},
}
PREDICTED = {"predicted": "real", "predicted_isotropic": "isotropic"}
SHARPNESS = {
    "lambda_max": r"$\lambda_{max}$ of the Hessian",
    "batch_sharpness": "batch sharpness",
    "trace": "trace of the Hessian",
}
LEVELS = {
    "lambda_max": ("stable_up_to", "largest stable curvature of full-batch steps"),
    "batch_sharpness": ("batch_sharpness_level", "where batch sharpness is said to settle, at small b"),
}


def smoothing(table):
    """Draw the excess loss under the three noises with 95 % intervals, and what curvature predicts, over the steps."""
    if table.empty:
        return None
    fig, found = panels(table, sharey=False)
    for ax, _, rows in found:
        at = step_axis(ax, of_shown_size(table)["steps"])
        x = rows["steps"].map(at)
        places = dict(zip(KINDS, (-0.2, 0, 0.2), strict=True))
        for kind, look in KINDS.items():
            error = 1.96 * rows[f"{kind}_se"]
            ax.errorbar(x + places[kind], rows[f"{kind}_mean"], error, **look, linestyle="", capsize=3)
        for key, kind in PREDICTED.items():
            for middle, value in zip(x + places[kind], rows[f"{key}_mean"], strict=True):
                ax.plot([middle - 0.09, middle + 0.09], [value, value], color="k", lw=2, zorder=1)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        label_left(ax, "excess loss (nats)")
    found[0][0].plot([], [], color="k", lw=2, label="predicted from the curvature")
    return fig


def sharpness(table):
    """Draw λ_max, batch sharpness and the trace over the steps, each beside what the theory of stability names."""
    if table.empty:
        return None
    table = of_shown_size(table)
    modes = modes_of(table)
    fig, axes = plt.subplots(len(modes), 3, figsize=(10.6, 1.5 + 3 * len(modes)), squeeze=False)
    every = looks(table["optimizer"])
    for line, mode in zip(axes, modes, strict=True):
        for ax, (key, label) in zip(line, SHARPNESS.items(), strict=True):
            rows = table[table["batchnorm"] == mode]
            at = step_axis(ax, table["steps"])
            for name, look, part in by_optimizer(rows):
                error = 1.96 * part[f"{key}_se"] if f"{key}_se" in part else None
                ax.errorbar(part["steps"].map(at), part[f"{key}_mean"], error, **look, capsize=3, label=name)
            if key in LEVELS:
                draw_levels(ax, rows, *LEVELS[key], every)
            positive = rows[f"{key}_mean"].gt(0).all()
            ax.set(ylabel=label, title=f"b = {shown_size(table)}, BatchNorm {mode}")
            ax.set_yscale("log" if positive else "linear")
    return fig


def draw_levels(ax, rows, column, label, every):
    """Draw each optimizer's level as a thin line, in its colour and dashes, at the right edge."""
    for name, part in rows.groupby("optimizer", observed=True):
        level = part[column].iloc[0]
        if np.isfinite(level):
            look = {key: every[name][key] for key in ("color", "linestyle")}
            ax.axhline(level, 0.9, 1, lw=2.5, zorder=MARK - 1, **look)
    ax.plot([], [], color="0.3", lw=2.5, label=f"at the right edge: {label}")
