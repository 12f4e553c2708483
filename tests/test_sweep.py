"""The three ways to run the paper's grid: sweep.sh, by a stand-in for main.py and for real; wandb; SLURM.

The stand-in is put in place of the Python interpreter. It leaves the plan to the real main.py; then it sleeps
instead of training, and writes down when it was started, on which GPU, and what hit it.
"""

import fcntl
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import PATIENCE

import arguments

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "scripts" / "sweep.sh"
HANGUPS = (signal.SIGINT, signal.SIGHUP)
GRID = {(optimizer, 2**k, seed) for optimizer in ("sgd", "shb", "nshb") for k in range(3, 14) for seed in (0, 1, 2)}

STAND_IN = f"""#!{sys.executable} -S
import fcntl, json, os, signal, sys, time

if "--print_name" in sys.argv:
    print("warning: something of no weight", file=sys.stderr)
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])

sys.path.insert(0, {str(ROOT)!r})
from arguments import EXIT_STATUS, parse, planned_steps

def say(*words):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(" ".join(map(str, (args.name, *words))) + "\\n")

def refuse(error):
    say("refused")
    print("error:", error, file=sys.stderr)
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
say("start", os.environ.get("CUDA_VISIBLE_DEVICES"), time.time(), os.getpid())
acts = json.loads(os.environ["ACTS"])
act = next((acts[part] for part in acts if part in args.name), "")
if act == "crash":
    raise RuntimeError("boom")
if act == "nothing":
    sys.exit(0)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
def over():  # what a run waits for: a moment, an event in the whole sweep, or only a signal
    if act in ("wait", "deaf"):
        return False
    event, _, count = str(act).partition(" ")
    return not count or sum(line.split()[1] == event for line in open(os.environ["EVENTS"])) >= int(count)

time.sleep(0.1)
told = False
while not over():
    time.sleep(0.02)
    if signals and act != "deaf":
        time.sleep(0.7)  # the checkpoint; long enough for a second signal to be noticed
        say("signals", *signals)
        sys.exit(128 + signals[0])
    if signals and not told:
        say("signals", *signals)
        told = True
status = act if act in EXIT_STATUS else "finished"
say("end", time.time())
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

    def start(self, *words, command=(str(SWEEP),), **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        # Where pytest itself runs in the background or under nohup, these are ignored, and bash could not trap them.
        options.setdefault("preexec_fn", lambda: [signal.signal(s, signal.SIG_DFL) for s in HANGUPS])
        environment = self.environment | {"ACTS": json.dumps(self.acts)}
        words = [*command, *map(str, words)]
        self.started.append(subprocess.Popen(words, cwd=self.directory, env=environment, text=True, **options))
        return self.started[-1]

    def events(self, kind: str) -> list[list[str]]:
        """[name, *details] of all events of a kind, in order."""
        lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
        return [[name, *rest] for name, what, *rest in map(str.split, lines) if what == kind]

    def files(self) -> list[Path]:
        return sorted(self.directory.rglob("*"))


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


# --- the plan -----------------------------------------------------------------------------------------------


def test_the_plan_is_the_papers_grid_longest_first_and_nothing_is_written(sweeps):
    done = sweeps.run("critical", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    plan = re.findall(r"^new +critical-CIFAR100-ResNet18-(\w+)-b(\d+)-lr0.1\S*-seed(\d)$", done.stdout, re.M)
    assert len(plan) == 99
    assert {(optimizer, int(b), int(seed)) for optimizer, b, seed in plan} == GRID
    sizes = [int(b) for _, b, _ in plan]
    assert sizes == sorted(sizes)
    assert "99 runs, 99 to do" in done.stdout
    assert sweeps.files() == []


def test_sampling_starts_with_the_large_batches_for_there_they_take_longest(sweeps):
    done = sweeps.run("sampling", "--dry-run", "--optimizers=sgd", "--seeds=0")
    sizes = [int(b) for b in re.findall(r"-b(\d+)-", done.stdout)]
    assert sizes == [2**k for k in range(13, 2, -1)]


def test_the_plan_tells_new_half_done_ended_and_refused_runs_apart(sweeps):
    for b, status in ((16, None), (32, "finished"), (64, "diverged"), (128, "not_reached")):
        run = sweeps.directory / "runs" / name("sgd", b)
        run.mkdir(parents=True)
        if status:
            args = arguments.parse([*DIGITS_FLAGS, "--optimizer", "sgd", "--batchsize", str(b), "--resume"])
            content = {"status": status, "steps": arguments.planned_steps(args), "args": vars(args)}
            (run / "summary.json").write_text(json.dumps(content, default=str))
    before = sweeps.files()
    sizes = "8 16 32 64 128 2048"
    done = sweeps.run(*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", sizes, "--dry_run")
    states = [line.split()[0] for line in done.stdout.splitlines()[:6]]
    assert states == ["new", "unfinished", "finished", "diverged", "not_reached", "refused"]
    assert "b=2048 seed=0: error: argument --batchsize: got 2048" in done.stdout
    assert "6 runs, 2 to do" in done.stdout
    assert (done.returncode, sweeps.files()) == (0, before)


def test_an_ended_run_is_skipped_only_if_the_command_asks_for_nothing_more(sweeps):
    one = ("--dataset", "digits", "--optimizers", "sgd", "--seeds", 0, "--batchsizes", 8)
    assert sweeps.run("normal", *one, "--epochs", 1).returncode == 0
    assert sweeps.run("normal", *one, "--epochs", 1, "--dry_run").stdout.startswith("finished")
    assert sweeps.run("normal", *one, "--epochs", 2, "--dry_run").stdout.startswith("new")
    assert sweeps.run("critical", *one).returncode == 0
    assert sweeps.run("critical", *one, "--eps", 0.5, "--dry_run").stdout.startswith("finished")
    assert sweeps.run("critical", *one, "--eps", 0.5, 0.25, "--dry_run").stdout.startswith("unfinished")


def test_an_upper_bound_is_marked_in_the_table(sweeps):
    sweeps.acts = {"b8-": "early"}
    words = ("critical", *DIGITS_FLAGS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", "8 16")
    for done in (sweeps.run(*words), sweeps.run(*words)):  # at its end, and when it is skipped later
        rows = done.stdout.split("outcome ")[1].splitlines()
        assert rows[1].endswith("-b8-lr0.1-seed0: an upper bound, as reached at the first check: eps 2.0 1.5")
        assert rows[2].endswith("-b16-lr0.1-seed0")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "mode"),
        (["--dry_run"], "mode"),
        (["nrmal"], "--mode"),
        (["normal", "--optimizers", "adam"], "adam"),
        (["normal", "--batchsizes", "8.5"], "8.5"),
        (["normal", "--batchsizes", "*"], "*"),
        (["normal", "--seeds"], "--seeds"),
        (["normal", "--seeds", ""], "--seeds"),
        (["normal", "--gpus", " "], "--gpus"),
        (["normal", "--gpus", "nonsense"], "--gpus: got 'nonsense', nvidia-smi lists"),
        (["normal", "--gpus", "97"], "--gpus: got '97', nvidia-smi lists"),
        (["normal", "--jobs_per_gpu", "0"], "--jobs_per_gpu"),
        (["normal", "--jobs-per-gpu=a[$(touch x)]"], "--jobs_per_gpu"),
        (["normal", "--batchsizes", "8 8"], "twice"),
        (["normal", "--name", "x"], "--name"),
        (["normal", "--batchsize", "8"], "--batchsizes"),
        (["normal", "--print-name"], "--print_name"),
        (["normal", "--lr", "fast"], "--lr"),
        (["normal", "extra"], "extra"),
    ],
)
def test_a_bad_argument_is_one_line_and_nothing_starts(sweeps, words, named):
    (sweeps.directory / "8").touch()  # what a * would become
    short = [] if "--seeds" in words or not words else ["--seeds", "0"]
    done = sweeps.run(*words, *short) if words[:1] != ["--dry_run"] else sweeps.run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert sweeps.files() == [sweeps.directory / "8"] and sweeps.events("start") == []


def test_a_missing_interpreter_and_an_old_bash_are_named(sweeps, tmp_path):
    sweeps.environment["PYTHON"] = "no-such-python"
    done = sweeps.run("normal")
    assert (done.returncode, "no-such-python" in done.stderr, done.stderr.count("\n")) == (2, True, 1)
    old = SWEEP.read_text().replace("BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1]", "3 * 100 + 2")
    done = sweeps.run("normal", command=("bash", "-c", old))
    assert (done.returncode, "bash 4.4" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


# --- running, with the stand-in -----------------------------------------------------------------------------


def nvidia_smi(sweeps, tmp_path, gpus):
    """A stand-in, as for a machine with these GPUs."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    uuids = "".join(f"echo 'GPU {n}: H100 (UUID: GPU-aa{n})'\n" for n in gpus)
    indices = "".join(f"echo {n}\n" for n in gpus)
    smi.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n{uuids}else\n{indices}fi\n')
    smi.chmod(0o755)
    sweeps.environment["PATH"] = f"{smi.parent}:{os.environ['PATH']}"
    return smi


