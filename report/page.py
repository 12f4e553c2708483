"""report.md: the tables and figures of every group of runs, which runs they are of, and what is missing and why."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from files import write_table
from report import axes, budget, budget_plots, evidence, landscape_plots, landscapes, overview, plots, tables

METHOD = Path(__file__).with_name("method.md").read_text(encoding="utf-8")

NO_DRAWS = "no sampling run with --draws and a sound measurements.csv"
NO_FULL = "no critical run with --full_grad_every and a sound full_gradients.csv"
NO_STAR = "fewer than two b all of whose seeds reached ε, after the first check, without diverging"
NO_SMOOTHING = "no sampling run with --smoothing and a sound landscape.csv"
NO_SHARPNESS = "no sampling run with --sharpness and a sound landscape.csv"
STEPS = ("steps", "constants", "published_steps", "steps_full_gradient", "constants_full_gradient")
HISTORY = ("gradients", "runs", "crossings", "full_gradients")
# Each figure: the function, the tables it takes, and why there is none where it returns none.
FIGURES = {
    "overview": (overview.figure, ("overview",), NO_DRAWS),
    "steps": (plots.steps, STEPS, "fewer than two b have steps to any ε"),
    "accuracy": (plots.accuracy, ("points",), "fewer than two b have an accuracy"),
    "delta": (plots.delta, ("points",), "fewer than two b have a δ, by the formula or measured"),
    "accuracy_delta": (plots.accuracy_delta, ("points", "correlations"), "fewer than two points have accuracy and δ"),
    "omega": (plots.omega, ("omega", "omega_histogram", "omega_qq"), "no sampling run with a sound omega.npy"),
    "gradients": (plots.gradients, HISTORY, "no critical run with a sound history"),
    "budget": (budget_plots.budget, ("budget",), NO_DRAWS),
    "c_squared": (budget_plots.c_squared, ("direct",), "fewer than two b drawn at one x, with --draw_batchsizes"),
    "delta_bound": (budget_plots.delta_bound, ("delta_bound",), NO_DRAWS),
    "shape": (budget_plots.shape, ("shape",), "no sampling run with --shape and a sound shape.csv"),
    "smoothing": (landscape_plots.smoothing, ("smoothing",), NO_SMOOTHING),
    "sharpness": (landscape_plots.sharpness, ("sharpness",), NO_SHARPNESS),
}
POOLED = "\npooled over coordinates of different scale: how one ω\nis spread over them, not whether it is Gaussian"
# Beneath the title of a figure: what it shows, for who sees nothing else.
NOTES = {
    "overview": "\nMeans over seeds, bars ±1.96 standard errors of the draws; a bar with an arrow is an upper limit. "
    "The formula's δ is from the greatest C² and K of all measured steps. Right: what noise adds to the loss of "
    "training images on average, each optimizer at its own weights.",
    "steps": "\nAbove: updates until the mean of all ‖g‖ so far is ≤ ε. Below: the gradients of images that they "
    "take, least at b*. Mean over seeds, band from the least to the greatest.",
    "accuracy": "\nWhere training ended. Mean over seeds, band from the least to the greatest.",
    "delta": "\nThe formula's δ has C² from b* and the greatest measured K; beside it η‖ω‖ at one step. Mean over "
    "seeds, band from the least to the greatest.",
    "accuracy_delta": "\nA mark is a batch size: mean over seeds, bars from the least to the greatest. The formula's "
    "δ falls as b grows, so that within an optimizer it ranks as b does, the other way round.",
    "omega": POOLED,
    "gradients": "\nThe norm of each mini-batch gradient, and its mean from the first step on, by which the paper "
    "stops.",
    "budget": "\nWhat the search direction noise ω consists of, mean over seeds. "
    "The diamond, and the number above, is its measured square: beside the bar, it has BatchNorm's bias and chance. "
    "Below: the same bars as shares.",
    "c_squared": "\nVariance of one image's gradient, from batches of b drawn at the same weights: flat where "
    "the theory's C²/b holds. Mean over seeds, bars ±1.96 standard errors of the draws.",
    "delta_bound": "\nδ measured, mean over seeds, bars ±1.96 standard errors of the draws. "
    "The formula's is from the greatest measured C² and K.",
    "shape": "\nIs mini-batch noise normal, coordinate by coordinate across draws, and in how many directions does "
    "it lie? Mean and band over seeds.",
    "smoothing": "\nLoss under the noise of a step, less the loss where its mean leads: what averaging over the noise "
    "adds. Each panel has its own scale. Mean over seeds, bars ±1.96 standard errors of the draws. On a probe of "
    "training images.",
    "sharpness": "\nMean over seeds, bars ±1.96 standard errors of random vectors and batches. On a probe of training "
    "images.",
}
# Each table of the report, and why there is none where it is empty. Those in FILES are written, but not shown.
TABLES = {
    "overview": NO_DRAWS,
    "critical_batch_size": NO_STAR,
    "critical_batch_size_four_ways": "no ε has a critical batch size by any of the ways",
    "points": "no runs",
    "correlations": "fewer than three points with accuracy and δ, or all equal",
    "steps": "no critical run says anything of ε",
    "steps_full_gradient": NO_FULL,
    "omega": "no sampling run that did not diverge",
    "budget": NO_DRAWS,
    "c_squared": NO_DRAWS,
    "delta_bound": NO_DRAWS,
    "shape": "no sampling run with --shape and a sound shape.csv",
    "smoothing": NO_SMOOTHING,
    "sharpness": NO_SHARPNESS,
}
FILES = ("direct", "omega_histogram", "omega_qq", "gradients", "full_gradients")
# Why columns of a table have no value ("–"), told beneath the table.
NO_BOUND = "no formula is known for this optimizer, or no C² is measured"
FEW_DRAWS = "fewer than 20 draws, too few for the test"
NO_K = "no run that did not diverge measured a full gradient"
MISSING = {
    NO_STAR: "b_star edge range critical_seeds undecided departure departure_reference",
    f"{NO_FULL}; or {NO_STAR}": "b_star_full range_full departure_full departure_reference_full",
    NO_DRAWS: "simple_noise_scale simple_noise_scale_steps",
    "no ε has a b*, or there is no formula (see runs, below)": "bound reference_eps c_squared c_squared_from",
    NO_K: "k k_run k_step",
    "the paper gives none": "published_b_star published_c_squared published_k published",
    "no normal run that did not diverge": "accuracy best_accuracy training_loss",
    "the paper gives none, or our runs are not all of 200 epochs in default precision": "published_accuracy",
    "no C², or for SHB no K (see runs, below)": "delta_formula delta_formula_from",
    "the paper gives no C²": "delta_published_constants",
    "no sampling run that did not diverge": "delta_measured",
    "no step of a run that did not diverge": "max_minibatch_norm",
    "every seed diverged before ε": "steps steps_are sfo sfo_least",
    "nothing published, or not all of ours measured with the published settings": "ratio",
    "only the ω drawn are read whole": "beyond_6_std",
    "a batch of all images has no C², two draws no standard error": "c_squared_direct c_squared_direct_se noise_scale "
    "c_squared_least c_squared_most",
    NO_SMOOTHING: "smoothing_steps real real_se gaussian gaussian_se isotropic isotropic_se predicted predicted_se",
    "no ε has a b*, or no C² is measured": "solved_over_direct",
    "only SHB and NSHB have a second name, and older records lack it": "delta_renamed",
    NO_BOUND: "c_squared_term k_term delta_bound bound_over_measured c_squared_greatest",
    FEW_DRAWS: "rejected",
    "no sampling run with the same arguments": "delta delta_step paired",
    "no sampling run with the same arguments and --sharpness": "lambda_max sharpness_step",
    "every seed diverged": "updates",
    "the optimizer takes none": "beta nu",
    "no formula is known for this optimizer": "stable_up_to batch_sharpness_level",
    "the variance at the smaller b is not the larger": "noise_to_inject noise_to_inject_se",
    "not SHB or NSHB, or not measured at the end of the sampling run": "delta_renamed",
}
WHY = {column: why for why, columns in MISSING.items() for column in columns.split()}
HEADINGS = {"run_batch_size": "b", "max_minibatch_norm": "largest mini-batch gradient norm"}


def text(value):
    """Return a cell of a Markdown table: "–" for what is missing, four digits of a number."""
    if pd.isna(value):
        return "–"
    if isinstance(value, str):
        return value
    return format(value, ".4g" if abs(value) < 1e4 else ".0f")


def markdown(table):
    """Return a DataFrame as a Markdown table without its empty columns; a band is one cell, mean [min, max].

    Beneath it stands why a value is missing ("–"), from WHY; an empty text is an empty cell.
    """
    shown, missing = {}, {}
    for column in table.columns[~table.columns.str.endswith(("_min", "_max"))]:
        key, cells = column, table[column].map(text)
        stem = column.removesuffix("_mean")
        if f"{stem}_min" in table:
            key, low, high = stem, table[f"{stem}_min"].map(text), table[f"{stem}_max"].map(text)
            cells = cells.where(low == high, cells + " [" + low + ", " + high + "]")
        head = HEADINGS.get(key, key.replace("_", " "))
        if not cells.isin(["", "–"]).all():
            shown[head] = cells
            if "–" in cells.to_list():
                missing.setdefault(WHY.get(key, "not known"), []).append(head)
    lines = [list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    notes = "".join(f"\n– in {', '.join(heads)}: {why}.\n" for why, heads in missing.items())
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + notes


def bullets(lines):
    """Return the lines as a Markdown list, "none" if there are none."""
    return "".join(f"- {line}\n" for line in lines or ["none"])


def tell_runs(group, constants):
    """Return the lines that say which runs a Group's figures are of, and which K and δ came of them."""
    lines = [f"{mode} runs: {shared}" for mode, shared in sorted(group.settings.items())]
    for row in constants.drop_duplicates("optimizer").to_dict("records"):
        name = row["optimizer"].upper()
        if row["k"] is not None:
            lines.append(f"K of {name}: {row['k']:.4g}, ‖∇f‖ at step {row['k_step']:g} of {row['k_run']}")
        if row["c_squared"] is None:
            why = tables.why_no_formula(row["optimizer"], group.beta) or "no ε has a b*"
            lines.append(f"not drawn: the formula's δ of {name}: no C²: {why}")
        elif row["optimizer"] == "shb" and row["k"] is None:
            lines.append(f"not drawn: the formula's δ of {name}: it needs K: {NO_K}")
    lost = group.runs["diverged"].map({True: "diverged: ", False: "used: "})
    return lines + list(lost + group.runs["name"])


