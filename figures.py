"""From recorded runs to the paper's tables and figures, beside the published numbers: figures.py RUNS_DIR --out DIR.

Reads the run records only (never wandb) and trusts none of them: whatever is damaged is named and left out.
Runs of different data set, network, lr or β never share a figure; SGD, which has no β, joins every β.
"""

import argparse
import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import theory
from arguments import MODELS, TRAINING_IMAGES

# Section 3 of the paper: CIFAR100, lr 0.1, β 0.9. C² is at ε 0.5; b* per ε; accuracy in percent per b.
PUBLISHED = {
    ("ResNet18", "sgd"): {"c_squared": 1280, "b_star": {0.5: 512}, "accuracy": {256: 68}},
    ("ResNet18", "shb"): {"c_squared": 25.3, "k": 1.77, "b_star": {0.5: 1024, 0.7: 512, 1.0: 256}},
    ("ResNet18", "nshb"): {"c_squared": 128, "k": 4.5, "b_star": {0.5: 512}, "accuracy": {256: 65}},
    ("WideResNet-28-10", "sgd"): {"c_squared": 10},
    ("WideResNet-28-10", "shb"): {"c_squared": 0.79, "k": 1.66},
    ("WideResNet-28-10", "nshb"): {"c_squared": 1.0, "k": 4.262},
}
# What a run that did not diverge must have measured, and the arguments in which runs of one curve must agree.
OMEGA = ("omega_mean", "omega_std", "omega_skewness", "omega_excess_kurtosis", "omega_entries")
NEEDED = {
    "normal": ("accuracy", "best_accuracy", "training_loss", "max_gradient_norm"),
    "critical": ("max_gradient_norm",),
    "sampling": ("delta", "noise_norm", *OMEGA),
}
SHARED = {
    "normal": ("epochs", "max_steps", "precision"),
    "critical": ("min_epochs", "precision"),
    "sampling": ("steps", "max_steps", "full_grad_batchsize", "precision"),
}
# Okabe–Ito colours; markers and dashes tell the curves apart in grey too.
LOOKS = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": ":"},
    {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    {"color": "#56B4E9", "marker": "v", "linestyle": (0, (8, 2))},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (1, 3))},
]
LOOK = dict(zip(theory.OPTIMIZERS, LOOKS, strict=False))
DELTAS = ("delta", "measured_delta_mean")  # the columns of point_table that accuracy is set against
SIZE_LABEL, DELTA_LABEL = "batch size b (samples)", "degree of smoothing δ (parameter distance)"
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "lines.markersize": 5})
plt.rcParams["figure.constrained_layout.use"] = True


# --- reading ---


def take(mapping, key, allowed):
    """Return mapping[key] if it is in `allowed`, names or a half-open range (low, high); else ValueError."""
    value = mapping.get(key)
    if isinstance(allowed[0], str):
        good = value in allowed
    else:
        good = type(value) in (int, float) and allowed[0] <= value < allowed[1]
    if not good:
        raise ValueError(f"{key} is {value!r:.40}, allowed is {allowed}")
    return value


