"""The tables and figures of runs as a Markdown page: 8 rows and 8 columns of a table at most; all of it is a CSV."""

import re

import numpy as np
import pandas as pd

from measure.quantities import EVALUATED, QUANTITIES
from report import critical, plots, predictors, published, records, theory
from report.statistics import MEASUREMENT, POINT, at_common, evaluations, hours, longest, measured, over_seeds, own
from utils import replacing

LARGEST = 8
# The tables of what is measured: the columns without which a row is not in them, the group of quantities that they
# average, or these columns alone, and what else tells two rows apart.
MEASURED = {
    "delta": (["delta"], None, []),
    "delta_names": (["delta_as_shb", "delta_as_nshb"], None, []),
    "omega": (["noise_square"], "noise", []),
    "c_squared": (["c_squared"], "variance", ["batch_size"]),
    "shape": (["isotropy"], "shape", []),
    "smoothing": (["excess_real"], "smoothing", ["probe_images"]),
    "sharpness": (["lambda_max"], "sharpness", ["probe_images"]),
}
READING = "Columns are those of the CSV files. Bands: min to max over seeds. Bars, ± and brackets: 95 % intervals."
CAPTIONS = {
    "training": "Means.",
    "accuracy": "Means; × where a seed diverged, hollow where one did not fit.",
    "steps": "Means; ○ best b; line: interval of b*; ↑ ↓ lower, upper bounds.",
    "delta": "Dashed: formula with the largest C² and K measured; NSHB's is no bound.",
    "omega": "Means; the line across a bar is E‖ω‖² as measured.",
    "c_squared": "◇ the C² that the formula gives for b*.",
    "smoothing": "Line: predicted; ↓ an interval that reaches zero, its upper end.",
    "power": "The interval takes the ε for independent.",
    "predictors": "Settings that fit, means over seeds; hollow: with injected noise.",
}
# What the page shows of each table.
COLUMNS = {
    "runs": "label b seed mode status steps epochs draws",
    "accuracy": "label b steps seeds unfit accuracy accuracy_recalibrated test_loss",
    "steps": "label eps min_epochs b missed steps sfo ratio",
    "critical_batch_size": "label eps b_star alike b_star_fit other_fits c_squared_fit c_squared_run",
    "power": "label every_eps power other_fits argmin",
    "delta": "label b steps draws delta delta_formula formula_over_measured k",
    "delta_names": "label b steps draws delta_as_shb delta_as_nshb",
    "omega": "label b steps noise_square fresh memory injected full_gradient_norm",
    "c_squared": "label b steps batch_size c_squared variance c_squared_augmentation max_draw_norm",
    "shape": "label b steps isotropy effective_rank non_normal_share pooled_kurtosis scales_kurtosis",
    "smoothing": "label b steps excess_real excess_gaussian excess_isotropic excess_predicted displacement",
    "sharpness": "label b steps lambda_max batch_sharpness direction_curvature gradient_curvature threshold",
    "settings": "name fits updates accuracy gap delta temperature lr_over_b",
    "predictors": "predictor settings rank_correlation peak inside r_squared left_out extrapolated",
    "matched": "equal ratio first second seeds difference at_equal_updates",
}


def sections(runs):
    """Yield (title, name for files, runs) of every setting and β; runs without β, as SGD's, join every β."""
    for setting, members in runs.groupby("setting"):
        for beta in sorted(members["beta1"].dropna().unique()) or [None]:
            title = setting if beta is None else f"{setting}, β {beta:g}"
            yield title, _slug(title), members[members["beta1"].isna() | (members["beta1"] == beta)]


def _slug(title):
    return re.sub(r"[^\w.+-]", "_", title.replace(", ", "_").replace("β", "beta").replace(" ", ""))


