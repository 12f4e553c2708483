"""wandb: offline files that hold what they should, whatever was killed, and failures that never stop a run."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import child
import numpy as np
import pytest
from child import BASE, MODES, about, outcome, wait_for
from conftest import PATIENCE, summary

import arguments
from training import dashboard
from training.record import MEASUREMENTS

wandb = pytest.importorskip("wandb")
CLEAN = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "/nonexistent", "NETRC": "/nonexistent"}
OFFLINE = {"WANDB_MODE": "offline"}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def records(directory):
    """The records in the one offline file of a run: after 7 bytes, LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content, at, data, found = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B") and path.parent.name.endswith(about(directory)["wandb_id"])
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(data))
            data = b""
    return found


def items(entries):
    """Without wandb's own, which begin with _."""
    named = {(e.key or "/".join(e.nested_key)): json.loads(e.value_json) for e in entries}
    return {key: value for key, value in named.items() if key[0] != "_"}


def logged(directory):
    """Its rows, and what its summary ends with."""
    found, totals = records(directory), {}
    for record in found:
        totals |= items(record.summary.update)
    return [items(r.history.item) for r in found if r.HasField("history")], totals


def test_offline_files_hold_what_a_dashboard_needs(tmp_path):
    status, log = child.run([*BASE, *MODES["sampling"], "--name", "r-seed0"], tmp_path, **CLEAN)
    assert status == 0 and log.count("wandb: logging offline (no --wandb_entity)") == 1, log
    directory = tmp_path / "runs" / "r-seed0"
    (offline,) = directory.glob("wandb/offline-run-*")
    assert log.splitlines()[-1] == f"wandb: to upload this run, `wandb sync {offline.relative_to(tmp_path)}`"
    found = records(directory)
    (run,) = [r.run for r in found if r.HasField("run")]
    assert (run.display_name, run.run_group, run.job_type, run.entity) == ("r-seed0", "r", "sampling", "")
    assert run.project == "role_of_momentum"
    assert set(run.tags) == {"digits", "ResNet20", "shb", "lr 0.02", "b 64", "β 0.9"}
    config = items(run.config.update)
    assert config["sampling_steps"] == [0, 100, 310] and config["environment"]["torch"]
    assert not {"epochs", "eps", "min_epochs", "wandb_mode", "runs_dir", "resume"} & config.keys()  # of no use here
    metrics = {m.metric.name or m.metric.glob_name: m.metric for m in found if m.HasField("metric")}
    assert metrics["*"].step_metric == "steps"
    rows, totals = logged(directory)
    assert rows[0].keys() >= {"steps", "noise/delta", "noise_norm", "accuracy"} and rows[0]["steps"] == 0
    assert rows[-1].keys() >= {"g-norm", "ave-norm", "training_loss", "noise/delta", "variance/c_squared_se"}
    assert any("omega" in key for key in rows[-1]) and rows[-1]["steps"] == 310
    assert not config.keys() & {key for row in rows for key in row}  # no setting under the name of a metric
    results = summary(directory)["results"]
    assert totals["status"] == "finished" and totals["noise/delta"] == results["delta"] == rows[-1]["noise/delta"]
    assert set(totals) - set(rows[-1]) <= {"status", "max_gradient_norm", "omega"}  # nothing stands there twice


def test_a_run_killed_twice_has_every_row_once_in_one_directory(tmp_path):
    """The second kill comes before the first part's rows are in the second one's file."""
    directory, whole = tmp_path / "runs" / "r", tmp_path / "runs" / "whole"
    argv = [*BASE, *MODES["sampling"], "--resume"]
    for at in (150, 1):
        status, log = child.run([*argv, "--checkpoint_every", 0.02], tmp_path, f"kill_at={at}", **OFFLINE)
        assert status == -signal.SIGKILL, log
    assert len(list(directory.glob("wandb/offline-run-*"))) == 2
    for name in ("r", "whole"):
        status, log = child.run([*argv, "--name", name], tmp_path, **OFFLINE)
        assert status == 0 and "warning" not in log, log
    (rows, totals), (expected, ends) = logged(directory), logged(whole)
    for row in [*rows, *expected]:
        row.pop("seconds", None)
    assert rows == expected and totals.keys() == ends.keys()
    steps = {int(row["steps"]) for row in outcome(directory)["metrics.csv"]}
    assert [row["steps"] for row in rows] == sorted(steps | {0})


