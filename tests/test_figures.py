"""figures.py: what its figures and its page show, the command line, and that results/ is what results/runs give."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE
from matplotlib.colors import to_hex
from recorded import measurement, record, smoothing

import figures
from report import critical, page, plots, records
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
COLORS = {"SGD": "#0072b2", "SHB": "#d55e00", "NSHB": "#009e73"}
SLUG = "mnist1d_MLP_lr0.1_beta0.9"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, runs_dir):
    """The study's tables, its figures by name, the directory that figures.py wrote."""
    out = tmp_path_factory.mktemp("out")
    kept, draw = [], page.figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critical, "FEWEST_UPDATES", 10)
        patch.setattr(page, "figures", lambda made: kept.append((made, list(draw(made)))) or kept[0][1])
        assert figures.main([str(runs_dir), "--out", str(out)]) == 0
    ((made, found),) = kept
    return made, dict(found), out


def tables_of(runs):
    ((_, _, members),) = page.sections(records.runs(runs))
    return page.tables(members)


def line(ax, label):
    """(x, y) of the curve with this name in the legend."""
    (handle,) = [h for h, name in zip(*ax.get_legend_handles_labels(), strict=True) if name == label]
    handle = handle[0] if isinstance(handle, tuple) else handle
    return handle.get_xdata().tolist(), handle.get_ydata().tolist()


def marks(ax, color, **look):
    """(x, y) of the single lines of this colour and look, without those that are named in the legend."""
    found = []
    for each in ax.lines:
        alike = to_hex(each.get_color()) == color and each.get_label().startswith("_")
        if alike and all(getattr(each, f"get_{key}")() == value for key, value in look.items()):
            found += list(zip(each.get_xdata(), each.get_ydata(), strict=True))
    return found


