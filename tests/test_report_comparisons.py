"""report/comparisons.py and comparison_page.py: all settings beside one another, against slow twins."""

import csv
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from report_helpers import command, critical, edit, gaussian, normal, record, sampling, table

from report import axes, comparison_page, comparisons, records

SLUG = "CIFAR100_ResNet18"
MEASURED = "full_gradient_norm noise_square delta_se fresh memory memory_noise_frozen staleness batchnorm_bias"
MEASURED += " c_squared c_squared_se noise_scale accuracy"


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def measurements(folder, rows):
    """A sampling run's measurements.csv; what `rows` do not say of a row is 1."""
    usual = {"batchnorm": "train", **dict.fromkeys([*MEASURED.split(), "delta", "variance", "variance_se"], 1.0)}
    with open(folder / "measurements.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["steps", "batch_size", "draws", *usual], lineterminator="\n")
        writer.writeheader()
        writer.writerows(usual | row for row in rows)


def landscape(folder, rows):
    lines = ["steps,batchnorm,lambda_max", *(",".join(map(str, row)) for row in rows)]
    (folder / "landscape.csv").write_text("\n".join(lines) + "\n")


def made(runs_dir):
    return comparisons.measure(records.read(runs_dir)[0])


def point(points, **values):
    """The one row of a table with these values."""
    for key, value in values.items():
        points = points[points[key] == value]
    (row,) = points.to_dict("records")
    return row


# --- the points ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_are_those_of_a_slow_twin(tmp_path, seed):
    """Random records; then every point again, by loops over what was written."""
    rng, trained, sampled = np.random.default_rng(seed), {}, {}
    for optimizer in ("sgd", "shb"):
        for b in (8, 64):
            for lr in (0.1, 0.02):
                key, end = (optimizer, b, lr), int(rng.integers(50, 60))
                for run in range(rng.integers(1, 4)):
                    outcome = rng.uniform(1, 90, 2)
                    normal(tmp_path, optimizer, b, run, *outcome, steps=end, lr=lr)
                    trained.setdefault(key, {})[run] = (*outcome, end)
                for run in rng.permutation(4)[: rng.integers(0, 4)]:
                    steps = sorted({10, 50 + int(rng.integers(10)), *([end] if rng.random() < 0.5 else [])})
                    deltas = rng.uniform(0.1, 1, len(steps))
                    folder = sampling(tmp_path, optimizer, b, int(run), 7.0, gaussian(), steps=100, lr=lr, draws=4)
                    rows = [{"steps": t, "delta": d} for t, d in zip(steps, deltas, strict=True)]
                    measurements(folder, [row | {"draws": 4, "batch_size": b} for row in rows])
                    for step, delta in zip(steps, deltas, strict=True):
                        sampled.setdefault(key, {}).setdefault(step, {})[int(run)] = delta
    points = made(tmp_path)[0]["comparison"]
    assert len(points) == len(trained)
    for (optimizer, b, lr), seeds in trained.items():
        row, by_step = point(points, optimizer=optimizer, batch_size=b, lr=lr), sampled.get((optimizer, b, lr), {})
        end = next(iter(seeds.values()))[2]
        at = end if end in by_step else max(by_step, default=None)
        there = by_step.get(at, {})
        mean = sum(there.values()) / len(there) if there else math.nan
        deltas = [there.get(run, mean) for run in seeds]
        for i, name in enumerate(("accuracy", "training_loss")):
            values = [outcome[i] for outcome in seeds.values()]
            expected = [sum(values) / len(values), min(values), max(values)]
            assert [row[f"{name}_{part}"] for part in ("mean", "min", "max")] == pytest.approx(expected)
        found = [row[f"delta_{part}"] for part in ("mean", "min", "max")]
        assert found == pytest.approx([sum(deltas) / len(deltas), min(deltas), max(deltas)], nan_ok=True)
        assert (row["updates"], row["normal_seeds"]) == (end, len(seeds))
        assert row["paired"] == len(set(there) & set(seeds))
        assert row["delta_step"] == at if there else math.isnan(row["delta_step"])


def test_equal_epochs_and_equal_updates_are_both_there(tmp_path):
    for b, steps in ((64, 1564), (256, 392), (1024, 98)):
        normal(tmp_path, "sgd", b, 0, 50.0, epochs=2, steps=steps)
        if b != 64:
            normal(tmp_path, "sgd", b, 0, 60.0, epochs=10**6, max_steps=1564, steps=1564)
    points = made(tmp_path)[0]["comparison"]
    found = points[["length", "batch_size", "updates"]].sort_values(["length", "batch_size"]).to_numpy().tolist()
    assert found == [
        ["1564 updates", 256, 1564],
        ["1564 updates", 1024, 1564],
        ["2 epochs", 64, 1564],
        ["2 epochs", 256, 392],
        ["2 epochs", 1024, 98],
    ]
    sets = {shared["equal"]: sorted(part["batch_size"]) for shared, part in comparisons.comparable(points)}
    assert sets["1564 updates"] == [64, 256, 1024] == sets["2 epochs"]


@pytest.mark.parametrize(("cap", "length"), [(None, "2 epochs"), (12501, "2 epochs"), (12500, "12500 updates")])
def test_a_cap_that_comes_after_the_epochs_is_none(tmp_path, cap, length):
    normal(tmp_path, "sgd", 8, 0, 50.0, epochs=2, max_steps=cap)
    assert list(made(tmp_path)[0]["comparison"]["length"]) == [length]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.2),
        ("beta1", 0.5),
        ("injected_noise", 0.3),
        ("precision", "bf16"),
        ("batchsize", 16),
        ("model", "ResNet20"),
    ],
)
def test_delta_is_of_a_sampling_run_of_the_same_arguments_only(tmp_path, key, value):
    normal(tmp_path, "shb", 8, 0, 50.0)
    folder = sampling(tmp_path, "shb", 8, 0, 0.25, gaussian())
    assert list(made(tmp_path)[0]["comparison"]["delta_mean"]) == [0.25]
    edit(folder, "args", **{key: value})
    runs = records.read(tmp_path)[0]
    made_of = comparisons.measure(runs[runs["model"] == "ResNet18"])[0]
    assert list(made_of["comparison"]["delta_mean"].isna()) == [True]


