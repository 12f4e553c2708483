"""On a machine with a GPU, once: run its tests, and measure what has not been measured there.

tests      tests/test_cuda.py
graph      how far --compile's graph and eager steps drift apart, beside eager and eager again, and how fast each is
speed      bench.py: ResNet18 at b = 8, 32, 128, 1024 and WideResNet-28-10 at 128, eager and graphed
packed     steps a second of 1, 2, 4 and 8 runs at once on the GPU, b = 8
published  steps to ε with SHB, ResNet18, CIFAR-100, b = 1024, beside the published; graphed if tests and graph pass

A stage takes at most --minutes; the same command goes on where it was, and leaves out what is done. Everything is
in OUT/gpu.json and, to read, in OUT/README.md. Only `published` needs CIFAR-100, from --data_dir or by download.
Exit status: 0 done; 1 a stage has failed; 2 bad argument; 124 time was over, go on; 130 or 143 stopped by a signal.
"""

import argparse
import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arguments  # noqa: E402
import utils  # noqa: E402
from files import read_json, replacing, write_json  # noqa: E402
from messages import UserError, say  # noqa: E402

MAIN, BENCH, TESTS = ROOT / "main.py", ROOT / "bench.py", ROOT / "tests" / "test_cuda.py"
DRIFT_AT = (1, 10, 100, 1000)


def train(args: argparse.Namespace, directory: str | Path, name: str, *flags) -> list:
    """The command line of a run of `critical`, recorded in `directory`."""
    fixed = ["--mode=critical", "--dataset=CIFAR100", "--model=ResNet18", "--wandb_mode=disabled"]
    return [MAIN, *fixed, f"--device={args.device}", f"--runs_dir={directory}", f"--name={name}", *flags]


def random_images(directory: str) -> None:
    """A CIFAR100.npz of random pixels and labels, where only speed or agreement counts."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 50_000), ("test", 10_000)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 100, n)
    np.savez(Path(directory) / "CIFAR100.npz", **arrays)


def progress(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps made, and when (seconds since 1970), by the rows of a run's metrics.csv."""
    file = directory / "metrics.csv"
    rows = np.genfromtxt(file, delimiter=",", names=True)
    return rows["steps"], rows["seconds"] - rows["seconds"][-1] + file.stat().st_mtime


def tests(args: argparse.Namespace, stage: dict, point: str, deadline: float) -> None:
    """The CUDA tests, in a pytest without the repository's own options, which need pytest-xdist."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError(f"pytest is missing: {sys.executable} -m pip install pytest")
    log = args.out / "tests.log"
    log.unlink(missing_ok=True)
    words = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", f"--rootdir={ROOT}", TESTS]
    children.run([words], log, deadline)
    result = log.read_text().strip().split("\n")[-1]
    if "passed" not in result:
        raise RuntimeError(f"no test has run: {result}")
    stage["rows"].append({"tests": point, "result": result})


def graph(args: argparse.Namespace, stage: dict, point: str, deadline: float) -> None:
    """Gradient norms of three runs from one seed; eager twice, because a GPU's sums have no fixed order."""
    norms, rates = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        random_images(directory)
        for side in ("eager", "again", "graphed"):
            flags = [f"--optimizer={point}", "--batchsize=128", "--lr=0.01", "--eps=1e-9", f"--data_dir={directory}"]
            flags += [f"--max_steps={max(DRIFT_AT)}", *["--compile"] * (side == "graphed")]
            children.run([train(args, directory, side, *flags)], args.out / "graph.log", deadline)
            steps, times = progress(Path(directory) / side)
            rates[side] = float((steps[-1] - steps[0]) / (times[-1] - times[0]))
            norms[side] = np.fromfile(Path(directory) / side / "gradient_norms.f32", "<f4").astype(float)
    drift = {}
    for side in ("again", "graphed"):
        apart = np.abs(norms[side] / norms["eager"] - 1)
        drift[side] = {f"‖g‖ apart in {n} steps": float(apart[:n].max()) for n in DRIFT_AT}
        stage["rows"].append({"optimizer": point, "beside eager": side, "steps/s": rates[side]} | drift[side])
    again, graphed = (drift[side]["‖g‖ apart in 100 steps"] for side in ("again", "graphed"))
    if not graphed <= max(1e-3, 3 * again):
        raise RuntimeError(f"{point}: graphed and eager differ by {graphed:.2g} in 100 steps, eager by {again:.2g}")