def read_run(folder):
    """Return one record as a flat dict. ValueError, OSError or RecursionError for whatever is wrong with it."""
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError("unfinished, it has no summary.json")
    if path.stat().st_size > 1 << 20:
        raise ValueError("summary.json is larger than 1 MiB")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(summary, dict) or not all(isinstance(summary.get(k), dict) for k in ("args", "results")):
        raise ValueError("summary.json is not an object that holds args and results")
    args, results, mode = summary["args"], summary["results"], take(summary, "mode", tuple(NEEDED))
    run = {"folder": folder, "mode": mode, "results": results, "to_eps": {}}
    run["diverged"] = take(summary, "status", ("finished", "not_reached", "diverged")) == "diverged"
    run["steps"] = take(summary, "steps", (0 if run["diverged"] or mode == "sampling" else 1, 1e300))
    for key, allowed in (
        ("dataset", tuple(TRAINING_IMAGES)),
        ("model", MODELS),
        ("optimizer", theory.OPTIMIZERS),
        ("lr", (1e-300, 1e300)),
        ("beta1", (0, 1)),
        ("batchsize", (1, 1e300)),
        ("seed", (0, 1e300)),
    ):
        run[key] = take(args, key, allowed)
    for key in ("lr", "beta1"):
        run[key] = float(f"{run[key]:.6g}")  # 0.1 · (1 − 0.9), in floats, is 0.01 to everyone
    run["shared"] = ", ".join(f"{key} {args.get(key)!r:.40}" for key in SHARED[mode])
    run["as_published"] = (args.get("epochs"), args.get("max_steps")) == (200, None)
    if mode == "critical":
        epoch = -(-TRAINING_IMAGES[run["dataset"]] // run["batchsize"])
        run["first_check"] = take(args, "min_epochs", (0, 1e300)) * epoch
        reached = results.get("steps_to_eps")
        if not isinstance(reached, dict) or not reached:
            raise ValueError("steps_to_eps is not an object with entries")
        for key, steps in reached.items():
            eps = take({"eps": float(key)}, "eps", (1e-300, 1e300))
            run["to_eps"][eps] = None if steps is None else take(reached, key, (1, run["steps"] + 1))
    if not run["diverged"]:
        for key in NEEDED[mode]:
            take(results, key, (-1e300, 1e300))
    run["max_norm"] = results.get("max_gradient_norm")
    if run["max_norm"] is not None:
        take(results, "max_gradient_norm", (0, 1e300))
    return run


def read_runs(runs_dir):
    """Return (usable runs at any depth below runs_dir, {name: reason} of the others)."""
    runs, left_out = [], {}
    for folder in sorted({p.parent for p in runs_dir.rglob("*.json") if p.name in ("args.json", "summary.json")}):
        name = ascii(str(folder.relative_to(runs_dir)))[1:-1]  # control characters must not reach a terminal
        try:
            runs.append(read_run(folder) | {"name": name})
        except (ValueError, TypeError, OSError, RecursionError) as error:
            left_out[name] = str(error)[:200]
    return runs, left_out


def combinations(runs):
    """Return the groups of runs that may share figures, each with what it leaves out and why: a run that
    disagrees with most of its mode in SHARED, and a second run of one optimizer, batch size and seed. Of two
    such runs the one that did not diverge, and went further, stays; it takes over the ε the other had reached.
    """
    groups = []
    for dataset, model, lr in sorted({(r["dataset"], r["model"], r["lr"]) for r in runs}):
        same = [r for r in runs if (r["dataset"], r["model"], r["lr"]) == (dataset, model, lr)]
        for beta in sorted({r["beta1"] for r in same if r["optimizer"] != "sgd"}) or [None]:
            members = [r for r in same if r["optimizer"] == "sgd" or r["beta1"] == beta]
            counts, left_out, seen = Counter((r["mode"], r["shared"]) for r in members), {}, {}
            usual = {mode: shared for (mode, shared), _ in reversed(counts.most_common())}
            for run in sorted(members, key=lambda r: (r["diverged"], -r["steps"])):
                if run["shared"] != usual[run["mode"]]:
                    left_out[run["name"]] = f"it has {run['shared']}; most of its mode have {usual[run['mode']]}"
                    continue
                key = (run["mode"], run["optimizer"], run["batchsize"], run["seed"])
                if (first := seen.setdefault(key, run)) is not run:
                    left_out[run["name"]] = f"same optimizer, batch size and seed as {first['name']}"
                    more = {eps: n for eps, n in run["to_eps"].items() if n or not run["diverged"]}
                    first["to_eps"] |= {eps: first["to_eps"].get(eps) or n for eps, n in more.items()}
            model_of_paper = model if dataset == "CIFAR100" and lr == 0.1 and beta in (0.9, None) else None
            groups.append(
                {
                    "slug": f"{dataset}_{model}_lr{lr:g}" + ("" if beta is None else f"_beta{beta:g}"),
                    "lr": lr,
                    "beta": beta or 0.0,
                    "runs": sorted(seen.values(), key=lambda r: r["name"]),
                    "settings": usual,
                    "left_out": left_out,
                    "published": {o: PUBLISHED.get((model_of_paper, o), {}) for o in theory.OPTIMIZERS},
                }
            )
    return groups


# --- the numbers ---


def band(name, values):
    """Return {name_mean, name_min, name_max} over seeds, None where there is no value."""
    low, high = (min(values), max(values)) if values else (None, None)
    # Rounding can put the mean of equal values beside them.
    mean = float(np.clip(np.mean(values), low, high)) if values else None
    return {f"{name}_mean": mean, f"{name}_min": low, f"{name}_max": high}


def by_point(runs, *modes):
    """Yield (optimizer, b, its runs by seed) of every point that has runs in `modes`."""
    for optimizer in theory.OPTIMIZERS:
        here = sorted((r for r in runs if r["mode"] in modes and r["optimizer"] == optimizer), key=lambda r: r["seed"])
        for b in sorted({r["batchsize"] for r in here}):
            yield optimizer, b, [r for r in here if r["batchsize"] == b]


def published_curve(published):
    """Return {(ε, b): steps} of the published SHB curve where `published` is of the same experiment, else {}."""
    if "b_star" not in published["shb"]:
        return {}
    lines = Path(__file__).with_name("published_shb_steps.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {(e, int(r["batch_size"])): int(r[f"steps_eps_{e}"]) for r in rows for e in (0.5, 0.7, 1.0)}


def critical_table(runs, published):
    """Return one row per optimizer, ε and b: steps to ε and SFO complexity (= steps × b) over seeds.

    A seed that did not reach ε enters with the steps it ran, so a mean with reached < seeds is a lower bound;
    one that diverged before counts in `seeds` but has no steps. at_first_check: seeds whose mean was ≤ ε when
    first looked at, after --min_epochs, so that their steps are only an upper bound. ratio: ours / published.
    """
    rows = []
    for optimizer, b, seeds in by_point(runs, "critical"):
        for eps in sorted({e for r in runs if r["optimizer"] == optimizer for e in r["to_eps"]}):
            asked = [(r, r["to_eps"][eps]) for r in seeds if eps in r["to_eps"]]
            steps = [n or r["steps"] for r, n in asked if n or not r["diverged"]]
            row = {"optimizer": optimizer, "eps": eps, "batch_size": b, "seeds": len(asked)}
            row |= {"reached": sum(n is not None for _, n in asked), "diverged": len(asked) - len(steps)}
            row["at_first_check"] = sum(n == r["first_check"] for r, n in asked)
            row |= band("steps", steps) | band("sfo", [n * b for n in steps])
            theirs = published.get((eps, b)) if optimizer == "shb" else None
            comparable = theirs and row["reached"] == row["seeds"]
            row |= {"published": theirs, "ratio": row["steps_mean"] / theirs if comparable else None}
            rows += [row] if asked else []
    return rows


def critical_batch_size(rows):
    """Return b* and its uncertainty from one optimizer's and ε's rows of critical_table; {} if it has none.

    Eligible are the points all of whose seeds reached ε, and after the first check; two at least. range: the b
    whose seeds' SFO overlaps that at b*; none for one seed. undecided: the b that are not eligible and whose SFO
    may be as small. edge: "<=" or ">=" where the next b below or above b* is not known to need more, so that b* is
    only a bound; "?" where neither is.
    """
    whole = [r for r in rows if r["reached"] == r["seeds"] and not r["at_first_check"]]
    if len(whole) < 2:
        return {}
    best = min(whole, key=lambda r: (r["sfo_mean"], r["batch_size"]))
    at, limit = rows.index(best), best["sfo_max"]
    lower = [0 if r["at_first_check"] or r["sfo_mean"] is None else r["sfo_mean"] for r in rows]
    undecided = [r not in whole and low <= limit for r, low in zip(rows, lower, strict=True)]
    near = [r["batch_size"] for r in whole if r["sfo_min"] <= limit and best["seeds"] > 1]
    open_below, open_above = at == 0 or undecided[at - 1], at == len(rows) - 1 or undecided[at + 1]
    return {
        "b_star": best["batch_size"],
        "edge": {(0, 0): "", (1, 0): "<=", (0, 1): ">=", (1, 1): "?"}[open_below, open_above],
        "range": " ".join(map(str, near)),
        "seeds": best["seeds"],
        "undecided": " ".join(str(r["batch_size"]) for r, open_ in zip(rows, undecided, strict=True) if open_),
    }


def constants_table(group, rows):
    """Return one row per optimizer and ε: b*, the estimated C² and K, and the bound, beside the published.

    C² comes from b* at one reference ε per optimizer, the smallest with a b* inside the grid, or else with any;
    there the bound equals b* by construction, elsewhere it is a prediction. K is the largest gradient norm of
    the optimizer's runs that did not diverge, in any mode.
    """
    out, lr, beta = [], group["lr"], group["beta"]
    for optimizer in theory.OPTIMIZERS:
        runs = [r for r in group["runs"] if r["optimizer"] == optimizer]
        largest = max((r["max_norm"] for r in runs if not r["diverged"] and r["max_norm"] is not None), default=None)
        mine = [r for r in rows if r["optimizer"] == optimizer]
        every_eps = sorted({r["eps"] for r in mine})
        stars = {eps: critical_batch_size([r for r in mine if r["eps"] == eps]) for eps in every_eps}
        usable = sorted((star["edge"] != "", eps) for eps, star in stars.items() if star)
        reference, c2 = None, None
        if usable and (optimizer, beta) != ("shb", 0.0):  # where SHB's bound is singular
            reference = usable[0][1]
            c2 = float(theory.c_squared_from_b(optimizer, lr, stars[reference]["b_star"], reference, beta))
        paper = group["published"][optimizer]
        for eps in every_eps or [None] * bool(runs):
            bound = c2 and float(theory.critical_batch_size_bound(optimizer, lr, c2, eps, beta))
            row = {"optimizer": optimizer, "eps": eps, "b_star": None} | stars.get(eps, {})
            row |= {"bound": bound, "reference_eps": reference, "c_squared": c2, "k": largest}
            row["published_b_star"] = paper.get("b_star", {}).get(eps)
            out.append(row | {f"published_{key}": paper.get(key) for key in ("c_squared", "k")})
    return out


def point_table(group, constants):
    """Return one row per optimizer and b: accuracy (%) and training loss over seeds, and δ three ways.

    delta: the formula with our C² and K; published_delta: with the paper's; measured_delta: lr × ‖ω‖, sampling.
    published_accuracy is of 200 epochs, and only shown beside runs of as many.
    """
    rows = []
    for optimizer, b, runs in by_point(group["runs"], *NEEDED):
        trained, sampled = ([r for r in runs if r["mode"] == mode] for mode in ("normal", "sampling"))
        good = [r for r in trained if not r["diverged"]]
        row = {"optimizer": optimizer, "batch_size": b, "seeds": len(trained), "diverged": len(trained) - len(good)}
        for key in ("accuracy", "best_accuracy", "training_loss"):
            row |= band(key, [r["results"][key] for r in good])
        paper = group["published"][optimizer]
        comparable = good and all(r["as_published"] for r in good)
        row["published_accuracy"] = paper.get("accuracy", {}).get(b) if comparable else None
        ours = next((c for c in constants if c["optimizer"] == optimizer and c["c_squared"]), {})
        for key, source in (("delta", ours), ("published_delta", paper)):
            c2, k = source.get("c_squared"), source.get("k")
            known = c2 is not None and (k is not None or optimizer != "shb")  # K is in SHB's δ only
            delta = known and theory.degree_of_smoothing(optimizer, group["lr"], b, c2, k or 0.0, group["beta"])
            row[key] = float(delta) if known else None
        measured = [r["results"]["delta"] for r in sampled if not r["diverged"]]
        row |= band("measured_delta", measured) | {"sampling_seeds": len(sampled)}
        rows.append(row | {"sampling_diverged": len(sampled) - len(measured)})
    return rows


def correlations(points):
    """Return Pearson's r and Spearman's ρ of mean accuracy with δ, over the points (optimizer, b), and their n.

    A point one of whose seeds diverged has no accuracy that stands for it, and is left out.
    """
    rows, points = [], [p for p in points if not p["diverged"]]
    for key in DELTAS:
        for who in (*theory.OPTIMIZERS, "all"):
            pairs = [(p[key], p["accuracy_mean"]) for p in points if who in (p["optimizer"], "all")]
            pairs = np.array([pair for pair in pairs if None not in pair]).reshape(-1, 2)
            row = {"delta": key, "optimizer": who, "n": len(pairs)}
            if len(pairs) >= 3 and np.all(np.ptp(pairs, axis=0) > 0):
                for name, test in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
                    row[name] = float(test(*pairs.T)[0])
            rows += [row] if len(pairs) else []
    return rows


def normality(values):
    """Return (z, row): the sorted standardized entries (float64), and how far they are from normal: D'Agostino's
    K² and the Kolmogorov–Smirnov distance to the fitted normal, over every entry. ValueError for entries that no
    normal could fit.
    """
    z = np.sort(values).astype(np.float64)
    if len(z) < 20 or not np.all(np.isfinite(z)) or z[0] == z[-1]:
        raise ValueError("omega.npy: fewer than 20 entries, not all finite, or all equal")
    z = (z - z.mean()) / z.std()
    k2, p = stats.normaltest(z)
    distance = stats.ks_1samp(z, stats.norm.cdf, method="asymp").statistic
    return z, {"k2": float(k2), "k2_p": float(p), "ks_distance": float(distance)}


def envelope(norms, bins=600):
    """Return (first, last, low, high, mean): the steps of <= `bins` log-spaced bins, the least and greatest norm
    in each, so that no excursion hides, and the mean of all norms up to its last step.
    """
    starts = np.unique(np.round(np.geomspace(1, len(norms) + 1, bins + 1)).astype(int))
    first, last = starts[:-1], starts[1:] - 1
    mean = np.cumsum(norms, dtype=np.float64)[last - 1] / last
    return first, last, np.minimum.reduceat(norms, first - 1), np.maximum.reduceat(norms, first - 1), mean


def as_rows(name, **arrays):
    """Return the arrays, equally long, as rows that begin with `name`."""
    return [{"name": name} | dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)]


# --- the drawings: each returns a figure, or None where there is nothing to draw ---


def curve(ax, rows, key, **look):
    """Draw key's mean over seeds against b with its min–max band, and a cross where a seed diverged.

    The curve breaks where there is no value, or only a lower bound.
    """
    ax.set_xscale("log", base=2)
    ax.set_xlabel(SIZE_LABEL)
    columns = ("batch_size", f"{key}_mean", f"{key}_min", f"{key}_max")
    values = np.array([[r[c] for c in columns] for r in rows], float).reshape(-1, 4)  # None becomes nan
    values[[is_bound(r) for r in rows], 1:] = np.nan
    b, mean, low, high = values.T
    if not np.all(np.isnan(mean)):
        ax.plot(b, mean, **look)
        ax.fill_between(b, low, high, color=look["color"], alpha=0.25, linewidth=0)
    for row in rows:
        if row["diverged"]:  # with no seed left to place it, on the floor
            y = row[f"{key}_mean"]
            place = (ax.get_xaxis_transform(), 0.03) if y is None else (ax.transData, y)
            ax.plot(row["batch_size"], place[1], "x", color=look["color"], ms=9, mew=2, transform=place[0])
            ax.plot([], [], "x", color="0.3", ms=9, mew=2, label="a seed diverged")


def is_bound(row):
    """Whether a row's steps are only a lower bound, because some seed neither reached ε nor diverged."""
    return row.get("reached", row["seeds"]) + row["diverged"] < row["seeds"]


def draw_steps(rows, constants, published):
    """Draw steps to ε and SFO complexity against b: a column per optimizer, a curve per ε."""
    names, every_eps = list(dict.fromkeys(r["optimizer"] for r in rows)), sorted({r["eps"] for r in rows})
    if not names:
        return None
    size = (1 + 3.2 * len(names), 6.5)
    fig, axes = plt.subplots(2, len(names), figsize=size, sharex=True, sharey="row", squeeze=False)
    for line, key in zip(axes, ("steps", "sfo"), strict=True):
        for ax, name in zip(line, names, strict=True):
            for i, eps in enumerate(every_eps):
                part = [r for r in rows if (r["optimizer"], r["eps"]) == (name, eps)]
                star = next(c for c in constants if (c["optimizer"], c["eps"]) == (name, eps)) if part else {}
                look = LOOKS[i % len(LOOKS)] | {"label": f"ε = {eps:g}"}
                theirs = {b: n * (b if key == "sfo" else 1) for (e, b), n in published.items() if e == eps}
                draw_one_eps(ax, part, key, star, look, theirs if name == "shb" else {})
            ax.set(yscale="log", title=name.upper() if key == "steps" else "")
            ax.label_outer()
    axes[0, 0].set_ylabel("steps until mean ‖g‖ ≤ ε")
    axes[1, 0].set_ylabel("SFO complexity = steps × b (gradients)")
    return fig


def draw_one_eps(ax, rows, key, star, look, theirs):
    """Draw the curve of one optimizer and ε with its lower bounds, b*, the theory's bound, the published curve."""
    curve(ax, rows, key, **look)
    hollow = {"linestyle": "", "mfc": "none", "mec": "k", "zorder": 5}
    arrow = {"marker": r"$\uparrow$", "ms": 10, "linestyle": ""}
    for r in filter(is_bound, rows):
        ax.plot(r["batch_size"], r[f"{key}_mean"], **arrow, color=look["color"])
        ax.plot([], [], **arrow, color="0.3", label="lower bound: a seed did not reach ε")
    if theirs:
        ax.plot(theirs.keys(), theirs.values(), "-", marker=".", color="0.4", lw=0.8, label="published SHB")
    if star.get("b_star"):
        y_at = {r["batch_size"]: r[f"{key}_mean"] for r in rows if r["reached"] == r["seeds"]}
        ax.plot(star["b_star"], y_at[star["b_star"]], "o", ms=12, **hollow, label="measured b*")
        if star["bound"]:
            y = np.exp(np.interp(np.log(star["bound"]), np.log([*y_at]), np.log([*y_at.values()])))
            ax.plot(star["bound"], y, "s", ms=9, **hollow, label="theory's bound; C² from b* at the reference ε")


def draw_accuracy(points):
    """Draw final test accuracy and training loss against b."""
    if not any(p["seeds"] for p in points):
        return None
    fig, axes = plt.subplots(1, 2, figsize=(8, 4))
    for ax, key in zip(axes, ("accuracy", "training_loss"), strict=True):
        for name, look in LOOK.items():
            part = [p for p in points if p["optimizer"] == name and p["seeds"]]
            curve(ax, part, key, **look, label=name.upper())
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].set(ylabel="training loss (nats)", yscale="log")
    return fig


