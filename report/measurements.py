"""What sampling runs measured at many steps, measurements.csv and shape.csv, as DataFrames. Trusts neither file."""

import csv
from pathlib import Path

import pandas as pd

from report.records import HUGE

LARGEST = 1 << 24  # bytes of a file
# The columns used (docs/measuring.md), by where they must hold a number.
ALWAYS = ("full_gradient_norm", "accuracy")
OF_DRAWS = ("noise_square", "delta", "delta_se", "fresh", "memory", "injected", "variance", "batchnorm_bias")
OF_TRAINING = ("memory_noise_frozen", "staleness")  # left empty at a b that is not the run's own
# C² is not defined for a batch of all images, a standard error not for two draws; only SHB and NSHB have two δ.
NOWHERE = ("variance_se", "c_squared", "c_squared_se", "noise_scale", "delta_renamed")
BEFORE = {"injected": "0", "delta_renamed": ""}  # what records hold from before there were these columns
SHAPE = ("entries", "kurtosis", "pooled_kurtosis", "scales_kurtosis", "isotropy", "effective_rank")
TESTED = ("rejected",)  # not known of fewer than 20 draws
SIGNED = (
    "staleness",
    "batchnorm_bias",
    "kurtosis",
    "pooled_kurtosis",
    "scales_kurtosis",
    "isotropy",
    "effective_rank",
)
HEAD = ["run", "optimizer", "seed", "run_batch_size", "steps", "batchnorm"]
ROWS = [*HEAD, "batch_size", "draws", *ALWAYS, *OF_DRAWS, *OF_TRAINING, *NOWHERE]
SHAPES = [*HEAD, "draws", *SHAPE, *TESTED]


def read(runs):
    """Return (rows, shapes, {run and file: why it was not used}) of the runs that sampled and did not diverge.

    rows: one row per run, step, BatchNorm mode and batch size, the columns ROWS; batch_size is that of the draws,
    run_batch_size that of training, draws 0 where there were none. shapes: one row per run, step and mode, of the
    whole vector, the columns SHAPES. Runs recorded before there were such files have no rows.
    """
    found = {"measurements.csv": [], "shape.csv": []}
    parts = {"measurements.csv": (budget_rows, "draws"), "shape.csv": (shape_rows, "shape")}
    left_out = {}
    for run in runs[(runs["mode"] == "sampling") & ~runs["diverged"]].to_dict("records"):
        for name, (rows_of, flag) in parts.items():
            path = run["folder"] / name
            asked = run["args"].get(flag)
            if asked in (None, False) and not path.exists():
                continue
            try:
                found[name].append(rows_of(run, table(path)))
            except (ValueError, TypeError, OSError, csv.Error) as error:
                left_out[f"{run['name']} ({name} only)"] = str(error)[:200]
    return stacked(found["measurements.csv"], ROWS, runs), stacked(found["shape.csv"], SHAPES, runs), left_out


def stacked(tables, columns, runs):
    """Return the tables one below the other; `optimizer` in the order of the Group."""
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return whole[columns].astype({"optimizer": runs["optimizer"].dtype})


def of_usual_draws(table, key):
    """Return (the rows with the usual number of draws at their point, `key`, one a seed; {run: why one is not there}).

    Usual is what most seeds have there; of equals, the most draws. Rows without draws are never there: they say ‖∇f‖
    only.
    """
    drawn = table[table["draws"] > 0]
    by_count = drawn.groupby([*key, "draws"], observed=True)["seed"].nunique().rename("seeds").reset_index()
    usual = by_count.sort_values(["seeds", "draws"]).drop_duplicates(key, keep="last")
    usual = drawn[key].merge(usual, how="left", on=key)["draws"].to_numpy()
    other, twin = drawn["draws"] != usual, drawn.duplicated([*key, "seed", "draws"])
    reasons = {f"{run} (budget only)": "same optimizer, b, seed and step as another" for run in drawn["run"][twin]}
    for run, draws, most in zip(drawn["run"][other], drawn["draws"][other], usual[other], strict=True):
        reasons[f"{run} (budget only)"] = f"it has draws {draws:g}; most have {most:g} there"
    return drawn[~other & ~twin], reasons


