"""report/records.py: what of a record is believed, what is left out and named, and ε asked for afterwards."""

import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from report_helpers import SLUG, command, critical, edit, histories, measured, normal, read, record, sampling, table

from report import details, records


def test_load_gives_one_row_a_run_and_names_what_it_leaves_out(tmp_path, capsys):
    normal(tmp_path / "deep" / "down", "sgd", 8, 0, 50.0)
    critical(tmp_path, "shb", 16, 1, {"1.0": 9, "0.5": None}, steps=20, min_epochs=0)
    sampling(tmp_path, "nshb", 32, 2, 0.5, np.zeros(3))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_text("{")
    runs = records.load(tmp_path)
    assert capsys.readouterr().out.startswith("left out: bad: Expecting property name")
    assert isinstance(runs, pd.DataFrame) and len(runs) == 3
    runs = runs.set_index("name")
    shb, sgd = runs.loc["critical-shb-b16-seed1-min_epochs0"], runs.loc["deep/down/normal-sgd-b8-seed0"]
    assert (shb["optimizer"], shb["lr"], shb["beta"], shb["batch_size"], shb["steps"]) == ("shb", 0.1, 0.9, 16, 20)
    assert shb["to_eps"] == {1.0: 9, 0.5: None} and shb["args"]["min_epochs"] == 0
    assert sgd["accuracy"] == 50.0 and np.isnan(sgd["beta"]) and np.isnan(shb["accuracy"])
    assert runs["delta"].dropna().to_dict() == {"sampling-nshb-b32-seed2": 0.5}
    assert (runs["curve"] == runs["optimizer"]).all()


def test_nothing_to_load_is_an_empty_frame(tmp_path):
    assert records.load(tmp_path).empty


def test_a_summary_of_more_than_a_mebibyte_is_not_read(tmp_path):
    folder = normal(tmp_path, "sgd", 8, 0, 50.0)
    with open(folder / "summary.json", "a") as file:
        file.write(" " * (1 << 20))
    assert read(tmp_path) == ([], {folder.name: "summary.json is larger than 1 MiB"})


def test_lr_is_what_a_user_meant(tmp_path):
    normal(tmp_path, "shb", 8, 0, 50.0, lr=0.1 * (1 - 0.9))
    normal(tmp_path, "nshb", 8, 0, 50.0, lr=0.01)
    group, _ = measured(tmp_path)
    assert group.slug == "CIFAR100_ResNet18_lr0.01_beta0.9" and len(group.runs) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("lr", 0), ("lr", True), ("lr", "0.1"), ("lr", 10**400), ("beta1", 1), ("batchsize", 0)],
        *[("batchsize", None), ("seed", math.nan), ("seed", math.inf), ("model", "../../x")],
        *[("dataset", ["CIFAR10"]), ("optimizer", "a/b"), ("optimizer", None), ("optimizer", ""), ("dataset", "a b")],
        *[("batchsize", 8.5), ("batchsize", 10**30), ("seed", 2**63), ("model", "x" * 101), ("model", ".hidden")],
    ],
)
def test_an_argument_of_the_wrong_kind_leaves_the_run_out(tmp_path, key, value):
    folder = normal(tmp_path, "sgd", 8, 0, 50.0)
    edit(folder, "args", **{key: value})
    runs, left_out = read(tmp_path)
    assert runs == [] and f"{key} is " in left_out[folder.name]


@pytest.mark.parametrize("optimizer", ["shb", "nshb"])
def test_what_has_momentum_needs_its_factor(tmp_path, optimizer):
    folder = normal(tmp_path, optimizer, 8, 0, 50.0, beta1=None)
    runs, left_out = read(tmp_path)
    assert runs == [] and "beta1 is None" in left_out[folder.name]


@pytest.mark.parametrize(
    "to_eps", [{}, [], None, {"x": 3}, {"0.5": "3"}, {"-1": 3}, {"0.5": 0}, {"0.5": 101}, {"nan": 3}, {"0.5": [1]}]
)
def test_steps_to_eps_of_the_wrong_kind_leave_the_run_out(tmp_path, to_eps):
    folder = critical(tmp_path, "shb", 8, 0, to_eps, steps=100)
    runs, left_out = read(tmp_path)
    assert runs == [] and folder.name in left_out