def test_what_an_optimizer_does_not_take_does_not_tell_runs_apart(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0, beta1=0.3, nu=0.1)
    sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), beta1=0.9)
    assert list(made(tmp_path)[0]["comparison"]["delta_mean"]) == [0.25]


def test_of_two_measurements_that_of_more_draws_counts_and_damage_is_named(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), steps=100)
    folder = sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), steps=100, draws=16)
    measurements(folder, [{"steps": 100, "batch_size": 8, "draws": 16, "delta": 0.75}])
    assert list(made(tmp_path)[0]["comparison"]["delta_mean"]) == [0.75]
    (folder / "measurements.csv").write_text("steps\n")
    found, left_out = made(tmp_path)
    assert list(found["comparison"]["delta_mean"]) == [0.25]
    assert [name for name in left_out if name.startswith(folder.name)] == [f"{folder.name} (measurements.csv only)"]


def test_delta_is_of_the_runs_own_b_and_the_mode_of_its_results(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    more = {"draws": 16, "measure_batchnorm": ["train", "eval"]}
    folder = sampling(tmp_path, "sgd", 8, 0, 9.0, gaussian(), steps=100, **more)
    rows = [("eval", 64, 4.0), ("train", 64, 3.0), ("eval", 8, 2.0), ("train", 8, 1.0), ("eval", 16, 5.0)]
    rows = [{"batchnorm": mode, "batch_size": b, "delta": delta} for mode, b, delta in rows]
    measurements(folder, [row | {"steps": 100, "draws": 16} for row in rows])
    assert list(made(tmp_path)[0]["comparison"]["delta_mean"]) == [1.0]


def test_a_diverged_seed_gives_nothing_but_its_number(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    lost = {"accuracy": 1.0, "best_accuracy": 1.0, "training_loss": 9.0, "max_gradient_norm": None}
    record(tmp_path, "normal", "sgd", 8, 1, lost, steps=7, status="diverged")
    normal(tmp_path, "sgd", 64, 0, 50.0, steps=20)
    sampling(tmp_path, "sgd", 8, 1, 0.25, gaussian(), steps=100)
    points = made(tmp_path)[0]["comparison"]
    row = point(points, batch_size=8)
    assert (row["normal_seeds"], row["normal_diverged"], row["paired"], row["updates"]) == (2, 1, 0, 100)
    assert (row["accuracy_mean"], row["accuracy_max"], row["delta_mean"], row["delta_step"]) == (50, 50, 0.25, 100)
    assert list(comparison_page.series(points)[0]["batch_size"]) == [64]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"precision": None}, "precision is None"),
        ({"precision": "../up"}, "precision is '../up'"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": True}, "max_steps is True"),
    ],
)
def test_a_run_of_unsound_arguments_is_left_out_by_name(tmp_path, args, named):
    folder = normal(tmp_path, "sgd", 8, 0, 50.0)
    edit(folder, "args", **args)
    normal(tmp_path, "sgd", 8, 1, 60.0)
    found, left_out = made(tmp_path)
    assert list(found["comparison"]["accuracy_mean"]) == [60.0]
    assert list(left_out) == [folder.name] and named in left_out[folder.name]