def names(figure):
    """The entries of all legends of a figure."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_seven_figures_each_a_question_with_three_names_at_most_and_no_prose(drawn):
    _, found, out = drawn
    assert set(found) == {"training", "accuracy", "steps", "delta", "omega", "c_squared", "smoothing"}
    assert len({figure.get_suptitle() for figure in found.values()}) == 7
    for name, figure in found.items():
        assert figure.get_suptitle().endswith("?") and 1 <= len(names(figure)) <= 3
        inside = [text.get_text() for ax in figure.axes for text in ax.texts]
        assert all(len(text.split()) <= 2 for text in inside), inside
        for ax in figure.axes:
            assert ax.get_xlabel() and len(ax.get_title().split()) <= 3
        image = matplotlib.image.imread(out / f"{SLUG}_{name}.png")
        assert min(image.shape[:2]) >= 400 and image[..., :3].std() > 0.05


def test_training_curves(drawn):
    made, found, _ = drawn
    axes = found["training"].axes
    assert [ax.get_ylabel() for ax in axes] == ["training loss (nats)", "accuracy (%)", "‖g‖"]
    assert set(made["training"]["b"]) == {200}  # of four that all curves have
    for label in COLORS:
        rows = made["training"].query("label == @label")
        for ax, name in zip(axes, ("training_loss", "accuracy", "g-norm"), strict=True):
            assert line(ax, label) == ([1, 2, 3, 4], rows[f"{name}_mean"].tolist())
            assert f"b = {200}" in ax.get_xlabel()


def test_the_loss_of_a_long_run_is_drawn_at_whole_epochs(tmp_path):
    metrics = [{"steps": 20 * i, "training_loss": 5 - i / 10 + i % 2, "g-norm": 1.0} for i in range(1, 21)]
    record(tmp_path, "--optimizer=sgd --batchsize=100", 400, metrics=metrics)
    (loss, _, norm) = dict(page.figures(tables_of(tmp_path)))["training"].axes
    assert line(loss, "SGD")[0] == list(range(1, 11)) and len(line(norm, "SGD")[0]) == 20


def test_accuracy_over_b_names_its_event(drawn):
    made, found, _ = drawn
    (ax,) = found["accuracy"].axes
    assert ax.get_ylabel() == "test accuracy (%) at epoch 4" and ax.get_xscale() == "log"
    for i, (label, color) in enumerate(COLORS.items()):
        rows = made["accuracy"].query("label == @label")
        assert line(ax, label) == ([50, 100, 200, 400], rows["accuracy_mean"].tolist())
        band = ax.collections[i].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == (rows["accuracy_min"].min(), rows["accuracy_max"].max())
        assert to_hex(ax.collections[i].get_facecolor()[0][:3]) == color
    assert len({each.get_marker() for each in ax.lines if not each.get_label().startswith("_")}) == 3


def test_the_recalibrated_accuracy_stands_beside_the_papers_own(tmp_path):
    """From metrics.csv where it has it, else from measurements.csv at the same step."""
    for b, own in ((100, None), (200, 70.0), (400, None)):
        steps = 4000 // b
        flags = f"--model=ConvNet1d --optimizer=sgd --batchsize={b} --measure_every=1 --draws=8"
        metrics = [{"steps": steps, "accuracy": 40, "accuracy_recalibrated": own}]
        measured = [measurement("sgd", b, steps, 1.0) | ({"accuracy_recalibrated": 60.0} if b < 400 else {})]
        record(tmp_path / "runs", flags, steps, metrics=metrics, measured=measured)
    (ax,) = dict(page.figures(tables_of(tmp_path / "runs")))["accuracy"].axes
    assert line(ax, "SGD") == ([100, 200, 400], [40, 40, 40])
    assert marks(ax, COLORS["SGD"], linestyle="--") == [(100, 60), (200, 70)]
    assert "recalibrated" in [text.get_text() for text in ax.texts]
    figures.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "page.md").read_text()
    assert "| SGD | 200 | 20 | 1 | 0 | 40 | 70 | – |" in text and "| SGD | 400 | 10 | 1 | 0 | 40 | – | – |" in text


@pytest.mark.parametrize(("model", "epoch", "said"), [("ConvNet1d", 1, 2), ("ConvNet1d", 5, 0), ("MLP", 1, 0)])
def test_an_accuracy_that_batchnorm_spoils_says_so(model, epoch, said, tmp_path):
    for b in (100, 200):
        metrics = [{"steps": 4000 // b * i, "accuracy": 40, "g-norm": 1.0} for i in (epoch, epoch + 1)]
        record(tmp_path, f"--model={model} --optimizer=sgd --batchsize={b}", 4000 // b * (epoch + 1), metrics=metrics)
    found = dict(page.figures(tables_of(tmp_path)))
    labels = [ax.get_xlabel() for name in ("training", "accuracy") for ax in found[name].axes]
    assert sum("low before update 100: BatchNorm lags" in text for text in labels) == said


def test_a_diverged_seed_is_crossed_out(tmp_path):
    for b in (100, 200):
        record(tmp_path, f"--optimizer=sgd --batchsize={b}", 40, metrics=[{"steps": 4000 // b, "accuracy": 40}])
    record(tmp_path, "--optimizer=sgd --batchsize=400", 3, status="diverged")
    (ax,) = dict(page.figures(tables_of(tmp_path)))["accuracy"].axes
    assert line(ax, "SGD") == ([100, 200], [40, 40])
    assert [x for x, _ in marks(ax, COLORS["SGD"], marker="x")] == [400]


def test_sfo_over_b_with_b_star_and_lower_bounds(drawn):
    made, found, _ = drawn
    axes = found["steps"].axes
    assert [ax.get_title() for ax in axes] == ["ε = 1.2", "ε = 1"]
    for i, ax in enumerate(axes):
        eps = (1.2, 1.0)[i]  # noqa: F841 (the queries use it)
        for label, color in COLORS.items():
            rows = made["steps"].query("label == @label and eps == @eps")
            whole, missed = rows[rows["missed"] == 0], rows[rows["missed"] > 0]
            assert line(ax, label) == (whole["b"].tolist(), whole["sfo_mean"].tolist())
            bounds = marks(ax, color, marker=r"$\uparrow$")
            assert bounds == list(zip(missed["b"], missed["sfo_mean"], strict=True))
        stars = made["critical_batch_size"].query("eps == @eps")
        rings = marks(ax, "#000000", marker="o")
        assert rings == list(zip(stars["b_star"], stars["sfo"], strict=True)) and len(rings) == 3
    assert any(made["steps"]["missed"] > 0)


def test_upper_bounds_the_interval_of_b_star_and_none_that_is_no_result(drawn):
    made, _, _ = drawn
    steps, stars = made["steps"].query("label == 'SGD' and eps == 1.2"), made["critical_batch_size"]
    stars = stars.query("label == 'SGD' and eps == 1.2").assign(b_star_fit_low=70.0, b_star_fit_high=130.0)
    steps = steps.assign(at_first_check=[0, 0, 0, 1])
    (ax,) = plots.sfo(steps, stars).axes
    assert marks(ax, COLORS["SGD"], marker=r"$\downarrow$") == [(400, steps["sfo_mean"].iloc[-1])]
    assert line(ax, "SGD")[0] == steps["b"].tolist()[:3] and len(marks(ax, "#000000", marker="o")) == 1
    bar = [[70, stars["sfo"].item()], [130, stars["sfo"].item()]]
    assert bar in [segment.tolist() for each in ax.collections[1:] for segment in each.get_segments()]
    assert not marks(plots.sfo(steps, stars.assign(note="after the fit")).axes[0], "#000000", marker="o")


def test_delta_over_b_measured_and_by_the_formula(drawn):
    made, found, _ = drawn
    (ax,) = found["delta"].axes
    assert ax.get_ylabel() == "δ at epoch 3"
    for label, color in COLORS.items():
        rows = made["delta"].query("label == @label and epoch == 3.5")
        assert line(ax, label) == ([50, 100, 200, 400], rows["delta_mean"].tolist())
        formula = marks(ax, color, linestyle="--")
        assert formula == list(zip(rows["b"], rows["delta_formula"], strict=True))
        ends = [s for c in ax.collections for s in c.get_segments() if to_hex(c.get_color()[0]) == color]
        assert [seg[0][1] for seg in ends] == pytest.approx(rows["delta_low"].tolist())
        assert [seg[1][1] for seg in ends] == pytest.approx(rows["delta_high"].tolist())


def test_delta_is_not_compared_at_the_end_of_an_epoch(tmp_path):
    """Measured at 1.5 epochs and at the end of the second, where momentum holds a whole epoch's batches."""
    for b in (100, 200):
        steps = 4000 // b * 3 // 2, 4000 // b * 2
        rows = [measurement("sgd", b, step, 1.0 + i) for i, step in enumerate(steps)]
        record(tmp_path, f"--optimizer=sgd --batchsize={b} --measure_every=1 --draws=8", steps[1], measured=rows)
    (ax,) = dict(page.figures(tables_of(tmp_path)))["delta"].axes
    assert ax.get_ylabel() == "δ at epoch 1"


