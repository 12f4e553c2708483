"""report/groups.py: which runs share a figure, and what two runs of one point and seed know together."""

import numpy as np
import pytest
from report_helpers import all_groups, critical, edit, measured, normal, sampling, steps_of, to_eps

from report import records
from report.groups import groups


def test_sgd_joins_every_beta_and_nothing_else_mixes(tmp_path):
    for beta in (0.5, 0.9):
        normal(tmp_path, "shb", 8, 0, 50.0, beta1=beta)
    normal(tmp_path, "sgd", 8, 0, 50.0, beta1=0.3)
    normal(tmp_path, "sgd", 8, 0, 50.0, lr=0.01)
    groups = all_groups(tmp_path)
    found = {g.slug: sorted((r["optimizer"], r["args"]["beta1"]) for r in g.runs.to_dict("records")) for g in groups}
    assert found == {
        "CIFAR100_ResNet18_lr0.01": [("sgd", 0.9)],
        "CIFAR100_ResNet18_lr0.1_beta0.5": [("sgd", 0.3), ("shb", 0.5)],
        "CIFAR100_ResNet18_lr0.1_beta0.9": [("sgd", 0.3), ("shb", 0.9)],
    }
    assert [bool(g.published.get("shb")) for g in groups] == [False, False, True]
    assert [g.beta for g in groups] == [0.0, 0.5, 0.9]


def test_what_records_no_beta_joins_every_beta_too(tmp_path):
    for beta in (0.5, 0.9):
        normal(tmp_path, "shb", 8, 0, 50.0, beta1=beta)
    normal(tmp_path, "mine", 8, 0, 50.0, beta1=None)
    normal(tmp_path, "nesterov", 8, 0, 50.0, beta1=0.5)
    found = {g.slug[-7:]: sorted(g.runs["optimizer"]) for g in all_groups(tmp_path)}
    assert found == {"beta0.5": ["mine", "nesterov", "shb"], "beta0.9": ["mine", "shb"]}


def test_runs_of_different_nu_never_share_a_curve(tmp_path):
    for nu in (0.9, 0.5):
        normal(tmp_path, "qhm", 8, 0, 50.0 + nu, nu=nu)
        critical(tmp_path, "qhm", 8, 0, {"1.0": 100}, steps=100, nu=nu)
    for optimizer in ("nshb", "adam"):
        normal(tmp_path, optimizer, 8, 0, 50.0)
    normal(tmp_path, "shb", 8, 0, 50.0, nu=0.5)  # takes none: recorded, but without a say
    group, made = measured(tmp_path)
    points = made["points"].set_index("optimizer")["accuracy_mean"].to_dict()
    assert list(points) == ["shb", "nshb", "adam", "qhm nu 0.5", "qhm nu 0.9"]  # the paper's three, then by name
    assert (points["qhm nu 0.5"], points["qhm nu 0.9"]) == (50.5, 50.9)
    assert list(made["steps"]["optimizer"]) == ["qhm nu 0.5", "qhm nu 0.9"] and group.left_out == {}


def test_a_second_run_of_a_seed_adds_what_it_reached_and_the_longer_one_stays(tmp_path):
    critical(tmp_path, "shb", 16, 0, {"1.0": 200}, steps=200, name="a")
    critical(tmp_path, "shb", 16, 0, {"0.7": 400, "0.5": None}, steps=500, status="not_reached", name="b")
    critical(tmp_path, "shb", 16, 0, {"0.4": None}, steps=900, status="diverged", k=None, name="c")
    group, _ = measured(tmp_path)
    (name,) = group.runs["name"]
    assert name.endswith("-nameb")
    assert to_eps(group) == {name: {0.7: (400, 500), 0.5: (None, 500), 1.0: (200, 200)}}
    assert len(group.left_out) == 2