def speed(args: argparse.Namespace, stage: dict, point: str, deadline: float) -> None:
    """bench.py, one point at a time."""
    model, b = point.split(" b=")
    out = args.out / "bench.json"
    words = [BENCH, "--models", model, "--batchsizes", b, "--modes", "normal", "--rounds", 5, "--seconds", 1]
    words += ["--compile", "--device", args.device, "--data_dir", args.data_dir, "--out", out]
    children.run([words], args.out / "speed.log", deadline)
    keys = ("side", "seconds_a_step", "quartiles", "steps_a_second", "images_a_second", "peak_bytes")
    stage["rows"] += [{"point": point} | {key: row[key] for key in keys} for row in read_json(out)["rows"]]
    out.unlink()


def packed(args: argparse.Namespace, stage: dict, point: str, deadline: float) -> None:
    """Steps a second of all runs together, while all of them are training."""
    names = range(int(point))
    with tempfile.TemporaryDirectory() as directory:
        random_images(directory)
        flags = ["--batchsize=8", "--lr=0.01", "--eps=1e-9", "--max_steps=3000", f"--data_dir={directory}"]
        commands = [train(args, directory, name, *flags, f"--seed={name}") for name in names]
        children.run(commands, args.out / "packed.log", deadline)
        runs = [progress(Path(directory) / str(name)) for name in names]
    begin, end = max(times[0] for _, times in runs), min(times[-1] for _, times in runs)
    if end <= begin:
        raise RuntimeError(f"{point} runs were never training all at once")
    made = sum(float(np.diff(np.interp([begin, end], times, steps))[0]) for steps, times in runs)
    stage["rows"].append({"runs": int(point), "steps/s of all": made / (end - begin), "seconds": end - begin})