def tables(runs, min_epochs=None):
    """Return {name: DataFrame} for the runs of one section, in the order of the page; empty where nothing is known."""
    sound = runs[runs["status"] != "diverged"]
    rows = records.measurements(runs)
    steps, rows = critical.steps_to_eps(runs, min_epochs, rows), rows[rows["status"] != "diverged"]
    known = [published.steps().assign(curve="published")] if published.SHB in set(runs["curve"]) else []
    stars = critical.b_star(pd.concat([steps, *known]), rows)
    made = {"runs": runs[[*records.RUN, *(key for key in ("steps", "epochs", "seconds", "draws") if key in runs)]]}
    made |= {"training": training(sound), "accuracy": accuracy(runs), "steps": steps}
    made["critical_batch_size"] = stars.drop(columns=["redraws", "others"], errors="ignore")
    made["power"] = critical.power(stars)
    return made | {name: _measured(rows, name) for name in MEASURED}


def _measured(every, name):
    """Return one row a curve, b, step and BatchNorm mode (and batch size drawn, for C²)."""
    needed, group, more = MEASURED[name]
    rows = measured(every, needed)
    rows = rows[rows["layer"] == "all"] if name == "c_squared" else own(rows)
    if rows.empty:
        return rows
    quantities = [q.name for q in QUANTITIES.values() if q.group == group and q.name not in ("draws", *more)] or needed
    table = over_seeds(rows, [*MEASUREMENT, *more], [*quantities, *(EVALUATED if name == "omega" else ())])
    if name == "sharpness":
        ends = zip(*map(theory.thresholds, table["optimizer"], table["lr"], table["beta1"]), strict=True)
        return table.assign(**dict(zip(("threshold_low", "threshold_high"), ends, strict=True)))
    if name != "delta":
        return table
    # The formula's C² and K must hold at every x: the largest C² (mean over seeds) of curve and b, ‖∇f‖ of the curve.
    where = ["curve", "full_grad_batchsize", "batchnorm"]
    steps = own(measured(every, "c_squared")).groupby([*where, "b", "steps"])["c_squared"].mean()
    table = table.join(every.groupby(where)["full_gradient_norm"].max().rename("k"), on=where)
    table = table.join(steps.groupby([*where, "b"]).max().rename("c_squared_max"), on=[*where, "b"])
    table["delta_formula"] = theory.deltas(table, table["c_squared_max"], table["k"])
    return table.assign(formula_over_measured=table["delta_formula"] / table["delta_mean"])


def training(runs):
    """Return one row a curve and step of metrics.csv, over seeds, at the b that most curves have."""
    rows = records.curves(runs.sort_values("steps", ascending=False, kind="stable"))
    rows = rows.drop_duplicates([*POINT, "steps"]).sort_values(["b", "steps"])
    rows = rows[rows.groupby(POINT)["steps"].transform("size") > 1]
    if rows.empty:
        return rows
    rows = rows[rows["b"] == _shown_b(rows)]
    if rows["epoch"].max() >= 8:  # the loss is the mean over the epoch so far: whole epochs, if there are enough
        rows = rows.assign(training_loss=rows["training_loss"].where(rows["epoch"] % 1 == 0))
    quantities = ["training_loss", "accuracy", "accuracy_recalibrated", "g-norm"]
    table = over_seeds(rows, [*records.CURVE, "b", "steps", "epoch"], quantities)
    return table[table["seeds"] == table.groupby("curve")["seeds"].transform("max")]


