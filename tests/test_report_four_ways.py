"""The critical batch size four ways, on hand-made tables and records whose answers are known."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from report_helpers import command, critical, drawn, measured, sampling, table, u_shaped

from report import critical_batch_sizes, full_gradients, page, plots

COLUMNS = ["batch_size", "critical_seeds", "reached", "diverged", "at_first_check", "sfo_mean", "sfo_least"]


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def full(runs, optimizer, b, seed, norms, to_eps, every=10, steps=None, **more):
    """A critical run whose full gradient had these norms at steps 0, every, 2·every, …"""
    steps = every * (len(norms) - 1) if steps is None else steps
    given = {"full_grad_every": 0.5, "min_epochs": 0} | more
    folder = critical(runs, optimizer, b, seed, to_eps, steps=steps, **given)
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"]["full_gradient_every"] = every
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = ["steps,full_gradient_norm", *(f"{i * every},{norm}" for i, norm in enumerate(norms))]
    (folder / "full_gradients.csv").write_text("\n".join(lines) + "\n")
    return folder


def points(*rows):
    """Rows of a table of steps from (b, seeds, reached, diverged, early, SFO, the least that it may be)."""
    return pd.DataFrame(rows, columns=COLUMNS)


def slow_departure(rows):
    """By loops over what is known of each b, one seed, nothing diverged: (b, kind, least, most)."""
    measured = [i for i, row in enumerate(rows) if row[1] == "measured"]
    if len(measured) < 2:
        return {}
    rows = rows[measured[0] :]
    reference_least, reference_most = rows[0][2], rows[0][3]
    above, at_most = rows[0][0], None
    for b, kind, _, most in rows[1:]:
        if kind == "missed" or most > 1.2 * reference_least:
            break
        above = b
    for b, kind, least, _ in rows[1:]:
        if kind != "early" and least > 1.2 * reference_most:
            at_most = b
            break
    return {"reference": rows[0][0], "above": above, "at_most": at_most}


@pytest.mark.parametrize("seed", range(60))
def test_departure_against_a_loop(seed):
    rng, rows = np.random.default_rng(seed), []
    for b in (8, 16, 32, 64, 128, 256)[: rng.integers(2, 7)]:
        kind = rng.choice(["measured", "measured", "measured", "missed", "early"])
        most = float(100 * math.log2(b) ** rng.uniform(0, 0.6) * rng.uniform(0.9, 1.1))
        rows.append((b, kind, most - rng.choice([0, 5, 20]), most))
    counts = {"measured": (1, 1, 0, 0), "missed": (1, 0, 0, 0), "early": (1, 1, 0, 1)}
    given = [(b, *counts[kind], least if kind == "missed" else most, least) for b, kind, least, most in rows]
    assert critical_batch_sizes.departure(points(*given)) == slow_departure(rows)


@pytest.mark.parametrize(
    ("sfo", "expected"),
    [
        ([100, 100, 120, 121, 300], "(32, 64]"),  # 1.2 times is still perfect scaling
        ([100, 60, 90, 119, 130], "(64, 128]"),  # of the smallest b, not of the least SFO
        ([100, 130, 110, 300, 300], "(8, 16]"),  # the first b beyond, though the next is within
        ([100, 90, 80, 70, 60], "> 128"),
    ],
)
def test_departure_is_where_steps_exceed_perfect_scaling_by_20_percent(sfo, expected):
    rows = points(*((8 * 2**i, 1, 1, 0, 0, float(s), float(s)) for i, s in enumerate(sfo)))
    assert critical_batch_sizes.interval(critical_batch_sizes.departure(rows)) == expected


def test_departure_is_as_wide_as_what_is_not_known():
    known = [(8, 1, 1, 0, 0, 100.0, 100.0), (16, 1, 1, 0, 0, 100.0, 100.0), (128, 1, 1, 0, 0, 200.0, 200.0)]
    missed, beyond = (32, 1, 0, 0, 0, 90.0, 90.0), (32, 1, 0, 0, 0, 121.0, 121.0)
    lost, early, wide = (32, 2, 1, 1, 0, 900.0, 900.0), (32, 1, 1, 0, 1, 50.0, 0.0), (32, 1, 1, 0, 0, 130.0, 110.0)
    for row, expected in (
        (missed, "(16, 128]"),
        (beyond, "(16, 32]"),
        (lost, "(16, 128]"),
        (early, "(32, 128]"),
        (wide, "(16, 128]"),
    ):
        found = critical_batch_sizes.departure(points(*known, row))
        assert (critical_batch_sizes.interval(found), found["reference"]) == (expected, 8), row
    later = critical_batch_sizes.departure(points((4, 1, 0, 0, 0, 7.0, 7.0), *known))
    assert later["reference"] == 8  # the smallest b that is measured
    assert critical_batch_sizes.departure(points(known[0], missed)) == {}


def test_the_first_measured_step_and_its_bracket(tmp_path):
    full(tmp_path, "sgd", 8, 0, [3.0, 2.5, 0.9, 1.5, 0.4], {"2.0": 35, "1.0": 36, "0.4": 40, "0.1": None})
    group, made = measured(tmp_path)
    rows = full_gradients.crossings(made["full_gradients"], group.crossings).set_index("eps")
    known = {eps: tuple(rows.loc[eps, ["steps", "least", "checked"]]) for eps in (2.0, 1.0, 0.4)}
    assert known == {2.0: (20, 11, 40), 1.0: (20, 11, 40), 0.4: (40, 31, 40)}
    assert pd.isna(rows["steps"][0.1]) and rows["least"][0.1] == 40
    steps = made["steps_full_gradient"].set_index("eps")
    assert tuple(steps.loc[1.0, ["steps_mean", "steps_min", "steps_max", "sfo_mean", "sfo_min"]]) == (
        20,
        11,
        20,
        160,
        88,
    )
    assert steps["steps_are"].to_dict() == {0.1: "lower bound", 0.4: "measured", 1.0: "measured", 2.0: "measured"}
    assert list(made["steps"].sort_values("eps")["steps_mean"]) == [40, 40, 36, 35]  # the running mean's stay


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_against_a_loop_on_random_sequences(seed, tmp_path):
    rng = np.random.default_rng(seed)
    norms, every = (rng.integers(1, 20, 12) / 4).tolist(), int(rng.integers(1, 9))
    full(tmp_path, "sgd", 8, 0, norms, {"4.0": 1, "1.0": 1, "0.25": None}, every=every)
    group, made = measured(tmp_path)
    for row in full_gradients.crossings(made["full_gradients"], group.crossings).to_dict("records"):
        expected, before = None, -1
        for i, norm in enumerate(norms):
            if norm <= row["eps"]:
                expected = i * every
                break
            before = i * every
        assert (None if pd.isna(row["steps"]) else row["steps"]) == expected
        least = before if expected is None else before + 1
        assert row["least"] == least


def test_a_norm_that_begins_below_eps_is_no_point_for_b_star(tmp_path):
    for b in (8, 16, 32):
        full(tmp_path, "sgd", b, 0, [0.9, 0.5], {"1.0": 10, "0.6": 10}, every=320 // b)
    made = measured(tmp_path)[1]
    steps = made["steps_full_gradient"]
    assert set(steps["steps_are"][steps["eps"] == 1.0]) == {"before the first update"}
    stars = made["critical_batch_size"]
    stars = stars[stars["rule"] == "full gradient"].set_index("eps")["b_star"]
    assert stars[0.6] == 8 and pd.isna(stars[1.0])


def grid_steps(runs):
    """b* = 16 by the running mean and 32 by ∇f, which is measured every fifth step."""
    for b, mean, steps in ((8, 100, 60), (16, 40, 30), (32, 28, 10), (64, 30, 10)):
        every = 5
        norms = [2.0] * (steps // every) + [0.9] + [0.5] * ((mean - steps) // every)
        full(runs, "sgd", b, 0, norms, {"1.0": mean}, every=every, steps=mean)


def test_both_rules_have_their_b_star_and_their_c_squared(tmp_path):
    grid_steps(tmp_path)
    made = measured(tmp_path)[1]
    stars = made["critical_batch_size"].set_index("rule")
    assert stars["b_star"].to_dict() == {"running mean": 16, "full gradient": 32}
    assert stars["range"].to_dict() == {"running mean": "", "full gradient": "32"}
    # SGD: b* = ηC²/ε²
    assert stars["c_squared"].to_dict() == {"running mean": pytest.approx(160), "full gradient": pytest.approx(320)}
    assert stars["edge"].to_dict() == {"running mean": "", "full gradient": ""}
    assert set(made["constants"]["b_star"]) == {16}  # all else is by the paper's rule


def test_a_bracket_makes_a_range_even_with_one_seed(tmp_path):
    for b, every, steps in ((8, 20, 60), (16, 10, 30), (32, 5, 15), (64, 5, 15)):
        norms = [2.0] * (steps // every) + [0.9]
        full(tmp_path, "sgd", b, 0, norms, {"1.0": steps}, every=every)
    stars = measured(tmp_path)[1]["critical_batch_size"].set_index("rule")
    # SFO 480, 480, 480, 960, known to 160 images: (320, 480] three times and (640, 960]
    assert (stars["b_star"]["full gradient"], stars["range"]["full gradient"]) == (8, "8 16 32")


def test_the_four_ways_side_by_side(tmp_path, monkeypatch):
    grid_steps(tmp_path / "runs")
    (row,) = measured(tmp_path / "runs")[1]["critical_batch_size_four_ways"].to_dict("records")
    assert (row["b_star"], row["b_star_full"]) == ("16", "32")
    # SFO by the running mean 800, 640, 896, 1920; by ∇f (440, 480], (400, 480], (160, 320], (320, 640]
    assert (row["departure"], row["departure_reference"]) == ("(32, 64]", 8)
    assert (row["departure_full"], row["departure_reference_full"]) == ("> 32", 8)
    assert row["simple_noise_scale"] is None
    _, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert "### critical batch size four ways" in text and ": not known." not in text


def scale_rows(*rows):
    names = ["run", "optimizer", "run_batch_size", "batch_size", "steps", "batchnorm", "draws", "noise_scale"]
    return pd.DataFrame(rows, columns=names).assign(seed=0)


def test_the_noise_scale_is_that_of_the_last_step_with_the_range_of_all():
    rows = scale_rows(
        ("a", "sgd", 8, 8, 0, "train", 4, 2.0),
        ("a", "sgd", 8, 8, 50, "train", 4, 40.0),
        ("b", "sgd", 16, 16, 50, "train", 4, 60.0),
        ("a", "sgd", 8, 64, 50, "train", 4, 1e9),  # drawn beside: not the run's own b
        ("a", "sgd", 8, 8, 50, "eval", 4, 1e9),
        ("c", "shb", 8, 8, 50, "train", 4, 1e9),
        ("d", "sgd", 8, 8, 90, "train", 0, np.nan),
    )
    found = critical_batch_sizes.noise_scale(rows, "sgd", "train")
    assert list(found.values()) == [50.0, 2.0, 60.0, "0 50"]
    assert critical_batch_sizes.noise_scale(rows, "nshb", "train") == {}


def damage(folder, how):
    path = folder / "full_gradients.csv"
    text = path.read_text()
    changed = {
        "cut": text[:-2],
        "negative": text.replace("2.5", "-2.5"),
        "nan": text.replace("2.5", "nan"),
        "a step missing": text.replace("10,2.5\n", ""),
        "another step": text.replace("10,2.5", "9,2.5"),
        "the last step lost": text.replace("20,0.9\n", ""),
        "the first steps lost": text.replace("0,3.0\n10,2.5\n", ""),
        "another column": text.replace("full_gradient_norm", "norm"),
        "empty": "",
    }[how]
    path.write_text(changed)


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "negative", "nan", "a step missing", "another step", "the first steps lost", "the last step lost"),
        *("another column", "empty"),
    ],
)
def test_a_damaged_file_is_said_and_left_out(how, tmp_path):
    runs, out, slug = tmp_path / "runs", tmp_path / "out", "CIFAR100_ResNet18_lr0.1"
    folder = full(runs, "sgd", 8, 0, [3.0, 2.5, 0.9], {"1.0": 15})
    sound = full(runs, "sgd", 16, 0, [3.0, 2.0, 0.9], {"1.0": 15})
    damage(folder, how)
    done = command(runs, "--out", out)
    assert done.returncode == 0 and f"left out: {folder.name} (full gradient only): " in done.stdout
    assert {row["run"] for row in table(out, "full_gradients", slug)} == {sound.name}
    assert {row["batch_size"] for row in table(out, "steps", slug)} == {"8", "16"}  # the running mean's are kept


def test_a_missing_file_and_another_setting_are_said(tmp_path):
    for b in (8, 16):
        full(tmp_path, "sgd", b, 0, [3.0, 0.9], {"1.0": 5})
    other = full(tmp_path, "sgd", 32, 0, [3.0, 0.9], {"1.0": 5}, full_grad_every=1.0)
    gone = full(tmp_path, "sgd", 64, 0, [3.0, 0.9], {"1.0": 5})
    (gone / "full_gradients.csv").unlink()
    group = measured(tmp_path)[0]
    rows, left_out = full_gradients.read(group.critical)
    assert set(rows["batch_size"]) == {8, 16}
    assert "full_grad_every 1.0" in left_out[f"{other.name} (full gradient only)"]
    assert "missing" in left_out[f"{gone.name} (full gradient only)"]


def test_a_run_with_the_flag_answers_for_its_twin_without(tmp_path):
    critical(tmp_path, "sgd", 8, 0, {"1.0": 5, "0.5": 90}, steps=90, min_epochs=0)
    full(tmp_path, "sgd", 8, 0, [3.0, 0.9], {"1.0": 5})
    made = measured(tmp_path)[1]
    assert made["steps"].set_index("eps")["steps_mean"].to_dict() == {1.0: 5, 0.5: 90}
    steps = made["steps_full_gradient"].set_index("eps")
    assert steps["steps_are"].to_dict() == {1.0: "measured", 0.5: "lower bound"} and steps["steps_mean"][0.5] == 10


def test_of_two_runs_of_one_point_the_one_that_went_furthest_answers(tmp_path):
    full(tmp_path / "long", "sgd", 8, 0, [3.0, 2.0, 0.9], {"1.0": 5})
    full(tmp_path / "short", "sgd", 8, 0, [3.0, 2.0], {"1.0": 5})
    made = measured(tmp_path)[1]
    assert list(made["full_gradients"]["steps"]) == [0, 10, 20]


def test_a_run_that_diverged_counts_until_then_and_is_no_k(tmp_path):
    lost = {"steps": 19, "status": "diverged", "k": None}
    full(tmp_path, "sgd", 8, 0, [9.0, 0.9], {"1.0": None, "0.1": None}, **lost)
    full(tmp_path, "sgd", 16, 0, [2.0, 0.9], {"1.0": None, "0.1": None}, steps=10)
    made = measured(tmp_path)[1]
    rows = made["steps_full_gradient"].set_index(["eps", "batch_size"])
    assert rows["steps_mean"][1.0, 8] == 10 and pd.isna(rows["steps_mean"][0.1, 8]) and rows["diverged"][0.1, 8] == 1
    assert pd.isna(rows["steps_min"][0.1, 8]) and rows["steps_min"][0.1, 16] == 10
    assert tuple(made["constants"].iloc[0][["k", "k_step"]]) == (2.0, 0)


def test_k_is_the_largest_full_gradient_of_any_mode(tmp_path):
    sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3), norm=1.77)
    folder = full(tmp_path, "sgd", 8, 0, [1.5, 2.5, 0.9], {"1.0": 5})
    row = measured(tmp_path)[1]["constants"].iloc[0]
    assert (row["k"], row["k_run"], row["k_step"]) == (2.5, folder.name, 10)


def test_brackets_are_drawn_beside_the_curves_and_bounds_apart(tmp_path):
    grid_steps(tmp_path)
    full(tmp_path, "sgd", 128, 0, [2.0, 1.5], {"1.0": None}, every=5, status="not_reached")
    made = measured(tmp_path)[1]
    fig = plots.steps(*(made[name] for name in page.STEPS))
    expected = {8: (56, 60), 16: (26, 30), 32: (6, 10), 64: (6, 10)}
    for ax, unit in zip(fig.axes, (0, 1), strict=True):
        bars = [line for line in ax.lines if line.get_marker() == "_" and len(line.get_xdata()) == 2]
        ends = [list(line.get_ydata()) for line in bars]
        assert ends == [[low * b**unit, high * b**unit] for b, (low, high) in expected.items()]
        assert len([line for line in ax.lines if line.get_marker() == 6 and len(line.get_xdata())]) == 1
    labels = fig.axes[0].get_legend_handles_labels()[1]
    assert "bracket: steps until ‖∇f‖ ≤ ε, between two measurements" in labels and "measured b*, by ‖∇f‖" in labels


def test_without_the_flag_nothing_of_it_is_drawn_or_shown(tmp_path, monkeypatch):
    u_shaped(tmp_path / "runs")
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert not any("∇f" in label for label in found["steps"][0].axes[0].get_legend_handles_labels()[1])
    assert "full gradient |" not in text and f"no table: steps_full_gradient: {page.NO_FULL}" in text
