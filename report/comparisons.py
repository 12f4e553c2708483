"""Normal runs beside what sampling runs of the same arguments measured: over all lr, β, b, noise and lengths at once.

A point is the normal runs of one data set and network that agree in ARGUMENTS and in length; bands are over its seeds.
Its δ and sharpness are of the sampling runs that agree in ARGUMENTS: at the step at which the normal runs ended,
where they measured there, else at the last that they measured.
"""

import statistics

import numpy as np
import pandas as pd
from scipy import stats

from datasets import DATASETS
from report import measurements, tables
from report.budget import pooled_error
from report.records import HUGE, NAME, six_digits, take

ARGUMENTS = ["optimizer", "nu", "lr", "beta", "batch_size", "injected_noise", "precision"]
# What --sharpness leaves beside measurements.csv: the file, and its column of the Hessian's largest eigenvalue.
LANDSCAPE, SHARPNESS = "landscape.csv", "lambda_max"
RENAMED = "delta_renamed"  # a sampling run's result: δ of the same trajectory by the name of the other algorithm
OUTCOMES = ("accuracy", "best_accuracy", "training_loss")
COUNT = range(1, 2**53)
SEVERAL = 3  # points, of which a rank correlation is told


def measure(runs):
    """Return ({name: DataFrame}, {run: why it, or a file of its, was not used}) of the runs of one network and data.

    comparison: a row a point. comparison_correlations: of `correlations`. noise_to_inject: see there.
    """
    known, left_out = [], {}
    for run in runs[runs["mode"] != "critical"].to_dict("records"):
        try:
            known.append(run | more_arguments(run))
        except ValueError as error:
            left_out[run["name"]] = str(error)
    known = pd.DataFrame(known, columns=[*runs.columns, "injected_noise", "precision", "length", "same"])
    known = known.astype({"diverged": bool})
    sampled, no_sampled = sampling_runs(known)
    rows, _, unread = measurements.read(sampled)
    sharp, no_sharp = sharpness(sampled)
    normal, twins = one_each(known[known["mode"] == "normal"])
    comparison = points(normal, smoothing(sampled, rows), sharp)
    made = {"comparison": comparison, "comparison_correlations": correlations(comparison)}
    made["noise_to_inject"] = noise_to_inject(sampled, rows)
    return made, left_out | no_sampled | unread | no_sharp | twins


def more_arguments(run):
    """Return injected_noise, precision, length and same, a text that is equal where ARGUMENTS are, of a run as a dict.

    length: how long a normal run was to be, "20 epochs", or "5000 updates" where --max_steps ends it. ValueError for
    an argument that is unsound.
    """
    args, found = run["args"], {"length": ""}
    found["injected_noise"] = six_digits(run["args"].get("injected_noise") or 0)  # not known to older records
    found["precision"] = take(args, "precision", NAME)
    if run["mode"] == "normal":
        epochs, cap = take(args, "epochs", COUNT), args.get("max_steps")
        found["length"] = f"{epochs} epochs"
        if cap is not None and take(args, "max_steps", COUNT) <= epochs * steps_per_epoch(run):
            found["length"] = f"{cap} updates"
    found["same"] = " ".join(f"{key}={(run | found)[key]}" for key in ARGUMENTS)
    return found


