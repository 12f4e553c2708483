"""A linear regression whose batches can all be listed, for the tests of measure/."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from measure.gradients import Objective

N, B = 6, 2
TORCH = [{}, {"momentum": 0.6}, {"momentum": 0.6, "dampening": 0.3}, {"momentum": 0.6, "nesterov": True}]


def squared_error(output, y):
    return F.mse_loss(output.squeeze(1), y)


def regression(seed=0):
    """A linear regression on six points, in float64, whose 15 batches of two can all be listed."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(N, generator=rng, dtype=torch.float64)
    torch.manual_seed(seed)
    return Objective(nn.Linear(3, 1).double(), squared_error), x, y


def every_batch(x, y):
    return [(x[list(index)], y[list(index)]) for index in itertools.combinations(range(N), B)]


def flat_gradient(model, x, y):
    """By hand: 2 (wᵀx + c − y) (x, 1), averaged over the batch."""
    error = x @ model.weight.detach()[0] + model.bias.detach()[0] - y
    rows = 2 * error[:, None] * torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return rows.mean(0).numpy()


def warmed_up(optimizer, objective, batches, steps=3):
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        objective.loss(objective.model(x), y).backward()
        optimizer.step()
    return optimizer
