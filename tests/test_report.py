"""report/: frames, curves that are kept apart, tables computed again in plain loops, steps to ε, b*, formulas."""

import functools
import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from recorded import OPTIMIZERS, SEEDS, SIZES, T, measurement, one, read, record

from measure.quantities import INDEX, MEASURED, columns
from report import page, records, theory
from report.statistics import at_common, hours, level, measured, over_seeds, paired

FREEDOM = {"excess_predicted": 15, "excess_gaussian": 15, "excess_isotropic": 15, "hessian_trace": 15}
FREEDOM |= {"batch_sharpness": 31, "excess_predicted_isotropic": 15}  # where it is not draws − 1


@pytest.fixture(scope="module")
def made(runs_dir):
    """The tables of the study."""
    ((_, _, members),) = page.sections(records.runs(runs_dir))
    return page.tables(members)


@functools.cache
def files(runs_dir, name):
    """(arguments, rows) of every file with this name."""
    folders = [folder for folder in sorted(runs_dir.iterdir()) if (folder / name).exists()]
    return [(json.loads((f / "args.json").read_text())["args"], read(f / name)) for f in folders]


def rows_of(runs_dir, name, **wanted):
    """The rows of all files `name` of the runs with these arguments."""
    alike = [rows for args, rows in files(runs_dir, name) if wanted.items() <= {k: args[k] for k in wanted}.items()]
    return [row for rows in alike for row in rows]


# --- frames ---------------------------------------------------------------------------------------------------


def test_the_three_frames_have_every_row_and_column(runs_dir):
    runs = records.runs(runs_dir)
    assert len(runs) == len(list(runs_dir.iterdir())) == 36 + 3 + 1
    assert {"b", "seed", "lr", "beta1", "epochs", "status", "draws", "folder", "args"} <= set(runs)
    assert list(dict.fromkeys(runs["label"])) == ["SGD", "SHB", "NSHB"]  # the order of arguments.OPTIMIZERS
    assert runs["beta1"].isna().sum() == (runs["optimizer"] == "sgd").sum()  # SGD has none, whatever was recorded
    for frame, name in ((records.curves(runs), "metrics.csv"), (records.measurements(runs), "measurements.csv")):
        everything = rows_of(runs_dir, name)
        assert len(frame) == len(everything)
        for key in everything[0]:
            known = sorted(str(row[key]) for row in everything if row[key] is not None)
            assert sorted(map(str, frame[key].dropna())) == known or sorted(map(float, known)) == sorted(frame[key])
    assert {*INDEX, *columns(*MEASURED)} <= set(records.measurements(runs[:0]))  # without any run too
    assert {"training_acc", "ave-norm"} <= set(records.curves(runs[:0]))


def test_what_cannot_be_read_is_named_in_a_line(tmp_path, capsys):
    good = record(tmp_path, "--optimizer=sgd", 9)
    record(tmp_path, "--optimizer=sgd --seed=1", 9, steps=10_000)  # as an older version had it
    (record(tmp_path, "--optimizer=sgd --seed=2", 9) / "summary.json").unlink()
    (record(tmp_path, "--optimizer=sgd --seed=3", 9) / "summary.json").write_text('{"status"')
    assert records.runs(tmp_path)["run"].tolist() == [good.name]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("left out: normal-mnist1d-MLP-sgd") for line in lines)
    for seed, reason in enumerate(("older version", "unfinished", "JSON"), start=1):
        assert any(f"seed{seed}" in line and reason in line for line in lines)


# --- which runs are one curve ---------------------------------------------------------------------------------

ASKED = {"measure": ["noise", "smoothing"], "draws": 5, "draw_batchsizes": [8], "measure_batchnorm": ["eval"]}
ASKED |= {"full_grad_batchsize": 50, "probe_images": 9, "exact_memory": 3, "max_steps": 50}
SAME = [
    {"epochs": 7, "until_loss": 0.1, "recalibrate": True, "measure_every": 0.5, **ASKED},
    {"mode": "critical", "eps": [3.0], "min_epochs": 1},
    {"mode": "sampling", "steps": [5], **ASKED},
]
OTHER = {
    **{"dataset": "digits", "model": "Softmax", "optimizer": "nshb", "lr": 0.2, "beta1": 0.5, "injected_noise": 2.0},
    **{"precision": "ieee", "cuda_graph": True, "deterministic": True, "schedule": "cosine", "inject": "isotropic"},
}