def steps_per_epoch(run):
    """Return the updates of an epoch; of a data set unknown here infinity, so that --max_steps counts as what ends."""
    if run["dataset"] not in DATASETS:
        return np.inf
    return -(-DATASETS[run["dataset"]].train_images // run["batch_size"])


def sampling_runs(known):
    """Return (the sampling runs whose δ can be compared, {run: why it cannot}): of one chunk and BatchNorm mode."""
    sampled = known[(known["mode"] == "sampling") & ~known["diverged"]]
    if sampled.empty:
        return sampled, {}
    chunks = sampled["args"].map(lambda args: repr(args.get("full_grad_batchsize"))[:40])
    settings = "full_grad_batchsize " + chunks + ", batchnorm " + sampled["batchnorm"]
    usual = statistics.mode(settings)
    others = sampled["name"][settings != usual]
    left_out = {f"{name} (comparison)": f"most sampling runs have {usual}" for name in others}
    return sampled[settings == usual], left_out


def one_each(normal):
    """Return (the normal runs, one a point and seed: the longest that did not diverge; {the others: why})."""
    normal = normal.sort_values(["diverged", "steps"], ascending=[True, False], kind="stable")
    twin = normal.duplicated(["same", "length", "seed"])
    left_out = {f"{name} (comparison)": "same arguments, length and seed as another" for name in normal["name"][twin]}
    return normal[~twin], left_out


def smoothing(sampled, rows):
    """Return a row per sampling run and measured step: same, seed, steps, draws, delta, and RENAMED at the last step.

    rows: of `measurements.read`. A run without rows has the δ of its results, of one draw. Of two runs of one seed
    that measured at one step, the one with more draws stays.
    """
    own = rows[rows["batch_size"] == rows["run_batch_size"]].dropna(subset="delta")
    found = []
    for run in sampled.to_dict("records"):
        mine = own[(own["run"] == run["name"]) & (own["batchnorm"] == run["batchnorm"])][["steps", "draws", "delta"]]
        if mine.empty:
            mine = pd.DataFrame({"steps": [run["steps"]], "draws": [0.0], "delta": [run["delta"]]})
        renamed = run.get(RENAMED, np.nan)
        renamed = mine["steps"].map(lambda step, run=run, renamed=renamed: renamed if step == run["steps"] else np.nan)
        found.append(mine.assign(same=run["same"], seed=run["seed"], **{RENAMED: renamed}))
    table = pd.concat(found) if found else pd.DataFrame(columns=["same", "seed", "steps", "draws", "delta", RENAMED])
    return table.sort_values("draws", ascending=False, kind="stable").drop_duplicates(["same", "seed", "steps"])


def sharpness(sampled):
    """Return (a row per sampling run and measured step, {run: why its file was not used}) of LANDSCAPE.

    Columns: same, seed, steps, batchnorm, SHARPNESS. Of two modes of BatchNorm it is eval, the custom for sharpness.
    """
    found, left_out = [], {}
    for run in sampled.to_dict("records"):
        if not (run["folder"] / LANDSCAPE).exists():
            continue
        try:
            texts = measurements.table(run["folder"] / LANDSCAPE)
            rows = measurements.head(run, texts)[["steps", "batchnorm"]]
            if SHARPNESS not in texts:
                raise ValueError(f"it has no column {SHARPNESS}")
            rows[SHARPNESS] = pd.to_numeric(texts[SHARPNESS], errors="coerce").astype(float)
            found.append(rows[rows[SHARPNESS].abs() < HUGE].assign(same=run["same"], seed=run["seed"]))
        except (ValueError, TypeError, OSError, measurements.csv.Error) as error:
            left_out[f"{run['name']} ({LANDSCAPE} only)"] = str(error)[:200]
    table = pd.concat(found) if found else pd.DataFrame(columns=["same", "seed", "steps", "batchnorm", SHARPNESS])
    return table.sort_values("batchnorm", kind="stable").drop_duplicates(["same", "seed", "steps"]), left_out


def points(normal, smoothed, sharp):
    """Return one row a point: ARGUMENTS, length, updates, and accuracy, training loss, δ and sharpness over seeds.

    delta_step, sharpness_step: where they were measured. paired: the seeds whose δ is of a sampling run of the same
    seed; the others are given the mean of all. Of a seed that diverged nothing but its number enters.
    """
    facts = normal[["same", "length", "seed", *ARGUMENTS, "diverged", *OUTCOMES, "steps"]].reset_index(drop=True)
    facts = facts.rename(columns={"diverged": "normal_diverged", "steps": "updates"})
    facts = facts.join(at_end(facts, smoothed, "delta")).join(at_end(facts, sharp, SHARPNESS))
    facts = facts.join(at_end(facts, smoothed, RENAMED)[[RENAMED]])
    facts = facts.rename(columns={"delta_own": "paired", f"{SHARPNESS}_step": "sharpness_step"})
    measured = [*OUTCOMES, "delta", SHARPNESS, RENAMED]
    known = [*measured, "updates", "delta_step", "sharpness_step"]
    facts[known] = facts[known].where(~facts["normal_diverged"])
    facts["paired"] &= ~facts["normal_diverged"]
    seeds = facts.groupby(["same", "length"])
    table = seeds[ARGUMENTS].first().join(seeds["updates"].max())
    table = table.join(pd.DataFrame({"normal_seeds": seeds.size()})).join(seeds[["normal_diverged", "paired"]].sum())
    for column in measured:
        table = table.join(tables.band(seeds, column))
    table = table.join(seeds[["delta_step", "sharpness_step"]].first()).reset_index().drop(columns="same")
    return table.sort_values(["length", "delta_mean"], ignore_index=True, kind="stable")


def at_end(facts, rows, column):
    """Return, for each normal run of `facts`, `column` of the sampling rows of the same arguments, at its own end.

    Columns: the value; {column}_step, at which it was measured; {column}_own, whether by a run of the same seed. Where
    no run measured at the end, it is the last step at which any did.
    """
    rows, found = rows.dropna(subset=column), []
    for run in facts.to_dict("records"):
        here = rows[rows["same"] == run["same"]]
        if here.empty:
            found.append((np.nan, np.nan, False))
            continue
        step = run["updates"] if (here["steps"] == run["updates"]).any() else here["steps"].max()
        here = here[here["steps"] == step]
        own = here[here["seed"] == run["seed"]]
        found.append(((here if own.empty else own)[column].mean(), step, not own.empty))
    table = pd.DataFrame(found, columns=[column, f"{column}_step", f"{column}_own"], index=facts.index)
    return table.astype({column: float, f"{column}_step": float, f"{column}_own": bool})


def comparable(points):
    """Yield (what they have in common, the points) of each set that may be ranked: equal epochs, or equal updates."""
    epochs = points[points["length"].str.endswith("epochs")]
    updates = points.assign(length=points["updates"].map("{:.0f} updates".format))
    for members in (epochs, updates):
        for (precision, length), part in members.groupby(["precision", "length"]):
            yield {"equal": length, "precision": precision}, part


def of_one_step(points, step):
    """Yield (its name, the points) of each set of points measured alike: at their end, or at one and the same step."""
    yield "end", points[points[step] == points["updates"]]
    for at, part in points.groupby(step):
        yield f"step {at:g}", part


def correlations(points):
    """Return Spearman's ρ of accuracy and training loss with δ, sharpness, updates and b, within comparable sets only.

    A set trained for as many epochs or updates, and was measured at its end or at one step; a set that is another
    once more is not repeated. Updates and b are ranked over the settings with δ at the end too, and all three over
    those of them without injected noise. Points of a diverged seed are left out, and so are sets of fewer than SEVERAL
    points, or of equal values. No p: points that share seeds, data and a grid are not independent.
    """
    rows, seen = [], set()
    for shared, members in comparable(points[points["normal_diverged"] == 0]):
        deltas = list(of_one_step(members, "delta_step"))
        ended = deltas[0][1]
        quiet = ended[ended["injected_noise"] == 0]
        parts = [("delta", *part) for part in [*deltas, ("end", quiet)]]
        parts += [(x, "", part) for part in (members, ended, quiet) for x in ("updates", "batch_size")]
        parts += [(SHARPNESS, *part) for part in of_one_step(members, "sharpness_step")]
        for x, at, part in parts:
            for optimizer, mine in [*part.groupby("optimizer"), ("all", part)]:
                key = (x, frozenset(mine.index))
                if key not in seen:
                    seen.add(key)
                    injected = "some" if mine["injected_noise"].any() else "none"
                    about = {"x": x, "measured_at": at, "optimizer": optimizer, "injected_noise": injected}
                    rows += [shared | about | rho for rho in ranked(mine, x)]
    return pd.DataFrame(rows)


def ranked(part, x):
    """Return [{y, points, spearman}] of accuracy and training loss of the points that have x."""
    found = []
    for y in ("accuracy", "training_loss"):
        pairs = part[[x if x in part else f"{x}_mean", f"{y}_mean"]].dropna().astype(float)
        if len(pairs) >= SEVERAL and pairs.nunique().min() > 1:
            found.append({"y": y, "points": len(pairs), "spearman": float(stats.spearmanr(*pairs.to_numpy().T)[0])})
    return found


def noise_to_inject(sampled, rows):
    """Return R = √(V_small − V_large) for every two b drawn at one x_t of an SGD run: with --injected_noise R its
    steps at b_large have the noise, in norm, that they have at b_small.

    noise_to_inject is from the mean of V over seeds; its standard error of the draws alone: those at two b are
    independent, and R's error is that of R² over 2R. Both without a value where V_small is not the larger.
    """
    sgd = sampled[sampled["optimizer"] == "sgd"].rename(columns={"name": "run"})
    drawn = rows[rows["draws"] > 0].merge(sgd[["run", "same", "lr", "injected_noise"]], on="run")
    point = ["same", "seed", "batchnorm", "steps"]
    drawn = drawn.sort_values("draws", ascending=False).drop_duplicates([*point, "batch_size"])
    at = ["lr", "run_batch_size", "injected_noise", "batchnorm", "steps", "draws"]
    columns = ["same", "seed", *at, "batch_size", "variance", "variance_se"]
    pairs = drawn[columns].merge(drawn[columns], on=["same", "seed", *at], suffixes=("_small", "_large"))
    pairs = pairs[pairs["batch_size_small"] < pairs["batch_size_large"]]
    pairs["square"] = pairs["variance_small"] - pairs["variance_large"]
    pairs["square_se"] = np.hypot(pairs["variance_se_small"], pairs["variance_se_large"])
    seeds = pairs.groupby([*at, "batch_size_small", "batch_size_large"])
    square = seeds["square"].mean()
    table = pd.DataFrame({"seeds": seeds.size()}).join(seeds[["variance_small", "variance_large"]].mean())
    table["noise_to_inject"] = np.sqrt(square.where(square > 0))
    table["noise_to_inject_se"] = seeds["square_se"].agg(pooled_error) / (2 * table["noise_to_inject"])
    return table.reset_index().rename(columns={"batch_size_small": "b_small", "batch_size_large": "b_large"})
