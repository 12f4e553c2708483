"""report/tables.py: steps, b*, C², K, δ and correlations, and what is no measurement."""

import json

import numpy as np
import pandas as pd
import pytest
from report_helpers import (
    PUBLISHED,
    critical,
    edit,
    gaussian,
    measured,
    normal,
    read,
    record,
    sampling,
    steps_of,
    u_shaped,
)

from report import records, tables

COLUMNS = ["batch_size", "critical_seeds", "reached", "diverged", "at_first_check", "sfo_mean", "sfo_min", "sfo_max"]


def rows_of(*points):
    """Rows of the table of steps from (b, seeds' SFO, seeds that reached ε, seeds that diverged)."""
    rows = []
    for b, sfo, reached, lost in points:
        band = (np.mean(sfo), min(sfo), max(sfo)) if sfo else (np.nan, np.nan, np.nan)
        rows.append((b, len(sfo) + lost, reached, lost, 0, *band))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_critical_batch_size_needs_two_whole_points():
    assert tables.critical_batch_size(rows_of()) == {}
    assert tables.critical_batch_size(rows_of((8, [5.0], 1, 0), (16, [1.0], 0, 0))) == {}


@pytest.mark.parametrize(("sfo", "b_star", "edge"), [((1, 2, 3), 8, "<="), ((3, 2, 1), 32, ">="), ((3, 1, 2), 16, "")])
def test_critical_batch_size_says_when_it_is_at_the_edge(sfo, b_star, edge):
    points = zip((8, 16, 32), sfo, strict=True)
    star = tables.critical_batch_size(rows_of(*((b, [float(s)], 1, 0) for b, s in points)))
    assert (star["b_star"], star["edge"], star["range"]) == (b_star, edge, "")  # one seed: no spread known


def test_of_equal_minima_the_smallest_b_is_taken():
    assert tables.critical_batch_size(rows_of(*((b, [5.0], 1, 0) for b in (8, 16, 32))))["b_star"] == 8


def test_range_is_what_lies_within_the_seeds_spread_of_the_minimum():
    points = ((8, [9, 9], 2, 0), (16, [6, 6], 2, 0), (32, [4, 6], 2, 0), (64, [3, 9.2], 2, 0), (128, [6.1, 6.1], 2, 0))
    assert tables.critical_batch_size(rows_of(*points))["range"] == "16 32 64"  # a seed at 64 was the fastest


def test_a_far_point_does_not_bracket_b_star():
    points = ((8, [9.0], 0, 0), (16, [], 0, 1), (32, [3.0], 1, 0), (64, [8.0], 1, 0))
    star = tables.critical_batch_size(rows_of(*points))
    assert (star["b_star"], star["edge"], star["undecided"]) == (32, "<=", "16")
    star = tables.critical_batch_size(rows_of(points[0], *points[2:]))
    assert (star["b_star"], star["edge"], star["undecided"]) == (32, "", "")


def test_b_star_between_open_neighbours_is_no_bound_either():
    star = tables.critical_batch_size(rows_of((8, [4.0], 1, 0), (16, [], 0, 1), (32, [9.0], 1, 0)))
    assert (star["b_star"], star["edge"], star["undecided"]) == (8, "?", "16")
    star = tables.critical_batch_size(rows_of((8, [], 0, 1), (16, [4.0], 1, 0), (32, [], 0, 1), (64, [9.0], 1, 0)))
    assert (star["b_star"], star["edge"], star["undecided"]) == (16, "?", "8 32")


def test_points_that_stayed_open_are_undecided_only_if_they_may_be_smaller():
    low, high, lost = (8, [4.0, 9.0], 1, 0), (8, [99.0, 9.0], 1, 0), (8, [], 0, 2)
    for first, undecided, edge in ((low, "8", "<="), (high, "", ""), (lost, "8", "<=")):
        star = tables.critical_batch_size(rows_of(first, (16, [6, 7], 2, 0), (32, [9, 9], 2, 0)))
        assert (star["b_star"], star["undecided"], star["edge"]) == (16, undecided, edge)


