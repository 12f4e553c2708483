"""The runs of scripts/sweep.py: their start, end and stopping, by a stand-in for main.py, and a few for real.

The stand-in is put in place of the runs' Python interpreter. It waits for an event instead of training, and writes
down when it was started, on which GPU, and what hit it.
"""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import PATIENCE

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "scripts" / "sweep.sh"
COMMAND = (sys.executable, ROOT / "scripts" / "sweep.py")
sys.path.insert(0, str(ROOT / "scripts"))
import slots  # noqa: E402

STAND_IN = f"""#!{sys.executable}
import fcntl, json, os, signal, sys, time

sys.path.insert(0, {str(ROOT)!r})
from arguments import EXIT_STATUS, parse, planned_steps

def say(*words):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(" ".join(map(str, (args.name, *words))) + "\\n")

def refuse(error):
    say("refused")
    print("error:", error, "\\nand a library's last word", file=sys.stderr)
    sys.exit(2)

args = parse(sys.argv[2:])
run = args.runs_dir / args.name
summary = run / "summary.json"
signals = []
signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
existed = run.exists()
run.mkdir(parents=True, exist_ok=True)
lock = open(run / ".lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    refuse(f"{{run}} belongs to another, running process")
if existed and not args.resume:
    refuse(f"{{run}} exists already")
if summary.exists():
    say("skipped")
    sys.exit(EXIT_STATUS[json.loads(summary.read_text())["status"]])
sys.stdin.read()  # a question would find nobody to answer it: it must not wait
say("start", os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), os.environ.get("OMP_NUM_THREADS"))
acts = json.loads(os.environ["ACTS"])
act = next((acts[part] for part in acts if part in args.name), "")
if act == "crash":
    raise RuntimeError("boom")
if act == "nothing":
    sys.exit(0)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)

def over():  # what a run waits for: so many events of a kind in the whole sweep, or nothing but a signal
    if act in ("wait", "deaf"):
        return False
    event, _, count = act.partition(" ")
    return not count or sum(line.split()[1] == event for line in open(os.environ["EVENTS"])) >= int(count)

told = False
while not over():
    time.sleep(0.02)
    if signals and not told:
        say("signals", *signals)
        told = True
    if signals and act != "deaf":
        sys.exit(128 + signals[0])
say("end")
status = act if act in EXIT_STATUS else "finished"
results = {{"at_first_check": ["2.0", "1.5"] if act == "early" else []}}
content = {{"status": status, "steps": planned_steps(args), "args": vars(args), "results": results}}
summary.write_text(json.dumps(content, default=str, indent=1))
sys.exit(EXIT_STATUS[status])
"""


class Sweeps:
    """Sweeps in one directory. acts: what the stand-in does in runs whose name has the key in it."""

    def __init__(self, directory: Path, python: str):
        self.directory, self.acts, self.started = directory, {}, []
        self.events_file = directory.parent / f"{directory.name}.events"
        self.environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        self.environment |= {"PYTHON": python, "EVENTS": str(self.events_file), "WANDB_MODE": "disabled"}

    def run(self, *words, **options) -> subprocess.CompletedProcess:
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *words, command=COMMAND, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        options.setdefault("preexec_fn", signals_as_in_a_terminal)
        environment = self.environment | {"ACTS": json.dumps(self.acts)}
        words = [*map(str, command), *map(str, words)]
        self.started.append(subprocess.Popen(words, cwd=self.directory, env=environment, text=True, **options))
        return self.started[-1]

    def events(self, kind: str) -> list[list[str]]:
        """[name, *details] of all events of a kind, in order."""
        lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
        return [[name, *rest] for name, what, *rest in map(str.split, lines) if what == kind]

    def release(self) -> None:
        """The event that runs with the act `released 1` wait for."""
        with open(self.events_file, "a") as file:
            file.write("test released\n")


