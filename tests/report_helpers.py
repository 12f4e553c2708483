"""Synthetic records as main.py writes them, and figures.py in this process."""

import contextlib
import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

import figures
from report import axes, page, records
from report.groups import groups

ROOT = Path(__file__).parents[1]
PUBLISHED = [
    line.split(",")
    for line in (ROOT / "report" / "published_shb_steps.csv").read_text().splitlines()
    if line[0].isdigit()
]
PUBLISHED = {int(b): dict(zip(("0.5", "0.7", "1.0"), map(int, rest), strict=True)) for b, *rest in PUBLISHED}
SLUG = "CIFAR100_ResNet18_lr0.1_beta0.9"
OMEGA = {"mean": 0.0, "std": 1.0, "skewness": 0.0, "excess_kurtosis": 0.0, "entries": 4000}
BOUND_LABEL = "theory's bound; C² from b* at the reference ε"


def record(runs, mode, optimizer, b, seed, results, *, steps=100, epochs_made=1.0, status="finished", **args):
    """Write one run's record as main.py does; return its directory."""
    name = f"{mode}-{optimizer}-b{b}-seed{seed}" + "".join(f"-{k}{v}" for k, v in args.items())
    args = {
        **{"dataset": "CIFAR100", "model": "ResNet18", "lr": 0.1, "beta1": 0.9, "precision": "default"},
        **{"epochs": 200, "max_steps": None, "min_epochs": 11, "steps": 10000, "full_grad_batchsize": 1000},
        **{"mode": mode, "optimizer": optimizer, "batchsize": b, "seed": seed, "name": name},
        **args,
    }
    summary = {"status": status, "mode": mode, "steps": steps, "epochs": epochs_made, "seconds": 1.0}
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary | {"args": args, "results": results}))
    return folder


def normal(runs, optimizer, b, seed, accuracy, loss=0.1, **more):
    results = {"accuracy": accuracy, "best_accuracy": 70.0, "training_loss": loss, "max_gradient_norm": 1.0}
    return record(runs, "normal", optimizer, b, seed, results, **more)


def critical(runs, optimizer, b, seed, to_eps, k=1.77, **more):
    results = {"steps_to_eps": to_eps, "max_gradient_norm": k}
    return record(runs, "critical", optimizer, b, seed, results, **more)


def sampling(runs, optimizer, b, seed, delta, omega, norm=1.77, **more):
    results = {"delta": delta, "noise_norm": delta / 0.1, "max_gradient_norm": 1.5, "full_gradient_norm": norm}
    results |= {f"omega_{key}": value for key, value in OMEGA.items()}
    folder = record(runs, "sampling", optimizer, b, seed, results, **more)
    np.save(folder / "omega.npy", omega.astype(np.float32))
    return folder


def gaussian(seed=0):
    """An ω of as many entries as OMEGA says."""
    return np.random.default_rng(seed).normal(size=4000)


def u_shaped(runs, optimizer="shb", **more):
    """Critical runs with b* = 16 at ε = 1."""
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(runs, optimizer, b, 0, {"1.0": n}, steps=n, **{"min_epochs": 0, **more})


def histories(runs):
    """Critical runs of SGD with histories at b = 1024, 2048, 4096, one of them without. Returns {b: norms}."""
    rng, norms = np.random.default_rng(8), {}
    for b, n in ((1024, 3000), (2048, 1500), (4096, 900)):
        folder = critical(runs, "sgd", b, 0, {"0.5": None}, steps=n, status="not_reached")
        norms[b] = (0.7 + 5 / np.arange(1, n + 1) * rng.uniform(0.5, 2, n)).astype("<f4")
        if b != 4096:
            norms[b].tofile(folder / "gradient_norms.f32")
    return norms


def edit(folder, part, **values):
    """Change values in `part` (args or results) of a written summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    summary[part] |= values
    (folder / "summary.json").write_text(json.dumps(summary))


def read(runs_dir):
    """The runs as dicts, and {name: reason} of those left out."""
    runs, left_out = records.read(runs_dir)
    return runs.to_dict("records"), left_out


def all_groups(runs_dir):
    """The Groups of the runs below runs_dir."""
    return groups(records.read(runs_dir)[0])


def measured(runs_dir):
    """The one Group of the runs below runs_dir, and its tables by name."""
    (group,) = all_groups(runs_dir)
    return group, page.measure(group)[0]


def steps_of(runs_dir):
    """Rows of the table of steps, as dicts."""
    return measured(runs_dir)[1]["steps"].to_dict("records")


def to_eps(group):
    """{run: {ε: (step or None, checked)}} of a Group's crossings."""
    found = {}
    for row in group.crossings.itertuples():
        step = None if pd.isna(row.steps) else int(row.steps)
        found.setdefault(row.name, {})[row.eps] = (step, row.checked)
    return found


def drawn(monkeypatch, runs_dir, out):
    """Draw the one group of runs; return {name: (open figure, its title)} and the report's text."""
    found = {}
    (group,) = all_groups(runs_dir)

    def keep(path, fig, title):
        found[path.name.removeprefix(f"{group.slug}_")] = (fig, title)

    monkeypatch.setattr(axes, "save", keep)
    out.mkdir()
    return found, page.write(group, out)


def marks(fig, label):
    """The (x, y) of all marks of the figure that look like the legend's entry `label`."""
    points = []
    for ax in fig.axes:
        looks = [line.get_marker() for line in ax.lines if line.get_label() == label]
        for line in ax.lines:
            if line.get_marker() in looks and line.get_zorder() == axes.MARK:
                points += list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return points


def command(*words):
    """figures.py in this process: its exit status and what it wrote."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            figures.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
    for stream in (out, err):
        stream.seek(0)
    return SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())


def table(out, name, slug=SLUG):
    """The rows of a CSV that figures.py wrote, as texts."""
    with open(out / f"{slug}_{name}.csv", newline="") as file:
        return list(csv.DictReader(file))