def test_an_upper_bound_may_be_as_small_as_any():
    rows = rows_of((8, [99.0], 1, 0), (16, [4.0], 1, 0), (32, [9.0], 1, 0))
    assert tables.critical_batch_size(rows)["undecided"] == ""
    star = tables.critical_batch_size(rows.assign(at_first_check=[1, 0, 0]))
    assert (star["b_star"], star["undecided"], star["edge"]) == (16, "8", "<=")


def test_a_missed_point_is_never_b_star_even_with_the_smallest_bound(tmp_path):
    critical(tmp_path, "shb", 8, 0, {"0.5": None}, steps=10, status="not_reached")
    for b, n in ((16, 100), (32, 40), (64, 90)):
        critical(tmp_path, "shb", b, 0, {"0.5": n}, steps=n)
    rows = measured(tmp_path)[1]["steps"]
    assert not read(tmp_path)[1] and (rows["reached"][0], rows["sfo_mean"][0]) == (0, 80)
    star = tables.critical_batch_size(rows)
    assert (star["b_star"], star["undecided"]) == (32, "8")


def test_a_mean_below_eps_at_the_first_check_is_no_measurement(tmp_path):
    for b, n in ((8, 6250 * 11), (16, 3125 * 11), (32, 40_000), (64, 19_000), (128, 12_000)):
        critical(tmp_path, "shb", b, 0, {"1.0": n}, steps=n)
    rows = measured(tmp_path)[1]["steps"]
    assert list(rows["at_first_check"]) == [1, 1, 0, 0, 0]
    star = tables.critical_batch_size(rows)
    assert (star["b_star"], star["undecided"], star["edge"]) == (64, "8 16", "")
    assert tables.critical_batch_size(rows[:3]) == {}


def test_a_point_with_one_seed_too_early_and_one_too_late_is_undetermined(tmp_path):
    critical(tmp_path, "shb", 512, 0, {"1.0": 98 * 11}, steps=98 * 11)
    critical(tmp_path, "shb", 512, 1, {"1.0": None}, steps=2000, status="not_reached")
    critical(tmp_path, "shb", 1024, 0, {"1.0": 98 * 11}, steps=98 * 11)
    rows = steps_of(tmp_path)
    assert [(r["steps_are"], r["at_first_check"]) for r in rows] == [("undetermined", 1), ("measured", 0)]


def test_a_first_step_is_no_bound_where_every_step_is_checked(tmp_path):
    critical(tmp_path, "shb", 1024, 0, {"1.0": 1}, steps=1, min_epochs=0)
    assert [(r["steps_are"], r["at_first_check"]) for r in steps_of(tmp_path)] == [("measured", 0)]


def test_what_a_run_reached_before_it_diverged_counts(tmp_path):
    lost = {"steps": 300, "status": "diverged", "k": None}
    critical(tmp_path, "shb", 16, 0, {"1.0": 200, "0.5": 900}, steps=900)
    critical(tmp_path, "shb", 16, 1, {"1.0": 190, "0.5": None}, **lost)
    critical(tmp_path, "shb", 32, 0, {"1.0": 150, "0.5": 700}, steps=700)
    critical(tmp_path, "sgd", 8, 0, {"1.0": None}, **lost)
    assert not read(tmp_path)[1]
    table = measured(tmp_path)[1]["steps"]
    rows = {(r["optimizer"], r["eps"], r["batch_size"]): r for r in table.to_dict("records")}
    found = {k: (r["critical_seeds"], r["reached"], r["diverged"], r["steps_mean"]) for k, r in rows.items()}
    assert pd.isna(found["sgd", 1.0, 8][3])
    found["sgd", 1.0, 8] = (*found["sgd", 1.0, 8][:3], None)
    assert found == {
        ("sgd", 1.0, 8): (1, 0, 1, None),
        ("shb", 0.5, 16): (2, 1, 1, 900.0),
        ("shb", 0.5, 32): (1, 1, 0, 700.0),
        ("shb", 1.0, 16): (2, 2, 0, 195.0),
        ("shb", 1.0, 32): (1, 1, 0, 150.0),
    }
    part = table[(table["optimizer"] == "shb") & (table["eps"] == 1.0)]
    assert tables.critical_batch_size(part)["b_star"] == 16


