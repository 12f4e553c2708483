"""report/predictors.py: one window for all numbers of a setting, and how well each predictor does."""

import math

import numpy as np
import pandas as pd
import pytest
from recorded import one, record
from scipy import stats

import figures
from report import plots, predictors, records

EPOCHS = 4000  # signals


def write(runs, optimizer, b, seed, accuracy, *, loss=0.005, fit=10, lr=0.1, more="", **columns):
    """A run of 12 epochs that fits after `fit`; what lies outside of the windows is wrong by far."""
    epoch = EPOCHS // b
    losses = {i: 1.0 if i < fit else loss for i in range(1, 13)}
    metrics = [
        {
            "steps": i * epoch,
            "training_loss": losses[i],
            "training_acc": 99.0 if i <= fit else 0.0,
            "accuracy": accuracy + (0.5, -0.5)[i % 2] if 9 <= i <= 10 else 0.0,
        }
        for i in losses
    ]
    numbers = {
        "delta": 0.2,
        "variance": 5.0,
        "c_squared": 40.0,
        "full_gradient_norm": 1.0,
        "lambda_max": 3.0,
    } | columns
    measured = [numbers | {"steps": at * epoch} for at in (2, 6)]
    measured[1] |= {"c_squared": 60.0, "full_gradient_norm": 0.5}
    measured += [{key: 1e6 for key in numbers} | {"steps": int(at * epoch)} for at in (0.5, 11.5)]
    flags = f"--optimizer={optimizer} --batchsize={b} --seed={seed} --lr={lr} --measure_every=1 --draws=8 {more}"
    return record(runs, flags, 12 * epoch, metrics=metrics, measured=measured)


def test_every_number_is_of_the_window_up_to_the_fit(tmp_path):
    for optimizer in ("sgd", "shb", "nshb"):
        for seed, accuracy in enumerate((60.0, 62.0)):
            write(tmp_path, optimizer, 100, seed, accuracy, injected=1.0 if optimizer == "sgd" else math.nan)
    write(tmp_path, "sgd", 400, 0, 50.0, loss=0.02)  # this one does not fit
    points = predictors.settings(predictors.trajectories(records.runs(tmp_path))[0])
    for optimizer, lr, square in (("sgd", 0.1, 0.6), ("shb", 1.0, 82.9 * 0.6 + 81.9), ("nshb", 0.1, 6.0)):
        row = one(points, optimizer=optimizer, b=100)
        assert row["fits"] and (row["seeds"], row["updates_mean"], row["accuracy_mean"]) == (2, 400, 61)
        assert row["gap_mean"] == 38 and row["accuracy_high"] - 61 == pytest.approx(12.706204736)
        assert (row["delta_mean"], row["lambda_max_mean"], row["lr_over_b_mean"]) == (0.2, 3, pytest.approx(lr / 100))
        assert row["temperature_mean"] == pytest.approx(lr * (6 if optimizer == "sgd" else 5))
        assert row["delta_formula_mean"] == pytest.approx(0.1 * math.sqrt(square))
    row = one(points, b=400)
    assert not row["fits"] and row["updates_mean"] == 120 and predictors.table(points).empty


def test_with_batchnorm_accuracy_is_the_recalibrated_one(tmp_path):
    folder = write(tmp_path, "sgd", 100, 0, 60.0)
    rows = pd.read_csv(folder / "metrics.csv")
    rows.assign(accuracy_recalibrated=rows["accuracy"] + 5).to_csv(folder / "metrics.csv", index=False)
    row = one(predictors.settings(predictors.trajectories(records.runs(tmp_path))[0]))
    assert (row["accuracy_mean"], row["gap_mean"]) == (65, 34)


def made_up(rng, per=8, noise=0.2):
    """Settings whose accuracy is highest at η_eff/b = e^−6, whatever the optimizer; δ rises too, λ_max is chance."""
    rows = []
    for i, optimizer in enumerate(("sgd", "shb", "nshb")):
        for x in np.linspace(-8, -4.5, per) + 0.2 * i:
            accuracy = 66 - (x + 6) ** 2 + noise * rng.standard_normal()
            row = {"optimizer": optimizer, "label": optimizer.upper(), "fits": True, "accuracy_mean": accuracy}
            values = {"lr_over_b": math.exp(x), "delta": math.exp(2 * x + 3 * i), "lambda_max": rng.uniform(1, 2)}
            rows.append(row | {f"{key}_mean": value for key, value in values.items()})
    table = pd.DataFrame(rows).assign(accuracy_low=lambda rows: rows["accuracy_mean"] - 1)
    table = table.assign(accuracy_high=table["accuracy_mean"] + 1)
    return table.reindex(
        columns=[*table, *(f"{name}_mean" for name in ("delta_formula", "temperature", "updates", "excess_real"))]
    )