def test_other_chunks_and_modes_and_twins_are_left_out(tmp_path):
    for seed in (0, 1):
        normal(tmp_path, "sgd", 8, seed, 50.0)
        sampling(tmp_path, "sgd", 8, seed, 0.25, gaussian())
    twin = normal(tmp_path, "sgd", 8, 0, 10.0, name="twin")
    other = sampling(tmp_path, "sgd", 8, 2, 9.0, gaussian(), full_grad_batchsize=10)
    evaluated = sampling(tmp_path, "sgd", 8, 3, 9.0, gaussian(), measure_batchnorm=["eval"])
    found, left_out = made(tmp_path)
    row = point(found["comparison"], batch_size=8)
    assert (row["normal_seeds"], row["delta_mean"], row["accuracy_mean"]) == (2, 0.25, 50.0)
    assert set(left_out) == {f"{folder.name} (comparison)" for folder in (twin, other, evaluated)}


# --- sharpness, and the other name's δ ----------------------------------------------------------------------


def test_sharpness_is_of_the_same_step_in_evaluation_mode(tmp_path):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    folder = sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), steps=200)
    landscape(folder, [(0, "eval", 1.0), (100, "train", 2.0), (100, "eval", -3.0), (200, "eval", 4.0)])
    row = point(made(tmp_path)[0]["comparison"], batch_size=8)
    assert (row["lambda_max_mean"], row["sharpness_step"], row["delta_step"]) == (-3.0, 100, 200)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "steps,batchnorm\n100,eval\n",
        "steps,batchnorm,lambda_max\n101,eval,1\n",
        "steps,batchnorm,lambda_max\n1,x,1\n",
    ],
)
def test_a_landscape_that_is_not_sound_is_named_and_not_used(tmp_path, text):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    folder = sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), steps=100)
    (folder / "landscape.csv").write_text(text)
    found, left_out = made(tmp_path)
    assert list(left_out) == [f"{folder.name} (landscape.csv only)"]
    assert math.isnan(point(found["comparison"], batch_size=8)["lambda_max_mean"])


@pytest.mark.parametrize("value", ["nan", "inf", "", "1e999", "oops"])
def test_a_sharpness_that_is_no_number_is_none(tmp_path, value):
    normal(tmp_path, "sgd", 8, 0, 50.0, steps=100)
    folder = sampling(tmp_path, "sgd", 8, 0, 0.25, gaussian(), steps=100)
    landscape(folder, [(50, "eval", 5.0), (100, "eval", value)])
    row = point(made(tmp_path)[0]["comparison"], batch_size=8)
    assert (row["lambda_max_mean"], row["sharpness_step"]) == (5.0, 50)


def test_the_delta_of_the_other_name_is_in_the_table(tmp_path):
    normal(tmp_path, "nshb", 8, 0, 50.0, steps=100)
    folder = sampling(tmp_path, "nshb", 8, 0, 0.25, gaussian(), steps=100)
    edit(folder, "results", **{comparisons.RENAMED: 2.5})
    row = point(made(tmp_path)[0]["comparison"], batch_size=8)
    assert (row["delta_mean"], row[f"{comparisons.RENAMED}_mean"]) == (0.25, 2.5)


# --- correlations -------------------------------------------------------------------------------------------


def ranks(values):
    """Ranks by counting, ties their mean."""
    return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]


