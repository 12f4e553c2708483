"""The directory of a run: whose it is, what it says of its parts, and how trouble with it ends: in one line."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child
from child import BASE, MODES, about, files, half_done, outcome, reference, wait_for

import arguments
from training.record import MEASUREMENTS, METRICS, Growing, Rows, read_summary, run_state
from utils import UserError


def test_one_owner(tmp_path):
    process = child.start([*BASE, "--epochs", 100_000], tmp_path)
    wait_for(tmp_path / "log", "epoch 1", process)
    for argv in ([], ["--resume"]):
        status, log = child.run([*BASE, "--epochs", 100_000, *argv], tmp_path, log="second")
        assert status == 2 and log.startswith("error: ") and log.count("\n") == 1, log
        assert "belongs to another, running process" in log
    process.kill()  # before its first checkpoint
    process.join()
    status, log = child.run([*BASE, "--epochs", 1, "--resume"], tmp_path)  # the dead one's lock does not block
    assert status == 0 and [p["first_step"] for p in about(tmp_path / "runs" / "r")["environments"]] == [0], log


@pytest.mark.parametrize("remains", ["nothing", "another run", "another lock"])
def test_a_run_whose_directory_is_replaced_writes_nothing_more(remains, tmp_path):
    argv = [*BASE, "--mode", "critical", "--eps", 1e-9, "--checkpoint_every", 0.2 if remains == "nothing" else 300]
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
    process.join(PATIENCE)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith("error: runs/r or its .lock was deleted or replaced"), last
    assert directory.exists() == (remains != "nothing")
    assert before is None or files(directory) == before


@pytest.mark.parametrize("kind", child.MEDDLING)
def test_a_file_changed_in_mid_run_never_passes_for_whole(kind, tmp_path):
    status, log = child.run([*BASE, *MODES["critical"]], tmp_path, f"meddle={kind}")
    assert status == 1 and log.splitlines()[-1].startswith("error: something else changed runs/r/"), log
    assert not (tmp_path / "runs" / "r" / "summary.json").exists() and "Traceback" not in log


def test_each_part_of_a_run_keeps_its_environment(tmp_path):
    directory = half_done(tmp_path, "normal")
    argv = [*BASE, *MODES["normal"], "--resume"]
    status, log = child.run(argv, tmp_path, "signal_at=100")
    assert status == 143 and "warning" not in log, log
    begun = [int(step) for step in re.findall(r"stopped after step (\d+)", (tmp_path / "log").read_text())]
    status, log = child.run(argv, tmp_path, "torch_version=another")
    assert status == 0, log
    parts = about(directory)["environments"]
    assert [part["first_step"] for part in parts] == [0, *begun] and parts[2]["torch"] == "another"
    assert all(part["threads"] == 1 and part["device"] == "cpu" and "git_commit" in part for part in parts)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody with fewer rights")
@pytest.mark.parametrize(
    ("sabotage", "argv", "expected", "said"),
    [
        ("no_locks", [], 0, "warning: runs/r cannot be locked (No locks available)"),
        (f"memory={40 << 20}", ["--batchsize", 1437], 1, "error: "),
        ("nobody", ["--runs_dir", "/usr/runs"], 2, "error: argument --runs_dir: /usr/runs/r cannot be used"),
    ],
)
def test_trouble_is_one_line(sabotage, argv, expected, said, tmp_path):
    status, log = child.run([*BASE, *argv, "--epochs", 1], tmp_path, sabotage)
    lines = [line for line in log.splitlines() if line.startswith(("warning", "error", "Traceback"))]
    assert status == expected and len(lines) == 1 and lines[0].startswith(said), log


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_is_one_line_with_wandb_too(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        (tmp_path / "fill").write_bytes(bytes(570 << 10))
        argv = [*BASE, "--wandb_mode", "offline", "--epochs", 100_000]
        status, log = child.run(argv, tmp_path, log=tmp_path.with_name("log-elsewhere"))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert status == 1 and "No space left on device" in log, log
    lines = [line for line in log.splitlines() if not line.startswith("step ")]
    assert lines[-1].startswith("error: ") and len(lines) < 6 and "Traceback" not in log, log


def test_a_copy_is_another_run_of_its_own(tmp_path):
    directory = half_done(tmp_path, "critical")
    copy = shutil.copytree(directory, directory.with_name("copy"))
    assert child.run([*BASE, *MODES["critical"], "--resume", "--name", "copy"], tmp_path)[0] == 0
    assert outcome(copy)["checkpoint"] == reference("critical")["checkpoint"]
    assert about(directory)["wandb_id"] != about(copy)["wandb_id"]


def test_leftovers_and_a_damaged_summary_are_no_run(tmp_path):
    directory = tmp_path / "runs" / "r"
    directory.mkdir(parents=True)
    for content in ("", "[]", '{"status": []}', '{"status": "finished", "steps": 3}'):
        (directory / "summary.json").write_text(content)
        assert read_summary(directory) is None
    for name in ("args.json", "gradient_norms.f32", "measurements.csv"):
        (directory / name).write_text("[]")  # left over by a run that was killed before its first checkpoint
    status, log = child.run([*BASE, *MODES["critical"], "--resume"], tmp_path)
    assert status == 0 and log.count("warning") == 1 and "summary.json is damaged" in log, log
    assert outcome(directory) == reference("critical")


def test_the_state_of_a_run_is_known_without_torch(tmp_path, monkeypatch):
    code = "import training.record, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    monkeypatch.chdir(tmp_path)
    argv = [str(word) for word in [*BASE, *MODES["critical"]]]
    assert run_state(arguments.parse(argv)) == "new"
    assert child.run(argv, tmp_path)[0] == 0
    assert run_state(arguments.parse(argv)) == "not_reached"
    assert run_state(arguments.parse([*argv, "--max_steps", "500"])) == "unfinished"
    assert run_state(arguments.parse([*argv, "--eps", "0.5"])) == "unfinished"
    with pytest.raises(UserError, match="beyond --max_steps 99"):
        run_state(arguments.parse([*argv, "--max_steps", "99"]))


def test_rows_and_norms_grow_and_are_cut_back(tmp_path):
    checked = []
    rows = Rows(tmp_path / "rows.csv", lambda: checked.append(True), ("steps", "delta", "layer"))
    norms = Growing(tmp_path / "norms.f32", lambda: checked.append(True))
    assert rows.rows() == [] and norms.read() == b""
    rows.append_row({"steps": 1, "layer": "all"})
    size = rows.size
    rows.append_row({"layer": "a, b", "delta": 0.1 + 0.2, "steps": 2})
    assert (tmp_path / "rows.csv").read_text() == 'steps,delta,layer\n1,,all\n2,0.30000000000000004,"a, b"\n'
    with pytest.raises(ValueError, match="oops"):
        rows.append_row({"oops": 1})
    norms.append(b"12345678")
    assert len(checked) == 3 and norms.read() == b"12345678"
    again = Rows(tmp_path / "rows.csv", lambda: None, rows.names)
    again.cut(size)
    again.append_row({"steps": 3})
    assert [row["steps"] for row in again.rows()] == ["1", "3"]
    with pytest.raises(UserError, match="holds 8 bytes, the checkpoint counts on 12"):
        norms.cut(12)
    norms.cut(0)
    assert not (tmp_path / "norms.f32").exists()


def test_every_file_has_the_declared_columns():
    header, *rows = reference("sampling")["measurements.csv"].decode().splitlines()
    assert header.split(",") == list(MEASUREMENTS) and [row.split(",")[0] for row in rows] == ["0", "100", "310"]
    assert all(tuple(reference(mode)["metrics.csv"][0]) == METRICS[:-1] for mode in MODES)


def test_the_commit_of_a_repository_around_a_copy_is_not_ours(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "kit").mkdir()
    shutil.copy(ROOT / "utils.py", tmp_path / "kit")
    for where, known in ((".", False), ("kit", True)):
        subprocess.run([*git, "init", "-q", where], check=True)
        subprocess.run([*git, "-C", where, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        env = os.environ | {"GIT_DIR": str(tmp_path / ".git")}  # as in a hook of the one around
        command = [sys.executable, "-c", "import utils; print(utils.git_commit())"]
        done = subprocess.run(command, cwd=tmp_path / "kit", env=env, capture_output=True, text=True, check=True)
        assert (done.stdout != "None\n") == known, done


@pytest.mark.parametrize("closed", ["", ">&-", "<&- >&- 2>&-", ">/dev/full"])
def test_printing_never_fails(closed, tmp_path):
    """Not where stdout knows no ε or is full, nor where it is closed: the next file opened must not get its number."""
    code = "import utils; utils.usable_streams(); f = open('opened', 'w'); print('ε'); f.write(str(f.fileno() > 2))"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f'{sys.executable} -c "{code}" {closed}']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and done.stderr == b"" and (tmp_path / "opened").read_text() == "True"