def test_only_gpus_of_this_machine_are_taken(sweeps, tmp_path):
    nvidia_smi(sweeps, tmp_path, (0, 3))
    one = (*DIGITS, "--dry_run", "--seeds", 0, "--batchsizes", 8)
    for gpus in ("0", "3,0", "GPU-aa3"):
        assert sweeps.run(*one, "--gpus", gpus).returncode == 0
    for gpus, wrong in (("0 1", "1"), ("GPU-bb", "GPU-bb"), ("-1", "-1"), ("00", "00"), ("GPU", "GPU")):
        done = sweeps.run(*one, "--gpus", gpus)
        assert (done.returncode, done.stderr) == (2, f"error: --gpus: got '{wrong}', nvidia-smi lists 0, 3\n")


def test_every_run_once_spread_over_the_gpus_with_the_other_flags_as_given(sweeps, tmp_path):
    nvidia_smi(sweeps, tmp_path, range(8))
    sweeps.acts = {"": "start 4"}  # so that the first four must all be at work before one ends
    words = ("--lr=0.5", "--max-steps", 7, "--runs_dir", "my runs")
    done = sweeps.run(*DIGITS, *words, "--seeds", "0,1", "--batchsizes", "8 16", "--gpus", "4 7", "--jobs_per_gpu", 2)
    assert (done.returncode, done.stderr) == (0, "")
    starts, ends = sweeps.events("start"), dict(sweeps.events("end"))
    assert len(starts) == len(ends) == len(table(done.stdout)) == 12
    assert set(table(done.stdout).values()) == {("finished", "0")}
    assert {name for name, *_ in starts} == set(ends)
    times = [(gpu, float(began), float(ends[run])) for run, gpu, began, _ in starts]
    for gpu in ("4", "7"):
        at_once = [sum(g == gpu and a <= began < b for g, a, b in times) for g, began, _ in times if g == gpu]
        assert len(at_once) == 6 and max(at_once) == 2
    for run, *_ in starts:
        log = (sweeps.directory / "my runs" / f"{run}.log").read_text()
        assert "'--lr=0.5' '--max-steps' '7' '--runs_dir' 'my runs'" in log