def test_c_squared_comes_from_the_smallest_eps_whose_b_star_is_no_bound(tmp_path):
    for b, published in PUBLISHED.items():
        to_eps = published | {"0.4": published["0.5"] + 5 if b >= 4096 else None}
        critical(tmp_path, "shb", b, 0, to_eps, steps=to_eps["0.4"] or published["0.5"], status="not_reached")
    rows = {r["eps"]: r for r in measured(tmp_path)[1]["constants"].to_dict("records")}
    assert (rows[0.4]["b_star"], rows[0.4]["edge"]) == (4096, "<=")
    assert [rows[e]["b_star"] for e in (0.5, 0.7, 1.0)] == [1024, 512, 256]
    assert {r["reference_eps"] for r in rows.values()} == {0.5}
    assert rows[0.4]["c_squared"] == pytest.approx(25.3187, abs=1e-4)
    assert [round(rows[e]["bound"]) for e in (0.4, 0.7, 1.0)] == [1600, 522, 256]


def test_an_optimizer_all_of_whose_runs_diverged_has_steps_but_no_k(tmp_path):
    for b, n in ((8, 200), (16, 90), (32, 80)):
        for optimizer in ("shb", "nshb"):
            lost = {"steps": 300, "status": "diverged", "k": None}
            critical(tmp_path, optimizer, b, 0, {"1.0": n, "0.5": None}, **lost)
    points = measured(tmp_path)[1]["points"].set_index(["optimizer", "batch_size"])
    assert np.isnan(points["delta_formula"]["shb", 8]) and points["delta_formula"]["nshb", 8] > 0
    assert points["published_accuracy"].isna().all()


def test_equal_accuracies_make_a_band_of_no_width(tmp_path):
    for seed in range(3):
        normal(tmp_path, "shb", 8, seed, 93.61111111111111)
    (row,) = measured(tmp_path)[1]["points"].to_dict("records")
    assert row["accuracy_min"] == row["accuracy_mean"] == row["accuracy_max"] == 93.61111111111111


def test_accuracy_is_set_beside_the_published_only_after_as_many_epochs(tmp_path):
    for epochs in (200, 20):
        normal(tmp_path / str(epochs), "sgd", 256, 0, 50.0, epochs=epochs)
        group, made = measured(tmp_path / str(epochs))
        (published,) = made["points"]["published_accuracy"]
        assert published == 68 if epochs == 200 else pd.isna(published)
        assert f"epochs {epochs}" in group.settings["normal"]


def test_sampling_before_the_first_step_has_no_gradient_norms(tmp_path):
    folder = sampling(tmp_path, "sgd", 64, 0, 0.5, gaussian(), steps=0)
    edit(folder, "results", max_gradient_norm=None)
    assert not read(tmp_path)[1]
    made = measured(tmp_path)[1]
    assert made["points"]["max_minibatch_norm"].isna().all()
    assert made["constants"][["k", "k_run", "k_step"]].to_dict("records") == [
        {"k": 1.77, "k_run": folder.name, "k_step": 0}
    ]


def test_shb_without_momentum_has_no_bound_but_a_b_star(tmp_path):
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(tmp_path, "shb", b, 0, {"0.5": n}, steps=n, beta1=0.0)
    group, made = measured(tmp_path)
    (row,) = made["critical_batch_size"].to_dict("records")
    assert group.slug == "CIFAR100_ResNet18_lr0.1_beta0"
    assert (row["b_star"], row["bound"], row["c_squared"]) == (16, None, None)


