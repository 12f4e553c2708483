"""A run that is killed, stopped, damaged or crowded out ends with the numbers of one that was left alone."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, run_main, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child

BASE = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--lr", 0.02, "--name", "r"]
MODES = {  # 23 steps an epoch
    "normal": ["--mode", "normal", "--epochs", 14],
    "critical": ["--mode", "critical", "--eps", 0.9, 0.6, 0.01, "--min_epochs", 2, "--max_steps", 430],
    "sampling": ["--mode", "sampling", "--steps", 310, "--full_grad_batchsize", 100],
}


def outcome(directory, final=True):
    """Everything a run leaves that must not depend on how often it was interrupted."""
    found = {}
    with open(directory / "metrics.csv", newline="") as file:
        found["metrics"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    for name in ("gradient_norms.f32", "omega.npy"):
        if (directory / name).exists():
            found[name] = (directory / name).read_bytes()
    s = summary(directory)
    del s["seconds"], s["args"]["checkpoint_every"], s["args"]["resume"]
    found["summary"] = s
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    del content["seconds"], content["files"], content["args"]
    found["checkpoint"] = [(k, bits(v)) for k, v in sorted(content.items())]
    return found


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return [(str(k), bits(v)) for k, v in value.items()]
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The outcome of each mode when nothing happens."""
    outcomes = {}
    for mode, argv in MODES.items():
        directory = tmp_path_factory.mktemp(mode)
        status, log = child.run([*BASE, *argv], directory)
        assert status == 0, log
        outcomes[mode] = outcome(directory / "runs" / "r")
    return outcomes


def half_done(directory, mode, *more, at=150):
    """A run stopped by SIGTERM at its `at`-th check."""
    status, log = child.run([*BASE, *MODES[mode], *more], directory, f"signal_at={at}")
    assert status == 143, log
    return directory / "runs" / "r"


