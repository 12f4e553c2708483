"""The runs of scripts/sweep.py and pool.py: their start, end and stopping, by a stand-in for main.py, and for real.

The stand-in does what a test says instead of training, and writes down when it was started, on which GPU, and what hit
it. It takes main.cli's place where runs are forked, and the interpreter's where they are processes, as on GPUs.
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
from child import outcome
from conftest import PATIENCE

ROOT = Path(__file__).parent.parent

STAND_IN = f"""#!{sys.executable}
import fcntl, json, os, signal, sys, time
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
from arguments import EXIT_STATUS, parse, planned_steps

def cli(argv):
    global lock
    args = parse(argv)
    run = args.runs_dir / args.name

    def say(*words):
        with open(os.environ["EVENTS"], "a") as file:
            file.write(" ".join(map(str, (args.name, *words))) + "\\n")

    signals = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: signals.append(number))
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: {{run}} belongs to another process\\nand a library's last word", file=sys.stderr)
        return 2
    sys.stdin.read()  # a question would find nobody to answer it: it must not wait
    say("start", os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid())
    acts = json.loads(os.environ["ACTS"])
    act = next((acts[part] for part in acts if part in args.name), "finished")
    if act == "crash":
        raise RuntimeError("boom")
    if act == "nothing":
        return 0
    if act.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, act))
    told = False
    while act in ("wait", "deaf") and not (os.path.exists("released") and not signals):
        time.sleep(0.02)
        if signals and not told:
            say("signals", *signals)
            told = True
        if signals and act == "wait":
            return 128 + signals[0]
    say("end")
    status = act if act in EXIT_STATUS else "finished"
    content = {{"status": status, "steps": planned_steps(args), "args": vars(args), "results": {{}}}}
    (run / "summary.json").write_text(json.dumps(content, default=str, indent=1))
    return EXIT_STATUS[status]

if sys.argv[1].endswith("main.py"):
    sys.exit(cli(sys.argv[2:]))
import main, pool, sweep
main.cli, pool.load = cli, lambda: None
sweep.as_command(sweep.main)
"""

# The real main.py in forked runs, and what they cost. By their seed some come to harm before step 1 or 41.
REAL = f"""
import os, resource, signal, sys
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
import main, pool, sweep

def no_memory():
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
    bytearray(2**30)

def harmed(argv):
    import utils
    from training.record import Record
    checks, check, begin, seed = [], utils.Signals.check, Record.begin, sweep.parse(argv).seed
    acts = {{1: lambda: os.kill(os.getpid(), 9), 2: lambda: os.kill(os.getpid(), 11), 3: no_memory}}

    def counting(self):
        checks.append(1)
        if len(checks) == 40 and seed == 4:
            os.kill(os.getppid(), signal.SIGINT)
            signal.pause()
        check(self)

    Record.begin = lambda *what: (begin(*what), acts.get(seed, lambda: None)())
    utils.Signals.check = counting
    return cli(argv)

def load():
    loaded()
    print("threads", len(os.listdir("/proc/self/task")), "wandb", "wandb" in sys.modules)

cli, loaded, pool.load = main.cli, pool.load, load
if "HARM" in os.environ:
    main.cli = harmed
try:
    sweep.as_command(sweep.main)