def setting(run, *keys):
    """Return the arguments in which runs must agree to be averaged, of a run as a dict, as text."""
    return ", ".join(f"{key} {run['args'].get(key)!r:.40}" for key in keys)


def table(path):
    """Return a CSV file as a DataFrame of texts. ValueError, OSError or csv.Error where it is not whole."""
    path = Path(path)
    if not path.is_file():  # a pipe, for instance, would be waited for
        raise ValueError("no regular file, or missing")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    text = path.read_bytes().decode()
    if not text.endswith("\n"):
        raise ValueError("empty, or its last line is cut")
    head, *lines = csv.reader(text.splitlines(), strict=True)
    if len(set(head)) < len(head) or any(len(line) != len(head) for line in lines):
        raise ValueError("a column is there twice, or a line has more or fewer fields than columns")
    return pd.DataFrame(lines, columns=head, dtype=str)


def budget_rows(run, texts):
    """Return the rows of one run's measurements.csv. ValueError for whatever is wrong with them."""
    texts = texts.assign(**{key: value for key, value in BEFORE.items() if key not in texts})
    draws = number(texts, "draws", True)
    batch_size = number(texts, "batch_size", True)
    own = batch_size == run["batch_size"]
    rows = head(run, texts).assign(batch_size=batch_size, draws=draws)
    if not (draws == run["args"].get("draws", 0)).all():
        raise ValueError(f"draws are not those of the arguments, {run['args'].get('draws')!r:.40}")
    for keys, needed in ((ALWAYS, True), (OF_DRAWS, draws > 0), (OF_TRAINING, (draws > 0) & own), (NOWHERE, False)):
        rows = rows.assign(**{key: number(texts, key, needed) for key in keys})
    if (batch_size % 1 > 0).any() or (batch_size < 1).any():
        raise ValueError("a batch_size is no whole number >= 1")
    if rows.duplicated(["steps", "batchnorm", "batch_size"]).any():
        raise ValueError("a step, batchnorm and batch_size is there twice")
    return rows


def shape_rows(run, texts):
    """Return the rows of one run's shape.csv that are of the whole vector. ValueError for whatever is wrong."""
    if "layer" not in texts:
        raise ValueError("it has no column layer")
    texts = texts[texts["layer"] == "all"]
    draws = run["args"].get("draws")
    if type(draws) is not int or draws < 4:
        raise ValueError(f"draws is {draws!r:.40} in its arguments, allowed is 4 or more")
    rows = head(run, texts).assign(draws=draws)
    rows = rows.assign(**{key: number(texts, key, True) for key in SHAPE})
    rows = rows.assign(**{key: number(texts, key, False) for key in TESTED})
    if rows.duplicated(["steps", "batchnorm"]).any():
        raise ValueError("a step and batchnorm is there twice")
    return rows


def head(run, texts):
    """Return the columns HEAD of one run's rows. ValueError for a step or mode that it cannot have measured."""
    steps = number(texts, "steps", True)
    if (steps % 1 > 0).any() or (steps > run["steps"]).any():
        raise ValueError(f"a step is not one of 0 to {run['steps']}")
    if "batchnorm" not in texts or not texts["batchnorm"].isin(["train", "eval"]).all():
        raise ValueError("a batchnorm is neither train nor eval")
    about = {"run": run["name"], "optimizer": run["optimizer"], "seed": run["seed"]}
    about["run_batch_size"] = run["batch_size"]
    return pd.DataFrame({"steps": steps.astype(int), "batchnorm": texts["batchnorm"]}).assign(**about)


def number(texts, key, needed, low=0):
    """Return a column of texts as float64. needed: where it must hold a number, not nothing or nan; bool or Series.
    low: what it must not be below, where it is not one of SIGNED.

    ValueError that names the column where a text is none, is not finite, or is negative and cannot be.
    """
    if key not in texts:
        raise ValueError(f"it has no column {key}")
    values = pd.to_numeric(texts[key], errors="coerce").astype(float)
    low = -HUGE if key in SIGNED else low
    sound = values.between(low, HUGE)
    without = texts[key].isin(["", "nan"])
    sound |= without & ~pd.Series(needed, texts.index, dtype=bool)
    if not sound.all():
        raise ValueError(f"{key} is {texts[key][~sound].iloc[0]!r:.40}, allowed is a finite number")
    return values
