"""wandb as it comes: offline files that hold what they should, and failures that never stop a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TESTS, run_main, summary

wandb = pytest.importorskip("wandb")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
ARGS = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", "479", "--name", "r-seed0", "--device", "cpu"]
CLEAN = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "/nonexistent", "NETRC": "/nonexistent"}


def records(directory):
    """The records of an offline run's file: after 7 bytes of header, LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as pb

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content, at, data, found = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(pb.Record())
            found[-1].ParseFromString(data)
            data = b""
    return found


def items(entries):
    return {(e.key or "/".join(e.nested_key)): json.loads(e.value_json) for e in entries}


def test_offline_files_hold_what_a_dashboard_needs(tmp_path):
    done = run_main(*ARGS, "--mode", "sampling", "--steps", 7, cwd=tmp_path, env=CLEAN)
    assert done.returncode == 0, done
    assert done.stdout.count("wandb: logging offline (no --wandb_entity)") == 1
    directory = tmp_path / "runs" / "r-seed0"
    (offline,) = directory.glob("wandb/offline-run-*")
    assert f"`wandb sync {offline.relative_to(tmp_path)}`" in done.stdout
    found = records(directory)
    (run,) = [r.run for r in found if r.HasField("run")]
    assert (run.display_name, run.run_group, run.job_type) == ("r-seed0", "r", "sampling")
    tags = {"digits", "ResNet20", "shb", "lr 0.1", "b 479", "β 0.9"}
    assert (run.project, run.entity, set(run.tags)) == ("role_of_momentum", "", tags)
    config = items(run.config.update)
    assert config["batchsize"] == 479 and config["environment"]["torch"]
    assert config["sampling_steps"] == 7 and config["full_grad_batchsize"] == 1000
    assert not {"epochs", "eps", "min_epochs", "wandb_mode", "runs_dir", "resume"} & config.keys()  # of no use here
    metrics = {m.metric.name or m.metric.glob_name: m.metric for m in found if m.HasField("metric")}
    assert metrics["*"].step_metric == "steps" and metrics["accuracy"].summary.max
    history = [items(r.history.item) for r in found if r.HasField("history")]
    (histogram,) = [h for h in history if h.get("omega/_type") == "histogram" or "omega" in h]
    assert histogram["steps"] == 7 and str(histogram).count("histogram")
    history.remove(histogram)
    assert [h["steps"] for h in history] == [3, 6, 7]
    assert {"g-norm", "ave-norm", "training_loss"} <= history[0].keys()
    assert not config.keys() & {key for h in history for key in h}  # no setting under the name of a metric
    totals = {}
    for record in found:
        totals |= items(record.summary.update)
    assert totals["status"] == "finished" and totals["noise_norm"] == pytest.approx(
        summary(directory)["results"]["noise_norm"]
    )
    assert not Path("/nonexistent").exists()


def test_the_paper_s_names_are_logged(tmp_path):
    for mode, names, ends in (
        ("normal", {"training_acc", "training_loss", "accuracy", "steps"}, {"best_accuracy", "max_gradient_norm"}),
        ("critical", {"g-norm", "ave-norm", "steps"}, {"steps_to_eps/0.5", "sfo/0.5", "mean_gradient_norm"}),
    ):
        name = f"{mode}-seed0"
        done = run_main(*ARGS, "--name", name, "--mode", mode, "--max_steps", 4, cwd=tmp_path, env=CLEAN)
        assert done.returncode == 0, done
        found = records(tmp_path / "runs" / name)
        history = [items(r.history.item) for r in found if r.HasField("history")]
        assert history and all(names <= h.keys() for h in history)
        totals = {}
        for record in found:
            totals |= items(record.summary.update)
        assert ends <= totals.keys()
        if mode == "normal":  # the last and the greatest value, also after the end
            accuracies = [h["accuracy"] for h in history]
            assert totals["accuracy"] == {"last": accuracies[-1], "max": max(accuracies)}


def test_in_a_terminal_a_missing_key_is_not_asked_for(tmp_path):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "main.py"), *ARGS, "--wandb_entity", "somebody", "--max_steps", "1"]
    env = {k: v for k, v in (os.environ | CLEAN).items() if v is not None}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, stdin=follower, stdout=follower, stderr=follower, timeout=60, check=False
    )
    os.close(follower)
    text = os.read(leader, 1 << 16).decode()
    assert done.returncode == 0 and "logging offline" in text and "choice" not in text, text


@pytest.mark.parametrize("argv", [["--wandb_mode", "online"], ["--wandb_entity", "somebody"]])
def test_online_without_a_key_falls_back_to_offline(argv, tmp_path):
    done = run_main(*ARGS, *argv, "--max_steps", 2, cwd=tmp_path, env=CLEAN)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert done.stderr.count("warning: wandb did not start in mode 'online'") == 1
    assert "wandb: logging offline" in done.stdout and list(tmp_path.glob("runs/*/wandb/offline-run-*"))


def test_the_environment_and_the_flag_are_respected(tmp_path):
    for i, (env, argv) in enumerate([("disabled", []), ("offline", ["--wandb_mode", "disabled"])]):
        flags = ["--name", f"d{i}", *argv]
        done = run_main(*ARGS, *flags, "--max_steps", 1, cwd=tmp_path, env=CLEAN | {"WANDB_MODE": env})
        assert done.returncode == 0 and "wandb" not in done.stdout + done.stderr, done
        assert not (tmp_path / "runs" / f"d{i}" / "wandb").exists()


@pytest.mark.parametrize(
    ("module", "warns"),
    [
        ("raise ImportError('No module named wandb')", "did not start"),
        ("def init(**_): raise RuntimeError('broken\\nin two lines')\nSettings = dict", "broken in two lines"),
    ],
)
def test_wandb_missing_or_broken_at_its_start(module, warns, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(module)
    env = CLEAN | {"PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{TESTS}"}
    done = run_main(*ARGS, "--max_steps", 2, cwd=tmp_path, env=env)
    assert done.returncode == 0 and warns in done.stderr and "Traceback" not in done.stderr, done
    assert done.stderr.count("\n") == 1 and summary(tmp_path / "runs" / "r-seed0")["status"] == "finished"
    done = run_main(*ARGS, "--name", "d", "--wandb_mode", "disabled", "--max_steps", 2, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stderr == ""


def test_wandb_dying_in_mid_run(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), *ARGS, "--epochs", "6"]
    env = {k: v for k, v in (os.environ | CLEAN).items() if v is not None}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "epoch 1" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    cores = [int(pid) for pid in children if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert cores
    for pid in cores:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors.count("warning: wandb failed") == 1, errors
    directory = tmp_path / "runs" / "r-seed0"
    assert summary(directory)["steps"] == 18 and len((directory / "metrics.csv").read_text().splitlines()) == 7
