"""MobileNetV2 as the paper runs it. Sandler et al., Inverted Residuals and Linear Bottlenecks, 1801.04381."""

from torch import Tensor, nn

STAGES = (  # expansion t, channels c, repeats n, stride s of the first (paper, section 2)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 1),
    (6, 320, 1, 1),
)


def _conv_bn(width_in: int, width: int, kernel: int, **options) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width, kernel, **options), nn.BatchNorm2d(width)]


class InvertedResidual(nn.Module):
    """1×1 expansion (also at t = 1), 3×3 depthwise, 1×1 linear; a shortcut where the shape stays."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int):
        super().__init__()
        wide = width_in * expansion
        self.residual = stride == 1 and width_in == width
        self.layers = nn.Sequential(
            *_conv_bn(width_in, wide, 1),
            nn.ReLU6(),
            *_conv_bn(wide, wide, 3, stride=stride, padding=1, groups=wide),
            nn.ReLU6(),
            *_conv_bn(wide, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, h, w) → (n, width, ⌈h/stride⌉, ⌈w/stride⌉)."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetv2(nn.Module):
    """Every convolution has a bias, and the 1×1 stem a padding of 1, so that its maps are 34×34 (paper)."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers, width_in = [*_conv_bn(3, 32, 1, padding=1), nn.ReLU6()], 32
        for expansion, width, repeats, stride in STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(width_in, width, stride if i == 0 else 1, expansion))
                width_in = width
        layers += [*_conv_bn(width_in, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(1280, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) → logits (n, num_classes)."""
        return self.layers(x).flatten(1)