@pytest.mark.parametrize("seed", [0, 1])
def test_rank_correlations_are_a_slow_twins_and_of_comparable_sets_only(tmp_path, seed):
    rng, written = np.random.default_rng(seed), []
    for b, end in ((16, 6250), (64, 1564), (256, 392), (1024, 98)):
        for length in ("epochs", "updates"):
            more = {"epochs": 2} if length == "epochs" else {"epochs": 999, "max_steps": 1000}
            accuracy, loss = rng.integers(1, 5), rng.uniform(1, 2)
            normal(tmp_path, "sgd", b, 0, float(accuracy), loss, steps=end if length == "epochs" else 1000, **more)
            written.append((b, length, accuracy, loss))
        sampling(tmp_path, "sgd", b, 0, 1.0, gaussian(), steps=1000)
    for folder in tmp_path.glob("sampling-*"):
        edit(folder, "results", delta=float(rng.uniform()))
    deltas = {
        run["batch_size"]: run["delta"]
        for run in records.read(tmp_path)[0].to_dict("records")
        if run["mode"] == "sampling"
    }
    rows = made(tmp_path)[0]["comparison_correlations"]
    for length, equal, at in (("epochs", "2 epochs", "step 1000"), ("updates", "1000 updates", "end")):
        part = [entry for entry in written if entry[1] == length]
        for y, column in (("accuracy", 2), ("training_loss", 3)):
            for x, measured_at in (("delta", at), ("batch_size", "")):
                values = ranks([deltas[entry[0]] if x == "delta" else entry[0] for entry in part])
                expected = np.corrcoef(values, ranks([entry[column] for entry in part]))[0, 1]
                row = point(rows, equal=equal, x=x, measured_at=measured_at, optimizer="sgd", y=y)
                assert row["spearman"] == pytest.approx(expected) and row["points"] == 4
    assert set(rows["equal"]) == {"2 epochs", "1000 updates"}
    assert set(rows["x"][rows["equal"] == "1000 updates"]) == {"delta", "batch_size"}  # all made as many
    assert set(rows["optimizer"]) == {"sgd"}  # of all optimizers it would be the same once more
    assert not any(column == "p" or "p_value" in column for column in rows)


def test_delta_of_unlike_steps_is_not_ranked_together(tmp_path):
    for b, at in ((16, 10), (64, 10), (256, 20)):
        normal(tmp_path, "sgd", b, 0, float(b), steps=500)
        sampling(tmp_path, "sgd", b, 0, 1.0 / b, gaussian(), steps=at)
    rows = made(tmp_path)[0]["comparison_correlations"]
    assert "delta" not in set(rows.get("x", []))
    normal(tmp_path, "sgd", 1024, 0, 1.0, steps=500)
    sampling(tmp_path, "sgd", 1024, 0, 3.0, gaussian(), steps=10)
    rows = made(tmp_path)[0]["comparison_correlations"]
    row = point(rows, x="delta", y="accuracy")
    assert (row["measured_at"], row["points"]) == ("step 10", 3)


# --- the noise to inject ------------------------------------------------------------------------------------


def test_the_noise_to_inject_is_the_root_of_the_difference_over_seeds(tmp_path):
    variance = {0: {64: 9.0, 256: 3.0, 1024: 1.0}, 1: {64: 11.0, 256: 2.0, 1024: 2.5}}
    for seed, of_b in variance.items():
        folder = sampling(tmp_path, "sgd", 256, seed, 1.0, gaussian(), steps=100, draws=16)
        rows = [{"batch_size": b, "variance": v, "variance_se": 0.1 * v} for b, v in of_b.items()]
        measurements(folder, [row | {"steps": 100, "draws": 16} for row in rows])
    folder = sampling(tmp_path, "shb", 256, 0, 1.0, gaussian(), steps=100, draws=16)
    rows = [{"batch_size": b, "variance": 5.0 / b} for b in (64, 256)]
    measurements(folder, [row | {"steps": 100, "draws": 16} for row in rows])
    found = made(tmp_path)[0]["noise_to_inject"]
    assert len(found) == 3  # of SGD alone: SHB's buffer never sees what is injected
    for small, large in ((64, 256), (64, 1024), (256, 1024)):
        row = point(found, b_small=small, b_large=large)
        squares = [of_b[small] - of_b[large] for of_b in variance.values()]
        errors = [(0.1 * of_b[b]) ** 2 for of_b in variance.values() for b in (small, large)]
        r = math.sqrt(sum(squares) / 2)
        assert row["noise_to_inject"] == pytest.approx(r)
        assert row["noise_to_inject_se"] == pytest.approx(math.sqrt(sum(errors)) / 2 / (2 * r))
        assert (row["seeds"], row["run_batch_size"], row["steps"], row["lr"]) == (2, 256, 100, 0.1)