def signals_as_in_a_terminal():
    """Where pytest itself runs in the background or under nohup, these are ignored, and would stay so."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def sweeps(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "work").mkdir()
    sweeps = Sweeps(tmp_path / "work", str(stand_in))
    yield sweeps
    for process in sweeps.started:  # of a test that has failed
        while process.poll() is None:
            process.terminate()
            time.sleep(1)


def wait_until(condition, what: str, seconds: float = PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def table(output: str) -> dict[str, tuple[str, str]]:
    """Of the table at the end, {name: (outcome, exit status)}."""
    rows = re.split(r"\noutcome +status +time +run\n", output)[1]
    found = re.findall(r"^(\S+) +(\S+) +(?:-|\d+:\d\d:\d\d)  ([^:\n]*)", rows, re.MULTILINE)
    return {name: (outcome, status) for outcome, status, name in found}


def name(optimizer: str, b: int, seed: int = 0, mode: str = "normal", more: str = "") -> str:
    beta = "" if optimizer == "sgd" else "-beta0.9"
    return f"{mode}-digits-ResNet20-{optimizer}-b{b}-lr0.1{beta}{more}-seed{seed}"


DIGITS_FLAGS = ("--dataset", "digits", "--model", "ResNet20", "--device", "cpu")
DIGITS = ("normal", *DIGITS_FLAGS)
TWO = (*DIGITS, "--optimizers", "sgd", "--seeds", "0 1", "--batchsizes", "8 16")  # two at a time of four
PAIR = ("--jobs_per_gpu", 2)


# --- with the stand-in --------------------------------------------------------------------------------------


def test_every_run_once_spread_over_the_gpus_with_the_other_flags_as_given(sweeps):
    sweeps.environment |= {"CUDA_VISIBLE_DEVICES": "4,7", "OMP_NUM_THREADS": "3"}
    sweeps.acts = {"": "start 4"}  # so that the first four must all be at work before one ends
    words = ("--lr=0.5", "--max-steps", 7, "--runs_dir", "my runs")
    done = sweeps.run(*DIGITS, *words, "--optimizers", "sgd shb", "--seeds", "0,1", "--batchsizes", "8 16", *PAIR)
    assert (done.returncode, done.stderr) == (0, "")
    starts, ends = sweeps.events("start"), sweeps.events("end")
    assert len(starts) == len(ends) == len(table(done.stdout)) == 8
    assert set(table(done.stdout).values()) == {("finished", "0")}
    assert {run for run, *_ in starts} == {run for run, *_ in ends} == set(table(done.stdout))
    assert sorted(gpu for _, gpu, *_ in starts[:4]) == ["4", "4", "7", "7"]
    assert {gpu for _, gpu, *_ in starts[4:]} <= {"4", "7"}
    assert {threads for *_, threads in starts} == {"3"}
    lines = done.stdout.splitlines()
    assert lines[8] == "8 runs, 8 to do, 4 at a time"
    assert "[1/8] started normal-digits-ResNet20-sgd-b8-lr0.5-max_steps7-seed0 on GPU 4" in lines
    for run, *_ in starts:
        log = (sweeps.directory / "my runs" / f"{run}.log").read_text()
        assert "--lr=0.5 --max_steps 7 --runs_dir 'my runs'" in log


def test_no_more_at_a_time_than_there_are_slots_and_in_the_order_of_the_lists(sweeps):
    sweeps.acts = {"": "released 1"}
    process = sweeps.start(*TWO, *PAIR)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    sweeps.release()
    out, _ = process.communicate(timeout=PATIENCE)
    started = re.findall(r"^\[(\d)/4\] started (\S+)$", out, re.MULTILINE)
    assert started == [(str(1 + 2 * k + s), name("sgd", b, s)) for k, b in enumerate((8, 16)) for s in (0, 1)]
    events = [line.split()[1] for line in sweeps.events_file.read_text().splitlines()]
    at_work = [events[:k].count("start") - events[:k].count("end") for k in range(len(events) + 1)]
    assert max(at_work) == 2


def test_no_failure_stops_the_rest_and_a_restart_does_only_what_is_missing(sweeps):
    sweeps.acts = {"b8-": "crash", "b16-": "kill", "b32-": "diverged", "b64-": "not_reached", "b256-": "nothing"}
    sizes = "8 16 256 32 64 128 512 2048"
    words = (*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", sizes)
    log = sweeps.directory / "runs" / f"{name('sgd', 512)}.log"
    log.mkdir(parents=True)  # a run that cannot even be started
    done = sweeps.run(*words)
    assert (done.returncode, done.stderr) == (1, "")
    assert table(done.stdout) == {
        name("sgd", 8): ("failed", "1"),
        name("sgd", 16): ("failed", "137"),
        name("sgd", 256): ("unfinished", "0"),
        name("sgd", 32): ("diverged", "3"),
        name("sgd", 64): ("not_reached", "0"),
        name("sgd", 128): ("finished", "0"),
        name("sgd", 512): ("failed", "-"),
        "normal --batchsize=2048 --seed=0 --optimizer=sgd": ("refused", "-"),
    }
    assert f"Is a directory: 'runs/{log.name}'" in done.stdout
    crashed = sweeps.directory / "runs" / f"{name('sgd', 8)}.log"
    assert f"see runs/{crashed.name}: RuntimeError: boom" in done.stdout and "Traceback" in crashed.read_text()

    sweeps.acts = {}
    log.rmdir()
    done = sweeps.run(*words)
    assert [run for run, *_ in sweeps.events("start")][6:] == [name("sgd", b) for b in (8, 16, 256, 512)]
    assert sweeps.events("skipped") == []
    assert table(done.stdout)[name("sgd", 32)] == ("diverged", "-")
    assert table(done.stdout)[name("sgd", 8)] == ("finished", "0")
    assert done.returncode == 1  # one has diverged, one is refused
    assert sweeps.run(*words, "--batchsizes", "8 16 64 128").returncode == 0


def test_an_upper_bound_is_marked_in_the_table(sweeps):
    sweeps.acts = {"b8-": "early"}
    words = ("critical", *DIGITS_FLAGS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", "8 16")
    for done in (sweeps.run(*words), sweeps.run(*words)):  # at its end, and when it is skipped later
        rows = done.stdout.split("outcome ")[1].splitlines()
        assert rows[1].endswith("-b8-lr0.1-seed0: an upper bound, as reached at the first check: eps 2.0 1.5")
        assert rows[2].endswith("-b16-lr0.1-seed0")


def in_terminal(sweeps, *words, **options) -> tuple[subprocess.Popen, int]:
    """A sweep in a terminal of its own, and that terminal: what is written to it is typed at the keyboard."""
    keyboard, terminal = pty.openpty()

    def take_terminal():
        signals_as_in_a_terminal()
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = sweeps.start(*words, *PAIR, stdin=terminal, preexec_fn=take_terminal, **options)
    os.close(terminal)
    return process, keyboard


def test_ctrl_c_lets_each_run_write_its_checkpoint_and_the_same_command_goes_on(sweeps):
    sweeps.acts = {"b16-": "wait"}
    process, keyboard = in_terminal(sweeps, *TWO)
    wait_until(lambda: len(sweeps.events("start")) == 4, "the third and fourth run")
    os.write(keyboard, b"\x03")
    out, _ = process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    assert process.returncode == 130
    # From the sweep alone: the terminal's own Ctrl-C would have been there first, as a 2.
    assert sorted(sweeps.events("signals")) == [[name("sgd", 16, seed), "15"] for seed in (0, 1)]
    assert table(out) == {
        **{name("sgd", 8, seed): ("finished", "0") for seed in (0, 1)},
        **{name("sgd", 16, seed): ("stopped", "143") for seed in (0, 1)},
    }
    again = re.search("^stopped; to go on, run the same command again: (.*)$", out, re.MULTILINE)[1]
    assert shlex.split(again) == [str(SWEEP), *map(str, TWO), *map(str, PAIR)]

    sweeps.acts = {}
    assert sweeps.run(*TWO).returncode == 0
    assert sorted(run for run, *_ in sweeps.events("start")[4:]) == [name("sgd", 16, seed) for seed in (0, 1)]
    assert len(sweeps.events("end")) == 4 and sweeps.events("skipped") == []


def test_ctrl_c_reaches_the_runs_though_it_also_ends_the_tee_that_the_sweep_writes_to(sweeps):
    sweeps.acts = {"": "wait"}
    command = ("bash", "-c", '"$0" "$@" 2>&1 | tee out', *COMMAND)
    process, keyboard = in_terminal(sweeps, *TWO, command=command)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    os.write(keyboard, b"\x03")
    process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    assert sorted(sweeps.events("signals")) == [[name("sgd", 8, seed), "15"] for seed in (0, 1)]


def test_a_reader_that_goes_away_takes_nothing_with_it(sweeps):
    sweeps.acts = {"": "released 1"}
    process = sweeps.start(*TWO, *PAIR)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    process.stdout.close()
    sweeps.release()
    assert process.wait(PATIENCE) == 0
    assert process.stderr.read() == ""
    assert len(sweeps.events("end")) == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_sweep_starts_nothing_new(sweeps, signum):
    sweeps.acts = {"": "wait"}
    process = sweeps.start(*TWO, *PAIR)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    process.send_signal(signum)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert [outcome for outcome, _ in table(out).values()] == ["stopped", "stopped", "new", "new"]
    assert len(sweeps.events("start")) == 2


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(sweeps):
    sweeps.acts = {"": "deaf"}
    process, keyboard = in_terminal(sweeps, *TWO)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    os.write(keyboard, b"\x03")
    wait_until(lambda: len(sweeps.events("signals")) == 2, "the first signal")
    assert process.poll() is None
    os.write(keyboard, b"\x03")
    out, _ = process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    assert process.returncode == 130 and "killed; to go on" in out
    for _, _, pid, _ in sweeps.events("start"):
        wait_until(lambda pid=pid: not running(int(pid)), "the runs' end")


def test_ctrl_c_before_the_first_run_is_no_traceback(sweeps, tmp_path):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nwhile :; do sleep 1; done\n")
    smi.chmod(0o755)
    sweeps.environment["PATH"] = f"{smi.parent}:{os.environ['PATH']}"
    process = sweeps.start(*TWO, start_new_session=True)
    wait_until((tmp_path / "asked").exists, "the question to nvidia-smi")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (-signal.SIGINT, "")
    assert list(sweeps.directory.iterdir()) == []


def test_under_nohup_a_hangup_stops_nothing(sweeps):
    sweeps.acts = {"": "released 1"}
    process = sweeps.start(*TWO, *PAIR, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    process.send_signal(signal.SIGHUP)
    sweeps.release()
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert set(table(out).values()) == {("finished", "0")}


def test_runs_outlive_a_killed_sweep_and_the_next_one_says_so(sweeps):
    sweeps.acts = {"": "released 1"}
    process = sweeps.start(*TWO, *PAIR)
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert all(running(int(pid)) for _, _, pid, _ in sweeps.events("start"))
    done = sweeps.run(*TWO, "--batchsizes", 8)
    assert done.returncode == 1
    assert table(done.stdout) == {name("sgd", 8, seed): ("refused", "2") for seed in (0, 1)}
    assert f"error: runs/{name('sgd', 8)} belongs to another, running process" in done.stdout
    sweeps.release()
    wait_until(lambda: len(sweeps.events("end")) == 2, "the two runs' end")
    for _, _, pid, _ in sweeps.events("start"):
        wait_until(lambda pid=pid: not running(int(pid)), "the two runs' end")
    done = sweeps.run(*TWO)
    assert (done.returncode, len(sweeps.events("end"))) == (0, 4)
    assert table(done.stdout)[name("sgd", 8)] == ("finished", "-")


def test_two_sweeps_at_once_share_the_work_and_do_nothing_twice(sweeps):
    sweeps.acts = {"": "refused 1"}
    both = [sweeps.start(*TWO, *PAIR) for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert len(sweeps.events("start")) == len(sweeps.events("end")) == 4
    assert any("belongs to another, running process" in out for out in outs)
    outcomes = [outcome for out in outs for outcome, _ in table(out).values()]
    assert set(outcomes) == {"finished", "refused"}
    for process, out in zip(both, outs, strict=True):
        assert process.returncode == ("refused" in [outcome for outcome, _ in table(out).values()])
    assert sweeps.run(*TWO).returncode == 0


# --- in this process, with neither runs nor time ------------------------------------------------------------


class Deaf:
    """A process that is told to stop, and does not."""

    def __init__(self):
        self.told = 0

    def poll(self):
        return None

    def terminate(self):
        self.told += 1


def test_each_run_is_told_once_and_killed_as_a_group_at_the_second_signal(monkeypatch, capsys):
    heard, killed, processes = [], [], {}

    def start(run, gpu):
        run.process = processes[run.label] = Deaf()
        run.process.pid = len(processes)

    def second(_):  # in place of a moment's wait; signals come in the first, and in the eleventh
        second.count += 1
        if second.count in (1, 11):
            heard.append(signal.SIGTERM)
        told = 1 if second.count > 1 else 0
        assert [process.told for process in processes.values()] == [told, told] and not killed

    second.count = 0
    monkeypatch.setattr(slots, "listen", lambda: heard)
    monkeypatch.setattr(slots, "start", start)
    monkeypatch.setattr(slots.time, "sleep", second)
    monkeypatch.setattr(slots.os, "killpg", lambda group, signum: killed.append((group, signum)))
    runs = [slots.Run([], label) for label in "abc"]
    assert slots.work(runs, ["0", "1"], ended=None) == "killed"
    assert second.count == 11 and killed == [(1, signal.SIGKILL), (2, signal.SIGKILL)]
    assert capsys.readouterr().out.count("stopping:") == 1


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("$ python main.py\nstep 1\nerror: no room\nTraceback of a thread\n", "error: no room"),
        ("$ python main.py\nerror: no room\n$ python main.py\nstep 1\nstep 2\n", "step 2"),
        ("$ python main.py\n", "$ python main.py"),
        ("", ""),
        ("$ python main.py\nb\udcff\n", "b\ufffd"),
    ],
)
def test_the_last_words_are_the_error_of_the_last_start_or_else_the_last_line(tmp_path, log, last):
    file = tmp_path / "x.log"
    file.write_bytes(log.encode(errors="surrogateescape"))
    assert slots.last_words(file) == last
    assert "No such file" in slots.last_words(tmp_path / "none")


# --- for real -----------------------------------------------------------------------------------------------


@pytest.fixture
def real_sweeps(sweeps):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    # Two runs that take two threads each on two cores wait for one another most of the time.
    sweeps.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return sweeps


def test_a_real_sweep_with_a_refused_run_beside_a_good_one(real_sweeps):
    words = (*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--max_steps", 2)
    done = real_sweeps.run(*words, "--batchsizes", "64 2048", command=[SWEEP])
    run = name("sgd", 64, more="-max_steps2")
    refused = "normal --batchsize=2048 --seed=0 --optimizer=sgd"
    assert (done.returncode, done.stderr) == (1, "")
    assert table(done.stdout) == {run: ("finished", "0"), refused: ("refused", "-")}
    summary = json.loads((real_sweeps.directory / "runs" / run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    before = {path: path.stat().st_mtime_ns for path in real_sweeps.directory.rglob("*")}
    done = real_sweeps.run(*words, "--batchsizes", "64", command=[SWEEP])
    assert (done.returncode, table(done.stdout)) == (0, {run: ("finished", "-")})
    assert {path: path.stat().st_mtime_ns for path in real_sweeps.directory.rglob("*")} == before


def test_a_real_run_that_diverges_is_told_and_not_repeated(real_sweeps):
    words = (*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", 64, "--max_steps", 4, "--lr", "1e30")
    run = name("sgd", 64, more="-max_steps4").replace("lr0.1", "lr1e+30")
    done = real_sweeps.run(*words)
    assert (done.returncode, table(done.stdout)) == (1, {run: ("diverged", "3")})
    done = real_sweeps.run(*words)
    assert (done.returncode, table(done.stdout)) == (1, {run: ("diverged", "-")})


def test_a_real_sweep_survives_a_killed_run_and_ctrl_c(real_sweeps):
    """The runs are endless, so that nothing depends on how fast they are."""
    words = ("critical", *DIGITS_FLAGS, "--optimizers", "sgd shb", "--seeds", 0, "--batchsizes", 16, *PAIR)
    words = (*words, "--eps", "1e-30", "--checkpoint_every", 0)
    names = [name(optimizer, 16, mode="critical") for optimizer in ("sgd", "shb")]
    runs = real_sweeps.directory / "runs"

    process = real_sweeps.start(*words)
    wait_until(lambda: all((runs / run / "checkpoint.pt").exists() for run in names), "both checkpoints")
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    children = [line.split(maxsplit=2) for line in listing.splitlines()]
    (sgd,) = [int(pid) for pid, parent, args in children if int(parent) == process.pid and "=sgd " in args]
    os.kill(sgd, signal.SIGKILL)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert table(out) == dict(zip(names, [("failed", "137"), ("stopped", "143")], strict=True))

    process = real_sweeps.start(*words)
    logs = [runs / f"{run}.log" for run in names]
    wait_until(lambda: all("resumed at step" in log.read_text() for log in logs), "both to go on")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, set(table(out).values())) == (130, {("stopped", "143")})
    for log in logs:
        assert int(re.search(r"resumed at step (\d+)", log.read_text())[1]) > 0
