"""bench.py: its sides train the same network, its table holds what was measured, and once as it is."""

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
    assert len(networks) == 3
    for network in networks[:2]:
        for p, q in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_the_table_holds_medians_and_the_ratios_of_blocks_side_by_side(monkeypatch, capsys):
    calls, seconds = [], {"bare": 1e-3, "ours": 2e-3}

    def apart(side, argv, steps):
        args = arguments.parse(argv)
        if args.batchsize == 16:
            raise RuntimeError("no room")
        calls.append((side, args.mode, steps))
        return seconds[side] * (1 + calls.count(calls[-1]) // 2)  # slower and slower, for each side alike

    monkeypatch.setattr(bench, "apart", apart)
    words = ["--models", "MLP", "--batchsizes", "8", "16", "--rounds", "4", "--seconds", "0.1"]
    assert bench.run([*words, "--device", "cpu"]) == 1
    order = [(side, "normal", 128) for side in bench.SIDES]  # 100 steps, in whole blocks of 1,024 inputs
    assert calls[1:9] == (order + order[::-1]) * 2
    assert {call[1] for call in calls[10:]} == {"critical"}
    out, err = capsys.readouterr()
    assert err == "warning: not measured: MLP b=16: no room\n"
    rows = [" ".join(line.split()[3:]) for line in out.splitlines()[1:3]]
    assert rows == ["bare 2 4000 0.50", "ours 4 2000 1.00"]


def test_the_command_as_it_is(tmp_path):
    argv = ["--models", "ResNet20", "MLP", "--batchsizes=8", "--modes=normal", "--rounds=1", "--seconds=1e-3"]
    words = [sys.executable, str(ROOT / "bench.py"), *argv, "--device=cpu"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (0, "", []), done
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[3] for row in rows] == ["bare", "ours"] * 2 and all(float(row[4]) > 0 for row in rows)


def test_a_bad_argument_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ("--models=ResNet81", "--rounds=0", "--mode=x", "--quiet"):
        with pytest.raises(utils.UserError, match=argv.partition("=")[0]):
            bench.run([argv])
    assert os.listdir(tmp_path) == []
