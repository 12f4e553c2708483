"""report/landscapes.py, landscape_plots.py and evidence.py: landscape.csv in tables, figures and sentences."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from report_helpers import all_groups, drawn, measured
from test_report_budget import run, write

from report import evidence, landscape_plots, landscapes, page, words

STEPS = (0, 20, 100)


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def landscape(runs, optimizer, seed=0, modes=("train",), **more):
    """A sampling run with a landscape.csv of random numbers; returns its directory and the rows."""
    more = {"smoothing": 8, "sharpness": True, "probe_images": 40} | more
    folder, _ = run(runs, optimizer, seed, modes=modes, **more)
    rng, rows = np.random.default_rng([seed, len(optimizer), 7]), []
    for step in STEPS:
        for mode in modes:
            row = {"steps": step, "batchnorm": mode, "probe_images": 40, "points": 8}
            for key in (*landscapes.SMOOTHING, *landscapes.SHARPNESS):
                row |= {key: float(rng.normal()), f"{key}_se": float(rng.uniform(0.1, 1))}
            row |= {key: float(rng.uniform(1, 2)) for keys in landscapes.ALONE.values() for key in keys}
            rows.append(row)
    write(folder / "landscape.csv", rows)
    return folder, rows


def made(runs):
    (group,) = all_groups(runs)
    return landscapes.measure(group)


def test_the_tables_are_those_of_a_plain_loop_over_seeds(tmp_path):
    known = {(o, s): landscape(tmp_path, o, s, ("train", "eval"))[1] for o in ("sgd", "shb") for s in (0, 1, 2)}
    found, left_out = made(tmp_path)
    assert not left_out
    for name in ("smoothing", "sharpness"):
        assert len(found[name]) == 2 * 2 * 3
        for row in found[name].to_dict("records"):
            same = [
                r
                for seed in (0, 1, 2)
                for r in known[row["optimizer"], seed]
                if (r["steps"], r["batchnorm"]) == (row["steps"], row["batchnorm"])
            ]
            assert row["seeds"] == 3 and row["probe_images"] == 40
            for key in (*landscapes.ESTIMATED[name], *landscapes.ALONE[name]):
                values = [r[key] for r in same]
                band = [row[f"{key}_{of}"] for of in ("mean", "min", "max")]
                assert band == pytest.approx([sum(values) / 3, min(values), max(values)])
                if key in landscapes.ESTIMATED[name]:
                    assert row[f"{key}_se"] == pytest.approx(np.sqrt(sum(r[f"{key}_se"] ** 2 for r in same)) / 3)


DAMAGE = {
    "a number": lambda text: text.replace("e", "x"),
    "cut": lambda text: text[:-1],
    "no column": lambda text: text.replace("gaussian_se", "gauss_se", 1),
    "twice": lambda text: text + text.splitlines()[-1] + "\n",
    "a step that is none": lambda text: text.replace("\n100,", "\n101,"),
    "negative error": lambda text: text.replace("train,40,8,", "train,40,8,-").replace("real_se", "excess_s", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_left_out(tmp_path, damage):
    folder, _ = landscape(tmp_path, "sgd")
    landscape(tmp_path, "shb")
    path = folder / "landscape.csv"
    path.write_text(DAMAGE[damage](path.read_text()))
    found, left_out = made(tmp_path)
    assert list(left_out) == [f"{folder.name} (landscape.csv only)"]
    assert set(found["smoothing"]["optimizer"]) == {"shb"}


def test_lambda_max_may_be_unknown_and_smoothing_alone_may_be_asked_for(tmp_path):
    folder, rows = landscape(tmp_path, "sgd")
    write(folder / "landscape.csv", [row | {"lambda_max": "nan", "batch_sharpness": "nan"} for row in rows])
    assert made(tmp_path)[0]["sharpness"]["lambda_max_mean"].isna().all()
    landscape(tmp_path / "alone", "sgd", sharpness=False)
    found, left_out = made(tmp_path / "alone")
    assert len(found["smoothing"]) == 3 and found["sharpness"].empty and not left_out


def test_runs_of_another_probe_are_not_averaged_with_most(tmp_path):
    for seed in (0, 1):
        landscape(tmp_path, "sgd", seed)
    folder, _ = landscape(tmp_path, "sgd", 2, probe_images=80)
    found, left_out = made(tmp_path)
    reason = "it has probe_images 80, smoothing 8; most have probe_images 40, smoothing 8"
    assert left_out == {f"{folder.name} (landscape.csv only)": reason}
    assert set(found["smoothing"]["seeds"]) == {2}


def test_a_run_beside_one_of_the_same_seed_that_went_further_is_used_and_only_once(tmp_path):
    _, rows = landscape(tmp_path, "sgd")
    run(tmp_path, "sgd", draws=64, steps=(0, 200), last=200, name="further")
    landscape(tmp_path, "sgd", name="twin")
    found, left_out = made(tmp_path)
    assert not left_out and list(found["smoothing"]["steps"]) == list(STEPS)
    assert set(found["smoothing"]["seeds"]) == {1}
    assert list(found["smoothing"]["real_mean"]) == pytest.approx([row["real"] for row in rows])


def largest_step(optimizer, lr, beta, curvature):
    """Where full-batch steps on curvature·x²/2 from x = 1 have come to after 2,000 of them."""
    x, m = 1.0, 0.0
    for _ in range(2000):
        gradient = curvature * x
        m = {"sgd": 0.0, "shb": beta * m + gradient, "nshb": beta * m + (1 - beta) * gradient}[optimizer]
        x -= lr * (gradient if optimizer == "sgd" else m)
    return abs(x)


@pytest.mark.parametrize("optimizer", ["sgd", "shb", "nshb"])
@pytest.mark.parametrize(("lr", "beta"), [(0.1, 0.9), (0.3, 0.5)])
def test_thresholds_are_where_steps_on_a_quadratic_turn_unstable(optimizer, lr, beta):
    stable, _ = landscapes.thresholds(lr, beta)[optimizer]
    assert largest_step(optimizer, lr, beta, 0.99 * stable) < 1e-3
    assert largest_step(optimizer, lr, beta, 1.01 * stable) > 1e3


def test_both_figures_are_drawn(tmp_path, monkeypatch):
    for optimizer in ("sgd", "shb", "nshb"):
        landscape(tmp_path, optimizer)
    found, _ = made(tmp_path)
    fig = landscape_plots.smoothing(found["smoothing"])
    assert len(fig.axes) == 3
    first = found["smoothing"][found["smoothing"]["optimizer"] == "sgd"]
    points = fig.axes[0].containers[0].lines[0].get_ydata()
    assert list(points) == pytest.approx(list(first["real_mean"]))
    fig = landscape_plots.sharpness(found["sharpness"])
    assert [ax.get_ylabel() for ax in fig.axes] == list(landscape_plots.SHARPNESS.values())
    assert landscape_plots.smoothing(pd.DataFrame()) is landscape_plots.sharpness(pd.DataFrame()) is None
    figures, text = drawn(monkeypatch, tmp_path, tmp_path / "out")
    assert {"smoothing", "sharpness"} <= figures.keys()
    assert "### in words" in text and "### sharpness" in text


def test_sentences_say_what_the_tables_hold(tmp_path):
    for optimizer in ("sgd", "shb"):
        for seed in (0, 1):
            landscape(tmp_path, optimizer, seed)
    found = measured(tmp_path)[1]
    said = evidence.sentences(found)
    row = found["budget"][(found["budget"]["optimizer"] == "shb") & (found["budget"]["steps"] == 100)].iloc[0]
    top = row["fresh_mean"] + row["memory_mean"]
    relative = row["c_squared_direct_se_mean"] / row["c_squared_direct_mean"] / np.sqrt(2)
    se = relative * row["fresh_mean"] * row["memory_mean"] / top**2  # of f / (f + m), f with a relative error, m known
    share = words.with_error(100 * row["fresh_mean"] / top, 100 * se)
    assert f"SHB {share} %" in said[0] and "(b = 64, step 100, n = 2 seeds, 32 draws)" in said[0]
    kept = f", SHB {100 * row['memory_noise_frozen_mean'] / top:.2g} %. δ measured: "
    assert " had the weights not moved, would make this share: SGD " in said[0] and kept in said[0]
    row = found["smoothing"][(found["smoothing"]["optimizer"] == "sgd") & (found["smoothing"]["steps"] == 100)].iloc[0]
    (excess,) = [sentence for sentence in said if "The mini-batch noise of one step" in sentence]
    at = "40 training images, on average, by (b = 64, step 100, n = 2 seeds; BatchNorm in train mode): "
    assert f"{at}SGD {words.with_error(row['real_mean'], row['real_se'])}, SHB" in excess
    (flat,) = [sentence for sentence in said if sentence.startswith("C² from")]
    direct, ratios = found["direct"], []
    for _, part in direct.groupby(["optimizer", "steps"], observed=True):
        part = part.set_index("batch_size")["c_squared_direct_mean"]
        ratios.append(part[64] / part[16])
    assert f"from batches of 64 is {min(ratios):.3g} to {max(ratios):.3g} times C² from batches of 16" in flat
    assert "of 3 points" in flat  # these two runs hold the same numbers, as before the first update all do
    (beside,) = [sentence for sentence in said if "Measured beside the published" in sentence]
    mine = found["c_squared"][found["c_squared"]["optimizer"] == "shb"]
    for row in mine.to_dict("records"):
        text = words.with_error(row["c_squared_direct_mean"], row["c_squared_direct_se"])
        assert f"{text} at step {row['steps']}" in beside
    assert "the paper's 25.3; K at least" in beside and "the paper's 1.77; the paper's C² is solved" in beside
    (bound,) = [sentence for sentence in said if "An upper bound, which with" in sentence]
    ratio = found["delta_bound"].groupby("optimizer", observed=True)["bound_over_measured"].agg(["min", "max"])
    assert f"SHB {ratio['min']['shb']:.3g} to {ratio['max']['shb']:.3g}" in bound
    (growth,) = [sentence for sentence in said if sentence.startswith("C² measured at b = 64")]
    later = mine[mine["steps"] > 0]["c_squared_direct_mean"]
    assert growth.endswith(f"over steps 20, 100: {growth.rpartition(': ')[2]}")
    assert f"SHB {evidence.short(later.min())} to {evidence.short(later.max())}." in growth
    empty = dict.fromkeys(found, pd.DataFrame())
    assert evidence.sentences(empty) == []


def test_what_is_in_results_is_what_its_records_say():
    """No sentence of results/report.md is written by hand: they follow from the CSV files beside it."""
    text = (ROOT / "results" / "report.md").read_text()
    for path in sorted((ROOT / "results").glob("*_budget.csv")):
        slug = path.name.removesuffix("_budget.csv")
        files = {name: path.with_name(f"{slug}_{name}.csv") for name in (*page.TABLES, *page.FILES)}
        found = {name: pd.read_csv(file) if file.exists() else pd.DataFrame() for name, file in files.items()}
        for sentence in evidence.sentences(found):
            assert sentence in text
