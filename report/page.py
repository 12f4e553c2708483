"""The tables and figures of runs as a Markdown page: 8 rows and 8 columns of a table at most; all of it is a CSV."""

import re

import numpy as np
import pandas as pd

from measure.quantities import QUANTITIES
from report import critical, plots, predictors, published, records, theory
from report.statistics import MEASUREMENT, POINT, at_common, hours, longest, measured, over_seeds, own
from utils import replacing

LARGEST = 8


def _group(name):
    return [q.name for q in QUANTITIES.values() if q.group == name and q.name != "draws"]


# The tables of what is measured: the quantities without which a row is not in it, and all that it averages over seeds.
MEASURED = {
    "omega": ("noise_square", [*_group("noise"), "accuracy", "test_loss"]),
    "delta": ("delta", ["delta"]),
    "delta_names": (["delta_as_shb", "delta_as_nshb"], ["delta_as_shb", "delta_as_nshb"]),
    "c_squared": ("c_squared", _group("variance")),
    "shape": ("isotropy", _group("shape")),
    "smoothing": ("excess_real", _group("smoothing")),
    "sharpness": ("lambda_max", _group("sharpness")),
}
# The parts of the page, and of what each needs.
NEEDS = {
    **{"runs": "runs", "training": "two rows of metrics.csv"},
    "accuracy": "--mode normal at two b, with an evaluation at one event",
    "steps": "gradient norms (gradient_norms.f32) at two b",
    "critical_batch_size": "two b at which every seed reached ε, and not at the first check",
    "power": "b* with a fit at two ε",
    "delta": "δ at two b and one event (--mode sampling, or --measure_every)",
    "delta_names": "--measure noise with --optimizer shb or nshb",
    **dict.fromkeys(["omega", "c_squared"], "--measure noise"),
    **{name: f"--measure {name}" for name in ("shape", "smoothing", "sharpness")},
    "predictors": "four settings that fit",
}
CAPTIONS = {
    "training": "Mean and band from min to max over seeds.",
    "accuracy": "Mean and band from min to max over seeds; × where a seed diverged, hollow where one did not fit.",
    "steps": "Mean and band from min to max over seeds; ○ best b; line: interval of b*; ↑ ↓ lower, upper bounds.",
    "delta": "Mean and 95 % t interval. Dashed: formula with the largest C² and K measured; NSHB's is no bound.",
    "omega": "Means over seeds; the line across a bar is E‖ω‖² as measured.",
    "c_squared": "Mean and 95 % t interval; ◇ the C² that the formula gives for b*.",
    "smoothing": "Mean and 95 % t interval; line: predicted; ↓ an interval that reaches zero, its upper end.",
    "predictors": "Mean and 95 % t interval over seeds; settings that fit; hollow: with injected noise.",
}
# What the page shows of each table; with ± half of the 95 % t interval, or with both ends, where there is one.
COLUMNS = {
    "runs": "label b seed mode status steps epochs draws",
    "accuracy": "label b steps seeds diverged unfit accuracy test_loss",
    "steps": "label eps min_epochs b missed steps sfo ratio",
    "critical_batch_size": "label eps b_star alike b_star_fit other_fits c_squared_fit c_squared_run",
    "power": "label every_eps power other_fits argmin",
    "delta": "label b steps draws delta delta_formula formula_over_measured k",
    "delta_names": "label b steps draws delta_as_shb delta_as_nshb",
    "omega": "label b steps noise_square fresh memory injected full_gradient_norm",
    "c_squared": "label b steps batch_size c_squared variance c_squared_augmentation max_draw_norm",
    "shape": "label b steps isotropy effective_rank non_normal_share pooled_kurtosis scales_kurtosis",
    "smoothing": "label b steps excess_real excess_gaussian excess_isotropic excess_predicted displacement",
    "sharpness": "label b steps lambda_max hessian_trace average_sharpness batch_sharpness",
    "settings": "name fits updates accuracy gap delta temperature lr_over_b",
    "predictors": "predictor settings rank_correlation peak inside r_squared left_out extrapolated",
}
HEADS = {
    **{"label": "optimizer", "epoch": "epoch", "eps": "ε", "every_eps": "ε", "b_star": "best b", "name": "setting"},
    **{"delta_formula": "δ by formula", "formula_over_measured": "formula / measured", "k": "K", "r_squared": "R²"},
    **{"alike": "as good", "b_star_fit": "b* (95 %)", "other_fits": "by other fits", "c_squared_run": "C² measured"},
    **{"c_squared_fit": "C² from b* (95 %)", "power": "power of 1/ε (95 %)", "argmin": "by best b"},
    **{"ratio": "steps / published", "batch_size": "batch size drawn", "peak": "best at (95 %)"},
    **{"rank_correlation": "Spearman's ρ", "left_out": "R² of left-out optimizers", "lr_over_b": "η_eff/b"},
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
    """Return {name: DataFrame} for the runs of one section, in the order of NEEDS; empty where nothing is known."""
    sound = runs[runs["status"] != "diverged"]
    rows = records.measurements(sound)
    made = {"runs": runs[[*records.RUN, *(key for key in ("steps", "epochs", "seconds", "draws") if key in runs)]]}
    made |= {name: _measured(rows, name) for name in MEASURED}
    made["delta"] = _with_formula(made["delta"], rows)
    made["training"] = training(sound)
    made["accuracy"] = accuracy(runs)
    made["steps"] = critical.steps_to_eps(runs, min_epochs)
    known = published.steps()
    known = [known.assign(curve="published")] if published.SHB in set(runs["curve"]) else []
    stars = critical.b_star(pd.concat([made["steps"], *known]), rows)
    made["power"] = critical.power(stars)
    made["critical_batch_size"] = stars.drop(columns="redraws", errors="ignore")
    return {name: made[name] for name in NEEDS if name in made}


def _measured(rows, name):
    """Return one row a curve, b, step and BatchNorm mode (and batch size drawn, for C²)."""
    probe, quantities = MEASURED[name]
    rows = measured(rows, probe)
    rows = rows[rows["layer"] == "all"] if name == "c_squared" else own(rows)
    more = {"c_squared": "batch_size", "smoothing": "probe_images", "sharpness": "probe_images"}
    key = [*MEASUREMENT, *([more[name]] if name in more else [])]
    return over_seeds(rows, key, [q for q in quantities if q not in key]) if len(rows) else pd.DataFrame()


def _with_formula(table, rows):
    """Add the formula's δ, and how many times the measured it is. Its C² and K must hold at every x.

    c_squared_max: the largest mean over seeds of any measured step, of this curve, b and mode. k: the largest ‖∇f‖ of
    the curve in this mode.
    """
    if table.empty:
        return table
    where = ["curve", "full_grad_batchsize", "batchnorm"]
    table = table.join(rows.groupby(where)["full_gradient_norm"].max().rename("k"), on=where)
    where = [*where, "b"]
    steps = own(measured(rows, "c_squared")).groupby([*where, "steps"])["c_squared"].mean()
    table = table.join(steps.groupby(where).max().rename("c_squared_max"), on=where)
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
    table = over_seeds(rows, [*records.CURVE, "b", "steps", "epoch"], ["training_loss", "accuracy", "g-norm"])
    return table[table["seeds"] == table.groupby("curve")["seeds"].transform("max")]


def _shown_b(rows):
    """Return the b that most curves have; of several the middle one."""
    curves = rows.groupby("b")["curve"].nunique()
    tied = curves.index[curves == curves.max()]
    return tied[len(tied) // 2]


def accuracy(runs):
    """Return one row a curve and b: test accuracy at the common event, over seeds; how many seeds diverged.

    With one --until_loss the event is the fit. A seed that did not fit enters with its last evaluation: `unfit`.
    """
    runs = runs[runs["mode"] == "normal"]
    lost, sound = runs[runs["status"] == "diverged"], runs[runs["status"] != "diverged"]
    rows = records.curves(sound).dropna(subset="accuracy").drop_duplicates([*POINT, "steps"])
    limits = {args["until_loss"] for args in sound["args"]}
    if len(limits) == 1 and limits != {None}:
        event = f"the fit (loss < {min(limits):g})"
        fit = (rows["training_loss"] < min(limits)) & (rows["epoch"] % 1 == 0)
        rows = rows.assign(unfit=~fit).sort_values(["unfit", "steps"], kind="stable")
        never = rows["unfit"].groupby([rows[key] for key in POINT]).transform("all")
        missed = rows[never].drop_duplicates(POINT, keep="last")
        rows = pd.concat([rows[~rows["unfit"]].drop_duplicates(POINT), missed])
    else:
        rows, event = at_common(rows.assign(unfit=False), by=("epoch", "steps"))
    if rows.empty:
        return pd.DataFrame()
    rows, lost = rows.assign(diverged=False), longest(lost)[records.RUN].assign(diverged=True)
    rows = pd.concat([rows, lost]) if len(lost) else rows
    key = [*records.CURVE, "b"]
    table = over_seeds(rows, key, ["accuracy", "test_loss", "epoch", "steps"])
    rows = rows.assign(unfit=rows["unfit"].eq(True))  # of a diverged one nothing is known
    counts = rows.groupby(key, dropna=False)[["diverged", "unfit"]].sum()
    return table.merge(counts.reset_index(), on=key).assign(event=event)


def figures(made):
    """Yield (name, Figure) of every figure that the tables `made` are enough for."""
    if len(made["training"]) > 1:
        yield "training", plots.training(made["training"])
    sizes = {name: table["b"].nunique() if "b" in table else 0 for name, table in made.items()}
    if sizes["accuracy"] > 1:
        yield "accuracy", plots.accuracy(made["accuracy"], made["accuracy"]["event"].iloc[0])
    if sizes["steps"] > 1:
        yield "steps", plots.sfo(shown(made["steps"]), shown(made["critical_batch_size"]))
    rows, event = _at_event(shown(made["delta"]))
    if len(rows) and rows["b"].nunique() > 1:
        yield "delta", plots.delta(rows, event)
    at_one_b = {name: shown(made[name]) for name in ("omega", "smoothing", "c_squared")}
    at_one_b = {name: rows[rows["b"] == _shown_b(rows)] for name, rows in at_one_b.items() if len(rows)}
    if "omega" in at_one_b:
        yield "omega", plots.omega(at_one_b["omega"])
    if "smoothing" in at_one_b:
        yield "smoothing", plots.smoothing(*_at_event(at_one_b["smoothing"]))
    if "c_squared" in at_one_b:
        rows = at_one_b["c_squared"]
        last, event = _at_event(rows)
        rows = rows.assign(at_event=rows.index.isin(last.index))
        yield "c_squared", plots.c_squared(rows, event, shown(made["critical_batch_size"]))


def shown(table):
    """Return the rows that figures and page show: BatchNorm in training mode, as the paper, if any are; one rule.

    Of several chunks of the full gradient, and of several min_epochs, that of most rows.
    """
    if "batchnorm" in table:
        table = table[table["batchnorm"] == table["batchnorm"].max()]  # eval < train
    key = "full_grad_batchsize" if "batchnorm" in table else "min_epochs"
    return table[table[key] == table[key].mode()[0]] if key in table else table


def _at_event(table):
    """Return (the last rows of every curve and b at their common step or within their common epoch, its name)."""
    if table.empty:
        return table, ""
    inside = table[table["epoch"] % 1 > 0]  # not at an epoch's end: momentum holds batches drawn without replacement
    table = inside if inside.groupby(["curve", "b"]).ngroups == table.groupby(["curve", "b"]).ngroups else table
    rows, event = at_common(table.assign(epoch=np.floor(table["epoch"])))
    last = rows.groupby(["curve", "b"])["steps"].transform("max")
    return table.loc[rows.index[rows["steps"] == last]], event


def write(runs, out, kind="png", min_epochs=None):
    """Write tables and figures of `runs`, of `records.runs`, to the directory `out`. Returns the page's text."""
    lines = ["# Tables and figures", ""]
    for title, slug, members in sections(runs):
        made = tables(members, min_epochs)
        lines += [f"## {title}", "", f"{hours(members):.2g} hours, each trajectory counted once.", ""]
        lines += _parts(made, dict(figures(made)), out, slug, kind)
    for network, members in runs.groupby("network"):
        points = predictors.settings(members)
        if points["fits"].any():
            points["name"] = points["curve"].str.removeprefix(f"{network}, ") + ", b " + points["b"].astype(str)
            made = {"settings": points, "predictors": predictors.table(points)}
            drawn = {"predictors": plots.predictors(points)} if len(made["predictors"]) else {}
            lines += [f"## What predicts accuracy? {network}", "", *_parts(made, drawn, out, _slug(network), kind)]
    return "\n".join(lines)


@plots.styled  # saving draws
def _parts(made, drawn, out, slug, kind):
    """Write the tables `made` and the figures `drawn`. Returns the lines of the page about them."""
    lines = []
    for name, table in made.items():
        file = f"{slug}_{name}"
        lines += [f"### {name.replace('_', ' ')}", ""]
        if name in drawn:
            undated = {"CreationDate": None} if kind == "pdf" else {"Software": None}  # the same figure: the same file
            with replacing(out / f"{file}.{kind}") as image:
                drawn[name].savefig(image, format=kind, dpi=150, metadata=undated)
            lines += [f"![{drawn[name].get_suptitle()}]({file}.{kind})", "", CAPTIONS[name], ""]
        elif name in CAPTIONS or table.empty:
            lines += [f"Not {'drawn' if len(table) else 'measured'}: needs {NEEDS[name]}.", ""]
        if name in COLUMNS and len(table):
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
    if len(table) > LARGEST:  # of every curve as many, from its first to its last
        parts = [rows for _, rows in table.groupby("label", sort=False)]
        share = max(1, LARGEST // len(parts))
        parts = [rows.iloc[np.unique(np.linspace(0, len(rows) - 1, share).round().astype(int))] for rows in parts]
        table = pd.concat(parts)[:LARGEST]
    heads = [HEADS.get(name) or (plots.label(name) if name in QUANTITIES else name) for name in columns]
    lines = [" | ".join(heads), " | ".join(["---"] * len(columns))]
    lines += [" | ".join(_cell(row, name) for name in columns) for row in table.to_dict("records")]
    known = [QUANTITIES[name] for name in columns if name in QUANTITIES and QUANTITIES[name].group != "training"]
    meanings = "; ".join(f"{q.symbol or q.name.replace('_', ' ')}: {q.meaning}" for q in known)
    return [f"| {line} |" for line in lines] + (["", f"{meanings}."] if known else [])


def _cell(row, name):
    """Return a number, with half of its 95 % interval or with both ends where it has such, or a text."""
    value, low, high = row.get(f"{name}_mean", row.get(name)), row.get(f"{name}_low"), row.get(f"{name}_high", np.nan)
    if isinstance(value, str | bool | np.bool_):
        return str(value)
    if low is not None and row.get("note"):
        return row["note"] if name == "b_star_fit" else "–"
    if low is not None and f"{name}_mean" not in row:
        low, high = ("" if pd.isna(end) else _short(end, 3) for end in (low, high))
        if pd.isna(value):
            return f"{low} to {high}" if low and high else f"≥ {low}" if low else f"≤ {high}" if high else "–"
        return f"{_short(value, 3)} ({low or '…'} to {high or '…'})" if low or high else _short(value, 3)
    if pd.isna(value):
        return "–"
    half = high - value
    return f"{_short(value, 4)} ± {_short(half, 2)}" if half > 0 else _short(value, 4)


def _short(value, digits):
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
