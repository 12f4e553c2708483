"""The numbers of README.md and results/README.md are those of the CSV files in results/."""

import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from report import records
from report.statistics import hours

RESULTS = ROOT / "results"
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "results/README.md")}


def table(name, **where):
    """The rows of a table of ResNet20 for which the columns have these values."""
    rows = pd.read_csv(RESULTS / f"CIFAR100_ResNet20_lr0.1_beta0.9_{name}.csv")
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.set_index("label")


def cells(page, *head):
    """The cells of the one row of a page's tables that begins with these cells, without its ± part."""
    start = "| " + " | ".join(head) + " |"
    (line,) = [line for line in PAGES[page].splitlines() if line.startswith(start) and line.count("|") != 6]
    found = [cell.split("±")[0] for cell in line.removeprefix(start).strip("|").split("|")]
    return [float(re.sub("[, %]", "", cell)) for cell in found]


def near(shown, value):
    """Whether a number that is shown is the value, rounded to the digits that are shown."""
    digits = len(f"{shown:.10f}".rstrip("0").split(".")[1])
    return abs(shown - value) <= 0.5000001 * 10**-digits


def test_the_quickstart_s_table_is_that_of_its_files(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import quickstart

    quickstart.main(Path("results/quickstart"))
    text = capsys.readouterr().out
    assert text == (RESULTS / "quickstart.txt").read_text()
    for sentence in (
        "SGD: highest 66.5 % at b = 16, inside the grid",
        "SHB: highest 68.0 % at b = 128, inside the grid",
    ):
        assert sentence in text


def test_sgd_and_nshb_are_level_where_both_fit_and_delta_is_not():
    rows = pd.read_csv(RESULTS / "quickstart" / "mnist1d_MLP_lr0.1_beta0.9_accuracy.csv")
    both = (
        rows[rows["unfit"] == 0]
        .pivot(index="b", columns="label", values="accuracy_mean")
        .dropna(subset=["SGD", "NSHB"])
    )
    below = both["SGD"] - both["NSHB"]
    assert len(both) == 4 and (f"{below.min():.1f}", f"{below.max():.1f}") == ("0.4", "0.9")
    rows = pd.read_csv(RESULTS / "quickstart" / "mnist1d_MLP_lr0.1_beta0.9_delta.csv")
    rows = rows[(rows["epoch"] > 15) & (rows["epoch"] < 16) & rows["b"].isin(both.index)]
    delta = rows.pivot(index="b", columns="label", values="delta_mean")
    assert len(delta) == 4 and (delta["SGD"] / delta["NSHB"]).min() > 2


def test_the_verdicts_are_those_of_the_tables():
    folders = [pd.read_csv(RESULTS / folder / "verdicts.csv") for folder in ("mnist1d", "confirm")]
    for row in zip(*(table.itertuples() for table in folders), strict=True):
        fine, coarse = ([f"{r.effect:.{d}f} ({r.low:.{d}f} to {r.high:.{d}f})" for r in row] for d in (2, 1))
        assert f"| {fine[0]} | {fine[1]} |" in PAGES["results/README.md"], fine
        assert "T4" in PAGES["results/README.md"] and (row[0].Index == 3 or coarse[0] in PAGES["README.md"]), coarse
        assert row[0].Index == 3 or coarse[1] in PAGES["README.md"]
    assert [list(table["significant"]) for table in folders] == [
        [True] * 5 + [False],
        [False, True, True, False, True, False],
    ]


def test_what_was_explored_on_mnist1d():
    page, tables = PAGES["results/README.md"], RESULTS / "mnist1d"
    rho = pd.read_csv(tables / "predictors.csv").set_index("predictor")["rank_correlation"]
    names = {"delta": "δ ", "lr_over_b": "η_eff/b ", "temperature": "temperature ", "lambda_max": "λ_max −"}
    assert ", ".join(f"{said}{abs(rho[name]):.2f}" for name, said in names.items()) in page
    settings = pd.read_csv(tables / "settings.csv")
    assert settings["fits"].sum() == 35 and (settings["seeds"] == 5).all()
    grid = settings[(settings["lr"] == 0.1) & settings["fits"] & (settings["beta1"].fillna(0.9) == 0.9)]
    for label, b, best in (("SGD", 16, "66.5"), ("NSHB", 16, "66.2"), ("SHB", 128, "66.6")):
        rows = grid[grid["label"] == label].set_index("b")["accuracy_mean"]
        assert rows.idxmax() == b == rows.index.min() and f"{rows.max():.1f}" == best
    for lr, times, solved in ((0.02, 96, 3140), (0.04, 48, 1568)):
        stars = pd.read_csv(tables / "softmax" / f"mnist1d_Softmax_lr{lr}_critical_batch_size.csv").set_index("eps")
        row = stars.loc[0.4]
        assert round(row["c_squared_fit"]) == solved and round(row["c_squared_fit"] / row["c_squared_run"]) == times
    memory = pd.read_csv(tables / "memory" / "mnist1d_MLP_lr0.1_beta0.9_omega.csv")
    memory = (
        memory[memory["memory_noise_mean"].notna() & (memory["steps"] > 0)]
        .groupby(["label", "b"])
        .mean(numeric_only=True)
    )
    for where, shown in ((("SHB", 128), (2.32, 2.02, -1.26, 3.08)), (("NSHB", 256), (0.006, 0.036, 0.009, 0.051))):
        parts = [memory.loc[where, f"memory{part}_mean"] for part in ("_noise", "_drift", "_cross", "")]
        assert all(near(a, b) for a, b in zip(shown, parts, strict=True)), parts
    shape = pd.read_csv(tables / "shape" / "mnist1d_MLP_lr0.1_beta0.9_shape.csv")
    assert (round(shape["effective_rank_mean"].min()), round(shape["effective_rank_mean"].max())) == (39, 107)
    assert near(0.74, shape["non_normal_share_mean"].max())


AT = {"b": 128, "steps": 1600}
THREE = ["SGD", "SHB", "NSHB"]


def test_the_front_page():
    omega, delta, smoothing = table("omega", **AT), table("delta", **AT), table("smoothing", **AT)
    share = 100 * omega["fresh_mean"] / (omega["fresh_mean"] + omega["memory_mean"])
    for head, values in (
        ("mean squared noise E‖ω‖²", omega["noise_square_mean"]),
        ("share of it that this mini-batch adds", share),
        ("δ measured", delta["delta_mean"]),
        ("δ by the paper's formula, divided by δ measured", delta["formula_over_measured"]),
        ("loss added by one step's fresh noise (nats)", smoothing["excess_real_mean"]),
        ("the same for isotropic noise of equal length", smoothing["excess_isotropic_mean"]),
    ):
        shown = cells("README.md", head)
        assert all(near(cell, values[label]) for cell, label in zip(shown, THREE, strict=True)), (head, shown, values)


@pytest.mark.parametrize("label", THREE)
@pytest.mark.parametrize("steps", [400, 1600])
def test_what_omega_is_made_of(label, steps):
    shown = cells("results/README.md", label, f"{steps:,}")
    row = table("omega", b=128, steps=steps).loc[label]
    columns = ["noise_square", "fresh", "memory", "full_gradient_norm", "delta"]
    assert all(near(cell, row[f"{column}_mean"]) for cell, column in zip(shown, columns, strict=True))


@pytest.mark.parametrize("label", THREE)
def test_c_squared_delta_and_shape(label):
    page = "results/README.md"
    rows = table("c_squared", b=128, batch_size=128).loc[label].set_index("steps")
    (line,) = [line for line in PAGES[page].splitlines() if line.startswith(f"| {label} |") and line.count("±") == 4]
    for cell, steps in zip(line.strip("|").split("|")[1:], (0, 50, 400, 1600), strict=True):
        value, half = (float(part.replace(",", "")) for part in cell.split("±"))
        mean, high = rows.loc[steps, "c_squared_mean"], rows.loc[steps, "c_squared_high"]
        assert near(value, mean) and near(half, high - mean)
    row = table("delta", b=128, steps=400).loc[label]
    (line,) = [line for line in PAGES[page].splitlines() if line.startswith(f"| {label} | 400 | 0.") and "±" in line]
    shown = [float(part) for part in re.split(r"[|±]", line.strip("|"))[2:]]
    values = (row["delta_mean"], row["delta_high"] - row["delta_mean"], row["delta_formula"])
    assert all(map(near, shown[:3], values)) and shown[3] == pytest.approx(row["formula_over_measured"], rel=0.03)
    row = table("shape", **AT).loc[label]
    (line,) = [line for line in PAGES[page].splitlines() if line.startswith(f"| {label} |") and "%" in line]
    shown = [float(part.strip(" %")) for part in line.strip("|").split("|")[1:]]
    values = (
        row["pooled_kurtosis_mean"],
        row["scales_kurtosis_mean"],
        100 * row["non_normal_share_mean"],
        row["effective_rank_mean"],
    )
    assert all(map(near, shown, values))


@pytest.mark.parametrize(
    ("head", "column"),
    [
        ("one step's fresh noise", "excess_real"),
        ("Gaussian noise of the same covariance", "excess_gaussian"),
        ("isotropic noise of the same length", "excess_isotropic"),
        ("the prediction η² tr(HΣ)/2", "excess_predicted"),
        ("momentum's displacement", "displacement"),
    ],
)
def test_which_noise_smooths(head, column):
    rows = table("smoothing", **AT)
    for cell, label in zip(cells("results/README.md", head), THREE, strict=True):
        assert near(cell, rows.loc[label, f"{column}_mean"])


def test_numbers_in_sentences():
    page = PAGES["results/README.md"]
    rows = table("c_squared", steps=1600, b=128).loc["SGD"].set_index("batch_size")
    for b, text in ((8, "1,042 ± 66"), (512, "1,076 ± 20")):
        mean, half = rows.loc[b, "c_squared_mean"], rows.loc[b, "c_squared_high"] - rows.loc[b, "c_squared_mean"]
        assert f"{mean:,.0f} ± {half:.0f}" == text and text in page
    assert f"{rows.loc[128, 'c_squared_augmentation_mean']:.0f} of {rows.loc[128, 'c_squared_mean']:,.0f}" in page
    rows = table("c_squared", steps=400).loc["SGD"]
    rows = rows[rows["b"] == rows["batch_size"]].set_index("b")
    assert [f"{rows.loc[b, 'c_squared_mean']:,.0f}" for b in (16, 128, 1024)] == ["150", "715", "1,510"]
    assert "150 ± 9.5, 715 ± 24 and 1,510 ± 35" in page
    first = table("c_squared", steps=0, b=128, batch_size=128).loc["SGD"]
    share = 100 * first["c_squared_augmentation_mean"] / first["c_squared_mean"]
    assert f"and {share:.0f} % at t = 0" in page
    rows = table("smoothing", b=128, steps=400)["excess_real_mean"]
    assert "{:.3f} (SGD), {:.4f} (SHB) and {:.4f} (NSHB)".format(*rows[THREE]) in page
    rows = table("sharpness", **AT)["lambda_max_mean"]
    assert "{:.1f}, {:.1f} and {:.1f}".format(*rows[THREE]) in page
    rows = table("delta_names", **AT)
    assert (
        f"{rows.loc['SHB', 'delta_as_shb_mean']:.3f} as SHB\nand {rows.loc['SHB', 'delta_as_nshb_mean']:.3f} as NSHB"
        in page
    )
    assert (
        f"{rows.loc['NSHB', 'delta_as_shb_mean']:.3f} as SHB and {rows.loc['NSHB', 'delta_as_nshb_mean']:.3f} as NSHB"
        in page
    )
    rows = pd.read_csv(RESULTS / "CIFAR100_ResNet18_lr0.1_beta0.9_c_squared.csv").set_index("steps")["c_squared_mean"]
    assert f"{rows[0]:,.0f} ± 71 at t = 0 and {rows[100]:.0f} ± 18 at t = 100" in page


def test_verdicts():
    at_one_b = table("c_squared", b=128)
    own = at_one_b[at_one_b["batch_size"] == 128]["c_squared_mean"]
    for label, times in (("SGD", 2.3), ("SHB", 8.7), ("NSHB", 2.5)):
        assert near(times, own[label].max() / own[label].min())
    flat = at_one_b[at_one_b["steps"] == 1600]
    flat = (flat["batch_size"] * flat["variance_mean"]).groupby("label").agg(["min", "max"])
    assert (flat["max"] / flat["min"]).max() < 1.1
    early = at_one_b[at_one_b["steps"] < 400]
    early = (early["batch_size"] * early["variance_mean"]).groupby([early.index, early["steps"]]).agg(["min", "max"])
    assert 1.1 < (early["max"] / early["min"]).max() < 1.26
    ratios = pd.read_csv(RESULTS / "CIFAR100_ResNet18_lr0.1_beta0.9_delta.csv").set_index("steps")[
        "formula_over_measured"
    ]
    assert near(29, ratios[100])
    ratios = table("delta", b=128)["formula_over_measured"]
    assert ratios["SGD"].max() < 2 and ratios[["SHB", "NSHB"]].min() > 5.9 and ratios[["SHB", "NSHB"]].max() < 14.3
    assert table("delta").loc["SGD", "formula_over_measured"].max() < 2
    shape = table("shape", b=128)
    assert shape["non_normal_share_mean"].min() > 0.0775 and shape["non_normal_share_mean"].max() < 0.1105
    assert shape["effective_rank_mean"].min() > 85 and shape["effective_rank_mean"].max() < 500
    assert set(shape["entries_mean"]) == {275_572}


def test_the_cost_is_that_of_the_parts():
    for row in pd.read_csv(RESULTS / "cost.csv").itertuples():
        assert re.search(rf"\| {row.part}.*\| {row.runs} \| {row.hours:.2f} \|", PAGES["results/README.md"])
    assert (
        f"Each trajectory counted once, these are {hours(records.runs(RESULTS / 'runs')):.1f} hours"
        in PAGES["results/README.md"]
    )