def test_what_changes_the_trajectory_separates_runs_also_a_flag_unknown_here_and_nothing_else_does(tmp_path):
    for seed, more in enumerate([{}, *SAME]):
        record(tmp_path, f"--seed={seed}", 40, metrics=[{"steps": 40, "accuracy": 90}], **more)
    for i, (key, value) in enumerate(OTHER.items()):
        record(tmp_path, f"--seed=9{i}", 40, metrics=[{"steps": 40, "accuracy": i}], **{key: value})
    runs = records.runs(tmp_path)
    assert runs["curve"].value_counts().tolist() == [1 + len(SAME), *[1] * len(OTHER)]
    assert len(runs.drop_duplicates(["setting", "label", "beta1"])) == 1 + len(OTHER)
    tables = [page.tables(members)["accuracy"] for _, _, members in page.sections(runs)]
    means = {mean for table in tables for mean in table["accuracy_mean"]}
    assert means == {90, *range(len(OTHER))}  # nothing is averaged over both


def test_qhm_is_told_by_its_nu_and_a_float_by_what_it_means(tmp_path):
    record(tmp_path, "--optimizer=qhm --lr=0.01", 9)
    record(tmp_path, f"--optimizer=qhm --seed=1 --lr={0.1 * (1 - 0.9)!r}", 9)
    record(tmp_path, "--optimizer=qhm --nu=0.7 --lr=0.01", 9)
    runs = records.runs(tmp_path)
    assert runs.groupby("label")["seed"].apply(list).to_dict() == {"QHM": [0, 1], "QHM nu 0.7": [0]}
    assert runs["lr"].unique().tolist() == [0.01] and runs["setting"].nunique() == 1


def test_runs_without_beta_join_every_beta(tmp_path):
    for flags in ("--optimizer=sgd", "--optimizer=shb --beta1=0.5", "--optimizer=nshb --beta1=0.9"):
        record(tmp_path, flags, 9)
    found = [(slug, part["label"].tolist()) for _, slug, part in page.sections(records.runs(tmp_path))]
    assert found == [("mnist1d_MLP_lr0.1_beta0.5", ["SGD", "SHB"]), ("mnist1d_MLP_lr0.1_beta0.9", ["SGD", "NSHB"])]


# --- means over seeds -------------------------------------------------------------------------------------------


def test_two_runs_of_one_trajectory_count_once_and_no_row_is_made_of_both(tmp_path):
    """At one step the row from more draws stands, with its empty cells; what only the other measured is there too."""
    few = measurement("sgd", 100, 20, 3.0) | {"lambda_max": 7.0}
    many = [measurement("sgd", 100, 20, 1.0) | {"delta_as_shb": None}, measurement("sgd", 100, 30, 1.1)]
    flags = "--mode=sampling --optimizer=sgd --batchsize=100"
    record(tmp_path, f"{flags} --steps 20 --measure sharpness", 20, measured=[few])
    record(tmp_path, f"{flags} --steps 20 30 --draws 64", 30, measured=many)
    rows = records.measurements(records.runs(tmp_path))
    for name in ("delta", "noise_square", "variance"):
        found = measured(rows, name)
        assert found["draws"].tolist() == [64, 64] and found[name].tolist() == [row[name] for row in many]
        assert found["delta_as_shb"].isna().tolist() == [True, False] and found["lambda_max"].isna().all()
    assert measured(rows, "lambda_max")[["steps", "draws", "delta"]].to_numpy().tolist() == [[20, 32, few["delta"]]]
    tables = page.tables(records.runs(tmp_path))
    assert one(tables["delta"], steps=20)["seeds"] == 1 and len(tables["runs"]) == 2
    assert one(tables["sharpness"], steps=20)["draws"] == 32


def test_intervals_are_of_student_over_seeds_and_of_one_seed_over_its_draws():
    rows = {"optimizer": "sgd", "curve": list("aaabbc"), "seed": [0, 1, 2, 0, 1, 0], "draws": 8}
    rows |= {"q": [1.0, 2.0, 6.0, 5.0, np.nan, 4.0], "q_se": [9.0, 9.0, 9.0, 0.5, np.nan, np.nan]}
    table = over_seeds(pd.DataFrame(rows), ["curve"], ["q"]).set_index("curve")
    assert table["seeds"].to_dict() == {"a": 3, "b": 2, "c": 1} and table["draws"].tolist() == [8, 8, 8]
    a = table.loc["a"]
    assert (a["q_mean"], a["q_min"], a["q_max"]) == (3, 1, 6)
    assert a["q_se"] == pytest.approx(statistics.stdev([1, 2, 6]) / math.sqrt(3))  # what seeds report is not in it
    assert a["q_high"] - 3 == pytest.approx(T[2] * a["q_se"]) and a["q_low"] + a["q_high"] == pytest.approx(6)
    b = table.loc["b"]  # of the two seeds one knows it
    assert b["q_mean"] == 5 and b["q_high"] - 5 == pytest.approx(T[7] * 0.5)
    assert table.loc["c", "q_mean"] == 4 and math.isnan(table.loc["c", "q_high"])


