import dataclasses
import errno
import json
import random
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Evil, make_data, random_arrays, summary
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

import datasets
import models
import utils
from datasets import DATASETS, Spec
from measure.gradients import Objective
from training import data
from utils import UserError

CPU = torch.device("cpu")


make_signals = partial(make_data, augmented=False, shape=(40,))


def pil_pipeline(image, dx, dy, flip, angle):
    """torchvision on a PIL image: RandomCrop(32, padding=4), RandomHorizontalFlip, RandomRotation."""
    image = TF.crop(TF.pad(Image.fromarray(image), 4), 4 + int(dy), 4 + int(dx), 32, 32)
    image = TF.hflip(image) if flip else image
    return np.asarray(TF.rotate(image, float(angle)))


def test_pixels_and_their_normalization_are_torchvision_s_to_the_bit():
    n, rng = 2000, np.random.default_rng(0)
    d = make_data(n)
    dx, dy = rng.integers(-4, 5, (2, n))
    flip = rng.random(n) < 0.5
    angle = rng.uniform(-15, 15, n)
    angle[:40] = np.linspace(-15, 15, 40)
    angle[50:200] = 0  # as for CIFAR-10
    angle[40:50] = [0, -0.0, 1e-9, -1e-9, 1e-16, 15, -15, 7.5, 0.5, -0.5]
    order = rng.permutation(n).astype(np.int32)
    ours = d.images(torch.from_numpy(order), torch.from_numpy(data.augmentation(dx, dy, flip, angle))).numpy()
    images = d.x_train.numpy()
    assert ours.shape == (n, 32, 32, 3)
    for i, k in enumerate(order):
        assert np.array_equal(ours[i], pil_pipeline(images[k], dx[i], dy[i], flip[i], angle[i])), i
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(d.spec.mean, d.spec.std)])
    theirs = torch.stack([steps(Image.fromarray(image)) for image in images[:50]])
    assert torch.equal(d.normalize(d.x_train[:50]), theirs)


def test_distributions_are_torchvision_s():
    assert DATASETS["CIFAR10"].augmented and DATASETS["CIFAR10"].angle == 0
    n = 90_000
    assert not data.draw_augmentation(np.random.default_rng(0), n, 0.0)[:, 1].any()  # the sine
    a, b, *_, sign, dx, dy = data.draw_augmentation(np.random.default_rng(0), n, 15.0).T
    for offsets in (np.where(sign < 0, dx - 31, dx), dy):
        assert set(offsets) == set(range(-4, 5))
        assert stats.chisquare(np.unique(offsets, return_counts=True)[1]).pvalue > 1e-4
    assert stats.binomtest(int((sign < 0).sum()), n).pvalue > 1e-4
    assert stats.kstest(np.degrees(np.arctan2(-b, a)), stats.uniform(-15, 30).cdf).pvalue > 1e-4


