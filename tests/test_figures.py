"""figures.py: one sweep from records to files, its numbers computed again; what is an error; the real process."""

import math
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import PATIENCE
from report_helpers import PUBLISHED, ROOT, SLUG, command, critical, normal, record, sampling, table
from scipy import stats

SEED_FACTOR = {0: 1.0, 1: 1.01, 2: 1.05}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """All modes: SHB from the published steps, an SGD point that misses ε 0.5, one that diverged, damaged runs."""
    root = tmp_path_factory.mktemp("sweep")
    runs, rng = root / "runs", np.random.default_rng(3)
    for b, published in PUBLISHED.items():
        for seed, factor in SEED_FACTOR.items():
            to_eps = {eps: round(n * factor) for eps, n in published.items()}
            folder = critical(runs, "shb", b, seed, to_eps, steps=to_eps["0.5"])
            if (b, seed) in ((1024, 0), (8192, 0)):
                norms = np.full(to_eps["0.5"], 0.5, "<f4")
                norms[777] = 9.0
                norms.tofile(folder / "gradient_norms.f32")
    for b, n in {64: 4000, 128: 1000, 256: 300, 512: 200}.items():
        critical(runs, "sgd", b, 0, {"0.5": n}, k=3.0, steps=n)
        reached = b != 64  # at 64 the cap came first
        critical(runs, "sgd", b, 1, {"0.5": n + 4 if reached else None}, steps=n + 4 if reached else 900,
                 status="finished" if reached else "not_reached")  # fmt: skip
    critical(runs, "sgd", 1024, 0, {"0.5": 500}, steps=500)
    diverged = {"steps_to_eps": {"0.5": None}, "max_gradient_norm": None, "diverged_at_step": 7}
    record(runs, "critical", "sgd", 1024, 1, diverged, steps=7, status="diverged")
    for optimizer, top in (("sgd", 60.0), ("shb", 66.0)):
        for i, b in enumerate((64, 256, 1024)):
            for seed in (0, 1):
                normal(runs, optimizer, b, seed, top - i * i + seed, 0.1 * (i + 1))
                delta = (1.7 if optimizer == "shb" else 1.0) / (i + 1) + 0.01 * seed
                sampling(runs, optimizer, b, seed, delta, rng.normal(2, 3, 4000))
    normal(runs, "sgd", 64, 2, 10.0, epochs=3)  # not comparable with the rest
    normal(runs, "sgd", 64, 0, 11.0, name="twin")  # the same point and seed again
    normal(runs, "shb", 8, 0, 50.0, dataset="digits", model="ResNet20")  # another combination
    for b in (8, 16):
        normal(runs, "shb", b, 0, 50.0, dataset="CIFAR10", model="ResNet20")
    broken = {"empty": "", "cut": '{"status": "fin', "list": "[]", "deep": "[" * 100_000, "odd": '{"args": {}}'}
    for name, text in broken.items():
        (runs / name).mkdir()
        (runs / name / "summary.json").write_text(text)
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "args.json").write_text("{}")
    normal(runs, "sgd", 64, 5, None)
    normal(runs, "sgd", "64", 6, 60.0)
    (runs / "sampling-sgd-b256-seed0" / "omega.npy").write_bytes(b"\x93NUMPY nonsense")
    out = root / "out"
    return runs, out, command(runs, "--out", out)


def test_command_succeeds_and_names_what_it_left_out(sweep):
    _, _, done = sweep
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stderr == ""
    left = {line.split(": ")[1]: line for line in done.stdout.splitlines() if line.startswith("left out: ")}
    for name in ("empty", "cut", "list", "deep", "odd", "unfinished"):
        assert name in left
    assert "accuracy is None" in left["normal-sgd-b64-seed5"]
    assert "batchsize is '64'" in left["normal-sgd-b64-seed6"]
    assert "epochs 3" in left["normal-sgd-b64-seed2-epochs3"] and "epochs 200" in left["normal-sgd-b64-seed2-epochs3"]
    twins = {"normal-sgd-b64-seed0", "normal-sgd-b64-seed0-nametwin"} & left.keys()
    assert len(twins) == 1 and "same optimizer" in left[twins.pop()]
    assert "gradient_norms.f32" in left["critical-sgd-b64-seed0 (gradient history only)"]
    assert "omega.npy" not in left["empty"] and "sampling-sgd-b256-seed0 (ω only)" in left
    assert "used: normal-shb-b64-seed1" in done.stdout
    assert "digits_ResNet20_lr0.1_beta0.9: 1 runs used" in done.stdout