def test_the_gpus_are_those_of_nvidia_smi_or_of_cuda_visible_devices(sweeps, tmp_path):
    smi = nvidia_smi(sweeps, tmp_path, (0, 1, 2))
    one = (*DIGITS, "--dry_run", "--seeds", 0, "--batchsizes", 8)
    assert "3 at a time" in sweeps.run(*one).stdout
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert "1 at a time" in sweeps.run(*one).stdout
    sweeps.environment["CUDA_VISIBLE_DEVICES"] = "GPU-a,GPU-b"
    assert "2 at a time" in sweeps.run(*one).stdout
    nvidia_smi(sweeps, tmp_path, (0, 1))
    assert "3 at a time" in sweeps.run(*one, "--gpus", "0", "--jobs_per_gpu", "3").stdout
    sweeps.environment["CUDA_VISIBLE_DEVICES"] = ""
    assert "1 at a time" in sweeps.run(*one).stdout


def test_no_failure_stops_the_rest_and_a_restart_does_only_what_is_missing(sweeps):
    sweeps.acts = {"b8-": "crash", "b16-": "kill", "b32-": "diverged", "b64-": "not_reached", "b256-": "nothing"}
    sizes = "8 16 256 32 64 128 2048"
    words = (*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", sizes)
    done = sweeps.run(*words)
    assert done.returncode == 1
    assert table(done.stdout) == {
        name("sgd", 8): ("failed", "1"),
        name("sgd", 16): ("failed", "137"),
        name("sgd", 256): ("new", "0"),
        name("sgd", 32): ("diverged", "3"),
        name("sgd", 64): ("not_reached", "0"),
        name("sgd", 128): ("finished", "0"),
        "normal sgd b=2048 seed=0": ("refused", "-"),
    }
    log = sweeps.directory / "runs" / f"{name('sgd', 8)}.log"
    assert f"see runs/{log.name}: RuntimeError: boom" in done.stdout and "Traceback" in log.read_text()

    sweeps.acts = {}
    done = sweeps.run(*words)
    assert [run for run, *_ in sweeps.events("start")][6:] == [name("sgd", b) for b in (8, 16, 256)]
    assert sweeps.events("skipped") == []
    assert table(done.stdout)[name("sgd", 32)] == ("diverged", "-")
    assert table(done.stdout)[name("sgd", 8)] == ("finished", "0")
    assert done.returncode == 1  # one has diverged, one is refused
    assert sweeps.run(*words, "--batchsizes", "8 16 64 128").returncode == 0


def in_terminal(sweeps, *words, **options) -> tuple[subprocess.Popen, int]:
    """A sweep in a terminal of its own, and that terminal: what is written to it is typed at the keyboard."""
    keyboard, terminal = pty.openpty()

    def take_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = sweeps.start(*words, "--jobs_per_gpu", 2, stdin=terminal, preexec_fn=take_terminal, **options)
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
    # One signal each, and from the sweep: a second one would have ended the run without a checkpoint.
    assert sorted(sweeps.events("signals")) == [[name("sgd", 16, seed), "15"] for seed in (0, 1)]
    assert table(out) == {
        **{name("sgd", 8, seed): ("finished", "0") for seed in (0, 1)},
        **{name("sgd", 16, seed): ("stopped", "143") for seed in (0, 1)},
    }
    assert f"run the same command again: '{SWEEP}' 'normal'" in out

    sweeps.acts = {}
    assert sweeps.run(*TWO).returncode == 0
    assert sorted(run for run, *_ in sweeps.events("start")[4:]) == [name("sgd", 16, seed) for seed in (0, 1)]
    assert len(sweeps.events("end")) == 4 and sweeps.events("skipped") == []


def test_ctrl_c_reaches_the_runs_though_it_also_ends_the_tee_that_the_sweep_writes_to(sweeps):
    sweeps.acts = {"": "wait"}
    process, keyboard = in_terminal(sweeps, *TWO, command=("bash", "-c", '"$0" "$@" | tee out', str(SWEEP)))
    wait_until(lambda: len(sweeps.events("start")) == 2, "two runs")
    os.write(keyboard, b"\x03")
    process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    assert sorted(sweeps.events("signals")) == [[name("sgd", 8, seed), "15"] for seed in (0, 1)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_sweep_starts_nothing_new(sweeps, signum):
    sweeps.acts = {"": "wait"}
    process = sweeps.start(*TWO, "--jobs_per_gpu", 2)
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
    assert process.returncode == 130 and "killed" in out
    for *_, pid in sweeps.events("start"):
        wait_until(lambda pid=pid: not running(int(pid)), "the runs' end")


def running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_two_sweeps_at_once_share_the_work_and_do_nothing_twice(sweeps):
    sweeps.acts = {"": "refused 1"}
    both = [sweeps.start(*TWO, "--jobs_per_gpu", 2) for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert len(sweeps.events("start")) == len(sweeps.events("end")) == 4
    assert any("belongs to another, running process" in out for out in outs)
    outcomes = [outcome for out in outs for outcome, _ in table(out).values()]
    assert set(outcomes) == {"finished", "refused"}
    for process, out in zip(both, outs, strict=True):
        assert process.returncode == ("refused" in [outcome for outcome, _ in table(out).values()])
    assert sweeps.run(*TWO).returncode == 0


# --- running for real ---------------------------------------------------------------------------------------


@pytest.fixture
def real_sweeps(sweeps):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    # Two runs that take two threads each on two cores wait for one another most of the time.
    sweeps.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return sweeps


def summary(sweeps, run: str) -> dict:
    return json.loads((sweeps.directory / "runs" / run / "summary.json").read_text())


def test_a_real_sweep_with_refused_runs_among_good_ones(real_sweeps):
    words = (*DIGITS, "--optimizers", "sgd shb", "--seeds", 0, "--jobs_per_gpu", 2, "--max_steps", 2)
    done = real_sweeps.run(*words, "--batchsizes", "64 2048")
    good = {name(optimizer, 64, more="-max_steps2"): ("finished", "0") for optimizer in ("sgd", "shb")}
    refused = {f"normal {optimizer} b=2048 seed=0": ("refused", "-") for optimizer in ("sgd", "shb")}
    assert (done.returncode, done.stderr, table(done.stdout)) == (1, "", good | refused)
    for run in good:
        assert (summary(real_sweeps, run)["status"], summary(real_sweeps, run)["steps"]) == ("finished", 2)
    before = {path: path.stat().st_mtime_ns for path in real_sweeps.files()}
    done = real_sweeps.run(*words, "--batchsizes", "64")
    assert (done.returncode, table(done.stdout)) == (0, {run: ("finished", "-") for run in good})
    assert {path: path.stat().st_mtime_ns for path in real_sweeps.files()} == before


def test_a_real_run_that_diverges_is_told_and_not_repeated(real_sweeps):
    words = (*DIGITS, "--optimizers", "sgd", "--seeds", 0, "--batchsizes", 64, "--max_steps", 4, "--lr", "1e30")
    run = name("sgd", 64, more="-max_steps4").replace("lr0.1", "lr1e+30")
    done = real_sweeps.run(*words)
    assert (done.returncode, table(done.stdout)) == (1, {run: ("diverged", "3")})
    done = real_sweeps.run(*words)
    assert (done.returncode, table(done.stdout)) == (1, {run: ("diverged", "-")})


def test_a_real_sweep_survives_a_killed_run_and_ctrl_c(real_sweeps):
    words = (*DIGITS, "--optimizers", "sgd shb", "--seeds", 0, "--batchsizes", 16, "--jobs_per_gpu", 2)
    words = (*words, "--max_steps", 100, "--checkpoint_every", 0.3)
    names = [name(optimizer, 16, more="-max_steps100") for optimizer in ("sgd", "shb")]
    directories = [real_sweeps.directory / "runs" / run for run in names]

    process = real_sweeps.start(*words)
    wait_until(lambda: all((run / "checkpoint.pt").exists() for run in directories), "both checkpoints")
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    children = [line.split(maxsplit=2) for line in listing.splitlines()]
    (sgd,) = [int(pid) for pid, parent, args in children if int(parent) == process.pid and " sgd " in args]
    os.kill(sgd, signal.SIGKILL)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert table(out) == dict(zip(names, [("failed", "137"), ("stopped", "143")], strict=True))

    done = real_sweeps.run(*words)
    assert (done.returncode, set(table(done.stdout).values())) == (0, {("finished", "0")})
    for directory in directories:
        rows = (directory / "metrics.csv").read_text().splitlines()[1:]
        assert [row.split(",")[0] for row in rows] == ["90", "100"]
        assert summary(real_sweeps, directory.name)["steps"] == 100
        log = directory.with_name(f"{directory.name}.log").read_text()
        assert int(re.search(r"resumed at step (\d+)", log)[1]) > 0


# --- SLURM and wandb ----------------------------------------------------------------------------------------


def test_the_slurm_array_is_the_grid_each_point_once(tmp_path):
    script = ROOT / "scripts" / "sweep_slurm.sh"
    first, last = map(int, re.search(r"^#SBATCH --array=(\d+)-(\d+)$", script.read_text(), re.M).groups())
    seen = []
    for task in range(first, last + 1):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "PYTHON": "echo"}
        words = [str(script), "critical", "--eps", "1.0", "0.5"]
        line = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        program, *rest = line.split()
        args = arguments.parse(rest)
        assert (program, args.mode, args.eps, args.resume) == ("main.py", "critical", [1.0, 0.5], True)
        seen.append((args.optimizer, args.batchsize, args.seed))
    assert len(seen) == len(set(seen)) and set(seen) == GRID
    assert [b for _, b, _ in seen] == sorted(b for _, b, _ in seen)


@pytest.mark.parametrize(("task", "words"), [("99", ["normal"]), (None, ["normal"]), ("0", [])])
def test_a_slurm_task_outside_the_grid_is_an_error(task, words):
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_ARRAY_TASK_ID"} | {"PYTHON": "echo"}
    environment |= {"SLURM_ARRAY_TASK_ID": task} if task else {}
    words = [str(ROOT / "scripts" / "sweep_slurm.sh"), *words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_in_a_slurm_task_the_signal_reaches_python_itself(tmp_path):
    # sbatch signals the batch shell alone: it has to have become python.
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable} -S\nimport os\nprint(os.getpid())\n")
    python.chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "PYTHON": str(python)}
    words = [str(ROOT / "scripts" / "sweep_slurm.sh"), "normal"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert int(process.communicate(timeout=PATIENCE)[0]) == process.pid
    assert "\n#SBATCH --signal=B:TERM@" in (ROOT / "scripts" / "sweep_slurm.sh").read_text()


def test_wandb_agents_run_the_grid_with_main_py(tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    agent = pytest.importorskip("wandb.wandb_agent")
    if not hasattr(agent.Agent, "_command_run") or not hasattr(agent, "AgentProcess"):
        pytest.skip("this version of wandb builds its agents' command line in another place")
    config = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text())
    assert (config["method"], config["program"], config["project"]) == ("grid", "main.py", "role_of_momentum")
    commands = []

    class Recorder:
        def __init__(self, command, **options):
            commands.append(command)

    monkeypatch.setattr(agent, "AgentProcess", Recorder)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "is set by the agent, and undone by this")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "likewise")
    one = agent.Agent(api=None, queue=None, sweep_id="sweep")
    one._sweep_command = config["command"]
    parameters = config["parameters"]
    for k, values in enumerate(itertools.product(*(p["values"] for p in parameters.values()))):
        point = {key: {"value": value} for key, value in zip(parameters, values, strict=True)}
        one._command_run({"type": "run", "run_id": f"run{k}", "program": config["program"], "args": point})
    seen = []
    for command in commands:
        assert command[:3] == ["/usr/bin/env", "python", "main.py"]
        args = arguments.parse(command[3:])
        assert (args.mode, args.eps, args.resume, args.wandb_mode) == ("critical", [1.0, 0.7, 0.5], True, "online")
        seen.append((args.optimizer, args.batchsize, args.seed))
    assert len(seen) == len(set(seen)) and set(seen) == GRID
    words = [sys.executable, ROOT / "main.py", *commands[0][3:], "--runs_dir", tmp_path, "--print_name"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert answer == f"new {tmp_path}/critical-CIFAR100-ResNet18-sgd-b8-lr0.1-seed0\n"