def written(path):
    """When, in nanoseconds; 0 where there is no file, if only between two renames."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("interval", [0, 0.01, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_sigkill_at_random_moments(mode, interval, reference, tmp_path):
    rng = random.Random(f"{mode}{interval}")
    argv = [*BASE, *MODES[mode], "--resume", "--checkpoint_every", interval]
    checkpoint, landed = tmp_path / "runs" / "r" / "checkpoint.pt", 0
    for _ in range(6):
        before = written(checkpoint)
        process = child.start(argv, tmp_path)
        # A kill while it is still setting up would test nothing: wait for its first checkpoint.
        while process.is_alive() and written(checkpoint) in (0, before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))  # on a machine ten times as fast, too, far from the end
        if process.is_alive():
            process.kill()
            landed += 1
        process.join()
    assert landed
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert outcome(tmp_path / "runs" / "r") == reference[mode]


@pytest.mark.parametrize("moment", ["die_in_write", "die_between_renames", "die_after_rename"])
@pytest.mark.parametrize("mode", MODES)
def test_sigkill_at_the_worst_moments(mode, moment, reference, tmp_path):
    argv = [*BASE, *MODES[mode], "--resume", "--checkpoint_every", 0]
    status, log = child.run(argv, tmp_path, moment)
    assert status == -signal.SIGKILL, log
    status, log = child.run([*argv[:-1], 300], tmp_path)
    assert status == 0 and "resumed at step" in log and "warning" not in log, log
    assert outcome(tmp_path / "runs" / "r") == reference[mode]


@pytest.mark.parametrize("at", [1, 23, 24, 47, 200, 230, 313, 320])
@pytest.mark.parametrize("mode", MODES)
def test_sigterm_between_any_two_steps_or_chunks(mode, at, reference, tmp_path):
    """At 24 the test of the first epoch is on; in sampling, beyond 310, the full gradient is."""
    status, log = child.run([*BASE, *MODES[mode]], tmp_path, f"signal_at={at}")
    assert status == 143 and "--resume goes on" in log and "error" not in log, log
    assert not (tmp_path / "runs" / "r" / "summary.json").exists()
    status, log = child.run([*BASE, *MODES[mode], "--resume"], tmp_path)
    assert status == 0, log
    assert outcome(tmp_path / "runs" / "r") == reference[mode]


def wait_for(path, text, process):
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, path.read_text() if path.exists() else path
        time.sleep(0.005)


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_stops_with_a_checkpoint(signum, expected, tmp_path):
    process = child.start([*BASE, "--epochs", 100_000], tmp_path)
    wait_for(tmp_path / "log", "epoch 2", process)
    os.kill(process.pid, signum)
    process.join(PATIENCE)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == expected, log
    content = torch.load(tmp_path / "runs" / "r" / "checkpoint.pt", weights_only=True)
    assert f"stopped after step {content['step']}, with a checkpoint" in log.splitlines()[-1]


def test_a_second_signal_ends_at_once(tmp_path):
    process = child.start([*BASE, "--epochs", 100_000], tmp_path, "slow_write")
    wait_for(tmp_path / "log", "epoch 2", process)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(tmp_path / "log", "writing", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGTERM  # or else the checkpoint would have been written, and this be 143


def test_signals_to_the_real_command(tmp_path):
    """A whole process with the real ResNet20: its statuses as a shell sees them, and going on to the end."""
    argv = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", "128", "--epochs", "2", "--name", "r"]
    argv += ["--device", "cpu"]
    command = [sys.executable, str(ROOT / "main.py"), *argv]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "epoch 1" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and "the same command with --resume goes on" in rest
    assert run_main(*argv, "--name", "r", "--resume", cwd=tmp_path).returncode == 0
    assert run_main(*argv, "--name", "whole", cwd=tmp_path).returncode == 0
    whole, resumed = (outcome(tmp_path / "runs" / name) for name in ("whole", "r"))
    del whole["summary"]["args"], resumed["summary"]["args"]
    assert whole == resumed


def test_ctrl_c_while_torch_loads_is_no_traceback(tmp_path):
    """At the one moment that is certain to be there: a torch that presses Ctrl-C as it is loaded."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('not stopped')\n")
    command = [sys.executable, str(ROOT / "main.py"), "--dataset", "digits", "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(fake), os.environ["PYTHONPATH"]])}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")
    assert {p.name for p in tmp_path.iterdir()} == {"fake"}


