"""The data sets there are, and their images as NumPy arrays. No torch: arguments are checked before it is loaded."""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from messages import UserError


@dataclass(frozen=True)
class Spec:
    """A data set: how many images it has, what is done with them, and how they are read.

    mean, std: a channel, on the scale [0, 1]. angle: of random rotations, in degrees.
    read: takes the data set's name, its Spec and the directory of --data_dir, and gives the arrays x_train, y_train,
    x_test, y_test: uint8 images (n, 32, 32, 3), integer labels (n,). It raises OSError or UserError.
    """

    train_images: int
    test_images: int
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    read: Callable[[str, "Spec", Path], dict[str, np.ndarray]]
    augmented: bool = False
    angle: float = 0.0


def read(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of the data set `name`. UserError if its files are damaged or not to be had, else as `check`."""
    spec = DATASETS[name]
    try:
        arrays = spec.read(name, spec, data_dir)
    except OSError as error:
        raise UserError(f"argument --data_dir: {data_dir} cannot be used ({error})") from error
    check(arrays, spec)
    return arrays


def check(arrays: dict[str, np.ndarray], spec: Spec) -> None:
    """ValueError if the arrays are not what `spec` says."""
    for part, n in (("train", spec.train_images), ("test", spec.test_images)):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.shape != (n, 32, 32, 3):
            raise ValueError(f"x_{part} is {x.dtype} {x.shape}, not uint8 {(n, 32, 32, 3)}")
        if y.shape != (n,) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= spec.classes:
            raise ValueError(f"y_{part} does not hold {n} labels from 0 to {spec.classes - 1}")


def read_digits(name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """scikit-learn's 8×8 digits, enlarged to 32×32×3; a fixed split, whatever the seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(images.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[: spec.train_images], order[spec.train_images :]
    return {
        "x_train": images[train],
        "y_train": digits.target[train],
        "x_test": images[test],
        "y_test": digits.target[test],
    }


def read_cifar(name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """`<data_dir>/<name>.npz`, downloaded by torchvision first if it is missing."""
    cache = data_dir / f"{name}.npz"
    if not cache.exists():
        _download(name, data_dir, cache)
    try:
        with np.load(cache, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        check(arrays, spec)
    except Exception as error:  # whatever garbage in a file brings about
        raise UserError(
            f"argument --data_dir: {cache} is damaged or not ours ({error}); delete it, and the next run makes it anew"
        ) from error
    return arrays


def _download(name: str, data_dir: Path, cache: Path) -> None:
    created = [p for p in (data_dir, *data_dir.parents) if not p.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        directory = os.open(data_dir, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)  # of several runs started at once, one downloads
            if not cache.exists():
                _fill(name, data_dir, cache)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        for path in created:
            if path.is_dir() and not os.listdir(path):
                path.rmdir()
        raise UserError(
            f"argument --data_dir: {cache} is missing and could not be downloaded ({error}); "
            "put the file there, or name the directory that holds it, or try --dataset digits, which needs none"
        ) from error


def _fill(name: str, data_dir: Path, cache: Path) -> None:
    import torchvision

    arrays = {}
    for part in ("train", "test"):
        source = getattr(torchvision.datasets, name)(data_dir, train=part == "train", download=True)
        arrays |= {f"x_{part}": source.data, f"y_{part}": np.asarray(source.targets)}
    temporary = cache.with_suffix(f".{os.getpid()}.npz")
    try:
        np.savez(temporary, **arrays)
        os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)


DATASETS = {
    "CIFAR100": Spec(
        train_images=50_000,
        test_images=10_000,
        classes=100,
        mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
        read=read_cifar,
        augmented=True,
        angle=15.0,
    ),
    "CIFAR10": Spec(
        train_images=50_000,
        test_images=10_000,
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),  # well known to be wrong (0.2470, 0.2435, 0.2616); kept as the paper has it
        read=read_cifar,
        augmented=True,
    ),
    "digits": Spec(
        train_images=1_437,
        test_images=360,
        classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        read=read_digits,
    ),
}
