"""The six primary tests of docs/plan.md, from the records of the study: fixed before its first run.

Writes one row a test to OUT/verdicts.csv: effect, 95 % interval, n, p, and whether it is significant by Holm's rule;
of the MLP one row a setting (settings.csv), how well each predictor does (predictors.csv, and its figure), settings of
equal δ or equal η_eff/b (matched.csv, equal_delta.csv), and accuracy after equal updates (equal_updates.csv).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from report import critical, page, plots, predictors, records
from report.statistics import level, over_seeds, paired
from utils import Parser, UserError, as_command, path, replacing

SGD, SHB, NSHB = ({"label": name, "lr": 0.1} for name in ("SGD", "SHB", "NSHB"))
COVARIANCE, ISOTROPIC = (
    {"label": f"SGD inject {kind} inject_batchsize 16", "lr": 0.1, "b": 256} for kind in ("covariance", "isotropic")
)
# Pairs whose δ agreed within 5 % on seed 100.
EQUAL_DELTA = [
    (SHB | {"lr": 0.01, "b": 16}, SGD | {"lr": 0.107, "b": 256}),
    (NSHB | {"b": 16}, SGD | {"lr": 0.107, "b": 128}),
    (SGD | {"b": 16}, SGD | {"lr": 0.3, "b": 128}),
    (SGD | {"lr": 0.3, "b": 32}, NSHB | {"lr": 1.0, "b": 256}),
]
# Each pair is averaged over its sizes, then paired by seed. `level`: is the difference within 0.5 points?
# `differ`: is it other than 0?
ACCURACY = [
    ("equal η_eff/b, other δ", "level", [(NSHB | {"b": b}, SGD | {"b": b}) for b in (16, 32, 64, 128)]),
    ("equal δ, larger η_eff/b", "differ", EQUAL_DELTA),
    ("equal length, shape of b = 16 for isotropic", "differ", [(COVARIANCE, ISOTROPIC)]),
    ("shape of b = 16 at b = 256 for b = 16", "level", [(COVARIANCE, SGD | {"b": 16})]),
]
# Of Softmax: what log2 of b* at the larger η over b* at the smaller one is by the formula, and the power of 1/ε.
RATIO, POWER, RATES, EVERY_EPS = 1.0, 2.0, (0.04, 0.02), (0.4, 0.3, 0.25)


def cell(rows, where):
    """Return the rows of one setting. ValueError if there are none."""
    found = rows[np.logical_and.reduce([rows[key] == value for key, value in where.items()])]
    if found.empty:
        raise ValueError(f"no run of {where}")
    return found


def accuracy_test(rows, kind, pairs):
    """Return effect, interval, n and p of one of ACCURACY. A seed of which one cell has no accuracy is left out."""
    sides = (
        pd.concat([cell(rows, where) for where in side]).groupby("seed")["accuracy"]
        for side in zip(*pairs, strict=True)
    )
    one, other = (side.mean()[side.count() == len(pairs)].reset_index() for side in sides)
    found = paired(one, other, "accuracy")
    t = found["difference"] / found["se"]
    p = level(one, other, "accuracy") if kind == "level" else 2 * stats.t.sf(abs(t), found["seeds"] - 1)
    return {"effect": found["difference"], "low": found["low"], "high": found["high"], "n": found["seeds"], "p": p}


def redrawn(values, predicted, n):
    """Return the same of redrawn values (2, redraws), tested against what the theory predicts."""
    low, high = critical.interval(values)
    below = (values <= predicted).mean(axis=-1)
    p = 2 * np.minimum(below, 1 - below).max()
    return {"effect": np.median(values), "low": low, "high": high, "n": n, "p": max(p, 2 / values.shape[-1])}


def critical_tests(runs):
    """Return the rows of the two tests about b* of Softmax."""
    stars = critical.b_star(critical.steps_to_eps(runs))
    known = stars.dropna(subset="b_star_fit").set_index(["lr", "eps"])
    both = [eps for eps in EVERY_EPS if all((lr, eps) in known.index for lr in RATES)]
    if len(both) < 2:
        raise ValueError(f"b* of two ε at both η is needed, known are {list(known.index)}")
    larger, smaller = (np.stack([known.loc[(lr, eps), "redraws"] for eps in both]) for lr in RATES)
    # Redraws of one ε are of one seed: shuffled, or the errors of the two η would cancel.
    smaller = smaller[..., np.random.default_rng(0).permutation(critical.REDRAWS)]
    power = np.tensordot(critical.slope_weights(both), (larger + smaller) / 2, 1)
    ratio, n = (larger - smaller).mean(axis=0), int(known["seeds"].min())
    name = f"log2 b* at η = {RATES[0]} less at {RATES[1]}; by the formula {RATIO:g}"
    return [
        {"test": name, "kind": "formula"} | redrawn(ratio, RATIO, n),
        {"test": f"power of 1/ε in b*; by the formula {POWER:g}", "kind": "formula"} | redrawn(power, POWER, n),
    ]


def holm(p, alpha=0.05):
    """Return which p values are significant, if any false one is to have probability `alpha` at most (Holm 1979)."""
    order, found = np.argsort(p), np.zeros(len(p), bool)
    found[order] = np.logical_and.accumulate(p[order] <= alpha / np.arange(len(p), 0, -1))
    return found


def verdicts(rows, softmax):
    """Return one row a test. rows: `predictors.trajectories` of the MLP; softmax: runs, as `records.runs` has them."""
    found = [{"test": name, "kind": kind} | accuracy_test(rows, kind, pairs) for name, kind, pairs in ACCURACY]
    table = pd.DataFrame(found + critical_tests(softmax))
    return table.assign(significant=holm(table["p"].to_numpy()))


def equal_delta(rows, evaluated):
    """Return one row a pair of EQUAL_DELTA: how many times the second's δ the first has, and how they differ."""
    found = []
    for one, two in ((cell(rows, first), cell(rows, second)) for first, second in EQUAL_DELTA):
        row = {"delta_ratio": one["delta"].mean() / two["delta"].mean()}
        found.append(row | predictors.compared(evaluated, one, two))
    return pd.DataFrame(found)