@pytest.mark.parametrize("value", [None, "1.77", -1.0, math.inf, True])
def test_a_full_gradient_norm_of_the_wrong_kind_leaves_the_run_out(tmp_path, value):
    folder = sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3), norm=value)
    runs, left_out = read(tmp_path)
    assert runs == [] and "full_gradient_norm is " in left_out[folder.name]


@pytest.mark.parametrize("value", [None, 4000.5, "4000", -1])
def test_omegas_entries_are_counted(tmp_path, value):
    folder = sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3))
    edit(folder, "results", omega_entries=value)
    runs, left_out = read(tmp_path)
    assert runs == [] and "omega_entries is " in left_out[folder.name]


def test_extra_keys_are_ignored_and_extra_numbers_are_columns(tmp_path):
    folder = critical(tmp_path, "sgd", 8, 0, {"1.0": 9}, steps=9, nu=0.5, injected_noise=None)
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"] |= {"at_first_check": ["1.0"], "full_gradient_steps_to_eps": {"1.0": 3}, "new": 3, "name": 7}
    (folder / "summary.json").write_text(json.dumps(summary | {"new": []}))
    ((run,), left_out) = read(tmp_path)
    assert (run["name"], run["new"], run["curve"], left_out) == (folder.name, 3.0, "sgd", {})


def test_an_optimizer_network_or_data_set_without_formulas_is_carried(tmp_path):
    critical(tmp_path, "qhm", 8, 0, {"1.0": 9}, steps=9, nu=0.7)
    critical(tmp_path, "nesterov", 8, 0, {"1.0": 9}, steps=9, beta1=None)
    normal(tmp_path, "adam", 8, 0, 50.0, model="MyNet-2", dataset="SVHN")
    runs, left_out = read(tmp_path)
    assert left_out == {}
    found = {r["optimizer"]: (r["curve"], r["model"], r["dataset"]) for r in runs}
    assert found == {
        "adam": ("adam", "MyNet-2", "SVHN"),
        "nesterov": ("nesterov", "ResNet18", "CIFAR100"),
        "qhm": ("qhm nu 0.7", "ResNet18", "CIFAR100"),
    }
    assert [np.isnan(r["beta"]) for r in runs] == [r["optimizer"] == "nesterov" for r in runs]


def test_what_an_optimizer_takes_is_read_where_it_is_registered(tmp_path, monkeypatch):
    """main.py records every flag, also those that the optimizer does not take."""
    monkeypatch.setattr(records, "OPTIMIZERS", {"lion": {}, "ours": {"momentum": "beta1", "nu": "nu"}})
    for optimizer in ("lion", "ours"):
        normal(tmp_path, optimizer, 8, 0, 50.0, beta1=0.5, nu=0.7)
    lion, ours = read(tmp_path)[0]
    assert (ours["beta"], ours["nu"], ours["curve"]) == (0.5, 0.7, "ours nu 0.7")
    assert lion["curve"] == "lion" and np.isnan(lion["beta"]) and np.isnan(lion["nu"])


def test_runs_with_injected_noise_are_curves_of_their_own(tmp_path):
    for optimizer, norm in (("sgd", 0.0), ("sgd", 0.5), ("sgd", 0.25), ("qhm", 0.5)):
        normal(tmp_path, optimizer, 8, 0, 50.0, nu=0.7, injected_noise=norm)
    normal(tmp_path, "shb", 8, 0, 50.0, injected_noise="loud")
    runs, left_out = read(tmp_path)
    assert {r["curve"] for r in runs} == {"sgd", "sgd + noise 0.5", "sgd + noise 0.25", "qhm nu 0.7 + noise 0.5"}
    assert list(left_out.values()) == ["injected_noise is 'loud', allowed is (0, 1e+300)"]


@pytest.mark.parametrize(("min_epochs", "first"), [(0, 1), (1, 40), (11, 440)])
def test_the_steps_of_an_epoch_of_an_unknown_data_set_follow_from_the_run(tmp_path, min_epochs, first):
    """100 steps are 2.5 epochs, so an epoch is of 40."""
    more = {"steps": 100, "epochs_made": 2.5, "min_epochs": min_epochs}
    critical(tmp_path, "shb", 8, 0, {"1.0": 50}, dataset="SVHN", **more)
    critical(tmp_path, "shb", 1000, 0, {"1.0": 50}, dataset="CIFAR10", **more)
    known, unknown = read(tmp_path)[0]
    assert (known["first_check"], unknown["first_check"]) == (max(1, 50 * min_epochs), first)


