"""--inject: u_t in training and in the numbers of ω_t; its covariance by enumeration."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rows, start, summary
from torch import nn

from arguments import OPTIMIZERS
from measure.gradients import Objective
from measure.injected import isotropic_twin, scale, scale_of_variances, smaller_batch_noise, variance

FLAGS = ("--batchsize", 500, "--inject_batchsize", 20)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def test_g_plus_u_has_the_mean_of_g_and_the_whole_covariance_of_the_smaller_batch():
    """Regression on seven points in float64: all 35 batches of four, and all 21 × 21 pairs of batches of two."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 3, generator=rng).double(), torch.randn(7, generator=rng).double()
    objective = Objective(nn.Linear(3, 1).double(), lambda output, y: (output.squeeze(1) - y).square().mean())

    def batches(b):
        return [(x[list(i)], y[list(i)]) for i in itertools.combinations(range(7), b)]

    def gradients(b):
        return np.array([flat(objective.gradient(batch)).numpy() for batch in batches(b)])

    c = scale(7, 4, 2)
    u = [flat(smaller_batch_noise(objective, pair, c)).numpy() for pair in itertools.product(batches(2), repeat=2)]
    both = np.array([g + each for g in gradients(4) for each in u])
    small = gradients(2)
    np.testing.assert_allclose(both.mean(0), small.mean(0), atol=1e-12)
    np.testing.assert_allclose(np.cov(both.T, ddof=0), np.cov(small.T, ddof=0), atol=1e-12)
    of = [np.trace(np.cov(gradients(b).T, ddof=0)) for b in (4, 2)]
    assert scale_of_variances(*of) == pytest.approx(c)
    assert scale_of_variances(2.0, 1.0) == scale_of_variances(0.0, 0.0) == 0.0
    listed = [variance(objective, pair) for pair in itertools.product(batches(2), repeat=2)]
    assert np.mean(listed) == pytest.approx(of[1])
    for b, smaller in ((4, 4), (8, 2), (4, 0)):
        with pytest.raises(ValueError, match="to imitate"):
            scale(7, b, smaller)


def slow_u(run, step, c, kind, weights, draw=0):
    """u by the definition, in float64: two batches from the stream of the step, and the twin's direction."""
    pair = run.data.independent(step, 20, draw)
    first, second = (
        torch.autograd.grad(F.cross_entropy(weights(x.double()), y), list(weights.parameters())) for x, y in pair
    )
    u = [c * (g - h) for g, h in zip(first, second, strict=True)]
    if kind == "isotropic":
        generator = run.data.generator(7, step, draw)
        v = [torch.randn(t.shape, generator=generator).double() for t in u]
        u = [each * flat(u).norm() / flat(v).norm() for each in v]
    return u


