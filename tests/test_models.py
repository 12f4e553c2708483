from itertools import pairwise

import pytest
import torch
from torch import nn

import models
from datasets import DATASETS


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("ResNet18", 100, 11_220_132),
        ("WideResNet-28-10", 100, 36_536_884),
        ("MobileNetv2", 100, 2_369_380),
        ("ResNet20", 10, 269_722),  # He et al., table 6: 0.27 M
        ("ResNet8", 10, 75_290),  # a stage of one block
        ("MLP", 10, 15_210),  # 40·100 + 100, 100·100 + 100, 100·10 + 10
        ("Softmax", 10, 410),
        ("ConvNet1d", 10, 8_106),
    ],
)
def test_parameters_and_shapes(name, classes, count):
    model = models.build(name, classes)
    assert sum(p.numel() for p in model.parameters()) == count
    has_batchnorm = any(hasattr(module, "running_mean") for module in model.modules())
    assert has_batchnorm == (name not in models.WITHOUT_BATCHNORM)
    inputs = (3, 32, 32) if models.takes(name, (32, 32, 3)) else (40,)
    assert model(torch.randn(2, *inputs)).shape == (2, classes)


def test_each_data_set_has_networks_and_each_network_data_sets():
    taking = {name: [n for n in models.NETWORKS if models.takes(n, spec.shape)] for name, spec in DATASETS.items()}
    assert taking["mnist1d"] == ["MLP", "Softmax", "ConvNet1d"]
    images = ["ResNet18", "WideResNet-28-10", "MobileNetv2", "ResNet20", "ResNet8"]
    assert taking["CIFAR100"] == taking["digits"] == images
    assert not models.takes("MLP", (41,)) and not models.takes("ResNet20", (28, 28, 1))
    with pytest.raises(ValueError, match=r"ResNet19.*ResNet18"):
        models.build("ResNet19", 10)


@pytest.mark.parametrize(("name", "sizes"), [("MLP", (40, 100, 100, 10)), ("Softmax", (40, 10))])
def test_mlp_and_softmax_are_linear_layers_as_pytorch_initializes_them(name, sizes):
    torch.manual_seed(3)
    model = models.build(name, 10)
    torch.manual_seed(3)
    first, *rest = [nn.Linear(*pair) for pair in pairwise(sizes)]
    layers = nn.Sequential(first, *(nn.Sequential(nn.ReLU(), layer) for layer in rest))
    x = torch.randn(5, 40)
    assert torch.equal(model(x), layers(x))


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