TABLES = {
    "omega": ["noise_square", "fresh", "memory", "full_gradient_norm", "noise_norm"],
    **{"delta": ["delta"], "delta_names": ["delta_as_nshb"], "shape": ["isotropy", "effective_rank"]},
    "c_squared": ["c_squared", "variance"],
    "smoothing": [f"excess_{kind}" for kind in ("real", "gaussian", "isotropic", "predicted", "predicted_isotropic")],
    "sharpness": ["lambda_max", "hessian_trace", "batch_sharpness"],
}


@pytest.mark.parametrize(("name", "quantity"), [(name, each) for name, every in TABLES.items() for each in every])
def test_every_table_of_measurements_against_a_plain_loop(runs_dir, made, name, quantity):
    found = 0
    for optimizer in OPTIMIZERS:
        for b in SIZES:
            seeds = {}
            for seed in SEEDS:
                rows = rows_of(runs_dir, "measurements.csv", optimizer=optimizer, batchsize=b, seed=seed)
                for row in sorted(rows, key=lambda row: row["draws"]):  # more draws take the place of fewer
                    if row[quantity] is not None and (row["batch_size"] == b or name == "c_squared"):
                        seeds.setdefault((row["steps"], row["batch_size"]), {})[seed] = row
            for (steps, size), rows in seeds.items():
                at = {"optimizer": optimizer, "b": b, "steps": steps}
                at |= {"batch_size": size} if name == "c_squared" else {}
                ours, values = one(made[name], **at), [row[quantity] for row in rows.values()]
                mean, found = sum(values) / len(values), found + 1
                assert ours["seeds"] == len(values)
                wanted = (mean, min(values), max(values))
                assert [ours[f"{quantity}_{of}"] for of in ("mean", "min", "max")] == pytest.approx(wanted, rel=1e-12)
                half = statistics.stdev(values) / math.sqrt(len(values)) * T[len(values) - 1] if values[1:] else None
                if half is None and next(iter(rows.values())).get(f"{quantity}_se") is not None:
                    (row,) = rows.values()
                    half = row[f"{quantity}_se"] * T[FREEDOM.get(quantity, row["draws"] - 1)]
                if half is None:
                    assert math.isnan(ours[f"{quantity}_high"])
                else:
                    assert ours[f"{quantity}_high"] - mean == pytest.approx(half, rel=1e-6, abs=1e-12)
    assert found == len(made[name]) > 0


def test_the_formula_beside_the_measured_delta(runs_dir, made):
    """With the largest C² (mean over seeds) of any measured step of the curve and b, and K of the curve at any b."""
    for optimizer in OPTIMIZERS:
        everywhere = rows_of(runs_dir, "measurements.csv", optimizer=optimizer)
        k = max(row["full_gradient_norm"] for row in everywhere if row["full_gradient_norm"] is not None)
        for b in SIZES:
            c_squared = made["c_squared"].query("optimizer == @optimizer and b == @b and batch_size == @b")
            c = max(c_squared["c_squared_mean"])
            square = {"sgd": c / b, "shb": 82.9 * c / b + 81.9 * k * k, "nshb": 10 * c / b}[optimizer]
            rows = made["delta"].query("optimizer == @optimizer and b == @b")
            assert rows["delta_formula"].to_numpy() == pytest.approx(0.1 * math.sqrt(square), rel=1e-12)
            assert (rows["formula_over_measured"] * rows["delta_mean"]).to_numpy() == pytest.approx(0.1 * square**0.5)


def test_a_single_draw_is_said_to_be_one(tmp_path):
    row = {"steps": 20, "noise_norm": 3.0, "full_gradient_norm": 1.0, "delta": 0.3}
    record(tmp_path, "--mode=sampling --optimizer=sgd --steps 20", 20, measured=[row])
    made = page.tables(records.runs(tmp_path))
    table = one(made["delta"])
    assert (table["draws"], table["delta_mean"], table["k"]) == (1, 0.3, 1.0)
    assert math.isnan(table["delta_high"]) and math.isnan(table["delta_formula"])
    assert all(made[name].empty for name in ("omega", "c_squared", "smoothing", "steps", "critical_batch_size"))