@pytest.mark.parametrize("name", ["steps", "accuracy", "delta", "accuracy_delta", "omega", "gradients"])
def test_figures_are_there_as_png_and_pdf(sweep, name):
    _, out, _ = sweep
    image = matplotlib.image.imread(out / f"{SLUG}_{name}.png")
    assert min(image.shape[:2]) >= 400 and image[..., :3].std() > 0.05
    pdf = (out / f"{SLUG}_{name}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.rstrip().endswith(b"%%EOF") and len(pdf) > 5000
    assert not list(out.glob(".*"))


def test_steps_table_and_its_ratio_to_the_published(sweep):
    rows = {(r["optimizer"], float(r["eps"]), int(r["batch_size"])): r for r in table(sweep[1], "steps")}
    assert len(rows) == 33 + 5
    for b, published in PUBLISHED.items():
        for eps, n in published.items():
            row, steps = rows["shb", float(eps), b], [round(n * f) for f in SEED_FACTOR.values()]
            assert float(row["steps_mean"]) == pytest.approx(sum(steps) / 3, rel=1e-12)
            assert (float(row["steps_min"]), float(row["steps_max"])) == (steps[0], steps[2])
            assert float(row["sfo_mean"]) == pytest.approx(sum(steps) / 3 * b, rel=1e-12)
            assert int(row["published"]) == n
            assert float(row["ratio"]) == pytest.approx(1.02, abs=1e-3)
    missed = rows["sgd", 0.5, 64]
    assert (missed["critical_seeds"], missed["reached"], missed["diverged"]) == ("2", "1", "0")
    assert float(missed["steps_mean"]) == (4000 + 900) / 2  # the seed that missed counts with the steps it ran
    lost = rows["sgd", 0.5, 1024]
    assert (lost["critical_seeds"], lost["reached"], lost["diverged"], float(lost["steps_mean"])) == (
        "2",
        "1",
        "1",
        500,
    )
    assert missed["published"] == missed["ratio"] == ""


def test_critical_batch_sizes_constants_and_bounds(sweep):
    rows = {(r["optimizer"], float(r["eps"])): r for r in table(sweep[1], "critical_batch_size")}
    assert [rows["shb", e]["b_star"] for e in (0.5, 0.7, 1.0)] == ["1024", "512", "256"]
    assert [rows["shb", e]["published_b_star"] for e in (0.5, 0.7, 1.0)] == ["1024", "512", "256"]
    assert [round(float(rows["shb", e]["bound"])) for e in (0.5, 0.7, 1.0)] == [1024, 522, 256]
    for eps in (0.5, 0.7, 1.0):
        mean = {b: sum(round(p[f"{eps}"] * f) for f in SEED_FACTOR.values()) / 3 * b for b, p in PUBLISHED.items()}
        best = min(mean, key=mean.get)
        limit = round(PUBLISHED[best][f"{eps}"] * 1.05) * best
        near = [b for b in mean if PUBLISHED[b][f"{eps}"] * b <= limit]  # of the first seed, the fastest
        assert rows["shb", eps]["range"] == " ".join(map(str, near)) and len(near) > 1
        assert float(rows["shb", eps]["c_squared"]) == pytest.approx(25.3187, abs=1e-4)
        assert float(rows["shb", eps]["k"]) == 1.77
        assert rows["shb", eps]["edge"] == ""
    sgd = rows["sgd", 0.5]
    # 64 (156,800 at least) lies above 256 (77,312): it brackets b*; so does the seed that survived at 1024.
    assert (sgd["b_star"], sgd["edge"], sgd["range"], sgd["undecided"]) == ("256", "", "256", "")
    assert float(sgd["c_squared"]) == pytest.approx(256 * 0.25 / 0.1)
    assert float(sgd["k"]) == 1.77 and sgd["published_c_squared"] == "1280"


def test_point_table_and_delta(sweep):
    rows = {(r["optimizer"], int(r["batch_size"])): r for r in table(sweep[1], "points")}
    row = rows["shb", 256]
    assert (float(row["accuracy_mean"]), float(row["accuracy_min"]), float(row["accuracy_max"])) == (65.5, 65.0, 66.0)
    assert float(row["training_loss_mean"]) == pytest.approx(0.2)
    c2, hat = 1024 * 0.25 * 0.9 * 0.01 / (0.1 * 0.91), 81.9
    for b in (8, 256, 8192):
        expected = 0.1 * math.sqrt((1 + hat) * c2 / b + hat * 1.77**2)
        assert float(rows["shb", b]["delta_formula"]) == pytest.approx(expected, rel=1e-12)
        assert float(rows["shb", b]["delta_published_constants"]) == pytest.approx(expected, rel=1e-3)
    assert float(row["delta_measured_mean"]) == pytest.approx(1.7 / 2 + 0.005)
    assert float(row["delta_measured_max"]) == pytest.approx(1.7 / 2 + 0.01)
    assert rows["sgd", 256]["published_accuracy"] == "68"
    assert rows["sgd", 64]["normal_seeds"] == "2"  # neither the twin nor the run of 3 epochs
    assert float(rows["sgd", 256]["delta_formula"]) == pytest.approx(0.1 * math.sqrt(640 / 256))
    assert rows["shb", 8]["accuracy_mean"] == ""


def test_correlations_are_those_of_the_points(sweep):
    points = table(sweep[1], "points")
    rows = {(r["delta"], r["optimizer"]): r for r in table(sweep[1], "correlations")}
    for key in ("delta_formula", "delta_measured_mean"):
        for who, n in (("sgd", 3), ("shb", 3), ("all", 6)):
            there = [p for p in points if p["accuracy_mean"] and who in (p["optimizer"], "all")]
            x, y = (np.array([float(p[k]) for p in there]) for k in (key, "accuracy_mean"))
            row = rows[key.removesuffix("_mean"), who]
            assert int(row["points"]) == len(x) == n
            assert float(row["pearson"]) == pytest.approx(np.corrcoef(x, y)[0, 1])
            ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
            if who != "all":  # no ties
                assert float(row["spearman"]) == pytest.approx(np.corrcoef(*ranks)[0, 1])
            assert float(row["spearman"]) == pytest.approx(stats.spearmanr(x, y)[0])


def test_omega_of_a_damaged_file_gives_way_to_the_next_seed(sweep):
    rows = {r["name"]: r for r in table(sweep[1], "omega")}
    assert len(rows) == 12
    part = rows["sampling-shb-b256-seed1"]  # the parts of ω beside its moments, as the record has them
    parts = ("noise_norm", "full_gradient_norm", "gradient_noise_norm", "cosine", "omega_std")
    delta = 10 * (1.7 / 2 + 0.01)
    assert [part[key] for key in parts[1:]] == ["1.77", "", "", "1.0"] and float(part["noise_norm"]) == delta
    drawn = {name for name, r in rows.items() if r["beyond_6_std"]}
    assert drawn == {"sampling-sgd-b256-seed1", "sampling-shb-b256-seed0"}
    bars = [r for r in table(sweep[1], "omega_histogram") if r["name"] == "sampling-shb-b256-seed0"]
    assert sum(float(r["density"]) * (float(r["right"]) - float(r["left"])) for r in bars) == pytest.approx(1)


def test_gradient_table_keeps_the_excursion(sweep):
    rows = table(sweep[1], "gradients")
    assert {r["name"] for r in rows} == {"critical-shb-b1024-seed0", "critical-shb-b8192-seed0"}
    part = [r for r in rows if "b1024" in r["name"]]
    assert int(part[0]["first_step"]) == 1 and int(part[-1]["last_step"]) == 15982
    assert max(float(r["norm_max"]) for r in part) == 9.0
    assert float(part[-1]["running_mean"]) == pytest.approx((15981 * 0.5 + 9) / 15982, rel=1e-9)


def test_report_tells_the_tables_the_rules_and_the_runs(sweep):
    text = (sweep[1] / "report.md").read_text()
    for part in (
        "| shb | 0.7 | 512 |",
        "not eligible",
        "- diverged: critical-sgd-b1024-seed1 - ",
        "- left out: cut: ",
        "grid",
    ):
        assert part in " ".join(text.split())
    assert "| 1280 |" in text and "| 15982 |" in text and "omega qq" not in text
    assert "not drawn: steps: fewer than two b have steps to any ε" in text and "](digits" not in text
    assert "not drawn: accuracy: fewer than two b have an accuracy" in text  # one point is no figure


def test_a_partial_sweep_gives_partial_figures(sweep):
    made = {p.name for p in sweep[1].glob("CIFAR10_*.p*")}
    names = ("CIFAR10_ResNet20_lr0.1_beta0.9_accuracy", "CIFAR10_ResNet20_comparison")
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert not list(sweep[1].glob("digits*.p*"))


def test_errors_are_one_line_and_write_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "run").mkdir(parents=True)
    (tmp_path / "bad" / "run" / "summary.json").write_text("{")
    normal(tmp_path / "good", "sgd", 8, 0, 50.0)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for words, parts in (
        ((tmp_path / "none", "--out", tmp_path / "o"), ("RUNS_DIR", "none", "no directory")),
        ((tmp_path / "empty", "--out", tmp_path / "o"), ("RUNS_DIR", "empty", "allowed is a directory")),
        ((tmp_path / "bad", "--out", tmp_path / "o"), ("RUNS_DIR", "run: Expecting property name")),
        ((tmp_path / "good", "--out", tmp_path / "file"), ("--out", "file", "File exists")),
        ((tmp_path / "good", "--wat"), ("--wat",)),
    ):
        done = command(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert all(part in done.stderr for part in parts), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("eps", [["0"], ["-1"], ["nan"], ["inf"], ["x"], [], ["0.72", "0"], ["0.3"]])
def test_an_eps_that_nobody_can_answer_is_one_error_line(tmp_path, eps):
    critical(tmp_path / "runs", "sgd", 8, 0, {"0.72": 9}, steps=9)
    done = command(tmp_path / "runs", "--out", tmp_path / "out", "--eps", *eps)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: argument --eps: ") and done.stderr.count("\n") == 1


def test_a_pipe_named_omega_is_not_waited_for_and_a_plain_terminal_gets_its_report(tmp_path):
    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, np.zeros(3))
    (folder / "omega.npy").unlink()
    os.mkfifo(folder / "omega.npy")
    words = [sys.executable, ROOT / "figures.py", tmp_path / "runs", "--out", tmp_path / "out"]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "") and "omega.npy is no regular file" in done.stdout
    assert (tmp_path / "out" / "report.md").is_file()
