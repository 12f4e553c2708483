"""Numbers in README and docs that the report does not write: each is in a file of results/."""

import csv
import json
import math
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from conftest import ROOT

import figures
from report import axes

sys.path.insert(0, str(ROOT / "scripts"))
import study


def table(file, first):
    """The cells of the rows of a Markdown table whose header begins with `first`."""
    text = (ROOT / file).read_text().partition(f"\n| {first} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_the_times_of_the_three_modes():
    took = re.search(r"It took (\d+), (\d+) and (\d+) s", (ROOT / "results" / "quickstart.txt").read_text())
    shown = [re.search(r"(\d+) s$", row[-1])[1] for row in table("README.md", "mode")]
    assert shown == list(took.groups())


def test_what_save_memory_saves():
    rows = json.loads((ROOT / "results" / "save_memory.json").read_text())["rows"]
    found = {(row["images_a_step"], row["side"]): row for row in rows if row["mode"] == "normal"}
    shown = table("docs/speed.md", "b")
    assert shown
    for b, milliseconds, megabytes in shown:
        ours, saving = found[int(b), "ours"], found[int(b), "saving"]
        assert milliseconds == ", ".join(f"{1000 * row['seconds_a_step']:,.0f}" for row in (ours, saving))
        assert megabytes == ", ".join(f"{row['peak_bytes'] / 1e6:,.0f}" for row in (ours, saving))


def test_the_tables_and_the_report_are_what_figures_py_makes_of_the_records(tmp_path, monkeypatch):
    """And no file lies beside them that it does not make. The figures are drawn, but not written."""

    def note(path, fig, title):
        plt.close(fig)
        (tmp_path / f"{path.name}.png").touch()
        (tmp_path / f"{path.name}.pdf").touch()

    monkeypatch.setattr(axes, "save", note)
    results, others = ROOT / "results", {"cost.csv", "quickstart.txt", "save_memory.json"}
    flags = study.thresholds(study.cost(study.command_line([])))
    figures.main([str(results / "runs"), "--out", str(tmp_path), *flags])
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in results.iterdir() if path.is_file()} - others
    assert (tmp_path / "report.md").read_text() == (results / "report.md").read_text()
    for name in (name for name in made if name.endswith(".csv")):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), pd.read_csv(results / name), rtol=1e-9)


def test_what_has_been_done_of_the_study():
    with open(ROOT / "results" / "cost.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {key: str(value) for key, value in row.items()} for row in study.cost(study.command_line([]))
        ]
    costs = pd.read_csv(ROOT / "results" / "cost.csv").set_index("part")
    shown = table("docs/experiments.md", "part")
    assert [part for part, *_ in shown] == list(costs.index) == list(study.PARTS)
    for part, _, done, hours in shown:
        assert done == f"{costs.ended[part]} of {costs.runs[part]}"
        assert hours == f"{costs.hours[part]:.1f}"


def test_the_epsilons_of_the_study_lie_above_and_below_the_norm_before_the_first_update():
    text = (ROOT / "docs" / "experiments.md").read_text()
    norms = set()
    for path in (ROOT / "results" / "runs").glob("sampling-CIFAR100-ResNet20-*/measurements.csv"):
        rows = pd.read_csv(path)
        norms |= set(rows.loc[rows["steps"] == 0, "full_gradient_norm"].round(2))
    assert norms == {float(re.search(r"‖∇f\(x₀\)‖ = ([\d.]+)", text)[1])}
    above, below = re.search(
        r" ε = ([\d., and]+)\sare above\s.*? ([\d., and]+)\slie below it\.", text, re.DOTALL
    ).groups()
    said = [re.findall(r"\d[\d.]*", text) for text in (above, below)]
    assert said == [
        [eps for eps in study.EPS_DRAWN if float(eps) > min(norms)],
        [e for e in study.EPS_DRAWN if float(e) < min(norms)],
    ]


def test_a_small_gradient_norm_is_no_sign_of_learning():
    text = " ".join((ROOT / "docs" / "experiments.md").read_text().split())
    words = r"at 1.05 after (\d+) updates at b = (\d+) \(seed 0\), and over these the training loss was ([\d.]+) "
    updates, b, loss, guess = re.search(words + r"on average, when guessing has ln 100 = ([\d.]+)\.", text).groups()
    name = f"critical-CIFAR100-ResNet20-shb-b{b}-lr0.1-beta0.9-min_epochs0-seed0"
    last = pd.read_csv(ROOT / "results" / "runs" / name / "metrics.csv").iloc[-1]
    assert (last["steps"], f"{last['training_loss']:.2f}") == (int(updates), loss)
    assert last["ave-norm"] <= 1.05 and guess == f"{math.log(100):.2f}"


def test_the_norm_that_the_stop_has_not_seen():
    text = " ".join((ROOT / "docs" / "claims.md").read_text().split())
    every, norm, step = re.search(r"measured every (\d+) updates; .*? have ([\d.]+) at step (\d+)\.", text).groups()
    table = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_budget.csv")
    of = table[(table["optimizer"] == "sgd") & (table["run_batch_size"] == 128)].set_index("steps")
    assert f"{of['full_gradient_norm_mean'][int(step)]:.3f}" == norm
    stops = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_full_gradients.csv")
    stops = stops[stops["optimizer"] == "sgd"].set_index("steps")["full_gradient_norm"]
    assert list(stops.index) == [i * int(every) for i in range(len(stops))]
    assert stops.loc[: int(step)].min() > 1.05 and float(norm) <= 1.05
    assert (stops.cumsum() / range(1, len(stops) + 1)).min() > 1.05