def test_the_peak_its_interval_and_a_left_out_optimizer():
    rng, held = np.random.default_rng(0), 0
    for _ in range(8):
        row = one(predictors.table(made_up(rng)), predictor="lr_over_b")
        held += row["peak_low"] < math.exp(-6) < row["peak_high"]
        assert row["inside"] and row["r_squared"] > 0.95 and row["left_out"] > 0.9 and row["settings"] == 24
    assert held >= 6  # of 8 intervals of 95 %
    points = made_up(rng)
    found = predictors.table(points).set_index("predictor")
    assert found.index.tolist() == ["delta", "lr_over_b", "lambda_max"]
    wanted = stats.spearmanr(points["delta_mean"], points["accuracy_mean"]).statistic
    assert found.loc["delta", "rank_correlation"] == pytest.approx(wanted)
    assert found.loc["delta", "extrapolated"] > 0 and found.loc["delta", "left_out"] < found.loc["delta", "r_squared"]
    assert found.loc["lambda_max", "left_out"] < 0.3
    one_sided = points[points["lr_over_b_mean"] < math.exp(-6.7)]
    row = one(predictors.table(one_sided), predictor="lr_over_b")
    assert not row["inside"] and math.isnan(row["peak"]) and math.isnan(row["peak_high"])
    few = predictors.table(points[::3])  # eight settings: no percentile bootstrap
    assert few["peak_low"].isna().all() and few["settings"].tolist() == [8, 8, 8]
    outside = points.assign(fits=points["optimizer"] != "shb")
    assert predictors.table(outside)["settings"].tolist() == [16, 16, 16]


def test_the_page_has_them_once_a_network_whatever_the_learning_rate(tmp_path):
    for lr in (0.05, 0.1):
        for i, b in enumerate((50, 100, 200)):
            write(tmp_path / "runs", "sgd", b, 0, 60.0 + i, lr=lr, delta=lr * (i + 1))
    write(tmp_path / "runs", "sgd", 400, 0, 50.0, loss=0.02)
    figures.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "page.md").read_text()
    assert text.count("## What predicts accuracy? mnist1d, MLP\n") == 1 and text.count("## mnist1d, MLP, lr") == 2
    assert "| lr 0.05, SGD, b 50 | True | 800 | 60 | 39 | 0.05 |" in text and "SGD, b 400 | False |" in text
    assert len(pd.read_csv(tmp_path / "out" / "mnist1d_MLP_settings.csv")) == 7
    assert (tmp_path / "out" / "mnist1d_MLP_predictors.png").is_file()


def test_the_figure_shows_the_same_points_over_each_predictor():
    points = made_up(np.random.default_rng(0))
    points.loc[0, "label"], points.loc[1, "fits"] = "SGD inject covariance", False
    figure = plots.predictors(points)
    assert figure.get_suptitle().endswith("?") and len(figure.axes) == 3
    for ax, name in zip(figure.axes, ("delta", "lr_over_b", "lambda_max"), strict=True):
        shown = [
            (x, y) for line in ax.lines if line.get_marker() in "os^" for x, y in zip(*line.get_data(), strict=True)
        ]
        rows = points[points["fits"]]
        assert sorted(shown) == sorted(zip(rows[f"{name}_mean"], rows["accuracy_mean"], strict=True))
        hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
        assert [line.get_ydata().tolist() for line in hollow] == [[points.loc[0, "accuracy_mean"]]]


def test_settings_of_equal_delta_or_equal_rate_are_paired_by_seed(tmp_path):
    """δ 0.2, 0.205 and 0.4; η_eff/b 0.001, 0.0005 and 0.001: a, b agree in δ, and a, c in η_eff/b."""
    accuracies = {"a": (60.0, 61.0, 63.0), "b": (58.0, 60.0, 60.0), "c": (60.0, 62.0, 62.0)}
    for seed in range(3):
        a, b, c = (accuracies[name][seed] for name in "abc")
        write(tmp_path, "sgd", 100, seed, a, delta=0.2)
        write(tmp_path, "sgd", 200, seed, b, delta=0.205)
        write(tmp_path, "nshb", 100, seed, c, delta=0.4)
        write(tmp_path, "sgd", 50, seed, 50.0, delta=0.2, loss=0.02)  # does not fit
        write(tmp_path, "sgd", 400, seed, 50.0, delta=0.2, more="--inject isotropic --inject_batchsize 8")
    pairs = predictors.matched(*predictors.trajectories(records.runs(tmp_path)))
    assert len(pairs) == 2
    delta, rate = one(pairs, equal="delta"), one(pairs, equal="lr_over_b")
    assert delta["first"].endswith("SGD, b 100") and delta["second"].endswith("SGD, b 200")
    assert "NSHB" in rate["first"] and rate["second"].endswith("SGD, b 100")
    assert (delta["ratio"], rate["ratio"]) == (pytest.approx(2), pytest.approx(2)) and rate["difference"] == 0
    half = stats.t.ppf(0.975, 2) * np.std([2.0, 1.0, 3.0], ddof=1) / 3**0.5
    assert delta["difference"] == 2 and delta["difference_high"] - 2 == pytest.approx(half)
    # b fits after 200 updates, when a has made five of its ten epochs.
    assert delta["at_equal_updates"] == pytest.approx(-np.mean(accuracies["b"]))
