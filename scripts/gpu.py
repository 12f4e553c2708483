"""On a machine with a GPU, once: run its tests, and measure what has not been measured there.

tests      tests/test_cuda.py
graph      how far --compile's graph and eager steps drift apart, beside eager and eager again, and how fast each is
speed      bench.py: ResNet18 at b = 8, 32, 128, 1024 and WideResNet-28-10 at 128, eager and graphed
packed     steps a second of 1, 2, 4 and 8 runs at once on the GPU, b = 8
published  steps to ε with SHB, ResNet18, CIFAR-100, b = 1024, beside the published; graphed if tests and graph pass

A stage takes at most --minutes; the same command goes on where it was, and leaves out what is done. Everything is
in OUT/gpu.json and, to read, in OUT/README.md. CIFAR-100 comes from --data_dir (or by download) for `published`;
the other stages need no data set, and use random images. Neither wandb nor scikit-learn is needed.
Exit status: 0 all is done; 1 a stage has failed (the others go on); 2 bad argument; 124 time was over, go on;
130 or 143 stopped by a signal.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arguments  # noqa: E402
import utils  # noqa: E402

MAIN, BENCH, TESTS = ROOT / "main.py", ROOT / "bench.py", ROOT / "tests" / "test_cuda.py"
OPTIMIZERS, DRIFT_AT, DRIFT_BATCH = ("sgd", "shb", "nshb"), (1, 10, 100, 1000), 128
SPEED = [("ResNet18", 8), ("ResNet18", 32), ("ResNet18", 128), ("ResNet18", 1024), ("WideResNet-28-10", 128)]
PACKED, PACKED_STEPS = (1, 2, 4, 8), 3000
POINT = {"batchsize": 1024, "eps": [1.0, 0.7, 0.5]}
GRACE = 60  # seconds that a stopped run has for its checkpoint


class Failed(Exception):
    """A stage cannot go on; the message says why, in one line."""


class TimeOver(Exception):
    """The stage's minutes are over; what it has found is kept, and the next call goes on."""


# --- processes ----------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """In a child: SIGTERM when this program is gone, or else a run would keep the GPU and its record."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run(commands: list[list], log: Path, deadline: float) -> None:
    """Run Python programs side by side to their end. Failed, with the last line of `log`, if one goes wrong.

    At `deadline`, and whenever this is left early, they get SIGTERM and GRACE seconds. Raises TimeOver then.
    """
    processes = []
    with open(log, "ab") as file:
        try:
            for words in commands:
                command = [sys.executable, *map(str, words)]
                options = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL, "start_new_session": True}
                processes.append(subprocess.Popen(command, preexec_fn=end_with_parent, **options))
            for process in processes:
                process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeOver from None
        finally:
            stop(processes)
    bad = [process.returncode for process in processes if process.returncode]
    if bad:
        lines = log.read_text(errors="replace").split("\n")
        raise Failed(f"exit status {bad[0]}, see {log}: {([line for line in lines if line] or ['nothing'])[-1]}")


def stop(processes: list[subprocess.Popen]) -> None:
    """SIGTERM to those that still run, and after GRACE seconds SIGKILL, to all that they have started too."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(args: argparse.Namespace, *flags) -> list:
    """The command line of a run of `critical` that records every gradient norm."""
    flags = [f"--device={args.device}", "--wandb_mode=disabled", "--model=ResNet18", *flags]
    return [MAIN, "--mode=critical", "--dataset=CIFAR100", *flags]


def random_images(directory: str) -> None:
    """A CIFAR100.npz of random pixels and labels, where only speed or agreement counts."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 50_000), ("test", 10_000)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 100, n)
    np.savez(Path(directory) / "CIFAR100.npz", **arrays)


