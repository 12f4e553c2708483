"""A small convolutional network with BatchNorm for MNIST-1D's signals of 40 numbers."""

from torch import Tensor, nn


class ConvNet1d(nn.Module):
    """Three convolutions that halve the length, each with BatchNorm and ReLU, and a linear layer; ours."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers = []
        for width_in, kernel in ((1, 5), (32, 3), (32, 3)):
            conv = nn.Conv1d(width_in, 32, kernel, stride=2, padding=kernel // 2, bias=False)
            layers.append(nn.Sequential(conv, nn.BatchNorm1d(32), nn.ReLU()))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(32 * 5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 40) → logits (n, num_classes)."""
        return self.linear(self.layers(x.unsqueeze(1)).flatten(1))
