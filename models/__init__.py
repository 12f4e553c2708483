"""The networks of the paper (section 2) and ResNet20, by name."""

from torch import nn

from .mobilenet import MobileNetv2
from .resnet import ResNet18, ResNet20
from .wideresnet import WideResNet

_MODELS = {
    "ResNet18": ResNet18,
    "WideResNet-28-10": WideResNet,
    "MobileNetv2": MobileNetv2,
    "ResNet20": ResNet20,
}


def build(name: str, num_classes: int) -> nn.Module:
    """The network `name` for images of shape (n, 3, 32, 32), giving logits of shape (n, num_classes).

    Its weights are drawn from torch's global generator. ValueError if there is no such network.
    """
    if name not in _MODELS:
        raise ValueError(f"no network called {name!r}; there are {', '.join(_MODELS)}")
    return _MODELS[name](num_classes)
