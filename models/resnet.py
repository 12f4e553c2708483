"""ResNet-18 and ResNet-20 for 32×32 images. He et al., Deep Residual Learning, arXiv 1512.03385."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: a 1×1 convolution ("projection") or padding ("identity")."""

    def __init__(self, width_in: int, width: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or width_in != width:
            if projection:
                conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
            else:
                self.shortcut = PadShortcut(width - width_in, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, h, w) → (n, width, h/stride, w/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """He et al.'s option A: every stride-th pixel, and zeros for the new channels; no parameters."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c + channels, h/stride, w/stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


class ResNet(nn.Module):
    """A 3×3 stem, stages of basic blocks, each after the first halving the map, mean over pixels, linear."""

    def __init__(self, num_classes: int, widths: tuple[int, ...], blocks: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, width_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(width_in, width, stride, projection))
                width_in = width
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) → logits (n, num_classes)."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.mean(x, dim=(2, 3)))


def ResNet18(num_classes: int) -> ResNet:
    """The paper's ResNet-18: widths 64 to 512, two blocks a stage, projections, no max-pool."""
    return ResNet(num_classes, (64, 128, 256, 512), blocks=2, projection=True)


def ResNet20(num_classes: int) -> ResNet:
    """He et al.'s CIFAR network of 0.27 M parameters, option A, in PyTorch's initialization; not the paper's."""
    return ResNet(num_classes, (16, 32, 64), blocks=3, projection=False)


def ResNet8(num_classes: int) -> ResNet:
    """ResNet20 with one block a stage: 0.08 M parameters, trained to the end on a CPU in minutes."""
    return ResNet(num_classes, (16, 32, 64), blocks=1, projection=False)
