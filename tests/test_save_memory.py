"""--save_memory changes what is kept for the backward pass, and nothing that comes out of it."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arguments
import bench
import models
import training
from files import plain as as_json
from measure.gradients import full_gradient, gradient, unchanged
from models import NETWORKS
from models.recomputed import save_memory
from state import differences


def trainings(network, *argv, data=None):
    """Two Trainings without a record, as always and with --save_memory."""
    argv = ["--dataset", "digits", "--device", "cpu", "--model", network, "--lr", "0.01", *map(str, argv)]
    data = data or make_data(40)
    return [training.Training(arguments.parse(a), data, None, None) for a in (argv, [*argv, "--save_memory"])]


def same_bits(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("precision", ["default", "bf16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_the_same_bit_for_bit(network, precision):
    """Three steps, a partial batch among them: losses, gradients, weights, running statistics, momentum."""
    plain, saving = trainings(network, "--batchsize", 2, "--precision", precision, data=make_data(5))
    assert same_bits(plain.model.state_dict(), saving.model.state_dict())
    for x, y in plain.data.epoch(0, 2):
        assert torch.equal(plain.train_step(x, y), saving.train_step(x, y))
        for p, q in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert same_bits(plain.model.state_dict(), saving.model.state_dict())
    counts = {int(v) for k, v in saving.model.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counts == {3}
    for p, q in zip(plain.optimizer.state.values(), saving.optimizer.state.values(), strict=True):
        assert torch.equal(p["momentum_buffer"], q["momentum_buffer"])


@pytest.mark.parametrize("network", NETWORKS)
def test_measuring_and_evaluating_are_the_same_bit_for_bit(network):
    plain, saving = trainings(network, "--batchsize", 2, data=make_data(5, n_test=2))
    measured = []
    for run in (plain, saving):
        batch = next(run.data.epoch(0, 2))
        run.train_step(*batch)
        before = {k: v.clone() for k, v in run.model.state_dict().items()}
        full = full_gradient(run.model, run.data.full_pass(1, 3), 5)
        with unchanged(run.model, training=False):
            one = gradient(run.model, *batch, list(run.model.parameters()))
        assert same_bits(before, run.model.state_dict())
        measured.append((run.evaluate(), [*full, *one]))
    assert measured[0][0] == measured[1][0]
    assert all(torch.equal(a, b) for a, b in zip(measured[0][1], measured[1][1], strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_much_less_is_kept_and_one_block_at_a_time_recomputed(network):
    """Counted, not measured: bytes alive after the forward pass, and at most up to the end of the backward pass."""
    plain, saving = (bench.counted(network, 1024, side) for side in ("ours", "saving"))
    assert saving["kept_bytes"] < 0.35 * plain["kept_bytes"]
    assert most_bytes(network, True) < 0.55 * most_bytes(network, False)


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages made while it is active: `live` those now, `most` at most so far."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def most_bytes(network, saving):
    """Alive at most in a forward and backward pass of 1,024 images, on torch's meta device."""
    with torch.device("meta"):
        model = models.build(network, 100)
        x, y = torch.empty(1024, 3, 32, 32), torch.empty(1024, dtype=torch.int64)
    if saving:
        save_memory(model)
    with LiveBytes() as counted:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return counted.most


def test_a_run_may_go_on_with_it_from_a_checkpoint_without_it():
    plain, saving = trainings("ResNet20", "--batchsize", 20)
    assert differences(as_json(vars(plain.args)), saving.args) == ""
    contents = []
    plain.record = SimpleNamespace(save_checkpoint=contents.append)
    batches = list(plain.data.epoch(0, 20))
    plain.train_step(*batches[0])
    plain.save()
    saving.load(copy.deepcopy(contents[0]))
    assert torch.equal(plain.train_step(*batches[1]), saving.train_step(*batches[1]))
    assert same_bits(plain.model.state_dict(), saving.model.state_dict())