@pytest.mark.parametrize("batchsize", [1, 7, 20, 59, 60])
@pytest.mark.parametrize("make", [partial(make_data, augmented=False), make_signals])
def test_an_epoch_is_a_permutation_with_the_partial_batch_kept(make, batchsize):
    d = make(60)
    d.y_train = torch.arange(60)
    batches = list(d.epoch(3, batchsize))
    assert [len(y) for _, y in batches] == [batchsize] * (60 // batchsize) + [60 % batchsize] * (60 % batchsize > 0)
    y = torch.cat([y for _, y in batches])
    assert sorted(y.tolist()) == list(range(60)) and y.tolist() != list(range(60))
    assert torch.equal(torch.cat([x for x, _ in batches]), d.normalize(d.x_train[y]))
    assert y.tolist() != torch.cat([y for _, y in d.epoch(4, batchsize)]).tolist()


@pytest.mark.parametrize("make", [make_data, make_signals])
@pytest.mark.parametrize("batchsize", [100, 1100])
def test_an_epoch_can_be_entered_anywhere(make, batchsize):
    d = make(2500)
    whole = list(d.epoch(2, batchsize))
    for start in {0, 1, len(whole) // 2, len(whole) - 1}:
        for (x, y), (a, b) in zip(d.epoch(2, batchsize, start), whole[start:], strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def test_streams_are_independent_and_repeatable():
    a, b = make_signals(60), make_signals(60)
    b.seed = 1
    a.y_train = b.y_train = torch.arange(60)
    streams = [a.epoch(0, 60), b.epoch(0, 60), a.full_pass(0, 60), a.full_pass(1, 60), a.for_batchnorm(0, 60, 60)]
    streams += [[draw] for draw in a.draws(0, 60, 2)] + [a.draws(0, 60, 1)]
    streams += [[each] for step, draw in ((0, 0), (0, 1), (1, 0)) for each in a.independent(step, 60, draw)]
    orders = [tuple(next(iter(stream))[1].tolist()) for stream in streams]
    assert len(set(orders)) == 13 and orders[5] == orders[7]
    first, second = ([label for _, y in half for label in y.tolist()] for half in a.probe(31, 9))
    assert (len(first), len(second)) == (15, 16) and len({*first, *second}) == 31
    assert [len(set(y.tolist())) for _, y in a.draws(3, 50, 4)] == [50] * 4  # a batch holds an input once
    pairs = list(make_data(60).augmented_pairs(0, 8, 2))
    assert all(torch.equal(y, z) and not torch.equal(x, w) for (x, y), (w, z) in pairs)


@pytest.mark.parametrize("make", [make_data, make_signals])
def test_everything_runs_where_there_is_no_data(make):
    """torch's meta device fails at a tensor left on the CPU and at a reading of the device."""
    d = make(60, device="meta")
    passes = (d.epoch(0, 8), d.full_pass(0, 20), d.draws(0, 8, 2), *d.probe(9, 4), d.independent(0, 8, 0), d.test(7))
    batches = [batch for each in (*passes, *d.augmented_pairs(0, 8, 1)) for batch in each]
    inputs = (40,) if len(d.spec.shape) == 1 else (3, 32, 32)
    assert all(x.shape == (len(y), *inputs) and x.is_meta and y.is_meta for x, y in batches)


def test_digits_are_the_embedded_ones_with_a_fixed_split():
    load_digits = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's").load_digits
    d, again = (data.load("digits", Path("unused"), CPU, seed) for seed in (5, 6))
    assert (d.size, len(d.x_test), d.spec.classes, d.spec.augmented) == (1437, 360, 10, False)
    images = torch.cat([d.x_train, d.x_test]).numpy()
    small = images[:, ::4, ::4, 0]
    assert np.array_equal(images, np.repeat(small.repeat(4, 1).repeat(4, 2)[..., None], 3, axis=3))
    original = (load_digits().images * 255 / 16).round().astype(np.uint8)
    assert sorted(map(bytes, small)) == sorted(map(bytes, original))
    assert d.checksum == again.checksum == 940105724  # records of earlier runs name it


def test_the_real_cifar100_has_the_paper_s_mean_and_std_and_its_first_classes_are_a_data_set(cifar_dir):
    d, part = (data.load(name, cifar_dir, CPU, 0) for name in ("CIFAR100", "CIFAR20-5k"))
    shares = np.stack([np.bincount(d.x_train[..., i].flatten(), minlength=256) for i in range(3)], 1) / d.size / 1024
    value = np.arange(256)[:, None] / 255
    np.testing.assert_allclose((shares * value).sum(0), d.spec.mean, rtol=1e-12)
    np.testing.assert_allclose((shares * (value - d.spec.mean) ** 2).sum(0) ** 0.5, d.spec.std, rtol=1e-12)
    assert torch.equal(d.y_train.bincount(), torch.full((100,), 500))
    assert torch.equal(d.y_test.bincount(), torch.full((100,), 100))
    assert part.size == 5000 and part.y_train.bincount().tolist() == [250] * 20
    assert part.y_test.bincount().tolist() == [100] * 20 and not part.spec.augmented
    for k in (0, 19):
        assert torch.equal(part.x_train[part.y_train == k], d.x_train[d.y_train == k][:250])
        assert torch.equal(part.x_test[part.y_test == k], d.x_test[d.y_test == k])


GENERATING = """if True:
    import json, pathlib, pickle, random, sys
    import numpy, torch
    import datasets
    def states():
        return pickle.dumps((random.getstate(), numpy.random.get_state(), torch.get_rng_state().numpy()))
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    before = states()
    arrays = datasets.read("mnist1d", pathlib.Path(sys.argv[1]))
    print(json.dumps([states() == before, "mnist1d" in sys.modules, len(arrays["x_test"])]))"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A directory with mnist1d.npz and what two processes said that generated it at once."""
    directory = tmp_path_factory.mktemp("mnist1d") / "not" / "there"
    command = [sys.executable, "-c", GENERATING, str(directory)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=300)[0]) for process in both]
    return directory, said


@pytest.fixture
def mnist1d(generated):
    return data.load("mnist1d", generated[0], CPU, 0)


def test_one_of_several_runs_generates_and_leaves_no_trace(generated):
    directory, said = generated
    assert [path.name for path in directory.iterdir()] == ["mnist1d.npz"]
    assert sorted(said) == [[True, False, 10_000], [True, True, 10_000]]  # one has the package loaded


def test_signals_are_the_package_s_own(mnist1d, tmp_path):
    package = pytest.importorskip("mnist1d.data")
    states = random.getstate(), np.random.get_state()
    standard = package.get_dataset_args()
    theirs = package.get_dataset(standard, tmp_path / "it.pkl", verbose=False, download=False, regenerate=True)
    other = package.make_dataset(package.ObjectView(vars(standard) | {"seed": 43, "num_samples": 10_000}))
    random.setstate(states[0])
    np.random.set_state(states[1])
    test = {key: np.concatenate([other[key], other[f"{key}_test"]]) for key in ("x", "y")}
    mean, std = theirs["x"].mean(), theirs["x"].std()
    for ours, labels, raw in ((mnist1d.x_train, mnist1d.y_train, theirs), (mnist1d.x_test, mnist1d.y_test, test)):
        np.testing.assert_allclose(ours, (raw["x"] - mean) / std, atol=2e-6)
        assert np.array_equal(labels, raw["y"]) and ours.dtype == torch.float32
    assert mnist1d.x_train.shape == (4000, 40) and mnist1d.x_test.shape == (10_000, 40)


def test_the_mlp_s_full_gradient_in_chunks_is_that_of_all_signals_at_once(mnist1d):
    torch.manual_seed(0)
    model = models.build("MLP", 10)
    F.cross_entropy(model(mnist1d.x_train), mnist1d.y_train).backward()
    for chunk in (1000, 999):
        ours = Objective(model).full_gradient(mnist1d.full_pass(7, chunk), 4000)
        for p, g in zip(model.parameters(), ours, strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-7)


def test_the_convolutional_network_learns_the_signals(train):
    _, directory = train("--model=ConvNet1d", "--optimizer=shb", "--lr=0.1", "--batchsize=128", "--epochs=8")
    assert summary(directory)["results"]["accuracy"] > 85


def test_vectors_of_one_s_own_need_one_entry(tmp_path, monkeypatch):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = {"x_train": x, "y_train": np.arange(4), "x_test": x[:2], "y_test": np.arange(2)}
    mine = Spec(4, 2, 4, mean=(0, 1, 2), std=(1, 2, 4), read=lambda name, spec, data_dir: arrays, shape=(3,))
    monkeypatch.setitem(DATASETS, "mine", mine)
    d = data.load("mine", tmp_path, CPU, 0)
    assert d.x_test.tolist() == [[0, 0, 0], [3, 1.5, 0.75]]
    arrays["x_train"] = x.astype(float)
    with pytest.raises(ValueError, match=r"x_train is float64 \(4, 3\), not float32 \(4, 3\)"):
        data.load("mine", tmp_path, CPU, 0)


@pytest.mark.parametrize("name", ["mnist1d", "CIFAR10"])
def test_a_directory_that_cannot_be_written_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^argument --data_dir: .*{name}\.npz is missing and could not be made"):
        datasets.read(name, tmp_path / "file" / "data")
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(UserError, match=r"argument --dataset: mnist1d needs a package"):
        datasets.read("mnist1d", tmp_path / "new")


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR10 with 12 and 4 images, so that files are quick to make."""
    small = dataclasses.replace(DATASETS["CIFAR10"], train_images=12, test_images=4, augmented=False)
    monkeypatch.setitem(DATASETS, "CIFAR10", small)
    return random_arrays(12, 4)


DAMAGED = {
    "truncated": lambda path, arrays: path.write_bytes(path.read_bytes()[:9000]),
    "garbled": lambda path, arrays: path.write_bytes(path.read_bytes().replace(bytes(arrays["x_train"][3]), b"")),
    "missing array": lambda path, arrays: np.savez(path, x_train=arrays["x_train"]),
    "too few": lambda path, arrays: np.savez(path, **arrays | {"x_train": arrays["x_train"][:5]}),
    "labels": lambda path, arrays: np.savez(path, **arrays | {"y_train": arrays["y_train"] + 5}),
    "pickle": lambda path, arrays: np.savez(path, **arrays | {"y_test": np.array([Evil()] * 4, dtype=object)}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_cache_is_named_with_what_to_do(kind, small_cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "CIFAR10.npz", **small_cifar)
    DAMAGED[kind](tmp_path / "CIFAR10.npz", small_cifar)
    with pytest.raises(UserError, match=r"--data_dir.*CIFAR10\.npz.*delete it"):
        data.load("CIFAR10", tmp_path, CPU, 0)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def downloads(small_cifar, monkeypatch):
    """The calls of torchvision's CIFAR10, which gives `small_cifar`."""
    calls = []

    def make(root, train, download):
        calls.append((train, download))
        part = "train" if train else "test"
        return types.SimpleNamespace(data=small_cifar[f"x_{part}"], targets=small_cifar[f"y_{part}"].tolist())

    monkeypatch.setattr("torchvision.datasets.CIFAR10", make)
    return calls


def test_the_download_is_made_into_one_cache_once(small_cifar, downloads, tmp_path):
    directory = tmp_path / "new" / "data"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: data.load("CIFAR10", directory, CPU, 0), range(4)))
    assert downloads == [(True, True), (False, True)]
    assert [p.name for p in directory.iterdir()] == ["CIFAR10.npz"]
    d = data.load("CIFAR10", directory, CPU, 0)
    assert np.array_equal(d.x_train, small_cifar["x_train"]) and np.array_equal(d.y_test, small_cifar["y_test"])


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_read_only_directory_is_read_without_a_cache(error, downloads, tmp_path, monkeypatch, capsys):
    """And where a cache is another user's; NFS does not even lock a directory."""

    def refuse(path):
        raise OSError(error, "not here", str(path))

    monkeypatch.setattr(datasets, "replacing", refuse)
    monkeypatch.setattr("fcntl.flock", lambda *_: refuse("lock"))
    utils.warn.cache_clear()
    assert len(data.load("CIFAR10", tmp_path, CPU, 0).x_train) == 12 and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"warning: .*CIFAR10.npz cannot be written \(not here\).*\n", capsys.readouterr().err)
    (tmp_path / "CIFAR10.npz").write_text("another user's")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert len(data.load("CIFAR10", tmp_path, CPU, 0).x_train) == 12 and len(downloads) == 4
    assert (tmp_path / "CIFAR10.npz").read_text() == "another user's"


def test_a_cache_that_cannot_be_written_leaves_nothing(downloads, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    for directory in (tmp_path, tmp_path / "new" / "data"):
        with pytest.raises(UserError, match="No space left"):
            data.load("CIFAR10", directory, CPU, 0)
        assert list(tmp_path.glob("*")) == []
