"""--injected_noise: u_t in training and in the numbers of ω_t."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rows, start

from arguments import OPTIMIZERS

R = 0.5


def slow_u(shapes, norm, *key):
    """u by the definition: one normal vector of variance R²/d, cut into the shapes in their order."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
    d = sum(int(np.prod(shape)) for shape in shapes)
    return [torch.randn(shape, generator=generator).double() * norm / d**0.5 for shape in shapes]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_textbook_loop_with_noise(mnist1d_dir, optimizer):
    """In float64; the momentum buffers see no noise."""
    flags = ["--optimizer", optimizer, "--batchsize", 1500, "--seed", 3]
    flags += [] if optimizer == "sgd" else ["--beta1", 0.8]
    flags += ["--nu", 0.3] if optimizer == "qhm" else []
    run = start(mnist1d_dir, *flags, "--injected_noise", R)
    twin = copy.deepcopy(run.model).double()
    moved = list(twin.parameters())
    m = [torch.zeros_like(p) for p in moved]
    for t in range(7):
        x, y = list(run.data.epoch(t // 3, 1500))[t % 3]
        g = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), moved)
        u = slow_u([p.shape for p in moved], R, 3, 7, t)
        for i, p in enumerate(moved):
            weight = {"sgd": 1, "shb": 1}.get(optimizer, 0.2)
            m[i] = (0 if optimizer == "sgd" else 0.8) * m[i] + weight * g[i]
            d = 0.7 * g[i] + 0.3 * m[i] if optimizer == "qhm" else m[i]
            p.data -= 0.05 * (d + u[i])
    list(run.windows(7))
    for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)
    found = [run.optimizer.state[p]["momentum_buffer"] for p in run.model.parameters() if p in run.optimizer.state]
    for buffer, expected in zip(found, m if optimizer != "sgd" else [], strict=True):
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-3, atol=1e-6)


def test_omega_holds_the_u_that_the_step_adds(train):
    argv = ("--optimizer", "sgd", "--mode", "sampling", "--steps", 4, "--batchsize", 1500)
    _, plain = train(*argv, "--name", "plain", "--max_steps", 4)
    _, noisy = train(*argv, "--injected_noise", R, "--steps", 0, "--name", "noisy")
    _, still = train(*argv, "--steps", 0, "--name", "still")
    u = np.load(noisy / "omega.npy") - np.load(still / "omega.npy")
    expected = torch.cat(
        [each.flatten() for each in slow_u([(100, 40), (100,), (100, 100), (100,), (10, 100), (10,)], R, 0, 7, 0)]
    )
    np.testing.assert_allclose(u, expected.numpy(), atol=1e-7)
    (row,) = rows(noisy, "measurements")
    assert float(row["injected"]) == R**2 and plain != noisy


def test_the_parts_of_the_budget_add_up(train):
    _, directory = train("--mode", "sampling", "--steps", 6, "--draws", 40, "--injected_noise", R, "--batchsize", 1500)
    (row,) = rows(directory, "measurements")
    parts = sum(float(row[name]) for name in ("fresh", "memory", "injected"))
    assert float(row["noise_square"]) == pytest.approx(parts, rel=0.05)
    assert float(row["injected"]) > 0.05 * parts  # or else this test could not tell
