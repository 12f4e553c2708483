"""Which runs may share a figure: those of one data set, network, lr and β. What has no β, as SGD, joins every β."""

import contextlib
import statistics
from dataclasses import dataclass

import pandas as pd

from report import measurements, published, theory
from report.records import first_steps

POINT = ["mode", "curve", "batch_size", "seed"]
# The arguments in which sampling runs must agree to share a table of what they measured, at any of their steps.
MEASURING = ("full_grad_batchsize", "precision")
ABOUT = ["name", "optimizer", "batch_size", "seed", "diverged", "as_published", "first_check"]


@dataclass
class Group:
    """Runs that may share figures.

    beta: 0 if none has any. runs: as of `records.load`, but `optimizer` is the curve, in the order of figures.
    critical: its critical runs with the settings of most, also those of one curve, batch size and seed, the one that
    went furthest first. sampling: likewise those that measured as most did, whatever their steps. crossings: see
    there. settings: {mode: what its runs share}. left_out: {name: reason}. published: the paper's numbers, {optimizer:
    {name: number}}.
    """

    slug: str
    title: str
    lr: float
    beta: float
    runs: pd.DataFrame
    critical: pd.DataFrame
    sampling: pd.DataFrame
    crossings: pd.DataFrame
    settings: dict
    left_out: dict
    published: dict


def groups(runs):
    """Return a list of the `Group`s that the DataFrame of `records.load` falls into."""
    made = []
    for experiment, same in runs.groupby(["dataset", "model", "lr"]):
        for beta in sorted(same["beta"].dropna().unique()) or [None]:
            made.append(group(same[same["beta"].isna() | (same["beta"] == beta)], *experiment, beta))
    return made


def group(members, dataset, model, lr, beta):
    """Return the `Group` of these members, without those that cannot share its figures. beta: None if none has any.

    Left out are a run that disagrees with most of its mode in `records.SHARED`, and a second run of one curve, batch
    size and seed. Of two such runs the one that did not diverge, and went further, stays; `merge` adds what the other
    knows of ε.
    """
    settings = members.groupby("mode")["settings"].agg(statistics.mode).to_dict()
    members = members.sort_values(["diverged", "steps"], ascending=[True, False], kind="stable")
    left_out, first = {}, {}
    for run in members.to_dict("records"):
        usual, point = settings[run["mode"]], tuple(run[key] for key in POINT)
        if run["settings"] != usual:
            left_out[run["name"]] = f"it has {run['settings']}; most of its mode have {usual}"
        elif first.setdefault(point, run["name"]) != run["name"]:
            left_out[run["name"]] = f"same optimizer, batch size and seed as {first[point]}"
    order = [*theory.OPTIMIZERS, *sorted(set(members["curve"]) - set(theory.OPTIMIZERS))]
    members = members.assign(optimizer=pd.Categorical(members["curve"], order, ordered=True))
    alike = members[members["settings"] == members["mode"].map(settings)]
    kept = alike[~alike["name"].isin(left_out)].sort_values("name")
    slug, title = f"{dataset}_{model}_lr{lr:g}", f"{dataset}, {model}, lr {lr:g}"
    if beta is not None:
        slug, title = f"{slug}_beta{beta:g}", f"{title}, β {beta:g}"
    paper = published.constants(dataset, model, lr, beta)
    critical = alike[alike["mode"] == "critical"]
    sampling = measuring_alike(members)
    parts = dict.fromkeys(sampling["name"], " (points and ω only)")
    left_out = {name + parts.get(name, ""): reason for name, reason in left_out.items()}
    return Group(slug, title, lr, beta or 0.0, kept, critical, sampling, crossings(alike), settings, left_out, paper)


def measuring_alike(members):
    """Return the sampling runs that agree with most in MEASURING."""
    sampling = members[members["mode"] == "sampling"]
    if sampling.empty:
        return sampling
    settings = [measurements.setting(run, *MEASURING) for run in sampling.to_dict("records")]
    usual = statistics.mode(settings)
    return sampling[[setting == usual for setting in settings]]


def crossings(runs):
    """Return a DataFrame of one row an ε and critical run. Of runs of one POINT the first stays, with what all know.

    Columns: ABOUT; eps; steps, to ε, without a value if it was not reached; checked: for so many steps.
    """
    rows = []
    for _, same in runs[runs["mode"] == "critical"].groupby(POINT, sort=False):
        kept, *others = same.to_dict("records")
        known = {eps: (step, kept["steps"]) for eps, step in kept["to_eps"].items()}
        for other in others:
            merge(known, kept, other)
        about = {key: kept[key] for key in ABOUT}
        rows += [about | {"eps": eps, "steps": step, "checked": checked} for eps, (step, checked) in known.items()]
    table = pd.DataFrame(rows, columns=[*ABOUT, "eps", "steps", "checked"])
    kinds = runs[["optimizer", "diverged"]].dtypes.to_dict() | {"as_published": bool}
    return table.astype(kinds | dict.fromkeys(("first_check", "steps", "checked"), "Int64"))


def merge(known, kept, other):
    """Add to what is `known` of the run `kept`, {ε: (step or None, checked)}, what `other`, its twin, knows.

    An ε that only `other` was asked is read from the history of `kept`; without one, `other`'s answer stands, with
    the steps that `other` ran. Where both were asked, `other` adds only a step beyond those that `kept` made. An
    ε that `other` diverged without is unknown, unless `kept` diverged too.
    """
    unasked = [eps for eps in other["to_eps"] if eps not in known]
    if unasked:
        with contextlib.suppress(ValueError, OSError):  # without a sound history the answers of `other` are all
            known |= {eps: (step, kept["steps"]) for eps, step in first_steps(kept, unasked).items()}
    for eps, step in other["to_eps"].items():
        if eps not in known:
            adds = step is not None or other["diverged"] == kept["diverged"]
        else:
            adds = step is not None and known[eps][0] is None and step > known[eps][1]
        if adds:
            known[eps] = (step, other["steps"])