def draw_delta(points):
    """Draw δ against b: our formula as a line, measured as large hollow marks, the paper's constants in grey."""
    if not any(p["delta"] or p["sampling_seeds"] for p in points):
        return None
    fig, ax = plt.subplots(figsize=(6.5, 5))
    for name, look in LOOK.items():
        part = [p for p in points if p["optimizer"] == name]
        for key, label, style in (
            ("delta", "formula", {"lw": 4 if name == "sgd" else 1.5}),  # NSHB's may lie on SGD's
            ("published_delta", "paper's C², K", {"color": "0.6", "lw": 0.9, "ms": 3}),
        ):
            if any(p[key] for p in part):
                there = [(p["batch_size"], p[key]) for p in part]
                ax.plot(*zip(*there, strict=True), **look | style, label=f"{name.upper()}, {label}")
        sampled = [p | {"diverged": p["sampling_diverged"]} for p in part if p["sampling_seeds"]]
        style = {"label": f"{name.upper()}, measured", "mfc": "none", "ms": 9, "lw": 0.6}
        curve(ax, sampled, "measured_delta", **look | style)
    ax.set(xlabel=SIZE_LABEL, ylabel=DELTA_LABEL, yscale="log")
    ax.set_xscale("log", base=2)
    return fig


def draw_accuracy_delta(points, coefficients):
    """Draw test accuracy against δ, one panel for the formula's δ and one for the measured, as far as known."""
    known = {key: [p for p in points if None not in (p[key], p["accuracy_mean"])] for key in DELTAS}
    known = {key: [p for p in part if not p["diverged"]] for key, part in known.items()}
    known = {key: part for key, part in known.items() if part}
    if not known:
        return None
    fig, axes = plt.subplots(1, len(known), figsize=(1 + 4 * len(known), 4.4), sharey=True, squeeze=False)
    for ax, (key, part) in zip(axes[0], known.items(), strict=True):
        for name in dict.fromkeys(p["optimizer"] for p in part):
            columns = (key, "accuracy_mean", "accuracy_min", "accuracy_max")
            x, y, low, high = np.array([[p[c] for c in columns] for p in part if p["optimizer"] == name]).T
            style = LOOK[name] | {"linestyle": "", "capsize": 2, "label": name.upper()}
            ax.errorbar(x, y, [y - low, high - y], **style)
        title = ["δ from the formula" if key == "delta" else "δ measured, lr × ‖ω‖"]
        for c in coefficients:
            if c["delta"] == key and "pearson" in c:
                who = c["optimizer"].upper()
                title.append(f"{who}: Pearson {c['pearson']:+.2f}, Spearman {c['spearman']:+.2f}, n = {c['n']}")
        ax.set(title="\n".join(title), xscale="log", xlabel=DELTA_LABEL)
    axes[0, 0].set_ylabel("test accuracy (%)")
    return fig