def test_what_a_step_with_momentum_costs():
    """Of the loss before it (x), after a full-gradient step (y) and after the mean of its steps (z)."""
    paths = list((ROOT / "results" / "runs").glob("sampling-*-*shb-*smoothing*/landscape.csv"))
    assert len(paths) == 2
    for path in paths:
        rows = pd.read_csv(path).set_index("steps")
        assert rows["loss_z"][400] > rows["loss_x"][400] > rows["loss_y"][400]
        assert rows["loss_x"][1600] > rows["loss_z"][1600] > rows["loss_y"][1600]


def test_the_b_stars_beside_those_of_the_theory():
    text = " ".join((ROOT / "docs" / "claims.md").read_text().split())
    stars = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_critical_batch_size.csv")
    stars = stars[stars["rule"] == "running mean"].set_index(["optimizer", "eps"]).sort_index()
    b_star, edge = stars["b_star"], stars["edge"].fillna("")
    assert list(b_star["shb"]) == [2, 2, 2, 1, 1, 1] and list(edge["shb"]) == ["", "", "", "<=", "<=", "<="]
    for optimizer in ("sgd", "nshb"):
        assert list(b_star[optimizer][-3:]) == [128, 64, 64] and set(edge[optimizer]) == {""}
        assert b_star[optimizer, 1.15] == b_star[optimizer, 1.1] == 1024
        assert b_star[optimizer, 1.05] == {"sgd": 2048, "nshb": 1024}[optimizer]
    said = re.search(r"By 1/ε² from 1,024 at 1.1 it is (.*?) at 4, 3.5, 3, 1.15 and 1.05", text)[1]
    assert re.findall(r"[\d,]+\d", said) == [f"{1024 * (1.1 / eps) ** 2:,.0f}" for eps in (4, 3.5, 3, 1.15, 1.05)]
    steps = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_steps.csv")
    at = steps[steps["optimizer"] != "shb"].merge(
        stars.reset_index(), left_on=["optimizer", "eps", "batch_size"], right_on=["optimizer", "eps", "b_star"]
    )
    assert f"takes {at['steps_min'].min():.0f} to {at['steps_max'].max():.0f} updates" in text
    powers = re.search(r"powers of 1/ε from ([\d.]+) to ([\d.]+) fit", text).groups()
    for optimizer in ("sgd", "nshb"):
        found = b_star[optimizer]
        for power in (2, *map(float, powers)):  # one constant that is within a factor of 2 at each ε
            constants = np.log2(found.to_numpy(float)) + power * np.log2(found.index.to_numpy(float))
            assert np.ptp(constants) <= 2


def test_how_delta_changes_with_b():
    points = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_comparison.csv")
    points = points[(points["injected_noise"] == 0) & (points["delta_step"] == points["updates"])]
    points = points.sort_values("batch_size").set_index("optimizer")
    of_epochs, of_updates = points[points["length"] == "2 epochs"], points[points["updates"] == 196]
    for optimizer in ("sgd", "shb"):
        assert of_epochs.loc[optimizer, "delta_mean"].is_monotonic_decreasing
    assert of_updates.loc["sgd", "delta_mean"].is_monotonic_decreasing
    assert of_updates.loc["shb", "delta_mean"].is_monotonic_increasing
    for found in (of_epochs, of_updates):
        assert list(found.loc["nshb", "batch_size"]) == [32, 128, 512]
        assert found.loc["nshb", "delta_mean"].iloc[0] < found.loc["nshb", "delta_mean"].iloc[1:].min()


def test_accuracy_goes_with_delta_within_sgd_and_within_shb():
    table = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_comparison_correlations.csv")
    table = table[(table["equal"] == "2 epochs") & (table["x"] == "delta") & (table["measured_at"] == "end")]
    table = table[(table["y"] == "accuracy") & (table["injected_noise"] == "none")].set_index("optimizer")
    assert table.loc["sgd", "spearman"] == table.loc["shb", "spearman"] == 1 and table.loc["all", "spearman"] < 0.3


def test_the_variance_of_sgd_at_other_b():
    table = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_direct.csv")
    table = table[table["optimizer"].eq("sgd") & table["run_batch_size"].isin([16, 1024])]
    values = table.set_index(["run_batch_size", "steps", "batch_size"])["c_squared_direct_mean"].unstack()
    ratios = values[512] / values[8]
    assert 1.26 < ratios.max() < 1.27 and ratios.min() > 0.95


def test_which_eps_every_seed_came_to_at_every_b():
    steps = pd.read_csv(ROOT / "results" / "CIFAR100_ResNet20_lr0.1_beta0.9_steps.csv")
    missing = (steps["critical_seeds"] - steps["reached"]).groupby(steps["eps"]).sum()
    assert (missing[4.0], missing[3.5], missing[3.0]) == (0, 0, 2) and (missing[missing.index < 3] > 0).all()
    assert set(steps.loc[(steps["eps"] == 3) & (steps["reached"] < 2), "batch_size"]) == {32}


def test_what_docs_quote_of_the_report():
    report = (ROOT / "results" / "report.md").read_text()
    lines = (ROOT / "docs" / "claims.md").read_text().splitlines()
    quoted = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    assert quoted and all(text in report for text in quoted), [text for text in quoted if text not in report]
