"""A run that is killed, stopped, damaged or crowded out ends with the files of one that was left alone."""

import fcntl
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import PATIENCE, ROOT, Evil, run_main, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child
from child import BASE, MODES, files, half_done, outcome, reference, wait_for


def written(path):
    """When, in nanoseconds; 0 where there is no file, if only between two renames."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(("mode", "interval"), [("normal", 0), ("critical", 0.02), ("sampling", 0.1)])
def test_sigkill_at_random_moments(mode, interval, tmp_path):
    rng = random.Random(mode)
    argv, landed = [*BASE, *MODES[mode], "--resume"], 0
    checkpoint = tmp_path / "runs" / "r" / "checkpoint.pt"
    for _ in range(4):
        before = written(checkpoint)
        process = child.start([*argv, "--checkpoint_every", interval], tmp_path)
        # A kill while it is still setting up would test nothing: wait for its first checkpoint.
        while process.is_alive() and written(checkpoint) in (0, before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))  # on a machine ten times as fast, too, far from the end
        landed += process.is_alive()
        process.kill()
        process.join()
    status, log = child.run(argv, tmp_path)
    assert status == 0 and landed, log
    assert outcome(tmp_path / "runs" / "r") == reference(mode)


@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        ("sampling", "die_in_write=3"),
        ("critical", "die_at_rename=checkpoint.previous.pt,1"),
        ("critical", "die_at_rename=checkpoint.pt,3"),
        ("sampling", "die_at_rename=summary.json,1"),
        ("normal", "kill_at=200"),  # with rows behind the last checkpoint
        ("sampling", "kill_at=200"),
        ("normal", "signal_at=1"),  # in the measurement before the first step
        ("normal", "signal_at=200"),
        ("critical", "signal_at=230"),  # the end of an epoch
        ("sampling", "signal_at=350"),  # in the last measurement
    ],
)
def test_kills_and_signals_at_the_worst_moments(mode, moment, tmp_path):
    argv = [*BASE, *MODES[mode], "--resume"]
    if "kill" in moment:
        half_done(tmp_path, mode, at=90)
    status, log = child.run([*argv, "--checkpoint_every", 0.005 if "die" in moment else 300], tmp_path, moment)
    expected = (143, True) if "signal" in moment else (-signal.SIGKILL, False)
    assert (status, "--resume goes on" in log) == expected, log
    assert "error" not in log and not (tmp_path / "runs" / "r" / "summary.json").exists()
    status, log = child.run(argv, tmp_path)
    assert status == 0 and "resumed at step" in log and "warning" not in log, log
    assert outcome(tmp_path / "runs" / "r") == reference(mode)


def test_a_second_signal_ends_at_once(tmp_path):
    process = child.start([*BASE, "--epochs", 100_000], tmp_path, "slow_write")
    wait_for(tmp_path / "log", "epoch 2", process)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(tmp_path / "log", "writing", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGTERM  # or else the checkpoint would have been written, and this be 143


def test_a_terminal_shows_a_progress_bar_and_ctrl_c_stops_the_run(tmp_path):
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, bytes([24, 0, 100, 0, 0, 0, 0, 0]))  # 24 lines of 100 letters
    process = child.start([*BASE, "--epochs", 1000], tmp_path, log=os.ttyname(follower))
    seen = b""
    while not re.search(rb"\b\d{3,}/23000 .*step/s", seen):
        seen += os.read(leader, 4096)
    os.kill(process.pid, signal.SIGINT)
    while b"goes on" not in seen:
        seen += os.read(leader, 4096)
    process.join(PATIENCE)
    step = torch.load(tmp_path / "runs" / "r" / "checkpoint.pt", weights_only=True)["step"]
    assert process.exitcode == 130 and f"stopped after step {step}, with a checkpoint" in seen.decode()
    assert "step 23 epoch 1 training_loss" in seen.decode()


@pytest.mark.parametrize(("ignored", "status"), [("", 129), ("trap '' INT HUP; ", 0)])
def test_a_terminal_that_closes_leaves_a_checkpoint_and_what_is_ignored_stays_so(
    ignored, status, tmp_path, mnist1d_dir
):
    """As under nohup in the background of a script; printing to the terminal that is gone is no trouble."""
    leader, follower = os.openpty()
    argv = ["--device=cpu", "--dataset=mnist1d", "--model=MLP", f"--data_dir={mnist1d_dir}"]
    argv.append(f"--max_steps={4000 if ignored else 25000}")  # what is to be stopped must not end before, under load
    command = shlex.join([sys.executable, str(ROOT / "main.py"), *argv, "--batchsize=32", "--name=r"])
    options = dict.fromkeys(("stdin", "stdout", "stderr"), follower) | {"cwd": tmp_path}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    process = subprocess.Popen(["bash", "-c", f"{ignored}exec {command}"], **options)
    os.close(follower)
    while b"epoch 2 " not in os.read(leader, 4096):
        pass
    os.close(leader)
    for signum in (signal.SIGHUP, signal.SIGINT)[: 1 + bool(ignored)]:
        process.send_signal(signum)
    assert process.wait(PATIENCE) == status
    assert (tmp_path / "runs" / "r" / "checkpoint.pt").exists()
    assert (tmp_path / "runs" / "r" / "summary.json").exists() == (status == 0)


def test_ctrl_c_while_torch_loads_is_no_traceback(tmp_path):
    """At the one moment that is certain to be there: a torch that presses Ctrl-C as it is loaded."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('not stopped')\n")
    env = {"PYTHONPATH": os.pathsep.join([str(fake), os.environ["PYTHONPATH"]])}
    done = run_main("--dataset", "digits", "--model", "ResNet20", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def garble(path):
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["linear.weight"].numpy().tobytes()
    content[content.index(weights) + 1] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(("mode", "damage"), [("normal", garble), ("critical", lambda path: os.truncate(path, 5000))])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(mode, damage, tmp_path):
    directory = half_done(tmp_path, mode, "--checkpoint_every", 0.02)
    damage(directory / "checkpoint.pt")
    argv, kill = [*BASE, *MODES[mode], "--resume"], "die_at_rename=checkpoint.previous.pt,1"
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, kill)  # the good one outlives the next write
    assert status == -signal.SIGKILL and log.count("warning: ") == 1 and "checkpoint.pt is damaged" in log, log
    status, log = child.run(argv, tmp_path)
    assert status == 0 and "resumed at step" in log and "warning" not in log, log
    assert outcome(directory) == reference(mode)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: garble(d / "checkpoint.pt"), "no good checkpoint in"),
        (lambda d: torch.save({"model": Evil()}, d / "checkpoint.pt"), "no good checkpoint in"),
        (lambda d: torch.save({"format": 4, "step": 3}, d / "checkpoint.pt"), "another version"),
        (lambda d: os.truncate(d / "metrics.csv", 100), "metrics.csv holds 100 bytes"),
        (lambda d: (d / "gradient_norms.f32").unlink(), "gradient_norms.f32 holds 0 bytes"),
    ],
)
def test_what_cannot_be_continued_is_one_line_and_nothing_is_lost(spoil, said, tmp_path):
    directory = half_done(tmp_path, "critical")
    (directory / "checkpoint.previous.pt").write_bytes(b"oops")
    spoil(directory)
    before = files(directory)
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 2 and log.startswith("error: argument --resume: ") and log.count("\n") == 1 and said in log, log
    assert files(directory) == before and not (tmp_path / "pwned").exists()


