"""report/plots.py and report/axes.py: what is drawn, where, and what a legend calls it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from report_helpers import (
    BOUND_LABEL,
    PUBLISHED,
    critical,
    drawn,
    marks,
    measured,
    normal,
    record,
    sampling,
    u_shaped,
)

from report import axes, page, plots


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def test_a_curve_breaks_at_a_bound_and_at_a_gap():
    rows = pd.DataFrame(
        {
            **{"batch_size": [8, 16, 32, 64], "steps_are": ["measured", "lower bound", "measured", None]},
            **{f"sfo_{part}": [9.0, 8.0, 7.0, np.nan] for part in ("mean", "min", "max")},
        },
        index=[3, 5, 7, 9],
    )
    _, ax = plt.subplots()
    axes.curve(ax, rows, "sfo", color="k")
    (line,) = [x for x in ax.lines if len(x.get_xdata()) == 4]
    assert list(line.get_xdata()) == [8, 16, 32, 64]
    np.testing.assert_equal(np.asarray(line.get_ydata(), float), [9, np.nan, 7, np.nan])


def test_the_histogram_says_what_it_cuts_off_and_what_it_cannot_tell(tmp_path, monkeypatch):
    omega = np.append(np.random.default_rng(2).normal(size=3990), [50.0] * 10)
    sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, omega)
    found, _ = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    fig, title = found["omega"]
    assert any("beyond ±6 std: 0.25 %" in text.get_text() for text in fig.axes[0].texts)
    assert "not whether it is Gaussian" in title


def test_upper_bounds_are_arrows_and_no_part_of_curve_interpolation_or_ratio(tmp_path, monkeypatch):
    published = {b: n["1.0"] for b, n in PUBLISHED.items()}
    for b, n in published.items():
        first = 11 * -(-50_000 // b)
        n = first if b >= 2048 else n
        critical(tmp_path / "runs", "shb", b, 0, {"1.0": n}, steps=n)
    made = measured(tmp_path / "runs")[1]
    rows, constants, theirs = made["steps"], made["constants"], made["published_steps"]
    early = list(rows["batch_size"][rows["steps_are"] == "upper bound"])
    assert early == [2048, 4096, 8192]
    assert list(rows["ratio"].isna()) == [b in early for b in published]
    fig = plots.steps(rows, constants, theirs[:0], *(made[table] for table in page.STEPS[3:]))
    arrows = marks(fig, "upper bound: ε reached at the first check")
    assert sorted(arrows)[:2] == [(2048, 275), (2048, 275 * 2048)] and len(arrows) == 6
    (line,) = [x for x in fig.axes[0].lines if len(x.get_xdata()) == len(published)]
    assert np.isnan(np.asarray(line.get_ydata(), float)[-3:]).all()
    star = constants[:1].assign(bound=2000.0)  # between the last whole point and the first bound
    fig, ax = plt.subplots()
    axes.size_axis(ax, rows)
    plots.mark_b_star(ax, rows, "steps", star)
    ((x, y),) = marks(fig, BOUND_LABEL)
    assert (x, y) == (2000.0, pytest.approx(published[1024]))


def test_a_curve_whose_c_squared_rests_on_an_edge_says_so(tmp_path, monkeypatch):
    for b, n in ((8, 10), (16, 20), (32, 30)):
        critical(tmp_path / "runs", "sgd", b, 0, {"1.0": n}, steps=n, min_epochs=0, lr=0.2)
    u_shaped(tmp_path / "runs", "nshb", lr=0.2)
    made = measured(tmp_path / "runs")[1]
    assert list(made["constants"]["c_squared_from"]) == ["b* <= 8", "b* = 16"]
    found = made["points"][["optimizer", "delta_formula_from"]].drop_duplicates().itertuples(index=False, name=None)
    assert set(found) == {("sgd", "b* <= 8"), ("nshb", "b* = 16")}
    fig, _ = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")[0]["delta"]
    assert fig.axes[0].get_legend_handles_labels()[1] == ["SGD, formula (C² from b* <= 8)", "NSHB, formula"]


def test_a_bound_beyond_the_grid_is_an_arrow_at_its_edge(tmp_path):
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(tmp_path, "nshb", b, 0, {"1.0": n, "0.1": 9 * n, "9.0": n - 9}, steps=9 * n, min_epochs=0)
    made = measured(tmp_path)[1]
    assert list(made["constants"]["bound"]) == [pytest.approx(x) for x in (16, 0.16, 16 / 81 / 100)]
    fig = plots.steps(*(made[table] for table in page.STEPS))
    for ax in fig.axes:
        low, high = ax.get_xlim()
        assert 4 < low < 8 and 32 < high < 64
    assert sorted(x for x, _ in marks(fig, "theory's bound lies beyond the grid")) == [0.03] * 4


def test_what_diverged_is_marked_once(tmp_path, monkeypatch):
    for optimizer in ("sgd", "nshb"):
        u_shaped(tmp_path / "runs", optimizer)
        lost = {"steps_to_eps": {"1.0": None, "0.5": None}, "max_gradient_norm": None}
        record(tmp_path / "runs", "critical", optimizer, 32, 1, lost, steps=7, status="diverged", min_epochs=0)
        for b in (8, 32):
            normal(tmp_path / "runs", optimizer, b, 0, 50.0)
        record(tmp_path / "runs", "normal", optimizer, 32, 1, {}, steps=7, status="diverged")
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    for name, count in (("steps", 2), ("accuracy", 2)):  # one for each optimizer
        crosses = marks(found[name][0], "a seed diverged")
        assert len(crosses) == count
        labels = [label for ax in found[name][0].axes for label in ax.get_legend_handles_labels()[1]]
        assert "a seed diverged" in labels
    assert len(set(marks(found["accuracy"][0], "a seed diverged"))) == 2  # none hides the other
    for name in ("critical-sgd-b32-seed1-min_epochs0", "normal-nshb-b32-seed1"):
        assert text.count(name) == 1 and f"- diverged: {name}\n" in text


def test_every_figure_says_what_it_is_of(tmp_path, monkeypatch):
    normal(tmp_path / "shb", "shb", 8, 0, 50.0, lr=0.05, beta1=0.5)
    normal(tmp_path / "shb", "sgd", 16, 0, 50.0, lr=0.05)
    normal(tmp_path / "sgd", "sgd", 8, 0, 50.0, lr=0.05)
    normal(tmp_path / "sgd", "sgd", 16, 0, 50.0, lr=0.05)
    for name, title in (("shb", "CIFAR100, ResNet18, lr 0.05, β 0.5"), ("sgd", "CIFAR100, ResNet18, lr 0.05")):
        found, _ = drawn(monkeypatch, tmp_path / name, tmp_path / f"{name}-out")
        assert found and all(said.startswith(f"{title}\n") for _, said in found.values())
    monkeypatch.undo()
    fig, _ = found["accuracy"]
    axes.save(tmp_path / "figure", fig, title)
    assert fig._suptitle.get_text() == title


def test_no_arrow_hides_another(tmp_path):
    for b in (8, 16):
        critical(tmp_path, "sgd", b, 0, dict.fromkeys(("1.0", "0.7", "0.5")), steps=90, status="not_reached")
    made = measured(tmp_path)[1]
    fig = plots.steps(*(made[table] for table in page.STEPS))
    places = marks(fig, "lower bound: a seed did not reach ε")
    assert len(places) == len(set(places)) == 12
    seen = sorted(x for x, y in places if y == 90)  # on one height: b = 8 left of b = 16, apart from each other
    assert seen[1] == 8 and seen[4] == 16 and min(np.diff(np.log2(seen))) > 0.2


def test_a_legend_has_a_fixed_order_with_its_marks_last(tmp_path):
    with plt.rc_context(axes.STYLE):
        fig, panels = plt.subplots(1, 2)
    axes.mark(panels[0], 1, 1, "a seed diverged", marker="x")
    for ax, names in zip(panels, (("SGD",), ("SGD", "SHB")), strict=True):
        for name in names:
            ax.plot([1, 2], [1, 2], label=name)
    axes.save(tmp_path / "figure", fig, "")
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["SGD", "SHB", "a seed diverged"]


def test_delta_is_measured_before_formula_before_paper_and_sgd_shb_nshb(tmp_path):
    for optimizer in ("nshb", "shb", "sgd"):
        for b, n in ((256, 900), (512, 200), (1024, 300)):
            critical(tmp_path, optimizer, b, 0, {"0.5": n}, steps=n, min_epochs=0)
            sampling(tmp_path, optimizer, b, 0, 1.0, np.zeros(3))
    fig = plots.delta(measured(tmp_path)[1]["points"])
    kinds = ("measured", "formula", "paper's C², K")
    expected = [f"{name}, {kind}" for kind in kinds for name in ("SGD", "SHB", "NSHB")]
    assert fig.axes[0].get_legend_handles_labels()[1] == expected


@pytest.mark.parametrize("sizes", [[2**k for k in range(3, 14)], [8, 16], [96, 100, 128, 1024], list(range(1, 60))])
def test_batch_sizes_are_plain_ticks_with_room_between_them(sizes):
    _, ax = plt.subplots()
    axes.size_axis(ax, pd.DataFrame({"batch_size": sizes}))
    ticks, labels = ax.get_xticks(), [text.get_text() for text in ax.get_xticklabels()]
    assert labels == [f"{b}" for b in ticks] and set(ticks) <= set(sizes) and 2 <= len(ticks) <= 7
    assert np.diff(np.log(ticks)).min() >= np.log(sizes[-1] / sizes[0]) / 6.1


@pytest.mark.parametrize(("low", "high"), [(3.1, 3.4), (0.2, 0.8), (30, 90), (5, 60)])
def test_a_log_axis_of_under_two_decades_has_plain_ticks(low, high):
    fig, ax = plt.subplots()
    ax.set(yscale="log", ylim=(low, high))
    axes.readable_ticks(ax.yaxis)
    fig.canvas.draw()
    inside = [
        t
        for t, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        if low <= t <= high and float(text.get_text()) == pytest.approx(t)
    ]
    assert 3 <= len(inside) <= 8


def test_an_optimizer_without_formulas_has_its_curves_and_a_look_of_its_own(tmp_path, monkeypatch):
    for nu in (0.5, 0.9):
        u_shaped(tmp_path / "runs", "qhm", nu=nu)
    u_shaped(tmp_path / "runs", "shb")
    for optimizer in ("qhm", "shb"):
        for b in (8, 16, 32):
            normal(tmp_path / "runs", optimizer, b, 0, 50.0 + b, nu=0.5)
            sampling(tmp_path / "runs", optimizer, b, 0, 1.0 / b, np.random.default_rng(b).normal(size=4000), nu=0.5)
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert [ax.get_title() for ax in found["steps"][0].axes[:3]] == ["SHB", "QHM NU 0.5", "QHM NU 0.9"]
    assert len(marks(found["steps"][0], "measured b*")) == 6
    for name in ("accuracy", "accuracy_delta"):
        assert found[name][0].axes[0].get_legend_handles_labels()[1] == ["SHB", "QHM NU 0.5"]
    labels = found["delta"][0].axes[0].get_legend_handles_labels()[1]
    assert labels == ["SHB, measured", "QHM NU 0.5, measured", "SHB, formula", "SHB, paper's C², K"]
    colors = {line.get_label(): line.get_color() for line in found["accuracy"][0].axes[0].lines}
    assert colors["SHB"] != colors["QHM NU 0.5"]
    bars = [ax.get_title().partition(",")[0] for ax in found["omega"][0].axes[:2]]
    assert bars == ["SHB", "QHM NU 0.5"] and "no formula is known" in text


def test_each_optimizer_of_a_group_keeps_its_look_in_every_figure():
    names = ["sgd", "shb", "nshb", *"abcdefgh"]
    column = pd.Series(pd.Categorical(["a", "shb"], names, ordered=True))
    looks = axes.looks(column)
    assert list(looks) == names and looks["shb"] == axes.nth_look(1) and looks["a"] == axes.nth_look(3)
    assert len({str(axes.nth_look(i)) for i in range(36)}) == 36


def test_a_figure_of_gradients_shows_where_eps_was_reached(tmp_path):
    for b in (8, 16):
        folder = critical(tmp_path, "sgd", b, 0, {"0.5": 70 if b == 8 else None, "0.1": None}, steps=90, min_epochs=0)
        np.full(90, 0.5, "<f4").tofile(folder / "gradient_norms.f32")
    made = measured(tmp_path)[1]
    fig = plots.gradients(*(made[table] for table in page.HISTORY))
    assert [ax.get_title() for ax in fig.axes] == ["SGD, b = 8, seed 0", "SGD, b = 16, seed 0"]
    reached = [[line.get_xydata().tolist() for line in ax.lines if line.get_label() == "ε reached"] for ax in fig.axes]
    assert reached == [[[[70, 0.5]]], []]
    assert [line.get_label() for line in fig.axes[0].lines][1:] == ["ε = 0.1", "ε = 0.5", "ε reached"]


def test_a_point_with_a_diverged_seed_has_no_accuracy_to_set_against_delta(tmp_path):
    for b in (8, 16, 32):
        normal(tmp_path, "sgd", b, 0, 50.0 + b)
        sampling(tmp_path, "sgd", b, 0, 1.0 / b, np.zeros(3))
    record(tmp_path, "normal", "sgd", 32, 1, {}, steps=7, status="diverged")
    made = measured(tmp_path)[1]
    fig = plots.accuracy_delta(made["points"], made["correlations"])
    (ax,) = fig.axes
    assert [x for line in ax.containers for x in line[0].get_xdata()] == [1 / 8, 1 / 16]
