"""measure/smoothing.py and sharpness.py against dense Hessians, quadratics, Rastrigin's function; and their errors."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from measure.draws import isotropic
from measure.gradients import Objective
from measure.quantities import columns
from measure.sharpness import (
    batch_sharpness,
    hessian_product,
    largest_eigenvalue,
    moved,
    quadratic,
    rises,
    sharpness,
    signs,
    values,
)
from measure.smoothing import Step, smoothing
from shb import NSHB, SGD, SHB


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def half_square(output, y):
    return (output.squeeze(1) - y).square().mean() / 2


def network(batchnorm, seed=0):
    """A small smooth network with frozen parameters and one that the loss is linear in, in float64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if batchnorm else []), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    model[0].bias.requires_grad_(False)
    return model


def some_batches(sizes, seed=0):
    g = generator(seed)
    return [(torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)) for n in sizes]


def dense_hessian(model, batches, training):
    """(d, d), by torch.autograd.functional of the loss written out over one flat vector."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = dict(model.named_parameters())
    sizes, shapes = [params[n].numel() for n in names], [params[n].shape for n in names]
    images = sum(len(y) for _, y in batches)
    model.train(training)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(flat):
        parts = {n: p.view(s) for n, p, s in zip(names, flat.split(sizes), shapes, strict=True)}
        whole = {**{n: p.detach() for n, p in params.items()}, **parts, **{n: b.clone() for n, b in buffers.items()}}
        return sum(F.cross_entropy(functional_call(model, whole, x), y, reduction="sum") for x, y in batches) / images

    flat = torch.cat([params[n].detach().reshape(-1) for n in names])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def vector(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double().numpy()


@pytest.mark.parametrize(("batchnorm", "training"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_hessian_products(batchnorm, training, seed):
    model, batches = network(batchnorm, seed), some_batches((5, 7, 4), seed)
    dense = dense_hessian(model, batches, training)
    f = Objective(model, training=training)
    vectors = signs(f.params, generator(seed))[:3]
    for v in vectors:
        np.testing.assert_allclose(vector(hessian_product(f, batches, v)), dense @ vector(v), rtol=1e-9, atol=1e-11)
    expected = [vector(v) @ dense @ vector(v) for v in vectors]
    np.testing.assert_allclose(quadratic(f, batches, vectors), expected, rtol=1e-9)
    start = [torch.randn(p.shape, generator=generator(seed), dtype=p.dtype) for p in f.params]
    assert largest_eigenvalue(f, batches, start) == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_batch_sharpness_is_the_ratio_of_the_means(training):
    model, batches = network(True), some_batches((6,) * 5, seed=3)
    f = Objective(model, training=training)
    found = batch_sharpness(f, batches)
    pairs = []
    for batch in batches:
        model.train(training)
        g = vector(f.gradient(batch))
        pairs.append((g @ dense_hessian(model, [batch], training) @ g, g @ g))
    curvature, square = np.array(pairs).T
    ratio = curvature.mean() / square.mean()
    assert found["batch_sharpness"] == pytest.approx(ratio, rel=1e-9)
    jackknife = np.array([np.delete(curvature, i).mean() / np.delete(square, i).mean() for i in range(5)])
    error = math.sqrt(4 / 5 * ((jackknife - jackknife.mean()) ** 2).sum())
    assert found["batch_sharpness_se"] == pytest.approx(error, rel=0.5)  # two estimators of one error, at n = 5
    with pytest.raises(ValueError, match=r"of one size, got 1 of \[6\]"):
        batch_sharpness(f, batches[:1])
    with pytest.raises(ValueError, match=r"of one size, got 2 of \[5, 6\]"):
        batch_sharpness(f, [batches[0], (batches[1][0][:5], batches[1][1][:5])])


def test_halves_and_curvature_along_vectors_against_dense_hessians():
    model, batches = network(True), some_batches((9, 6, 8), seed=4)
    halves, f = [batches[:1], batches[1:]], Objective(model)
    dense = [dense_hessian(model, half, True) for half in halves]
    along = {"direction": f.gradient(batches[2]), "gradient": f.gradient(batches[0])}
    found = sharpness(f, halves, some_batches((6, 6)), 0.1, 2, generator(), along)
    for i, hessian in enumerate(dense, 1):
        assert found[f"lambda_max_half{i}"] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=2e-3)
    for name in ("lambda_max", "hessian_trace"):
        assert found[name] == pytest.approx((found[f"{name}_half1"] + found[f"{name}_half2"]) / 2)
    for name, v in along.items():
        v = vector(v)
        assert found[f"{name}_curvature"] == pytest.approx(v @ (dense[0] + dense[1]) @ v / 2 / (v @ v), rel=1e-9)


def test_trace_and_its_error():
    """Unbiased, and its 95 % interval covers."""
    model, batches = network(False), some_batches((8,))
    trace = np.trace(dense_hessian(model, batches, True))
    f, found = Objective(model), []
    for seed in range(80):
        forms = quadratic(f, batches, signs(f.params, generator(seed)))
        found.append((forms.mean(), forms.std(ddof=1) / 4))
    means, errors = np.array(found).T
    assert abs(means.mean() - trace) < 4 * means.std() / math.sqrt(80)
    assert 0.9 <= np.mean(np.abs(means - trace) < 1.96 * errors) <= 0.99


class Rastrigin(nn.Module):
    """x² + 10 − 10 cos 2πx, whatever the input."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x], dtype=torch.float64))

    def forward(self, inputs):
        return (self.x.square() + 10 - 10 * torch.cos(2 * math.pi * self.x)).expand(len(inputs))


