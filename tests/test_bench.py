"""bench.py: its sides train the same network, its table and JSON hold what was measured, and once as it is."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, ROOT

import arguments
import bench
import models
import utils


@pytest.fixture
def networks(monkeypatch):
    """The list of all networks that have been built."""
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *what: built.append(build(*what)) or built[-1])
    return built


def make(side, tmp_path, *argv, steps):
    """Let a side make so many steps on random vectors; its arguments and data."""
    words = ["--dataset", "mnist1d", "--model", "MLP", "--runs_dir", tmp_path, "--device", "cpu", *bench.FIXED, *argv]
    args = arguments.parse([*map(str, words)])
    data, clock = bench.random_data(args, torch.device("cpu")), bench.Clock(torch.device("cpu"), steps - bench.WARM)
    torch.manual_seed(args.seed)
    with suppress(utils.Stopped):
        bench.SIDES[side](args, data, clock)
    assert len(clock.times) == 2
    return args, data


def test_the_sides_train_the_same_network(networks, tmp_path):
    """One batch of all inputs: nothing that the sides may do differently is left."""
    for side in bench.SIDES:
        flags = ("--batchsize", 4000, *bench.MODES["normal"], "--lr", 0.05)
        args, data = make(side, tmp_path / side, *flags, steps=9)
    torch.manual_seed(args.seed)
    plain = models.build("MLP", 10)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for _ in range(9):
        optimizer.zero_grad()
        F.cross_entropy(plain(data.x_train), data.y_train).backward()
        optimizer.step()
    assert len(networks) == 4
    for network in networks[:3]:
        for p, q in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_the_table_and_the_file_hold_medians_and_the_ratios_of_blocks_side_by_side(tmp_path, monkeypatch, capsys):
    calls, seconds = [], {"bare": 1e-3, "textbook": 4e-3, "ours": 2e-3}

    def apart(side, argv, steps):
        calls.append((side, arguments.parse(argv).mode, steps))
        if arguments.parse(argv).batchsize == 16:
            raise RuntimeError("no room")
        machine = 1 + calls.count(calls[-1]) // 2  # slower and slower, for each side alike
        return {"seconds_a_step": seconds[side] * machine, "peak_bytes": 5e8, "environment": {"torch": "x"}}

    monkeypatch.setattr(bench, "apart", apart)
    words = ["--models", "MLP", "--batchsizes", "8", "16", "--rounds", "4", "--seconds", "0.1"]
    assert bench.run([*words, "--out", str(tmp_path / "o.json"), "--device", "cpu"]) == 1
    content = json.loads((tmp_path / "o.json").read_text())
    order = [("bare", "normal"), *((side, mode) for mode in bench.MODES for side in ("textbook", "ours"))]
    assert [call[:2] for call in calls[1:21]] == (order + order[::-1]) * 2
    assert {call[2] for call in calls[1:21]} == {128}  # 100 steps, in whole blocks of 1,024 inputs
    assert [(row["side"], row["mode"]) for row in content["rows"]] == order
    for row in content["rows"]:
        assert row["seconds_a_step"] == pytest.approx(2 * seconds[row["side"]])
        ours = {"over_bare": pytest.approx(0.5), "over_textbook": pytest.approx(2)} if row["side"] == "ours" else {}
        assert {key: row[key] for key in row if key.startswith("over")} == ours
    assert content["environment"] == {"torch": "x"} and content["failed"] == ["MLP b=16: no room"]
    out, err = capsys.readouterr()
    assert err == "warning: not measured: MLP b=16: no room\n"
    shown = "MLP 8 normal ours 4 (3.5-4.5) 2000 500 0.50 × bare, 2.00 × textbook"
    assert " ".join(out.splitlines()[3].split()) == shown


def test_the_command_as_it_is(tmp_path):
    argv = ["--models", "ResNet20", "MLP", "--batchsizes=8", "--modes=normal", "--rounds=1", "--seconds=1e-3"]
    words = [sys.executable, str(ROOT / "bench.py"), *argv, "--device=cpu"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (0, "", ["bench.json"]), done
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["bare", "textbook", "ours"] * 2
    assert all(row["seconds_a_step"] > 0 and 50e6 < row["peak_bytes"] < 4e9 for row in rows)


def test_a_bad_argument_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ("--models=ResNet81", "--rounds=0", "--mode=x", "--quiet"):
        with pytest.raises(utils.UserError, match=argv.partition("=")[0]):
            bench.run([argv])
    assert os.listdir(tmp_path) == []