def draw_omega(runs, rows, left_out):
    """Draw histogram and Q–Q plot of ω for one run per optimizer; return (figure, histogram, quantiles).

    b is the middle one of those that all optimizers sampled (else of its own), the seed the lowest; the next
    where that cannot be read. Each drawn run's tests go into its row of `rows`; an unreadable ω into `left_out`.
    """
    at = {}
    for optimizer, b, seeds in by_point([r for r in runs if not r["diverged"]], "sampling"):
        at.setdefault(optimizer, {})[b] = seeds
    common = set.intersection(*map(set, at.values())) if at else set()
    drawn, bars, quantiles = {}, [], []
    for optimizer, sizes in at.items():
        middle = sorted(common or sizes)[len(common or sizes) // 2]
        order = sorted(sizes, key=lambda b: (b not in common, abs(np.log(b / middle))))
        for run in (run for b in order for run in sizes[b]):
            try:
                omega = np.lib.format.open_memmap(run["folder"] / "omega.npy", mode="r")  # never unpickles
                if omega.dtype != np.float32 or omega.shape != (run["results"]["omega_entries"],):
                    raise ValueError(f"omega.npy is {omega.dtype} {omega.shape}, not float32 (omega_entries,)")
                z, tests = normality(omega)
            except (ValueError, OSError, OverflowError) as error:
                left_out[f"{run['name']} (ω only)"] = str(error)
                continue
            row = next(row for row in rows if row["name"] == run["name"])
            row |= tests
            edges = np.linspace(-6, 6, 121)
            density = np.histogram(z, edges)[0] / len(z) / np.diff(edges)
            tail = np.unique(np.round(np.geomspace(1, (len(z) + 1) // 2, 150)).astype(int))
            rank = np.union1d(tail, len(z) + 1 - tail)
            drawn[optimizer] = (row, edges, density, stats.norm.ppf((rank - 0.5) / len(z)), z[rank - 1])
            break
    if not drawn:
        return None, [], []
    size = (1 + 3.2 * len(drawn), 6.6)
    fig, axes = plt.subplots(2, len(drawn), figsize=size, sharey="row", squeeze=False)
    for (top, bottom), (name, (row, edges, density, expected, observed)) in zip(axes.T, drawn.items(), strict=True):
        middle, color = (edges[1:] + edges[:-1]) / 2, LOOK[name]["color"]
        normal = stats.norm.pdf(middle)
        top.stairs(density, edges, fill=True, color=color, alpha=0.5, label="entries of ω")
        top.plot(middle, normal, "k--", lw=1, label="normal")
        title = f"{name.upper()}, b = {row['batch_size']}, seed {row['seed']}, {row['omega_entries']:,} entries"
        top.set(yscale="log", xlabel="(ω_i − mean) / std", ylim=(1e-8, 3e3), title=title)
        lines = [f"{key.removeprefix('omega_').replace('_', ' ')} {row[key]:.3g}" for key in OMEGA[:4]]
        top.text(0.02, 0.98, "\n".join(lines), transform=top.transAxes, va="top", fontsize=8)
        tests = f"K² {row['k2']:.3g}\nKS distance {row['ks_distance']:.3g}"
        top.text(0.98, 0.98, tests, transform=top.transAxes, va="top", ha="right", fontsize=8)
        bottom.plot(expected, observed, LOOK[name]["marker"], color=color, ms=3, label="quantiles of ω")
        bottom.plot(expected, expected, "k--", lw=1)
        bottom.set(xlabel="quantile of the normal")
        bars += as_rows(row["name"], left=edges[:-1], right=edges[1:], density=density, normal=normal)
        quantiles += as_rows(row["name"], normal_quantile=expected, omega_quantile=observed)
    axes[0, 0].set_ylabel("density of standardized entries")
    axes[1, 0].set_ylabel("quantile of standardized entries")
    return fig, bars, quantiles


def draw_gradients(runs, left_out):
    """Draw gradient norm and running mean over steps at the first, middle and last b per optimizer, lowest seed.

    Returns (figure, table of the bins drawn). A history of another length than the run's goes to `left_out`.
    """
    at, table, every_eps = {}, [], sorted({eps for r in runs for eps in r["to_eps"]})
    for optimizer, b, seeds in by_point([r for r in runs if not r["diverged"]], "critical"):
        for run in seeds:
            path = run["folder"] / "gradient_norms.f32"
            if path.is_file() and path.stat().st_size == 4 * run["steps"]:
                at.setdefault(optimizer, {}).setdefault(b, run)
            else:
                reason = f"gradient_norms.f32 does not hold {run['steps']} float32"
                left_out[f"{run['name']} (gradient history only)"] = reason
    if not at:
        return None, []
    picks = {o: sorted({min(bs), sorted(bs)[len(bs) // 2], max(bs)}) for o, bs in at.items()}
    width = max(map(len, picks.values()))
    size = (1 + 3.2 * width, 1 + 2.6 * len(picks))
    fig, axes = plt.subplots(len(picks), width, figsize=size, sharey=True, squeeze=False)
    for line, (name, sizes) in zip(axes, picks.items(), strict=True):
        line[0].set_ylabel("gradient norm ‖g‖")
        for ax in line[len(sizes) :]:
            ax.set_axis_off()
        for ax, b in zip(line, sizes, strict=False):
            run, style = at[name][b], {"color": LOOK[name]["color"], "alpha": 0.4, "lw": 0.7, "step": "pre"}
            bins = envelope(np.fromfile(run["folder"] / "gradient_norms.f32", "<f4"))
            first, last, low, high, mean = bins
            if not np.all(np.isfinite(bins)):
                left_out[f"{run['name']} (gradient history only)"] = "gradient_norms.f32 is not all finite"
                ax.set_axis_off()
                continue
            ax.fill_between(last, low, high, **style, label="‖g‖, least to greatest")
            ax.plot(last, mean, "k", lw=1.2, label="running mean of ‖g‖")
            for eps, steps in run["to_eps"].items():
                look = LOOKS[every_eps.index(eps) % len(LOOKS)]
                style = {"color": "0.3", "lw": 0.8, "linestyle": look["linestyle"]}
                ax.axhline(eps, **style, label=f"ε = {eps:g}")
                if steps:
                    ax.plot(steps, eps, "ok", mfc="white", ms=6, label="ε reached")
            ax.set(xscale="log", yscale="log", xlabel="step", title=f"{name.upper()}, b = {b}, seed {run['seed']}")
            table += as_rows(
                run["name"], first_step=first, last_step=last, norm_min=low, norm_max=high, running_mean=mean
            )
    return (fig, table) if table else (None, [])


# --- the files ---

METHOD = """# Ours beside the published numbers

Bands are the least and greatest seed, means are over seeds. A seed that did not reach ε enters with the steps
it ran: such a point (reached < seeds) is a lower bound. A seed that diverged only marks its point. One that had
reached ε when first looked at, after --min_epochs (at first check), may have done so before. None of these is
eligible for b*, the point with the least mean SFO complexity (steps × b). Batch sizes are a grid, so the true
minimum lies anywhere between b*'s neighbours. range: the b whose seeds' SFO overlaps that at b* (none with one
seed: its spread is unknown). undecided: not eligible, and its SFO may be as small. edge <= or >=: the next
smaller or larger b is not known to need more, so b* is only a bound, and so is its C²; ?: neither is. C² is
solved from b* at one reference ε per optimizer, the smallest whose b* is not such a bound, or else the smallest
with a b*: there the theory's bound equals b* by construction; elsewhere it is a prediction (drawn at the
curve's end if it lies beyond). K is the largest gradient norm in any run of the optimizer that did not diverge.
measured δ is lr × ‖ω‖. With C² from b*, the formula's δ of SGD and of NSHB is ε√(η b*/b): the same curve where
their b* is the same. Within one optimizer it falls with b, so its rank correlation with accuracy is minus that
of b; Pearson's r is of δ, not log δ; the points are not independent, so no p-values are given. ω: K²
(D'Agostino) and the KS distance to the fitted normal are over all entries of the runs drawn; with millions of
entries look at distance and kurtosis, as any p-value is 0.
"""


def write(path, data):
    """Write bytes so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_figure(path, fig):
    """Write the figure as PNG and PDF, with one legend of all its labels, each once, below it."""
    found = {}
    for ax in fig.axes:
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=int(fig.get_figwidth() / 2))
    for kind in ("png", "pdf"):
        image = io.BytesIO()
        fig.savefig(image, format=kind, dpi=150)
        write(path.with_name(f"{path.name}.{kind}"), image.getvalue())
    plt.close(fig)


def save_table(path, rows):
    """Write the rows, dicts, as CSV with every key that any of them has."""
    text = io.StringIO(newline="")
    sheet = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)
    write(path.with_name(f"{path.name}.csv"), text.getvalue().encode())


def markdown(rows):
    """Return the rows as a Markdown table without its empty columns; a band is one cell, mean [min, max]."""

    def cell(row, key):
        value = row.get(key, row.get(f"{key}_mean"))
        if value is None or value == "":
            return "–"
        text = value if isinstance(value, str) else format(value, ".4g" if abs(value) < 1e4 else ".0f")
        low, high = (cell(row, f"{key}_{end}") if f"{key}_{end}" in row else text for end in ("min", "max"))
        return text if low == high else f"{text} [{low}, {high}]"

    band_of = {key: stem for row in rows for key in row if f"{(stem := key.removesuffix('_mean'))}_min" in row}
    keys = dict.fromkeys(band_of.get(key, key) for row in rows for key in row)
    keys = [key for key in keys if not key.endswith(("_min", "_max")) and any(cell(row, key) != "–" for row in rows)]
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [[cell(row, key) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(group, out):
    """Write one combination's figures and tables, say on stdout what went into them; return its part of report.md."""
    runs, left_out, published = group["runs"], group["left_out"], published_curve(group["published"])
    rows = critical_table(runs, published)
    constants = constants_table(group, rows)
    points = point_table(group, constants)
    coefficients = correlations(points)
    omega = [
        {"name": r["name"], "optimizer": r["optimizer"], "batch_size": r["batchsize"], "seed": r["seed"]}
        | {key: r["results"][key] for key in OMEGA}
        for r in runs
        if r["mode"] == "sampling" and not r["diverged"]
    ]
    omega_figure, bars, quantiles = draw_omega(runs, omega, left_out)
    gradient_figure, bins = draw_gradients(runs, left_out)
    figures = {
        "steps": (draw_steps(rows, constants, published), "no critical runs that can be read"),
        "accuracy": (draw_accuracy(points), "no normal runs"),
        "delta": (draw_delta(points), "neither a C², from critical runs, nor sampling runs"),
        "accuracy_delta": (draw_accuracy_delta(points, coefficients), "no point has both accuracy and δ"),
        "omega": (omega_figure, "no sampling run with a sound omega.npy"),
        "gradients": (gradient_figure, "no critical run with a sound gradient_norms.f32"),
    }
    told = {"critical_batch_size": constants, "points": points, "correlations": coefficients}
    told |= {"steps": rows, "omega": omega}
    drawn_only = {"omega_histogram": bars, "omega_qq": quantiles, "gradients": bins}
    text, lines = f"\n## {group['slug']}\n", [f"{group['slug']}: {len(runs)} runs used"]
    for name, (fig, why) in figures.items():
        if fig:
            save_figure(out / f"{group['slug']}_{name}", fig)
            text += f"\n![{name}]({group['slug']}_{name}.png)"
        else:
            lines.append(f"not drawn: {name}: {why}")
    for name, table in (told | drawn_only).items():
        if table:
            save_table(out / f"{group['slug']}_{name}", table)
            text += f"\n\n### {name.replace('_', ' ')}\n\n{markdown(table)}" if name in told else ""
    lines += [f"{mode} runs: {shared}" for mode, shared in sorted(group["settings"].items())]
    lines += [f"used: {run['name']}" + " (diverged: marked only)" * run["diverged"] for run in runs]
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    print(*lines, sep="\n")
    return text + "\n### runs\n\n" + "".join(f"- {line}\n" for line in lines)


def main():
    """Read RUNS_DIR, write DIR. Exit status 2, and nothing written, for a bad argument or no usable run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, as main.py
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="run records, at any depth below it")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("figures"), help="default: figures")
    args = parser.parse_args()
    shown = f"argument RUNS_DIR: got {str(args.runs_dir)!r}, allowed is a directory with at least one usable run"
    if not args.runs_dir.is_dir():
        parser.error(f"{shown}; this is no directory")
    runs, damaged = read_runs(args.runs_dir)
    if not runs:
        parser.error("; ".join([shown, *(f"{name}: {reason}" for name, reason in list(damaged.items())[:3])]))
    lines = [f"left out: {name}: {reason}" for name, reason in damaged.items()]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = METHOD + "".join(draw(group, args.out) for group in combinations(runs))
        text += "\n## damaged or unfinished runs\n\n" + "".join(f"- {line}\n" for line in lines)
        write(args.out / "report.md", text.encode())
    except OSError as error:
        parser.error(f"argument --out: got {str(args.out)!r}, allowed is a directory to write in ({error.strerror})")
    print(*lines, f"written: {args.out / 'report.md'}", sep="\n")


if __name__ == "__main__":
    main()
