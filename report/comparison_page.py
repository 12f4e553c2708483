"""The comparison of all settings of a data set and network: its figure, and its part of report.md."""

import matplotlib.pyplot as plt
import numpy as np

from files import write_table
from report import axes, comparisons, evidence_of_training, theory
from report.page import bullets, markdown

USUAL = {"injected_noise": 0, "precision": "default"}  # not worth a word where all points have it
OUTCOMES = {"accuracy": "test accuracy (%)", "training_loss": "training loss (nats)"}
FILLINGS = ("full", "none", "left", "top", "right", "bottom")  # of a mark
NEAR = 10  # pixels, of points so close that one label says the b of both
ROOM = np.array([17, 8])  # points, that a label takes
BESIDE = [(x, y) for y in (3, -9, 13, -19) for x in (3, -16)]  # points, from a mark to where its label may begin
NO_PAIR = "no SGD run sampled with --draws and --draw_batchsizes"


def write_all(runs, out):
    """Write the comparison of every data set and network of `records.load` into `out`; return its part of report.md.

    Says on stdout what each is of.
    """
    return "".join(write(*which, same, out) for which, same in runs.groupby(["dataset", "model"]))


def write(dataset, model, runs, out):
    """Write one comparison; return its part of report.md, "" where all runs are critical."""
    if (runs["mode"] == "critical").all():
        return ""
    made, left_out = comparisons.measure(runs)
    slug, page, points = f"{dataset}_{model}", "", made["comparison"]
    lines = [f"{slug}, all settings: {len(points)} of {points['normal_seeds'].sum():g} normal runs"]
    named, shared = series(points)
    with plt.rc_context(axes.STYLE):
        fig = figure(named)
        if fig:
            axes.save(out / f"{slug}_comparison", fig, f"{', '.join([dataset, model, *shared])}\n{note(named)}")
            page += f"\n![comparison]({slug}_comparison.png)\n"
        else:
            lines.append("not drawn: comparison: fewer than two settings have an accuracy, no seed diverged")
    said = evidence_of_training.settings(made)
    if said:
        page += f"\n### in words\n\n{bullets(said)}"
    why = {"comparison": "no normal run", "noise_to_inject": NO_PAIR}
    why["comparison_correlations"] = f"fewer than {comparisons.SEVERAL} settings of as many epochs or updates"
    for name, table in made.items():
        if table.empty:
            lines.append(f"no table: {name}: {why[name]}")
            continue
        page += f"\n### {name.replace('_', ' ')}\n\n{markdown(table)}"
        write_table(out / f"{slug}_{name}.csv", table)
    lost = points["normal_diverged"].sum()
    if lost:
        lines.append(f"not drawn: comparison: settings of which a seed diverged, {lost:g} seeds in all")
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    print(*lines, sep="\n")
    return f"\n## {dataset}, {model}, all settings\n{page}\n### runs\n\n{bullets(lines)}"


def series(points):
    """Return (the points with their `series`, what the legend calls all but b; what all points share, as texts).

    A series is told from another by no more than must be. Points of a diverged seed are left out.
    """
    points = points[(points["normal_diverged"] == 0) & points["accuracy_mean"].notna()]
    names, shared = points["optimizer"].str.upper(), []
    for key, form in {"nu": "ν {:g}", "lr": "lr {:g}", "beta": "β {:g}", "injected_noise": "noise {:g}"}.items():
        names, shared = told_apart(points[key], form, names, shared)
    for key in ("precision", "length"):
        names, shared = told_apart(points[key], "{}", names, shared)
    if points["batch_size"].nunique() == 1:
        shared.append(f"b {points['batch_size'].iloc[0]}")
    return points.assign(series=names), shared


def told_apart(values, form, names, shared):
    """Return (names, shared) with one more argument: among what is shared if all that have it have the same."""
    texts = values.map(form.format).where(values.notna(), "")
    different = sorted(set(texts) - {""})
    if len(different) > 1:
        return names + texts.where(texts == "", ", " + texts), shared
    usual = len(values) and (values == USUAL.get(values.name)).all()
    return names, shared if usual else shared + different


def note(points):
    """Return what the figure shows, and of which step its δ is, for who sees nothing else."""
    text = "A mark is a setting, the mean over its seeds, with bars from the least to the greatest. "
    if points["batch_size"].nunique() > 1:
        text += "The number beside it is b. "
    for step, what in (("delta_step", "δ is"), ("sharpness_step", "Sharpness is")):
        known = points.dropna(subset=step)
        if len(known):
            text += f"{what} measured {where(known[step], known['updates'])}. "
    return text