finally:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("seconds", used.ru_utime + used.ru_stime)
"""


class Sweeps:
    """Sweeps in one directory. acts: what the stand-in does in runs whose name has the key in it."""

    def __init__(self, directory: Path, command: list):
        self.directory, self.command, self.acts, self.started = directory, list(map(str, command)), {}, []
        self.events_file = directory.parent / f"{directory.name}.events"
        self.environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        self.environment |= {"EVENTS": str(self.events_file), "WANDB_MODE": "disabled"}

    def run(self, *words) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *words, command=(), **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": as_in_a_terminal} | options
        environment = self.environment | {"ACTS": json.dumps(self.acts)}
        words = [*command, *self.command, *map(str, words)]
        self.started.append(subprocess.Popen(words, cwd=self.directory, env=environment, text=True, **options))
        return self.started[-1]

    def events(self, kind: str, count: int = 0) -> list[list[str]]:
        """[name, *details] of all events of a kind, in order; waits until there are so many."""
        for _ in range(50 * PATIENCE):
            lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
            found = [[name, *rest] for name, what, *rest in map(str.split, lines) if what == kind]
            if len(found) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"waited {PATIENCE} s for {count} × {kind}")


def running(pid: str, patience: float = 0) -> bool:
    """Whether a process runs, still after so many seconds."""
    state, end = "R", time.monotonic() + patience
    while state and not state.startswith("Z"):
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
        if time.monotonic() > end:
            break
    return bool(state) and not state.startswith("Z")


def as_in_a_terminal():
    """Where pytest itself runs in the background or under nohup, these are ignored, and would stay so."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture(params=["forked", "processes"])
def sweeps(tmp_path, request):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "work").mkdir()
    sweeps = Sweeps(tmp_path / "work", [stand_in])
    sweeps.gpus = ["4", "7"] if request.param == "processes" else []
    sweeps.two = (*TWO, "--jobs_per_gpu", 1 if sweeps.gpus else 2)
    if sweeps.gpus:
        sweeps.environment |= {"CUDA_VISIBLE_DEVICES": "4,7", "PYTHON": str(stand_in)}
    yield sweeps
    for process in sweeps.started:  # of a test that has failed
        while process.poll() is None:
            process.terminate()
            time.sleep(1)


def table(output: str) -> dict[str, tuple[str, str]]:
    """Of the table at the end, {name: (outcome, exit status)}."""
    rows = re.split(r"\noutcome +status +time +run\n", output)[1]
    found = re.findall(r"^(\S+) +(\S+) +(?:-|\d+:\d\d:\d\d)  ([^:\n]*)", rows, re.MULTILINE)
    return {name: (outcome, status) for outcome, status, name in found}


def name(b: int, seed: int = 0) -> str:
    return f"normal-mnist1d-MLP-sgd-b{b}-lr0.1-seed{seed}"


MLP = ("--dataset", "mnist1d", "--model", "MLP", "--optimizers", "sgd")
TWO = ("normal", *MLP, "--seeds", "0 1", "--batchsizes", "8 16")  # two at a time of four
FOUR = [name(b, seed) for b in (8, 16) for seed in (0, 1)]


def test_every_run_once_in_the_order_of_the_lists_in_as_many_slots_and_under_nohup_a_hangup_stops_nothing(sweeps):
    sweeps.acts = {"": "wait"}
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = sweeps.start(*sweeps.two, "--lr=0.1", "--runs_dir", "my runs", **nohup)
    for pid in (process.pid, *(int(pid) for _, _, pid in sweeps.events("start", 2))):
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert sorted(gpu for _, gpu, _ in sweeps.events("start")) == (sweeps.gpus or ["None", "None"])
    (sweeps.directory / "released").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert table(out) == dict.fromkeys(FOUR, ("finished", "0"))
    assert re.findall(r"^\[(\d)/4\] started (\S+)", out, re.MULTILINE) == list(zip("1234", FOUR, strict=True))
    assert sorted(run for run, *_ in sweeps.events("start")) == sorted(FOUR)
    log = (sweeps.directory / "my runs" / f"{FOUR[0]}.log").read_text()
    assert log.startswith("$ ") and " --runs_dir 'my runs' " in log