@pytest.mark.parametrize("kind", ["covariance", "isotropic"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_textbook_loop_with_g_plus_u(mnist1d_dir, optimizer, kind):
    """In float64; the momentum buffers take g + u in, and ‖g‖ is that of g + u."""
    flags = ["--optimizer", optimizer, "--seed", 3, *FLAGS, "--inject", kind]
    flags += [] if optimizer == "sgd" else ["--beta1", 0.8]
    flags += ["--nu", 0.3] if optimizer == "qhm" else []
    run = start(mnist1d_dir, *flags)
    twin, norms = copy.deepcopy(run.model).double(), []
    moved, c = list(twin.parameters()), (0.5 * (1 - 20 * 3500 / (500 * 3980))) ** 0.5
    m = [torch.zeros_like(p) for p in moved]
    for t in range(10):
        x, y = list(run.data.epoch(t // 8, 500))[t % 8]
        g = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), moved)
        g = [a + b for a, b in zip(g, slow_u(run, t, c, kind, twin), strict=True)]
        norms.append(flat(g).norm().item())
        for i, p in enumerate(moved):
            weight = {"sgd": 1, "shb": 1}.get(optimizer, 0.2)
            m[i] = (0 if optimizer == "sgd" else 0.8) * m[i] + weight * g[i]
            p.data -= 0.05 * (0.7 * g[i] + 0.3 * m[i] if optimizer == "qhm" else m[i])
    windows = list(run.windows(10))
    np.testing.assert_allclose(np.concatenate([w.norms for w in windows]), norms, rtol=1e-4)
    for p, q in zip(run.model.parameters(), moved, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)
    found = [run.optimizer.state[p]["momentum_buffer"] for p in run.model.parameters() if p in run.optimizer.state]
    for buffer, expected in zip(found, m if optimizer != "sgd" else [], strict=True):
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-3, atol=1e-5)


def test_omega_holds_the_u_that_the_step_adds_and_the_twin_is_as_long(train):
    argv = ("--optimizer", "nshb", "--mode", "sampling", "--steps", 0, *FLAGS[:2])
    u = {}
    for kind in ("covariance", "isotropic"):
        _, noisy = train(*argv, *FLAGS[2:], "--inject", kind, "--name", kind)
        u[kind] = np.load(noisy / "omega.npy")
        (row,) = rows(noisy, "measurements")
    _, still = train(*argv, "--name", "still")
    lengths = [np.linalg.norm(omega - np.load(still / "omega.npy")) for omega in u.values()]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    assert lengths[0] == pytest.approx(0.1 * float(row["injected"]) ** 0.5, rel=1e-4)
    v = [torch.randn(3, 4), torch.randn(5)]
    twin = isotropic_twin(v, torch.Generator().manual_seed(0))
    assert flat(twin).norm().item() == pytest.approx(flat(v).norm().item(), rel=1e-6)
    assert abs(torch.nn.functional.cosine_similarity(flat(twin), flat(v), dim=0)) < 0.9


@pytest.mark.parametrize("model", ["MLP", "ConvNet1d"])
@pytest.mark.parametrize("kind", ["covariance", "isotropic"])
def test_the_variance_of_g_plus_u_is_that_of_the_smaller_batch(train, model, kind):
    """On MNIST-1D, by 96 draws at step 9; with BatchNorm c comes from measured variances. V_b is of g alone."""
    argv = ("--mode", "sampling", "--model", model, "--optimizer", "sgd", "--steps", 9, "--draws", 96, *FLAGS)
    _, directory = train(*argv, "--draw_batchsizes", 20, "--inject", kind)
    small, large = (
        {k: float(v or "nan") for k, v in row.items() if k not in ("batchnorm", "layer")}
        for row in rows(directory, "measurements")
    )
    error = np.hypot(small["variance_se"], 2 * small["variance"] / (96 if model == "MLP" else 16) ** 0.5 / 2)
    assert abs(large["fresh"] - small["variance"]) < 4 * error
    assert large["variance"] < 0.2 * small["variance"]
    assert large["injected"] + large["variance"] == pytest.approx(large["fresh"], rel=0.1)
    assert large["noise_square"] == pytest.approx(large["fresh"] + large["memory"], rel=0.1)


@pytest.mark.parametrize("model", ["MLP", "ConvNet1d"])
def test_a_run_taken_up_again_is_the_same_to_the_bit(train, model):
    argv = ("--model", model, "--optimizer", "shb", *FLAGS, "--inject", "covariance", "--epochs", 2)
    _, whole = train(*argv, "--name", "whole")
    train(*argv, "--name", "parts", "--max_steps", 5)
    _, parts = train(*argv, "--name", "parts", "--resume")
    checkpoints = [torch.load(directory / "checkpoint.pt")["model"] for directory in (whole, parts)]
    assert all(torch.equal(a, b) for a, b in zip(*(c.values() for c in checkpoints), strict=True))
    assert (whole / "gradient_norms.f32").read_bytes() == (parts / "gradient_norms.f32").read_bytes()
    assert summary(whole)["results"] == summary(parts)["results"]