@pytest.mark.parametrize(("mode", "key"), [(mode, key) for mode, keys in records.SHARED.items() for key in keys])
def test_a_run_that_disagrees_with_its_mode_is_left_out(tmp_path, mode, key):
    make = {
        "normal": lambda seed: normal(tmp_path, "sgd", 8, seed, 50.0),
        "critical": lambda seed: critical(tmp_path, "sgd", 8, seed, {"0.5": 9}),
        "sampling": lambda seed: sampling(tmp_path, "sgd", 8, seed, 1.0, np.zeros(3)),
    }[mode]
    folder = make(0)
    edit(folder, "args", **{key: 77})
    make(1)
    make(2)
    group, _ = measured(tmp_path)
    assert sorted(group.runs["seed"]) == [1, 2]
    in_part = mode == "sampling" and key in ("steps", "max_steps")  # what it measured at its steps is used
    (name,) = group.left_out
    assert name == folder.name + " (points and ω only)" * in_part and f"{key} 77" in group.left_out[name]
    assert (folder.name in set(group.sampling["name"])) == in_part


def test_a_merged_run_claims_no_step_that_was_not_checked(tmp_path):
    """The longer run was not asked ε = 0.7: that it was not reached is known for the shorter run's steps only."""
    critical(tmp_path, "shb", 16, 0, {"0.7": None, "0.5": None}, steps=300, status="not_reached", name="short")
    critical(tmp_path, "shb", 16, 0, {"0.5": None}, steps=900, status="not_reached", name="long")
    rows = {r["eps"]: r for r in steps_of(tmp_path)}
    assert (rows[0.7]["steps_mean"], rows[0.7]["checked_mean"], rows[0.7]["steps_are"]) == (300, 300, "lower bound")
    assert (rows[0.5]["steps_mean"], rows[0.5]["checked_mean"], rows[0.5]["steps_are"]) == (900, 900, "lower bound")


def test_a_merged_run_never_contradicts_what_the_longer_one_checked(tmp_path):
    critical(tmp_path, "shb", 16, 0, {"0.7": 250}, steps=250, name="short")
    critical(tmp_path, "shb", 16, 0, {"0.7": None}, steps=900, status="not_reached", name="long")
    critical(tmp_path, "shb", 32, 0, {"0.7": None}, steps=500, status="not_reached", name="capped")
    critical(tmp_path, "shb", 32, 0, {"0.7": 800, "0.5": None}, steps=950, status="diverged", k=None, name="lost")
    assert to_eps(measured(tmp_path)[0]) == {
        "critical-shb-b16-seed0-namelong": {0.7: (None, 900)},
        "critical-shb-b32-seed0-namecapped": {0.7: (800, 950)},
    }


def test_what_a_run_knows_that_another_shares_is_not_changed(tmp_path):
    """The frame that `load` gives is the user's: merging writes into none of its cells."""
    critical(tmp_path, "shb", 16, 0, {"1.0": 200}, steps=200, name="a")
    critical(tmp_path, "shb", 16, 0, {"0.7": 400}, steps=500, name="b")
    runs = records.read(tmp_path)[0]
    before = [dict(known) for known in runs["to_eps"]]
    groups(runs)
    assert list(runs["to_eps"]) == before and set(runs["optimizer"]) == {"shb"}


@pytest.mark.parametrize("damage", [None, "short", "nan", "negative"])
def test_the_longer_runs_history_settles_a_merge(tmp_path, damage):
    norms = np.random.default_rng(4).uniform(0.4, 0.8, 5000).astype("<f4")
    folder = critical(tmp_path, "sgd", 1024, 0, {"0.1": None}, steps=5000, status="not_reached", name="long")
    critical(tmp_path, "sgd", 1024, 0, {"0.6": 4000, "0.599": None}, steps=4500, status="not_reached", name="short")
    if damage == "short":
        norms = norms[:-1]
    elif damage == "nan":
        norms[7] = np.nan
    elif damage == "negative":
        norms[7] = -0.5
    norms.tofile(folder / "gradient_norms.f32")
    expected = {0.1: None, 0.6: 4000, 0.599: None}
    if damage is None:
        total, expected = 0.0, dict.fromkeys(expected)
        for step, norm in enumerate(map(float, norms), 1):
            total += norm
            for eps, found in expected.items():
                if found is None and step >= 49 * 11 and total / step <= eps:
                    expected[eps] = step
        assert expected[0.6] not in (None, 4000)
    checked = {0.1: 5000, 0.6: 4500 if damage else 5000, 0.599: 4500 if damage else 5000}
    known = {eps: (step, checked[eps]) for eps, step in expected.items()}
    assert to_eps(measured(tmp_path)[0]) == {folder.name: known}
