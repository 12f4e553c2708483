import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, make_data
from scipy import stats
from torch import nn

import models
from measure import noise
from measure.gradients import full_gradient
from shb import NSHB, QHM, SGD, SHB

OPTIMIZERS = {"sgd": SGD, "shb": SHB, "nshb": NSHB, "qhm": QHM}


def plain_net(seed, classes=10):
    """No BatchNorm: every image's gradient stands alone, so a slow twin can go image by image."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, classes))


def slow_full_gradient(model, data, step):
    """(1/N) Σ_i ∇ℓ_i, one image at a time, in float64."""
    model = copy.deepcopy(model).double()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in data.full_pass(step, 1):
        log_p = torch.log_softmax(model(x.double()), 1)
        for t, g in zip(total, torch.autograd.grad(-log_p[0, y[0]], list(model.parameters())), strict=True):
            t += g / data.size
    return total


@pytest.mark.parametrize(("n", "chunk"), [(60, 60), (60, 17), (61, 20), (40, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_full_gradient_weighs_every_image_the_same(n, chunk, seed):
    data, model = make_data(n, seed=seed), plain_net(seed)
    ours = full_gradient(model, data.full_pass(7, chunk), n)
    for a, b in zip(ours, slow_full_gradient(model, data, 7), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)


def test_a_short_pass_is_refused():
    data = make_data(60)
    with pytest.raises(ValueError, match="hold 60 images, not 61"):
        full_gradient(plain_net(0), data.full_pass(0, 20), 61)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_omega_is_the_direction_minus_the_full_gradient_at_the_same_point(name, seed):
    data, model = make_data(60, seed=seed), plain_net(seed)
    beta, lr = 0.7, 0.05
    optimizer = OPTIMIZERS[name](model.parameters(), lr, **({} if name == "sgd" else {"momentum": beta}))
    m = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(4):
        x, y = next(data.epoch(step, 8))
        twin = copy.deepcopy(model).double()
        g = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), list(twin.parameters()))
        weight = 1 - beta if name in ("nshb", "qhm") else 1
        m = [gi if name == "sgd" else beta * mi + weight * gi for mi, gi in zip(m, g, strict=True)]
        d = [(gi + mi) / 2 for gi, mi in zip(g, m, strict=True)] if name == "qhm" else m  # ν = 1/2
        if step == 3:
            break
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    numbers, omega = noise.measure(model, optimizer, (x, y), data.full_pass(3, 17), data.size)
    full = slow_full_gradient(model, data, 3)
    flat = lambda tensors: np.concatenate([t.detach().numpy().ravel() for t in tensors])  # noqa: E731
    d, g, full = flat(d), flat(g), flat(full)
    np.testing.assert_allclose(omega.numpy(), d - full, rtol=1e-3, atol=1e-6)
    expected = {
        "noise_norm": np.linalg.norm(d - full),
        "direction_norm": np.linalg.norm(d),
        "full_gradient_norm": np.linalg.norm(full),
        "gradient_norm": np.linalg.norm(g),
        "gradient_noise_norm": np.linalg.norm(g - full),
        "cosine": d @ full / np.linalg.norm(d) / np.linalg.norm(full),
        "delta": lr * np.linalg.norm(d - full),
    }
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-4), key
    assert (numbers["noise_norm"] == numbers["gradient_noise_norm"]) == (name == "sgd")


class Branches(nn.Module):
    """A frozen layer, one that the loss does not need, one that the optimizer is not given, and two that train."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(3072, 5), nn.Linear(5, 5)
        self.unused, self.foreign, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.foreign(self.frozen(torch.tanh(self.first(x.flatten(1))))))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("turned", [False, True])