def progress(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps made, and when (seconds since 1970), by the rows of a run's metrics.csv."""
    with open(directory / "metrics.csv", newline="") as file:
        rows = [(float(row["steps"]), float(row["seconds"])) for row in csv.DictReader(file)]
    steps, seconds = np.array(rows).T
    return steps, seconds - seconds[-1] + (directory / "metrics.csv").stat().st_mtime


# --- stages: each adds to `found` what it finds, and begins with what is not there yet ----------------------


def tests(args: argparse.Namespace, found: dict, deadline: float) -> None:
    """The CUDA tests, in a pytest without the repository's own options, which need pytest-xdist."""
    if importlib.util.find_spec("pytest") is None:
        raise Failed(f"pytest is missing: {sys.executable} -m pip install pytest")
    log = args.out / "tests.log"
    log.unlink(missing_ok=True)
    words = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", f"--rootdir={ROOT}", TESTS]
    run([words], log, deadline)
    found["result"] = log.read_text().strip().split("\n")[-1]
    if "passed" not in found["result"]:
        raise Failed(f"no test has run: {found['result']}")


def graph(args: argparse.Namespace, found: dict, deadline: float) -> None:
    """Gradient norms of three runs from one seed; eager twice, because a GPU's sums have no fixed order."""
    sides = {"eager": [], "again": [], "graphed": ["--compile"]}
    for optimizer in OPTIMIZERS:
        if optimizer in found:
            continue
        norms, rates = {}, {}
        with tempfile.TemporaryDirectory() as directory:
            random_images(directory)
            for side, flags in sides.items():
                flags = [f"--optimizer={optimizer}", f"--batchsize={DRIFT_BATCH}", "--lr=0.01", "--eps=1e-9", *flags]
                flags += [f"--max_steps={max(DRIFT_AT)}", f"--data_dir={directory}", f"--runs_dir={directory}"]
                run([train(args, *flags, f"--name={side}")], args.out / "graph.log", deadline)
                steps, times = progress(Path(directory) / side)
                rates[side] = float((steps[-1] - steps[0]) / (times[-1] - times[0]))
                norms[side] = np.fromfile(Path(directory) / side / "gradient_norms.f32", "<f4").astype(float)
        drift = {s: np.abs(norms[s] / norms["eager"] - 1) for s in ("again", "graphed")}
        largest = {side: {str(n): float(values[:n].max()) for n in DRIFT_AT} for side, values in drift.items()}
        found[optimizer] = {"drift": largest, "steps_a_second": rates}
        args.save()
    early = str(DRIFT_AT[-2])
    for optimizer in OPTIMIZERS:
        again, graphed = (found[optimizer]["drift"][side][early] for side in ("again", "graphed"))
        if not graphed <= max(1e-3, 3 * again):
            raise Failed(
                f"{optimizer}: graphed and eager differ by {graphed:.2g} in {early} steps, eager by {again:.2g}"
            )


def speed(args: argparse.Namespace, found: dict, deadline: float) -> None:
    """bench.py, one point at a time."""
    for model, b in SPEED:
        if f"{model} b={b}" in found:
            continue
        out = args.out / "bench.json"
        words = [BENCH, "--models", model, "--batchsizes", b, "--modes", "normal", "--rounds", 5, "--seconds", 1]
        words += ["--compile", "--device", args.device, "--data_dir", args.data_dir, "--out", out]
        run([words], args.out / "speed.log", deadline)
        keys = ("side", "steps_a_second", "images_a_second", "seconds_a_step", "quartiles", "peak_bytes")
        found[f"{model} b={b}"] = [{key: row[key] for key in keys} for row in json.loads(out.read_text())["rows"]]
        out.unlink()
        args.save()


def packed(args: argparse.Namespace, found: dict, deadline: float) -> None:
    """Steps a second of all runs together, while all of them are training."""
    for count in PACKED:
        if str(count) in found:
            continue
        with tempfile.TemporaryDirectory() as directory:
            random_images(directory)
            flags = ["--batchsize=8", "--lr=0.01", "--eps=1e-9", f"--max_steps={PACKED_STEPS}"]
            flags += [f"--data_dir={directory}", f"--runs_dir={directory}"]
            commands = [train(args, *flags, f"--name={i}", f"--seed={i}") for i in range(count)]
            run(commands, args.out / "packed.log", deadline)
            runs = [progress(Path(directory) / str(i)) for i in range(count)]
        begin, end = max(times[0] for _, times in runs), min(times[-1] for _, times in runs)
        if end <= begin:
            raise Failed(f"{count} runs were never training all at once")
        made = sum(float(np.diff(np.interp([begin, end], times, steps))[0]) for steps, times in runs)
        found[str(count)] = {"steps_a_second": made / (end - begin), "seconds": end - begin}
        args.save()


def published(args: argparse.Namespace, found: dict, deadline: float) -> None:
    """The published point, in portions; whether graphed is decided once."""
    stages = args.content["stages"]
    allowed = all(stages.get(name, {}).get("status") == "done" for name in ("tests", "graph"))
    found.setdefault("flags", ["--compile"] if allowed else [])
    flags = ["--optimizer=shb", f"--batchsize={POINT['batchsize']}", "--eps", *POINT["eps"], "--checkpoint_every=60"]
    flags += [f"--data_dir={args.data_dir}", f"--runs_dir={args.out / 'runs'}", "--name=published", "--resume"]
    directory = args.out / "runs" / "published"
    log = args.out / "published.log"
    try:
        run([train(args, *flags, *found["flags"])], log, deadline)
    finally:
        stopped = re.findall(r"stopped after step (\d+)", log.read_text(errors="replace")) if log.exists() else []
        found["steps_made"] = int(stopped[-1]) if stopped else 0
    summary = json.loads((directory / "summary.json").read_text())
    found |= {key: summary[key] for key in ("status", "steps", "seconds")} | {"rows": []}
    with open(ROOT / "published_shb_steps.csv", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    (theirs,) = (row for row in rows if int(row["batch_size"]) == POINT["batchsize"])
    for eps, steps in summary["results"]["steps_to_eps"].items():
        found["rows"].append({"eps": float(eps), "steps": steps, "published": int(theirs[f"steps_eps_{eps}"])})


STAGES = {"tests": tests, "graph": graph, "speed": speed, "packed": packed, "published": published}


# --- the page -----------------------------------------------------------------------------------------------


def table(header: str, rows: list[tuple]) -> list[str]:
    """Lines of a Markdown table; numbers to four digits."""
    columns = header.split(" | ")
    cells = [[f"{v:,.4g}" if isinstance(v, float) else "–" if v is None else str(v) for v in row] for row in rows]
    return ["", f"| {header} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in cells)]


def section(name: str, found: dict) -> list[str]:
    """What a stage has found, as lines of Markdown."""
    if name == "tests":
        return [found.get("result", "")]
    if name == "graph":
        header = "optimizer | compared | " + " | ".join(f"{n} steps" for n in DRIFT_AT) + " | steps/s"
        rows = [
            (optimizer, f"{side} with eager", *drift.values(), one["steps_a_second"][side])
            for optimizer, one in found.items()
            for side, drift in one["drift"].items()
        ]
        return ["Largest relative difference of ‖g_t‖ within so many steps.", *table(header, rows)]
    if name == "speed":
        rows = []
        for point, sides in found.items():
            for row in sides:
                low, high = (1e3 * quartile for quartile in row["quartiles"])
                times = (1e3 * row["seconds_a_step"], low, high)
                rows.append((point, row["side"], *times, row["images_a_second"], row["peak_bytes"] / 1e9))
        return table("point | side | ms a step | lower quartile | upper quartile | images/s | peak GB", rows)
    if name == "packed":
        return table("runs | steps/s of all", [(count, one["steps_a_second"]) for count, one in found.items()])
    rows = [(row["eps"], row["steps"], row["published"]) for row in found.get("rows", [])]
    lines = [
        f"{found.get('steps', found.get('steps_made', 0)):,} steps made, with {found.get('flags') or 'eager steps'}."
    ]
    return lines + (table("ε | steps, one seed | published", rows) if rows else [])


def page(content: dict) -> str:
    """OUT/README.md."""
    lines = ["# What scripts/gpu.sh has measured", "", "Written by it from gpu.json beside this page.", ""]
    lines += [f"- {key}: {value}" for key, value in content["machine"].items()]
    for name, stage in content["stages"].items():
        reason = f": {stage['reason']}" if "reason" in stage else ""
        lines += ["", f"## {name}: {stage['status']}{reason}", "", *section(name, stage["found"])]
    return "\n".join(lines) + "\n"


# --- all of it ----------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked arguments. Raises UserError."""
    parser = arguments.Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    minutes = arguments.number(float, "a finite number above 0", lambda v: v > 0)
    add = parser.add_argument
    add("--minutes", type=minutes, default=9.0, help="of each stage, at most (default: 9)")
    add("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="which (default: all, in this order)")
    add("--device", type=arguments.device, default="cuda", help="cuda, cuda:N (default: cuda)")
    add("--data_dir", "--data-dir", type=arguments.path, default=Path("data"), metavar="DIR", help="(default: data)")
    add("--out", type=arguments.path, default=ROOT / "results" / "gpu", metavar="DIR", help="(default: results/gpu)")
    return parser.parse_args(argv)


def machine(device: torch.device) -> dict:
    """What is measured: hardware, driver, versions."""
    found = utils.environment(device) | {"cores": os.cpu_count(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):  # a container may have no nvidia-smi
            answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
            found["driver"] = answer[0] if answer else None
        found["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def load(args: argparse.Namespace, now: dict) -> dict:
    """gpu.json as it was left, or a new one. UserError if it is another machine's, or damaged."""
    file = args.out / "gpu.json"
    if not file.exists():
        return {"machine": now, "stages": {}}
    try:
        content = json.loads(file.read_text())
        before = content["machine"]
        status = [stage["status"] for stage in content["stages"].values()]
    except (ValueError, TypeError, KeyError) as error:
        raise arguments.UserError(f"argument --out: {file} is damaged ({error}); delete it") from error
    differ = [key for key in ("device", "torch") if before.get(key) != now[key]]
    if status and differ:
        key = differ[0]
        raise arguments.UserError(
            f"argument --out: {file} has another {key}, {before.get(key)}, not {now[key]}; name another directory"
        )
    return content


def work(name: str, args: argparse.Namespace) -> str:
    """One stage, as far as it comes. Returns its status: done, partial or failed."""
    stage = args.content["stages"].setdefault(name, {"status": "partial", "seconds": 0.0, "found": {}})
    if stage["status"] == "done":
        return "done"
    if stage["status"] == "failed":
        stage = args.content["stages"][name] = {"status": "partial", "seconds": 0.0, "found": {}}
    begun, before = time.monotonic(), json.dumps(stage["found"])
    try:
        STAGES[name](args, stage["found"], begun + 60 * args.minutes)
        stage["status"] = "done"
    except TimeOver:
        if json.dumps(stage["found"]) == before:
            stage |= {
                "status": "failed",
                "reason": f"nothing came of {args.minutes:g} --minutes",
            }
    except (Failed, OSError, ValueError, KeyError) as error:
        stage |= {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}
    finally:
        stage["seconds"] += time.monotonic() - begun
        args.save()
    return stage["status"]


def main(argv: list[str]) -> int:
    """All chosen stages. Returns the exit status; raises UserError."""
    args = parse(argv)
    now = machine(utils.pick_device(args.device))
    args.content = load(args, now)
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        utils.write_json(args.out / "gpu.json", args.content)
        with utils.replacing(args.out / "README.md") as file:
            file.write(page(args.content).encode())

    args.save, ends = save, []
    for name in STAGES:
        if name in args.stages:
            print(f"{name}: at most {args.minutes:g} minutes", flush=True)
            ends.append(work(name, args))
            reason = args.content["stages"][name].get("reason")
            print(f"{name}: {ends[-1]}{f': {reason}' if reason else ''}", flush=True)
    print(f"written: {args.out / 'README.md'}" + ("; the same command goes on" if "partial" in ends else ""))
    return 1 if "failed" in ends else 124 if "partial" in ends else 0


def leave(signum: int, frame) -> None:
    """On SIGTERM and SIGINT: what runs is stopped and what is found is kept on the way out."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)
    try:
        sys.exit(main(sys.argv[1:]))
    except (arguments.UserError, OSError) as error:
        arguments.say("error", error)
        sys.exit(2)
