"""measure/gradients.py against slow twins in float64; and that nothing in measure/ changes what it measures."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from measure.draws import augmentation, draw
from measure.gradients import Objective, gradient_norm
from measure.injected import smaller_batch_noise, variance
from measure.noise import batch_noise, budget
from measure.optimizers import ExactMemory
from measure.sharpness import hessian_product, moved, sharpness
from measure.smoothing import smoothing
from shb import SHB


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator)


def chunks(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def plain_net(seed):
    """No BatchNorm: every image's gradient stands alone, so a slow twin can go image by image."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 10))


@pytest.mark.parametrize(("n", "chunk"), [(60, 60), (61, 20), (40, 1)])
def test_full_gradient_weighs_every_image_the_same(n, chunk):
    """(1/N) Σ_i ∇ℓ_i, one image at a time, in float64."""
    (x, y), model = images(n), plain_net(n)
    twin = copy.deepcopy(model).double()
    expected = [torch.zeros_like(p) for p in twin.parameters()]
    for image, label in chunks(x, y, 1):
        log_p = torch.log_softmax(twin(image.double()), 1)
        for t, g in zip(expected, torch.autograd.grad(-log_p[0, label[0]], list(twin.parameters())), strict=True):
            t += g / n
    found = Objective(model).full_gradient(chunks(x, y, chunk), n)
    torch.testing.assert_close([g.double() for g in found], expected, rtol=1e-4, atol=1e-7)


def test_of_sequences_f_and_its_gradient_are_means_over_the_tokens():
    model, x, y = nn.Conv1d(3, 10, 1).double(), torch.randn(12, 3, 5).double(), torch.randint(10, (12, 5))
    loss, f = F.cross_entropy(model(x), y), Objective(model)
    assert f.value(chunks(x, y, 5)) == pytest.approx(loss.item())
    found, expected = f.full_gradient(chunks(x, y, 5), 12), torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, list(expected))


def test_what_a_loss_does_not_need_has_gradient_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "other": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model.forward = lambda x: model["frozen"](model["used"](x))
    objective, batch = Objective(model), (torch.randn(5, 3), torch.randint(2, (5,)))
    assert list(objective.gradient_by_parameter(batch)) == list(model["used"].parameters())
    gradient, full = objective.gradient(batch), objective.full_gradient([batch], 5)
    assert len(gradient) == 4 and not gradient[2].any() and not gradient[3].any()
    torch.testing.assert_close(gradient, full)
    weight = model["used"].weight
    assert torch.equal(Objective(model, params=[weight]).gradient(batch)[0], gradient[0])


def test_the_loss_is_averaged_over_images_in_float64():
    (x, y), model = images(50), plain_net(0)
    exact = F.cross_entropy(model(x).double(), y).item()
    assert Objective(model).value([(x, y)]) == pytest.approx(exact, rel=1e-14)
    assert Objective(model).value(chunks(x, y, 30)) == pytest.approx(exact, rel=1e-6)


def test_random_numbers_go_on_within_a_measurement_and_are_put_back_after_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    objective, batch = Objective(model), (torch.randn(5, 8), torch.randint(3, (5,)))
    norm = lambda: gradient_norm(objective.gradient(batch)).item()  # noqa: E731
    assert norm() == norm()
    with objective.unchanged():
        assert norm() != norm()
    assert norm() == norm()


def test_gradient_norm_is_exact_to_1e_7():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((64, 64, 3, 3), (512, 300), (100,), ())]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-7)


# --- models that people bring ---


def test_what_cannot_be_right_is_refused():
    (x, y), net = images(6), plain_net(0)
    with pytest.raises(ValueError, match="hold 6 images, not 7"):
        Objective(net).full_gradient([(x, y)], 7)
    with pytest.raises(ValueError, match=r"one number; got shape \(6, 10\)"):
        Objective(net, lambda output, y: output).gradient((x, y))
    with pytest.raises(ValueError, match=r"float32 or float64.*got torch\.bfloat16"):
        Objective(nn.Linear(3, 2).bfloat16())
    with pytest.raises(ValueError, match="plain mean over the batch, got Cross"):
        Objective(nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="dense: make the embedding with sparse=False"):
        Objective(nn.Embedding(5, 2, sparse=True)).gradient((torch.arange(5), torch.zeros(5, dtype=torch.int64)))
    for batch in ({"x": torch.ones(2, 3), "y": torch.zeros(2)}, (torch.ones(2, 3), torch.zeros(2), 1)):
        with pytest.raises(ValueError, match=r"pair \(inputs, targets\), got"):
            Objective(nn.Linear(3, 2)).gradient(batch)
    with pytest.raises(ValueError, match="got none"):
        Objective(nn.Linear(3, 2).requires_grad_(False))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_can_be_had_where_they_are_switched_off(off):
    (x, y), objective = images(6), Objective(plain_net(0))
    expected = objective.gradient((x, y)), objective.full_gradient([(x, y)], 6)
    with off():
        found = objective.gradient((x, y)), objective.full_gradient([(x, y)], 6)
        assert not torch.is_grad_enabled()
    assert equal(found, expected)