def test_no_failure_stops_the_rest_and_a_restart_does_only_what_is_missing(sweeps):
    sweeps.acts = {"b8-": "crash", "b16-": "SIGKILL", "b32-": "diverged", "b64-": "not_reached", "b256-": "nothing"}
    sweeps.acts |= {"b1024-": "SIGSEGV"}
    words = ("normal", *MLP, "--seeds", 0, "--batchsizes", "8 16 256 32 64 128 512 1024 8192")
    log = sweeps.directory / "runs" / f"{name(512)}.log"
    log.mkdir(parents=True)  # a run that cannot even be started
    done = sweeps.run(*words)
    assert (done.returncode, done.stderr) == (1, "")
    outcomes = {8: ("failed", "1"), 16: ("failed", "137"), 256: ("unfinished", "0"), 32: ("diverged", "3")}
    outcomes |= {64: ("not_reached", "0"), 128: ("finished", "0"), 512: ("failed", "-"), 1024: ("failed", "139")}
    refused = {"normal --batchsize=8192 --seed=0 --optimizer=sgd": ("refused", "-")}
    assert table(done.stdout) == {name(b): outcome for b, outcome in outcomes.items()} | refused
    assert f"Is a directory: 'runs/{log.name}'" in done.stdout
    assert f"see runs/{name(8)}.log: RuntimeError: boom" in done.stdout
    assert "Traceback" in (sweeps.directory / "runs" / f"{name(8)}.log").read_text()

    sweeps.acts = {}
    log.rmdir()
    done = sweeps.run(*words)
    assert {run for run, *_ in sweeps.events("start")[7:]} == {name(b) for b in (8, 16, 256, 512, 1024)}
    assert table(done.stdout)[name(32)] == ("diverged", "-") and table(done.stdout)[name(8)] == ("finished", "0")
    assert done.returncode == 1  # one has diverged, one is refused
    assert sweeps.run(*words[:-1], "8 16 64 128").returncode == 0


def ctrl_c(sweeps, starts: int, **options) -> tuple[int, str]:
    """Two runs at a time in a terminal, where Ctrl-C is typed after so many starts; exit status and output."""
    keyboard, terminal = pty.openpty()

    def take_terminal():
        as_in_a_terminal()
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = sweeps.start(*sweeps.two, stdin=terminal, preexec_fn=take_terminal, **options)
    os.close(terminal)
    sweeps.events("start", starts)
    os.write(keyboard, b"\x03")
    out, _ = process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    return process.returncode, out


def test_ctrl_c_lets_each_run_write_its_checkpoint_and_the_same_command_goes_on(sweeps):
    sweeps.acts = {"b16-": "wait"}
    status, out = ctrl_c(sweeps, 4)
    assert status == 130
    # From the sweep alone: the terminal's own Ctrl-C would have been there first, as a 2.
    assert sorted(sweeps.events("signals")) == [[name(16, seed), "15"] for seed in (0, 1)]
    assert list(table(out).values()) == [("finished", "0")] * 2 + [("stopped", "143")] * 2
    again = re.search("^stopped; to go on, run the same command again: (.*)$", out, re.MULTILINE)[1]
    assert shlex.split(again) == [str(ROOT / "scripts" / "sweep.sh"), *map(str, sweeps.two)]
    sweeps.acts = {}
    assert sweeps.run(*sweeps.two).returncode == 0
    assert sorted(run for run, *_ in sweeps.events("start")[4:]) == FOUR[2:]