def test_an_optimizer_without_formulas_has_steps_b_star_and_k_but_neither_c_squared_nor_a_formula(tmp_path):
    u_shaped(tmp_path, "qhm", nu=0.5)
    sampling(tmp_path, "qhm", 16, 0, 0.25, gaussian(), nu=0.5)
    made = measured(tmp_path)[1]
    (row,) = made["critical_batch_size"].to_dict("records")
    assert (row["optimizer"], row["b_star"], row["edge"], row["k"]) == ("qhm nu 0.5", 16, "", 1.77)
    assert (row["bound"], row["c_squared"], row["published_c_squared"], row["published_k"]) == (None,) * 4
    points = made["points"].set_index("batch_size")
    assert points["delta_measured_mean"][16] == 0.25
    assert points[["delta_formula", "delta_published_constants", "delta_formula_from"]].isna().all(axis=None)


@pytest.mark.parametrize(("args", "shown"), [({}, True), ({"min_epochs": 0}, False), ({"precision": "bf16"}, False)])
def test_ratio_needs_the_published_settings(tmp_path, args, shown):
    for b in (16, 32):
        critical(tmp_path, "shb", b, 0, {"1.0": PUBLISHED[b]["1.0"]}, steps=PUBLISHED[b]["1.0"], **args)
    rows = measured(tmp_path)[1]["steps"]
    assert list(rows["published"]) == [PUBLISHED[16]["1.0"], PUBLISHED[32]["1.0"]]
    assert list(rows["ratio"].dropna()) == ([1.0, 1.0] if shown else [])


@pytest.mark.parametrize("args", [{"model": "ResNet20"}, {"lr": 0.2}, {"beta1": 0.8}, {"dataset": "CIFAR10"}])
def test_only_the_papers_own_experiment_is_set_beside_its_numbers(tmp_path, args):
    critical(tmp_path, "shb", 16, 0, {"1.0": 9}, steps=9, **args)
    made = measured(tmp_path)[1]
    assert made["steps"]["published"].isna().all() and made["published_steps"].empty
    assert made["constants"][["published_b_star", "published_c_squared", "published_k"]].isna().all(axis=None)


def points_of(*points):
    """Rows of the table of points from (optimizer, formula's δ, accuracy); the measured δ are all 1."""
    rows = [(o, d, a, 0, 1.0) for o, d, a in points]
    columns = ["optimizer", "delta_formula", "accuracy_mean", "normal_diverged", "delta_measured_mean"]
    return pd.DataFrame(rows, columns=columns)


def test_a_point_with_a_diverged_seed_is_no_part_of_a_correlation():
    points = points_of(("sgd", 1, 50), ("sgd", 2, 60), ("sgd", 3, 40))
    before = tables.correlations(points)
    lost = points[:1].assign(delta_formula=9, normal_diverged=1)
    assert before["points"][0] == 3
    pd.testing.assert_frame_equal(before, tables.correlations(pd.concat([points, lost])))


def test_fewer_than_three_points_have_no_correlation():
    points = points_of(("sgd", 1, 5), ("sgd", 2, 6), ("shb", 3, 4))
    (row,) = tables.correlations(points).to_dict("records")  # the measured δ are all equal
    assert (row["delta"], row["optimizer"], row["points"]) == ("delta_formula", "all", 3)