def test_both_names_of_delta_are_of_one_row_and_hours_are_of_one_run(tmp_path):
    full, flags = measurement("nshb", 100, 20, 1.0), "--mode=sampling --optimizer=nshb --batchsize=100 --steps 20"
    for seed, row in enumerate((full, full | {"delta_as_shb": None, "delta_as_nshb": 9.0})):
        record(tmp_path, f"{flags} --seed={seed}", 20, measured=[row])
    record(tmp_path, f"{flags} 30", 30)
    runs = records.runs(tmp_path).assign(seconds=[3600.0, 1800.0, 7200.0])
    row = one(page.tables(runs)["delta_names"])
    assert (row["seeds"], row["delta_as_shb_mean"], row["delta_as_nshb_mean"]) == (1, 0.3, 0.7)
    assert hours(runs) == (max(runs["seconds"][runs["seed"] == 0]) + runs["seconds"][runs["seed"] == 1].item()) / 3600


def test_differences_are_paired_by_seed_and_level_is_a_test_of_equivalence():
    rows = pd.DataFrame({"seed": [0, 1, 2], "q": [60.0, 70.0, 80.0]})
    others = pd.DataFrame({"seed": [2, 1, 0, 7], "q": [78.9, 69.0, 59.1, 0.0]})
    found = paired(rows, others, "q")
    half = statistics.stdev([0.9, 1.0, 1.1]) / math.sqrt(3) * T[2]
    assert found["seeds"] == 3 and found["difference"] == pytest.approx(1.0)
    assert (found["low"], found["high"]) == pytest.approx((1 - half, 1 + half))
    assert level(rows, others, "q") > 0.99 > 0.01 > level(rows, others, "q", 1.5)
    for pair in ((rows, others), (others, rows)):  # t = −0.15 · √3/0.1, 2 degrees of freedom
        assert level(*pair, "q", 1.15) == pytest.approx(0.0608, abs=2e-4)
    assert math.isnan(level(rows[:1], others, "q"))
    rng, level_at_margin = np.random.default_rng(0), 0
    for _ in range(400):  # at the margin itself one in twenty may be called level
        values = pd.DataFrame({"seed": range(4), "q": 0.5 + 0.2 * rng.standard_normal(4)})
        level_at_margin += level(values, values.assign(q=0.0), "q") < 0.05
    assert 8 <= level_at_margin <= 33


# --- accuracy ---------------------------------------------------------------------------------------------------


def test_accuracy_is_compared_at_the_last_common_epoch(runs_dir, made):
    for optimizer in OPTIMIZERS:
        for b in SIZES:
            rows = rows_of(runs_dir, "metrics.csv", optimizer=optimizer, batchsize=b, mode="normal")
            values = [row["accuracy"] for row in rows if row["epoch"] == 4]
            ours = one(made["accuracy"], optimizer=optimizer, b=b)
            assert ours["accuracy_mean"] == pytest.approx(sum(values) / 3, rel=1e-12)
            half = statistics.stdev(values) / math.sqrt(3) * T[2]
            assert ours["accuracy_high"] - ours["accuracy_mean"] == pytest.approx(half, rel=1e-6)
            assert (ours["event"], ours["epoch_mean"], ours["diverged"], ours["seeds"]) == ("epoch 4", 4, 0, 3)


