"""From recorded runs to the paper's tables and figures, beside the published numbers: figures.py RUNS_DIR --out DIR.

Reads the run records only (never wandb) and trusts none of them: whatever is damaged is named and left out.
Runs of different data set, network, lr or β never share a figure; SGD, which has no β, joins every β.
"""

import argparse
import contextlib
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
from matplotlib import ticker
from scipy import stats

import theory
from arguments import MODELS, TRAINING_IMAGES, number, usable_streams

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
PARTS = ("noise_norm", "gradient_noise_norm", "direction_norm", "full_gradient_norm", "cosine")
OMEGA = ("omega_mean", "omega_std", "omega_skewness", "omega_excess_kurtosis", "omega_entries")
NEEDED = {
    "normal": ("accuracy", "best_accuracy", "training_loss", "max_gradient_norm"),
    "critical": ("max_gradient_norm",),
    "sampling": ("delta", "noise_norm", "full_gradient_norm", *OMEGA),
}
AS_PUBLISHED = {
    "normal": {"epochs": 200, "max_steps": None, "precision": "default"},
    "critical": {"min_epochs": 11, "precision": "default"},
    "sampling": {},
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
DELTAS = ("delta_formula", "delta_measured_mean")  # the columns of point_table that accuracy is set against
# What stands for a point whose steps are no measurement: the arrow, and its name in the legend.
ARROWS = {
    "lower bound": (r"$\uparrow$", "lower bound: a seed did not reach ε"),
    "upper bound": (r"$\downarrow$", "upper bound: ε reached at the first check"),
    "undetermined": (r"$\updownarrow$", "undetermined: one seed at the first check, one not at all"),
}
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
    run = {"folder": folder, "mode": mode, "results": results, "to_eps": {}, "checked": {}}
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
    run["as_published"] = all(args.get(key) == value for key, value in AS_PUBLISHED[mode].items())
    if mode == "critical":
        read_steps(run, args, results)
    needed = () if run["diverged"] else NEEDED[mode]
    optional = [key for key in ("max_gradient_norm", *PARTS) if results.get(key) is not None]
    for key in (*needed, *optional):
        take(results, key, (0 if key.endswith("norm") else -1e300, 1e300))
    return run


def read_steps(run, args, results):
    """Add to a critical run the first step at which ε is checked, the steps to each ε, and those it was checked for.

    to_eps: {ε: step or None}; checked: {ε: steps}, here all that the run made. ValueError for what is wrong.
    """
    epoch = -(-TRAINING_IMAGES[run["dataset"]] // run["batchsize"])
    run["first_check"] = max(1, int(take(args, "min_epochs", (0, 1e300)) * epoch))
    reached = results.get("steps_to_eps")
    if not isinstance(reached, dict) or not reached:
        raise ValueError("steps_to_eps is not an object with entries")
    for key, steps in reached.items():
        eps = take({"eps": float(key)}, "eps", (1e-300, 1e300))
        run["to_eps"][eps] = None if steps is None else take(reached, key, (1, run["steps"] + 1))
        run["checked"][eps] = run["steps"]


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


def history(run):
    """Return ‖g_t‖ of every step, float32, from gradient_norms.f32. ValueError or OSError where it is not sound."""
    path = run["folder"] / "gradient_norms.f32"
    if not path.is_file() or path.stat().st_size != 4 * run["steps"]:
        raise ValueError(f"gradient_norms.f32 does not hold {run['steps']} float32")
    norms = np.fromfile(path, "<f4")
    if not np.all(np.isfinite(norms) & (norms >= 0)):
        raise ValueError("gradient_norms.f32 is not all finite and >= 0")
    return norms


def ask_history(run, every_eps):
    """Add to a critical run the exact steps to each ε, by main.py's rule: the first step, from the first check on,
    at which the mean of all norms so far (float64) is at most ε. Raises what `history` does.
    """
    if not every_eps:
        return
    sums = np.cumsum(history(run), dtype=np.float64)
    means = sums / np.arange(1, len(sums) + 1)
    for eps in every_eps:
        run["to_eps"][eps] = theory.first_crossing(means, 1, eps, run["first_check"])
        run["checked"][eps] = run["steps"]


def choose_eps(runs, wanted):
    """Let each critical run answer for the ε in `wanted` and no other; return {run and ε: why it cannot answer}."""
    unable = {}
    for run in (r for r in runs if r["mode"] == "critical"):
        run["to_eps"] = {eps: steps for eps, steps in run["to_eps"].items() if eps in wanted}
        missing = [eps for eps in wanted if eps not in run["to_eps"]]
        try:
            ask_history(run, missing)
        except (ValueError, OSError) as error:
            shown = ", ".join(f"{eps:g}" for eps in missing)
            unable[f"{run['name']} (ε = {shown} only)"] = f"not in its record, and {error}"
    return unable


def merge(run, other):
    """Add to a critical run what `other`, of the same point and seed, knows of ε; never more than was checked.

    An ε that only `other` was asked is read from the history of `run`; without one, `other`'s answer stands, with
    the steps that `other` ran. Where both were asked, `other` adds only a step beyond those that `run` made. An
    ε that `other` diverged without is unknown, unless `run` diverged too.
    """
    with contextlib.suppress(ValueError, OSError):  # without a sound history the answers of `other` are all there is
        ask_history(run, [eps for eps in other["to_eps"] if eps not in run["to_eps"]])
    for eps, steps in other["to_eps"].items():
        if eps not in run["to_eps"]:
            new = steps is not None or other["diverged"] == run["diverged"]
        else:
            new = steps is not None and run["to_eps"][eps] is None and steps > run["checked"][eps]
        if new:
            run["to_eps"][eps], run["checked"][eps] = steps, other["checked"][eps]


def combinations(runs):
    """Return the groups of runs that may share figures, each with what it leaves out and why: a run that
    disagrees with most of its mode in SHARED, and a second run of one optimizer, batch size and seed. Of two
    such runs the one that did not diverge, and went further, stays, and `merge` adds what the other knows.
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
                    merge(first, run)
            model_of_paper = model if dataset == "CIFAR100" and lr == 0.1 and beta in (0.9, None) else None
            groups.append(
                {
                    "slug": f"{dataset}_{model}_lr{lr:g}" + ("" if beta is None else f"_beta{beta:g}"),
                    "title": f"{dataset}, {model}, lr {lr:g}" + ("" if beta is None else f", β {beta:g}"),
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

    A seed that did not reach ε enters with the steps it was checked for; one that diverged before counts in
    `critical_seeds` but has no steps. at_first_check: seeds whose mean was ≤ ε when first looked at, after
    --min_epochs, so that their steps are only an upper bound. checked: the steps of the runs that the row is from.
    ratio: ours / published, where all of it is measured, with the published settings.
    """
    rows = []
    for optimizer, b, seeds in by_point(runs, "critical"):
        for eps in sorted({e for r in seeds for e in r["to_eps"]}):
            asked = [r for r in seeds if eps in r["to_eps"]]
            whole = [r for r in asked if r["to_eps"][eps] is not None]
            missed = [r for r in asked if r["to_eps"][eps] is None and not r["diverged"]]
            early = [r for r in whole if r["to_eps"][eps] == r["first_check"] > 1]
            steps = [r["to_eps"][eps] for r in whole] + [r["checked"][eps] for r in missed]
            row = {"optimizer": optimizer, "eps": eps, "batch_size": b, "critical_seeds": len(asked)}
            row |= {"reached": len(whole), "diverged": len(asked) - len(steps), "at_first_check": len(early)}
            row |= band("steps", steps) | {"steps_are": standing(steps, missed, early)}
            row |= band("sfo", [n * b for n in steps]) | band("checked", [r["checked"][eps] for r in asked])
            theirs = published.get((eps, b)) if optimizer == "shb" else None
            comparable = (
                theirs and row["reached"] == len(asked) and not early and all(r["as_published"] for r in asked)
            )
            rows.append(row | {"published": theirs, "ratio": row["steps_mean"] / theirs if comparable else None})
    return rows


def standing(steps, missed, early):
    """Return what the mean of `steps` is, some of them of seeds that missed ε or had it too early; None for none."""
    if not steps:
        return None
    if missed and early:
        return "undetermined"
    return "lower bound" if missed else "upper bound" if early else "measured"


def critical_batch_size(rows):
    """Return b* and its uncertainty from one optimizer's and ε's rows of critical_table; {} if it has none.

    Eligible are the points all of whose seeds reached ε, and after the first check; two at least. range: the b
    whose seeds' SFO overlaps that at b*; none for one seed. undecided: the b that are not eligible and whose SFO
    may be as small. edge: "<=" or ">=" where the next b below or above b* is not known to need more, so that b* is
    only a bound; "?" where neither is.
    """
    whole = [r for r in rows if r["reached"] == r["critical_seeds"] and not r["at_first_check"]]
    if len(whole) < 2:
        return {}
    best = min(whole, key=lambda r: (r["sfo_mean"], r["batch_size"]))
    at, limit = rows.index(best), best["sfo_max"]
    lower = [0 if r["at_first_check"] or r["sfo_mean"] is None else r["sfo_mean"] for r in rows]
    undecided = [r not in whole and low <= limit for r, low in zip(rows, lower, strict=True)]
    near = [r["batch_size"] for r in whole if r["sfo_min"] <= limit and best["critical_seeds"] > 1]
    open_below, open_above = at == 0 or undecided[at - 1], at == len(rows) - 1 or undecided[at + 1]
    return {
        "b_star": best["batch_size"],
        "edge": {(0, 0): "", (1, 0): "<=", (0, 1): ">=", (1, 1): "?"}[open_below, open_above],
        "range": " ".join(map(str, near)),
        "critical_seeds": best["critical_seeds"],
        "undecided": " ".join(str(r["batch_size"]) for r, open_ in zip(rows, undecided, strict=True) if open_),
    }


def largest_full_gradient(runs):
    """Return K = max ‖∇f‖ as {k, k_run, k_step}, over the measured full gradients of runs that did not diverge.

    A run has measured one if its results hold full_gradient_norm, at its last step; until now those of sampling.
    A largest mini-batch norm is no stand-in: at small b it is many times as large.
    """
    norm = "full_gradient_norm"
    measured = [r for r in runs if not r["diverged"] and r["results"].get(norm) is not None]
    if not measured:
        return {"k": None, "k_run": None, "k_step": None}
    run = max(measured, key=lambda r: r["results"][norm])
    return {"k": run["results"][norm], "k_run": run["name"], "k_step": run["steps"]}


def constants_table(group, rows):
    """Return one row per optimizer and ε: b*, the estimated C² and K, and the bound, beside the published.

    C² comes from b* at one reference ε per optimizer, the smallest with a b* inside the grid, or else with any
    (c_squared_from says which b*); there the bound equals b* by construction, elsewhere it is a prediction.
    """
    out, lr, beta = [], group["lr"], group["beta"]
    for optimizer in theory.OPTIMIZERS:
        runs = [r for r in group["runs"] if r["optimizer"] == optimizer]
        mine = [r for r in rows if r["optimizer"] == optimizer]
        every_eps = sorted({r["eps"] for r in mine})
        stars = {eps: critical_batch_size([r for r in mine if r["eps"] == eps]) for eps in every_eps}
        usable = sorted((star["edge"] != "", eps) for eps, star in stars.items() if star)
        reference, c2, source = None, None, None
        if usable and (optimizer, beta) != ("shb", 0.0):  # where SHB's bound is singular
            reference = usable[0][1]
            star = stars[reference]
            source = f"b* {star['edge'] or '='} {star['b_star']}"
            c2 = float(theory.c_squared_from_b(optimizer, lr, star["b_star"], reference, beta))
        paper, largest = group["published"][optimizer], largest_full_gradient(runs)
        for eps in every_eps or [None] * bool(runs):
            bound = c2 and float(theory.critical_batch_size_bound(optimizer, lr, c2, eps, beta))
            row = {"optimizer": optimizer, "eps": eps, "b_star": None} | stars.get(eps, {})
            row |= {"bound": bound, "reference_eps": reference, "c_squared": c2, "c_squared_from": source} | largest
            row["published_b_star"] = paper.get("b_star", {}).get(eps)
            out.append(row | {f"published_{key}": paper.get(key) for key in ("c_squared", "k")})
    return out


def point_table(group, constants):
    """Return one row per optimizer and b: accuracy (%) and training loss over seeds, and δ three ways.

    delta_formula: with our C² and K; delta_published_constants: with the paper's; delta_measured: lr × ‖ω‖.
    published_accuracy is of 200 epochs, and only shown beside runs of as many. max_minibatch_norm: the largest
    ‖g_t‖ of any run that did not diverge, in any mode.
    """
    rows = []
    for optimizer, b, runs in by_point(group["runs"], *NEEDED):
        of_mode = {mode: [r for r in runs if r["mode"] == mode] for mode in NEEDED}
        good = {mode: [r for r in of_mode[mode] if not r["diverged"]] for mode in NEEDED}
        row = {"optimizer": optimizer, "batch_size": b, "normal_seeds": len(of_mode["normal"])}
        row["normal_diverged"] = len(of_mode["normal"]) - len(good["normal"])
        for key in ("accuracy", "best_accuracy", "training_loss"):
            row |= band(key, [r["results"][key] for r in good["normal"]])
        paper = group["published"][optimizer]
        comparable = good["normal"] and all(r["as_published"] for r in good["normal"])
        row["published_accuracy"] = paper.get("accuracy", {}).get(b) if comparable else None
        ours = next(c for c in constants if c["optimizer"] == optimizer)
        for key, source in (("delta_formula", ours), ("delta_published_constants", paper)):
            c2, k = source.get("c_squared"), source.get("k")
            known = c2 is not None and (k is not None or optimizer != "shb")  # K is in SHB's δ only
            delta = known and theory.degree_of_smoothing(optimizer, group["lr"], b, c2, k or 0.0, group["beta"])
            row[key] = float(delta) if known else None
        row["delta_formula_from"] = ours["c_squared_from"] if row["delta_formula"] is not None else None
        row["sampling_seeds"] = len(of_mode["sampling"])
        row["sampling_diverged"] = len(of_mode["sampling"]) - len(good["sampling"])
        row |= band("delta_measured", [r["results"]["delta"] for r in good["sampling"]])
        row["critical_seeds"] = len(of_mode["critical"])
        norms = [r["results"].get("max_gradient_norm") for mode in NEEDED for r in good[mode]]
        rows.append(row | {"max_minibatch_norm": max((n for n in norms if n is not None), default=None)})
    return rows


def correlations(points):
    """Return Pearson's r and Spearman's ρ of mean accuracy with δ, over the points (optimizer, b), and how many.

    A point one of whose seeds diverged has no accuracy that stands for it, and is left out; so is what has
    fewer than three points, or only equal ones.
    """
    rows, points = [], [p for p in points if not p["normal_diverged"]]
    for key in DELTAS:
        for who in (*theory.OPTIMIZERS, "all"):
            pairs = [(p[key], p["accuracy_mean"]) for p in points if who in (p["optimizer"], "all")]
            pairs = np.array([pair for pair in pairs if None not in pair]).reshape(-1, 2)
            if len(pairs) < 3 or not np.all(np.ptp(pairs, axis=0) > 0):
                continue
            row = {"delta": key.removesuffix("_mean"), "optimizer": who, "points": len(pairs)}
            row["pearson"] = float(stats.pearsonr(*pairs.T)[0])
            rows.append(row | {"spearman": float(stats.spearmanr(*pairs.T)[0])})
    return rows


def pooled_spread(values):
    """Return (z, share): one ω's entries, standardized and sorted (float64), and the share of them beyond ±6 std.

    They tell how the entries are spread over the coordinates. As coordinates differ in scale they cannot tell
    whether ω is Gaussian: an exactly Gaussian vector with unequal scales looks heavy-tailed too. ValueError for
    entries that cannot be standardized.
    """
    z = np.sort(values).astype(np.float64)
    if len(z) < 20 or not np.all(np.isfinite(z)) or z[0] == z[-1]:
        raise ValueError("omega.npy: fewer than 20 entries, not all finite, or all equal")
    z = (z - z.mean()) / z.std()
    return z, float(np.mean(np.abs(z) > 6))


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


def size_axis(ax, rows):
    """Make x the logarithmic axis of the rows' batch sizes; its ticks are as many of them as there is room for."""
    sizes, ticks = sorted({r["batch_size"] for r in rows}), []
    for b in sizes:
        if not ticks or 6.01 * np.log(b / ticks[-1]) >= np.log(sizes[-1] / sizes[0]):
            ticks.append(b)
    ax.set_xscale("log", base=2)
    ax.set(xlabel=SIZE_LABEL, xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
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
    columns = ("batch_size", f"{key}_mean", f"{key}_min", f"{key}_max")
    values = np.array([[r[c] for c in columns] for r in rows], float).reshape(-1, 4)  # None becomes nan
    values[[r.get("steps_are") in ARROWS for r in rows], 1:] = np.nan
    b, mean, low, high = values.T
    if not np.all(np.isnan(mean)):
        ax.plot(b, mean, **look)
        ax.fill_between(b, low, high, color=look["color"], alpha=0.25, linewidth=0)


def mark(ax, x, y, label, transform=None, **look):
    """Draw marks over the curves, and name them in the legend."""
    ax.plot(x, y, linestyle="", zorder=5, transform=transform or ax.transData, **look)
    ax.plot([], [], linestyle="", zorder=5, **look | {"color": "0.3"}, label=label)


def side_by_side(b, i, n):
    """Return where on the axis of batch sizes the i-th of n marks at b goes, so that none hides another."""
    return b * 2 ** (min(0.35, 0.8 / n) * (i - (n - 1) / 2))


def mark_diverged(ax, rows, column, looks):
    """Mark on the floor each b at which `column` counts a diverged seed, the optimizers side by side."""
    for i, (name, look) in enumerate(looks.items()):
        lost = {r["batch_size"] for r in rows if r["optimizer"] == name and r[column]}
        if lost:
            x, y = [side_by_side(b, i, len(looks)) for b in sorted(lost)], [0.03] * len(lost)
            look = {"marker": "x", "ms": 8, "mew": 2, "color": look["color"]}
            mark(ax, x, y, "a seed diverged", ax.get_xaxis_transform(), **look)


def draw_steps(rows, constants, published):
    """Draw steps to ε and SFO complexity against b: a column per optimizer, a curve per ε."""
    names, every_eps = list(dict.fromkeys(r["optimizer"] for r in rows)), sorted({r["eps"] for r in rows})
    if len({r["batch_size"] for r in rows}) < 2:
        return None
    size = (1 + 3.2 * len(names), 6.5)
    fig, axes = plt.subplots(2, len(names), figsize=size, sharex=True, sharey="row", squeeze=False)
    looks = {eps: LOOKS[i % len(LOOKS)] | {"label": f"ε = {eps:g}"} for i, eps in enumerate(every_eps)}
    for look in looks.values():  # the legend's order
        axes[0, 0].plot([], [], **look)
    for line, key in zip(axes, ("steps", "sfo"), strict=True):
        for ax, name in zip(line, names, strict=True):
            size_axis(ax, rows)
            mine = [r for r in rows if r["optimizer"] == name]
            for eps, look in looks.items():
                part = [r for r in mine if r["eps"] == eps]
                star = next((c for c in constants if (c["optimizer"], c["eps"]) == (name, eps)), {})
                curve(ax, part, key, **look)
                mark_b_star(ax, part, key, star)
                theirs = {b: n * (b if key == "sfo" else 1) for (e, b), n in published.items() if e == eps}
                if name == "shb" and theirs:
                    grey = {"marker": ".", "color": "0.4", "lw": 0.8, "label": "published SHB"}
                    ax.plot(theirs.keys(), theirs.values(), **grey)
            mark_bounds(ax, mine, key, looks)
            ax.set(yscale="log", title=name.upper() if key == "steps" else "")
            ax.label_outer()
    for ax, name in zip(axes[0], names, strict=True):
        mark_diverged(ax, rows, "diverged", {name: {"color": "0.3"}})
    axes[0, 0].set_ylabel("steps until mean ‖g‖ ≤ ε")
    axes[1, 0].set_ylabel("SFO complexity = steps × b (gradients)")
    return fig


def mark_bounds(ax, rows, key, looks):
    """Draw an arrow where steps of one optimizer are only a bound; those of one b side by side, so that all show."""
    for b in sorted({r["batch_size"] for r in rows}):
        here = [r for r in rows if r["batch_size"] == b and r["steps_are"] in ARROWS]
        for i, row in enumerate(here):
            marker, label = ARROWS[row["steps_are"]]
            look = {"marker": marker, "ms": 9, "color": looks[row["eps"]]["color"]}
            mark(ax, side_by_side(b, i, len(here)), row[f"{key}_mean"], label, **look)


def mark_b_star(ax, rows, key, star):
    """Circle the measured b* of one optimizer and ε, and mark the theory's bound: at the edge if beyond the grid."""
    if star.get("b_star") is None:
        return
    y_at = {r["batch_size"]: r[f"{key}_mean"] for r in rows if r["steps_are"] == "measured" and not r["diverged"]}
    hollow = {"mfc": "none", "color": "k"}
    mark(ax, star["b_star"], y_at[star["b_star"]], "measured b*", marker="o", ms=12, **hollow)
    if star["bound"] is None:
        return
    y = np.exp(np.interp(np.log(star["bound"]), np.log([*y_at]), np.log([*y_at.values()])))
    low, high = ax.get_xlim()
    if low < star["bound"] < high:
        label = "theory's bound; C² from b* at the reference ε"
        mark(ax, star["bound"], y, label, marker="s", ms=9, **hollow)
    else:
        x, arrow = (0.03, "$\\leftarrow$") if star["bound"] <= low else (0.97, "$\\rightarrow$")
        label, look = "theory's bound lies beyond the grid", {"marker": arrow, "ms": 11, "color": "k"}
        mark(ax, x, y, label, ax.get_yaxis_transform(), **look)


def draw_accuracy(points):
    """Draw final test accuracy and training loss against b."""
    points = [p for p in points if p["normal_seeds"]]
    if len({p["batch_size"] for p in points if p["accuracy_mean"] is not None}) < 2:
        return None
    fig, axes = plt.subplots(1, 2, figsize=(8, 4))
    for ax, key in zip(axes, ("accuracy", "training_loss"), strict=True):
        size_axis(ax, points)
        for name, look in LOOK.items():
            curve(ax, [p for p in points if p["optimizer"] == name], key, **look, label=name.upper())
    mark_diverged(axes[0], points, "normal_diverged", LOOK)
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].set(ylabel="training loss (nats)", yscale="log")
    return fig


def draw_delta(points):
    """Draw δ against b: measured as large hollow marks, our formula as a line, the paper's constants in grey."""
    known = [p for p in points if p["delta_measured_mean"] is not None or p["delta_formula"] is not None]
    if len({p["batch_size"] for p in known}) < 2:
        return None
    fig, ax = plt.subplots(figsize=(6.5, 5))
    size_axis(ax, points)
    for name, look in LOOK.items():
        part = [p for p in points if p["optimizer"] == name and p["sampling_seeds"]]
        curve(ax, part, "delta_measured", **look, label=f"{name.upper()}, measured", mfc="none", ms=9, lw=0.6)
    for name, look in LOOK.items():
        part = [p for p in points if p["optimizer"] == name and p["delta_formula"] is not None]
        if part:
            source = part[0]["delta_formula_from"]
            edge = "" if "* = " in source else f" (C² from {source})"
            width = 4 if name == "sgd" else 1.5  # NSHB's may lie on SGD's
            x, y = [p["batch_size"] for p in part], [p["delta_formula"] for p in part]
            ax.plot(x, y, **look, lw=width, label=f"{name.upper()}, formula{edge}")
    for name, look in LOOK.items():
        part = [p for p in points if p["optimizer"] == name and p["delta_published_constants"] is not None]
        if part:
            grey = look | {"color": "0.6", "lw": 0.9, "ms": 3, "label": f"{name.upper()}, paper's C², K"}
            ax.plot([p["batch_size"] for p in part], [p["delta_published_constants"] for p in part], **grey)
    mark_diverged(ax, points, "sampling_diverged", LOOK)
    ax.set(ylabel=DELTA_LABEL, yscale="log")
    return fig


def draw_accuracy_delta(points, coefficients):
    """Draw test accuracy against δ, one panel for the formula's δ and one for the measured, of two points at least."""
    known = {key: [p for p in points if None not in (p[key], p["accuracy_mean"])] for key in DELTAS}
    known = {key: [p for p in part if not p["normal_diverged"]] for key, part in known.items()}
    known = {key: part for key, part in known.items() if len(part) >= 2}
    if not known:
        return None
    fig, axes = plt.subplots(1, len(known), figsize=(1 + 4 * len(known), 4.4), sharey=True, squeeze=False)
    for ax, (key, part) in zip(axes[0], known.items(), strict=True):
        for name, look in LOOK.items():
            columns = (key, "accuracy_mean", "accuracy_min", "accuracy_max")
            values = [[p[c] for c in columns] for p in part if p["optimizer"] == name]
            x, y, low, high = np.array(values).reshape(-1, 4).T
            if any(p["optimizer"] == name for shown in known.values() for p in shown):  # the legend's order
                ax.errorbar(x, y, [y - low, high - y], **look | {"linestyle": "", "capsize": 2, "label": name.upper()})
        title = ["δ from the formula" if key == "delta_formula" else "δ measured, lr × ‖ω‖"]
        for c in coefficients:
            if c["delta"] == key.removesuffix("_mean"):
                who = c["optimizer"].upper()
                title.append(f"{who}: Pearson {c['pearson']:+.2f}, Spearman {c['spearman']:+.2f}, n = {c['points']}")
        ax.set(title="\n".join(title), xscale="log", xlabel=DELTA_LABEL)
    axes[0, 0].set_ylabel("test accuracy (%)")
    return fig


def load_omega(run):
    """Return `pooled_spread` of a sampling run's omega.npy. ValueError, OSError or OverflowError if it is unsound."""
    path = run["folder"] / "omega.npy"
    if not path.is_file():  # a pipe, for instance, would be waited for
        raise ValueError("omega.npy is no regular file, or missing")
    omega = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    if omega.dtype != np.float32 or omega.shape != (run["results"]["omega_entries"],):
        raise ValueError(f"omega.npy is {omega.dtype} {omega.shape}, not float32 (omega_entries,)")
    return pooled_spread(omega)


def pick_omega(runs, left_out):
    """Return {optimizer: (run, z, share)}, the ω to draw; an unreadable one goes to `left_out`.

    b is the middle one of those that all optimizers sampled (else of its own), the seed the lowest; the next
    where that cannot be read.
    """
    at, picked = {}, {}
    for optimizer, b, seeds in by_point([r for r in runs if not r["diverged"]], "sampling"):
        at.setdefault(optimizer, {})[b] = seeds
    common = set.intersection(*map(set, at.values())) if at else set()
    for optimizer, sizes in at.items():
        middle = sorted(common or sizes)[len(common or sizes) // 2]
        order = sorted(sizes, key=lambda b: (b not in common, abs(np.log(b / middle))))
        for run in (run for b in order for run in sizes[b]):
            try:
                picked[optimizer] = (run, *load_omega(run))
                break
            except (ValueError, OSError, OverflowError) as error:
                left_out[f"{run['name']} (ω only)"] = str(error)
    return picked


def draw_omega(runs, rows, left_out):
    """Draw histogram and Q–Q plot of one ω per optimizer; return (figure, histogram, quantiles).

    The share of entries that the histogram cuts off goes into the run's row of `rows`.
    """
    picked, bars, quantiles = pick_omega(runs, left_out), [], []
    if not picked:
        return None, [], []
    fig, axes = plt.subplots(2, len(picked), figsize=(1 + 3.2 * len(picked), 7), sharey="row", squeeze=False)
    edges = np.linspace(-6, 6, 121)
    middle = (edges[1:] + edges[:-1]) / 2
    normal = stats.norm.pdf(middle)
    for (top, bottom), (name, (run, z, share)) in zip(axes.T, picked.items(), strict=True):
        row, color = next(row for row in rows if row["name"] == run["name"]), LOOK[name]["color"]
        row["beyond_6_std"] = share
        density = np.histogram(z, edges)[0] / len(z) / np.diff(edges)
        tail = np.unique(np.round(np.geomspace(1, (len(z) + 1) // 2, 150)).astype(int))
        rank = np.union1d(tail, len(z) + 1 - tail)
        expected, observed = stats.norm.ppf((rank - 0.5) / len(z)), z[rank - 1]
        top.stairs(density, edges, fill=True, color=color, alpha=0.5, label="entries of ω")
        top.plot(middle, normal, "k--", lw=1, label="normal density, one scale for all")
        title = f"{name.upper()}, b = {row['batch_size']}, seed {row['seed']}\n{row['omega_entries']:,} entries"
        top.set(yscale="log", xlabel="(ω_i − mean) / std", ylim=(1e-8, 3e5), title=title)
        lines = [f"{key.removeprefix('omega_').replace('_', ' ')} {row[key]:.3g}" for key in OMEGA[:4]]
        lines.append(f"cut off, beyond ±6 std: {100 * share:.2g} %")
        top.text(0.02, 0.98, "\n".join(lines), transform=top.transAxes, va="top", fontsize=8)
        bottom.plot(expected, observed, LOOK[name]["marker"], color=color, ms=3, label="quantiles of ω")
        bottom.plot(expected, expected, "k--", lw=1)
        bottom.set(xlabel="quantile of the normal")
        bars += as_rows(row["name"], left=edges[:-1], right=edges[1:], density=density, normal=normal)
        quantiles += as_rows(row["name"], normal_quantile=expected, omega_quantile=observed)
    axes[0, 0].set_ylabel("density of standardized entries")
    axes[1, 0].set_ylabel("quantile of standardized entries")
    return fig, bars, quantiles


def pick_histories(runs, left_out):
    """Return {optimizer: {b: (run, norms)}} of the first, middle and last b, lowest seed, that have a sound history.

    An unsound one goes to `left_out`.
    """
    at = {}
    for optimizer, b, seeds in by_point([r for r in runs if not r["diverged"]], "critical"):
        for run in seeds:
            try:
                norms = history(run)
                at.setdefault(optimizer, {}).setdefault(b, (run, norms))
            except (ValueError, OSError) as error:
                left_out[f"{run['name']} (gradient history only)"] = str(error)
    picked = {}
    for optimizer, sizes in at.items():
        chosen = sorted({min(sizes), sorted(sizes)[len(sizes) // 2], max(sizes)})
        picked[optimizer] = {b: sizes[b] for b in chosen}
    return picked


def draw_gradients(runs, left_out):
    """Draw gradient norm and running mean over steps, a panel per run of `pick_histories`.

    Returns (figure, table of the bins drawn).
    """
    picked, table, every_eps = pick_histories(runs, left_out), [], sorted({eps for r in runs for eps in r["to_eps"]})
    if not picked:
        return None, []
    width = max(map(len, picked.values()))
    size = (1 + 3.2 * width, 1 + 2.6 * len(picked))
    fig, axes = plt.subplots(len(picked), width, figsize=size, sharey=True, squeeze=False)
    for line, (name, sizes) in zip(axes, picked.items(), strict=True):
        line[0].set_ylabel("gradient norm ‖g‖")
        for ax in line[len(sizes) :]:
            ax.set_axis_off()
        for ax, (b, (run, norms)) in zip(line, sizes.items(), strict=False):
            first, last, low, high, mean = envelope(norms)
            style = {"color": LOOK[name]["color"], "alpha": 0.4, "lw": 0.7, "step": "pre"}
            ax.fill_between(last, low, high, **style, label="‖g‖, least to greatest")
            ax.plot(last, mean, "k", lw=1.2, label="running mean of ‖g‖")
            for i, eps in enumerate(every_eps):
                style = {"color": "0.3", "lw": 0.8, "linestyle": LOOKS[i % len(LOOKS)]["linestyle"]}
                ax.axhline(eps, **style, label=f"ε = {eps:g}")
                steps = run["to_eps"].get(eps)
                if steps:
                    ax.plot(steps, eps, "ok", mfc="white", ms=6, zorder=5, label="ε reached")
            ax.set(xscale="log", yscale="log", xlabel="step", title=f"{name.upper()}, b = {b}, seed {run['seed']}")
            bins = {"first_step": first, "last_step": last, "norm_min": low, "norm_max": high, "running_mean": mean}
            table += as_rows(run["name"], **bins)
    return fig, table


# --- the files ---

METHOD = """# Ours beside the published numbers

Bands are the least and greatest seed, means are over seeds. A seed that did not reach ε enters with the steps it
was checked for: the point is a lower bound (↑). One that had reached ε when first looked at, after --min_epochs,
may have done so before: an upper bound (↓). checked: the steps of the runs that a row is from. A seed that
diverged only marks its point. None of these is eligible for b*, the point with the least mean SFO complexity
(steps × b). Batch sizes are a grid, so the true minimum lies anywhere between b*'s neighbours. range: the b whose
seeds' SFO overlaps that at b* (empty with one seed: its spread is unknown). undecided: not eligible, and its SFO may
be as small. edge <= or >=: the next smaller or larger b is not known to need more, so b* is only a bound, and so is
its C²; ?: neither is; empty: b* lies inside the grid. C² is solved from b* at one reference ε per optimizer, the
smallest whose b* is not such a bound, or else the smallest with a b* (c squared from): there the theory's bound
equals b* by construction; elsewhere it is a prediction (an arrow at the figure's edge if it lies beyond the grid).
ratio: our steps / the published, where every seed reached ε after the first check, with min_epochs 11 and
precision default. K is the largest full gradient norm ‖∇f‖ that a run of the optimizer measured without diverging
(k run, k step); the largest mini-batch gradient norm is another number, many times K at small b. delta measured is
lr × ‖ω‖. With C² from b*, the formula's δ of SGD and of NSHB is ε√(η b*/b): the same curve where their b* is the
same. Within one optimizer it falls with b, so its rank correlation with accuracy is minus that of b; Pearson's r is
of δ, not log δ; the points are not independent, so no p-values are given, nor anything for fewer than three. ω: its
moments, histogram and Q–Q plot pool one ω's entries over the coordinates. They tell how the entries are spread;
they cannot tell whether ω is Gaussian, since coordinates differ in scale: a Gaussian vector with log-normal scales
has a pooled excess kurtosis of 90 and more.
"""
POOLED = "\npooled over coordinates of different scale: how one ω\nis spread over them, not whether it is Gaussian"
# Why a column of a table has no value ("–"), told beneath the table.
NO_STAR = "fewer than two b all of whose seeds reached ε, after the first check, without diverging"
NO_C_SQUARED = "no ε has a b*, or it is SHB at β = 0, where the bound is singular"
WHY = {
    **dict.fromkeys(("b_star", "edge", "range", "critical_seeds", "undecided"), NO_STAR),
    **dict.fromkeys(("bound", "reference_eps", "c_squared", "c_squared_from"), NO_C_SQUARED),
    **dict.fromkeys(("k", "k_run", "k_step"), "no run that did not diverge measured a full gradient"),
    **dict.fromkeys(("published_b_star", "published_c_squared", "published_k"), "the paper gives none"),
    **dict.fromkeys(("accuracy", "best_accuracy", "training_loss"), "no normal run that did not diverge"),
    "published_accuracy": "the paper gives none, or our runs are not all of 200 epochs in default precision",
    **dict.fromkeys(("delta_formula", "delta_formula_from"), "no C², or for SHB no K (see runs, below)"),
    "delta_published_constants": "the paper gives no C²",
    "delta_measured": "no sampling run that did not diverge",
    "max_minibatch_norm": "no step of a run that did not diverge",
    **dict.fromkeys(("steps", "steps_are", "sfo"), "every seed diverged before ε"),
    "published": "the paper gives none",
    "ratio": "nothing published, or not all of ours measured with the published settings",
    "beyond_6_std": "only the ω drawn are read whole",
}
HEADINGS = {"max_minibatch_norm": "largest mini-batch gradient norm"}


def write(path, data):
    """Write bytes so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_figure(path, fig, title):
    """Write the figure under its title as PNG and PDF, with one legend below it: each label once, marks last."""
    found = {}
    for ax in fig.axes:
        readable_ticks(ax.xaxis)
        readable_ticks(ax.yaxis)
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [label for label, handle in found.items() if getattr(handle, "zorder", 0) != 5]  # 5: drawn by `mark`
    labels += sorted(set(found) - set(labels))
    columns = int(fig.get_figwidth() * 14 / (max(map(len, labels)) + 7))  # fourteen letters an inch
    handles = [found[label] for label in labels]
    fig.legend(handles, labels, loc="outside lower center", ncols=max(1, columns))
    fig.suptitle(title, fontsize=10)
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
    """Return the rows as a Markdown table without its empty columns; a band is one cell, mean [min, max].

    Beneath it stands why a value is missing ("–"), from WHY; an empty text is an empty cell.
    """

    def cell(row, key):
        value = row.get(key, row.get(f"{key}_mean"))
        if value is None:
            return "–"
        text = value if isinstance(value, str) else format(value, ".4g" if abs(value) < 1e4 else ".0f")
        low, high = (cell(row, f"{key}_{end}") if f"{key}_{end}" in row else text for end in ("min", "max"))
        return text if low == high else f"{text} [{low}, {high}]"

    band_of = {key: stem for row in rows for key in row if f"{(stem := key.removesuffix('_mean'))}_min" in row}
    keys = dict.fromkeys(band_of.get(key, key) for row in rows for key in row)
    keys = [key for key in keys if not key.endswith(("_min", "_max"))]
    keys = [key for key in keys if any(cell(row, key) not in ("", "–") for row in rows)]
    heads = {key: HEADINGS.get(key, key.replace("_", " ")) for key in keys}
    lines = [list(heads.values()), ["---"] * len(keys)]
    lines += [[cell(row, key) for key in keys] for row in rows]
    missing = {}
    for key in keys:
        if any(cell(row, key) == "–" for row in rows):
            missing.setdefault(WHY.get(key, "not known"), []).append(heads[key])
    notes = "".join(f"\n– in {', '.join(names)}: {why}.\n" for why, names in missing.items())
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + notes


def bullets(lines):
    """Return the lines as a Markdown list, "none" if there are none."""
    return "".join(f"- {line}\n" for line in lines or ["none"])


def tell_runs(group, constants):
    """Return the lines that say which runs went into the group's figures, and which K and δ came of them."""
    lines = [f"{mode} runs: {shared}" for mode, shared in sorted(group["settings"].items())]
    for row in {row["optimizer"]: row for row in constants}.values():
        name = row["optimizer"].upper()
        if row["k"] is not None:
            lines.append(f"K of {name}: {row['k']:.4g}, ‖∇f‖ at step {row['k_step']:g} of {row['k_run']}")
        if row["c_squared"] is None:
            lines.append(f"not drawn: the formula's δ of {name}: no C²: {NO_C_SQUARED}")
        elif row["optimizer"] == "shb" and row["k"] is None:
            lines.append(f"not drawn: the formula's δ of {name}: it needs K: {WHY['k']}")
    lines += [f"{'diverged' if run['diverged'] else 'used'}: {run['name']}" for run in group["runs"]]
    return lines + [f"left out: {name}: {reason}" for name, reason in group["left_out"].items()]


def draw(group, out):
    """Write one combination's figures and tables, say on stdout what went into them; return its part of report.md."""
    runs, left_out, published = group["runs"], group["left_out"], published_curve(group["published"])
    rows = critical_table(runs, published)
    constants = constants_table(group, rows)
    points = point_table(group, constants)
    coefficients = correlations(points)
    omega = [
        {"name": r["name"], "optimizer": r["optimizer"], "batch_size": r["batchsize"], "seed": r["seed"]}
        | {key: r["results"].get(key) for key in (*PARTS, *OMEGA)}
        for r in runs
        if r["mode"] == "sampling" and not r["diverged"]
    ]
    omega_figure, bars, quantiles = draw_omega(runs, omega, left_out)
    gradient_figure, bins = draw_gradients(runs, left_out)
    figures = {
        "steps": (draw_steps(rows, constants, published), "fewer than two b have steps to any ε"),
        "accuracy": (draw_accuracy(points), "fewer than two b have an accuracy"),
        "delta": (draw_delta(points), "fewer than two b have a δ, by the formula or measured"),
        "accuracy_delta": (draw_accuracy_delta(points, coefficients), "fewer than two points have accuracy and δ"),
        "omega": (omega_figure, "no sampling run with a sound omega.npy"),
        "gradients": (gradient_figure, "no critical run with a sound gradient_norms.f32"),
    }
    stars = [row for row in constants if row["eps"] is not None]
    if all(row["b_star"] is None for row in stars):
        stars = []
    told = {
        "critical_batch_size": (stars, NO_STAR),
        "points": (points, "no runs"),
        "correlations": (coefficients, "fewer than three points with accuracy and δ, or all equal"),
        "steps": (rows, "no critical run says anything of ε"),
        "omega": (omega, "no sampling run that did not diverge"),
    }
    drawn_only = {"omega_histogram": bars, "omega_qq": quantiles, "gradients": bins}
    text, lines = f"\n## {group['slug']}\n", [f"{group['slug']}: {len(runs)} runs used"]
    for name, (fig, why) in figures.items():
        if fig:
            save_figure(out / f"{group['slug']}_{name}", fig, group["title"] + (POOLED if name == "omega" else ""))
            text += f"\n![{name}]({group['slug']}_{name}.png)"
        else:
            lines.append(f"not drawn: {name}: {why}")
    for name, (table, why) in told.items():
        if table:
            text += f"\n\n### {name.replace('_', ' ')}\n\n{markdown(table)}"
        else:
            lines.append(f"no table: {name}: {why}")
    for name, table in ({key: table for key, (table, _) in told.items()} | drawn_only).items():
        if table:
            save_table(out / f"{group['slug']}_{name}", table)
    lines += tell_runs(group, constants)
    print(*lines, sep="\n")
    return text + "\n### runs\n\n" + bullets(lines)


def main():
    """Read RUNS_DIR, write DIR. Exit status 2, and nothing written, for a bad argument or no usable run."""
    usable_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, as main.py
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="run records, at any depth below it")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("figures"), help="default: figures")
    parser.add_argument(
        "--eps",
        metavar="EPS",
        type=number(float, "a number > 0", lambda value: value > 0),
        nargs="+",
        help="these ε instead of the recorded ones, from the gradient histories",
    )
    args = parser.parse_args()
    shown = f"argument RUNS_DIR: got {str(args.runs_dir)!r}, allowed is a directory with at least one usable run"
    if not args.runs_dir.is_dir():
        parser.error(f"{shown}; this is no directory")
    runs, damaged = read_runs(args.runs_dir)
    if not runs:
        parser.error("; ".join([shown, *(f"{name}: {reason}" for name, reason in list(damaged.items())[:3])]))
    if args.eps:
        damaged |= choose_eps(runs, args.eps)
        for eps in args.eps:
            if not any(eps in run["to_eps"] for run in runs):
                allowed = "what a critical run recorded, or holds in a sound gradient_norms.f32"
                parser.error(f"argument --eps: got {eps:g}, allowed is {allowed}")
    lines = [f"left out: {name}: {reason}" for name, reason in damaged.items()]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = METHOD + "".join(draw(group, args.out) for group in combinations(runs))
        text += "\n## what could not be read\n\n" + bullets(lines)
        write(args.out / "report.md", text.encode())
    except OSError as error:
        parser.error(f"argument --out: got {str(args.out)!r}, allowed is a directory to write in ({error.strerror})")
    print(*lines, f"written: {args.out / 'report.md'}", sep="\n")


if __name__ == "__main__":
    main()