@pytest.mark.parametrize("x", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("delta", [0.05, 0.2, 0.5])
def test_rastrigin_smoothed_by_gaussian_noise(x, delta):
    """Closed form: E f(x + u) = x² + δ² + 10 − 10 exp(−2π²δ²) cos 2πx."""
    f, probe = Objective(Rastrigin(x), lambda output, y: output.mean()), [(torch.zeros(1, 1), torch.zeros(1))]
    closed = delta**2 + 10 * math.cos(2 * math.pi * x) * (1 - math.exp(-2 * math.pi**2 * delta**2))
    found = sharpness(f, [probe, probe], probe * 2, delta, 200, generator(2))
    assert abs(found["average_sharpness"] - closed) < 4 * found["average_sharpness_se"]
    assert x or math.isnan(found["batch_sharpness"])  # 0/0 at the minimum
    second = 2 + 40 * math.pi**2 * math.cos(2 * math.pi * x)
    assert found["lambda_max"] == pytest.approx(second, rel=1e-6)
    assert found["hessian_trace"] == pytest.approx(second, rel=1e-6) and found["hessian_trace_se"] < 1e-6


def regression(seed, d=5, n=40):
    """Linear regression in float64: its loss is a quadratic with the Hessian XᵀX/n. Model, x, y, Hessian."""
    g = generator(seed)
    torch.manual_seed(seed)
    model = nn.Linear(d, 1, bias=False).double()
    x, y = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    return model, x, y, (x.T @ x / n).numpy()


OPTIMIZERS = {"sgd": (SGD, 0.05, 0, 1), "shb": (SHB, 0.05, 0.9, 1), "nshb": (NSHB, 0.2, 0.8, 0.2)}  # η, β, w


def measured_step(name, seed, m=6):
    """Some steps into training: f, probe, optimizer, ∇f, draws, and as arrays H, x, ∇f, draws, memory; w, lr."""
    model, x, y, hessian = regression(seed)
    make, lr, beta, weight = OPTIMIZERS[name]
    optimizer = make(model.parameters(), lr, *([beta] if beta else []))
    rows = generator(seed + 10)
    for _ in range(3):
        index = torch.randperm(len(y), generator=rows)[:8]
        optimizer.zero_grad()
        half_square(model(x[index]), y[index]).backward()
        optimizer.step()
    optimizer.zero_grad()
    f, probe = Objective(model, half_square), [[(x[:7], y[:7]), (x[7:20], y[7:20])], [(x[20:], y[20:])]]
    params, full = f.params, f.full_gradient([(x, y)], len(y))
    draws = []
    for _ in range(m):
        index = torch.randperm(len(y), generator=rows)[:8]
        draws.append(f.gradient((x[index], y[index]))[0].reshape(-1))
    memory = beta * vector([optimizer.state[params[0]]["momentum_buffer"]]) if beta else np.zeros(5)
    known = hessian, vector(params), vector(full), torch.stack(draws).numpy(), memory, weight, lr
    return f, probe, optimizer, full, draws, known


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_smoothing_on_a_quadratic(name, seed):
    """Every number in closed form: f(a + v) − f(a) = ∇f(a)ᵀv + vᵀHv/2."""
    f, probe, optimizer, full, draws, known = measured_step(name, seed)
    hessian, x, nabla, gradients, memory, w, lr = known
    found = smoothing(f, probe, optimizer, full, draws, generator(seed))

    def rise(start, v):
        return (nabla + hessian @ (start - x)) @ v + v @ hessian @ v / 2

    y, mu = x - lr * nabla, memory - (1 - w) * nabla
    z, noise = y - lr * mu, [-lr * w * (g - nabla) for g in gradients]
    linear = np.array([(nabla + hessian @ (z - x)) @ v for v in noise])
    real = np.array([rise(z, v) for v in noise]) - linear
    pairs = lr * w * (gradients[0::2] - gradients[1::2]) / math.sqrt(2)
    curvatures = np.array([e @ hessian @ e / 2 for e in pairs])
    excess = np.mean([rise(y, -lr * (w * g + memory - nabla)) for g in gradients])
    expected = {
        "excess": excess - linear.mean(),
        "displacement": rise(y, -lr * mu),
        "excess_linear": linear.mean(),
        "excess_real": real.mean(),
        "excess_real_se": real.std(ddof=1) / math.sqrt(len(real)),
        "excess_predicted": curvatures.mean(),
        "excess_predicted_se": curvatures.std(ddof=1) / math.sqrt(len(pairs)),
        "fluctuation_norm": lr * w * math.sqrt(gradients.var(0, ddof=1).sum()),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-8, abs=1e-14)
    assert found["excess_real"] == pytest.approx((found["excess_real_half1"] + found["excess_real_half2"]) / 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_controls_have_the_covariance_of_the_noise_or_its_trace(name):
    f, _, optimizer, full, draws, (*_, gradients, _, w, lr) = measured_step(name, 2)
    step, g = Step(f.params, optimizer, full, draws), generator(5)
    sigma = w**2 * np.cov(gradients.T)
    for kind, covariance in {"gaussian": sigma, "isotropic": np.trace(sigma) / 5 * np.eye(5)}.items():
        points = np.array([vector(getattr(step, kind)(g)) for _ in range(4000)])
        np.testing.assert_allclose(points.T @ points / 4000, lr**2 * covariance, atol=0.1 * lr**2 * np.trace(sigma))


def test_estimates_are_unbiased_and_their_errors_cover():
    """Against η² tr(HΣ)/2 of all batches there are; over 80 sets of draws.

    The errors of the controls are of their vectors: their truth is that of the Σ that the draws at hand have.
    """
    model, x, y, _ = regression(4, d=4, n=60)
    x = x * torch.tensor([1.5, 1.0, 1.0, 0.5])  # so that the shape of the noise matters
    hessian = (x.T @ x / 60).numpy()
    optimizer, b = SGD(model.parameters(), lr=0.1), 12
    residuals = (model(x).squeeze(1) - y).detach()
    single = (residuals[:, None] * x).numpy()  # gradients of single images
    variance = np.cov(single.T) / b * (60 - b) / 60  # of a mean of b different images
    f, g, found = Objective(model, half_square), generator(7), []
    full = f.full_gradient([(x, y)], 60)

    def truth(sigma):
        return 0.01 * np.trace(hessian @ sigma) / 2, 0.01 * np.trace(hessian) * np.trace(sigma) / 8

    whole = truth(variance)
    for _ in range(80):
        draws = [torch.from_numpy(single[torch.randperm(60, generator=g)[:b]].mean(0)) for _ in range(48)]
        with f.unchanged():  # once, for the sake of time
            numbers = smoothing(f, [[(x[:30], y[:30])], [(x[30:], y[30:])]], optimizer, full, draws, g)
        own = truth(np.cov(torch.stack(draws).T))
        expected = {"real": whole[0], "predicted": whole[0], "predicted_isotropic": whole[1]}
        expected |= {"gaussian": own[0], "isotropic": own[1]}
        excess = {key: (numbers[f"excess_{key}"], numbers[f"excess_{key}_se"]) for key in expected}
        found.append({key: (excess[key][0] - expected[key], excess[key][1]) for key in expected})
    for key in found[0]:
        errors, standard = np.array([numbers[key] for numbers in found]).T
        assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(80), key
        assert 0.88 <= np.mean(np.abs(errors) < 1.96 * standard) <= 1 - (key == "real") / 80, key


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_control_variate_by_listing_all_batches(batchnorm, seed):
    """NSHB, eight images, all 56 batches of three: without BatchNorm the mean is that of f(z − ηφ) − f(z) exactly.

    With BatchNorm it lacks the linear effect of the bias, which is excess_linear.
    """
    model, (x, y) = network(batchnorm, seed), some_batches((8,), seed)[0]
    optimizer = NSHB(model.parameters(), 0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:4]), y[:4]).backward()
        optimizer.step()
    f, halves = Objective(model), [[(x[:4], y[:4])], [(x[4:], y[4:])]]
    full = f.full_gradient([(x, y)], 8)
    index = [list(i) for i in itertools.combinations(range(8), 3)]
    draws = [torch.cat([g.flatten() for g in f.gradient((x[i], y[i]))]) for i in index]
    found = smoothing(f, halves, optimizer, full, draws, generator())
    step = Step(f.params, optimizer, full, draws)
    with moved(f, step.drift), f.unchanged():
        brute = rises(f, halves, values(f, halves), map(step.real, range(56))).mean(1)
    assert found["excess_real"] + found["excess_linear"] == pytest.approx(brute.mean(), rel=1e-7)
    assert (abs(found["excess_linear"]) < 1e-12) != batchnorm
    if not batchnorm:
        assert found["excess_real"] == pytest.approx(brute.mean(), rel=1e-7)
        assert found["excess_real_se"] < brute.std() / math.sqrt(56) / 10


