"""The numbers of a group of runs as DataFrames: steps, b*, C², K, δ and correlations.

Bands over seeds are three columns: NAME_mean, NAME_min, NAME_max. Their values are missing where no seed has one.
"""

import numpy as np
import pandas as pd
from scipy import stats

from report import critical_batch_sizes, details, full_gradients, measurements, published, theory
from report.critical_batch_sizes import critical_batch_size

DELTAS = ("delta_formula", "delta_measured_mean")  # the columns of `points` that accuracy is set against


def measure(group):
    """Return ({name: DataFrame} of all that is known of a Group, {run: why a file of its was not used})."""
    runs, made = group.runs, {"runs": group.runs, "crossings": group.crossings}
    theirs = published.shb_steps(group.published)
    made["published_steps"] = theirs.reset_index()
    made["steps"] = steps(group.crossings, theirs)
    made["measurements"], made["shapes"], unread = measurements.read(group.sampling)
    made["full_gradients"], no_full = full_gradients.read(group.critical)
    made["steps_full_gradient"] = bracketed(full_gradients.crossings(made["full_gradients"], group.crossings))
    made["norms_for_k"] = full_gradients.norms_for_k(made["measurements"], made["full_gradients"])
    for rule, paper in (("", group.published), ("_full_gradient", {})):  # the paper's b* are of the running mean
        given = runs, made[f"steps{rule}"], group.lr, group.beta, paper, made["norms_for_k"]
        made[f"constants{rule}"] = constants(*given)
    made["critical_batch_size"] = critical_batch_sizes.by_rule(made)
    made["critical_batch_size_four_ways"] = critical_batch_sizes.four_ways(made, sampled_batchnorm(runs))
    made["points"] = points(runs, made["constants"], group.lr, group.beta, group.published)
    made["correlations"] = correlations(made["points"])
    spread, no_omega = details.spread_of_omegas(runs)
    made["omega"] = details.omega(runs, spread.pop("shares"))
    made["gradients"], no_history = details.gradients(runs)
    return made | spread, unread | no_full | no_omega | no_history


def band(groups, column):
    """Return mean, least and greatest of a column over the seeds of each group, as three columns."""
    low, high = groups[column].min(), groups[column].max()
    mean = groups[column].agg(lambda seeds: seeds.dropna().astype(float).mean()).astype(float)
    mean = mean.clip(low.astype(float), high.astype(float))  # rounding can put the mean of equal values beside them
    return pd.DataFrame({f"{column}_mean": mean, f"{column}_min": low, f"{column}_max": high})


def steps(crossings, published_steps):
    """Return one row per optimizer, b and ε: steps to ε and SFO complexity (= steps × b) over seeds.

    A seed that did not reach ε enters with the steps it was checked for; one that diverged before counts in
    `critical_seeds` but has no steps. at_first_check: seeds whose mean was ≤ ε when first looked at, after
    --min_epochs, so that their steps are only an upper bound. checked: the steps of the runs that the row is from.
    ratio: ours / published, where all of it is measured, with the published settings.
    """
    early = (crossings["steps"].fillna(0) == crossings["first_check"]) & (crossings["first_check"] > 1)
    table, seeds = over_seeds(crossings, early)
    table["published"] = published_steps.reindex(table.index)
    measured = (table["steps_are"] == "measured") & (table["diverged"] == 0) & seeds["as_published"].all()
    table["ratio"] = (table["steps_mean"] / table["published"].astype(float)).where(measured)
    return table.reorder_levels(["optimizer", "eps", "batch_size"]).reset_index()


def over_seeds(crossings, early):
    """Return (the columns of `steps` but for the published, crossings by seeds); early: where at the first check."""
    reached = crossings["steps"].notna()
    missed = ~reached & ~crossings["diverged"]
    known = crossings["steps"].where(reached, crossings["checked"].where(missed))
    facts = crossings.assign(reached=reached, missed=missed, early=early, steps=known)
    facts["sfo"] = known * facts["batch_size"]
    seeds = facts.groupby(["optimizer", "batch_size", "eps"], observed=True)
    size, reached, missed, early = seeds.size(), seeds["reached"].sum(), seeds["missed"].sum(), seeds["early"].sum()
    table = pd.DataFrame({"critical_seeds": size, "reached": reached, "diverged": size - reached - missed})
    table = table.assign(at_first_check=early).join(band(seeds, "steps"))
    # What the mean of steps is, some of them of seeds that missed ε or had it too early.
    bounds = {"undetermined": (missed > 0) & (early > 0), "lower bound": missed > 0, "upper bound": early > 0}
    table["steps_are"] = np.select([reached + missed == 0, *bounds.values()], [None, *bounds], "measured")
    return table.join(band(seeds, "sfo")).join(band(seeds, "checked")), seeds