def test_a_full_disk(tmp_path):
    directory = half_done(tmp_path, "critical")
    good, argv = (directory / "checkpoint.pt").read_bytes(), [*BASE, *MODES["critical"], "--resume"]
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, f"file_limit={len(good) // 2}")
    assert status == 1 and log.splitlines()[-1].startswith("error: no checkpoint could be written"), log
    assert "File too large" in log and "Traceback" not in log, log
    assert (directory / "checkpoint.pt").read_bytes() == good and not (directory / ".checkpoint.pt.tmp").exists()
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert outcome(directory) == reference("critical")


def test_a_finished_run_is_left_alone(tmp_path):
    argv = [*BASE, *MODES["critical"], "--resume"]
    assert child.run(argv, tmp_path)[0] == 0
    before = [(p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*")]
    status, log = child.run(argv, tmp_path)
    assert status == 0 and "not_reached already, after 430 steps" in log
    assert [(p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*")] == before
    (tmp_path / "runs" / "r" / "checkpoint.pt").unlink()
    status, log = child.run([*argv, "--max_steps", 500], tmp_path)
    assert status == 2 and "its checkpoint is gone" in log, log


def test_a_diverged_run_stays_diverged(tmp_path):
    for said in ("diverged after", "diverged already"):
        status, log = child.run([*BASE, "--lr", 1e38, "--optimizer", "sgd", "--resume"], tmp_path)
        assert status == 3 and said in log, log


@pytest.mark.parametrize(("mode", "caps"), [("normal", [115, 200]), ("critical", [30, 41]), ("sampling", [30])])
def test_a_raised_cap_leaves_no_trace(mode, caps, tmp_path):
    """Whether it fell at the end of an epoch, of a window, or anywhere else."""
    argv = [*BASE, *MODES[mode], "--resume"]
    for cap in caps:
        status, log = child.run([*argv, "--max_steps", cap], tmp_path)
        assert status == 0 and summary(tmp_path / "runs" / "r")["steps"] == cap, log
    status, log = child.run(argv, tmp_path)
    assert status == 0 and f"resumed at step {caps[-1]}" in log, log
    assert outcome(tmp_path / "runs" / "r") == reference(mode)


@pytest.mark.parametrize(
    ("first", "then", "kills"),
    [
        ([0.9], 0.6, ""),  # trains on
        ([0.6, 0.01], 0.9, ""),  # is in the history; 0.01 had not been reached, and is not asked again
        ([2.0], 0.01, "die_in_write=3"),
    ],
)
def test_a_further_eps_gives_the_record_of_one_run_with_all(first, then, kills, tmp_path):
    argv = [*BASE, "--mode", "critical", "--min_epochs", 2, "--max_steps", 430, "--resume"]
    every = [*first, then]
    assert child.run([*argv, "--eps", *every], tmp_path / "whole")[0] == 0
    assert child.run([*argv, "--eps", *first], tmp_path)[0] == 0
    if kills:
        child.run([*argv, "--eps", then, "--checkpoint_every", 0.005], tmp_path, kills)
    status, log = child.run([*argv, "--eps", then], tmp_path)
    assert status == 0 and "warning" not in log, log
    assert outcome(tmp_path / "runs" / "r") == outcome(tmp_path / "whole" / "runs" / "r")
    status, log = child.run([*argv, "--eps", *every], tmp_path)
    assert status == 0 and " already, after " in log, log


@pytest.mark.parametrize("ended", [True, False])
def test_other_arguments_and_other_data_are_refused_and_nothing_changes(ended, tmp_path):
    """A lower cap would leave a record that says less than was done."""
    directory, argv = half_done(tmp_path, "normal"), [*BASE, *MODES["normal"]]
    assert not ended or child.run([*argv, "--resume"], tmp_path)[0] == 0
    step = torch.load(directory / "checkpoint.pt", weights_only=True)["step"]
    before, state = files(directory), "finished" if ended else "unfinished"
    for given, said in (
        (["--resume", "--lr", 0.5], "--lr 0.5 (was 0.02); give the same"),
        (["--resume", "--measure_every", 3], "--measure_every 3.0 (was 4.0)"),
        (["--resume", "--epochs", 4], f"is at step {step} already, beyond --epochs 4;"),
        (["--resume", "--max_steps", 99], f"is at step {step} already, beyond --max_steps 99;"),
        (["--resume", "--epochs", 15], "other data than --data_dir data has"),
        ([], f"argument --name: runs/r exists already ({state}); --resume continues it"),
    ):
        status, log = child.run([*argv, *given], tmp_path, "other_pixels")
        assert status == 2 and log.startswith("error: argument --") and log.count("\n") == 1 and said in log, log
    assert files(directory) == before