@pytest.mark.parametrize("m", [4, 5, 6, 35])
def test_controls_take_as_many_points_as_the_draws_in_pairs_and_passes_say_their_cost(m):
    f, probe, optimizer, full, draws, _ = measured_step("sgd", 0, max(m, 6))
    calls = []
    f.between = calls.append
    found = smoothing(f, probe, optimizer, full, draws[:m], generator())
    controls = min(m // 2, 16)
    values_ = 3 + m + 2 * 2 * controls
    for images in (7, 13, 20):  # the probe's batches
        assert calls.count(0.4 * images) == values_ and calls.count(3 * images) == controls + 16
        assert calls.count(images) == 1
    assert len(calls) == 3 * (values_ + controls + 16 + 1) and found["probe_images"] == 40
    assert all(found[f"excess_{kind}_se"] > 0 for kind in ("real", "gaussian", "isotropic"))


@pytest.mark.parametrize("scale", [0.0, math.nan])
def test_a_hessian_that_is_zero_or_not_finite_has_no_largest_eigenvalue(scale):
    """ARPACK refuses both, or has 0 for zeros; a run that measures goes on."""
    f = Objective(nn.Linear(4, 3).double(), lambda output, y: scale * output.square().mean())
    probe = [(torch.randn(5, 4, dtype=torch.float64), torch.zeros(5))]
    found = largest_eigenvalue(f, probe, isotropic(f.params, 1.0, generator()))
    assert math.isnan(found) or found == scale


def test_what_is_returned_is_what_is_declared_and_what_does_not_fit_is_refused():
    f, probe, optimizer, full, draws, _ = measured_step("sgd", 0)
    assert list(smoothing(f, probe, optimizer, full, draws, generator())) == columns("smoothing")
    along = {"direction": full, "gradient": [torch.zeros_like(g) for g in full]}
    batches = [(torch.randn(4, 5).double(), torch.zeros(4).double()) for _ in range(2)]
    found = sharpness(f, probe, batches, 0.1, 2, generator(), along)
    assert sorted(found) == sorted(["probe_images", *columns("sharpness")])
    assert math.isnan(found["gradient_curvature"])
    for bad, said in ((draws[:3], "4 draws or more, got 3"), ([d[:4] for d in draws], "entries as the parameters, 5")):
        with pytest.raises(ValueError, match=said):
            smoothing(f, probe, optimizer, full, bad, generator())