def bracketed(crossings):
    """Return the rows of `steps` by the full gradient, whose steps are known to lie between two measurements.

    crossings: of `full_gradients.crossings`. steps_mean and sfo_mean are of the first measured steps, the upper ends;
    _min is the least lower end of a seed, and _max the greatest upper end. sfo_least: the mean of the lower ends.
    at_first_check: seeds with ‖∇f‖ ≤ ε before the first update, which need no steps at any b.
    """
    table, seeds = over_seeds(crossings, crossings["steps"].fillna(1) == 0)
    table["steps_are"] = table["steps_are"].replace("upper bound", "before the first update")
    sizes = table.index.get_level_values("batch_size")
    table["steps_min"] = seeds["least"].min()
    table["sfo_min"] = table["steps_min"] * sizes
    table["sfo_least"] = seeds["least"].agg(lambda least: least.astype(float).mean()).astype(float) * sizes
    return table.reorder_levels(["optimizer", "eps", "batch_size"]).reset_index()


def largest_full_gradient(runs, measured=None, batchnorm="train"):
    """Return K = max ‖∇f‖ as {k, k_run, k_step}, over the measured full gradients of runs that did not diverge.

    A run has measured one if its results hold full_gradient_norm, at its last step; and one at every step of
    `measured`, of `full_gradients.norms_for_k`. batchnorm: the mode in which they were measured; with BatchNorm the
    two modes are two functions. A largest mini-batch norm is no stand-in: at small b it is many times as large.
    """
    columns = ["run", "steps", "full_gradient_norm"]
    alike = runs[~runs["diverged"] & (runs["batchnorm"] == batchnorm)]
    norms = alike.rename(columns={"name": "run"})[columns].dropna()
    if measured is not None:
        norms = pd.concat([norms, measured[measured["batchnorm"] == batchnorm][columns]], ignore_index=True)
    if norms.empty:
        return {"k": None, "k_run": None, "k_step": None}
    row = norms.loc[norms["full_gradient_norm"].astype(float).idxmax()]
    return {"k": float(row["full_gradient_norm"]), "k_run": row["run"], "k_step": int(row["steps"])}


def constants(runs, rows, lr, beta, paper, measured=None):
    """Return one row per optimizer and ε: b*, the estimated C² and K, and the bound, beside the published.

    rows: of `steps`. paper: {optimizer: published numbers}. measured: as `largest_full_gradient`. C² is from b* at
    one reference ε per optimizer, the smallest with a b* inside the grid, or else with any (c_squared_from says
    which b*); there the bound equals b* by construction, elsewhere it is a prediction. Without a formula for the
    optimizer there are neither.
    """
    table = []
    batchnorm = sampled_batchnorm(runs)
    for optimizer, mine in runs.groupby("optimizer", observed=True):
        by_eps = rows[rows["optimizer"] == optimizer].groupby("eps")
        stars = {eps: critical_batch_size(part) for eps, part in by_eps}
        usable = sorted((star["edge"] != "", eps) for eps, star in stars.items() if star)
        reference, c_squared, source = None, None, None
        if usable and why_no_formula(optimizer, beta) is None:
            reference = usable[0][1]
            star = stars[reference]
            source = f"b* {star['edge'] or '='} {star['b_star']}"
            c_squared = float(theory.c_squared_from_b(optimizer, lr, star["b_star"], reference, beta))
        theirs = paper.get(optimizer, {})
        points = None if measured is None else measured[measured["optimizer"] == optimizer]
        k = largest_full_gradient(mine, points, batchnorm)
        for eps in stars or [None]:
            row = {"optimizer": optimizer, "eps": eps, "b_star": None} | stars.get(eps, {}) | {"bound": None}
            if c_squared is not None:
                row["bound"] = float(theory.critical_batch_size_bound(optimizer, lr, c_squared, eps, beta))
            row |= {"reference_eps": reference, "c_squared": c_squared, "c_squared_from": source}
            row |= k | {"published_b_star": theirs.get("b_star", {}).get(eps)}
            table.append(row | {f"published_{key}": theirs.get(key) for key in ("c_squared", "k")})
    return pd.DataFrame(table, dtype=object)


