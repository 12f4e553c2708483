"""figures.py as a real command on synthetic records, its numbers computed again; and its parts by themselves."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE
from scipy import stats

import figures

ROOT = Path(__file__).parents[1]
PUBLISHED = [
    line.split(",") for line in (ROOT / "published_shb_steps.csv").read_text().splitlines() if line[0].isdigit()
]
PUBLISHED = {int(b): dict(zip(("0.5", "0.7", "1.0"), map(int, rest), strict=True)) for b, *rest in PUBLISHED}
SLUG = "CIFAR100_ResNet18_lr0.1_beta0.9"
OMEGA = {"mean": 0.0, "std": 1.0, "skewness": 0.0, "excess_kurtosis": 0.0, "entries": 4000}


def record(runs, mode, optimizer, b, seed, results, *, steps=100, status="finished", **args):
    """Write one run's record as main.py does; return its directory."""
    name = f"{mode}-{optimizer}-b{b}-seed{seed}" + "".join(f"-{k}{v}" for k, v in args.items())
    args = {
        **{"dataset": "CIFAR100", "model": "ResNet18", "lr": 0.1, "beta1": 0.9, "precision": "default"},
        **{"epochs": 200, "max_steps": None, "min_epochs": 11, "steps": 10000, "full_grad_batchsize": 1000},
        **{"mode": mode, "optimizer": optimizer, "batchsize": b, "seed": seed, "name": name},
        **args,
    }
    summary = {"status": status, "mode": mode, "steps": steps, "epochs": 1.0, "seconds": 1.0}
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary | {"args": args, "results": results}))
    return folder


def normal(runs, optimizer, b, seed, accuracy, loss=0.1, **more):
    results = {"accuracy": accuracy, "best_accuracy": 70.0, "training_loss": loss, "max_gradient_norm": 1.0}
    return record(runs, "normal", optimizer, b, seed, results, **more)


def critical(runs, optimizer, b, seed, to_eps, k=1.77, **more):
    results = {"steps_to_eps": to_eps, "max_gradient_norm": k}
    return record(runs, "critical", optimizer, b, seed, results, **more)


def sampling(runs, optimizer, b, seed, delta, omega, norm=1.77, **more):
    results = {"delta": delta, "noise_norm": delta / 0.1, "max_gradient_norm": 1.5, "full_gradient_norm": norm}
    results |= {f"omega_{key}": value for key, value in OMEGA.items()}
    folder = record(runs, "sampling", optimizer, b, seed, results, **more)
    np.save(folder / "omega.npy", omega.astype(np.float32))
    return folder


def command(*words):
    env = os.environ | {"MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, ROOT / "figures.py", *map(str, words)], capture_output=True, text=True, env=env
    )