def tell_budget(made):
    """Return the lines that say what the figures of the noise budget leave out."""
    lines = []
    if made["budget"].empty:
        return lines
    shown, every = budget_plots.shown_size(made["budget"]), sorted(made["budget"]["run_batch_size"].unique())
    others = ", ".join(f"{b:g}" for b in every if b != shown)
    if others:
        lines.append(f"not drawn: the noise budget at b = {others}: its figures are of b = {shown}")
    bounds = made["delta_bound"]
    for name in bounds["optimizer"][bounds["delta_bound"].isna()].unique():
        lines.append(f"not drawn: the formula's δ of {name.upper()} with the direct C²: {NO_BOUND}")
    if len(made["shape"]) and made["shape"]["rejected_mean"].isna().all():
        lines.append(f"not drawn: the share of coordinates rejected: {FEW_DRAWS}")
    return lines


def measure(group):
    """Return ({name: DataFrame} of all tables of a Group, {run or file: why it was not used})."""
    made, unsound = tables.measure(group)
    noise, not_in_budget = budget.measure(made, group)
    landscape, no_landscape = landscapes.measure(group)
    made |= noise | landscape
    return made | {"overview": overview.overview(made)}, unsound | not_in_budget | no_landscape


def write(group, out):
    """Write a Group's figures and tables into `out`, say on stdout what they are of; return its part of report.md."""
    made, unsound = measure(group)
    page, lines = f"\n## {group.title}\n", [f"{group.slug}: {len(group.runs)} runs used"]
    for name, (draw, needed, why) in FIGURES.items():
        with plt.rc_context(axes.STYLE):
            fig = draw(*(made[table] for table in needed))
            if fig:
                axes.save(out / f"{group.slug}_{name}", fig, group.title + NOTES[name])
                page += f"\n![{name}]({group.slug}_{name}.png)"
            else:
                lines.append(f"not drawn: {name}: {why}")
    said = evidence.sentences(made)
    if said:
        page += f"\n\n### in words\n\n{bullets(said)}"
    for name, why in TABLES.items():
        if len(made[name]):
            page += f"\n\n### {name.replace('_', ' ')}\n\n{markdown(made[name])}"
        else:
            lines.append(f"no table: {name}: {why}")
    for name in (*TABLES, *FILES):
        if len(made[name]):
            write_table(out / f"{group.slug}_{name}.csv", made[name])
    lines += tell_runs(group, made["constants"]) + tell_budget(made)
    lines += [f"left out: {name}: {reason}" for name, reason in (group.left_out | unsound).items()]
    print(*lines, sep="\n")
    return page + "\n### runs\n\n" + bullets(lines)