def fake_dashboard(monkeypatch, directory, steps, *argv):
    """A Dashboard whose wandb run is online, and has rows up to a step; and what it is told."""
    told = SimpleNamespace(dir=str(directory / "x" / "files"), settings=SimpleNamespace(mode="online"), rows=[])
    told.summary, told.log, told.finish = {"steps": steps}, told.rows.append, lambda exit_code: None
    monkeypatch.setattr(dashboard, "start_wandb", lambda *arguments: told)
    args = arguments.parse([str(word) for word in [*BASE, *argv]])
    return dashboard.Dashboard(args, directory, {}, "x"), told


def test_online_only_what_wandb_has_not_yet_is_logged(monkeypatch, tmp_path, capsys):
    offline = tmp_path / "wandb" / "offline-run-1-x"  # may not have been uploaded
    offline.mkdir(parents=True)
    board, told = fake_dashboard(monkeypatch, tmp_path, 2)
    board.replay([{"steps": str(n), "epoch": "0.5", "accuracy": ""} for n in (1, 2, 3)], [], {})
    board.log({"steps": 4, "epoch": 2.0, "accuracy": 50.0}, [])
    board.log_results("finished", {"steps_to_eps": {"0.5": 7, "0.1": None}, "draws": 2, "delta": 0.5})
    board.close(0)
    assert told.rows == [{"steps": 3, "epoch": 0.5}, {"steps": 4, "epoch": 2.0, "accuracy": 50.0}]
    results = {"status": "finished", "steps_to_eps/0.5": 7, "steps_to_eps/0.1": None, "noise/delta": 0.5}
    assert offline.exists()
    assert told.summary == {"steps": 2} | results and "wandb sync" not in capsys.readouterr().out


def test_a_step_is_one_row_with_all_that_was_measured_there(monkeypatch, tmp_path):
    def measured(**cells):
        where = {"steps": 3, "epoch": 1.5, "batchnorm": "train", "batch_size": 64, "layer": "all"}
        return dict.fromkeys(MEASUREMENTS) | where | cells

    argv = ["--mode", "sampling", "--measure_batchnorm", "eval", "train", "--draws", 4, "--draw_batchsizes", 8]
    board, told = fake_dashboard(monkeypatch, tmp_path, -1, *argv)
    rows = [
        measured(batchnorm="eval", delta=1.0, variance=2.0, variance_se=0.1, draws=4, accuracy=50.0),
        measured(batchnorm="eval", layer="conv", hill=3.0),
        measured(batchnorm="eval", batch_size=8, delta=4.0, variance=5.0),
        measured(noise_norm=6.0, delta_as_shb=7.0, delta_as_nshb=8.0),
        measured(batch_size=8, variance=9.0),
    ]
    board.log({"steps": 3, "epoch": 1.5, "g-norm": 10.0, "test_loss": None}, rows, np.arange(5.0))
    board.log({}, [measured(steps=5)])
    with pytest.raises(KeyError):
        board.log({"steps": 6, "epoch": 3.0, "undeclared": 1.0}, [])
    board.close(0)
    assert told.rows[0].pop("omega").histogram
    keys = {"noise/delta": 1.0, "variance/variance": 2.0, "variance/variance_se": 0.1, "variance/variance_b8": 5.0}
    keys |= {"noise_norm_train": 6.0, "noise/delta_as_nshb_train": 8.0, "variance/variance_b8_train": 9.0}
    first = {"steps": 3, "epoch": 1.5, "g-norm": 10.0, "accuracy": 50.0} | keys
    assert told.rows == [first, {"steps": 5, "epoch": 1.5}]


