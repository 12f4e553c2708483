"""wandb as it comes: offline files that hold what they should, and failures that never stop a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import child
import pytest
from conftest import PATIENCE, ROOT, TESTS, run_main, summary
from test_survival import wait_for

wandb = pytest.importorskip("wandb")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
ARGS = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", "479", "--name", "r-seed0", "--device", "cpu"]
CLEAN = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "/nonexistent", "NETRC": "/nonexistent"}


def records(directory):
    """The records of an offline run's file: after 7 bytes of header, LevelDB's log format, in blocks of 32 KiB."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    return records_in(path)


def records_in(path):
    from wandb.proto import wandb_internal_pb2 as pb

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
    run_id = json.loads((directory / "args.json").read_text())["wandb_id"]
    command = f"`wandb sync {directory.relative_to(tmp_path)}/wandb/offline-run-*-{run_id}`"
    assert done.stdout.splitlines()[-1] == f"wandb: to upload this run, {command}"
    assert offline.name.endswith(f"-{run_id}")
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
        command, cwd=tmp_path, env=env, stdin=follower, stdout=follower, stderr=follower, timeout=PATIENCE, check=False
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


TINY = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--name", "r", "--wandb_mode", "offline"]
TINY += ["--device", "cpu"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_wandb_dying_in_mid_run(tmp_path):
    process, log = child.start([*TINY, "--epochs", 100_000], tmp_path), tmp_path / "log"
    wait_for(log, "epoch 1 ", process)
    for core in child.cores(process.pid):
        os.kill(core, signal.SIGKILL)
    wait_for(log, "warning: wandb failed", process)
    epoch = log.read_text().count(" epoch ") + 2  # beyond the one that is being written now
    wait_for(log, f"epoch {epoch} ", process)
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 143 and log.read_text().count("warning: ") == 1, log.read_text()
    assert len((tmp_path / "runs" / "r" / "metrics.csv").read_text().splitlines()) >= epoch + 1
    assert "Traceback" not in log.read_text()


def steps_in(path):
    found = [items(r.history.item) for r in records_in(path) if r.HasField("history")]
    return [row["steps"] for row in found if "steps" in row]


def test_a_run_killed_twice_is_one_wandb_run_with_each_row_once(tmp_path):
    directory = tmp_path / "runs" / "r"
    for part in (1, 2):
        process = child.start([*TINY, "--epochs", 100_000, "--resume", "--checkpoint_every", 0.5], tmp_path)
        wait_for(tmp_path / "log", f"epoch {40 * part} ", process)
        process.kill()
        process.join()
    epochs = int((directory / "metrics.csv").read_text().splitlines()[-1].split(",")[0]) // 23 + 20
    torn = min(directory.glob("wandb/offline-run-*/run-*.wandb"))
    with open(torn, "ab") as file:  # as a kill leaves it in the middle of a record
        file.write(b"\0\0\0\0\xff\x0f\x01 the rest is missing")
    status, log = child.run([*TINY, "--epochs", epochs, "--resume"], tmp_path)
    assert status == 0 and "warning" not in log, log
    parts = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    run_id = json.loads((directory / "args.json").read_text())["wandb_id"]
    assert len(parts) == 3 and {path.name for path in parts} == {f"run-{run_id}.wandb"}
    assert f"offline-run-*-{run_id}`" in log.splitlines()[-1]
    for path in parts:
        (run,) = [r.run for r in records_in(path) if r.HasField("run")]
        assert run.run_id == run_id and run.resume  # `wandb sync` appends to what it has of such a run
    assert [step for path in parts for step in steps_in(path)] == [23 * (n + 1) for n in range(epochs)]
    assert b"the rest is missing" not in parts[0].read_bytes()


def test_what_the_wandb_core_of_a_killed_run_still_writes_is_not_logged_twice(tmp_path):
    """It has the file open, and may write all it has been told after the next part has read the file."""
    process = child.start([*TINY, "--epochs", 100_000, "--resume", "--checkpoint_every", 0.5], tmp_path)
    parts = tmp_path / "runs" / "r" / "wandb"
    deadline = time.monotonic() + PATIENCE
    while not any(b"g-norm" in path.read_bytes() for path in parts.glob("offline-run-*/run-*.wandb")):
        assert process.is_alive() and time.monotonic() < deadline  # wandb-core writes when it likes
        time.sleep(0.01)
    process.kill()
    process.join()
    (path,) = parts.glob("offline-run-*/run-*.wandb")
    with open(path, "ab") as held:
        epochs = int((tmp_path / "runs" / "r" / "metrics.csv").read_text().splitlines()[-1].split(",")[0]) // 23 + 20
        status, log = child.run([*TINY, "--epochs", epochs, "--resume"], tmp_path)
        records_again = path.read_bytes()[7:]
        held.write(records_again)
    assert status == 0 and b"g-norm" in records_again, log
    paths = sorted(parts.glob("offline-run-*/run-*.wandb"))
    assert [step for path in paths for step in steps_in(path)] == [23 * (n + 1) for n in range(epochs)]


def test_a_wandb_agent_s_id_is_taken(tmp_path, monkeypatch):
    done = run_main(*ARGS, "--max_steps", 1, cwd=tmp_path, env=CLEAN | {"WANDB_RUN_ID": "of-the-sweep"})
    assert done.returncode == 0 and "/offline-run-*-of-the-sweep`" in done.stdout, done


HANGING = """if True:
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import arguments, child, conftest, dashboard, main, models, record
    models.build = lambda name, num_classes: conftest.Tiny(num_classes)
    dashboard.FINISH_LIMIT = {limit}
    finish = record.Record.finish
    def stopping(*arguments):
        child.stop_core()
        finish(*arguments)
    record.Record.finish = stopping
    sys.exit(main.run_and_report(arguments.parse({argv!r})))
"""


def hanging(tmp_path, limit):
    argv = [str(a) for a in [*TINY, "--max_steps", 3]]
    program = HANGING.format(root=str(ROOT), tests=str(TESTS), limit=limit, argv=argv)
    with open(tmp_path / "log", "wb") as log:  # not a pipe, which the stopped wandb-core would keep open
        return subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=log, stderr=log)


@pytest.fixture
def no_core_left(tmp_path):
    yield
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"wandb-core" in (path / "cmdline").read_bytes() and Path(os.readlink(path / "cwd")) == tmp_path:
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_wandb_that_hangs_at_the_end_is_left_to_itself(tmp_path, no_core_left):
    process = hanging(tmp_path, limit=0.5)
    assert process.wait(PATIENCE) == 0
    log = (tmp_path / "log").read_text().splitlines()
    assert log[-2].startswith("warning: wandb has not ended after 0.5 s") and "`wandb sync " in log[-1], log
    assert any(line.startswith("finished after 3 steps") for line in log[:-2])
    assert summary(tmp_path / "runs" / "r")["status"] == "finished"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_one_sigterm_ends_a_run_that_waits_for_wandb(tmp_path, no_core_left):
    process = hanging(tmp_path, limit=600)
    while "max_gradient_norm" not in (tmp_path / "log").read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    while process.poll() is None:  # the first may come before the end of the results, and is remembered
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait() == -signal.SIGTERM and summary(tmp_path / "runs" / "r")["status"] == "finished"