def evaluations(runs, b, epochs, seed=0, **more):
    rows = [{"steps": (i + 1) * 4000 // b, "accuracy": 10 + i, "training_loss": 1 / (i + 1)} for i in range(epochs)]
    flags = f"--optimizer=sgd --batchsize={b} --epochs={epochs} --seed={seed}"
    return record(runs, flags, epochs * 4000 // b, metrics=rows, **more)


def test_one_short_run_in_ten_does_not_move_the_event_and_diverged_seeds_are_counted(tmp_path):
    for b in (4000, 2000, 1000, 800, 500, 250, 200, 160, 125, 100):
        evaluations(tmp_path, b, 20)
    evaluations(tmp_path, 40, 2)
    evaluations(tmp_path, 4000, 1, seed=1, status="diverged")
    evaluations(tmp_path, 400, 1, status="diverged")
    table = page.accuracy(records.runs(tmp_path))
    assert set(table["event"]) == {"epoch 20"}
    assert one(table, b=4000)["accuracy_mean"] == 29 and one(table, b=4000)["diverged"] == 1
    assert one(table, b=400)["diverged"] == 1 and math.isnan(one(table, b=400)["accuracy_mean"])


def test_with_until_loss_the_event_is_the_fit(tmp_path):
    for b, epochs in ((100, 4), (200, 6), (400, 3)):  # the last one does not fit
        evaluations(tmp_path, b, epochs, until_loss=0.26)
    table = page.accuracy(records.runs(tmp_path))
    assert table["accuracy_mean"].tolist() == [13, 13, 12] and table["unfit"].tolist() == [0, 0, 1]
    assert set(table["event"]) == {"the fit (loss < 0.26)"}


def test_the_common_event_is_updates_where_no_epoch_is_shared():
    rows = pd.DataFrame({"curve": "a", "b": [1, 2, 1, 2, 1], "steps": [0, 0, 10, 10, 50], "epoch": [0, 0, 1, 2, 5]})
    found, event = at_common(rows)
    assert event == "step 10" and found.index.tolist() == [2, 3]
    assert at_common(rows[:2])[1] == "" and at_common(rows[:2])[0].empty


# --- the paper's formulas ---------------------------------------------------------------------------------------


def test_published_c_squared_follows_from_a_power_of_two():
    for optimizer, b, value in (("sgd", 512, 1280), ("shb", 1024, 25.3187), ("nshb", 512, 128), ("shb", 32, 0.7912)):
        assert theory.c_squared(optimizer, 0.1, b, 0.5, 0.9) == pytest.approx(value, abs=1e-4)
        assert theory.critical_batch_size(optimizer, 0.1, value, 0.5, 0.9) == pytest.approx(b, rel=1e-4)
    squares = theory.critical_batch_size("shb", 0.1, 25.3187, np.array([0.5, 0.7, 1.0]), 0.9)
    assert np.round(squares).tolist() == [1024, 522, 256]  # the squares of the published figure


def test_nshb_s_formula_is_no_bound(train):
    """At step 0 δ ≥ ηβ‖∇f‖, which the formula falls below from b = C²/((1 − β)β²‖∇f‖²) on."""
    flags = "--mode sampling --steps 0 --optimizer nshb --model Softmax --measure noise --draws 8 --batchsize"
    for b, above in ((500, False), (2000, True)):
        status, folder = train(*flags.split(), b)
        row = one(page.tables(records.runs(folder.parent).query("b == @b"))["delta"])
        memory = 0.05 * 0.9 * row["k"]
        assert status == 0 and row["delta_mean"] > 0.99 * memory
        assert (b > row["c_squared_max"] / (0.1 * 0.81 * row["k"] ** 2)) == above
        assert (row["delta_formula"] < memory) == above == (row["formula_over_measured"] < 1)


def test_delta_by_the_formula():
    shb = theory.delta("shb", 0.1, np.array([8, 256, 1024, 8192]), 25.318, 1.77, 0.9)
    assert np.round(shb, 3).tolist() == [2.278, 1.627, 1.608, 1.603]  # as published
    assert theory.delta("shb", 0.1, 1e300, 25.318, 1.77, 0.9) == pytest.approx(0.1 * math.sqrt(81.9) * 1.77)
    for name in theory.FORMULAS:  # without momentum all are SGD
        assert theory.delta(name, 0.3, 32, 7.0, 2.0, 0.0) == pytest.approx(0.3 * math.sqrt(7 / 32))
    assert theory.delta("nshb", 0.3, 32, 7.0, 2.0, 0.75) == pytest.approx(0.3 * math.sqrt(4 * 7 / 32))


def test_thresholds_of_sharpness_are_of_one_trajectory_whatever_its_name(made):
    assert theory.thresholds("sgd", 0.1, np.nan) == pytest.approx((20, 20))
    assert theory.thresholds("shb", 0.1, 0.9) == pytest.approx((2, 38))
    assert theory.thresholds("nshb", 1.0, 0.9) == pytest.approx(theory.thresholds("shb", 0.1, 0.9))
    assert np.isnan(theory.thresholds("qhm", 0.1, 0.9)).all()
    found = made["sharpness"].set_index("label")[["threshold_low", "threshold_high"]]
    assert found.to_numpy().ravel().tolist() == pytest.approx([20, 20, 2, 38, 20, 380])