@pytest.mark.parametrize("epochs", [None, 0, -1, math.nan, "2"])
def test_an_unknown_data_set_needs_its_epochs(tmp_path, epochs):
    folder = critical(tmp_path, "shb", 8, 0, {"1.0": 50}, dataset="SVHN", epochs_made=epochs)
    runs, left_out = read(tmp_path)
    assert runs == [] and "epochs is " in left_out[folder.name]


def test_a_run_of_an_unknown_data_set_may_diverge_at_once(tmp_path):
    critical(tmp_path, "shb", 8, 0, {"1.0": None}, dataset="SVHN", epochs_made=0, steps=0, status="diverged", k=None)
    runs, left_out = read(tmp_path)
    assert left_out == {} and runs[0]["first_check"] == 11


def test_a_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, np.zeros(3))
    np.save(folder / "omega.npy", np.array([Trap()] * 4000, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        records.omega(folder, 4000)
    group, made = measured(tmp_path / "runs")
    assert made["omega_histogram"].empty and made["omega_qq"].empty
    assert details.spread_of_omegas(group.runs)[1] and not (tmp_path / "sprung").exists()


def test_a_history_that_is_not_finite_is_named_and_not_drawn(tmp_path):
    folder = critical(tmp_path, "shb", 8, 0, {"0.5": 3}, steps=3)
    np.array([1, np.nan, 1], "<f4").tofile(folder / "gradient_norms.f32")
    bins, unsound = details.gradients(measured(tmp_path)[0].runs)
    assert bins.empty and list(unsound) == [f"{folder.name} (gradient history only)"]


def test_any_eps_is_answered_from_the_histories(tmp_path):
    norms = histories(tmp_path / "runs")
    done = command(tmp_path / "runs", "--out", tmp_path / "out", "--eps", "0.75", "0.6")
    assert done.returncode == 0, done.stderr
    rows = {(float(r["eps"]), int(r["batch_size"])): r for r in table(tmp_path / "out", "steps", SLUG[:-8])}
    assert sorted(rows) == [(eps, b) for eps in (0.6, 0.75) for b in (1024, 2048)]
    for (eps, b), row in rows.items():
        total, expected = 0.0, None
        for step, norm in enumerate(map(float, norms[b]), 1):
            total += norm
            if expected is None and step >= 11 * -(-50_000 // b) and total / step <= eps:
                expected = step
        assert (expected is None) == (eps == 0.6)
        assert float(row["steps_mean"]) == (expected or len(norms[b]))
        assert row["steps_are"] == ("lower bound" if expected is None else "measured")
    unable = (
        "critical-sgd-b4096-seed0 (ε = 0.75, 0.6 only): not in its record, and gradient_norms.f32 does not hold 900"
    )
    assert unable in done.stdout and unable in (tmp_path / "out" / "report.md").read_text()


def test_the_mean_may_equal_eps_and_is_a_float64(tmp_path):
    for b, norm in ((2048, 0.5), (4096, 0.1)):
        folder = critical(tmp_path, "sgd", b, 0, {"0.01": None}, steps=200_000, status="not_reached")
        np.full(200_000, norm, "<f4").tofile(folder / "gradient_norms.f32")
    runs, unable = records.with_eps(records.read(tmp_path)[0], [0.5, 0.1])
    equal, above = runs["to_eps"]
    assert unable == {}
    assert equal == {0.5: 275, 0.1: None}  # 275: the first check
    # 0.1 in float32 is above 0.1 for ever; sums in float32 drift below.
    assert above == {0.5: 143, 0.1: None}
    assert (np.cumsum(np.full(200_000, 0.1, "<f4")) / np.arange(1, 200_001) <= 0.1).any()


def test_a_recorded_eps_needs_no_history(tmp_path):
    histories(tmp_path)
    runs, unable = records.with_eps(records.read(tmp_path)[0], [0.5])
    assert unable == {} and list(runs["to_eps"]) == [{0.5: None}] * 3


def test_an_epsilon_is_asked_of_critical_runs_only(tmp_path):
    record(tmp_path, "normal", "sgd", 8, 0, {"accuracy": 1.0, "best_accuracy": 1.0, "training_loss": 1.0,
                                             "max_gradient_norm": 1.0})  # fmt: skip
    runs, unable = records.with_eps(records.read(tmp_path)[0], [0.5])
    assert unable == {} and list(runs["to_eps"]) == [{}]