def table(out, name, slug=SLUG):
    with open(out / f"{slug}_{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


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
    import matplotlib.image

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
    assert made == {f"CIFAR10_ResNet20_lr0.1_beta0.9_accuracy.{kind}" for kind in ("png", "pdf")}
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


# --- parts by themselves ---


def rows_of(*points):
    """Rows of critical_table from (b, seeds' SFO, seeds that reached ε, seeds that diverged)."""
    return [
        {"batch_size": b, "critical_seeds": len(sfo) + lost, "reached": reached, "diverged": lost, "at_first_check": 0}
        | figures.band("sfo", sfo)
        | {"steps_are": "measured" if reached == len(sfo) else "lower bound"}
        for b, sfo, reached, lost in points
    ]


def test_critical_batch_size_needs_two_whole_points():
    assert figures.critical_batch_size([]) == {}
    assert figures.critical_batch_size(rows_of((8, [5.0], 1, 0), (16, [1.0], 0, 0))) == {}


@pytest.mark.parametrize(("sfo", "b_star", "edge"), [((1, 2, 3), 8, "<="), ((3, 2, 1), 32, ">="), ((3, 1, 2), 16, "")])
def test_critical_batch_size_says_when_it_is_at_the_edge(sfo, b_star, edge):
    points = zip((8, 16, 32), sfo, strict=True)
    star = figures.critical_batch_size(rows_of(*((b, [float(s)], 1, 0) for b, s in points)))
    assert (star["b_star"], star["edge"], star["range"]) == (b_star, edge, "")  # one seed: no spread known


def test_range_is_what_lies_within_the_seeds_spread_of_the_minimum():
    points = ((8, [9, 9], 2, 0), (16, [6, 6], 2, 0), (32, [4, 6], 2, 0), (64, [3, 9.2], 2, 0), (128, [6.1, 6.1], 2, 0))
    assert figures.critical_batch_size(rows_of(*points))["range"] == "16 32 64"  # a seed at 64 was the fastest


def test_a_far_point_does_not_bracket_b_star():
    points = ((8, [9.0], 0, 0), (16, [], 0, 1), (32, [3.0], 1, 0), (64, [8.0], 1, 0))
    star = figures.critical_batch_size(rows_of(*points))
    assert (star["b_star"], star["edge"], star["undecided"]) == (32, "<=", "16")
    star = figures.critical_batch_size(rows_of(points[0], *points[2:]))
    assert (star["b_star"], star["edge"], star["undecided"]) == (32, "", "")


def test_c_squared_comes_from_the_smallest_eps_whose_b_star_is_no_bound(tmp_path):
    for b, published in PUBLISHED.items():
        to_eps = published | {"0.4": published["0.5"] + 5 if b >= 4096 else None}
        critical(tmp_path, "shb", b, 0, to_eps, steps=to_eps["0.4"] or published["0.5"], status="not_reached")
    (group,) = figures.combinations(figures.read_runs(tmp_path)[0])
    rows = {r["eps"]: r for r in figures.constants_table(group, figures.critical_table(group["runs"], {}))}
    assert (rows[0.4]["b_star"], rows[0.4]["edge"]) == (4096, "<=")
    assert [rows[e]["b_star"] for e in (0.5, 0.7, 1.0)] == [1024, 512, 256]
    assert {r["reference_eps"] for r in rows.values()} == {0.5}
    assert rows[0.4]["c_squared"] == pytest.approx(25.3187, abs=1e-4)
    assert [round(rows[e]["bound"]) for e in (0.4, 0.7, 1.0)] == [1600, 522, 256]


def test_b_star_between_open_neighbours_is_no_bound_either():
    star = figures.critical_batch_size(rows_of((8, [4.0], 1, 0), (16, [], 0, 1), (32, [9.0], 1, 0)))
    assert (star["b_star"], star["edge"], star["undecided"]) == (8, "?", "16")
    star = figures.critical_batch_size(rows_of((8, [], 0, 1), (16, [4.0], 1, 0), (32, [], 0, 1), (64, [9.0], 1, 0)))
    assert (star["b_star"], star["edge"], star["undecided"]) == (16, "?", "8 32")


def test_a_mean_below_eps_at_the_first_check_is_no_measurement(tmp_path):
    for b, n in ((8, 6250 * 11), (16, 3125 * 11), (32, 40_000), (64, 19_000), (128, 12_000)):
        critical(tmp_path, "shb", b, 0, {"1.0": n}, steps=n)
    rows = figures.critical_table(figures.read_runs(tmp_path)[0], {})
    assert [r["at_first_check"] for r in rows] == [1, 1, 0, 0, 0]
    star = figures.critical_batch_size(rows)
    assert (star["b_star"], star["undecided"], star["edge"]) == (64, "8 16", "")
    assert figures.critical_batch_size(rows[:3]) == {}


def test_what_a_run_reached_before_it_diverged_counts(tmp_path):
    lost = {"steps": 300, "status": "diverged", "k": None}
    critical(tmp_path, "shb", 16, 0, {"1.0": 200, "0.5": 900}, steps=900)
    critical(tmp_path, "shb", 16, 1, {"1.0": 190, "0.5": None}, **lost)
    critical(tmp_path, "shb", 32, 0, {"1.0": 150, "0.5": 700}, steps=700)
    critical(tmp_path, "sgd", 8, 0, {"1.0": None}, **lost)
    runs, left_out = figures.read_runs(tmp_path)
    rows = {(r["optimizer"], r["eps"], r["batch_size"]): r for r in figures.critical_table(runs, {})}
    found = {k: (r["critical_seeds"], r["reached"], r["diverged"], r["steps_mean"]) for k, r in rows.items()}
    assert not left_out and found == {
        ("sgd", 1.0, 8): (1, 0, 1, None),
        ("shb", 0.5, 16): (2, 1, 1, 900.0),
        ("shb", 0.5, 32): (1, 1, 0, 700.0),
        ("shb", 1.0, 16): (2, 2, 0, 195.0),
        ("shb", 1.0, 32): (1, 1, 0, 150.0),
    }
    assert figures.critical_batch_size([rows["shb", 1.0, b] for b in (16, 32)])["b_star"] == 16
    done = command(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0 and "not drawn: steps" not in done.stdout, done


def test_an_optimizer_all_of_whose_runs_diverged_has_steps_but_no_k(tmp_path):
    for b, n in ((8, 200), (16, 90), (32, 80)):
        for optimizer in ("shb", "nshb"):
            lost = {"steps": 300, "status": "diverged", "k": None}
            critical(tmp_path, optimizer, b, 0, {"1.0": n, "0.5": None}, **lost)
    done = command(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done
    points = {(r["optimizer"], r["batch_size"]): r for r in table(tmp_path / "out", "points")}
    assert points["shb", "8"]["delta_formula"] == "" != points["nshb", "8"]["delta_formula"]
    assert {r["published_accuracy"] for r in points.values()} == {""}


def test_equal_accuracies_make_a_band_of_no_width(tmp_path):
    for seed in range(3):
        normal(tmp_path, "shb", 8, seed, 93.61111111111111)
        sampling(tmp_path, "shb", 8, seed, 0.5, np.random.default_rng(seed).normal(size=4000))
    done = command(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done
    (row,) = table(tmp_path / "out", "points")
    assert row["accuracy_min"] == row["accuracy_mean"] == row["accuracy_max"]


def test_a_second_run_of_a_seed_adds_what_it_reached_and_the_longer_one_stays(tmp_path):
    critical(tmp_path, "shb", 16, 0, {"1.0": 200}, steps=200, name="a")
    critical(tmp_path, "shb", 16, 0, {"0.7": 400, "0.5": None}, steps=500, status="not_reached", name="b")
    critical(tmp_path, "shb", 16, 0, {"0.4": None}, steps=900, status="diverged", k=None, name="c")
    (group,) = figures.combinations(figures.read_runs(tmp_path)[0])
    (run,) = group["runs"]
    assert run["name"].endswith("-nameb") and run["to_eps"] == {1.0: 200, 0.7: 400, 0.5: None}
    assert len(group["left_out"]) == 2


def test_lr_is_what_a_user_meant(tmp_path):
    normal(tmp_path, "shb", 8, 0, 50.0, lr=0.1 * (1 - 0.9))
    normal(tmp_path, "nshb", 8, 0, 50.0, lr=0.01)
    (group,) = figures.combinations(figures.read_runs(tmp_path)[0])
    assert group["slug"] == "CIFAR100_ResNet18_lr0.01_beta0.9" and len(group["runs"]) == 2


def test_accuracy_is_set_beside_the_published_only_after_as_many_epochs(tmp_path):
    for epochs in (200, 20):
        normal(tmp_path / str(epochs), "sgd", 256, 0, 50.0, epochs=epochs)
        (group,) = figures.combinations(figures.read_runs(tmp_path / str(epochs))[0])
        (row,) = figures.point_table(group, figures.constants_table(group, []))
        assert row["published_accuracy"] == (68 if epochs == 200 else None)
        assert f"epochs {epochs}" in group["settings"]["normal"]


def test_sampling_before_the_first_step_has_no_gradient_norms(tmp_path):
    folder = sampling(tmp_path, "sgd", 64, 0, 0.5, np.random.default_rng(0).normal(size=4000), steps=0)
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"]["max_gradient_norm"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    done = command(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0 and "left out" not in done.stdout, done
    (row,) = table(tmp_path / "out", "points", "CIFAR100_ResNet18_lr0.1")
    assert row["max_minibatch_norm"] == "" and "K of SGD: 1.77, ‖∇f‖ at step 0 of " in done.stdout


def test_omega_of_another_batch_size_is_drawn_where_the_middle_one_is_damaged(tmp_path):
    for b in (16, 64, 256):
        folder = sampling(tmp_path, "sgd", b, 0, 0.5, np.random.default_rng(b).normal(size=4000))
        if b == 64:
            (folder / "omega.npy").write_bytes(b"")
    done = command(tmp_path, "--out", tmp_path / "out")
    rows = {int(r["batch_size"]): r for r in table(tmp_path / "out", "omega", "CIFAR100_ResNet18_lr0.1")}
    assert done.returncode == 0 and [b for b, r in rows.items() if r["beyond_6_std"]] == [16]


def test_a_point_with_a_diverged_seed_is_no_part_of_a_correlation():
    points = [{"optimizer": "sgd", "delta_formula": d, "accuracy_mean": a, "normal_diverged": 0,
               "delta_measured_mean": None} for d, a in ((1, 50), (2, 60), (3, 40))]  # fmt: skip
    before = figures.correlations(points)
    lost = points[0] | {"delta_formula": 9, "normal_diverged": 1}
    assert before[0]["points"] == 3 and before == figures.correlations([*points, lost])


def test_fewer_than_three_points_have_no_correlation():
    points = [{"optimizer": o, "delta_formula": d, "accuracy_mean": a, "normal_diverged": 0,
               "delta_measured_mean": 1.0} for o, d, a in (("sgd", 1, 5), ("sgd", 2, 6), ("shb", 3, 4))]  # fmt: skip
    (row,) = figures.correlations(points)  # the measured δ are all equal
    assert (row["delta"], row["optimizer"], row["points"]) == ("delta_formula", "all", 3)


def test_a_curve_breaks_at_a_bound_and_at_a_gap():
    rows = rows_of((8, [9.0, 9.0], 2, 0), (16, [8.0, 8.0], 1, 0), (32, [7.0], 1, 1), (64, [], 0, 2))
    fig, ax = figures.plt.subplots()
    figures.curve(ax, rows, "sfo", color="k")
    (line,) = [x for x in ax.lines if len(x.get_xdata()) == 4]
    assert list(line.get_xdata()) == [8, 16, 32, 64]
    np.testing.assert_equal(np.asarray(line.get_ydata(), float), [9, np.nan, 7, np.nan])
    figures.plt.close(fig)


def test_points_that_stayed_open_are_undecided_only_if_they_may_be_smaller():
    low, high, lost = (8, [4.0, 9.0], 1, 0), (8, [99.0, 9.0], 1, 0), (8, [], 0, 2)
    for first, undecided, edge in ((low, "8", "<="), (high, "", ""), (lost, "8", "<=")):
        star = figures.critical_batch_size(rows_of(first, (16, [6, 7], 2, 0), (32, [9, 9], 2, 0)))
        assert (star["b_star"], star["undecided"], star["edge"]) == (16, undecided, edge)


def test_a_missed_point_is_never_b_star_even_with_the_smallest_bound(tmp_path):
    critical(tmp_path, "shb", 8, 0, {"0.5": None}, steps=10, status="not_reached")
    for b, n in ((16, 100), (32, 40), (64, 90)):
        critical(tmp_path, "shb", b, 0, {"0.5": n}, steps=n)
    runs, left_out = figures.read_runs(tmp_path)
    rows = figures.critical_table(runs, {})
    assert not left_out and (rows[0]["reached"], rows[0]["sfo_mean"]) == (0, 80)
    star = figures.critical_batch_size(rows)
    assert (star["b_star"], star["undecided"]) == (32, "8")


def test_shb_without_momentum_has_no_bound_but_a_figure(tmp_path):
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(tmp_path / "runs", "shb", b, 0, {"0.5": n}, steps=n, beta1=0.0)
    done = command(tmp_path / "runs", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (row,) = table(tmp_path / "out", "critical_batch_size", "CIFAR100_ResNet18_lr0.1_beta0")
    assert (row["b_star"], row["bound"], row["c_squared"]) == ("16", "", "")


def test_sgd_joins_every_beta_and_nothing_else_mixes(tmp_path):
    for beta in (0.5, 0.9):
        normal(tmp_path, "shb", 8, 0, 50.0, beta1=beta)
    normal(tmp_path, "sgd", 8, 0, 50.0, beta1=0.3)
    normal(tmp_path, "sgd", 8, 0, 50.0, lr=0.01)
    groups = figures.combinations(figures.read_runs(tmp_path)[0])
    found = {g["slug"]: sorted((r["optimizer"], r["beta1"]) for r in g["runs"]) for g in groups}
    assert found == {
        "CIFAR100_ResNet18_lr0.01": [("sgd", 0.9)],
        "CIFAR100_ResNet18_lr0.1_beta0.5": [("sgd", 0.3), ("shb", 0.5)],
        "CIFAR100_ResNet18_lr0.1_beta0.9": [("sgd", 0.3), ("shb", 0.9)],
    }
    assert [bool(g["published"]["shb"]) for g in groups] == [False, False, True]


def test_envelope_against_a_plain_loop():
    norms = np.random.default_rng(0).random(5000).astype("<f4")
    first, last, low, high, mean = figures.envelope(norms, bins=50)
    assert first[0] == 1 and last[-1] == 5000 and np.array_equal(first[1:], last[:-1] + 1) and len(first) <= 50
    for a, z, lo, hi, m in zip(first, last, low, high, mean, strict=True):
        part = norms[a - 1 : z]
        assert (lo, hi) == (part.min(), part.max())
        assert m == pytest.approx(norms[:z].astype(float).sum() / z, rel=1e-12)
    assert [len(v) for v in figures.envelope(norms[:1])] == [1] * 5


@pytest.mark.parametrize("values", [np.ones(50), np.arange(5.0), np.append(np.arange(50.0), np.nan)])
def test_entries_without_a_spread_are_refused(values):
    with pytest.raises(ValueError, match=r"omega\.npy"):
        figures.pooled_spread(values.astype(np.float32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("lr", 0), ("lr", True), ("lr", "0.1"), ("lr", 10**400), ("beta1", 1), ("batchsize", 0)],
        *[("batchsize", None), ("seed", math.nan), ("seed", math.inf), ("model", "../../x")],
        *[("dataset", ["CIFAR10"]), ("optimizer", "adam")],
    ],
)
def test_an_argument_of_the_wrong_kind_leaves_the_run_out(tmp_path, key, value):
    folder = normal(tmp_path, "sgd", 8, 0, 50.0)
    summary = json.loads((folder / "summary.json").read_text())
    summary["args"][key] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    runs, left_out = figures.read_runs(tmp_path)
    assert runs == [] and f"{key} is " in left_out[folder.name]


@pytest.mark.parametrize(
    "to_eps", [{}, [], None, {"x": 3}, {"0.5": "3"}, {"-1": 3}, {"0.5": 0}, {"0.5": 101}, {"nan": 3}, {"0.5": [1]}]
)
def test_steps_to_eps_of_the_wrong_kind_leave_the_run_out(tmp_path, to_eps):
    folder = critical(tmp_path, "shb", 8, 0, to_eps, steps=100)
    runs, left_out = figures.read_runs(tmp_path)
    assert runs == [] and folder.name in left_out


def test_a_pipe_named_omega_is_not_waited_for_and_a_plain_terminal_gets_its_report(tmp_path):
    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, np.zeros(3))
    (folder / "omega.npy").unlink()
    os.mkfifo(folder / "omega.npy")
    words = [sys.executable, ROOT / "figures.py", tmp_path / "runs", "--out", tmp_path / "out"]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "") and "omega.npy is no regular file" in done.stdout
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, np.zeros(3))
    np.save(folder / "omega.npy", np.array([Trap()] * 4000, dtype=object), allow_pickle=True)
    runs, _ = figures.read_runs(tmp_path / "runs")
    left_out = {}
    rows = [{"name": r["name"]} for r in runs]
    assert figures.draw_omega(runs, rows, left_out) == (None, [], [])
    assert left_out and not (tmp_path / "sprung").exists()


def test_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.csv"
    figures.write(path, b"old")
    with pytest.raises(TypeError):
        figures.write(path, None)
    assert path.read_bytes() == b"old"


def test_markdown_drops_empty_columns_and_folds_bands():
    rows = [{"a": 1, "b": None, "c_mean": 2.0, "c_min": 1.0, "c_max": 3.5}]
    rows += [{"a": 1, "b": "", "c_mean": None, "c_min": None, "c_max": None}]
    assert figures.markdown(rows).splitlines() == [
        *("| a | c |", "| --- | --- |", "| 1 | 2 [1, 3.5] |", "| 1 | – |"),
        *("", "– in c: not known."),
    ]


@pytest.mark.parametrize(("mode", "key"), [(mode, key) for mode, keys in figures.SHARED.items() for key in keys])
def test_a_run_that_disagrees_with_its_mode_is_left_out(tmp_path, mode, key):
    make = {
        "normal": lambda seed, **more: normal(tmp_path, "sgd", 8, seed, 50.0, **more),
        "critical": lambda seed, **more: critical(tmp_path, "sgd", 8, seed, {"0.5": 9}, **more),
        "sampling": lambda seed, **more: sampling(tmp_path, "sgd", 8, seed, 1.0, np.zeros(3), **more),
    }[mode]
    folder = make(0)
    arguments = json.loads((folder / "args.json").read_text()) | {key: 77}
    summary = json.loads((folder / "summary.json").read_text()) | {"args": arguments}
    (folder / "summary.json").write_text(json.dumps(summary))
    make(1)
    make(2)
    (group,) = figures.combinations(figures.read_runs(tmp_path)[0])
    assert sorted(r["seed"] for r in group["runs"]) == [1, 2]
    assert f"{key} 77" in group["left_out"][folder.name]


def test_a_history_that_is_not_finite_is_named_and_not_drawn(tmp_path):
    folder = critical(tmp_path, "shb", 8, 0, {"0.5": 3}, steps=3)
    np.array([1, np.nan, 1], "<f4").tofile(folder / "gradient_norms.f32")
    left_out = {}
    assert figures.draw_gradients(figures.read_runs(tmp_path)[0], left_out) == (None, [])
    assert f"{folder.name} (gradient history only)" in left_out


# --- no number that misleads ---


def grouped(runs_dir):
    """The one group of runs below runs_dir, and its tables (steps, constants, points)."""
    (group,) = figures.combinations(figures.read_runs(runs_dir)[0])
    rows = figures.critical_table(group["runs"], figures.published_curve(group["published"]))
    constants = figures.constants_table(group, rows)
    return group, rows, constants, figures.point_table(group, constants)


def drawn(monkeypatch, runs_dir, out):
    """Draw the one group of runs; return {name: (open figure, its title)} and the report's text."""
    found = {}
    (group,) = figures.combinations(figures.read_runs(runs_dir)[0])

    def keep(path, fig, title):
        found[path.name.removeprefix(f"{group['slug']}_")] = (fig, title)

    monkeypatch.setattr(figures, "save_figure", keep)
    out.mkdir()
    return found, figures.draw(group, out)


def marks(fig, label):
    """The (x, y) of all marks of the figure that look like the legend's entry `label`."""
    points = []
    for ax in fig.axes:
        looks = [line.get_marker() for line in ax.lines if line.get_label() == label]
        for line in ax.lines:
            if line.get_marker() in looks and line.get_zorder() == 5:
                points += list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return points


def u_shaped(runs, optimizer="shb", **more):
    """Critical runs with b* = 16 at ε = 1."""
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(runs, optimizer, b, 0, {"1.0": n}, steps=n, **{"min_epochs": 0, **more})


def test_k_is_the_largest_full_gradient_norm_of_a_run_that_did_not_diverge(tmp_path):
    """The largest mini-batch norm, 28.9, would put δ_SHB at 26 for every b."""
    omega = np.random.default_rng(0).normal(size=4000)
    for b, published in PUBLISHED.items():
        critical(tmp_path, "shb", b, 0, published, k=28.9 if b == 8 else 3.0, steps=published["0.5"])
        sampling(tmp_path, "shb", b, 0, 1.0, omega, norm=1.77 if b == 64 else 1.2, steps=400)
    folder = sampling(tmp_path, "shb", 8, 1, 1.0, omega, norm=9.0, status="diverged")
    _, _, constants, points = grouped(tmp_path)
    expected = (1.77, "sampling-shb-b64-seed0", 400)
    assert {(c["k"], c["k_run"], c["k_step"]) for c in constants} == {expected} and folder.exists()
    delta = {p["batch_size"]: p["delta_formula"] for p in points}
    assert [round(delta[b], 2) for b in (8, 256, 1024, 8192)] == [2.28, 1.63, 1.61, 1.60]
    assert [p["max_minibatch_norm"] for p in points] == [28.9] + [3.0] * 10
    text = figures.markdown(points).splitlines()[0]
    assert "largest mini-batch gradient norm" in text


@pytest.mark.parametrize("mode", ["critical", "normal"])
def test_a_full_gradient_that_another_mode_measured_counts_too(tmp_path, mode):
    sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3), norm=1.5)
    extra = {"steps_to_eps": {"1.0": None}, "max_gradient_norm": 7.0, "full_gradient_norm": 2.5}
    extra |= {"accuracy": 1.0, "best_accuracy": 1.0, "training_loss": 1.0}
    folder = record(tmp_path, mode, "sgd", 16, 0, extra, steps=33)
    found = figures.largest_full_gradient(figures.read_runs(tmp_path)[0])
    assert found == {"k": 2.5, "k_run": folder.name, "k_step": 33}


