"""report/evidence_of_training.py and overview.py, against plain loops over the records."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from report_helpers import all_groups, critical, drawn, edit, gaussian, measured, normal, sampling, u_shaped
from scipy import stats
from test_report_budget import run, write
from test_report_landscape import landscape

from report import comparisons, evidence, evidence_of_training, overview, records, theory, words


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def of_settings(runs):
    return evidence_of_training.settings(comparisons.measure(records.load(runs))[0])


def of_critical(runs):
    return evidence_of_training.critical(measured(runs)[1])


def test_where_the_smallest_eps_is_reached_and_b_star(tmp_path):
    for b, n in ((16, None), (32, 40), (64, 15), (128, 14)):
        critical(tmp_path, "shb", b, 0, {"1.0": n, "2.0": 1}, steps=n or 50, min_epochs=0)
        critical(tmp_path, "sgd", b, 0, {"1.0": None, "2.0": 1}, steps=50, min_epochs=0)
    said = of_critical(tmp_path)
    assert said.startswith(
        "The running mean of ‖g_t‖ comes to ε = 1 (n = 1 each, at most 6,400 gradients) with SGD at 0"
    )
    assert (
        "; SHB at 3 of 4 b (32, 64, 128), b* = 64; the theory's b*, from that at ε = 2: SGD at most 64. At every"
        in said
    )


def test_b_star_is_a_bound_where_a_smaller_b_is_undecided(tmp_path):
    """At b = 16 it was looked for in 50 steps, 800 gradients; 15 steps at b = 64 are 960."""
    for b, n in ((16, None), (64, 15), (128, 14)):
        critical(tmp_path, "shb", b, 0, {"1.0": n}, steps=n or 50, min_epochs=0)
    assert of_critical(tmp_path).endswith("(64, 128), b* ≤ 64.")


BOUND = {(90, 20, 30): "b* = 16 at ε = 1) ", (9, 20, 30): "b* ≤ 8 at ε = 1) at most "}


@pytest.mark.parametrize(("steps", "said"), BOUND.items())
def test_c_squared_solved_is_a_bound_where_its_b_star_is(tmp_path, steps, said):
    for b, n in zip((8, 16, 32), steps, strict=True):
        critical(tmp_path, "shb", b, 0, {"1.0": n}, steps=n, min_epochs=0)
    run(tmp_path, "shb")
    found = measured(tmp_path)[1]
    ratio = found["c_squared"]["solved_over_direct"].astype(float)
    text = evidence_of_training.solved(found)
    assert text.startswith("Solved from b*, C² is so many times the measured (b = 64, n = 1 seed, ")
    assert text.endswith(f"over steps 0, 20, 100): SHB ({said}{ratio.min():.2g} to {ratio.max():.2g}.")


def test_no_star(tmp_path):
    for b in (16, 32):
        critical(tmp_path, "sgd", b, 0, {"1.0": None}, steps=50, status="not_reached", min_epochs=0)
    assert of_critical(tmp_path).endswith("with SGD at 0 of 2 b.")


def test_one_b_says_nothing_of_b(tmp_path):
    critical(tmp_path, "sgd", 16, 0, {"1.0": None, "2.0": 5}, steps=50, min_epochs=0)
    assert of_critical(tmp_path) is None


def two_eps(runs, least=("-", "-", 6), greater=(90, 20, 30)):
    """Critical runs of SHB at b = 8, 16, 32, whose steps to ε = 1 and 2 are these."""
    for b, one, two in zip((8, 16, 32), least, greater, strict=True):
        critical(runs, "shb", b, 0, {"1.0": None if one == "-" else one, "2.0": two}, steps=100, min_epochs=0)


@pytest.mark.parametrize(("norm", "above"), [(2.0, True), (2.01, False), (None, False)])
def test_the_smallest_eps_that_is_reached_at_every_b(tmp_path, norm, above):
    two_eps(tmp_path)
    if norm:
        folder, rows = run(tmp_path, "shb")
        write(folder / "measurements.csv", [row | {"full_gradient_norm": norm} for row in rows if row["steps"] == 0])
    said = of_critical(tmp_path)
    assert " At every b it comes to ε = 2: SHB b* = 16." in said
    assert ("above ‖∇f‖ = 2 before the first update" in said) is above


@pytest.mark.parametrize("at_star", [1, 2])
def test_where_b_star_takes_one_step_the_first_mini_batch_is_enough(tmp_path, at_star):
    two_eps(tmp_path, greater=(9, at_star, 5))
    run(tmp_path, "shb")
    found = measured(tmp_path)[1]
    assert ("At b* the first mini-batch is enough" in evidence_of_training.critical(found)) is (at_star == 1)
    said = evidence_of_training.solved(found)
    assert ("SHB (b* = 16 at ε = 2, the first mini-batch) " in said) is (at_star == 1) and "b* = 16 at ε = 2" in said


@pytest.mark.parametrize(("least", "greater"), [((50, 40, 30), (9, 8, 7)), (("-", "-", 6), (None, 2, 1))])
def test_the_smallest_eps_is_not_said_twice_nor_one_that_a_run_missed(tmp_path, least, greater):
    two_eps(tmp_path, least, greater)
    assert "At every b" not in of_critical(tmp_path)


def test_b_star_foretold_is_by_the_square_of_eps(tmp_path):
    """b* ∝ 1/ε²: 16 at ε = 2 is 64 at ε = 1. At ε = 2 itself, that of the reference, nothing is foretold."""
    two_eps(tmp_path)
    assert "with SHB at 1 of 3 b (32); the theory's b*, from that at ε = 2: SHB 64. At every" in of_critical(tmp_path)


def test_b_star_by_the_full_gradient_is_said_apart():
    rows = {"optimizer": ["shb", "shb"], "rule": ["running mean", "full gradient"], "b_star": [16, 1024]}
    stars = evidence_of_training.pd.DataFrame(rows | {"edge": ["", ">="]})
    assert evidence_of_training.by_full_gradient(stars) == " By ‖∇f‖: SHB b* ≥ 1,024."
    assert evidence_of_training.by_full_gradient(stars[:1]) == ""


@pytest.mark.parametrize(
    ("norms", "running", "said"),
    [
        ((2.0, 1.5, 0.9), 27, "11–20 and 27"),
        ((2.0, 1.5, 1.1), None, "> 20 and > 20"),
        ((0.9, 1.5, 1.1), 27, "none and 27"),
    ],
)
def test_both_rules_side_by_side(tmp_path, norms, running, said):
    more = {"full_grad_every": 0.1, "min_epochs": 0, "full_grad_batchsize": 100}
    folder = critical(tmp_path, "shb", 64, 0, {"1.0": running}, steps=20 if running is None else running, **more)
    summary = folder / "summary.json"
    summary.write_text(summary.read_text().replace('"max_gradient', '"full_gradient_every": 10, "max_gradient'))
    write(folder / "full_gradients.csv", [{"steps": 10 * i, "full_gradient_norm": n} for i, n in enumerate(norms)])
    text = evidence_of_training.both_rules(measured(tmp_path)[1])
    assert text.endswith(f"b = 64, ε = 1: SHB {said}.")


@pytest.mark.parametrize(("other", "said"), [(15, "15 to 18"), (18, "18"), (30, "18 to 30"), (None, "≥ 18")])
def test_the_running_mean_of_several_seeds_is_their_span(tmp_path, other, said):
    more = {"full_grad_every": 0.1, "full_grad_batchsize": 100}
    folder = critical(tmp_path, "shb", 64, 0, {"1.0": 18}, steps=18, min_epochs=0, **more)
    summary = folder / "summary.json"
    summary.write_text(summary.read_text().replace('"max_gradient', '"full_gradient_every": 10, "max_gradient'))
    write(folder / "full_gradients.csv", [{"steps": 10 * i, "full_gradient_norm": 3 - 2 * i} for i in range(2)])
    critical(tmp_path, "shb", 64, 1, {"1.0": other}, steps=other or 50, min_epochs=0)
    text = evidence_of_training.both_rules(measured(tmp_path)[1])
    assert "crossing (n = 1 seed), and by the running mean (n = 2 seeds): " in text
    assert text.endswith(f"b = 64, ε = 1: SHB 1–10 and {said}.")


ACCURACIES = {(512, 0.0): (10.0, 12.0), (512, 3.0): (14.0, 15.0), (64, 0.0): (20.0, 22.0)}
ACCURACY = {setting: sum(both) / 2 for setting, both in ACCURACIES.items()}


def settings(runs):
    """b = 512 with and without injected noise, and b = 64; two epochs of 50,000 images, two seeds."""
    for (b, noise), accuracies in ACCURACIES.items():
        updates = 2 * -(-50_000 // b)
        for seed, accuracy in enumerate(accuracies):
            more = {"epochs": 2, "steps": updates, "injected_noise": noise}
            normal(runs, "sgd", b, seed, accuracy, **more)
        run(
            runs,
            "sgd",
            0,
            b,
            steps=(0, updates),
            last=updates,
            drawn_b=(b,),
            injected_noise=noise,
            name=f"{b}-{noise}",
        )


def test_accuracies_of_the_optimizers_stand_beside_one_another(tmp_path):
    """Where each has one setting: not at b = 64, which has SHB at two lr, and not at 32, which has one optimizer."""
    for optimizer, b, values in (("qhm", 128, [5]), ("shb", 128, [7, 9]), ("sgd", 128, [6]), ("sgd", 32, [1])):
        for seed, accuracy in enumerate(values):
            normal(tmp_path, optimizer, b, seed, float(accuracy), epochs=2)
    for lr in (0.1, 0.2):
        normal(tmp_path, "shb", 64, 0, 3.0, epochs=2, lr=lr, name=f"shb-{lr}")
    normal(tmp_path, "sgd", 64, 0, 3.0, epochs=2)
    normal(tmp_path, "sgd", 128, 0, 2.0, epochs=2, injected_noise=1.0, name="injected")
    said = "2 epochs, b = 128: SGD 6.00, SHB 8.00 (7.00 to 9.00), QHM 5.00"
    assert of_settings(tmp_path)[-1] == f"Test accuracy in per cent (n = 1–2 seeds): {said}."


@pytest.mark.parametrize("modes", [("train",), ("eval", "train")])
def test_c_squared_and_delta_over_the_b_that_a_run_trains_with(tmp_path, modes):
    """SGD has two b at steps 20 and 100, SHB at step 20 one."""
    for optimizer, b, steps in (("sgd", 16, (0, 20, 100)), ("sgd", 64, (0, 20, 100)), ("shb", 64, (20, 50))):
        run(tmp_path, optimizer, 0, b, drawn_b=(b,), modes=modes, steps=steps, last=steps[-1])
    made, texts = measured(tmp_path)[1], []
    for step in (20, 100):
        for name, column in ((f"C² after {step} updates", "c_squared_direct"), ("δ there", "delta")):
            values = []
            for b in (16, 64):
                at = (made["budget"]["optimizer"] == "sgd") & (made["budget"]["run_batch_size"] == b)
                at &= (made["budget"]["steps"] == step) & (made["budget"]["batchnorm"] == "train")
                (row,) = made["budget"][at].to_dict("records")
                values.append(f"{words.with_error(row[f'{column}_mean'], row[f'{column}_se_mean'])} ({b})")
            texts.append(f"{name}: SGD {', '.join(values)}.")
    said = f"Measured with other b (n = 1 seed; b in brackets): {' '.join(texts)}"
    assert evidence_of_training.over_sizes(made) == said


def test_nothing_is_said_over_b_of_one_b(tmp_path):
    assert evidence_of_training.over_sizes({"budget": pd.DataFrame()}) is None
    run(tmp_path, "sgd", 0, 64)
    assert evidence_of_training.over_sizes(measured(tmp_path)[1]) is None


def test_injected_noise_beside_the_small_batch(tmp_path):
    """Beside the same b, and b = 64 whose δ is known where its training ended; that of b = 32 is not."""
    settings(tmp_path)
    normal(tmp_path, "sgd", 32, 0, 30.0, epochs=2, steps=3126)
    made = comparisons.measure(records.load(tmp_path))[0]
    (row,) = made["comparison"][made["comparison"]["batch_size"] == 64].to_dict("records")
    said = evidence_of_training.settings(made)[-1]
    start = (
        "**Injected noise.** Test accuracy, SGD, 2 epochs: b = 512 and isotropic noise of norm 3: 14.50 % (14.00 to "
    )
    assert said.startswith(f"{start}15.00,") and "; b = 512: 11.00 % (10.00 to 12.00, n = 2; 196 updates" in said
    assert f"; b = 64: 21.00 % (20.00 to 22.00, n = 2; 1,564 updates, δ {row['delta_mean']:.3g}); b = 64 has 8" in said
    assert said.endswith("; b = 64 has 8 times the updates of the first.") and "b = 32" not in said


def test_of_two_small_batches_that_with_the_nearer_delta_is_beside_injected_noise():
    near = {"batch_size": [512, 512, 64, 32], "injected_noise": [3.0, 0, 0, 0], "delta_mean": [0.3, 0.1, 0.26, 0.33]}
    known = {"optimizer": "sgd", "nu": np.nan, "lr": 0.1, "beta": np.nan, "precision": "default", "length": "2 epochs"}
    known |= {"normal_seeds": 1, "normal_diverged": 0, "accuracy_min": 9.0, "accuracy_mean": 9.0, "accuracy_max": 9.0}
    points = evidence_of_training.pd.DataFrame(
        near | {"updates": [8, 8, 64, 128], "delta_step": [8, 8, 64, 128]}
    ).assign(**known)
    assert "; b = 32: 9.00 %" in evidence_of_training.controlled(points)[0]
    assert "b = 64" not in evidence_of_training.controlled(points)[0]
    points.loc[3, "delta_step"] = 100
    assert "; b = 64: 9.00 %" in evidence_of_training.controlled(points)[0]


def test_rank_correlations_are_told_of_sets_that_may_be_ranked(tmp_path):
    settings(tmp_path)
    made = comparisons.measure(records.load(tmp_path))[0]
    (said,) = [text for text in evidence_of_training.settings(made) if text.startswith("**Accuracy and δ.** Spearman")]
    delta = made["comparison"].set_index(["batch_size", "injected_noise"])["delta_mean"]
    ranks = [stats.rankdata([of[512, 0.0], of[512, 3.0], of[64, 0.0]]) for of in (delta, ACCURACY)]
    rho = np.corrcoef(*ranks)[0, 1]
    assert "(n = 2 seeds a setting; " in said
    assert f": 2 epochs each, over 3 settings {rho:.2g} with δ at the end, " in said


@pytest.mark.parametrize("length", ["2 epochs", "500 updates"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_updates_or_b_are_ranked_over_the_settings_that_delta_is_ranked_over(tmp_path, seed, length):
    rng, known = np.random.default_rng(seed), []
    for b, injected in ((16, 0), (32, 0), (64, 0), (128, 0), (512, 0), (512, 3.1), (32, 1.0)):
        accuracy, updates, more = float(rng.uniform(1, 50)), -(-100_000 // b), {"epochs": 2}
        if length == "500 updates":
            updates, more = 500, {"epochs": 99, "max_steps": 500}
        normal(tmp_path, "sgd", b, 0, accuracy, steps=updates, injected_noise=injected, **more)
        if b != 128:
            folder = sampling(tmp_path, "sgd", b, 0, 1.0, gaussian(), steps=updates, injected_noise=injected)
            delta = float(rng.uniform())
            edit(folder, "results", delta=delta)
            known.append((accuracy, delta, -b if length == "2 epochs" else b, injected))
    made = comparisons.measure(records.load(tmp_path))[0]
    (said,) = evidence_of_training.ranked(made)
    texts, name = [], {"2 epochs": "updates", "500 updates": "b"}[length]
    for which, part in (("6 settings", known), ("the 4 without injected noise", [of for of in known if not of[-1]])):
        ranks = [stats.rankdata(column) for column in list(zip(*part, strict=True))[:3]]
        delta, other = (np.corrcoef(ranks[0], of)[0, 1] for of in ranks[1:])
        texts.append(f"over {which} {delta:.2g} with δ at the end, {other:.2g} with {name}")
    assert said.endswith(f": {length} each, {'; '.join(texts)}.")


def test_no_ranks_are_told_where_delta_is_not_known(tmp_path):
    for b in (64, 128, 512):
        normal(tmp_path, "sgd", b, 0, 20.0 - b / 100, epochs=2, steps=6400 // b)
    made = comparisons.measure(records.load(tmp_path))[0]
    assert "updates" in set(made["comparison_correlations"]["x"])
    assert of_settings(tmp_path) == []


def test_nothing_is_said_of_runs_without_noise_and_of_two_settings(tmp_path):
    normal(tmp_path, "sgd", 64, 0, 20.0, epochs=2)
    normal(tmp_path, "sgd", 512, 0, 10.0, epochs=2)
    assert of_settings(tmp_path) == []


def test_delta_and_smoothing_are_compared_over_optimizers(tmp_path):
    for optimizer, predicted in (("sgd", 0.2), ("shb", 0.01)):
        folder, _ = landscape(tmp_path, optimizer)
        table = landscape_rows(folder)
        table[-1] |= {"predicted": predicted, "predicted_se": 0.001, "real": predicted, "real_se": 0.0001}
        table[-1] |= {"fluctuation_norm": 3 if optimizer == "sgd" else 1}
        write(folder / "landscape.csv", table)
    rows = {optimizer: landscape_rows(path.parent) for optimizer, path in by_optimizer(tmp_path).items()}
    found = measured(tmp_path)[1]
    delta = found["budget"][found["budget"]["steps"] == 100].set_index("optimizer")["delta_mean"]
    said = evidence.excess(found)
    assert said.endswith(f"each at its own weights: SHB {delta['sgd'] / delta['shb']:.3g}, 20 and 9.")
    assert ": SGD 0.20000 ± 0.00020, SHB 0.01000 ± 0.00020; isotropic " in said and ". At step 0: SGD " in said
    assert f"isotropic noise of the same length by SGD {float(rows['sgd'][-1]['isotropic']):.2g}, SHB" in said
    assert "standard errors away" not in evidence.controls(found)
    table = landscape_rows(folder)
    table[-1] |= {"real": 0.02}
    write(folder / "landscape.csv", table)
    assert evidence.controls(measured(tmp_path)[1]).endswith("more than 1.96 standard errors away for SHB.")
    moved = evidence.displacement(found)
    assert moved.endswith(", ".join(f"{o.upper()} {float(rows[o][-1]['displacement']):.2g}" for o in rows) + ".")


def by_optimizer(runs):
    """{optimizer: its landscape.csv}."""
    return {optimizer: next(runs.glob(f"*-{optimizer}-*/landscape.csv")) for optimizer in ("sgd", "shb")}


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.09571, 0.003582, "0.0957 ± 0.0070"),
        (6.8e-05, 0.00081, "0.0001 ± 0.0016"),
        (6110.2, 33.3, "6,110 ± 65"),
        (-0.5, 0.5, "-0.50 ± 0.98"),
        (1234.5678, 12.345, "1,235 ± 24"),
        (0.25, 0.0, "0.25"),
        (0.25, float("nan"), "0.25"),
    ],
)
def test_an_error_has_two_digits_and_the_value_ends_where_it_does(value, se, text):
    assert words.with_error(value, se) == text


def landscape_rows(folder):
    """The rows of a landscape.csv as dicts of texts."""
    head, *lines = (line.split(",") for line in (folder / "landscape.csv").read_text().splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_the_titled_sentences_come_first_in_the_report(tmp_path, monkeypatch):
    for optimizer in ("sgd", "shb"):
        landscape(tmp_path / "runs", optimizer)
    _, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    lines = text.partition("### in words\n")[2].partition("\n### ")[0].strip().splitlines()
    titled = [line.startswith("- **") for line in lines]
    assert sum(titled) >= 3 and titled == sorted(titled, reverse=True)
    assert all_groups(tmp_path / "runs")


def test_the_overview_has_both_ways_to_c_squared(tmp_path, monkeypatch):
    """b* = 16 at ε = 1 gives C² = ε² b* / what the theory says; beside it the measured, of the same optimizer."""
    for optimizer in ("sgd", "shb"):
        landscape(tmp_path / "runs", optimizer)
    u_shaped(tmp_path / "runs")
    found = measured(tmp_path / "runs")[1]
    table = found["overview"].set_index("optimizer")
    direct = found["c_squared"].set_index(["optimizer", "steps"])["c_squared_direct_mean"]
    for optimizer in ("sgd", "shb"):
        row = table.loc[optimizer]
        assert row["steps"] == row["smoothing_steps"] == 100
        assert row["c_squared_direct"] == direct[optimizer, 100]
        assert row["c_squared_least"] == direct[optimizer].min() and row["c_squared_most"] == direct[optimizer].max()
        assert row["delta"] == pytest.approx(row["delta_bound"] / row["bound_over_measured"])
        smooth = found["smoothing"].set_index(["optimizer", "steps"]).loc[(optimizer, 100)]
        assert [row[kind] for kind in ("real", "predicted")] == [smooth["real_mean"], smooth["predicted_mean"]]
    assert table["c_squared"]["shb"] == pytest.approx(theory.c_squared_from_b("shb", 0.1, 16, 1.0, 0.9))
    assert table["solved_over_direct"]["shb"] == pytest.approx(table["c_squared"]["shb"] / direct["shb", 100])
    assert np.isnan(table["c_squared"]["sgd"])
    figures, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    fig, _ = figures["overview"]
    labels = fig.axes[0].get_legend_handles_labels()[1]
    assert "C² solved from b*" in labels and len(fig.axes) == 3 and "### overview" in text


def test_an_interval_that_reaches_to_zero_is_drawn_as_a_bound(tmp_path, monkeypatch):
    folder, _ = landscape(tmp_path / "runs", "sgd")
    table = landscape_rows(folder)
    table[-1] |= {"real": 0.1, "real_se": 0.2, "gaussian": 0.3, "gaussian_se": 0.01}
    write(folder / "landscape.csv", table)
    fig, _ = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")[0]["overview"]
    drawn_points = [line.get_ydata() for line in fig.axes[2].lines]
    assert any(np.allclose(y, [0.1 + 1.96 * 0.2]) for y in drawn_points if len(y) == 1)
    assert not any(np.allclose(y, [0.1]) for y in drawn_points if len(y) == 1)
    assert any(np.allclose(y, [0.3]) for y in drawn_points if len(y) == 1)


def test_an_overview_without_a_landscape_and_without_draws(tmp_path):
    run(tmp_path / "a", "sgd")
    found = measured(tmp_path / "a")[1]["overview"]
    assert len(found) == 1 and "real" not in found and len(overview.figure(found).axes) == 2
    normal(tmp_path / "b", "sgd", 64, 0, 20.0)
    assert measured(tmp_path / "b")[1]["overview"].empty and overview.figure(found[:0]) is None
