"""scripts/gpu.py through all its stages, on a CPU: stand-ins take the place of main.py, bench.py and the tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT

import arguments
import datasets
from messages import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import gpu

# It reads main.py's command line and leaves the record that main.py would; ACTS says what each run is to do.
MAIN = f"""
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
import arguments

args = arguments.parse(sys.argv[1:])
assert (args.mode, args.dataset, args.wandb_mode) == ("critical", "CIFAR100", "disabled")
here, acts = Path(__file__).parent, json.loads((Path(__file__).parent / "acts.json").read_text())
with open(here / "calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if args.name in acts.get("fail", []):
    sys.exit("Traceback\\nRuntimeError: as told")
directory = args.runs_dir / args.name
directory.mkdir(parents=True, exist_ok=True)
metrics = directory / "metrics.csv"
begun = metrics.read_text() if metrics.exists() else "steps,seconds\\n"
steps = 200 * begun.count("\\n")
metrics.write_text(begun + f"{{steps}},{{steps}}\\n" + f"{{steps + 200}},{{steps + 200}}\\n")
norms = np.linspace(2, 1, args.max_steps or 1) * (1 + acts.get("drift", 0) * args.compile)
norms.astype("<f4").tofile(directory / "gradient_norms.f32")
if args.name == "published" and steps < 200 * acts.get("portions", 1):
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped after step", steps, flush=True), sys.exit(143)))
    (here / "waiting").write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)
results = {{"steps_to_eps": {{repr(eps): 1000 for eps in args.eps}}}}
summary = {{"status": "finished", "steps": 1000, "seconds": 1, "results": results}}
(directory / "summary.json").write_text(json.dumps(summary))
"""
BENCH = """
import json, sys
argv = sys.argv[1:]
assert "--compile" in argv
row = {"steps_a_second": 2.0, "images_a_second": 16.0, "seconds_a_step": 0.5, "quartiles": [0.4, 0.6]}
rows = [row | {"side": side, "peak_bytes": 10**9} for side in ("ours", "graphed")]
open(argv[argv.index("--out") + 1], "w").write(json.dumps({"rows": rows}))
"""
DRIVER = """
import json, sys
sys.path.insert(0, {scripts!r})
import gpu
for name in ("MAIN", "BENCH", "TESTS"):
    setattr(gpu, name, gpu.Path({directory!r}) / f"{{name.lower()}}.py")