def _shown_b(rows):
    """Return the b that most curves have; of several the middle one."""
    curves = rows.groupby("b")["curve"].nunique()
    tied = curves.index[curves == curves.max()]
    return tied[len(tied) // 2]


def accuracy(runs):
    """Return one row a curve and b: test accuracy over seeds at the common event; how many diverged, or did not fit.

    With one --until_loss the event is the fit; a seed that did not fit enters with its last evaluation.
    """
    runs = runs[runs["mode"] == "normal"]
    lost, sound = runs[runs["status"] == "diverged"], runs[runs["status"] != "diverged"]
    rows = evaluations(records.curves(sound), records.measurements(sound)).assign(unfit=False, diverged=False)
    limits = {args["until_loss"] for args in sound["args"]}
    if len(limits) == 1 and limits != {None}:
        rows["unfit"] = (rows["training_loss"] >= min(limits)) | (rows["epoch"] % 1 > 0)
        event = "the end: none fits" if rows["unfit"].all() else f"the fit (loss < {min(limits):g})"
        last = rows.groupby(POINT)["steps"].transform("max") == rows["steps"]
        rows = rows[~rows["unfit"] | last].sort_values(["unfit", "steps"], kind="stable").drop_duplicates(POINT)
    else:
        rows, event = at_common(rows, by=("epoch", "steps"))
    if rows.empty:
        return pd.DataFrame()
    if len(lost):  # of its fit nothing is known
        rows = pd.concat([rows, longest(lost)[records.RUN].assign(diverged=True, unfit=False)])
    key = [*records.CURVE, "b"]
    counts = rows.groupby(key, dropna=False)[["diverged", "unfit"]].sum().reset_index()
    return over_seeds(rows, key, [*EVALUATED, "epoch", "steps"]).merge(counts, on=key).assign(event=event)


def figures(made):
    """Yield (name, Figure) of every figure that the tables `made` are enough for."""
    sizes = {name: table["b"].nunique() if "b" in table else 0 for name, table in made.items()}
    stars = shown(made["critical_batch_size"])
    if len(made["training"]) > 1:
        yield "training", plots.training(made["training"])
    if sizes["accuracy"] > 1:
        yield "accuracy", plots.accuracy(made["accuracy"], made["accuracy"]["event"].iloc[0])
    if sizes["steps"] > 1:
        yield "steps", plots.sfo(shown(made["steps"]), stars)
    rows, event = _at_event(shown(made["delta"]))
    if len(rows) and rows["b"].nunique() > 1:
        yield "delta", plots.delta(rows, event)
    for name in ("omega", "smoothing", "c_squared"):
        rows = shown(made[name])
        if len(rows):
            rows = rows[rows["b"] == _shown_b(rows)]
            last, event = _at_event(rows)
            marked = rows.assign(at_event=rows.index.isin(last.index))
            given = {"omega": [rows], "smoothing": [last, event], "c_squared": [marked, event, stars]}
            yield name, getattr(plots, name)(*given[name])


def shown(table):
    """Return the rows that are shown: BatchNorm in training mode, if any; the chunk size, min_epochs of most rows."""
    if "batchnorm" in table:
        table = table[table["batchnorm"] == table["batchnorm"].max()]  # eval < train
    key = "full_grad_batchsize" if "batchnorm" in table else "min_epochs"
    return table[table[key] == table[key].mode()[0]] if key in table and len(table) else table


def _at_event(table):
    """Return (the last rows of every curve and b at their common step or within their common epoch, its name)."""
    if table.empty:
        return table, ""
    inside = table[table["epoch"] % 1 > 0]  # not at an epoch's end: momentum holds batches drawn without replacement
    table = inside if inside.groupby(["curve", "b"]).ngroups == table.groupby(["curve", "b"]).ngroups else table
    rows, event = at_common(table.assign(epoch=np.floor(table["epoch"])))
    last = rows.groupby(["curve", "b"])["steps"].transform("max")
    return table.loc[rows.index[rows["steps"] == last]], event


@plots.styled()
def write(runs, out, kind="png", min_epochs=None):
    """Write tables and figures of `runs`, of `records.runs`, to the directory `out`. Returns the page's text."""
    lines = ["# Tables and figures", "", READING, ""]
    for title, slug, members in sections(runs):
        made = tables(members, min_epochs)
        lines += [f"## {title}", "", f"{hours(members):.2g} hours, each trajectory counted once.", ""]
        lines += _parts(made, dict(figures(made)), out, slug, kind)
    for network, members in runs.groupby("network"):
        rows, evaluated = predictors.trajectories(members)
        points = predictors.settings(rows)
        if points["fits"].any():
            points["name"] = points["curve"].str.removeprefix(f"{network}, ") + ", b " + points["b"].astype(str)
            made = {"settings": points, "predictors": predictors.table(points)}
            made["matched"] = predictors.matched(rows, evaluated)
            drawn = {"predictors": plots.predictors(points)} if len(made["predictors"]) else {}
            lines += [f"## What predicts accuracy? {network}", "", *_parts(made, drawn, out, _slug(network), kind)]
    return "\n".join(lines)


def save(figure, path):
    """Write a Figure as png or pdf, whole or not at all. The same figure is the same file: no date, no version."""
    undated = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
    with replacing(path) as image:
        figure.savefig(image, format=path.suffix[1:], dpi=150, metadata=undated)


def _parts(made, drawn, out, slug, kind):
    """Write tables and figures. Returns the page's lines about them."""
    lines = []
    for name, table in made.items():
        file, listed = f"{slug}_{name}", name in COLUMNS and len(table)
        if name in drawn or listed:
            lines += [f"### {name.replace('_', ' ')}", ""]
        if name in drawn:
            save(drawn[name], out / f"{file}.{kind}")
            lines += [f"![{drawn[name].get_suptitle()}]({file}.{kind})", ""]
        if name in drawn or (listed and name == "power"):
            lines += [CAPTIONS[name], ""]
        if listed:
            whole = table.drop(columns=["setting", "curve"], errors="ignore").dropna(axis="columns", how="all")
            with replacing(out / f"{file}.csv") as csv:
                csv.write(whole.to_csv(index=False, lineterminator="\n").encode())
            lines += [*_markdown(table, COLUMNS[name].split()), ""]
            lines += [f"[{file}.csv]({file}.csv), rows: {len(table)}", ""]
    return lines


def _markdown(table, columns):
    """Return the lines of a table, LARGEST rows of it at most, and of what its symbols mean."""
    table = shown(table)
    if "batch_size" in table:
        table = table[table["batch_size"] == table["b"]]
    if len(table) > LARGEST and "epoch" in table:
        table = _at_event(table)[0]
    table = table.iloc[np.unique(np.linspace(0, len(table) - 1, LARGEST).round().astype(int))]
    heads = [plots.label(name) if name in QUANTITIES else name for name in columns]
    lines = [" | ".join(heads), " | ".join(["---"] * len(columns))]
    lines += [" | ".join(_cell(row, name) for name in columns) for row in table.to_dict("records")]
    known = [QUANTITIES[name] for name in columns if name in QUANTITIES and QUANTITIES[name].group != "training"]
    meanings = "; ".join(f"{q.symbol or q.name.replace('_', ' ')}: {q.meaning}" for q in known)
    return [f"| {line} |" for line in lines] + (["", f"{meanings}."] if known else [])


def _cell(row, name):
    """Return a number, with its interval where it has one, or a text."""
    value, low, high = (row.get(key, np.nan) for key in (name, f"{name}_low", f"{name}_high"))
    if f"{name}_mean" in row:
        mean, half = row[f"{name}_mean"], high - row[f"{name}_mean"]
        return f"{_short(mean, 4)} ± {_short(half, 2)}" if half > 0 else _short(mean, 4)
    if f"{name}_low" not in row:
        return _short(value, 4)
    if row.get("note"):  # why b* is no result
        return row["note"] if name == "b_star_fit" else "–"
    if pd.isna(low) and pd.isna(high):
        return _short(value, 3)
    if pd.isna(value) and (pd.isna(low) or pd.isna(high)):
        return f"≥ {_short(low, 3)}" if pd.isna(high) else f"≤ {_short(high, 3)}"
    ends = f"{_short(low, 3)} to {_short(high, 3)}".replace("–", "…")
    return ends if pd.isna(value) else f"{_short(value, 3)} ({ends})"


def _short(value, digits):
    if isinstance(value, str | bool | np.bool_):
        return str(value)
    if pd.isna(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