def test_parameter_groups_are_matched_by_parameter(name, turned):
    """Two groups of different lr, in either order; what `step` would not move is left out."""
    torch.manual_seed(3)
    data, model = make_data(60), Branches()
    trained = [*model.first.parameters(), *model.last.parameters()]
    groups = [
        {"params": [*model.first.parameters(), *model.frozen.parameters()], "lr": 0.05},
        {"params": [*model.last.parameters(), *model.unused.parameters()], "lr": 0.4},
    ]
    rates = [0.05, 0.05, 0.4, 0.4]
    beta = {} if name == "sgd" else {"momentum": 0.7}
    optimizer = OPTIMIZERS[name](groups[::-1] if turned else groups, 0.1, **beta)
    for step in range(3):
        x, y = next(data.epoch(step, 8))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = next(data.epoch(3, 8))
    numbers, omega = noise.measure(model, optimizer, (x, y), data.full_pass(3, 17), data.size)
    twin = copy.deepcopy(model).double()
    full = [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    for images, labels in data.full_pass(3, 60):
        loss = F.cross_entropy(twin(images.double()), labels)
        full = torch.autograd.grad(loss, [*twin.first.parameters(), *twin.last.parameters()])
    before = [p.detach().clone() for p in trained]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # d from what the step does, and not from the rule
    d = [(b - p.detach()).double() / lr for b, p, lr in zip(before, trained, rates, strict=True)]
    expected = [di - fi for di, fi in zip(d, full, strict=True)]
    flat = torch.cat([e.flatten() for e in expected])
    assert omega.shape == flat.shape
    torch.testing.assert_close(omega.double(), flat, rtol=1e-2, atol=1e-4)
    assert numbers["noise_norm"] == pytest.approx(flat.norm().item(), rel=1e-3)
    weighted = torch.cat([lr * e.flatten() for e, lr in zip(expected, rates, strict=True)])
    assert numbers["delta"] == pytest.approx(weighted.norm().item(), rel=1e-3)
    d, full = (torch.cat([t.flatten() for t in part]) for part in (d, full))
    assert numbers["cosine"] == pytest.approx(torch.cosine_similarity(d, full, dim=0).item(), abs=1e-3)


def snapshot(model, optimizer):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return state, grads, torch.get_rng_state(), np.random.get_state()[1].copy(), model.training


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(fails, held, training):
    torch.manual_seed(0)
    data = make_data(60)
    model = nn.Sequential(Tiny(20), nn.Dropout(0.5), nn.Linear(20, 10)).train(training)
    optimizer = OPTIMIZERS["shb"](model.parameters(), 0.1)
    x, y = next(data.epoch(0, 8))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    if not held:
        optimizer.zero_grad()
    before = snapshot(model, optimizer)
    calls = []

    def between():
        calls.append(1)
        if fails and len(calls) == 3:
            raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            noise.measure(model, optimizer, (x, y), data.full_pass(0, 17), data.size, between)
    else:
        noise.measure(model, optimizer, (x, y), data.full_pass(0, 17), data.size, between)
    assert len(calls) == (3 if fails else 4) and same(before, snapshot(model, optimizer))


def test_batchnorm_s_statistics_are_a_batch_s_own_and_stay_out_of_it():
    """In training mode, running statistics have no say: garbage in them changes no gradient."""
    data = make_data(60)
    torch.manual_seed(0)
    model = Tiny(10)
    a = full_gradient(model, data.full_pass(0, 20), 60)
    model.bn.running_mean.fill_(1e3)
    b = full_gradient(model, data.full_pass(0, 20), 60)
    assert all(map(torch.equal, a, b)) and (model.bn.running_mean == 1e3).all()


def test_in_one_chunk_sgd_has_no_noise_and_shb_has_its_momentum_alone():
    data, model = make_data(90, augmented=False), models.build("ResNet20", 10)
    sgd = OPTIMIZERS["sgd"](model.parameters(), 0.1)
    batch = next(data.epoch(0, 90))
    numbers, _ = noise.measure(model, sgd, batch, data.full_pass(0, 90), 90)
    assert numbers["noise_norm"] < 1e-3 * numbers["full_gradient_norm"] and numbers["cosine"] > 1 - 1e-6
    shb = OPTIMIZERS["shb"](model.parameters(), 0.1, momentum=0.9)
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    shb.step()
    momentum = torch.cat([0.9 * shb.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    _, omega = noise.measure(model, shb, next(data.epoch(1, 90)), data.full_pass(1, 90), 90)
    assert (omega - momentum).norm() < 1e-3 * momentum.norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_statistics_equal_scipy_s(seed):
    rng = np.random.default_rng(seed)
    omega = (rng.gamma(2, 1, 10_001) * 1e-3).astype(np.float32)
    ours = noise.statistics(omega)
    x = omega.astype(np.float64)
    assert ours["skewness"] == pytest.approx(stats.skew(x)) and ours["excess_kurtosis"] == pytest.approx(
        stats.kurtosis(x)
    )
    assert (ours["mean"], ours["std"]) == pytest.approx((x.mean(), x.std()))
    assert (ours["min"], ours["max"], ours["entries"]) == (x.min(), x.max(), 10_001)


def test_statistics_of_a_constant():
    ours = noise.statistics(np.zeros(5, np.float32))
    assert ours["std"] == 0 and np.isnan(ours["skewness"]) and np.isnan(ours["excess_kurtosis"])