def test_without_a_full_gradient_what_needs_k_is_not_drawn_and_the_report_says_why(tmp_path):
    for optimizer in ("sgd", "shb"):
        u_shaped(tmp_path / "runs", optimizer, k=3.0)
    done = command(tmp_path / "runs", "--out", tmp_path / "out")
    points = table(tmp_path / "out", "points")
    assert {p["optimizer"]: p["delta_formula"] != "" for p in points} == {"sgd": True, "shb": False}
    reason = "not drawn: the formula's δ of SHB: it needs K: no run that did not diverge measured a full gradient"
    assert reason in done.stdout and reason in (tmp_path / "out" / "report.md").read_text()
    assert "K of" not in done.stdout and "formula's δ of SGD" not in done.stdout


@pytest.mark.parametrize("value", [None, "1.77", -1.0, math.inf, True])
def test_a_full_gradient_norm_of_the_wrong_kind_leaves_the_run_out(tmp_path, value):
    folder = sampling(tmp_path, "sgd", 8, 0, 1.0, np.zeros(3), norm=value)
    runs, left_out = figures.read_runs(tmp_path)
    assert runs == [] and "full_gradient_norm is " in left_out[folder.name]


def test_an_exactly_gaussian_vector_with_unequal_scales_is_not_called_non_normal(tmp_path):
    rng = np.random.default_rng(1)
    omega = rng.lognormal(0, 1, 100_000) * rng.normal(size=100_000)  # each coordinate exactly Gaussian
    z, share = figures.pooled_spread(omega.astype(np.float32))
    assert np.all(np.diff(z) >= 0) and abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1)
    assert (z**4).mean() - 3 > 50 and stats.kstest(z, "norm")[0] > 0.1
    assert share == np.mean(np.abs(omega - omega.mean()) > 6 * omega.std()) > 0.001
    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, omega)
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"]["omega_entries"] = 100_000
    (folder / "summary.json").write_text(json.dumps(summary))
    command(tmp_path / "runs", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    (row,) = table(tmp_path / "out", "omega", "CIFAR100_ResNet18_lr0.1")
    assert float(row["beyond_6_std"]) == pytest.approx(share)
    assert not {"k2", "k2_p", "ks_distance"} & row.keys()
    for claim in ("normality", "non-normal", "near normal", "not normal", "K²", "KS distance", "p-value is"):
        assert claim not in text
    assert "cannot tell whether ω is Gaussian" in " ".join(text.split())


def test_the_histogram_says_what_it_cuts_off_and_what_it_cannot_tell(tmp_path, monkeypatch):
    omega = np.append(np.random.default_rng(2).normal(size=3990), [50.0] * 10)
    sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, omega)
    found, _ = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    fig, title = found["omega"]
    assert any("beyond ±6 std: 0.25 %" in text.get_text() for text in fig.axes[0].texts)
    assert "not whether it is Gaussian" in title