def test_online_without_a_key_falls_back_to_offline_and_asks_nothing(tmp_path):
    leader, follower = os.openpty()
    argv, seen = [*BASE, "--wandb_entity", "somebody", "--max_steps", 2], ""
    process = child.start(argv, tmp_path, "terminal", os.ttyname(follower), **CLEAN)
    while "wandb sync" not in seen:
        seen += os.read(leader, 4096).decode()
        assert "choice" not in seen and "Traceback" not in seen, seen
    process.join(PATIENCE)
    assert process.exitcode == 0 and seen.count("warning: wandb did not start in mode 'online'") == 1, seen
    assert "wandb: logging offline\r\n" in seen and list(tmp_path.glob("runs/*/wandb/offline-run-*"))


def test_the_environment_and_the_flag_are_respected(tmp_path):
    for name, mode, argv in (("a", "disabled", []), ("b", "offline", ["--wandb_mode", "disabled"])):
        argv = [*BASE, *argv, "--name", name, "--max_steps", 1]
        status, log = child.run(argv, tmp_path, **CLEAN | {"WANDB_MODE": mode})
        assert status == 0 and "wandb" not in log and not (tmp_path / "runs" / name / "wandb").exists(), log
    for sweep in ("a-sweep", None):  # without one, the id is a shell's, and would be that of all its runs
        env = OFFLINE | {"WANDB_RUN_ID": "given", "WANDB_SWEEP_ID": sweep}
        status, log = child.run([*BASE, "--max_steps", 1, "--name", f"of-{sweep}"], tmp_path, **env)
        assert status == 0 and log.endswith("-given`\n") == bool(sweep), log


@pytest.mark.parametrize("module", ["raise ImportError", "Settings = dict\ndef init(**_): raise OSError('a\\nb')"])
def test_wandb_missing_or_broken_at_its_start(module, tmp_path):
    (tmp_path / "wandb.py").write_text(module)
    status, log = child.run([*BASE, "--max_steps", 2], tmp_path, f"import_from={tmp_path}", **OFFLINE)
    assert status == 0 and log.count("warning: wandb did not start") == 1 and "Traceback" not in log, log


@linux
def test_wandb_dying_in_mid_run(tmp_path):
    process, log = child.start([*BASE, "--epochs", 100_000], tmp_path, **OFFLINE), tmp_path / "log"
    wait_for(log, "epoch 1 ", process)
    for core in child.cores(process.pid):
        os.kill(core, signal.SIGKILL)
    wait_for(log, "warning: wandb failed", process)
    wait_for(log, f"epoch {log.read_text().count(' epoch ') + 2} ", process)
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 143 and log.read_text().count("warning: ") == 1, log.read_text()
    assert "Traceback" not in log.read_text()


@linux
@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0), (600, -signal.SIGTERM)])
def test_a_wandb_that_hangs_at_the_end_is_left_to_itself(limit, expected, tmp_path):
    """After FINISH_LIMIT, or at one SIGTERM."""
    process = child.start([*BASE, "--max_steps", 3], tmp_path, f"wandb_hangs={limit}", **OFFLINE)
    wait_for(tmp_path / "log", "finished after 3 steps", process)
    while limit == 600 and process.is_alive():  # the first may come before the end of the results, and is remembered
        process.terminate()
        time.sleep(0.05)
    process.join(PATIENCE)
    log = (tmp_path / "log").read_text()
    for core in re.findall(r"^stopped (\d+)$", log, re.MULTILINE):
        os.kill(int(core), signal.SIGKILL)
    assert process.exitcode == expected and summary(tmp_path / "runs" / "r")["status"] == "finished", log
    assert expected or re.search("warning: wandb has not ended after 0.5 s.*`wandb sync ", log, re.DOTALL), log