def test_one_owner(tmp_path):
    process = child.start([*BASE, "--epochs", 100_000], tmp_path)
    wait_for(tmp_path / "log", "epoch 1", process)
    for argv in ([], ["--resume"]):
        status, log = child.run([*BASE, "--epochs", 100_000, *argv], tmp_path, log="second")
        assert status == 2 and log.count("\n") == 1, log
        assert log.startswith("error: ") and "belongs to another, running process" in log
    process.kill()
    process.join()
    status, log = child.run([*BASE, "--epochs", 1, "--resume"], tmp_path)  # the dead one's lock does not block
    assert status == 0, log


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "garbled": garble,
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("oops"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(mode, kind, reference, tmp_path):
    directory = half_done(tmp_path, mode, "--checkpoint_every", 0.02)
    DAMAGE[kind](directory / "checkpoint.pt")
    status, log = child.run([*BASE, *MODES[mode], "--resume"], tmp_path)
    assert status == 0 and log.count("warning: ") == 1 and "checkpoint.pt is damaged" in log, log
    assert "resumed at step" in log
    assert outcome(directory) == reference[mode]


def test_no_good_checkpoint_is_an_error_and_nothing_is_lost(tmp_path):
    directory = half_done(tmp_path, "critical", "--checkpoint_every", 0.02)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        garble(directory / name)
    before = {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 2 and "error: argument --resume: no good checkpoint" in log, log
    assert {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()} == before


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    directory = half_done(tmp_path, "normal")
    torch.save({"model": Evil()}, directory / "checkpoint.pt")
    status, log = child.run([*BASE, *MODES["normal"], "--resume"], tmp_path)
    assert status == 2 and "damaged" in log and not (tmp_path / "pwned").exists(), log


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk(mode, reference, tmp_path):
    directory = half_done(tmp_path, mode)
    good = (directory / "checkpoint.pt").read_bytes()
    argv = [*BASE, *MODES[mode], "--resume", "--checkpoint_every", 0]
    status, log = child.run(argv, tmp_path, f"file_limit={len(good) // 2}")
    assert status == 1 and "error: " in log and "File too large" in log and "Traceback" not in log, log
    assert (directory / "checkpoint.pt").read_bytes() == good
    assert not (directory / ".checkpoint.pt.tmp").exists()
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert outcome(directory) == reference[mode]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody with fewer rights")
def test_a_directory_that_is_not_writable(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (tmp_path / "log").touch()
        os.chmod(tmp_path / "log", 0o666)
        status, log = child.run([*BASE, "--runs_dir", f"{name}/runs"], tmp_path, "nobody")
        assert status == 2 and log.startswith("error: argument --runs_dir: ") and log.count("\n") == 1, log
        assert os.listdir(name) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "gradient_norms.f32"])
def test_a_record_cut_off_in_the_middle(mode, name, reference, tmp_path):
    if name == "gradient_norms.f32" and mode != "critical":
        pytest.skip("only critical has a history")
    if name == "summary.json":
        assert child.run([*BASE, *MODES[mode]], tmp_path)[0] == 0
    else:
        half_done(tmp_path, mode, "--checkpoint_every", 0.02)
    directory = tmp_path / "runs" / "r"
    os.truncate(directory / name, (directory / name).stat().st_size * (1 if name[0] == "s" else 9) // 10)
    status, log = child.run([*BASE, *MODES[mode], "--resume"], tmp_path)
    assert status == 0, log
    assert "warning" in log
    ours, whole = outcome(directory), dict(reference[mode])
    if "the rows so far are lost" in log:
        rows, known = ours.pop("metrics"), whole.pop("metrics")
        assert rows == known[len(known) - len(rows) :] and 0 < len(rows) < len(known)
    if "nan for the" in log:  # cut before what both checkpoints count on
        norms, known = (np.frombuffer(found.pop(name), "<f4") for found in (ours, whole))
        lost = np.isnan(norms)
        assert 0 < lost.sum() < 430 and (norms[~lost] == known[~lost]).all()
    assert ours == whole


def test_a_finished_run_is_left_alone(tmp_path):
    argv = [*BASE, *MODES["critical"]]
    assert child.run(argv, tmp_path)[0] == 0
    before = {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file() and p.name != "log"
    }
    status, log = child.run([*argv, "--resume"], tmp_path)
    assert status == 0 and "not_reached already, after 430 steps" in log
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file() and p.name != "log"}
    assert after == before


def test_a_diverged_run_stays_diverged(tmp_path):
    argv = [*BASE, "--lr", 1e38, "--optimizer", "sgd"]
    assert child.run(argv, tmp_path)[0] == 3
    status, log = child.run([*argv, "--resume"], tmp_path)
    assert status == 3 and "diverged already" in log, log


@pytest.mark.parametrize("caps", [[115], [30], [30, 41, 205]])
@pytest.mark.parametrize("mode", MODES)
def test_a_raised_cap_leaves_no_trace(mode, caps, reference, tmp_path):
    """Whether it fell at the end of an epoch, of a window, or anywhere else."""
    argv = [*BASE, *MODES[mode], "--resume"]
    for cap in caps:
        argv_capped = [*(argv if mode != "critical" else argv[:-3]), "--max_steps", cap, "--resume"]
        status, log = child.run(argv_capped, tmp_path)
        assert status == 0 and summary(tmp_path / "runs" / "r")["steps"] == cap, log
    status, log = child.run(argv, tmp_path)
    assert status == 0 and f"resumed at step {caps[-1]}" in log, log
    assert outcome(tmp_path / "runs" / "r") == reference[mode]


def test_epochs_are_raised_too(reference, tmp_path):
    assert child.run([*BASE, "--epochs", 5], tmp_path)[0] == 0
    assert child.run([*BASE, *MODES["normal"], "--resume"], tmp_path)[0] == 0
    assert outcome(tmp_path / "runs" / "r") == reference["normal"]


def test_the_best_accuracy_is_not_that_of_a_cap_raised_later(tmp_path):
    """Made by hand, since a lucky cap cannot be ordered: its accuracy is set to one that no epoch has."""
    argv = [*BASE, "--mode", "normal", "--epochs", 2]
    assert child.run([*argv, "--max_steps", 30], tmp_path, "lucky")[0] == 0
    directory = tmp_path / "runs" / "r"
    assert summary(directory)["results"]["best_accuracy"] == 100.0
    assert child.run([*argv, "--resume"], tmp_path)[0] == 0
    with open(directory / "metrics.csv", newline="") as file:
        accuracies = [float(row["accuracy"]) for row in csv.DictReader(file)]
    best = summary(directory)["results"]["best_accuracy"]
    assert len(accuracies) == 2 and best == max(accuracies) < 100


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("mode", "lower", "given"),
    [
        ("normal", ["--epochs", 5], "--epochs 5"),
        ("normal", ["--max_steps", 100], "--max_steps 100"),
        ("critical", ["--max_steps", 100], "--max_steps 100"),
        ("sampling", ["--max_steps", 100], "--max_steps 100"),
    ],
)
def test_a_cap_below_what_has_been_made_is_refused(mode, lower, given, ended, tmp_path):
    """It would leave a record that says less than was done."""
    if ended:
        assert child.run([*BASE, *MODES[mode]], tmp_path)[0] == 0
        directory = tmp_path / "runs" / "r"
    else:
        directory = half_done(tmp_path, mode)
    step = torch.load(directory / "checkpoint.pt", weights_only=True)["step"]
    assert step == {"normal": 322, "critical": 430, "sampling": 310}[mode] if ended else 100 < step <= 150
    before = files(directory)
    status, log = child.run([*BASE, *MODES[mode], *lower, "--resume"], tmp_path)
    assert status == 2 and log.splitlines()[-1].startswith("error: argument --resume: "), log
    assert f"is at step {step} already, beyond {given};" in log and files(directory) == before, log