def test_upper_bounds_are_arrows_and_no_part_of_curve_interpolation_or_ratio(tmp_path, monkeypatch):
    published = {b: n["1.0"] for b, n in PUBLISHED.items()}
    for b, n in published.items():
        first = 11 * -(-50_000 // b)
        n = first if b >= 2048 else n
        critical(tmp_path / "runs", "shb", b, 0, {"1.0": n}, steps=n)
    _, rows, constants, _ = grouped(tmp_path / "runs")
    early = [r["batch_size"] for r in rows if r["steps_are"] == "upper bound"]
    assert early == [2048, 4096, 8192]
    assert [r["ratio"] is None for r in rows] == [b in early for b in published]
    fig = figures.draw_steps(rows, constants, {})
    arrows = marks(fig, "upper bound: ε reached at the first check")
    assert sorted(arrows)[:2] == [(2048, 275), (2048, 275 * 2048)] and len(arrows) == 6
    (line,) = [x for x in fig.axes[0].lines if len(x.get_xdata()) == len(published)]
    assert np.isnan(np.asarray(line.get_ydata(), float)[-3:]).all()
    figures.plt.close(fig)
    star = constants[0] | {"bound": 2000.0}  # between the last whole point and the first bound
    fig, ax = figures.plt.subplots()
    figures.size_axis(ax, rows)
    figures.mark_b_star(ax, rows, "steps", star)
    ((x, y),) = marks(fig, "theory's bound; C² from b* at the reference ε")
    assert (x, y) == (2000.0, pytest.approx(published[1024]))
    figures.plt.close(fig)


def test_a_point_with_one_seed_too_early_and_one_too_late_is_undetermined(tmp_path):
    critical(tmp_path, "shb", 512, 0, {"1.0": 98 * 11}, steps=98 * 11)
    critical(tmp_path, "shb", 512, 1, {"1.0": None}, steps=2000, status="not_reached")
    critical(tmp_path, "shb", 1024, 0, {"1.0": 1}, steps=1, min_epochs=0)
    rows = figures.critical_table(figures.read_runs(tmp_path)[0], {})
    assert [(r["steps_are"], r["at_first_check"]) for r in rows] == [("undetermined", 1), ("measured", 0)]


def test_a_merged_run_claims_no_step_that_was_not_checked(tmp_path):
    """The longer run was not asked ε = 0.7: that it was not reached is known for the shorter run's steps only."""
    critical(tmp_path, "shb", 16, 0, {"0.7": None, "0.5": None}, steps=300, status="not_reached", name="short")
    critical(tmp_path, "shb", 16, 0, {"0.5": None}, steps=900, status="not_reached", name="long")
    rows = {r["eps"]: r for r in figures.critical_table(grouped(tmp_path)[0]["runs"], {})}
    assert (rows[0.7]["steps_mean"], rows[0.7]["checked_mean"], rows[0.7]["steps_are"]) == (300, 300, "lower bound")
    assert (rows[0.5]["steps_mean"], rows[0.5]["checked_mean"], rows[0.5]["steps_are"]) == (900, 900, "lower bound")


def test_a_merged_run_never_contradicts_what_the_longer_one_checked(tmp_path):
    critical(tmp_path, "shb", 16, 0, {"0.7": 250}, steps=250, name="short")
    critical(tmp_path, "shb", 16, 0, {"0.7": None}, steps=900, status="not_reached", name="long")
    critical(tmp_path, "shb", 32, 0, {"0.7": None}, steps=500, status="not_reached", name="capped")
    critical(tmp_path, "shb", 32, 0, {"0.7": 800, "0.5": None}, steps=950, status="diverged", k=None, name="lost")
    runs = {r["batchsize"]: r for r in grouped(tmp_path)[0]["runs"]}
    assert (runs[16]["to_eps"], runs[16]["checked"]) == ({0.7: None}, {0.7: 900})
    assert (runs[32]["to_eps"], runs[32]["checked"]) == ({0.7: 800}, {0.7: 950})


@pytest.mark.parametrize("damage", [None, "short", "nan", "negative"])
def test_the_longer_runs_history_settles_a_merge(tmp_path, damage):
    norms = np.random.default_rng(4).uniform(0.4, 0.8, 5000).astype("<f4")
    folder = critical(tmp_path, "sgd", 1024, 0, {"0.1": None}, steps=5000, status="not_reached", name="long")
    critical(tmp_path, "sgd", 1024, 0, {"0.6": 4000, "0.599": None}, steps=4500, status="not_reached", name="short")
    if damage == "short":
        norms = norms[:-1]
    elif damage == "nan":
        norms[7] = np.nan
    elif damage == "negative":
        norms[7] = -0.5
    norms.tofile(folder / "gradient_norms.f32")
    (run,) = grouped(tmp_path)[0]["runs"]
    expected = {0.1: None, 0.6: 4000, 0.599: None}
    if damage is None:
        total, expected = 0.0, dict.fromkeys(expected)
        for step, norm in enumerate(map(float, norms), 1):
            total += norm
            for eps, found in expected.items():
                if found is None and step >= 49 * 11 and total / step <= eps:
                    expected[eps] = step
        assert expected[0.6] not in (None, 4000)
    assert run["to_eps"] == expected
    assert run["checked"] == {0.1: 5000, 0.6: 4500 if damage else 5000, 0.599: 4500 if damage else 5000}


@pytest.mark.parametrize(("args", "shown"), [({}, True), ({"min_epochs": 0}, False), ({"precision": "bf16"}, False)])
def test_ratio_needs_the_published_settings(tmp_path, args, shown):
    for b in (16, 32):
        critical(tmp_path, "shb", b, 0, {"1.0": PUBLISHED[b]["1.0"]}, steps=PUBLISHED[b]["1.0"], **args)
    rows = grouped(tmp_path)[1]
    assert [r["published"] for r in rows] == [PUBLISHED[16]["1.0"], PUBLISHED[32]["1.0"]]
    assert [r["ratio"] for r in rows] == ([1.0, 1.0] if shown else [None, None])


def test_a_curve_whose_c_squared_rests_on_an_edge_says_so(tmp_path, monkeypatch):
    for b, n in ((8, 10), (16, 20), (32, 30)):
        critical(tmp_path / "runs", "sgd", b, 0, {"1.0": n}, steps=n, min_epochs=0, lr=0.2)
    u_shaped(tmp_path / "runs", "nshb", lr=0.2)
    _, _, constants, points = grouped(tmp_path / "runs")
    assert [c["c_squared_from"] for c in constants] == ["b* <= 8", "b* = 16"]
    assert {(p["optimizer"], p["delta_formula_from"]) for p in points} == {("sgd", "b* <= 8"), ("nshb", "b* = 16")}
    fig, _ = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")[0]["delta"]
    assert fig.axes[0].get_legend_handles_labels()[1] == ["SGD, formula (C² from b* <= 8)", "NSHB, formula"]


def test_a_bound_beyond_the_grid_is_an_arrow_at_its_edge(tmp_path):
    for b, n in ((8, 90), (16, 20), (32, 30)):
        critical(tmp_path, "nshb", b, 0, {"1.0": n, "0.1": 9 * n, "9.0": n - 9}, steps=9 * n, min_epochs=0)
    _, rows, constants, _ = grouped(tmp_path)
    assert [c["bound"] for c in constants] == [pytest.approx(x) for x in (16, 0.16, 16 / 81 / 100)]
    fig = figures.draw_steps(rows, constants, {})
    for ax in fig.axes:
        low, high = ax.get_xlim()
        assert 4 < low < 8 and 32 < high < 64
    assert sorted(x for x, _ in marks(fig, "theory's bound lies beyond the grid")) == [0.03] * 4
    figures.plt.close(fig)


def test_tables_without_a_single_b_star_are_not_written(tmp_path):
    critical(tmp_path / "runs", "sgd", 8, 0, {"1.0": 9}, steps=9, min_epochs=0)
    critical(tmp_path / "runs", "sgd", 16, 0, {"1.0": None}, steps=9, status="not_reached", min_epochs=0)
    done = command(tmp_path / "runs", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*critical_batch_size.csv"))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### critical batch size" not in text
    assert "no table: critical_batch_size: fewer than two b all of whose seeds reached ε" in text + done.stdout


def test_what_diverged_is_marked_once(tmp_path, monkeypatch):
    for optimizer in ("sgd", "nshb"):
        u_shaped(tmp_path / "runs", optimizer)
        lost = {"steps_to_eps": {"1.0": None, "0.5": None}, "max_gradient_norm": None}
        record(tmp_path / "runs", "critical", optimizer, 32, 1, lost, steps=7, status="diverged", min_epochs=0)
        for b in (8, 32):
            normal(tmp_path / "runs", optimizer, b, 0, 50.0)
        record(tmp_path / "runs", "normal", optimizer, 32, 1, {}, steps=7, status="diverged")
    found, text = drawn(monkeypatch, tmp_path / "runs", tmp_path / "out")
    for name, count in (("steps", 2), ("accuracy", 2)):  # one for each optimizer
        crosses = marks(found[name][0], "a seed diverged")
        assert len(crosses) == count
        labels = [label for ax in found[name][0].axes for label in ax.get_legend_handles_labels()[1]]
        assert "a seed diverged" in labels
    assert len(set(marks(found["accuracy"][0], "a seed diverged"))) == 2  # none hides the other
    for name in ("critical-sgd-b32-seed1-min_epochs0", "normal-nshb-b32-seed1"):
        assert text.count(name) == 1 and f"- diverged: {name}\n" in text


def histories(runs):
    """Critical runs of SGD with histories at b = 1024, 2048, 4096, one of them without. Returns {b: norms}."""
    rng, norms = np.random.default_rng(8), {}
    for b, n in ((1024, 3000), (2048, 1500), (4096, 900)):
        folder = critical(runs, "sgd", b, 0, {"0.5": None}, steps=n, status="not_reached")
        norms[b] = (0.7 + 5 / np.arange(1, n + 1) * rng.uniform(0.5, 2, n)).astype("<f4")
        if b != 4096:
            norms[b].tofile(folder / "gradient_norms.f32")
    return norms


def test_any_eps_is_answered_from_the_histories(tmp_path):
    norms = histories(tmp_path / "runs")
    done = command(tmp_path / "runs", "--out", tmp_path / "out", "--eps", "0.75", "0.6")
    assert done.returncode == 0, done.stderr
    rows = {(float(r["eps"]), int(r["batch_size"])): r for r in table(tmp_path / "out", "steps", SLUG[:-8])}
    assert sorted(rows) == [(eps, b) for eps in (0.6, 0.75) for b in (1024, 2048)]
    for (eps, b), row in rows.items():
        total, expected = 0.0, None
        for step, norm in enumerate(map(float, norms[b]), 1):
            total += norm
            if expected is None and step >= 11 * -(-50_000 // b) and total / step <= eps:
                expected = step
        assert (expected is None) == (eps == 0.6)
        assert float(row["steps_mean"]) == (expected or len(norms[b]))
        assert row["steps_are"] == ("lower bound" if expected is None else "measured")
    unable = (
        "critical-sgd-b4096-seed0 (ε = 0.75, 0.6 only): not in its record, and gradient_norms.f32 does not hold 900"
    )
    assert unable in done.stdout and unable in (tmp_path / "out" / "report.md").read_text()


def test_the_mean_may_equal_eps_and_is_a_float64(tmp_path):
    for b, norm in ((2048, 0.5), (4096, 0.1)):
        folder = critical(tmp_path, "sgd", b, 0, {"0.01": None}, steps=200_000, status="not_reached")
        np.full(200_000, norm, "<f4").tofile(folder / "gradient_norms.f32")
    equal, above = figures.read_runs(tmp_path)[0]
    assert figures.choose_eps([equal, above], [0.5, 0.1]) == {}
    assert equal["to_eps"] == {0.5: 275, 0.1: None}  # 275: the first check
    # 0.1 in float32 is above 0.1 for ever; sums in float32 drift below.
    assert above["to_eps"] == {0.5: 143, 0.1: None}
    assert (np.cumsum(np.full(200_000, 0.1, "<f4")) / np.arange(1, 200_001) <= 0.1).any()


def test_a_recorded_eps_needs_no_history(tmp_path):
    histories(tmp_path)
    runs = figures.read_runs(tmp_path)[0]
    assert figures.choose_eps(runs, [0.5]) == {}
    assert [r["to_eps"] for r in runs] == [{0.5: None}] * 3


@pytest.mark.parametrize("eps", [["0"], ["-1"], ["nan"], ["inf"], ["x"], [], ["0.72", "0"], ["0.3"]])
def test_an_eps_that_nobody_can_answer_is_one_error_line(tmp_path, eps):
    critical(tmp_path / "runs", "sgd", 8, 0, {"0.72": 9}, steps=9)
    done = command(tmp_path / "runs", "--out", tmp_path / "out", "--eps", *eps)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: argument --eps: ") and done.stderr.count("\n") == 1


def test_every_figure_says_what_it_is_of(tmp_path, monkeypatch):
    group = figures.combinations(figures.read_runs(tmp_path)[0])
    assert group == []
    normal(tmp_path / "shb", "shb", 8, 0, 50.0, lr=0.05, beta1=0.5)
    normal(tmp_path / "shb", "sgd", 16, 0, 50.0, lr=0.05)
    normal(tmp_path / "sgd", "sgd", 8, 0, 50.0, lr=0.05)
    normal(tmp_path / "sgd", "sgd", 16, 0, 50.0, lr=0.05)
    for name, title in (("shb", "CIFAR100, ResNet18, lr 0.05, β 0.5"), ("sgd", "CIFAR100, ResNet18, lr 0.05")):
        found, _ = drawn(monkeypatch, tmp_path / name, tmp_path / f"{name}-out")
        assert {title for _, title in found.values()} == {title}
    monkeypatch.undo()
    fig, _ = found["accuracy"]
    figures.save_figure(tmp_path / "figure", fig, title)
    assert fig._suptitle.get_text() == title


def test_no_arrow_hides_another(tmp_path):
    for b in (8, 16):
        critical(tmp_path, "sgd", b, 0, dict.fromkeys(("1.0", "0.7", "0.5")), steps=90, status="not_reached")
    fig = figures.draw_steps(figures.critical_table(figures.read_runs(tmp_path)[0], {}), [], {})
    places = marks(fig, "lower bound: a seed did not reach ε")
    assert len(places) == len(set(places)) == 12
    seen = sorted(x for x, y in places if y == 90)  # on one height: b = 8 left of b = 16, apart from each other
    assert seen[1] == 8 and seen[4] == 16 and min(np.diff(np.log2(seen))) > 0.2
    figures.plt.close(fig)


def test_a_legend_has_a_fixed_order_with_its_marks_last(tmp_path):
    fig, axes = figures.plt.subplots(1, 2)
    figures.mark(axes[0], 1, 1, "a seed diverged", marker="x")
    for ax, names in zip(axes, (("SGD",), ("SGD", "SHB")), strict=True):
        for name in names:
            ax.plot([1, 2], [1, 2], label=name)
    figures.save_figure(tmp_path / "figure", fig, "")
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["SGD", "SHB", "a seed diverged"]


def test_delta_is_measured_before_formula_before_paper_and_sgd_shb_nshb(tmp_path):
    for optimizer in ("nshb", "shb", "sgd"):
        for b, n in ((256, 900), (512, 200), (1024, 300)):
            critical(tmp_path, optimizer, b, 0, {"0.5": n}, steps=n, min_epochs=0)
            sampling(tmp_path, optimizer, b, 0, 1.0, np.zeros(3))
    fig = figures.draw_delta(grouped(tmp_path)[3])
    kinds = ("measured", "formula", "paper's C², K")
    expected = [f"{name}, {kind}" for kind in kinds for name in ("SGD", "SHB", "NSHB")]
    assert fig.axes[0].get_legend_handles_labels()[1] == expected
    figures.plt.close(fig)


@pytest.mark.parametrize("sizes", [[2**k for k in range(3, 14)], [8, 16], [96, 100, 128, 1024], list(range(1, 60))])
def test_batch_sizes_are_plain_ticks_with_room_between_them(sizes):
    fig, ax = figures.plt.subplots()
    figures.size_axis(ax, [{"batch_size": b} for b in sizes])
    ticks, labels = ax.get_xticks(), [text.get_text() for text in ax.get_xticklabels()]
    assert labels == [f"{b}" for b in ticks] and set(ticks) <= set(sizes) and 2 <= len(ticks) <= 7
    assert np.diff(np.log(ticks)).min() >= np.log(sizes[-1] / sizes[0]) / 6.1
    figures.plt.close(fig)


@pytest.mark.parametrize(("low", "high"), [(3.1, 3.4), (0.2, 0.8), (30, 90), (5, 60)])
def test_a_log_axis_of_under_two_decades_has_plain_ticks(low, high):
    fig, ax = figures.plt.subplots()
    ax.set(yscale="log", ylim=(low, high))
    figures.readable_ticks(ax.yaxis)
    fig.canvas.draw()
    inside = [
        t
        for t, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        if low <= t <= high and float(text.get_text()) == pytest.approx(t)
    ]
    assert 3 <= len(inside) <= 8
    figures.plt.close(fig)


def test_every_dash_has_its_reason_and_an_empty_section_says_none(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    u_shaped(runs)
    critical(runs, "sgd", 8, 0, {"1.0": None}, steps=9, status="not_reached")
    critical(runs, "sgd", 16, 0, {"1.0": None}, steps=9, status="diverged", k=None)
    normal(runs, "shb", 64, 0, 50.0)
    for b in (8, 16):
        sampling(runs, "shb", b, 0, 1.0, np.random.default_rng(0).normal(size=4000))
    assert command(runs, "--out", out).returncode == 0
    text, dashes = (out / "report.md").read_text(), 0
    for section in text.split("\n### ")[1:]:
        lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
        for line in lines[2:]:
            for head, cell in zip(lines[0], line, strict=True):
                notes = [note for note in section.splitlines() if note.startswith("– in ")]
                dashes += cell == "–"
                assert cell != "–" or any(
                    head in note.partition(":")[0].removeprefix("– in ").split(", ") for note in notes
                )
    assert dashes > 10 and ": not known." not in text
    assert text.endswith("## what could not be read\n\n- none\n")


def test_extra_keys_are_ignored_and_an_unknown_optimizer_is_named(tmp_path):
    folder = critical(tmp_path, "sgd", 8, 0, {"1.0": 9}, steps=9, nu=0.5, injected_noise=None)
    critical(tmp_path, "qhm", 8, 0, {"1.0": 9}, steps=9)
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"] |= {"at_first_check": ["1.0"], "full_gradient_steps_to_eps": {"1.0": 3}}
    (folder / "summary.json").write_text(json.dumps(summary | {"new": []}))
    runs, left_out = figures.read_runs(tmp_path)
    assert [r["name"] for r in runs] == [folder.name]
    assert list(left_out) == ["critical-qhm-b8-seed0"] and "optimizer is 'qhm'" in left_out["critical-qhm-b8-seed0"]
