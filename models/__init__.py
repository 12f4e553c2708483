"""The networks of the paper (section 2) and our small ones, by name. No torch until one is built."""

from importlib import import_module

IMAGE, SIGNAL = (32, 32, 3), (40,)  # the shape of one input, as datasets.Spec has it

# The module of this folder, the function or class in it that takes the number of classes, and what the network takes.
NETWORKS = {
    "ResNet18": ("resnet", "ResNet18", IMAGE),
    "WideResNet-28-10": ("wideresnet", "WideResNet", IMAGE),
    "MobileNetv2": ("mobilenet", "MobileNetv2", IMAGE),
    "ResNet20": ("resnet", "ResNet20", IMAGE),
    "ResNet8": ("resnet", "ResNet8", IMAGE),
    "MLP": ("mlp", "MLP", SIGNAL),
    "Softmax": ("mlp", "Softmax", SIGNAL),
    "ConvNet1d": ("convnet1d", "ConvNet1d", SIGNAL),
}
WITHOUT_BATCHNORM = ("MLP", "Softmax")


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the network `name` takes inputs of that shape, (32, 32, 3) or (40,)."""
    return NETWORKS[name][2] == shape


def build(name: str, num_classes: int):
    """The network `name`: images (n, 3, 32, 32) or signals (n, 40) → logits (n, num_classes). Else ValueError."""
    if name not in NETWORKS:
        raise ValueError(f"no network called {name!r}; there are {', '.join(NETWORKS)}")
    module, network, _ = NETWORKS[name]
    return getattr(import_module(f"models.{module}"), network)(num_classes)
