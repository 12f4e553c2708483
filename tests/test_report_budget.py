"""report/measurements.py, budget.py and budget_plots.py: what sampling runs measured at many steps."""

import csv
import io
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from report_helpers import SLUG, all_groups, command, drawn, gaussian, measured, sampling, table, u_shaped

from report import budget, budget_plots, measurements, records, tables, theory

STEPS = (0, 20, 100)
KEYS = "full_gradient_norm noise_norm noise_square delta delta_se fresh memory memory_noise_frozen staleness variance"
KEYS += " variance_se c_squared c_squared_se batchnorm_bias noise_scale largest_gradient_norm accuracy test_loss"
SHAPE = "entries kurtosis rejected pooled_kurtosis scales_kurtosis isotropy effective_rank"


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def write(path, rows):
    """A CSV file as main.py writes it: nothing for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def numbers(rng, head, own, draws):
    """One row of measurements.csv of random numbers; what is not known of it is None."""
    row = head | {key: float(rng.uniform(1, 2)) for key in KEYS.split()}
    row["staleness"] = row["memory"] - row["memory_noise_frozen"]
    if not own:
        row |= dict.fromkeys(("noise_norm", "memory_noise_frozen", "staleness"))
    if not draws:
        known = (*head, "full_gradient_norm", "noise_norm", "delta", "accuracy", "test_loss")
        row |= {key: None for key in row if key not in known}
    return row


def run(runs, optimizer="shb", seed=0, b=64, *, modes=("train",), drawn_b=(16, 64), draws=32, steps=STEPS, **more):
    """A sampling run that measured at `steps`; returns its directory and the rows of its measurements.csv."""
    args = {"draws": draws, "draw_batchsizes": list(drawn_b), "measure_batchnorm": list(modes), "shape": draws > 0}
    args |= {"earlier_steps": list(steps[:-1]), "name": f"{optimizer}-{b}-{seed}"} | more
    norm, last = args.pop("norm", 0.5), args.pop("last", 100)
    folder = sampling(runs, optimizer, b, seed, 1.0, gaussian(), norm=norm, steps=last, **args)
    rng, rows, shapes = np.random.default_rng([seed, b, len(optimizer)]), [], []
    for step in steps:
        for mode in modes:
            head = {"steps": step, "batchnorm": mode}
            rows += [numbers(rng, head | {"batch_size": size, "draws": draws}, size == b, draws) for size in drawn_b]
            for layer in ("all", "fc"):
                shapes.append(head | {"layer": layer} | {key: float(rng.uniform(1, 2)) for key in SHAPE.split()})
    write(folder / "measurements.csv", rows)
    if draws:
        write(folder / "shape.csv", shapes)
    return folder, rows


def row_of(table, **values):
    """The one row of a table with these values, as a dict."""
    for key, value in values.items():
        table = table[table[key] == value]
    (row,) = table.to_dict("records")
    return row


def test_the_budget_is_that_of_a_plain_loop_over_seeds(tmp_path):
    made = {
        (o, seed): run(tmp_path, o, seed, modes=("train", "eval"))[1] for o in ("sgd", "shb") for seed in (0, 1, 2)
    }
    budget = measured(tmp_path)[1]["budget"]
    assert len(budget) == 2 * 3 * 2 and set(budget["seeds"]) == {3} and set(budget["draws"]) == {32}
    columns = "delta fresh memory memory_noise_frozen staleness variance c_squared c_squared_se noise_scale"
    columns += " batchnorm_bias full_gradient_norm accuracy"
    for optimizer in ("sgd", "shb"):
        for step in STEPS:
            for mode in ("train", "eval"):
                row = row_of(budget, optimizer=optimizer, steps=step, batchnorm=mode, run_batch_size=64)
                head = {"steps": step, "batchnorm": mode, "batch_size": 64}
                mine = [r for seed in range(3) for r in made[optimizer, seed] if head.items() <= r.items()]
                for key in columns.split():
                    values, name = [r[key] for r in mine], key.replace("c_squared", "c_squared_direct")
                    assert row[f"{name}_mean"] == pytest.approx(sum(values) / 3, rel=1e-12)
                    assert (row[f"{name}_min"], row[f"{name}_max"]) == (min(values), max(values))


def test_k_is_the_largest_of_all_measured_points_with_its_run_and_step(tmp_path):
    folder, rows = run(tmp_path, seed=0)
    run(tmp_path, seed=1, draws=0)
    for row in rows:
        row["full_gradient_norm"] = 9.0 if row["steps"] == 20 else 1.0
    write(folder / "measurements.csv", rows)
    constants = measured(tmp_path)[1]["constants"]
    assert constants[["k", "k_run", "k_step"]].to_dict("records") == [{"k": 9.0, "k_run": folder.name, "k_step": 20}]


def test_a_run_without_draws_counts_for_k_only(tmp_path):
    run(tmp_path, seed=0)
    folder, rows = run(tmp_path, seed=1, draws=0)
    made = measured(tmp_path)[1]
    assert set(made["budget"]["seeds"]) == set(made["direct"]["seeds"]) == set(made["delta_bound"]["seeds"]) == {1}
    rows[0]["full_gradient_norm"] = 7.5
    write(folder / "measurements.csv", rows)
    constants = measured(tmp_path)[1]["constants"]
    assert list(constants["k"]) == [7.5] and list(constants["k_run"]) == [folder.name]


def test_most_runs_without_draws_are_not_what_most_runs_drew(tmp_path):
    for seed in (1, 2):
        run(tmp_path, seed=seed, draws=0)
    folder, _ = run(tmp_path, seed=0)
    rows, left_out = measurements.of_usual_draws(
        measurements.read(all_groups(tmp_path)[0].sampling)[0], [*budget.KEY, "batch_size"]
    )
    assert set(rows["run"]) == {folder.name} and left_out == {}


def test_k_is_of_the_mode_that_the_results_are_of(tmp_path):
    """With BatchNorm the two modes are two functions; a bound of each takes its own K."""
    folder, rows = run(tmp_path, modes=("train", "eval"))
    for row in rows:
        row["full_gradient_norm"] = 9.0 if row["batchnorm"] == "eval" else 2.0
    write(folder / "measurements.csv", rows)
    made = measured(tmp_path)[1]
    assert list(made["constants"]["k"]) == [2.0]
    bounds = made["delta_bound"]
    assert {mode: set(part["k_greatest"]) for mode, part in bounds.groupby("batchnorm")} == {
        "eval": {9.0},
        "train": {2.0},
    }


def test_runs_of_another_first_mode_are_left_out(tmp_path):
    for seed in (0, 1):
        run(tmp_path, seed=seed)
    folder, _ = run(tmp_path, seed=2, modes=("eval", "train"))
    (group,) = all_groups(tmp_path)
    assert sorted(group.runs["seed"]) == [0, 1]
    assert "batchnorm eval" in group.left_out[f"{folder.name} (points and ω only)"]


def test_c_squared_two_ways_stands_beside_the_published(tmp_path):
    u_shaped(tmp_path, "shb")
    made = [run(tmp_path, seed=seed)[1] for seed in (0, 1)]
    found = measured(tmp_path)[1]["c_squared"]
    solved = float(theory.c_squared_from_b("shb", 0.1, 16, 1.0, 0.9))
    assert list(found["steps"]) == list(STEPS)
    for step in STEPS:
        own = [r for rows in made for r in rows if r["steps"] == step and r["batch_size"] == 64]
        row, mean = row_of(found, steps=step), sum(r["c_squared"] for r in own) / 2
        assert row["c_squared_direct_mean"] == pytest.approx(mean, rel=1e-12)
        assert row["c_squared_direct_se"] == pytest.approx(math.hypot(*(r["c_squared_se"] for r in own)) / 2)
        assert row["c_squared"] == pytest.approx(solved) and row["solved_over_direct"] == pytest.approx(solved / mean)
        assert (row["c_squared_from"], row["published_c_squared"], row["published_k"]) == ("b* = 16", 25.3, 1.77)
        assert row["k"] == max(r["full_gradient_norm"] for rows in made for r in rows)


def test_the_bound_stands_beside_what_is_measured_term_by_term(tmp_path):
    every = {o: [run(tmp_path, o, seed)[1] for seed in (0, 1)] for o in ("sgd", "shb", "nshb")}
    found = measured(tmp_path)[1]["delta_bound"]
    hat = 0.9 * (0.81 - 0.9 + 1) / 0.01
    factor = {"sgd": (1, 0), "shb": (1 + hat, hat), "nshb": (10, 0)}
    for optimizer, made in every.items():
        k = max(r["full_gradient_norm"] for rows in made for r in rows)
        own = [[r for rows in made for r in rows if r["steps"] == s and r["batch_size"] == 64] for s in STEPS]
        c_squared = max(sum(r["c_squared"] for r in at) / 2 for at in own)
        for step, at in zip(STEPS, own, strict=True):
            row, measured_delta = row_of(found, optimizer=optimizer, steps=step), sum(r["delta"] for r in at) / 2
            terms = factor[optimizer][0] * c_squared / 64, factor[optimizer][1] * k**2
            assert (row["c_squared_term"], row["k_term"]) == pytest.approx(terms)
            assert row["delta_bound"] == pytest.approx(0.1 * math.sqrt(sum(terms)))
            assert row["bound_over_measured"] == pytest.approx(row["delta_bound"] / measured_delta)
            assert row["delta_se"] == pytest.approx(math.hypot(*(r["delta_se"] for r in at)) / 2)
            for part in ("fresh", "memory"):
                assert row[f"{part}_mean"] == pytest.approx(sum(r[part] for r in at) / 2)


@pytest.mark.parametrize("optimizer", theory.OPTIMIZERS)
def test_the_terms_of_the_bound_add_up_to_it(optimizer):
    smoothing = theory.degree_of_smoothing(optimizer, 0.1, 64, 30.0, 1.7, 0.9)
    assert smoothing == 0.1 * math.sqrt(sum(theory.terms(optimizer, 64, 30.0, 1.7, 0.9)))
    with pytest.raises(ValueError, match="optimizer is 'mine'"):
        theory.terms("mine", 64, 30.0)


def test_an_optimizer_without_a_formula_has_a_budget_and_the_report_says_so(tmp_path, monkeypatch, capsys):
    run(tmp_path / "runs", "mine")
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    reason = "not drawn: the formula's δ of MINE with the direct C²: no formula is known for this optimizer"
    assert reason in text and reason in capsys.readouterr().out
    labels = found["delta_bound"][0].axes[0].get_legend_handles_labels()[1]
    assert labels == ["MINE, measured"] and len(table(tmp_path / "out", "budget")) == 3


def test_other_draws_never_share_a_curve(tmp_path):
    for seed in (0, 1):
        run(tmp_path, seed=seed)
    folder, rows = run(tmp_path, seed=2, draws=64)
    rows[0]["full_gradient_norm"] = 7.5
    write(folder / "measurements.csv", rows)
    done = command(tmp_path, "--out", tmp_path / "out")
    assert f"left out: {folder.name} (budget only): it has draws 64; most have 32 there" in done.stdout
    assert {row["seeds"] for row in table(tmp_path / "out", "budget")} == {"2"}
    assert {row["seeds"] for row in table(tmp_path / "out", "shape")} == {"2"}
    assert {row["k"] for row in table(tmp_path / "out", "c_squared")} == {"7.5"}


def test_a_run_of_the_same_seed_adds_the_steps_that_it_alone_measured(tmp_path):
    """As of a study in parts: one run goes further, the other drew more."""
    _, short = run(tmp_path, draws=64, name="short")
    _, long = run(tmp_path, steps=(20, 100, 196), last=196, name="long")
    found = measured(tmp_path)[1]["budget"]
    assert list(found["steps"]) == [0, 20, 100, 196]
    assert list(found["draws"]) == [64, 64, 64, 32] and set(found["seeds"]) == {1}
    rows = {row["steps"]: row for row in [*long, *short] if row["batch_size"] == 64}
    assert list(found["fresh_mean"]) == [rows[step]["fresh"] for step in found["steps"]]


def test_usual_draws_against_a_plain_loop():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = [
            {"run": f"{s}-{m}", "seed": s, "steps": t, "draws": m}
            for s in range(3)
            for m in (0, 16, 32, 64)
            for t in (0, 5)
            if rng.random() < 0.5
        ]
        table = pd.DataFrame(rows, columns=["run", "seed", "steps", "draws"])
        found, left_out = measurements.of_usual_draws(table, ["steps"])
        expected = []
        for step in (0, 5):
            there = [row for row in rows if row["steps"] == step and row["draws"]]
            counts = {m: sum(row["draws"] == m for row in there) for m in (16, 32, 64)}
            usual = max(counts, key=lambda m: (counts[m], m))
            expected += [row for row in there if row["draws"] == usual]
        assert sorted(map(str, found.to_dict("records"))) == sorted(map(str, expected))
        drawn = {row["run"] for row in rows if row["draws"]}
        assert {name.split(" ")[0] for name in left_out} >= drawn - {row["run"] for row in expected}


def test_runs_of_other_batch_sizes_have_rows_of_their_own(tmp_path, monkeypatch, capsys):
    """C² at one b drawn is not the same number on another trajectory."""
    for seed in (0, 1):
        run(tmp_path / "runs", seed=seed, b=64)
    _, rows = run(tmp_path / "runs", seed=0, b=16)
    direct = measured(tmp_path / "runs")[1]["direct"]
    row = row_of(direct, run_batch_size=16, batch_size=64, steps=20)
    assert row["seeds"] == 1 and row["c_squared_direct_mean"] == rows[3]["c_squared"]
    assert row_of(direct, run_batch_size=64, batch_size=64, steps=20)["seeds"] == 2
    drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert "not drawn: the noise budget at b = 16: its figures are of b = 64" in capsys.readouterr().out


def test_other_earlier_steps_share_the_rows_they_have(tmp_path):
    run(tmp_path, seed=0)
    run(tmp_path, seed=1, steps=(50, 100))
    (group,), made = all_groups(tmp_path), measured(tmp_path)[1]
    assert len(group.runs) == 2
    assert made["budget"].set_index("steps")["seeds"].to_dict() == {0: 1, 20: 1, 50: 1, 100: 2}


def test_what_did_not_move_in_a_record_without_these_files(tmp_path):
    """An old record has neither file, and is no reason for a line; one that asked for draws is."""
    sampling(tmp_path, "shb", 64, 0, 1.0, gaussian(), norm=1.5)
    rows, shapes, left_out = measurements.read(all_groups(tmp_path)[0].runs)
    assert rows.empty and shapes.empty and left_out == {}
    folder, _ = run(tmp_path, seed=1)
    for name in ("measurements.csv", "shape.csv"):
        (folder / name).unlink()
    left_out = measurements.read(all_groups(tmp_path)[0].runs)[2]
    assert left_out == {
        f"{folder.name} ({n} only)": "no regular file, or missing" for n in ("measurements.csv", "shape.csv")
    }


def test_a_diverged_run_says_nothing(tmp_path):
    run(tmp_path, seed=0, status="diverged")
    assert measured(tmp_path)[1]["budget"].empty


def damage(folder, name, change):
    """Rewrite one file of a record: change is given its rows."""
    with open(folder / name, newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    write(folder / name, rows)


def drop(key):
    return lambda rows: [row.pop(key) for row in rows]


def put(key, value, at=0):
    return lambda rows: rows[at].update({key: value})


DAMAGE = [
    *[("measurements.csv", drop(key), f"no column {key}") for key in ("delta", "c_squared", "steps", "accuracy")],
    *[
        ("measurements.csv", put("fresh", text), "fresh is ")
        for text in ("nan", "", "inf", "1e999", "-1", "x", "\x1b")
    ],
    ("measurements.csv", put("full_gradient_norm", "nan"), "full_gradient_norm is 'nan'"),
    ("measurements.csv", put("c_squared", "inf"), "c_squared is 'inf'"),
    ("measurements.csv", put("staleness", "", at=1), "staleness is ''"),  # of the b of training
    ("measurements.csv", put("batchnorm", "test"), "batchnorm is neither"),
    ("measurements.csv", put("steps", "101"), "not one of 0 to 100"),
    ("measurements.csv", put("steps", "0.5"), "not one of 0 to 100"),
    ("measurements.csv", put("draws", "5"), "draws are not those of the arguments"),
    ("measurements.csv", put("batch_size", "16", at=1), "there twice"),
    ("measurements.csv", put("batch_size", "0"), "whole number"),
    ("shape.csv", drop("layer"), "no column layer"),
    ("shape.csv", drop("effective_rank"), "no column effective_rank"),
    ("shape.csv", put("kurtosis", "nan"), "kurtosis is 'nan'"),
    ("shape.csv", put("steps", "20"), "there twice"),
]


@pytest.mark.parametrize(("name", "change", "why"), DAMAGE)
def test_a_file_that_is_not_sound_is_named_and_left_out(tmp_path, name, change, why):
    folder, _ = run(tmp_path, seed=0)
    run(tmp_path, seed=1)
    damage(folder, name, change)
    rows, shapes, left_out = measurements.read(all_groups(tmp_path)[0].runs)
    assert list(left_out) == [f"{folder.name} ({name} only)"] and why in left_out[f"{folder.name} ({name} only)"]
    assert left_out[f"{folder.name} ({name} only)"].isprintable()
    kept = {"measurements.csv": rows, "shape.csv": shapes}
    assert set(kept.pop(name)["seed"]) == {1} and set(kept.popitem()[1]["seed"]) == {0, 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_text(path.read_text() + "1,2\n"),
        lambda path: path.write_text(path.read_text() + "1" * 200_000 + "\n"),
        lambda path: path.write_text(path.read_text().replace("noise_norm", "delta")),
        lambda path: path.write_text(path.read_text().replace("steps", '"steps', 1)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: os.truncate(path, measurements.LARGEST + 1),
    ],
)
def test_a_file_that_is_no_table_is_named_and_left_out(tmp_path, spoil):
    folder, _ = run(tmp_path)
    spoil(folder / "measurements.csv")
    rows, _, left_out = measurements.read(all_groups(tmp_path)[0].runs)
    assert rows.empty and list(left_out) == [f"{folder.name} (measurements.csv only)"]


@pytest.mark.parametrize("modes", ["test", 7, ["test"], {"a": 1}, [["train"]]])
def test_an_unknown_mode_leaves_the_run_out(tmp_path, modes):
    sampling(tmp_path, "shb", 64, 0, 1.0, gaussian(), measure_batchnorm=modes, name="x")
    runs, left_out = records.read(tmp_path)
    assert runs.empty and "measure_batchnorm is " in next(iter(left_out.values()))


def test_what_need_not_be_known_may_be_missing(tmp_path):
    """C² of a batch of all images, and the test of normality with few draws."""
    folder, _ = run(tmp_path)
    damage(folder, "measurements.csv", lambda rows: [row.update(c_squared="nan", c_squared_se="") for row in rows])
    damage(folder, "shape.csv", lambda rows: [row.update(rejected="nan") for row in rows])
    made = measured(tmp_path)[1]
    assert made["budget"]["c_squared_direct_mean"].isna().all() and made["delta_bound"]["delta_bound"].isna().all()
    assert made["shape"]["rejected_mean"].isna().all() and len(made["shape"]) == 3


# --- the figures ---


def bars(ax, label):
    """{x: (bottom, height)} of the bars of one name."""
    found = {}
    for container in ax.containers:
        if container.get_label() == label:
            found |= {bar.get_x() + bar.get_width() / 2: (bar.get_y(), bar.get_height()) for bar in container}
    return found


def test_the_stack_is_the_budget_and_a_negative_staleness_is_no_bar(tmp_path):
    folder, rows = run(tmp_path, drawn_b=(64,))
    parts = [(3.0, 5.0, 2.0), (3.0, 1.0, 4.0), (3.0, 0.0, 0.0)]  # fresh, memory, frozen
    for row, (fresh, memory, frozen) in zip(rows, parts, strict=True):
        row |= {"fresh": fresh, "memory": memory, "memory_noise_frozen": frozen, "staleness": memory - frozen}
    write(folder / "measurements.csv", rows)
    ax, shares = budget_plots.budget(measured(tmp_path)[1]["budget"]).axes
    assert bars(ax, budget_plots.FRESH["label"]) == {x: (0, 3) for x in range(3)}
    assert bars(ax, budget_plots.FROZEN["label"]) == {0: (3, 2), 2: (3, 0)}
    assert bars(ax, budget_plots.STALE["label"]) == {0: (5, 3), 2: (3, 0)}
    assert bars(ax, budget_plots.LESS["label"]) == {1: (3, 1)}
    assert bars(shares, budget_plots.FROZEN["label"])[0] == (pytest.approx(37.5), pytest.approx(25))
    assert bars(shares, budget_plots.LESS["label"]) == {1: (75, 25)}
    (line,) = [line for line in ax.lines if line.get_label() == budget_plots.LINE["label"]]
    assert list(line.get_ydata()) == [7, 7] and np.mean(line.get_xdata()) == 1
    assert [text.get_text() for text in ax.texts] == [f"{row['noise_square']:.3g}" for row in rows]


def test_injected_noise_tops_the_stack_and_is_a_curve_of_its_own(tmp_path):
    for norm in (0.0, 1.5):
        folder, rows = run(tmp_path, "sgd", drawn_b=(64,), injected_noise=norm)
        parts = {"fresh": 3.0, "memory": 1.0, "memory_noise_frozen": 0.5, "staleness": 0.5, "noise_square": 3.0}
        rows = [row | parts | {"injected": norm**2, "delta_renamed": 0.25} for row in rows]
        write(folder / "measurements.csv", rows)
    budget = measured(tmp_path)[1]["budget"]
    assert list(budget["optimizer"].unique()) == ["sgd", "sgd + noise 1.5"]
    assert set(budget["injected_mean"]) == {0, 2.25} and set(budget["delta_renamed_mean"]) == {0.25}
    plain, noisy, plain_shares, shares = budget_plots.budget(budget).axes
    assert bars(plain, budget_plots.INJECTED["label"]) == bars(plain_shares, budget_plots.INJECTED["label"]) == {}
    assert bars(noisy, budget_plots.INJECTED["label"]) == {x: (4, 2.25) for x in range(3)}
    assert bars(shares, budget_plots.INJECTED["label"])[0] == (pytest.approx(64), pytest.approx(36))
    assert [text.xy[1] for text in noisy.texts] == [6.25] * 3


def test_records_from_before_there_was_injected_noise_had_none(tmp_path):
    run(tmp_path)
    budget = measured(tmp_path)[1]["budget"]
    assert set(budget["injected_mean"]) == {0} and budget["delta_renamed_mean"].isna().all()


def test_there_is_a_panel_for_each_optimizer_and_mode(tmp_path):
    for optimizer in ("sgd", "shb"):
        run(tmp_path, optimizer, modes=("train", "eval"))
    made = measured(tmp_path)[1]
    titles = [f"{o}, b = 64, BatchNorm {mode}" for mode in ("train", "eval") for o in ("SGD", "SHB")]
    for figure in (budget_plots.c_squared(made["direct"]), budget_plots.delta_bound(made["delta_bound"])):
        assert [ax.get_title() for ax in figure.axes] == titles
    stacks = budget_plots.budget(made["budget"]).axes  # a second line of shares for each mode
    assert [ax.get_title() for ax in stacks] == titles[:2] * 2 + titles[2:] * 2
    assert len(budget_plots.shape(made["shape"]).axes) == 2 * 3


def test_c_squared_against_b_has_a_curve_per_step_and_95_percent_intervals(tmp_path):
    run(tmp_path, drawn_b=(16, 64, 256))
    direct = measured(tmp_path)[1]["direct"]
    (ax,) = budget_plots.c_squared(direct).axes
    assert ax.get_legend_handles_labels()[1] == ["step 0", "step 20", "step 100"]
    for container, step in zip(ax.containers, STEPS, strict=True):
        part = direct[direct["steps"] == step]
        line, _, (error,) = container.lines
        np.testing.assert_array_equal(line.get_xdata(), [16, 64, 256])
        np.testing.assert_array_equal(line.get_ydata(), part["c_squared_direct_mean"])
        half = [(top - low) / 2 for (_, low), (_, top) in error.get_segments()]
        np.testing.assert_allclose(half, 1.96 * part["c_squared_direct_se"])


def test_one_b_drawn_is_no_curve(tmp_path, monkeypatch):
    run(tmp_path / "runs", drawn_b=(64,))
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert "c_squared" not in found and "not drawn: c_squared: fewer than two b" in text


def test_measured_delta_stands_beside_a_bound_that_is_marked_as_one(tmp_path):
    run(tmp_path)
    bounds = measured(tmp_path)[1]["delta_bound"]
    (ax,) = budget_plots.delta_bound(bounds).axes
    line = ax.containers[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), bounds["delta_mean"])
    arrows = [x for x in ax.lines if x.get_marker() == r"$\downarrow$" and len(x.get_xdata())]
    np.testing.assert_array_equal(arrows[0].get_ydata(), bounds["delta_bound"])
    assert "the formula's δ, an upper bound" in ax.get_legend_handles_labels()[1]


def test_shape_has_its_levels_and_no_panel_for_a_test_that_was_not_made(tmp_path, monkeypatch, capsys):
    folder, _ = run(tmp_path / "runs")
    shape = measured(tmp_path / "runs")[1]["shape"]
    rejected, kurtosis, rank = budget_plots.shape(shape).axes
    curve, level = rejected.lines
    np.testing.assert_allclose(curve.get_ydata(), 100 * shape["rejected_mean"])
    assert list(level.get_ydata()) == [5, 5] and list(kurtosis.lines[1].get_ydata()) == [0, 0]
    np.testing.assert_array_equal(rank.lines[0].get_ydata(), shape["effective_rank_mean"])
    damage(folder, "shape.csv", lambda rows: [row.update(rejected="nan") for row in rows])
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert len(found["shape"][0].axes) == 2
    reason = "not drawn: the share of coordinates rejected: fewer than 20 draws"
    assert reason in text and reason in capsys.readouterr().out


def test_without_draws_the_report_says_what_is_not_there(tmp_path, monkeypatch):
    sampling(tmp_path / "runs", "shb", 64, 0, 1.0, gaussian(), norm=1.5)
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert not {"budget", "c_squared", "delta_bound", "shape"} & found.keys()
    for name in ("budget", "delta_bound"):
        assert f"not drawn: {name}: no sampling run with --draws" in text
    assert "not drawn: shape: no sampling run with --shape" in text


def test_the_command_writes_them_and_every_dash_has_its_reason(tmp_path):
    for optimizer in ("sgd", "mine"):
        folder, _ = run(tmp_path / "runs", optimizer)
    damage(folder, "measurements.csv", lambda rows: [row.update(c_squared="nan") for row in rows])
    spoilt, _ = run(tmp_path / "runs", "sgd", 1)
    (spoilt / "shape.csv").write_text("x")
    done = command(tmp_path / "runs", "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    assert f"left out: {spoilt.name} (shape.csv only): empty, or its last line is cut" in done.stdout
    for name in ("budget", "c_squared", "delta_bound", "shape"):
        image = plt.imread(tmp_path / "out" / f"{SLUG}_{name}.png")
        assert image[..., :3].std() > 0.05
    text = (tmp_path / "out" / "report.md").read_text()
    assert ": not known." not in text and "– in c squared direct" in text


def test_k_takes_the_measured_points_beside_those_of_the_results(tmp_path):
    """What the results of a run say counts too: its measurements.csv may be lost."""
    folder, _ = run(tmp_path, norm=5.0)
    (folder / "measurements.csv").write_text("")
    group, made = measured(tmp_path)
    assert tables.largest_full_gradient(group.runs, made["measurements"])["k"] == 5.0
    assert pd.isna(made["budget"]).size == 0