def test_one_seed_counts_once_and_the_noise_of_a_run_keeps_it_apart(tmp_path):
    for noise, variance, args in ((0.0, 9.0, {}), (0.0, 5.0, {"name": "again"}), (0.5, 3.0, {"name": "noisy"})):
        draws = 16 if args else 32
        more = args | {"injected_noise": noise, "draws": draws}
        folder = sampling(tmp_path, "sgd", 64, 0, 1.0, gaussian(), steps=100, **more)
        rows = [{"batch_size": b, "variance": variance * (b == 8)} for b in (8, 64)]
        measurements(folder, [row | {"steps": 100, "draws": draws} for row in rows])
    found = made(tmp_path)[0]["noise_to_inject"][["injected_noise", "seeds", "draws", "noise_to_inject"]]
    assert found.to_numpy().tolist() == [[0.0, 1, 32, 3.0], [0.5, 1, 16, pytest.approx(math.sqrt(3.0))]]


def test_where_the_small_b_has_not_the_larger_variance_there_is_no_noise_to_inject(tmp_path):
    folder = sampling(tmp_path, "sgd", 8, 0, 1.0, gaussian(), steps=100, draws=16)
    rows = [{"batch_size": b, "variance": v, "steps": 100, "draws": 16} for b, v in ((8, 1.0), (64, 2.0))]
    measurements(folder, rows)
    row = point(made(tmp_path)[0]["noise_to_inject"], b_small=8)
    assert math.isnan(row["noise_to_inject"]) and math.isnan(row["noise_to_inject_se"])