def published(args: argparse.Namespace, stage: dict, point: str, deadline: float) -> None:
    """The published point, in portions; whether graphed is decided once."""
    passed = [args.content["stages"].get(name, {}).get("status") == "done" for name in ("tests", "graph")]
    stage.setdefault("graphed", all(passed))
    flags = ["--optimizer=shb", f"--batchsize={point}", "--eps", 1.0, 0.7, 0.5, f"--data_dir={args.data_dir}"]
    flags += ["--checkpoint_every=60", "--resume", *["--compile"] * stage["graphed"]]
    log, runs = args.out / "published.log", args.out / "runs"
    try:
        children.run([train(args, runs, "published", *flags)], log, deadline)
    finally:
        stopped = re.findall(r"stopped after step (\d+)", log.read_text(errors="replace"))
        stage["steps_made"] = int(stopped[-1]) if stopped else 0
    summary = read_json(runs / "published" / "summary.json")
    stage["steps_made"] = summary["steps"]
    with open(ROOT / "report" / "published_shb_steps.csv", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        (theirs,) = (row for row in rows if row["batch_size"] == point)
    for eps, steps in summary["results"]["steps_to_eps"].items():
        stage["rows"].append({"ε": float(eps), "steps": steps, "published": int(theirs[f"steps_eps_{eps}"])})


# How one point of a stage is measured, and the points. The rows of a stage have the same columns.
STAGES = {
    "tests": (tests, ["tests/test_cuda.py"]),
    "graph": (graph, list(arguments.OPTIMIZERS)),
    "speed": (speed, [*(f"ResNet18 b={b}" for b in (8, 32, 128, 1024)), "WideResNet-28-10 b=128"]),
    "packed": (packed, ["1", "2", "4", "8"]),
    "published": (published, ["1024"]),
}


def work(name: str, args: argparse.Namespace) -> str:
    """One stage, as far as it comes. Returns its status: done, partial or failed."""
    begun, (measure, points) = time.monotonic(), STAGES[name]
    stage = args.content["stages"].get(name, {"status": "failed"})
    if stage["status"] == "done":
        return "done"
    if stage["status"] == "failed":
        stage = {"status": "partial", "seconds": 0.0, "done": [], "rows": []}
        args.content["stages"][name] = stage
    before = len(stage["done"]), stage.get("steps_made")
    try:
        for point in points:
            if point not in stage["done"]:
                measure(args, stage, point, begun + 60 * args.minutes)
                stage["done"].append(point)
                save(args)
        stage["status"] = "done"
    except subprocess.TimeoutExpired:
        if before == (len(stage["done"]), stage.get("steps_made")):
            stage |= {"status": "failed", "reason": f"nothing came of {args.minutes:g} --minutes"}
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        stage |= {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}
    finally:
        stage["seconds"] += time.monotonic() - begun
        save(args)
    return stage["status"]


def save(args: argparse.Namespace) -> None:
    """Write gpu.json and the page beside it."""
    write_json(args.out / "gpu.json", args.content)
    lines = ["# What scripts/gpu.sh has measured", "", "Written by it from gpu.json beside this page.", ""]
    lines += [f"- {key}: {value}" for key, value in args.content["machine"].items()]
    for name, stage in args.content["stages"].items():
        lines += ["", f"## {name}: {stage['status']}", ""]
        lines += [f"- {key}: {stage[key]}" for key in ("reason", "graphed", "steps_made") if key in stage]
        for row in stage["rows"]:
            if row is stage["rows"][0]:
                lines += ["", f"| {' | '.join(row)} |", "|" + "---|" * len(row)]
            cells = [f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()]
            lines.append(f"| {' | '.join(cells)} |")
    with replacing(args.out / "README.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


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


def load(file: Path, now: dict) -> dict:
    """gpu.json as it was left, or a new one. UserError if it is another machine's, or damaged."""
    if not file.exists():
        return {"machine": now, "stages": {}}
    try:
        content = read_json(file)
        before = content["machine"]["device"], content["machine"]["torch"]
    except (ValueError, KeyError) as error:
        raise UserError(f"argument --out: {file} is damaged ({error}); delete it") from error
    if before != (now["device"], now["torch"]):
        were, are = " with torch ".join(before), f"{now['device']} with torch {now['torch']}"
        raise UserError(f"argument --out: {file} is of {were}, not {are}; name another directory")
    return content


def main(argv: list[str]) -> int:
    """All chosen stages. Returns the exit status; raises UserError."""
    args = parse(argv)
    now = utils.environment(utils.pick_device(args.device)) | {"cores": os.cpu_count()}
    now |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    args.content = load(args.out / "gpu.json", now)
    args.out.mkdir(parents=True, exist_ok=True)
    ends = []
    for name in [name for name in STAGES if name in args.stages]:
        print(f"{name}: at most {args.minutes:g} minutes", flush=True)
        ends.append(work(name, args))
        reason = args.content["stages"][name].get("reason")
        print(f"{name}: {ends[-1]}" + (f": {reason}" if reason else ""), flush=True)
    print(f"written: {args.out / 'README.md'}" + ("; the same command goes on" if "partial" in ends else ""))
    return 1 if "failed" in ends else 124 if "partial" in ends else 0


def cli(argv: list[str]) -> int:
    """The command line. On SIGTERM and SIGINT, what runs is stopped and what is found is kept on the way out."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    try:
        return main(argv)
    except (UserError, OSError) as error:
        say("error", error)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
