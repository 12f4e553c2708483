"""Two networks without BatchNorm for MNIST-1D's signals of 40 numbers."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """40-100-100-classes, ReLU, PyTorch's initialization: it fits MNIST-1D completely."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.linear1 = nn.Linear(40, 100)
        self.linear2 = nn.Linear(100, 100)
        self.linear3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 40) → logits (n, num_classes)."""
        return self.linear3(torch.relu(self.linear2(torch.relu(self.linear1(x)))))


class Softmax(nn.Module):
    """Softmax regression: convex, and too small to fit, so that ‖g_t‖ keeps the floor that the theory of b* has."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(40, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 40) → logits (n, num_classes)."""
        return self.linear(x)