@pytest.mark.parametrize(("small", "large", "seeds"), [(9.0, 1.0, 1), (4.0, 3.0, 3)])
def test_the_standard_error_of_the_noise_covers(small, large, seeds):
    """Normal draws in 50 dimensions, M = 64: 95 % intervals of R, of many points of as many steps."""
    rng, degrees, times = np.random.default_rng(5), 50 * 63, 2000
    index = pd.MultiIndex.from_product([range(seeds), range(times), (8, 64)], names=["run", "steps", "batch_size"])
    rows = index.to_frame(index=False).assign(run_batch_size=8, batchnorm="train", draws=64)
    rows["variance"] = np.where(rows["batch_size"] == 8, small, large) * rng.chisquare(degrees, len(rows)) / degrees
    rows["variance_se"] = rows["variance"] * math.sqrt(2 / degrees)
    rows["seed"] = rows["run"]
    sampled = pd.DataFrame({"name": range(seeds), "optimizer": "sgd", "lr": 0.1, "same": "", "injected_noise": 0.0})
    found = comparisons.noise_to_inject(sampled, rows)
    inside = (found["noise_to_inject"] - math.sqrt(small - large)).abs() < 1.96 * found["noise_to_inject_se"]
    assert len(found) == times and 0.93 < inside.mean() < 0.97


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Draws the comparison of tmp_path: (figure or None, title, the section of report.md)."""

    def draw():
        found = []
        monkeypatch.setattr(axes, "save", lambda path, fig, title: found.append((fig, title)))
        text = comparison_page.write_all(records.read(tmp_path)[0], tmp_path)
        return (*found[0], text) if found else (None, None, text)

    return draw


def test_an_optimizer_has_one_colour_and_marker_and_no_two_series_look_alike():
    names = [f"{optimizer}, lr {lr}" for lr in range(12) for optimizer in ("SGD", "SHB", "NSHB")]
    found = comparison_page.looks(pd.DataFrame({"series": [*names, "QHM"]}))
    assert len({str(look) for look in found.values()}) == 37
    for i, optimizer in enumerate(("SGD", "SHB", "NSHB", "QHM")):
        own = [look for name, look in found.items() if name.split(",")[0] == optimizer]
        assert {(look["color"], look["marker"]) for look in own} == {(axes.COLORS[i], axes.MARKERS[i])}


def test_no_label_lies_upon_another(tmp_path, figure):
    """All with as many updates, and all but one with accuracies so near that the marks touch."""
    normal(tmp_path, "sgd", 8, 0, 90.0, epochs=3, max_steps=100, steps=100)
    for i, b in enumerate((16, 32, 64, 128, 512)):
        normal(tmp_path, "sgd", b, 0, 50.0 + i / 10, epochs=3, max_steps=100, steps=100)
    fig, _, _ = figure()
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in fig.axes[0].texts]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_the_figure_has_a_column_for_what_is_known_and_a_legend_of_what_differs(tmp_path, figure):
    for optimizer in ("sgd", "shb"):
        for b in (64, 256):
            normal(tmp_path, optimizer, b, 0, 50.0 + b, steps=b, lr=0.1, epochs=3)
            normal(tmp_path, optimizer, b, 1, 51.0 + b, steps=b, lr=0.1, epochs=3)
    fig, title, _ = figure()
    assert [ax.get_xlabel() for ax in fig.axes[1:]] == ["updates"] and len(fig.axes) == 2
    assert fig.axes[0].get_legend_handles_labels()[1] == ["SGD", "SHB"]
    assert title.startswith("CIFAR100, ResNet18, lr 0.1, β 0.9, 3 epochs\n") and "δ" not in title
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert {text.get_text() for text in fig.axes[0].texts} == {"64", "256"}
    drawn = sorted(
        x for ax in fig.axes[:1] for line in ax.lines if len(line.get_xdata()) == 2 for x in line.get_xdata()
    )
    assert set(drawn) == {64, 256} and lines
    for optimizer in ("sgd", "shb"):
        for b in (64, 256):
            sampling(tmp_path, optimizer, b, 0, 1.0 / b, gaussian(), steps=64)
    fig, title, text = figure()
    assert [ax.get_xlabel() for ax in fig.axes[2:]] == ["measured δ (parameter distance)", "updates"]
    assert "δ is measured where training ended, or else at step 64" in title
    assert "| 3 epochs | sgd | 0.1 | – | 256 |" in text


@pytest.mark.parametrize(
    ("other", "legend", "shared"),
    [
        ({"lr": 0.5}, ["SHB, lr 0.1", "SHB, lr 0.5"], "β 0.9"),
        ({"beta1": 0.5}, ["SHB, β 0.5", "SHB, β 0.9"], "lr 0.1"),
        ({"injected_noise": 0.5}, ["SHB, noise 0", "SHB, noise 0.5"], "lr 0.1, β 0.9, 200 epochs, b 8"),
        ({"precision": "bf16"}, ["SHB, bf16", "SHB, default"], "lr 0.1, β 0.9"),
        ({"epochs": 3}, ["SHB, 200 epochs", "SHB, 3 epochs"], "b 8"),
    ],
)
def test_the_legend_names_what_differs_and_the_title_the_rest(tmp_path, figure, other, legend, shared):
    normal(tmp_path, "shb", 8, 0, 50.0, steps=9)
    normal(tmp_path, "shb", 8, 0, 60.0, steps=8, **other)
    fig, title, _ = figure()
    assert sorted(fig.axes[0].get_legend_handles_labels()[1]) == legend
    assert shared in title.splitlines()[0]
    assert not fig.axes[0].texts  # of one b the title says it


def test_one_setting_is_no_figure_and_says_so(tmp_path, figure):
    normal(tmp_path, "shb", 8, 0, 50.0)
    critical(tmp_path, "shb", 16, 0, {"1.0": 9}, steps=9)
    fig, _, text = figure()
    assert fig is None and "not drawn: comparison: fewer than two settings" in text


def test_critical_runs_alone_have_no_comparison(tmp_path, figure):
    critical(tmp_path, "shb", 16, 0, {"1.0": 9}, steps=9)
    assert figure() == (None, None, "")


def test_figures_py_draws_what_the_groups_leave_out(tmp_path):
    for b, steps in ((64, 1564), (256, 392), (1024, 98)):
        normal(tmp_path / "runs", "sgd", b, 0, 50.0, epochs=2, steps=steps)
    normal(tmp_path / "runs", "sgd", 1024, 0, 60.0, epochs=999, max_steps=1564, steps=1564)
    done = command(tmp_path / "runs", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "left out: normal-sgd-b1024-seed0-epochs999-max_steps1564: it has epochs 999" in done.stdout
    rows = table(tmp_path / "out", "comparison", SLUG)
    assert sorted((row["length"], row["batch_size"]) for row in rows) == [
        ("1564 updates", "1024"),
        *(("2 epochs", b) for b in ("1024", "256", "64")),
    ]
    assert {path.suffix for path in (tmp_path / "out").glob("*_comparison.*")} == {".png", ".pdf", ".csv"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"![comparison]({SLUG}_comparison.png)" in text and "## CIFAR100, ResNet18, all settings" in text