def test_a_compiled_model_is_measured_by_the_module_it_is_made_of():
    (x, y), model = images(6), plain_net(0)
    plain, compiled = Objective(model), Objective(torch.compile(model, backend="aot_eager"))
    assert equal(compiled.gradient((x, y)), plain.gradient((x, y)))
    assert equal(*(hessian_product(f, [(x, y)], list(model.parameters())) for f in (compiled, plain)))


@pytest.mark.parametrize("training", [True, False])
def test_attention_has_its_second_derivatives(training):
    """torch's fused kernels have none; against finite differences of the gradient, in float64."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3, dtype=torch.float64))
    f, batch = Objective(model, training=training), (torch.randn(6, 5, 8).double(), torch.randint(3, (6,)))
    v, points = [torch.randn_like(p) for p in f.params], []
    for sign in (1, -1):
        with moved(f, [1e-5 * sign * each for each in v]):
            points.append(f.gradient(batch))
    for product, a, b in zip(hessian_product(f, [batch], v), *points, strict=True):
        torch.testing.assert_close(product, (a - b) / 2e-5, rtol=1e-4, atol=1e-7)


# --- BatchNorm ---


def bumpy():
    """Everything that measuring could disturb: BatchNorm, dropout, a frozen BatchNorm in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model.append(nn.Linear(8, 3))
    model[4].eval().requires_grad_(False)
    return model


def test_modes_of_batchnorm():
    """Evaluation mode uses running statistics, training mode a batch's own, None each module's own flag."""
    model = bumpy()
    model[2].p = 0.0
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    for buffer in (model[1].running_mean, model[4].running_mean):
        buffer.fill_(0.7)
    found = {}
    for training in (True, False, None):
        twin = copy.deepcopy(model)
        if training is not None:
            twin.train(training)
        params = [p for p in twin.parameters() if p.requires_grad]
        expected = torch.autograd.grad(F.cross_entropy(twin(x), y), params)
        objective = Objective(model, training=training)
        found[training] = objective.full_gradient([(x, y)], 40)
        for a, b, c in zip(found[training], expected, objective.gradient((x, y)), strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a, c)
        assert objective.value([(x, y)]) == pytest.approx(F.cross_entropy(twin(x), y).item(), rel=1e-6)
    assert not torch.allclose(found[True][0], found[None][0]) and not torch.allclose(found[False][0], found[None][0])


# --- measuring changes nothing ---


def state(model, optimizer):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    randoms = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    return kept, grads, randoms, [module.training for module in model.modules()], len(optimizer.state)


def equal(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def everything(model, optimizer, x, y, training, between):
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    generator, kept = torch.Generator().manual_seed(0), []
    objective = Objective(model, training=training, between=between)
    full = objective.full_gradient(chunks(x, y, 16), 40)
    numbers, _ = batch_noise(objective, optimizer, (x[:8], y[:8]), full)
    noisy = {"injected": lambda i: smaller_batch_noise(objective, draw(loader, 2, generator), 0.5)}
    numbers |= budget(objective, optimizer, full, draw(loader, 4, generator), 40, keep=kept.append, **noisy)
    pairs = zip(draw(loader, 2, generator), draw(loader, 2, generator), strict=True)
    numbers |= augmentation(objective, pairs)
    halves = [chunks(x[:20], y[:20], 15), chunks(x[20:], y[20:], 15)]
    numbers |= smoothing(objective, halves, optimizer, full, kept, generator)
    numbers |= sharpness(objective, halves, draw(loader, 2, generator), 0.1, 2, generator, {"gradient": full})
    numbers["of_batches"] = variance(objective, draw(loader, 2, generator))
    memory = ExactMemory(objective, optimizer)
    memory.add(full)
    return numbers | memory.split(full)


@pytest.mark.parametrize("make", [SHB, torch.optim.SGD])
@pytest.mark.parametrize("fails", [None, 2, 6, 10, 14, 40, 80, 160])
@pytest.mark.parametrize("training", [True, False, None])
def test_measuring_changes_nothing(make, fails, training):
    """Weights, buffers, .grad, optimizer, flags and random state; also where it is broken off."""
    model = bumpy()
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
    for batch in chunks(x, y, 8):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    if training is None:
        optimizer.zero_grad()
    before, calls = state(model, optimizer), []

    def between(cost):
        random.random()
        np.random.random()
        calls.append(cost)
        if len(calls) == fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            everything(model, optimizer, x, y, training, between)
    else:
        once = everything(model, optimizer, x, y, training, between)
        assert once == everything(model, optimizer, x, y, training, between)
        assert len(calls) > 320 and all(np.isfinite(value) for value in once.values())
    assert equal(before, state(model, optimizer))