def test_k_is_the_largest_full_gradient_norm_of_a_run_that_did_not_diverge(tmp_path):
    """The largest mini-batch norm, 28.9, would put δ_SHB at 26 for every b."""
    for b, published in PUBLISHED.items():
        critical(tmp_path, "shb", b, 0, published, k=28.9 if b == 8 else 3.0, steps=published["0.5"])
        sampling(tmp_path, "shb", b, 0, 1.0, np.zeros(3), norm=1.77 if b == 64 else 1.2, steps=400)
    folder = sampling(tmp_path, "shb", 8, 1, 1.0, np.zeros(3), norm=9.0, status="diverged")
    made = measured(tmp_path)[1]
    found = made["constants"][["k", "k_run", "k_step"]].drop_duplicates().to_dict("records")
    assert found == [{"k": 1.77, "k_run": "sampling-shb-b64-seed0", "k_step": 400}] and folder.exists()
    delta = made["points"].set_index("batch_size")["delta_formula"]
    assert [round(delta[b], 2) for b in (8, 256, 1024, 8192)] == [2.28, 1.63, 1.61, 1.60]
    assert list(made["points"]["max_minibatch_norm"]) == [28.9] + [3.0] * 10


@pytest.mark.parametrize("mode", ["critical", "normal"])
def test_a_full_gradient_that_another_mode_measured_counts_too(tmp_path, mode):
    sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3), norm=1.5)
    extra = {"steps_to_eps": {"1.0": None}, "max_gradient_norm": 7.0, "full_gradient_norm": 2.5}
    extra |= {"accuracy": 1.0, "best_accuracy": 1.0, "training_loss": 1.0}
    folder = record(tmp_path, mode, "sgd", 16, 0, extra, steps=33)
    found = tables.largest_full_gradient(records.read(tmp_path)[0])
    assert found == {"k": 2.5, "k_run": folder.name, "k_step": 33}


def test_bands_and_counts_against_a_plain_loop(tmp_path):
    """Every column of points over seeds, from random runs, some diverged."""
    rng, expected = np.random.default_rng(5), {}
    for optimizer in ("sgd", "shb"):
        for b in (8, 32):
            for seed in range(5):
                lost = rng.random() < 0.3
                results = {"accuracy": rng.random(), "best_accuracy": 1.0, "training_loss": rng.random()}
                results["max_gradient_norm"] = rng.random()
                status = "diverged" if lost else "finished"
                record(tmp_path, "normal", optimizer, b, seed, results, status=status)
                expected.setdefault((optimizer, b), []).append((lost, results))
    rows = measured(tmp_path)[1]["points"].set_index(["optimizer", "batch_size"])
    assert sorted(rows.index) == sorted(expected)
    for point, runs in expected.items():
        good, row = [results for lost, results in runs if not lost], rows.loc[point]
        assert (row["normal_seeds"], row["normal_diverged"]) == (5, 5 - len(good))
        for key in ("accuracy", "training_loss"):
            values = [results[key] for results in good]
            assert row[f"{key}_mean"] == pytest.approx(sum(values) / len(values), rel=1e-12)
            assert (row[f"{key}_min"], row[f"{key}_max"]) == (min(values), max(values))
        assert row["max_minibatch_norm"] == max(results["max_gradient_norm"] for results in good)


def test_a_diverged_run_has_no_measured_delta(tmp_path):
    sampling(tmp_path, "sgd", 8, 0, 0.5, np.zeros(3))
    sampling(tmp_path, "sgd", 8, 1, 9.0, np.zeros(3), status="diverged")
    (row,) = measured(tmp_path)[1]["points"].to_dict("records")
    assert (row["sampling_seeds"], row["sampling_diverged"], row["delta_measured_max"]) == (2, 1, 0.5)


def test_a_diverged_run_has_no_largest_gradient_norm(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0)
    critical(tmp_path, "sgd", 8, 0, {"1.0": 9}, steps=9, k=1e9, status="diverged")
    assert list(measured(tmp_path)[1]["points"]["max_minibatch_norm"]) == [1.0]


def test_numbers_of_any_size_that_a_record_may_hold_do_not_overflow(tmp_path):
    critical(tmp_path, "shb", 999_999, 0, {"1.0": 10**12 - 1}, steps=10**12 - 1)
    (row,) = steps_of(tmp_path)
    assert row["sfo_max"] == (10**12 - 1) * 999_999 and json.dumps(int(row["sfo_min"]))
