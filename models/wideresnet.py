"""WideResNet-28-10 for 32×32 images. Zagoruyko and Komodakis, Wide Residual Networks, arXiv 1605.07146."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3×3 convolution, twice; where the width changes, a 1×1 shortcut from the activated input."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, h, w) → (n, width, h/stride, w/stride)."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideResNet(nn.Module):
    """28 layers deep, widths 16, 160, 320, 640, four blocks a stage, no dropout (paper, section 2)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        layers, width_in = [], 16
        for width, stride in ((160, 1), (320, 2), (640, 2)):
            for block in range(4):
                layers.append(PreActivationBlock(width_in, width, stride if block == 0 else 1))
                width_in = width
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width_in)
        self.linear = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) → logits (n, num_classes)."""
        x = F.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))