def sampled_batchnorm(runs):
    """Return the BatchNorm mode of the results of a Group's sampling runs, which have one; train if there are none."""
    sampled = runs["batchnorm"][runs["mode"] == "sampling"]
    return sampled.iloc[0] if len(sampled) else "train"


def why_no_formula(optimizer, beta):
    """Return why neither C² nor the bound of an optimizer can be computed; None if they can."""
    if optimizer not in theory.OPTIMIZERS:
        return "no formula is known for this optimizer"
    if optimizer == "shb" and beta == 0:
        return "SHB's bound is singular at β = 0"
    return None


def points(runs, constants, lr, beta, paper):
    """Return one row per optimizer and b: accuracy (%) and training loss over seeds, and δ three ways.

    delta_formula: with our C² and K; delta_published_constants: with the paper's; delta_measured: lr × ‖ω‖.
    published_accuracy is of 200 epochs, and only shown beside runs of as many. max_minibatch_norm: the largest
    ‖g_t‖ of any run that did not diverge, in any mode.
    """
    lost, normal, sampling = runs["diverged"], runs["mode"] == "normal", runs["mode"] == "sampling"
    facts = runs[["optimizer", "batch_size"]].assign(
        normal_seeds=normal,
        normal_diverged=normal & lost,
        sampling_seeds=sampling,
        sampling_diverged=sampling & lost,
        delta_measured=runs["delta"].where(sampling & ~lost),
        critical_seeds=runs["mode"] == "critical",
        max_minibatch_norm=runs["max_gradient_norm"].where(~lost),
        comparable=~(normal & ~lost) | runs["as_published"].astype(bool),
    )
    results = ["accuracy", "best_accuracy", "training_loss"]
    facts[results] = runs[results].where(normal & ~lost)
    seeds = facts.groupby(["optimizer", "batch_size"], observed=True)
    table = seeds[["normal_seeds", "normal_diverged"]].sum()
    for key in results:
        table = table.join(band(seeds, key))
    comparable = seeds["comparable"].all() & table["accuracy_mean"].notna()
    accuracy = [paper.get(optimizer, {}).get("accuracy", {}).get(b) for optimizer, b in table.index]
    table["published_accuracy"] = pd.Series(accuracy, table.index, dtype="Int64").where(comparable)
    ours = constants.drop_duplicates("optimizer").set_index("optimizer").to_dict("index")
    table["delta_formula"] = [delta(*point, lr, beta, ours) for point in table.index]
    table["delta_published_constants"] = [delta(*point, lr, beta, paper) for point in table.index]
    source = [ours[optimizer]["c_squared_from"] for optimizer, _ in table.index]
    table["delta_formula_from"] = pd.Series(source, table.index, dtype=object).where(table["delta_formula"].notna())
    table = table.join(seeds[["sampling_seeds", "sampling_diverged"]].sum()).join(band(seeds, "delta_measured"))
    return table.join(seeds["critical_seeds"].sum()).join(seeds["max_minibatch_norm"].max()).reset_index()


def delta(optimizer, b, lr, beta, constants):
    """Return δ by the formula, with C² and K from {optimizer: {c_squared, k}}; NaN where one it needs is missing."""
    c_squared, k = (constants.get(optimizer, {}).get(key) for key in ("c_squared", "k"))
    if c_squared is None or (k is None and optimizer == "shb"):  # K is in SHB's δ only
        return np.nan
    return float(theory.degree_of_smoothing(optimizer, lr, b, c_squared, k or 0.0, beta))


def correlations(points):
    """Return Pearson's r and Spearman's ρ of mean accuracy with δ, over the points (optimizer, b), and how many.

    A point one of whose seeds diverged has no accuracy that stands for it, and is left out; so is what has
    fewer than three points, or only equal ones.
    """
    rows, points = [], points[points["normal_diverged"] == 0]
    parts = [*points.groupby("optimizer", observed=True), ("all", points)]
    for key in DELTAS:
        for who, part in parts:
            pairs = part[[key, "accuracy_mean"]].dropna()
            if len(pairs) < 3 or pairs.nunique().min() < 2:
                continue
            row = {"delta": key.removesuffix("_mean"), "optimizer": who, "points": len(pairs)}
            row["pearson"] = float(stats.pearsonr(pairs[key], pairs["accuracy_mean"])[0])
            rows.append(row | {"spearman": float(stats.spearmanr(pairs[key], pairs["accuracy_mean"])[0])})
    return pd.DataFrame(rows)