gpu.random_images = lambda directory: None
sys.exit(gpu.cli(sys.argv[1:]))
"""


class Stand:
    """Stand-ins in a directory, and gpu.py made to use them."""

    def __init__(self, directory: Path):
        self.directory, self.out = directory, directory / "out"
        (directory / "main.py").write_text(MAIN)
        (directory / "bench.py").write_text(BENCH)
        (directory / "tests.py").write_text("def test_a(): pass\n")
        self.acts()

    def acts(self, **what):
        (self.directory / "acts.json").write_text(json.dumps(what))

    def argv(self, *words):
        return ["--device", "cpu", "--out", str(self.out), "--data_dir", "images", *map(str, words)]

    def run(self, *words):
        return gpu.main(self.argv(*words))

    def stages(self):
        return json.loads((self.out / "gpu.json").read_text())["stages"]

    def page(self):
        return (self.out / "README.md").read_text()

    def calls(self):
        file = self.directory / "calls"
        return [arguments.parse(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def stand(tmp_path, monkeypatch):
    stand = Stand(tmp_path)
    for name in ("MAIN", "BENCH", "TESTS"):
        monkeypatch.setattr(gpu, name, tmp_path / f"{name.lower()}.py")
    monkeypatch.setattr(gpu, "random_images", lambda directory: None)
    return stand


def test_all_stages_are_done_once_and_told(stand, capsys):
    assert stand.run() == 0
    assert {name: stage["status"] for name, stage in stand.stages().items()} == dict.fromkeys(gpu.STAGES, "done")
    rows = {name: stage["rows"] for name, stage in stand.stages().items()}
    assert rows["tests"][0]["result"].startswith("1 passed")
    assert [(row["optimizer"], row["beside eager"]) for row in rows["graph"]] == [
        (optimizer, side) for optimizer in ("sgd", "shb", "nshb", "qhm") for side in ("again", "graphed")
    ]
    for row in rows["graph"]:
        assert row["steps/s"] == pytest.approx(1)
        assert [row[f"‖g‖ apart in {n} steps"] for n in (1, 10, 100, 1000)] == [0] * 4
    points = [f"ResNet18 b={b}" for b in (8, 32, 128, 1024)] + ["WideResNet-28-10 b=128"]
    assert [(row["point"], row["side"]) for row in rows["speed"]] == [
        (point, side) for point in points for side in ("ours", "graphed")
    ]
    assert [row["runs"] for row in rows["packed"]] == [1, 2, 4, 8]
    assert rows["packed"][0]["steps/s of all"] == pytest.approx(1)
    # The published numbers are those of report/published_shb_steps.csv.
    assert [(row["ε"], row["steps"], row["published"]) for row in rows["published"]] == [
        *((1.0, 1000, 5314), (0.7, 1000, 9599), (0.5, 1000, 15982))
    ]
    machine = json.loads((stand.out / "gpu.json").read_text())["machine"]
    assert machine["torch"] == torch.__version__ and machine["device"] == "cpu"
    page = stand.page()
    assert "| 0.5 | 1000 | 15982 |" in page and "| ResNet18 b=8 | graphed | 0.5 | [0.4, 0.6] | 2 | 16 |" in page
    assert "| shb | graphed | 1 | 0 | 0 | 0 | 0 |" in page and "1 passed" in page
    calls = stand.calls()
    point = calls[-1]
    assert (point.optimizer, point.model, point.batchsize, point.eps) == ("shb", "ResNet18", 1024, [1.0, 0.7, 0.5])
    assert point.compile and point.resume and point.max_steps is None and point.device == "cpu"
    assert len({args.seed for args in calls if args.batchsize == 8}) == 8
    before = {file: file.read_bytes() for file in stand.out.rglob("*") if file.is_file()}
    assert stand.run() == 0 and len(stand.calls()) == len(calls)
    assert {file: file.read_bytes() for file in stand.out.rglob("*") if file.is_file()} == before
    assert "published: done" in capsys.readouterr().out


def test_a_failed_stage_is_named_and_the_rest_goes_on_without_the_graph(stand, capsys):
    stand.acts(fail=["again"])
    (stand.directory / "bench.py").write_text("import sys; sys.exit('CUDA is on strike')")
    assert stand.run() == 1
    status = {name: stage["status"] for name, stage in stand.stages().items()}
    assert status == {"tests": "done", "graph": "failed", "speed": "failed", "packed": "done", "published": "done"}
    out = capsys.readouterr().out
    assert "graph: failed: RuntimeError: exit status 1" in out and "RuntimeError: as told" in out
    assert "CUDA is on strike" in stand.stages()["speed"]["reason"] and "## graph: failed" in stand.page()
    assert not stand.calls()[-1].compile
    stand.acts()
    assert stand.run("--stages", "graph") == 0  # what has failed is tried again
    assert "reason" not in stand.stages()["graph"]


@pytest.mark.parametrize(("drift", "status"), [(1e-4, 0), (0.01, 1)])
def test_a_graph_that_drifts_from_eager_has_failed(drift, status, stand):
    stand.acts(drift=drift)
    assert stand.run("--stages", "tests", "graph", "published") == status
    again, graphed = (row["‖g‖ apart in 1000 steps"] for row in stand.stages()["graph"]["rows"][:2])
    assert graphed == pytest.approx(drift, rel=0.01) and again == 0
    assert stand.calls()[-1].compile == (status == 0)


@pytest.mark.parametrize(
    "body", ["def test_a(): assert False", "import pytest\npytestmark = pytest.mark.skip\ndef test_a(): pass"]
)
def test_tests_that_fail_or_do_not_run_are_no_pass(body, stand):
    (stand.directory / "tests.py").write_text(body + "\n")
    assert stand.run("--stages", "tests", "published") == 1
    assert stand.stages()["tests"]["status"] == "failed" and not stand.calls()[-1].compile


def test_a_missing_pytest_is_named_with_its_cure(stand, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert stand.run("--stages", "tests") == 1
    assert "-m pip install pytest" in stand.stages()["tests"]["reason"]


def test_the_published_point_comes_in_portions(stand):
    stand.acts(portions=4)
    ends = []
    while not ends or ends[-1] != 0:
        ends.append(stand.run("--stages", "published", "--minutes", 0.05))
        assert len(ends) < 30 and ends[-1] in (0, 1, 124), stand.stages()
        if ends[-1] == 124:
            stage = stand.stages()["published"]
            assert stage["status"] == "partial" and stage["steps_made"] > 0
            assert f"steps_made: {stage['steps_made']}" in stand.page()
    assert len(stand.calls()) >= 3 and all(args.resume for args in stand.calls())


@pytest.mark.skipif(sys.platform != "linux", reason="there a run is told when gpu.py is killed")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_script_leaves_no_process_and_goes_on(signum, stand):
    stand.acts(portions=100)
    driver = DRIVER.format(scripts=str(ROOT / "scripts"), directory=str(stand.directory))
    command = [sys.executable, "-c", driver, *stand.argv("--stages", "speed", "published")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    waiting = stand.directory / "waiting"
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait(PATIENCE) == (143 if signum == signal.SIGTERM else -signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{waiting.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{waiting.read_text()}").exists()
    stand.acts()
    before = stand.stages()["speed"]
    assert stand.run("--stages", "speed", "published") == 0
    assert stand.stages()["speed"] == before and stand.stages()["published"]["status"] == "done"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--device", "cuda:97"], ["--device", "'cuda:97'", "this machine has"]),
        (["--device", "cpu", "--minutes", "0"], ["--minutes", "'0'", "above 0"]),
        (["--device", "cpu", "--stages", "coffee"], ["--stages", "'coffee'", "packed"]),
    ],
)
def test_bad_arguments_write_nothing(argv, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        gpu.main([*argv, "--out", str(tmp_path / "out")])
    assert all(part in str(caught.value) for part in parts) and os.listdir(tmp_path) == []


def test_without_a_gpu_the_command_is_one_error_line(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "scripts" / "gpu.sh"), "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (2, "", []), done
    assert done.stderr.startswith("error: argument --device: got 'cuda'") and done.stderr.count("\n") == 1


def test_what_another_machine_has_left_is_refused(stand):
    assert stand.run("--stages", "speed") == 0
    content = json.loads((stand.out / "gpu.json").read_text())
    content["machine"]["device"] = "NVIDIA H100"
    (stand.out / "gpu.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"NVIDIA H100 with torch .*, not cpu"):
        stand.run()
    (stand.out / "gpu.json").write_text("oops")
    with pytest.raises(UserError, match="is damaged"):
        stand.run()


def test_random_images_are_a_cifar100_to_main_py(tmp_path):
    gpu.random_images(str(tmp_path))
    arrays = datasets.read("CIFAR100", tmp_path)
    assert {name: len(array) for name, array in arrays.items()} == {
        **{"x_train": 50_000, "y_train": 50_000},
        **{"x_test": 10_000, "y_test": 10_000},
    }
    assert np.unique(arrays["y_train"]).size == 100


def test_nothing_is_needed_that_a_gpu_machine_may_lack():
    """torch, torchvision, numpy, tqdm and pytest do: also for collecting the CUDA tests, and for bench.py."""
    lacking = ["wandb", "sklearn", "pandas", "matplotlib", "scipy"]
    program = f"""
import sys
sys.modules |= dict.fromkeys({lacking})
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import pytest
import bench, bench_sides, gpu
words = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--collect-only"]
sys.exit(pytest.main([*words, {str(ROOT / "tests" / "test_cuda.py")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "tests collected" in done.stdout, done
