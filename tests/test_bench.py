"""bench.py: its sides in this process, on a small network; the rest with stand-ins for them, and once as it is."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, ROOT, Tiny, committed, make_data

import arguments
import bench
import bench_sides
import models
import utils
from files import Norms, Rows
from messages import UserError
from training import Training

# --- the sides ------------------------------------------------------------------------------------------------


@pytest.fixture
def networks(monkeypatch):
    """Every network is Tiny; the list of all that have been built."""
    built = []
    monkeypatch.setattr(models, "build", lambda name, classes: built.append(Tiny(classes)) or built[-1])
    return built


def args_of(tmp_path, mode="normal", batchsize=60, name="x", lr=0.05):
    argv = ["--dataset", "digits", "--model", "ResNet20", "--mode", mode, "--batchsize", batchsize, "--lr", lr]
    argv += ["--eps", 1e-9, "--runs_dir", tmp_path, "--name", name, "--wandb_mode", "disabled", "--epochs", 10**9]
    return arguments.parse([*map(str, argv), "--device", "cpu"])


def make(side, args, data, steps, start=1):
    """Let a side make so many steps from step `start` on, and the clock that it was given."""
    clock = bench_sides.Clock(torch.device("cpu"), 2, steps - 2)
    torch.manual_seed(args.seed)
    with suppress(utils.Stopped):
        bench_sides.SIDES[side](args, data, clock, start)
    return clock


def test_a_clock_reads_the_time_at_the_first_step_and_around_the_block(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_sides.time, "perf_counter", lambda: now[0])
    clock = bench_sides.Clock(torch.device("cpu"), 6, 10)
    for made in (0, *range(1, 6), 6, 6, *range(7, 16)):  # the same twice, as where a test of the network lies between
        now[0] = float(made)
        clock.at(made)
    now[0] = 16.0
    with pytest.raises(utils.Stopped):
        clock.at(16)
    assert clock.times == [0, 1, 6, 16]


def test_the_three_sides_train_the_same_network(networks, tmp_path):
    """One batch with all images, and no augmentation: nothing that the sides may do differently is left."""
    data = make_data(n=60, augmented=False)
    args = args_of(tmp_path)
    for side in ("textbook", "bare", "ours"):
        assert len(make(side, args, data, 7).times) == 4
    torch.manual_seed(args.seed)
    plain = Tiny(10)
    optimizer, (x, y) = torch.optim.SGD(plain.parameters(), lr=args.lr, momentum=args.beta1), next(data.epoch(0, 60))
    before = [p.clone() for p in plain.parameters()]
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert len(networks) == 3
    for network in networks:
        for p, q, old in zip(network.parameters(), plain.parameters(), before, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
            assert not torch.equal(q, old)


@pytest.mark.parametrize(("mode", "start"), [("normal", 9), ("normal", 1000), ("critical", 9), ("critical", 1000)])
def test_ours_makes_just_the_steps_that_main_makes(networks, tmp_path, mode, start):
    """Bit for bit, over the ends of epochs with their tests, from a step far on too; and the record is all there."""
    data = make_data(n=60, n_test=1)
    args = args_of(tmp_path, mode, 7)
    args.max_steps = start + 100  # or else a clock that stops nothing would be waited for
    assert len(make("ours", args, data, 29, start).times) == 4
    run = Training(args, data, None, None)
    run.step = start
    list(committed(islice(run.windows(start + 29), 29), run))
    assert run.step == start + 29
    for p, q in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(p, q)
    read = (start + 29) // 9 * 9  # an epoch has 9 steps, and ends with a reading
    if mode == "critical":
        assert len(np.fromfile(tmp_path / "x" / "gradient_norms.f32", "<f4")) == read
    rows = Rows(tmp_path / "x" / "metrics.csv")
    rows.size = rows.path.stat().st_size
    assert int(rows.rows()[-1]["steps"]) == read


def test_a_record_of_a_million_steps_is_as_large_as_it_would_be(networks, tmp_path):
    make("ours", args_of(tmp_path, "critical", 7), make_data(n=60, n_test=1), 3, 1_000_000)
    norms = Norms(tmp_path / "x" / "gradient_norms.f32")
    assert norms.path.stat().st_size == pytest.approx(4e6, rel=1e-3)
    lines = (tmp_path / "x" / "metrics.csv").read_text().splitlines()
    assert len(lines) == pytest.approx(5000, abs=3) and len(lines[-1].split(",")) == len(lines[0].split(","))


def test_sampling_takes_every_image_once_a_pass_and_its_steps_are_chunks(networks, tmp_path, monkeypatch):
    data, seen, full = make_data(n=60), [], bench_sides.full_gradient
    args = args_of(tmp_path, "sampling", 25)

    def full_gradient(model, chunks, n):
        return full(model, (seen.append(chunk) or chunk for chunk in chunks), n)

    monkeypatch.setattr(bench_sides, "full_gradient", full_gradient)
    assert len(make("ours", args, data, 6).times) == 4
    assert [len(y) for _, y in seen] == [25, 25, 10] * 2  # and no seventh, after the end of the block
    assert all(torch.equal(x, one) for (x, _), (one, _) in zip(seen[:3], data.full_pass(0, 25), strict=True))


def test_the_bare_side_of_sampling_adds_up_gradients_and_moves_nothing(networks, tmp_path):
    data, args = make_data(n=60, augmented=False), args_of(tmp_path, "sampling")
    make("bare", args, data, 3)
    torch.manual_seed(args.seed)
    plain, (x, y) = Tiny(10), next(data.epoch(0, 60))
    (3 * F.cross_entropy(plain(x), y)).backward()
    for p, q in zip(networks[0].parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batchsize", "steps"), [(60, 20), (7, 6)], ids=["read", "not_read"])
def test_training_that_diverges_is_no_measurement(networks, tmp_path, batchsize, steps):
    with pytest.raises(RuntimeError, match="diverged before step"):
        make("ours", args_of(tmp_path, batchsize=batchsize, lr=1e30), make_data(n=60), steps)


def test_images_are_the_cached_ones_or_random_ones(tmp_path, cifar_dir):
    args = args_of(tmp_path)
    for directory in (tmp_path, cifar_dir):
        args.data_dir = directory
        data = bench_sides.load(args, torch.device("cpu"))
        assert data.size == 50_000 and data.spec.augmented and int(data.y_train.max()) == 99
        assert (data.y_train.bincount() == 500).all().item() == (directory == cifar_dir)
        assert len(data.y_test) == 1
    assert os.listdir(tmp_path) == []


# --- the command, with stand-ins for the sides ------------------------------------------------------------------


class Sides:
    """In the place of `bench.apart`: each side takes a time of its own, and all calls are kept."""

    def __init__(self):
        self.calls, self.fails = [], set()

    def __call__(self, side, mode, start, steps, flags):
        self.calls.append((side, mode, start, steps))
        if flags[3] in self.fails:
            raise RuntimeError("torch.OutOfMemoryError: no room")
        nth = sum(call[:3] == (side, mode, start) and call[3] > 1 for call in self.calls)
        seconds = (len(side) + len(mode) + start / 1e6) * 1e-3 * (1 + 0.1 * nth)
        return {"seconds_a_step": seconds, "seconds_to_first_step": 1.5, "peak_bytes": 10**9 + 1000 * len(side) + nth}


@pytest.fixture
def sides(monkeypatch):
    sides = Sides()
    monkeypatch.setattr(bench, "apart", sides)
    return sides


def command(tmp_path, *argv):
    """Exit status, and what bench.json holds."""
    words = [*map(str, argv), "--device", "cpu", "--data_dir", str(tmp_path), "--out", str(tmp_path / "o.json")]
    status = bench.run(words)
    return status, json.loads((tmp_path / "o.json").read_text())


def test_ratios_are_quotients_of_the_medians_written(sides, tmp_path, capsys):
    status, content = command(tmp_path, "--quick", "--batchsizes", 64)
    assert status == 0
    rows = {(r["side"], r["mode"], r["start"]): r for r in content["rows"]}
    expected = {(n, m, 1000) for n in ("ours", "textbook") for m in ("normal", "critical")}
    expected |= {("ours", "critical", 10**6), ("textbook", "critical", 10**6), ("ours", "sampling", 1000)}
    assert set(rows) == expected | {("bare", "normal", 1000), ("bare", "sampling", 1000)}
    for (name, mode, start), row in rows.items():
        seconds = (len(name) + len(mode) + start / 1e6) * 1e-3
        assert row["quartiles"] == pytest.approx([1.15 * seconds, 1.25 * seconds])
        assert row["seconds_a_step"] == pytest.approx(1.2 * seconds)
        assert row["images_a_second"] == pytest.approx(row["images_a_step"] / row["seconds_a_step"])
        assert row["steps_a_second"] == pytest.approx(1 / row["seconds_a_step"])
        assert row["peak_bytes"] == 10**9 + 1000 * len(name) + 3 and row["seconds_to_first_step"] == 1.5
        others = {"bare": ("bare", "sampling" if mode == "sampling" else "normal", 1000)}
        if mode != "sampling":
            others["textbook"] = ("textbook", mode, start)
        if mode == "critical":
            others["normal"] = (name, "normal", 1000)
        if start == 10**6:
            others["early"] = (name, mode, 1000)
        ratios = {f"over_{key}": rows[o]["seconds_a_step"] / row["seconds_a_step"] for key, o in others.items()}
        for key in {"bare", "early"} & set(others):
            ratios[f"{key}_memory"] = rows[others[key]]["peak_bytes"] / row["peak_bytes"]
        assert row["ratios"] == (pytest.approx(ratios) if name == "ours" else {})
    assert all(rows["ours", mode, 1000]["ratios"].keys() <= bench.BOUNDS.keys() for mode in bench.MODES)
    assert content["environment"]["torch"] == torch.__version__ and content["environment"]["real"] is False
    assert content["arguments"]["models"] == ["ResNet20"] and content["failed"] == []
    lines = capsys.readouterr().out.splitlines()
    for row, text in zip(content["rows"], lines[1:], strict=False):
        assert text.startswith(f"ResNet20 b={row['images_a_step']} {row['side']} {row['mode']}")
        assert f" {1e3 * row['seconds_a_step']:.3f} ms " in text and " 1000 MB, " in text
        assert all(f"{key} {value:.3f}" in text for key, value in row["ratios"].items())


def test_turns_are_equally_long_and_cover_whole_augmentation_blocks(sides, tmp_path):
    order = [("bare", "normal", 1000), ("textbook", "normal", 1000), ("ours", "normal", 1000)]
    command(tmp_path, "--batchsizes", 8, "--modes", "normal", "--rounds", 4, "--seconds", 2)
    assert sides.calls[0] == (*order[0], 1)
    # 2 s of 10.001 ms are 200 steps; 256 are 2 × 1,024 images.
    assert sides.calls[1:] == [(*side, 256) for side in (order + order[::-1]) * 2]
    sides.calls.clear()
    command(tmp_path, "--batchsizes", 8, "--modes", "normal", "--rounds", 1, "--seconds", 0.005)
    assert {call[3] for call in sides.calls} == {1}  # beside a step that long it is nothing


def test_save_memory_measures_both_sides_and_counts_what_it_cannot_measure(sides, tmp_path, capsys):
    status, content = command(tmp_path, "--save-memory", "--batchsizes", 16, 64, "--rounds", 1)
    assert status == 0 and {call[1:3] for call in sides.calls} == {("normal", 1000)}
    assert [(row["side"], row["images_a_step"]) for row in content["rows"]] == [
        *(("ours", 16), ("saving", 16), ("ours", 64), ("saving", 64))
    ]
    counts = {(row["side"], row["images"]): row["kept_bytes"] for row in content["counted"]}
    assert list(counts) == [(side, b) for b in (16, 64, 8192) for side in ("ours", "saving")]
    # By hand, floats an image: the input of every BatchNorm and every ReLU's output, the stem's too.
    outputs = 4 * (4 * 64 * 1024 + 4 * 128 * 256 + 4 * 256 * 64 + 4 * 512 * 16) // 2 + 2 * 64 * 1024
    shortcuts = 128 * 256 + 256 * 64 + 512 * 16
    assert counts["ours", 8192] == pytest.approx(4 * 8192 * (outputs + shortcuts), rel=0.01)
    assert "ResNet18 b=8192 saving: 12.1 GB kept" in capsys.readouterr().out


@pytest.mark.parametrize(("bound", "status"), [(0.0, 0), (1.6, 1)])
def test_check_names_the_ratio_and_its_bound(bound, status, sides, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.BOUNDS, "over_bare", bound)
    monkeypatch.setitem(bench.BOUNDS, "over_textbook", 0.0)
    argv = ["--quick", "--batchsizes", 8, "--modes", "normal"]
    assert command(tmp_path, *argv, "--check")[0] == status
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("check: ")
    assert ("ResNet20 b=8 ours normal: over_bare is 1.000, below 1.6" in said) == bool(status)
    assert command(tmp_path, *argv)[0] == 0


def test_a_point_that_cannot_be_measured_is_named_and_the_others_stand(sides, tmp_path, capsys):
    sides.fails.add(16)
    status, content = command(tmp_path, "--batchsizes", 8, 16, 32, "--modes", "normal", "--check")
    out, err = capsys.readouterr()
    assert status == 1 and "not measured: ResNet18 b=16" in out
    assert err == "warning: not measured: ResNet18 b=16 normal: torch.OutOfMemoryError: no room\n"
    assert len(content["failed"]) == 1 and {row["images_a_step"] for row in content["rows"]} == {8, 32}


# --- processes --------------------------------------------------------------------------------------------------


def test_the_command_as_it_is(tmp_path):
    argv = ["--quick", "--batchsizes", "128", "--modes", "normal", "--rounds", "1", "--seconds", "0.001"]
    argv += ["--out", "out.json", "--data-dir", "nowhere", "--device", "cpu"]
    words = [sys.executable, str(ROOT / "bench.py"), *argv]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and done.stderr == "" and os.listdir(tmp_path) == ["out.json"], done
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["side"], row["mode"]) for row in rows] == [(side, "normal") for side in ("bare", "textbook", "ours")]
    assert all(50e6 < row["peak_bytes"] < 4e9 and row["seconds_to_first_step"] > 0 for row in rows)


def test_a_side_that_fails_says_why_in_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SIDE", tmp_path / "side.py")
    for program, words in (
        ("print('{}')\nraise RuntimeError('training diverged')", "RuntimeError: training diverged"),
        ("import os\nos.kill(os.getpid(), 9)", "exit status -9"),
    ):
        bench.SIDE.write_text(program)
        with pytest.raises(RuntimeError, match=words):
            bench.apart("ours", "normal", 1000, 1, [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks ps for a session")
def test_no_side_outlives_the_command(tmp_path):
    program = (
        "import bench; bench.apart('textbook', 'normal', 1000, 10**9, ['--model', 'ResNet20', '--device', 'cpu'])"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, "-c", program]
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=-3, stderr=-3, start_new_session=True)

    def processes():
        listed = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, text=True).stdout
        return sum(not state.startswith("Z") for state in listed.split())

    def wait_until(reached):
        deadline = time.monotonic() + PATIENCE
        while not reached(processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert reached(processes()), processes()

    try:
        wait_until(lambda n: n >= 4)  # the command, the side and its two workers
        process.kill()
        process.wait()
        wait_until(lambda n: n == 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--models", "ResNet50"], ["--models", "ResNet50", "ResNet18"]),
        (["--batchsizes", "8", "0"], ["--batchsizes", "'0'", "1 to 50000"]),
        (["--batchsizes", "50001"], ["--batchsizes", "'50001'", "1 to 50000"]),
        (["--full-grad-batchsize", "x"], ["--full_grad_batchsize", "'x'"]),
        (["--modes", "slow"], ["--modes", "slow", "critical"]),
        (["--seconds", "nan"], ["--seconds", "'nan'", "above 0"]),
        (["--rounds", "0"], ["--rounds", "'0'", "at least 1"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["--device", "cuda:97"], ["--device", "cuda:97", "cpu"]),
        (["--device", "cpu", "--compile"], ["--compile", "CUDA"]),
        (["--out", "nowhere/b.json"], ["--out", "nowhere/b.json", "directory"]),
        (["--out", "."], ["--out", "'.'", "a file"]),
        (["--quiet"], ["unrecognized", "--quiet"]),
    ],
    ids=lambda v: None,
)
def test_bad_arguments(argv, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        bench.run(argv)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert os.listdir(tmp_path) == []


def test_damaged_data_are_named_at_once(sides, tmp_path):
    (tmp_path / "CIFAR100.npz").write_bytes(b"oops")
    with pytest.raises(UserError, match=r"--data_dir: .*CIFAR100.npz is damaged"):
        command(tmp_path)
    assert sides.calls == [] and os.listdir(tmp_path) == ["CIFAR100.npz"]


def test_a_bad_argument_as_a_command(tmp_path):
    words = [sys.executable, str(ROOT / "bench.py"), "--rounds", "-1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and done.stdout == "" and os.listdir(tmp_path) == []
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
