import dataclasses
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

import data
from datasets import DATASETS
from messages import UserError

CPU = torch.device("cpu")


def pil_pipeline(image, dx, dy, flip, angle):
    """torchvision on a PIL image: RandomCrop(32, padding=4), RandomHorizontalFlip, RandomRotation."""
    image = TF.crop(TF.pad(Image.fromarray(image), 4), 4 + int(dy), 4 + int(dx), 32, 32)
    image = TF.hflip(image) if flip else image
    return np.asarray(TF.rotate(image, float(angle)))


@pytest.mark.parametrize("seed", [0, 1])
def test_pixels_equal_torchvision_s_pil_pipeline(seed):
    n, rng = 1500, np.random.default_rng(seed)
    d = make_data(n, seed=seed)
    images = d.pixels.view(-1, 32, 32, 3).numpy()
    dx, dy = rng.integers(-4, 5, (2, n))
    flip = rng.random(n) < 0.5
    angle = rng.uniform(-15, 15, n)
    angle[:40] = np.linspace(-15, 15, 40)
    angle[40:50] = [0, -0.0, 1e-9, -1e-9, 1e-16, 15, -15, 7.5, 0.5, -0.5]
    order = rng.permutation(n).astype(np.int32)
    ours = d.images(torch.from_numpy(order), torch.from_numpy(data.augmentation(dx, dy, flip, angle))).numpy()
    differ = 0
    for i, k in enumerate(order):
        differ += np.count_nonzero(ours[i] != pil_pipeline(images[k], dx[i], dy[i], flip[i], angle[i]))
    assert differ == 0 and ours.shape == (n, 32, 32, 3)


def test_normalization_equals_torchvision_bit_for_bit():
    d = make_data(50)
    images = d.images(torch.arange(50, dtype=torch.int32))
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(d.spec.mean, d.spec.std)])
    theirs = torch.stack([steps(Image.fromarray(i)) for i in images.numpy()])
    assert torch.equal(d.normalize(images), theirs)


@pytest.mark.parametrize("batchsize", [1, 7, 20, 59, 60])
def test_an_epoch_is_a_permutation_with_the_partial_batch_kept(batchsize):
    d = make_data(60, augmented=False)
    d.y_train = torch.arange(60)
    batches = list(d.epoch(3, batchsize))
    assert [len(y) for _, y in batches] == [batchsize] * (60 // batchsize) + [60 % batchsize] * (60 % batchsize > 0)
    y = torch.cat([y for _, y in batches])
    assert sorted(y.tolist()) == list(range(60)) and y.tolist() != list(range(60))
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x, d.normalize(d.images(y.int())))
    assert y.tolist() != torch.cat([y for _, y in d.epoch(4, batchsize)]).tolist()