def test_what_omega_is_made_of(drawn):
    made, found, _ = drawn
    for ax, label in zip(found["omega"].axes, COLORS, strict=True):
        rows = made["omega"].query("label == @label and b == 200")
        assert ax.get_title() == label and [t.get_text() for t in ax.get_xticklabels()] == ["10", "30", "50", "70"]
        heights = [bar.get_height() for bar in ax.patches]
        assert heights == pytest.approx([*rows["fresh_mean"], *rows["memory_mean"]])
        assert [bar.get_y() for bar in ax.patches[4:]] == rows["fresh_mean"].tolist()  # stacked
        (lines,) = ax.collections
        assert [seg[0][1] for seg in lines.get_segments()] == rows["noise_square_mean"].tolist()
    assert names(found["omega"]) == ["this mini-batch", "momentum"]


def test_the_memory_is_split_where_that_was_measured(tmp_path):
    split = {"memory_noise": 1.5, "memory_drift": 0.7, "memory_cross": -0.2}
    rows = [measurement("shb", 100, 20, 1.0) | split]
    flags = "--mode=sampling --optimizer=shb --batchsize=100 --steps 20 --draws 8 --exact_memory 10"
    record(tmp_path, flags, 20, measured=rows)
    figure = dict(page.figures(tables_of(tmp_path)))["omega"]
    assert names(figure) == ["this mini-batch", "noise of earlier mini-batches", "change of ∇f"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([rows[0]["fresh"], 1.5, 0.7])


def test_c_squared_over_b_over_training_and_from_b_star(drawn):
    made, found, _ = drawn
    left, right = found["c_squared"].axes
    assert "at step 70" in left.get_xlabel() and "b = 200" in right.get_xlabel()
    for label, color in COLORS.items():
        rows = made["c_squared"].query("label == @label and b == 200")
        last, own = rows[rows["steps"] == 70], rows[rows["batch_size"] == 200]
        assert line(left, label) == ([25, 200, 800], last["c_squared_mean"].tolist())
        assert list(zip(*marks(right, color), strict=True))[1][:4] == tuple(own["c_squared_mean"])
        (star,) = made["critical_batch_size"].query("label == @label and eps == 1").to_dict("records")
        assert marks(left, color, marker="D") == [(star["b_star"], star["c_squared_from_b_star"])]


def test_which_noise_smooths_and_an_interval_that_reaches_zero_is_an_upper_limit(drawn):
    made, found, _ = drawn
    (ax,) = found["smoothing"].axes
    table = made["smoothing"].set_index("label")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(COLORS) and ax.get_yscale() == "log"
    assert table.loc["NSHB", "excess_real_low"] < 0 < table.loc["SHB", "excess_real_low"]
    assert line(ax, "mini-batch noise")[1] == table.loc[["SGD", "SHB"], "excess_real_mean"].tolist()
    ((_, high),) = marks(ax, COLORS["SGD"], marker=r"$\downarrow$")
    assert high == table.loc["NSHB", "excess_real_high"]
    assert line(ax, "Gaussian, same covariance")[1] == table["excess_gaussian_mean"].tolist()
    assert line(ax, "Gaussian, isotropic, same length")[1] == table["excess_isotropic_mean"].tolist()
    dashes = [seg[0][1] for c in ax.collections for seg in c.get_segments() if len(c.get_segments()) == 3]
    for name in ("excess_predicted_mean", "excess_predicted_isotropic_mean"):
        assert set(table[name]) <= set(dashes)


def test_more_than_three_curves_are_named_at_their_ends(tmp_path):
    for optimizer in ("sgd", "shb", "nshb", "qhm", "qhm --nu=0.7"):
        for b in (100, 200):
            metrics = [{"steps": 4000 // b, "accuracy": 40 + b}]
            record(tmp_path, f"--batchsize={b} --optimizer={optimizer}", 40, metrics=metrics)
    (ax,) = dict(page.figures(tables_of(tmp_path)))["accuracy"].axes
    assert ax.get_legend() is None
    assert {text.get_text() for text in ax.texts} == {"SGD", "SHB", "NSHB", "QHM", "QHM nu 0.7"}
    shifts = sorted(text.xyann[1] for text in ax.texts)
    assert np.diff(shifts).tolist() == pytest.approx([9] * 4)  # though all curves end at one point
    looks = {(each.get_color(), each.get_marker(), each.get_linestyle()) for each in ax.lines if len(each.get_xdata())}
    assert len(looks) == 5


def test_tables_of_the_page_are_small_and_their_csvs_whole(drawn):
    made, _, out = drawn
    text = (out / "page.md").read_text()
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    for table in tables:
        head, rule, *rows = table.splitlines()
        assert 1 <= len(rows) <= 8 and head.count("|") <= 9
        assert {row.count("|") for row in (head, rule, *rows)} == {head.count("|")}
    for name, table in made.items():
        if name != "training" and len(table):
            kept = pd.read_csv(out / f"{SLUG}_{name}.csv")
            assert f"({SLUG}_{name}.csv), rows: {len(table)}\n" in text
            table = table.reset_index(drop=True)[list(kept)].replace("", np.nan)
            pd.testing.assert_frame_equal(kept, table, check_dtype=False, rtol=1e-15)
    assert len(tables) == sum(len(table) > 0 for table in made.values()) - 1
    assert re.search(r"\| SGD \| 400 \| 35 \| 64 \| 0\.0\d+ ± 0\.00\d+ \|", text)  # δ, with its interval
    assert "E‖ω‖²: mean squared search direction noise over the draws" in text


def test_both_batchnorm_modes_are_in_the_csv_and_training_mode_in_the_figures(tmp_path):
    rows = [measurement("sgd", 100, 20, u) | smoothing("sgd", u) for u in (1.0, 2.0)]
    rows[1]["batchnorm"] = "eval"
    flags = "--mode=sampling --optimizer=sgd --batchsize=100 --steps 20 --measure smoothing"
    record(tmp_path, f"{flags} --measure_batchnorm train eval", 20, measured=rows)
    made = tables_of(tmp_path)
    assert made["omega"]["batchnorm"].tolist() == ["eval", "train"]
    found = dict(page.figures(made))
    assert [bar.get_height() for bar in found["omega"].axes[0].patches] == [rows[0]["fresh"], 0.0]
    assert line(found["smoothing"].axes[0], "mini-batch noise")[1] == [rows[0]["excess_real"]]


# --- the command line -------------------------------------------------------------------------------------------


def test_pdf_and_min_epochs(tmp_path):
    for b in (100, 200, 400):
        norms = [9.0, *[0.1] * 400]
        record(tmp_path / "runs", f"--mode=critical --optimizer=sgd --batchsize={b}", 401, norms=norms)
    figures.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--min-epochs=0", "--format=pdf"])
    (name,) = [path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".csv", ".md")]
    assert name == f"{SLUG[:17]}_steps.pdf" and (tmp_path / "out" / name).read_bytes().startswith(b"%PDF")
    rows = pd.read_csv(tmp_path / "out" / f"{SLUG[:17]}_steps.csv")
    assert (rows[["min_epochs", "steps_mean"]] == [0, 23]).all(axis=None)  # 9 + 22 · 0.1 ≤ 23 · 0.5
    figures.main([str(tmp_path / "runs"), "--out", str(tmp_path / "again")])
    assert set(pd.read_csv(tmp_path / "again" / f"{SLUG[:17]}_steps.csv")["min_epochs"]) == {11}


def test_errors_are_one_line_with_status_2_and_nothing_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    record(tmp_path / "good", "--optimizer=sgd", 9)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for words, part in (
        ((tmp_path / "none",), "none"),
        ((tmp_path / "empty",), "empty"),
        ((tmp_path / "good", "--out", tmp_path / "file"), "--out"),
        ((tmp_path / "good", "--eps", "1"), "--eps"),
        (("--output=x",), "arguments: --output=x; did you mean --out?"),
        ((tmp_path / "good", "--format", "svg"), "allowed are png, pdf"),
        ((tmp_path / "good", "--min_epochs", "-1"), "whole number of at least 0"),
    ):
        with pytest.raises(UserError, match=re.escape(part)):
            figures.main([*map(str, words), *(["--out", str(tmp_path / "o")] if "--out" not in words else [])])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_process_needs_no_display_no_known_backend_and_no_unicode(tmp_path):
    record(tmp_path / "runs", "--optimizer=sgd", 500, metrics=[{"steps": 250 * i, "g-norm": 1.0} for i in (1, 2)])
    env = os.environ | {
        "MPLBACKEND": "module://nowhere",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
    }
    env.pop("DISPLAY", None)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: a font that is missing\n")
    command = [sys.executable, "-W", "error::FutureWarning", ROOT / "figures.py"]
    options = {"capture_output": True, "text": True, "env": env, "timeout": PATIENCE, "cwd": tmp_path}
    done = subprocess.run([*command, "runs", "--out", "out"], **options)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "written: out/page.md\n"
    assert (tmp_path / "out" / "mnist1d_MLP_lr0.1_training.png").is_file()
    done = subprocess.run([*command, "nowhere"], **options)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: argument RUNS_DIR: got 'nowhere', allowed is a directory .*\n", done.stderr)


def test_results_are_what_their_records_give(tmp_path):
    """Tables to 1e-9, the page to the letter, the same figures; no file beside them is left from another study."""
    figures.main([str(ROOT / "results" / "runs"), "--out", str(tmp_path)])
    made = {path.name for path in tmp_path.iterdir()}
    files = [path for path in (ROOT / "results").iterdir() if path.is_file()]
    there = {path.name for path in files if path.name.startswith("CIFAR100") or path.suffix == ".png"}
    assert there | {"page.md"} == made
    assert (tmp_path / "page.md").read_text() == (ROOT / "results" / "page.md").read_text()
    for path in tmp_path.glob("*.csv"):
        ours, theirs = pd.read_csv(path), pd.read_csv(ROOT / "results" / path.name)
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9, atol=0)
    for path in tmp_path.glob("*.png"):
        images = [matplotlib.image.imread(folder / path.name)[..., :3] for folder in (tmp_path, ROOT / "results")]
        assert np.abs(np.subtract(*images)).mean() < 0.04, path.name  # other versions have other fonts
