import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, ROOT, Tiny, make_data

import arguments
import bench
import models
import shb
from record import NORMS

# bench.py as a command, with a network and a data set so small that a block of steps takes no time; its children
# import this too.
COMMAND = """
import sys
import bench, conftest, models
models._MODELS["ResNet20"] = conftest.Tiny
bench.load = lambda args, images=2048: conftest.make_data(n=images, classes=100)
if __name__ == "__main__":
    sys.exit(bench.run(sys.argv[1:]))
"""


@pytest.fixture
def networks(monkeypatch):
    """ResNet20 is Tiny; the list of all that have been built."""
    built = []
    monkeypatch.setitem(models._MODELS, "ResNet20", lambda classes: built.append(Tiny(classes)) or built[-1])
    return built


def args_of(tmp_path, mode="normal", batchsize=60, start=0, name="x"):
    argv = ["--dataset", "digits", "--model", "ResNet20", "--mode", mode, "--batchsize", batchsize, "--lr", 0.05]
    argv += ["--eps", 1e-9, "--runs_dir", tmp_path, "--name", name, "--wandb_mode", "disabled", "--epochs", 10**9]
    argv += ["--device", "cpu"]
    args = arguments.parse(list(map(str, argv)))
    args.start = start
    return args


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    (directory / "command.py").write_text(COMMAND)
    argv = ["--quick", "--batchsizes", "64", "--seconds", "0.01", "--out", "out.json", "--data-dir", "nowhere"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "command.py", *argv, "--device", "cpu"]
    done = subprocess.run(
        command, cwd=directory, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done
    assert sorted(os.listdir(directory)) == ["command.py", "out.json"] or "__pycache__" in os.listdir(directory)
    return done, json.loads((directory / "out.json").read_text())


def test_ratios_are_quotients_of_the_medians_written(measured):
    _, content = measured
    rows = {(r["side"], r["mode"], r["start"]): r for r in content["rows"]}
    sides = {(n, m, 1000) for n in ("ours", "textbook") for m in ("normal", "critical")}
    sides |= {("ours", "critical", 10**6), ("textbook", "critical", 10**6), ("ours", "sampling", 1000)}
    assert set(rows) == sides | {("bare", "normal", 1000), ("bare", "sampling", 1000)}
    for (name, mode, start), row in rows.items():
        seconds = row["seconds_a_step"]
        assert row["quartiles"][0] <= seconds <= row["quartiles"][1]
        assert row["images_a_second"] == pytest.approx(row["images_a_step"] / seconds)
        assert row["steps_a_second"] == pytest.approx(1 / seconds)
        assert 50e6 < row["peak_bytes"] < 4e9 and row["seconds_to_first_step"] > 0
        others = {"over_bare": ("bare", "sampling" if mode == "sampling" else "normal", 1000)}
        if mode != "sampling":
            others["over_textbook"] = ("textbook", mode, start)
        if mode == "critical":
            others["over_normal"] = (name, "normal", 1000)
        if start == 10**6:
            others["over_early"] = (name, mode, 1000)
        got = {key: value for key, value in row["ratios"].items() if key.startswith("over")}
        if name == "ours":
            assert got == pytest.approx({key: rows[o]["seconds_a_step"] / seconds for key, o in others.items()})
            assert row["ratios"]["bare_memory"] > 0
        else:
            assert row["ratios"] == {}
    assert all(rows["ours", m, 1000]["ratios"].keys() <= bench.BOUNDS.keys() for m in bench.MODES)
    # The textbook's mean over a list is what grows; four bytes a step and a row a window are what ours records.
    assert 4e6 < rows["ours", "critical", 10**6]["record_bytes_a_million_steps"] < 1e7


def test_the_table_and_the_machine_are_shown(measured):
    done, content = measured
    assert content["environment"]["torch"] == torch.__version__ and content["environment"]["real"] is False
    assert content["arguments"]["models"] == ["ResNet20"] and content["seconds_to_begin_an_epoch"] > 0
    lines = done.stdout.splitlines()
    assert "steps/s" in lines[1] and "images/s" in lines[1] and "peak MB" in lines[1]
    for row, text in zip(content["rows"], lines[2:], strict=False):
        assert text.startswith(f"ResNet20 b={row['images_a_step']} {row['side']} {row['mode']}")
        assert len(text) == len(lines[1])
    assert done.stderr == ""


def test_save_memory_measures_both_sides_and_counts_what_it_cannot_measure(monkeypatch, tmp_path, capsys):
    def measure(args, data, model, images, sides):
        assert [(mode, start) for _, mode, start in sides] == [("normal", 1000)] * 2
        row = {"mode": "normal", "start": 1000, "model": model, "images_a_step": images, "ratios": {}}
        row |= {"seconds_a_step": 0.5, "quartiles": [0.4, 0.6], "steps_a_second": 2, "images_a_second": 16}
        row |= {"seconds_to_first_step": 1.0}
        cost = {"ours": 20_000_000, "saving": 5_000_000}
        return [row | {"side": side, "peak_bytes": 10**9 + images * cost[side]} for side, _, _ in sides]

    monkeypatch.setattr(bench, "measure", measure)
    argv = ["--save-memory", "--device", "cpu", "--data_dir", str(tmp_path), "--out", str(tmp_path / "o.json")]
    assert bench.run([*argv, "--batchsizes", "16", "64"]) == 0
    content = json.loads((tmp_path / "o.json").read_text())
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


def test_images_are_the_cached_ones_or_random_ones(tmp_path, cifar_dir):
    args = args_of(tmp_path)
    for directory in (tmp_path, cifar_dir):
        args.data_dir = directory
        data = bench.load(args)
        assert data.size == 50_000 and data.spec.augmented and int(data.y_train.max()) == 99
        assert (data.y_train.bincount() == 500).all().item() == (directory == cifar_dir)
    assert bench.load(args, 7).size == 7
    assert os.listdir(tmp_path) == []


def test_the_three_sides_train_the_same_network(networks, tmp_path):
    """One batch with all images, and no augmentation: nothing that the sides may do differently is left."""
    data = make_data(n=60, augmented=False)
    args = args_of(tmp_path)
    for side in ("textbook", "bare", "ours"):
        block = bench.SIDES[side](args, data)
        block(3)
        block(4)
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


@pytest.mark.parametrize(("mode", "start"), [("normal", 0), ("critical", 0), ("critical", 1000)])
def test_blocks_are_one_unbroken_run_of_so_many_updates(networks, tmp_path, monkeypatch, mode, start):
    """What ours does in blocks is, bit for bit, what main.py does in one go."""
    updates = []
    step = shb.SHB.step
    monkeypatch.setattr(shb.SHB, "step", lambda self: updates.append(1) or step(self))
    data = make_data(n=60)
    block = bench.ours(args_of(tmp_path, mode, 7, start), data)
    for steps in (1, 5, 3, 9, 2, 9):  # an epoch has 9
        before = len(updates)
        block(steps)
        assert len(updates) - before == steps
    once = bench.ours(args_of(tmp_path, mode, 7, start, name="once"), data)
    once(29)
    for p, q in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(p, q)
    if mode == "critical":
        norms = [np.fromfile(tmp_path / name / NORMS, "<f4") for name in ("x", "once")]
        assert len(norms[0]) == start + 29 and np.array_equal(*norms)


def test_sampling_compares_the_same_gradient(networks, tmp_path, monkeypatch):
    data = make_data(n=60, augmented=False)
    args, seen, full = args_of(tmp_path, "sampling"), [], bench.noise.full_gradient
    monkeypatch.setattr(bench.noise, "full_gradient", lambda *a: seen.append(full(*a)))
    for side in ("bare", "ours"):
        bench.SIDES[side](args, data)(1)
    for p, g in zip(networks[0].parameters(), seen[0], strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_training_that_diverges_is_no_measurement(networks, tmp_path):
    args = args_of(tmp_path)
    args.lr = 1e30
    block = bench.ours(args, make_data(n=60))
    with pytest.raises(RuntimeError, match="diverged at step"):
        block(20)


def test_turns_are_equally_long_and_cover_whole_augmentation_blocks():
    calls = []

    class Pool:
        def __init__(self, name):
            self.name = name

        def submit(self, function, steps):
            assert function is bench.timed_block
            calls.append((self.name, steps))
            future = Future()
            future.set_result(0.001)
            return future

    order = ["bare", "textbook", "ours"]
    times = bench.alternate({name: Pool(name) for name in order}, 4096, 8, 0.2, 4)
    assert times == {name: [0.001] * 4 for name in order}
    assert calls[0] == ("bare", 1)
    assert calls[1:] == [(name, 256) for name in (order + order[::-1]) * 2]  # 2 × 1,024 images: the least above 0.2 s
    calls.clear()
    bench.alternate({"bare": Pool("bare")}, 4096, 8, 1e9, 1)
    assert calls[1] == ("bare", 512)  # an epoch


def test_what_comes_before_a_block_is_not_timed(monkeypatch):
    calls, device = [], torch.device("cpu")

    def block(steps):
        calls.append(steps)
        time.sleep(0.02 if steps == 3 else 2)

    monkeypatch.setattr(bench, "STATE", {"block": block, "device": device, "lead": 5})
    assert 0.02 / 3 <= bench.timed_block(3) < 0.6
    assert calls == [5, 3]


@pytest.mark.parametrize(("bound", "status"), [(0.0, 0), (1.6, 1)])
def test_check_names_the_ratio_and_its_bound(bound, status, monkeypatch, tmp_path, capsys):
    row = {"side": "ours", "mode": "normal", "start": 1000, "model": "ResNet20", "images_a_step": 8}
    row |= {"seconds_a_step": 0.5, "quartiles": [0.4, 0.6], "steps_a_second": 2, "images_a_second": 16}
    row |= {"ratios": {"over_bare": 1.5}, "peak_bytes": 10**9, "seconds_to_first_step": 1.0}
    monkeypatch.setattr(bench, "measure", lambda args, data, model, images, sides: [row for _ in sides])
    monkeypatch.setitem(bench.BOUNDS, "over_bare", bound)
    argv = ["--quick", "--batchsizes", "8", "--modes", "normal", "--device", "cpu", "--out", str(tmp_path / "o.json")]
    argv += ["--data_dir", str(tmp_path)]
    assert bench.run([*argv, "--check"]) == status
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("check: ")
    assert ("ResNet20 b=8 ours normal: over_bare is 1.500, below 1.6" in said) == bool(status)
    assert bench.run(argv) == 0


def test_a_point_that_cannot_be_measured_is_named_and_the_others_stand(monkeypatch, tmp_path, capsys):
    def measure(args, data, model, images, sides):
        if images == 16:
            raise torch.OutOfMemoryError("no room\nat all")
        return []

    monkeypatch.setattr(bench, "measure", measure)
    argv = ["--batchsizes", "8", "16", "32", "--modes", "normal", "--device", "cpu", "--data_dir", str(tmp_path)]
    assert bench.run([*argv, "--check", "--out", str(tmp_path / "o.json")]) == 1
    out, err = capsys.readouterr()
    assert "check: not measured: ResNet18 b=16" in out
    assert err == "warning: not measured: ResNet18 b=16 normal: OutOfMemoryError: no room at all\n"
    assert len(json.loads((tmp_path / "o.json").read_text())["failed"]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks ps for a session")
def test_no_side_outlives_the_command(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "command.py", "--quick", "--seconds", "1000", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=-3, stderr=-3, start_new_session=True)

    def processes():
        listed = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, text=True).stdout
        return sum(not state.startswith("Z") for state in listed.split())

    def wait_until(reached):
        deadline = time.monotonic() + PATIENCE
        while not reached(processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert reached(processes()), processes()

    try:
        wait_until(lambda n: n >= 9)  # the command, the fork server, five sides and two workers, at least
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
    with pytest.raises(arguments.UserError) as caught:
        bench.run(argv)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert os.listdir(tmp_path) == []


def test_a_bad_argument_as_a_command(tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "--rounds", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and done.stdout == "" and os.listdir(tmp_path) == []
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
