"""report/page.py: what the report says of tables, of what is missing and why."""

import pandas as pd
import pytest
from report_helpers import (
    command,
    critical,
    drawn,
    gaussian,
    measured,
    normal,
    sampling,
    table,
    u_shaped,
)

from files import replacing
from report import page


def test_without_a_full_gradient_what_needs_k_is_not_drawn_and_the_report_says_why(tmp_path, monkeypatch, capsys):
    for optimizer in ("sgd", "shb"):
        u_shaped(tmp_path / "runs", optimizer, k=3.0)
    _, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    out = capsys.readouterr().out
    points = table(tmp_path / "out", "points")
    assert {p["optimizer"]: p["delta_formula"] != "" for p in points} == {"sgd": True, "shb": False}
    reason = "not drawn: the formula's δ of SHB: it needs K: no run that did not diverge measured a full gradient"
    assert reason in out and reason in text
    assert "K of" not in out and "formula's δ of SGD" not in out


@pytest.mark.parametrize(
    ("optimizer", "beta", "b_star", "why"),
    [
        ("mine", 0.9, True, "no formula is known for this optimizer"),
        ("shb", 0.0, True, "SHB's bound is singular at β = 0"),
        ("shb", 0.9, False, "no ε has a b*"),
    ],
)
def test_a_formula_that_is_not_drawn_has_its_reason(tmp_path, monkeypatch, capsys, optimizer, beta, b_star, why):
    if b_star:
        u_shaped(tmp_path / "runs", optimizer, beta1=beta)
    for b in (8, 16):
        sampling(tmp_path / "runs", optimizer, b, 0, 1.0 / b, gaussian(), norm=b, steps=400, beta1=beta)
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    name = optimizer.upper()
    reason = f"not drawn: the formula's δ of {name}: no C²: {why}"
    assert f"- {reason}\n" in text and reason in capsys.readouterr().out
    labels = found["delta"][0].axes[0].get_legend_handles_labels()[1]
    assert labels[0] == f"{name}, measured" and not any("formula" in label for label in labels)
    assert f"K of {name}: 16, ‖∇f‖ at step 400 of sampling-{optimizer}-b16-seed0-beta1{beta}" in text
    assert all("(gradient history only)" in line for line in text.splitlines() if "left out" in line)


def test_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write(b"half")
        file.write(None)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_markdown_drops_empty_columns_and_folds_bands():
    rows = [{"a": 1, "b": None, "c_mean": 2.0, "c_min": 1.0, "c_max": 3.5}]
    rows += [{"a": 1, "b": "", "c_mean": None, "c_min": None, "c_max": None}]
    for frame in (pd.DataFrame(rows), pd.DataFrame(rows, dtype=object)):
        assert page.markdown(frame).splitlines() == [
            *("| a | c |", "| --- | --- |", "| 1 | 2 [1, 3.5] |", "| 1 | – |"),
            *("", "– in c: not known."),
        ]


def test_numbers_in_markdown_have_four_digits_and_a_mean_alone_is_no_band():
    frame = pd.DataFrame({"x_mean": [0.00123456, 123456.7], "max_minibatch_norm": pd.array([None, 10**7], "Int64")})
    assert page.markdown(frame).splitlines()[:4] == [
        *("| x mean | largest mini-batch gradient norm |", "| --- | --- |"),
        *("| 0.001235 | – |", "| 123457 | 10000000 |"),
    ]


def test_tables_without_a_single_b_star_are_not_written(tmp_path, monkeypatch, capsys):
    critical(tmp_path / "runs", "sgd", 8, 0, {"1.0": 9}, steps=9, min_epochs=0)
    critical(tmp_path / "runs", "sgd", 16, 0, {"1.0": None}, steps=9, status="not_reached", min_epochs=0)
    _, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    assert list((tmp_path / "out").glob("*_steps.csv")) and not list(
        (tmp_path / "out").glob("*critical_batch_size.csv")
    )
    assert "### critical batch size" not in text
    reason = "no table: critical_batch_size: fewer than two b all of whose seeds reached ε"
    assert reason in text and reason in capsys.readouterr().out


def test_every_table_and_figure_has_what_it_is_made_of(tmp_path):
    u_shaped(tmp_path)
    made = measured(tmp_path)[1]
    assert set(page.TABLES) | set(page.FILES) <= made.keys()
    assert {name for _, needed, _ in page.FIGURES.values() for name in needed} <= made.keys()


def test_every_dash_has_its_reason_and_an_empty_section_says_none(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    u_shaped(runs)
    critical(runs, "sgd", 8, 0, {"1.0": None}, steps=9, status="not_reached")
    critical(runs, "sgd", 16, 0, {"1.0": None}, steps=9, status="diverged", k=None)
    normal(runs, "shb", 64, 0, 50.0)
    for b in (8, 16):
        sampling(runs, "shb", b, 0, 1.0, gaussian())
    assert command(runs, "--out", out).returncode == 0
    text, dashes = (out / "report.md").read_text(), 0
    for section in text.split("\n### ")[1:]:
        lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
        for line in lines[2:]:
            for head, cell in zip(lines[0], line, strict=True):
                notes = [note for note in section.splitlines() if note.startswith("– in ")]
                dashes += cell == "–"
                assert cell != "–" or any(
                    head in note.partition(":")[0].removeprefix("– in ").split(", ") for note in notes
                )
    assert dashes > 10 and ": not known." not in text
    assert text.endswith("## what could not be read\n\n- none\n")
