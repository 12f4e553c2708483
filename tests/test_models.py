import pytest
import torch
from torch import nn

import models


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("ResNet18", 100, 11_220_132),
        ("WideResNet-28-10", 100, 36_536_884),
        ("MobileNetv2", 100, 2_369_380),
        ("ResNet20", 10, 269_722),  # He et al., table 6: 0.27 M
        ("ResNet20", 100, 275_572),
    ],
)
def test_parameters_and_shapes(name, classes, count):
    model = models.build(name, classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def maps(model, x):
    """The shape of what each convolution gives, in order."""
    shapes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    model(x)
    return shapes


def test_mobilenet_is_the_paper_s():
    model = models.build("MobileNetv2", 100)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(c.bias is not None for c in convs)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert len(convs) == 1 + 3 * 17 + 2  # the expansion is there also at t = 1
    shapes = maps(model, torch.randn(2, 3, 32, 32))
    assert shapes[0] == (32, 34, 34) and shapes[1] == (32, 34, 34) and shapes[-2] == (1280, 5, 5)


def test_wideresnet_is_the_paper_s():
    model = models.build("WideResNet-28-10", 100)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(c.bias is None for c in convs) and not any(isinstance(m, nn.Dropout) for m in model.modules())
    ones = [c for c in convs if c.kernel_size == (1, 1)]
    assert [c.in_channels for c in ones] == [16, 160, 320] and len(convs) - len(ones) == 25
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 25  # none in a shortcut
    assert not model.linear.bias.any()
    conv = convs[5]  # 160 → 160: Kaiming fan_out has a standard deviation of sqrt(2 / (9 · 160))
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 160)) ** 0.5, rel=0.02)
    block = model.layers[0]
    seen = []
    block.shortcut.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    x = torch.randn(2, 16, 8, 8)
    block(x)
    assert torch.equal(seen[0], torch.relu(block.bn1(x)))  # from the activated input


def test_resnet18_is_the_paper_s():
    model = models.build("ResNet18", 100)
    shapes = maps(model, torch.randn(2, 3, 32, 32))
    assert shapes[0] == (64, 32, 32) and shapes[-1] == (512, 4, 4) and len(shapes) == 20
    projections = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m) == 2]
    assert sum(isinstance(m[0], nn.Conv2d) and m[0].kernel_size == (1, 1) for m in projections) == 3
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())


def test_resnet20_shortcuts_have_no_parameters():
    block = models.build("ResNet20", 10).layers[3]
    x = torch.randn(1, 16, 8, 8)
    out = block.shortcut(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2]) and not out[:, 16:].any() and out.shape == (1, 32, 4, 4)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in models.build("ResNet20", 10).parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_unknown_network():
    with pytest.raises(ValueError, match=r"ResNet19.*ResNet18"):
        models.build("ResNet19", 10)