@pytest.mark.parametrize(("n", "batchsize"), [(60, 7), (2500, 100), (2500, 1100)])
def test_an_epoch_can_be_entered_anywhere(n, batchsize):
    d = make_data(n)
    whole = list(d.epoch(2, batchsize))
    for start in {0, 1, len(whole) // 2, len(whole) - 1}:
        part = list(d.epoch(2, batchsize, start))
        assert len(part) == len(whole) - start
        for (x, y), (a, b) in zip(part, whole[start:], strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def test_measuring_and_seeds_have_streams_of_their_own():
    a, b = make_data(60, seed=0), make_data(60, seed=0)
    b.seed = 1
    orders = [torch.cat([y for _, y in it]).tolist() for it in (a.epoch(0, 60), a.full_pass(0, 60), b.epoch(0, 60))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_distributions_are_torchvision_s():
    n = 90_000
    a, b, *_, sign, dx, dy = data.draw_augmentation(np.random.default_rng(0), n, 15.0).T
    dx = np.where(sign < 0, dx - 31, dx)
    for offsets in (dx, dy):
        assert set(offsets) == set(range(-4, 5))
        assert stats.chisquare(np.unique(offsets, return_counts=True)[1]).pvalue > 1e-4
    assert stats.binomtest(int((sign < 0).sum()), n).pvalue > 1e-4
    angle = np.degrees(np.arctan2(-b, a))
    assert stats.kstest(angle, stats.uniform(-15, 30).cdf).pvalue > 1e-4


def test_cifar10_is_cropped_and_flipped_but_not_rotated():
    assert DATASETS["CIFAR10"].angle == 0 and DATASETS["CIFAR10"].augmented
    d = make_data(500)
    plan = data.draw_augmentation(np.random.default_rng(0), 500, 0.0)
    sign, dx, dy = plan[:, 6], plan[:, 7], plan[:, 8]
    ours = d.images(torch.arange(500, dtype=torch.int32), torch.from_numpy(plan)).numpy()
    images = d.pixels.view(-1, 32, 32, 3).numpy()
    for i in range(500):
        flip = sign[i] < 0
        assert np.array_equal(ours[i], pil_pipeline(images[i], dx[i] - 31 * flip, dy[i], flip, 0))


def test_digits_are_the_embedded_ones_with_a_fixed_split():
    load_digits = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's").load_digits
    d = data.load("digits", Path("unused"), CPU, seed=5)
    assert (d.size, len(d.x_test), d.spec.classes, d.spec.augmented) == (1437, 360, 10, False)
    images = torch.cat([d.pixels.view(-1, 32, 32, 3), d.x_test]).numpy()
    assert np.array_equal(images, np.repeat(images[..., :1], 3, axis=3))
    small = images[:, ::4, ::4, 0]
    assert np.array_equal(small.repeat(4, 1).repeat(4, 2), images[..., 0])
    original = (load_digits().images * 255 / 16).round().astype(np.uint8)
    assert sorted(map(bytes, small)) == sorted(map(bytes, original))
    again = data.load("digits", Path("unused"), CPU, seed=6)
    assert torch.equal(d.pixels, again.pixels) and torch.equal(d.y_test, again.y_test)


def test_the_real_cifar100_has_the_paper_s_mean_and_std(cifar_dir):
    d = data.load("CIFAR100", cifar_dir, CPU, 0)
    pixels = d.pixels.double().div(255)
    np.testing.assert_allclose(pixels.mean(0), d.spec.mean, rtol=1e-12)
    np.testing.assert_allclose(pixels.std(0, correction=0), d.spec.std, rtol=1e-12)
    assert torch.equal(d.y_train.bincount(), torch.full((100,), 500))
    assert torch.equal(d.y_test.bincount(), torch.full((100,), 100))


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR10 with 12 and 4 images, so that files are quick to make."""
    small = dataclasses.replace(DATASETS["CIFAR10"], train_images=12, test_images=4, augmented=False)
    monkeypatch.setitem(DATASETS, "CIFAR10", small)
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 12),
        "x_test": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 4),
    }


def damage(kind, path, arrays):
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbled":
        content[5000] ^= 0x55
        path.write_bytes(content)
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "missing array":
        np.savez(path, **{k: v for k, v in arrays.items() if k != "y_test"})
    elif kind == "too few":
        np.savez(path, **(arrays | {"x_train": arrays["x_train"][:5]}))
    elif kind == "labels":
        np.savez(path, **(arrays | {"y_train": arrays["y_train"] + 5}))
    elif kind == "pickle":
        np.savez(path, **(arrays | {"y_test": np.array([print] * 4, dtype=object)}))
    elif kind == "directory":
        path.unlink()
        path.mkdir()


KINDS = ["truncated", "empty", "garbled", "text", "missing array", "too few", "labels", "pickle", "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_is_named_with_what_to_do(kind, small_cifar, tmp_path):
    damage(kind, tmp_path / "CIFAR10.npz", small_cifar)
    with pytest.raises(UserError, match=r"--data_dir.*CIFAR10\.npz.*delete it"):
        data.load("CIFAR10", tmp_path, CPU, 0)


def fake_torchvision(monkeypatch, arrays, calls):
    def make(root, train, download):
        assert download
        calls.append(train)
        part = "train" if train else "test"
        return types.SimpleNamespace(data=arrays[f"x_{part}"], targets=arrays[f"y_{part}"].tolist())

    monkeypatch.setattr("torchvision.datasets.CIFAR10", make)


def test_the_download_is_made_into_one_cache_once(small_cifar, tmp_path, monkeypatch):
    calls = []
    fake_torchvision(monkeypatch, small_cifar, calls)
    threads = [
        threading.Thread(target=data.load, args=("CIFAR10", tmp_path / "new" / "data", CPU, 0)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [True, False]
    assert [p.name for p in sorted((tmp_path / "new" / "data").glob("*"))] == ["CIFAR10.npz"]
    d = data.load("CIFAR10", tmp_path / "new" / "data", CPU, 0)
    assert np.array_equal(d.pixels.view(-1, 32, 32, 3), small_cifar["x_train"])
    assert d.y_test.tolist() == small_cifar["y_test"].tolist()


def test_a_cache_that_cannot_be_written_leaves_nothing(small_cifar, tmp_path, monkeypatch):
    fake_torchvision(monkeypatch, small_cifar, [])

    def full(path, **arrays):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        data.load("CIFAR10", tmp_path, CPU, 0)
    assert list(tmp_path.glob("*")) == []