def test_ctrl_c_reaches_the_runs_though_it_also_ends_the_tee_that_the_sweep_writes_to(sweeps):
    sweeps.acts = {"": "wait"}
    ctrl_c(sweeps, 2, command=("bash", "-c", '"$0" "$@" 2>&1 | tee out'))
    assert sorted(sweeps.events("signals", 2)) == [[name(8, seed), "15"] for seed in (0, 1)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_sweep_starts_nothing_new_and_a_second_leaves_no_process(sweeps, signum):
    sweeps.acts = {"seed0": "deaf", "seed1": "wait"}
    process = sweeps.start(*sweeps.two)
    sweeps.events("start", 2)
    process.send_signal(signum)
    sweeps.events("signals", 2)
    time.sleep(0.5)  # in which one run has ended, and leaves its slot
    assert process.poll() is None and len(sweeps.events("start")) == 2
    process.send_signal(signum)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "killed; to go on" in out
    assert not any(running(pid, PATIENCE) for _, _, pid in sweeps.events("start"))


def test_runs_outlive_a_killed_sweep_and_the_next_one_says_so(sweeps):
    sweeps.acts = {"": "wait"}
    process = sweeps.start(*sweeps.two)
    sweeps.events("start", 2)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert all(running(pid) for _, _, pid in sweeps.events("start"))
    done = sweeps.run(*sweeps.two[:-3], 8)
    assert done.returncode == 1
    assert table(done.stdout) == {name(8, seed): ("refused", "2") for seed in (0, 1)}
    assert f"error: runs/{name(8)} belongs to another process" in done.stdout
    (sweeps.directory / "released").touch()
    assert not any(running(pid, PATIENCE) for _, _, pid in sweeps.events("start"))
    assert sweeps.run(*sweeps.two).returncode == 0 and len(sweeps.events("end")) == 4


def contents(directory: Path) -> dict:
    """What a run has recorded, but for times, versions and places."""
    found = outcome(directory)
    return found | {"summary": {key: found["summary"][key] for key in ("status", "steps", "results")}}


def spoken(log: Path) -> list[str]:
    """The lines of a log but for the command and wandb's, without times and directories."""
    lines = [re.sub(r" seconds \S+|\S*/", "", line) for line in log.read_text().splitlines()]
    return [line for line in lines if not line.startswith(("$", "wandb"))]


@pytest.fixture
def real(tmp_path, mnist1d_dir):
    """Forked runs of the real main.py."""
    (tmp_path / "data").symlink_to(mnist1d_dir)
    (tmp_path / "driver.py").write_text(REAL)
    return Sweeps(tmp_path, [sys.executable, tmp_path / "driver.py"])


def test_a_forked_run_costs_less_than_half_a_second(real):
    done = real.run("normal", *MLP, "--device=cpu", "--batchsizes=64", "--max_steps=1", "--seeds", "0 1 2 3 4 5 6 7")
    assert (done.returncode, done.stderr) == (0, "")
    seconds = float(re.search(r"^seconds (\S+)$", done.stdout, re.MULTILINE)[1])  # of a core, whatever else runs
    assert seconds < 8 * 0.5


def test_forked_runs_leave_what_processes_leave_whatever_becomes_of_others(real, tmp_path):
    """With two threads, as a fork after OpenMP has computed would hang."""
    real.environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    flags = ["--dataset=mnist1d", "--model=MLP", "--device=cpu", "--steps=60", "--draws=2"]
    words = ["sampling", *flags, "--batchsizes=32", "--optimizers=shb", "--seeds", "0 1 2 3 4 5"]

    real.environment["HARM"] = "1"
    process = real.start(*words)
    one = ["--mode=sampling", "--batchsize=32", "--optimizer=shb", "--seed=4", "--runs_dir=plain"]
    with open(tmp_path / "plain.log", "w") as log:
        command = [sys.executable, str(ROOT / "main.py"), *flags, *one]
        plain = subprocess.Popen(command, cwd=tmp_path, env=real.environment, stdout=log, stderr=log)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "")
    assert re.search(r"^threads [123] wandb False$", out, re.MULTILINE)  # NumPy's and SciPy's BLAS, which survive it
    ends = [("finished", "0"), ("failed", "137"), ("failed", "139"), ("failed", "1"), ("stopped", "143"), ("new", "-")]
    assert list(table(out).values()) == ends
    assert ".log: error: out of memory" in out
    assert plain.wait(PATIENCE) == 0

    del real.environment["HARM"]
    done = real.run(*words[:-1], "0 3 4", "--wandb_mode=offline")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(table(done.stdout).values()) == [("finished", "-"), ("finished", "0"), ("finished", "0")]
    assert len(list((tmp_path / "runs").glob("*/wandb/offline-run-*/*.wandb"))) == 2
    (expected,) = (tmp_path / "plain").iterdir()
    assert contents(tmp_path / "runs" / expected.name) == contents(expected)
    log = spoken(tmp_path / "runs" / f"{expected.name}.log")
    assert log.pop(0).startswith("stopped after step 40,") and log.pop(0).startswith("resumed at step 40")
    assert log == spoken(tmp_path / "plain.log")
