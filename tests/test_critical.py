"""report/critical.py: steps to ε against plain loops; b*, its interval and the power of 1/ε on simulated curves."""

import math

import numpy as np
import pandas as pd
import pytest
from recorded import OPTIMIZERS, SIZES, T, one, record

from report import critical, published, records
from report.statistics import over_seeds


def slowly(norms, eps, start):
    """The first step, from `start` on, at which the mean of all norms so far is at most ε; in plain Python."""
    total = 0.0
    for step, norm in enumerate(norms, start=1):
        total += norm
        if step >= start and total / step <= eps:
            return step
    return None


@pytest.mark.parametrize("min_epochs", [None, 0, 2])
def test_steps_to_eps_of_any_run_against_a_plain_loop(runs_dir, min_epochs):
    runs = records.runs(runs_dir)
    table = critical.steps_to_eps(runs, min_epochs)
    for optimizer in OPTIMIZERS:
        for b in SIZES:
            for eps in (1.2, 1.0):  # the only critical run asked for these, from the first step on
                steps, missed = [], 0
                for run in runs.query("optimizer == @optimizer and b == @b and mode == 'normal'").to_dict("records"):
                    norms = np.fromfile(run["folder"] / "gradient_norms.f32", "<f4").tolist()
                    step = slowly(norms, eps, max(1, (min_epochs or 0) * 4000 // b))
                    missed += step is None
                    steps.append(len(norms) if step is None else step)
                row = one(table, optimizer=optimizer, b=b, eps=eps, min_epochs=min_epochs or 0)
                assert (row["seeds"], row["missed"], row["reached"]) == (3, missed, 3 - missed)
                assert row["steps_mean"] == pytest.approx(sum(steps) / 3) and row["steps_max"] == max(steps)
                assert row["sfo_mean"] == pytest.approx(sum(steps) / 3 * b)
    assert len(table) == 3 * 4 * 2 and table["missed"].max() == 3
    assert (table["at_first_check"].max() > 0) == (min_epochs == 2)


def test_without_critical_runs_the_rule_is_the_papers(tmp_path):
    norms = np.r_[np.full(40, 5.0), np.full(1000, 0.1)]
    record(tmp_path, "--optimizer=sgd --batchsize=100", 1040, norms=norms)
    row = one(critical.crossings(records.runs(tmp_path)))
    assert (row["min_epochs"], row["eps"], row["checked"]) == (11, 0.5, 1040)
    assert row["steps"] == slowly(np.float32(norms).tolist(), 0.5, 440) > 440


def table_of(rows, eps=1.0):
    """The table of steps of these crossings, each with its b, seed, steps, and whether it was reached."""
    rows = [{"at_first_check": False} | row for row in rows]
    about = {"setting": "s", "curve": "c", "label": "SGD", "optimizer": "sgd", "lr": 0.1, "beta1": np.nan}
    table = pd.DataFrame(rows).assign(**about, min_epochs=0, eps=eps, sfo=lambda rows: rows["steps"] * rows["b"])
    table["log_sfo"] = np.log(table["sfo"]) - critical._of_seed(table)
    found = over_seeds(table, critical.KEY, ["steps", "sfo", "log_sfo"])
    reached = table.groupby("b", sort=False)["reached"].sum().to_numpy()
    return found.assign(reached=reached, at_first_check=0, diverged=0, after_fit=0)


def grid(reached):
    """{b: (steps of the first seed, of the second, or None where it missed after 100)}."""
    pairs = [(b, seed, steps) for b, both in reached.items() for seed, steps in enumerate(both)]
    return table_of(
        [{"b": b, "seed": s, "steps": steps or 100, "reached": steps is not None} for b, s, steps in pairs]
    )


@pytest.mark.parametrize(
    ("reached", "b_star", "inside"),
    [
        ({1: (60, 60), 2: (10, 12), 4: (9, 9)}, 2, True),
        ({1: (20, 20), 2: (20, 20), 4: (40, 40)}, 1, False),  # at the edge
        ({2: (20, 20), 4: (8, 8), 8: (2, 2)}, 8, False),
        ({1: (None, None), 2: (11, 11), 4: (9, 9)}, 2, True),  # what it needs at least is more than at b*
        ({1: (None, None), 2: (90, 90), 4: (80, 80)}, 2, False),  # it may need less
        ({1: (None, 60), 2: (10, 12), 4: (None, 1)}, None, None),
    ],
)
def test_b_star_and_whether_it_lies_inside_the_grid(reached, b_star, inside):
    table = critical.b_star(grid(reached))
    if b_star is None:
        assert table.empty
        return
    row = one(table)
    assert (row["b_star"], row["inside"]) == (b_star, inside)
    assert row["c_squared_from_b_star"] == pytest.approx(b_star * 1.0**2 / 0.1)


def test_a_neighbour_that_diverged_or_had_eps_at_once_leaves_b_star_open_up_to_the_next_size():
    reached = {1: (60, 60), 2: (10, 12), 4: (9, 9)}
    for key in ("diverged", "at_first_check"):
        table = grid(reached)
        table.loc[table["b"] == 4, [key, "reached"]] = [1, 1]
        row = one(critical.b_star(table))
        assert row["b_star"] == 2 and not row["inside"] and math.isnan(row["b_star_fit_high"])
        row = one(critical.b_star(pd.concat([table, table[:1].assign(b=8)])))
        assert row["inside"] and (row["b_star_fit_low"], row["b_star_fit_high"]) == (1, 8)


def test_the_published_steps_and_b_star_come_out_of_runs_that_reach_eps_there(tmp_path):
    """‖g‖ that reaches ε = 0.5 at exactly the published steps of SHB, at the four largest b."""
    steps = published.steps()
    assert len(steps) == 33 and steps["published"].sum() == 16_992_458
    for b, n in steps[(steps["eps"] == 0.5) & (steps["b"] >= 1024)][["b", "published"]].to_numpy().tolist():
        norms = np.full(n, 0.5)
        norms[0], norms[-1] = 0.75, 0.25
        flags = f"--mode=critical --dataset=CIFAR100 --model=ResNet18 --batchsize={b}"
        record(tmp_path, flags, n, norms=norms)
    table = critical.steps_to_eps(records.runs(tmp_path))
    assert table["ratio"].tolist() == [1, 1, 1, 1] and table["published"].tolist() == table["steps_mean"].tolist()
    row = one(critical.b_star(table))
    assert row["b_star"] == 1024
    assert row["c_squared_from_b_star"] == pytest.approx(25.3187, abs=1e-4)
    assert not row["inside"]  # the edge of this grid


def simulated(log_sfo, sizes, rng, noise, seeds, eps=1.0):
    """A table of steps: log SFO at log2 b + noise of a seed at each b + what a seed adds to all."""
    x = np.log2(sizes)
    logs = log_sfo(x)[:, None] + noise * rng.standard_normal((len(x), seeds)) + 0.3 * rng.standard_normal(seeds)
    steps = 1e8 * np.exp(logs) / np.asarray(sizes)[:, None]
    each = [(b, seed, of) for b, row in zip(sizes, steps, strict=True) for seed, of in enumerate(row)]
    return table_of([{"b": b, "seed": seed, "steps": of, "reached": True} for b, seed, of in each], eps)


def floor(at):
    """The running mean's: steps ~ b/(b − floor), infinite at half of the best b = 2^at."""
    return lambda x: np.log(2**x / (1 - 2.0 ** (at - 1 - x)))


def flat(at):
    """As the published curves: within 10 % over a factor of 4, and steeper below."""
    return lambda x: np.log(1 + 0.1 * (2 ** (x - at) + 0.5 * 2 ** (-2 * (x - at))))


@pytest.mark.parametrize(
    ("curve", "step", "below", "noise", "seeds"),
    [(floor, 0.25, 3, 0.05, 3), (flat, 1.0, 4, 0.02, 3), (flat, 0.5, 5, 0.05, 3), (flat, 0.5, 5, 0.05, 5)],
)
def test_the_interval_of_b_star_holds_and_the_best_size_does_not(monkeypatch, curve, step, below, noise, seeds):
    """Minima known, steep on one side, at any place between two sizes; a seed's own level must not matter."""
    monkeypatch.setattr(critical, "REDRAWS", 1000)
    rng, held, fitted, missed, times = np.random.default_rng(1), 0, 0, 0, 60
    for _ in range(times):
        at = 8 + step * rng.uniform(-0.5, 0.5)
        sizes = 2 ** (8 + step * np.arange(-below, below + 2))
        row = one(critical.b_star(simulated(curve(at), sizes, rng, noise, seeds)))
        low, high = (row[f"b_star_fit_{end}"] for end in ("low", "high"))
        held += not (low > 2**at or high < 2**at)
        fitted += row["b_star_fit"] > 0
        missed += abs(math.log2(row["b_star"]) - at) > step / 2
    assert held >= 0.9 * times and fitted > 0.7 * times
    assert missed > 0.02 * times  # each of them is off by a whole size, and says nothing of it


def test_what_a_seed_adds_at_every_b_widens_nothing_and_one_seed_gives_no_interval():
    sizes, plain = 2 ** np.arange(4, 13), simulated(flat(8), 2 ** np.arange(4, 13), np.random.default_rng(0), 0.01, 3)
    row = one(critical.b_star(plain))
    assert row["b_star_fit_high"] < 1.5 * row["b_star_fit_low"]  # though seeds differ by 30 %
    row = one(critical.b_star(simulated(flat(8), sizes, np.random.default_rng(0), 0.01, 1)))
    assert row["b_star_fit"] > 0 and math.isnan(row["b_star_fit_low"]) and math.isnan(row["b_star_fit_high"])


def test_two_sizes_are_told_apart_as_by_the_paired_t_test():
    rng, found = np.random.default_rng(0), set()
    for _ in range(20):
        table = simulated(lambda x: 0.1 * x, np.array([4, 8]), rng, 0.03, 3)
        low, high = table["log_sfo_mean"]
        alike = abs(high - low) <= T[2] * 2 * table["log_sfo_se"][0]  # half of a difference is each seed's residual
        assert (one(critical.b_star(table))["alike"] == "4 8") == alike
        found.add(alike)
    assert found == {True, False}


def test_the_power_of_eps_and_c_squared_beside_what_is_measured():
    """b* = 128/ε²; C² is measured up to ε alone."""
    rng = np.random.default_rng(0)
    grids = [simulated(flat(7 - 2 * math.log2(e)), 2 ** np.arange(4, 15), rng, 0.01, 3, e) for e in (1.0, 0.7, 0.5)]
    rows = [{"steps": steps, "c_squared": 30.0 + steps / 1e3, "draws": 8} for steps in (0, 1000, 9000, 11000)]
    about = {"curve": "c", "b": 128, "batch_size": 128, "layer": "all", "batchnorm": "train", "seed": 0}
    stars = critical.b_star(pd.concat(grids).assign(steps_mean=1e4), pd.DataFrame(rows).assign(**about))
    row = one(critical.power(stars))
    assert row["every_eps"] == "0.5 0.7 1" or row["every_eps"] == "1 0.7 0.5"
    assert row["power_low"] < 2 < row["power_high"] and row["power"] == pytest.approx(2, abs=0.1)
    assert row["other_fits_low"] < row["power"] < row["other_fits_high"]
    star = one(stars, eps=1.0)
    assert star["c_squared_from_b_star"] == star["b_star"] / 0.1 == 1280
    for end in ("", "_low", "_high"):
        assert star[f"c_squared_fit{end}"] == pytest.approx(star[f"b_star_fit{end}"] / 0.1)
    found = star["c_squared_run"], star["c_squared_at_eps"], star["c_squared_max"]
    assert found == pytest.approx((33.3333, 39, 39), rel=1e-4)
    assert star["b_star_formula"] == pytest.approx(3.33333, rel=1e-4)


@pytest.mark.parametrize(
    ("column", "value", "note"), [("after_fit", 1, "after the fit"), ("steps_mean", 49, "below 50")]
)
def test_a_b_star_that_says_nothing_is_marked_and_not_fitted(column, value, note):
    table = simulated(flat(8), 2 ** np.arange(4, 13), np.random.default_rng(0), 0.01, 3).assign(**{column: value})
    stars = critical.b_star(table)
    assert note in one(stars)["note"] and math.isnan(one(stars)["b_star_fit"]) and critical.power(stars).empty


def test_steps_after_the_fit_are_counted_and_their_product_with_eps_is_constant(tmp_path):
    for b, seed in ((100, 0), (200, 0), (100, 1), (200, 1)):
        norms = np.r_[np.full(400 * (seed + 1), 2.0), np.zeros(8000)]
        fit = {"steps": 10 * 4000 // b, "training_loss": 0.009}
        flags = f"--mode=critical --optimizer=sgd --batchsize={b} --seed={seed} --min_epochs=0 --eps 1.6 0.8 0.4"
        record(tmp_path, flags, len(norms), norms=norms, metrics=[fit | {"steps": 1, "training_loss": 0.001}, fit])
    table = critical.steps_to_eps(records.runs(tmp_path))
    assert (table["steps_mean"] * table["eps"]).to_numpy() == pytest.approx(1200, rel=1e-3)
    assert table["log_sfo_se"].max() < 1e-3  # though one seed needs twice the steps of the other, at every b
    assert table["after_fit"].tolist() == [2] * 6 and set(critical.b_star(table)["note"]) == {"after the fit"}


def test_the_published_steps_read_the_same_way():
    """b* by the fits of three, five, seven sizes and a spline; a cubic says more, and less surely."""
    stars = critical.b_star(published.steps()).set_index("eps")
    assert stars["b_star"].to_dict() == {0.5: 1024, 0.7: 512, 1.0: 256}
    for eps, low, high in ((1.0, 300, 335), (0.7, 310, 660), (0.5, 490, 790)):
        without_cubics = np.exp2(stars.loc[eps, "others"][[0, 1, 2, 5]])
        assert low < without_cubics.min() and without_cubics.max() < high
    assert stars["b_star_fit"].round().to_dict() == {0.5: 858, 0.7: 556, 1.0: 285}
    row = one(critical.power(stars.reset_index()))
    found = [round(row[key], 1) for key in ("other_fits_low", "other_fits_high", "power", "argmin")]
    assert found == [0.7, 1.6, 1.6, 2.0]
    assert math.isnan(row["power_low"])  # there are no seeds


def test_minima_of_many_polynomials_at_once():
    x = np.linspace(3, 9, 7)
    inside, falling = (x - 5) ** 2 * (x + 9), -x
    assert critical.minimum(x, np.stack([inside, falling, -falling]).T).tolist() == pytest.approx([5, 9, 3])
    assert critical.minimum(x, (x - 4.5) ** 2, 2) == pytest.approx(4.5)
    assert critical.minimum(x, -((x - 5) ** 2), 2) == 9
