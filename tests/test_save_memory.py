"""--save_memory changes what is kept for the backward pass, and nothing that comes out of it."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from measure.gradients import Objective
from models import NETWORKS
from models.recomputed import save_memory
from utils import UserError

WITH_BLOCKS = [name for name in NETWORKS if name not in ("MLP", "Softmax")]


def network(name, saving, every=1):
    """every: of how many blocks one is kept."""
    torch.manual_seed(0)
    model = models.build(name, 10)
    model.layers = model.layers[::every]
    if saving:
        save_memory(model)
    return model


def batch(name, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (40,) if NETWORKS[name][2] == (40,) else (3, 32, 32)
    return torch.randn(n, *shape, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def same_bits(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize(("name", "bf16"), [*((name, False) for name in WITH_BLOCKS), ("ResNet20", True)])
def test_training_and_measuring_are_the_same_bit_for_bit(name, bf16):
    """Two steps, the second on a partial batch; then a gradient in each mode, which changes no buffer."""
    kept = []
    for saving in (False, True):
        model = network(name, saving, every=4 if name == "WideResNet-28-10" else 1)  # a block a stage will do
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for n in (3, 2):
                x, y = batch(name, n, seed=n)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            tensors = [p.grad for p in model.parameters()] + [s["momentum_buffer"] for s in optimizer.state.values()]
            before = [value.clone() for value in model.state_dict().values()]
            for training in (True, False):
                tensors += Objective(model, training=training).gradient((x, y))
        assert same_bits(before, model.state_dict().values())
        kept.append((list(model.state_dict()), before + tensors))
    assert kept[0][0] == kept[1][0] and same_bits(kept[0][1], kept[1][1])


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages made while it is active: `live` those now, `max` the max so far."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.max = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.max = max(self.max, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("name", ["ResNet18", "WideResNet-28-10", "MobileNetv2", "ResNet20"])
def test_much_less_is_kept_and_one_block_at_a_time_recomputed(name):
    """Bytes alive after the forward pass, and at most up to the end of the backward pass, on torch's meta device."""
    kept, most = [], []
    for saving in (False, True):
        with torch.device("meta"):
            model, (x, y) = network(name, saving), (each.to("meta") for each in batch(name, 1024))
        with LiveBytes() as counted:
            loss = F.cross_entropy(model(x), y)
            kept.append(counted.live)
            torch.autograd.grad(loss, list(model.parameters()))
        most.append(counted.max)
    assert kept[1] < 0.35 * kept[0] and most[1] < 0.55 * most[0]


def test_networks_without_blocks_are_refused():
    with pytest.raises(UserError, match="argument --save_memory: MLP has no"):
        save_memory(models.build("MLP", 10))