CRITICAL = ["--mode", "critical", "--min_epochs", 2, "--max_steps", 430]


@pytest.mark.parametrize(
    ("first", "then", "kills"),
    [
        ([0.9], [[0.6]], ""),  # trains on
        ([0.6], [[0.9]], ""),  # is in the history
        ([0.9], [[0.6, 2.0, 0.9, 0.01]], ""),
        ([0.6, 0.01], [[0.9]], ""),  # 0.01 had not been reached, and is not asked again
        ([2.0], [[0.9], [0.01]], "die_in_write"),
        ([0.9], [[0.6, 2.0]], "die_after_rename"),
    ],
)
def test_a_further_eps_gives_the_record_of_one_run_with_all(first, then, kills, tmp_path):
    argv = [*BASE, *CRITICAL]
    every = sorted({*first, *(eps for part in then for eps in part)})
    assert child.run([*argv, "--eps", *every], tmp_path / "whole")[0] == 0
    assert child.run([*argv, "--eps", *first], tmp_path)[0] == 0
    for part in then:
        if kills:
            child.run([*argv, "--eps", *part, "--resume", "--checkpoint_every", 0], tmp_path, kills)
        status, log = child.run([*argv, "--eps", *part, "--resume"], tmp_path)
        assert status == 0 and "warning" not in log, log
    assert outcome(tmp_path / "runs" / "r") == outcome(tmp_path / "whole" / "runs" / "r")
    status, log = child.run([*argv, "--eps", *every, "--resume"], tmp_path)
    assert status == 0 and " already, after " in log, log


