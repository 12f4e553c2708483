"""The networks of the paper (section 2) and ResNet20, by name. No torch until one is built."""

from importlib import import_module

# The module of this folder and the function or class in it that takes the number of classes.
NETWORKS = {
    "ResNet18": ("resnet", "ResNet18"),
    "WideResNet-28-10": ("wideresnet", "WideResNet"),
    "MobileNetv2": ("mobilenet", "MobileNetv2"),
    "ResNet20": ("resnet", "ResNet20"),
}


def build(name: str, num_classes: int):
    """The network `name`, an nn.Module for images (n, 3, 32, 32) giving logits (n, num_classes).

    Its weights are drawn from torch's global generator. ValueError if there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"no network called {name!r}; there are {', '.join(NETWORKS)}")
    module, network = NETWORKS[name]
    return getattr(import_module(f"models.{module}"), network)(num_classes)
