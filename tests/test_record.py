"""A record that something else lays hands on: it is restored, or given up in one line, and never passes for whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import child
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, run_main, summary
from test_survival import BASE, DAMAGE, MODES, files, half_done, outcome, reference, wait_for  # noqa: F401 (a fixture)


def about(directory):
    return json.loads((directory / "args.json").read_text())


@pytest.mark.parametrize("remains", ["nothing", "another run", "another lock"])
@pytest.mark.parametrize("mode", ["normal", "critical"])
def test_a_run_whose_directory_is_replaced_writes_nothing_more(mode, remains, tmp_path):
    argv = [*BASE, "--mode", mode, "--epochs", 100_000, "--eps", 1e-9, "--checkpoint_every", 0.2]
    process = child.start(argv, tmp_path)
    directory = tmp_path / "runs" / "r"
    wait_for(tmp_path / "log", "epoch 1", process)
    if remains == "another lock":
        (directory / ".lock").unlink()
    else:
        directory.rename(tmp_path / "gone")  # at once, as rmtree is not
        shutil.rmtree(tmp_path / "gone")
    if remains != "nothing":
        directory.mkdir(exist_ok=True)
        (directory / ".lock").touch()
    before = files(directory) if remains == "another run" else None
    process.join(60)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith("error: runs/r or its .lock was deleted or replaced"), last
    assert directory.exists() == (remains != "nothing")
    if before:
        assert files(directory) == before


@pytest.mark.parametrize("kind", ["replace_metrics", "delete_metrics", "delete_args", "delete_norms"])
def test_what_is_changed_in_mid_run_is_restored(kind, reference, tmp_path):  # noqa: F811
    status, log = child.run([*BASE, *MODES["critical"]], tmp_path, kind)
    assert status == 0 and log.count("warning: something else changed") == 1, log
    assert outcome(tmp_path / "runs" / "r") == reference["critical"]
    assert about(tmp_path / "runs" / "r")["args"]["batchsize"] == 64


def test_rows_damaged_in_mid_run_do_not_condemn_the_run(reference, tmp_path):  # noqa: F811
    status, log = child.run([*BASE, *MODES["critical"]], tmp_path, "cut_metrics")
    assert status == 0 and log.count("warning: ") == 1 and "the rows so far are lost" in log, log
    ours, whole = outcome(tmp_path / "runs" / "r"), dict(reference["critical"])
    assert ours.pop("metrics") == [] and whole.pop("metrics") and ours == whole
    assert (tmp_path / "runs" / "r" / "metrics.damaged.csv").stat().st_size > 10


def test_a_history_damaged_in_mid_run_does_not_condemn_the_run(reference, tmp_path):  # noqa: F811
    status, log = child.run([*BASE, *MODES["critical"]], tmp_path, "cut_norms")
    assert status == 0 and log.count("warning: ") == 1 and "nan for the 430 steps" in log, log
    directory = tmp_path / "runs" / "r"
    assert summary(directory)["results"] == reference["critical"]["summary"]["results"]
    norms = np.fromfile(directory / "gradient_norms.f32", "<f4")
    assert len(norms) == 430 and np.isnan(norms).all()
    before = files(directory)
    argv = [*BASE, *MODES["critical"], "--resume", "--eps", 0.7, "--max_steps", 500]
    status, log = child.run(argv, tmp_path)
    assert status == 2 and "error: argument --resume" in log and "--eps [0.7]" in log and "Traceback" not in log, log
    after = files(directory)
    assert {k: v for k, v in before.items() if k != "gradient_norms.f32"} == {
        k: v for k, v in after.items() if k != "gradient_norms.f32"
    }


def test_a_history_changed_between_two_parts_is_found_by_its_checksum(reference, tmp_path):  # noqa: F811
    directory = half_done(tmp_path, "critical")
    DAMAGE["garbled"](directory / "gradient_norms.f32")
    found = (directory / "gradient_norms.f32").read_bytes()
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 0 and log.count("warning: ") == 1 and "nan for the 138 steps" in log, log
    assert (directory / "gradient_norms.damaged.f32").read_bytes() == found
    whole = np.frombuffer(reference["critical"]["gradient_norms.f32"], "<f4")
    ours = np.fromfile(directory / "gradient_norms.f32", "<f4")
    assert np.isnan(ours[:138]).all() and (ours[138:] == whole[138:]).all()
    assert summary(directory)["results"] == reference["critical"]["summary"]["results"]


def test_omega_lost_before_the_end_is_measured_again(reference, tmp_path):  # noqa: F811
    status, log = child.run([*BASE, *MODES["sampling"]], tmp_path, "lose_omega")
    assert status == 1 and "--resume measures ω again" in log.splitlines()[-1], log
    assert not (tmp_path / "runs" / "r" / "summary.json").exists()
    assert child.run([*BASE, *MODES["sampling"], "--resume"], tmp_path)[0] == 0
    assert outcome(tmp_path / "runs" / "r") == reference["sampling"]


def test_each_part_of_a_run_keeps_its_environment(tmp_path):
    directory = half_done(tmp_path, "normal")
    argv = [*BASE, *MODES["normal"], "--resume"]
    status, log = child.run(argv, tmp_path, "signal_at=100")
    assert status == 143 and "warning" not in log, log
    begun = [int(step) for step in re.findall(r"stopped after step (\d+)", (tmp_path / "log").read_text())]
    status, log = child.run([*argv, "--epochs", 12], tmp_path, "threads=2")
    assert status == 0 and log.count("warning: ") == 1 and "threads 2 (was 1)" in log, log
    parts = about(directory)["environments"]
    assert [(p["first_step"], p["threads"]) for p in parts] == [(0, 1), (begun[0], 1), (begun[1], 2)]
    assert all(p["torch"] and p["device"] == "cpu" and "git_commit" in p for p in parts)
    content = about(directory) | {"environment": parts[0]}  # as it was before there were parts
    del content["environments"], content["wandb_id"], content["data_checksum"]
    (directory / "args.json").write_text(json.dumps(content))
    assert child.run(argv, tmp_path)[0] == 0
    assert [p["first_step"] for p in about(directory)["environments"]] == [0, 276]


def test_a_part_that_left_nothing_is_not_kept(tmp_path):
    directory = tmp_path / "runs" / "r"
    for _ in range(2):  # killed before its first checkpoint
        process = child.start([*BASE, "--epochs", 100_000, "--resume"], tmp_path)
        wait_for(tmp_path / "log", "epoch 1", process)
        process.kill()
        process.join()
        (tmp_path / "log").unlink()
        assert [p["first_step"] for p in about(directory)["environments"]] == [0]


def test_other_data_is_refused_and_nothing_is_written(tmp_path):
    directory = half_done(tmp_path, "normal")
    before = files(directory)
    status, log = child.run([*BASE, *MODES["normal"], "--resume"], tmp_path, "other_pixels")
    assert status == 2 and "error: argument --resume" in log and "other data than lies in --data_dir data" in log, log
    assert str(about(directory)["data_checksum"]) in log and files(directory) == before


def test_a_file_system_without_locks_is_a_warning(reference, tmp_path):  # noqa: F811
    status, log = child.run([*BASE, *MODES["critical"]], tmp_path, "no_locks")
    assert status == 0 and log.count("warning: runs/r cannot be locked (No locks available)") == 1, log
    assert outcome(tmp_path / "runs" / "r") == reference["critical"]


def test_too_little_memory_is_one_line(tmp_path):
    status, log = child.run([*BASE, "--batchsize", 1437], tmp_path, f"memory={40 << 20}")
    assert status == 1 and log.splitlines()[-1].startswith("error: ") and "Traceback" not in log, log


def test_a_first_checkpoint_that_fails_promises_nothing(tmp_path):
    status, log = child.run([*BASE, "--checkpoint_every", 0], tmp_path, "file_limit=9000")
    assert status == 1 and "there is none before it" in log.splitlines()[-1], log


def test_a_copy_is_another_run_of_its_own(reference, tmp_path):  # noqa: F811
    directory = half_done(tmp_path, "critical")
    shutil.copytree(directory, directory.with_name("copy"))
    argv = [*BASE, *MODES["critical"], "--resume"]
    processes = [child.start([*argv, "--name", name], tmp_path) for name in ("r", "copy")]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    ours, copy = outcome(directory), outcome(directory.with_name("copy"))
    assert ours == reference["critical"] and copy["checkpoint"] == ours["checkpoint"]
    assert about(directory)["wandb_id"] != about(directory.with_name("copy"))["wandb_id"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_wandb_does_not_bury_the_error_of_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        (tmp_path / "fill").write_bytes(bytes(570 << 10))
        done = child.run([*BASE, "--wandb_mode", "offline", "--checkpoint_every", 0, "--epochs", 100], tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    status, log = done
    assert status == 1 and "No space left on device" in log, log
    lines = [line for line in log.splitlines() if not line.startswith("step ")]
    assert lines[-1].startswith("error: ") and len(lines) < 6 and "Traceback" not in log, log


NESTED = "[" * 200_000


@pytest.mark.parametrize("content", [NESTED, '{"args": ' + NESTED, "[]", "null", '{"status": []}'])
def test_a_summary_that_holds_something_else(content, reference, tmp_path):  # noqa: F811
    directory = half_done(tmp_path, "critical")
    for name in ("summary.json", "args.json"):
        (directory / name).write_text(content)
    done = run_main(*BASE, *MODES["critical"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: argument --name"), done
    assert child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)[0] == 0
    assert outcome(directory) == reference["critical"]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    directory = half_done(tmp_path, "normal")
    for name in ("summary.json", "args.json", "checkpoint.previous.pt"):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
    status, log = child.run([*BASE, *MODES["normal"], "--resume"], tmp_path)
    assert status == 0 and "summary.json is damaged (it is no regular file)" in log, log


QUICK = "--device cpu --dataset digits --model ResNet20 --batchsize 1437 --max_steps 1 --name q"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    """The next file opened must not get their numbers, and what is printed there."""
    command = f"{sys.executable} {ROOT / 'main.py'} {QUICK}"
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], cwd=tmp_path, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and summary(tmp_path / "runs" / "q")["status"] == "finished"
    assert (tmp_path / "runs" / "q" / ".lock").read_bytes() == b""


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_stdout_that_is_not_utf8(env, tmp_path):
    argv = [*QUICK.split(), "--runs_dir", "ün-ε"]
    done = run_main(*argv, cwd=tmp_path, env=env | {"PYTHONCOERCECLOCALE": "0"}, device=None)
    assert done.returncode == 0 and "finished after 1 steps" in done.stdout and done.stderr == "", done


def test_a_signal_after_the_end_is_not_swallowed():
    """Once all is written, one SIGTERM ends the process: wandb may hang."""
    import utils

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        utils.Signals().forget()
        assert {signal.getsignal(s) for s in before} == {signal.SIG_DFL}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