def test_a_diverged_run_still_answers_for_an_eps_of_its_history(tmp_path):
    argv = [*BASE, *CRITICAL, "--lr", 1e38, "--optimizer", "sgd", "--min_epochs", 0]
    status, _ = child.run([*argv, "--eps", 1e-9, 1e9], tmp_path / "whole")
    assert status == 3
    assert child.run([*argv, "--eps", 1e-9], tmp_path)[0] == 3
    assert child.run([*argv, "--eps", 1e9, "--resume"], tmp_path)[0] == 3
    assert outcome(tmp_path / "runs" / "r") == outcome(tmp_path / "whole" / "runs" / "r")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    directory = half_done(tmp_path, "normal")
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    torch.save(content | {"format": 1}, directory / "checkpoint.pt")
    before = files(directory)
    status, log = child.run([*BASE, *MODES["normal"], "--resume"], tmp_path)
    assert status == 2 and "another version of this code" in log and files(directory) == before, log


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_an_ended_run_without_its_checkpoint_is_not_begun_again(tmp_path):
    assert child.run([*BASE, *MODES["critical"], "--max_steps", 100], tmp_path)[0] == 0
    directory = tmp_path / "runs" / "r"
    (directory / "checkpoint.pt").unlink()
    before = files(directory)
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 2 and "its checkpoint is gone" in log and files(directory) == before, log


def test_a_refused_resume_changes_nothing(tmp_path):
    directory = half_done(tmp_path, "critical")
    before = files(directory)
    status, log = child.run([*BASE, *MODES["critical"], "--lr", 0.5, "--resume"], tmp_path)
    assert status == 2 and "--lr 0.5 (was 0.02)" in log and files(directory) == before, log


def test_after_a_damaged_checkpoint_the_good_one_outlives_the_next_write(reference, tmp_path):
    directory = half_done(tmp_path, "critical", "--checkpoint_every", 0.02)
    garble(directory / "checkpoint.pt")
    argv = [*BASE, *MODES["critical"], "--resume"]
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, "die_in_write")
    assert status == -signal.SIGKILL, log
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, "die_between_renames")
    assert status == -signal.SIGKILL, log
    assert child.run(argv, tmp_path)[0] == 0
    assert outcome(directory) == reference["critical"]


def test_resume_without_a_checkpoint_starts(reference, tmp_path):
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "gradient_norms.f32").write_bytes(b"left over by a run killed early")
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 0, log
    assert outcome(tmp_path / "runs" / "r") == reference["critical"]


def test_checkpoints_hold_no_numpy_and_load_safely(tmp_path):
    directory = half_done(tmp_path, "critical")
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    assert content["step"] == 150 and content["total"]["steps"] == 138 and len(content["window"]) == 12
    assert (directory / "gradient_norms.f32").stat().st_size == 4 * 138
    assert json.loads((directory / "args.json").read_text())["args"]["lr"] == 0.02
    assert np.isfinite(content["window"].numpy()).all()


def test_in_a_terminal_there_is_a_progress_bar_and_ctrl_c_stops(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    argv = [
        "--dataset",
        "digits",
        "--model",
        "ResNet20",
        "--batchsize",
        "128",
        "--epochs",
        "100000",
        "--device",
        "cpu",
    ]
    command = [sys.executable, str(ROOT / "main.py"), *argv]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    seen, interrupted = b"", False
    while True:
        try:
            seen += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if re.search(rb" (1[3-9]|[2-9]\d|\d{3,})/1200000 ", seen) and not interrupted:
            os.killpg(process.pid, signal.SIGINT)
            interrupted = True
    assert process.wait(PATIENCE) == 130
    text = seen.decode()
    assert "step/s" in text and "step 12 epoch 1 " in text and "the same command with --resume goes on" in text