def equal_updates(mlp):
    """Return accuracy and training loss after 6,000 updates of SGD at b = 256, with injected noise, and at b = 16."""
    rows = records.curves(mlp[(mlp["optimizer"] == "sgd") & (mlp["lr"] == 0.1)]).query("b == 16 or b == 256")
    rows = rows.dropna(subset="accuracy").query("steps <= 6000").sort_values("steps")
    rows = rows.drop_duplicates(["label", "b", "seed"], keep="last")
    return over_seeds(rows, [*records.CURVE, "b"], ["steps", "accuracy", "training_loss"])


@plots.styled()  # saving draws
def main(argv):
    """Write the tables. Returns the exit status. UserError."""
    parser = Parser(prog="scripts/verdicts.py", description=__doc__)
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=path, help="the study's records")
    parser.add_argument("--out", metavar="DIR", type=path, default=Path("figures"), help="default: figures")
    args = parser.parse_args(argv)
    runs = records.runs(args.runs_dir)
    try:
        mlp, softmax = (runs[runs["model"] == model] for model in ("MLP", "Softmax"))
        trajectories, evaluated = predictors.trajectories(mlp)
        table = verdicts(trajectories, softmax)
    except (ValueError, KeyError) as error:
        given = f"argument RUNS_DIR: got {str(args.runs_dir)!r}"
        raise UserError(f"{given}, allowed are the study's records ({error})") from error
    points = predictors.settings(trajectories)
    tables = {"verdicts": table, "settings": points, "predictors": predictors.table(points)}
    tables |= {
        "matched": predictors.matched(trajectories, evaluated),
        "equal_delta": equal_delta(trajectories, evaluated),
        "equal_updates": equal_updates(mlp),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with replacing(args.out / f"{name}.csv") as file:
            file.write(rows.to_csv(index=False, float_format="%.5g").encode())
    page.save(plots.predictors(points), args.out / "predictors.png")
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    as_command(main)
