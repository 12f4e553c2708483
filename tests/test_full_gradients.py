"""--mode critical --full_grad_every: when ∇f is measured, the first step by it, and what resuming makes of both."""

import csv
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, summary

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
import child
from test_survival import bits, outcome

import data
import full_gradients
import main
import models
import training
from arguments import parse

BASE = ["--dataset", "digits", "--model", "ResNet20", "--batchsize", 64, "--lr", 0.02, "--name", "r"]
CRITICAL = ["--mode", "critical", "--min_epochs", 1, "--full_grad_batchsize", 500]
EVERY = ["--full_grad_every", 0.3]  # 7 of 23 steps
LONG = [*CRITICAL, *EVERY, "--max_steps", 150]
EPS = ["--eps", 1.5, 0.9, 0.01]


def rows(directory):
    with open(directory / "full_gradients.csv", newline="") as file:
        return [(int(row["steps"]), float(row["full_gradient_norm"])) for row in csv.DictReader(file)]


def left(directory):
    """All that a run leaves, the file of full gradients included."""
    return outcome(directory) | {"full_gradients": (directory / "full_gradients.csv").read_bytes()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never interrupted, and does not reach its last ε."""
    directory = tmp_path_factory.mktemp("whole")
    status, log = child.run([*BASE, *LONG, *EPS], directory)
    assert status == 0 and "warning" not in log.lower(), log
    return directory / "runs" / "r"


def slow_rule(measured, eps):
    """(the first measured step with a norm of at most ε, the measured step before it), by a loop."""
    before = None
    for step, norm in measured:
        if norm <= eps:
            return step, before
        before = step
    return None, before


def slow_norm(args, steps):
    """‖∇f‖ after `steps` updates of the textbook SHB, in float64, image by image in its weight."""
    images = data.load("digits", None, torch.device("cpu"), args.seed)
    torch.manual_seed(args.seed)
    model, momentum = Tiny(10), 0.0
    batches = (batch for epoch in range(9) for batch in images.epoch(epoch, args.batchsize))

    def gradient(x, y, weight=1.0):
        loss = weight * F.cross_entropy(model(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

    for _ in range(steps):
        momentum = 0.9 * momentum + gradient(*next(batches))
        with torch.no_grad():
            vector = torch.nn.utils.parameters_to_vector(model.parameters()) - args.lr * momentum.float()
            torch.nn.utils.vector_to_parameters(vector, model.parameters())
    chunks = images.full_pass(steps, args.full_grad_batchsize)
    return sum(gradient(x, y, len(y) / images.size) for x, y in chunks).norm().item()


def test_the_norms_are_those_of_a_slow_twin(whole):
    measured = rows(whole)
    assert [step for step, _ in measured] == list(range(0, 151, 7))
    args = parse([*map(str, [*BASE, *LONG])])
    for step, norm in measured[:4]:
        assert norm == pytest.approx(slow_norm(args, step), rel=1e-3)


def test_the_results_follow_from_the_rows_by_the_rule(whole):
    measured, results = rows(whole), summary(whole)["results"]
    assert results["full_gradient_every"] == 7 and list(results["steps_to_eps_full"]) == ["1.5", "0.9", "0.01"]
    for eps in (1.5, 0.9, 0.01):
        step, above = slow_rule(measured, eps)
        assert results["steps_to_eps_full"][repr(eps)] == step
        assert results["last_above_eps_full"][repr(eps)] == above
        assert results["sfo_full"][repr(eps)] == (None if step is None else 64 * step)
    assert results["steps_to_eps_full"]["0.9"] and results["steps_to_eps_full"]["0.01"] is None


class Scripted:
    """A run whose full gradients have the given norms."""

    def __init__(self, every, eps, norms, known=None, step=0):
        args = {"full_grad_every": every, "full_grad_batchsize": 9, "batchsize": 4, "eps": eps}
        self.args, self.results, self.step, self.outcome = SimpleNamespace(**args), known or {}, step, None
        self.steps_per_epoch, self.norms, self.total = 10, iter(norms), SimpleNamespace(steps=step)
        self.data = SimpleNamespace(size=9, full_pass=lambda step, size: iter(()))
        rows = [{"steps": i, "full_gradient_norm": repr(norm)} for i, norm in enumerate(norms)][:step]
        file = SimpleNamespace(rows=lambda: rows)
        self.kept = []
        self.record = SimpleNamespace(full_gradients=file, append=self.keep_rows)

    def keep_rows(self, file, rows):
        assert file is self.record.full_gradients
        self.kept += [(row["steps"], row["full_gradient_norm"]) for row in rows]

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def stop(self, outcome, diverged_at):
        self.outcome = (outcome, diverged_at)


@pytest.fixture
def scripted(monkeypatch):
    progress = SimpleNamespace(bar=SimpleNamespace(close=lambda: None), chunks_of=int)
    monkeypatch.setattr(full_gradients, "Progress", lambda run, images: progress)
    monkeypatch.setattr(full_gradients, "full_gradient", lambda model, *_: model)
    monkeypatch.setattr(full_gradients, "length", next)

    def make(*given, **more):
        run = Scripted(*given, **more)
        run.model = run.norms
        return run, full_gradients.FullGradients(run)

    return make


@pytest.mark.parametrize("every", [0.01, 0.1, 0.25, 0.26, 1, 2.5])
@pytest.mark.parametrize("seed", range(6))
def test_the_rule_against_a_loop_on_random_sequences(scripted, seed, every):
    rng = np.random.default_rng(seed)
    norms = (rng.integers(0, 40, 30) / 8).tolist()  # not monotone, some of them equal to ε
    eps = [4.5, 2.0, 0.5, 0.125, 0.01]
    run, full = scripted(every, eps, norms)
    k = max(1, round(every * 10))
    for run.step in range(0, 30 * k, 1):
        if run.step in full.at:
            full.measure()
            assert full.keep() == {"full_gradient_norm": norms[run.step // k]} and full.keep() == {}
    measured = [(i * k, norm) for i, norm in enumerate(norms)]
    assert run.kept == measured
    found = full.results()
    for each in eps:
        step, above = slow_rule(measured, each)
        assert found["steps_to_eps_full"][repr(each)] == step
        assert found["last_above_eps_full"][repr(each)] == above
        assert found["sfo_full"][repr(each)] == (None if step is None else 4 * step)
    assert found["full_gradient_every"] == k


def test_a_new_eps_is_looked_for_in_the_rows_and_a_known_one_is_not(scripted):
    norms = [5.0, 3.0, 1.0, 2.0]
    _, full = scripted(0.1, [3.0, 1.0, 0.5], norms, known={"steps_to_eps_full": {"1.0": 99}}, step=4)
    assert full.reached == {"3.0": 1, "1.0": 99, "0.5": None}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_a_divergence_and_is_not_kept(scripted, bad):
    run, full = scripted(1, [0.5], [3.0, bad])
    for run.step in (0, 10):
        full.measure()
        full.keep()
    assert run.outcome == ("diverged", 11) and run.kept == [(0, 3.0)]
    assert full.results()["last_above_eps_full"] == {"0.5": 0}


def test_measuring_changes_nothing_in_training(whole, tmp_path):
    status, _ = child.run([*BASE, *CRITICAL, *EPS, "--max_steps", 150], tmp_path)
    plain = tmp_path / "runs" / "r"
    assert status == 0 and (plain / "gradient_norms.f32").read_bytes() == (whole / "gradient_norms.f32").read_bytes()
    assert not (plain / "full_gradients.csv").exists()
    ours, theirs = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (whole, plain))
    for key in ("model", "optimizer", "random", "step"):
        assert bits(ours[key]) == bits(theirs[key]), key
    with_full, without = (summary(d)["results"] for d in (whole, plain))
    assert {key: with_full[key] for key in without} == without and not any("full" in key for key in without)


def test_the_run_ends_where_the_last_of_both_rules_is_reached(whole, tmp_path):
    """By the running mean later than by ∇f, and the other way round."""
    every = summary(whole)["results"]
    means = np.fromfile(whole / "gradient_norms.f32", "<f4").astype(float).cumsum() / np.arange(1, 151)
    first_mean = {eps: next((i + 1 for i in range(22, 150) if means[i] <= eps), None) for eps in (1.5, 0.9)}
    for eps in (1.5, 0.9):
        expected = (first_mean[eps], every["steps_to_eps_full"][repr(eps)])
        directory = tmp_path / f"{eps}"
        _, log = child.run([*BASE, *LONG, "--eps", eps], directory)
        s = summary(directory / "runs" / "r")
        assert s["results"]["steps_to_eps"] == {repr(eps): expected[0]}, log
        assert s["results"]["steps_to_eps_full"] == {repr(eps): expected[1]}
        assert (s["status"], s["steps"]) == (("not_reached", 150) if None in expected else ("finished", max(expected)))
        assert rows(directory / "runs" / "r") == [row for row in rows(whole) if row[0] <= s["steps"]]
        assert "one in 7" in log and "upper bound" in log


@pytest.mark.parametrize("at", [1, 3, 5, 11, 12, 13, 60, 150])
def test_stopped_between_any_two_steps_or_chunks_it_resumes_to_the_same_bits(whole, tmp_path, at):
    status, log = child.run([*BASE, *LONG, *EPS], tmp_path, f"signal_at={at}")
    assert status == 143, log
    status, log = child.run([*BASE, *LONG, *EPS, "--resume"], tmp_path)
    assert status == 0 and "warning" not in log.lower(), log
    assert left(tmp_path / "runs" / "r") == left(whole)


@pytest.mark.parametrize("moment", ["die_in_write", "die_between_renames", "die_after_rename"])
def test_killed_at_the_worst_moments_it_resumes_to_the_same_bits(whole, tmp_path, moment):
    argv = [*BASE, *LONG, *EPS, "--resume"]
    status, log = child.run([*argv, "--checkpoint_every", 0], tmp_path, moment)
    assert status < 0, log
    status, log = child.run(argv, tmp_path)
    assert status == 0, log
    assert left(tmp_path / "runs" / "r") == left(whole)


@pytest.mark.parametrize(("first", "then"), [([0.9], [1.5, 0.01]), ([1.5], [0.9]), ([0.01], [0.9, 1.5])])
@pytest.mark.parametrize("cap", [150, 70, 50])
def test_a_further_eps_or_cap_gives_the_record_of_one_run_with_all(first, then, cap, tmp_path):
    every = sorted({*first, *then})
    assert child.run([*BASE, *LONG, "--eps", *every], tmp_path / "whole")[0] == 0
    assert child.run([*BASE, *LONG, "--eps", *first, "--max_steps", cap], tmp_path)[0] == 0
    status, log = child.run([*BASE, *LONG, "--eps", *then, "--resume"], tmp_path)
    assert status == 0 and "warning" not in log, log
    assert left(tmp_path / "runs" / "r") == left(tmp_path / "whole" / "runs" / "r")
    status, log = child.run([*BASE, *LONG, "--eps", *every, "--resume"], tmp_path)
    assert status == 0 and " already, after " in log, log


def test_a_larger_eps_leaves_the_last_measurement_of_a_run_that_ended_with_it(tmp_path):
    """Of step 46, the run's last: the checkpoint is from before it was kept, and knows its answer already."""
    argv = [*BASE, *CRITICAL, "--full_grad_every", 2, "--max_steps", 150]
    assert child.run([*argv, "--eps", 5, 1.5], tmp_path / "whole")[0] == 0
    assert child.run([*argv, "--eps", 1.5], tmp_path)[0] == 0
    assert rows(tmp_path / "runs" / "r")[-1][0] == summary(tmp_path / "runs" / "r")["steps"] == 46
    assert child.run([*argv, "--eps", 5, "--resume"], tmp_path)[0] == 0
    assert left(tmp_path / "runs" / "r") == left(tmp_path / "whole" / "runs" / "r")


def test_damaged_rows_are_given_up_and_then_no_new_eps_is_looked_for(whole, tmp_path):
    assert child.run([*BASE, *LONG, *EPS], tmp_path, "signal_at=100")[0] == 143
    path = tmp_path / "runs" / "r" / "full_gradients.csv"
    os.truncate(path, path.stat().st_size // 2)
    argv = [*BASE, *LONG, "--resume"]
    status, log = child.run([*argv, "--eps", 0.7], tmp_path)
    assert status == 2 and "has lost gradient norms" in log, log
    status, log = child.run([*argv, *EPS], tmp_path)
    assert status == 0 and "the rows so far are lost" in log, log
    measured = rows(path.parent)
    assert measured and measured == rows(whole)[-len(measured) :] and len(measured) < len(rows(whole))
    assert outcome(path.parent) == outcome(whole)
    status, log = child.run([*argv, "--eps", 0.7], tmp_path)
    assert status == 2 and "has lost gradient norms" in log, log


def test_a_file_deleted_meanwhile_is_put_back(whole, tmp_path):
    status, log = child.run([*BASE, *LONG, *EPS, "--max_steps", 200], tmp_path, "delete_full_gradients")
    assert status == 0 and log.count("it is restored") == 1, log
    measured = rows(tmp_path / "runs" / "r")
    assert measured[:22] == rows(whole) and [step for step, _ in measured] == list(range(0, 201, 7))


def test_a_checkpoint_from_before_there_was_such_a_file_goes_on(tmp_path):
    argv = [*BASE, *CRITICAL, *EPS, "--max_steps", 60]
    assert child.run(argv, tmp_path / "whole")[0] == 0
    assert child.run(argv, tmp_path, "signal_at=30")[0] == 143
    path = tmp_path / "runs" / "r" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["files"]["full_gradients.csv"], content["args"]["full_grad_every"]
    torch.save(content, path)
    status, log = child.run([*argv, "--resume"], tmp_path)
    assert status == 0, log
    assert outcome(tmp_path / "runs" / "r") == outcome(tmp_path / "whole" / "runs" / "r")


def test_a_divergence_ends_the_run_with_the_rows_before_it(tmp_path):
    argv = [*BASE, *CRITICAL, "--full_grad_every", 0.01, "--lr", 1e38, "--optimizer", "sgd", "--eps", 0.1]
    status, log = child.run(argv, tmp_path)
    s = summary(tmp_path / "runs" / "r")
    assert status == 3 and s["status"] == "diverged" and s["results"]["steps_to_eps_full"] == {"0.1": None}, log
    last = s["results"]["last_above_eps_full"]["0.1"]
    assert [step for step, _ in rows(tmp_path / "runs" / "r")] == list(range(last + 1))


def test_after_a_divergence_nothing_is_measured(tmp_path, monkeypatch):
    """Step 11 diverges, and is only seen when step 14 is read, at which ∇f would be measured."""
    step = training.Training.eager_step

    def broken(run, x, y):
        out = step(run, x, y)
        out[1] = float("inf") if run.step == 10 else out[1]
        return out

    monkeypatch.setattr(training.Training, "eager_step", broken)
    monkeypatch.setattr(models, "build", lambda name, num_classes: Tiny(num_classes))
    argv = [*BASE, *LONG, "--eps", 0.01, "--device", "cpu", "--runs_dir", tmp_path]
    assert main.main(parse([*map(str, argv)])) == 3
    s = summary(tmp_path / "r")
    assert (s["steps"], s["results"]["diverged_at_step"]) == (10, 11)
    assert [step for step, _ in rows(tmp_path / "r")] == [0, 7]


def test_an_eps_that_only_the_running_mean_reached_is_not_reached(tmp_path):
    argv = [*BASE, *CRITICAL, "--full_grad_every", 10, "--eps", 1.5, "--max_steps", 60]
    assert child.run(argv, tmp_path)[0] == 0
    s = summary(tmp_path / "runs" / "r")
    assert s["results"]["steps_to_eps"]["1.5"] and s["results"]["steps_to_eps_full"] == {"1.5": None}
    assert (s["status"], s["steps"]) == ("not_reached", 60)


def test_the_flag_and_its_chunk_are_in_the_name_where_they_count():
    plain = parse(["--mode", "critical"])
    assert plain.name == parse(["--mode", "critical", "--full_grad_batchsize", "500"]).name
    full = parse(["--mode", "critical", "--full_grad_every", "1", "--full_grad_batchsize", "500"])
    assert full.name == plain.name.replace("-seed0", "-full_grad_every1-full_grad_batchsize500-seed0")
    assert parse(["--mode", "critical", "--full_grad_every", "0.5"]).name == plain.name.replace(
        "-seed0", "-full_grad_every0.5-seed0"
    )
    assert parse(["--full_grad_every", "0.5"]).name == parse([]).name