def where(steps, ends):
    """Return where it was measured: at these steps, of trainings with these ends."""
    others = sorted(set(steps[steps != ends]))
    if not others:
        return "where training ended"
    named = f"at step {others[0]:g}" if len(others) == 1 else "at a step that the table names"
    return named if (steps != ends).all() else f"where training ended, or else {named}"


def figure(points):
    """Draw accuracy and training loss against measured δ, sharpness and updates; None for fewer than two points.

    points: of `series`. A column of panels is there if two points have its number.
    """
    columns = {
        "delta_mean": "measured δ (parameter distance)",
        f"{comparisons.SHARPNESS}_mean": "sharpness, λ max of the Hessian",
        "updates": "updates",
    }
    columns = {key: label for key, label in columns.items() if points[key].notna().sum() >= 2}
    if not columns:
        return None
    fig, panels = plt.subplots(
        2, len(columns), figsize=(1.2 + 2.8 * len(columns), 6.5), sharex="col", sharey="row", squeeze=False
    )
    points = theory.in_order(points, "series")
    every = looks(points)
    for (key, label), column in zip(columns.items(), panels.T, strict=True):
        set_scale(column[0], "x", points[key])
        set_scale(column[1], "y", points["training_loss_mean"])
        for ax, outcome in zip(column, OUTCOMES, strict=True):
            for name, part in points.groupby("series", sort=False):
                marks(ax, part.sort_values("batch_size"), key, outcome, every[name] | {"label": name})
            ax.margins(0.12)
            ax.label_outer()
        column[1].set_xlabel(label)
    for ax, text in zip(panels[:, 0], OUTCOMES.values(), strict=True):
        ax.set_ylabel(text)
    if points["batch_size"].nunique() > 1:
        for key, column in zip(columns, panels.T, strict=True):
            for ax, outcome in zip(column, OUTCOMES, strict=True):
                name_sizes(ax, points, key, outcome)
    return fig


def looks(points):
    """Return {series: look}: colour and marker of its optimizer, filling and dashes of what it has beside it."""
    parts = {name: name.partition(", ")[::2] for name in points["series"].unique()}
    optimizers, others = (list(dict.fromkeys(found)) for found in zip(*parts.values(), strict=True))
    found = {}
    for name, (optimizer, other) in parts.items():
        i, n = others.index(other), len(FILLINGS)
        look = {"fillstyle": FILLINGS[i % n], "linestyle": axes.DASHES[(i + i // n) % len(axes.DASHES)]}
        found[name] = axes.nth_look(optimizers.index(optimizer)) | look
    return found


def set_scale(ax, axis, values):
    """Make an axis logarithmic where all its values are above 0, with limits where they are all the same."""
    values = values.dropna().astype(float)
    ax.set(**{f"{axis}scale": "log" if (values > 0).all() else "linear"})
    if values.nunique() == 1:
        at = values.iloc[0]
        room = abs(at) / 2 or 1
        ax.set(**{f"{axis}lim": (at - room, at + room)})


def marks(ax, part, key, outcome, look):
    """Draw the points of one series, joined by a thin line in the order of b, with bars over seeds."""
    part = part.dropna(subset=[key, f"{outcome}_mean"])
    spread = {}
    for side, name in (("xerr", key.removesuffix("_mean")), ("yerr", outcome)):
        if f"{name}_min" in part:
            low, mean, high = part[[f"{name}_min", f"{name}_mean", f"{name}_max"]].astype(float).to_numpy().T
            bars = np.array([mean - low, high - mean])
            spread[side] = np.where(bars > 0, bars, np.nan)  # no caps where there is no bar
    x, y = part[key].astype(float), part[f"{outcome}_mean"].astype(float)
    ax.errorbar(x, y, **spread, **look, lw=0.6, elinewidth=1, capsize=2)


def name_sizes(ax, points, key, outcome):
    """Write b beside each point, where no other stands, or not again beside the same."""
    ax.autoscale_view()  # else matplotlib does so as it draws, and the marks move
    written, points_a_pixel = [], 72 / ax.figure.dpi
    for point in points.dropna(subset=[key, f"{outcome}_mean"]).to_dict("records"):
        at, b = (float(point[key]), float(point[f"{outcome}_mean"])), point["batch_size"]
        place = ax.transData.transform(at)
        if all(other != b or np.abs(place - there).max() > NEAR for other, there, _ in written):
            spots = [place * points_a_pixel + beside for beside in BESIDE]
            free = [all((np.abs(spot - taken) >= ROOM).any() for *_, taken in written) for spot in spots]
            i = free.index(True) if any(free) else 0
            ax.annotate(f"{b}", at, BESIDE[i], textcoords="offset points", fontsize=6.5, color="0.25")
            written.append((b, place, spots[i]))
