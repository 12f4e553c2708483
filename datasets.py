"""The data sets there are, as NumPy arrays. No torch: arguments are checked before it is loaded."""

import errno
import fcntl
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils import UserError, replacing, warn

TRAINING_SEED, TEST_SEED = 42, 43  # of MNIST-1D's signals; 42 is the package's own


@dataclass(frozen=True)
class Spec:
    """A data set.

    mean, std: of the training inputs; images: a channel, on the scale [0, 1]; vectors: one number, or one an entry.
    augmented, angle (of random rotations, in degrees): for 32×32 images. shape: of an image (h, w, c), uint8, or of
    a vector (d,), float32. read: takes the data set's name, its Spec and --data_dir, and gives the arrays x_train,
    y_train, x_test, y_test: inputs (n, *shape), integer labels (n,). It raises OSError or UserError.
    """

    train_images: int
    test_images: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[str, "Spec", Path], dict[str, np.ndarray]]
    augmented: bool = False
    angle: float = 0.0
    shape: tuple[int, ...] = (32, 32, 3)


def read(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of the data set `name`. UserError if its files are damaged or not to be had, else as `check`."""
    spec = DATASETS[name]
    try:
        arrays = spec.read(name, spec, data_dir)
    except OSError as error:
        raise UserError(f"argument --data_dir: {data_dir} cannot be used ({error})") from error
    except ImportError as error:
        raise UserError(f"argument --dataset: {name} needs a package of requirements.txt ({error})") from error
    check(arrays, spec)
    return arrays


def check(arrays: dict[str, np.ndarray], spec: Spec) -> None:
    """ValueError if the arrays are not what `spec` says."""
    dtype = np.dtype(np.uint8 if len(spec.shape) == 3 else np.float32)
    for part, n in (("train", spec.train_images), ("test", spec.test_images)):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != dtype or x.shape != (n, *spec.shape):
            raise ValueError(f"x_{part} is {x.dtype} {x.shape}, not {dtype} {(n, *spec.shape)}")
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
    y_train, y_test = digits.target[train], digits.target[test]
    return {"x_train": images[train], "y_train": y_train, "x_test": images[test], "y_test": y_test}


def read_cached(make: Callable, name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """`<data_dir>/<name>.npz`; where it is missing, or not ours to read, what `make(name, spec, data_dir)` gives."""
    cache = data_dir / f"{name}.npz"
    made = None if os.access(cache, os.R_OK) else _fill(cache, lambda: make(name, spec, data_dir))
    if made:
        return made
    try:
        with np.load(cache, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        check(arrays, spec)
    except Exception as error:  # whatever garbage in a file brings about
        what = f"{cache} is damaged or not ours ({error})"
        raise UserError(f"argument --data_dir: {what}; delete it, and the next run makes it anew") from error
    return arrays


def _fill(cache: Path, make: Callable[[], dict]) -> dict | None:
    """What `make` gives, written to `cache` if it can be; of several runs started at once, one makes it."""
    created = [p for p in cache.parents if not p.exists()]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(cache.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # NFS locks nothing that is only read
                fcntl.flock(directory, fcntl.LOCK_EX)
            if os.access(cache, os.R_OK):
                return None
            made = make()
            try:
                if not cache.exists():
                    with replacing(cache) as file:
                        np.savez(file, **made)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                warn(f"{cache} cannot be written ({error.strerror}): every run makes these data anew")
            return made
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        for path in created:
            if path.is_dir() and not os.listdir(path):
                path.rmdir()
        raise UserError(
            f"argument --data_dir: {cache} is missing and could not be made ({error}); put the file there, "
            "or name a directory that holds it or can be written, or try --dataset digits, which needs none"
        ) from error


def download_cifar(name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 by torchvision."""
    import torchvision

    arrays = {}
    for part in ("train", "test"):
        source = getattr(torchvision.datasets, name)(data_dir, train=part == "train", download=True)
        arrays |= {f"x_{part}": source.data, f"y_{part}": np.asarray(source.targets)}
    return arrays


def generate_mnist1d(name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """MNIST-1D (Greydanus and Kobak, arXiv 2011.14439) by the package of that name, in 8 s.

    The test signals are from another seed, and more: over its 1,000 an accuracy has a standard error of 1.5 points.
    """
    from mnist1d.data import get_dataset_args, make_dataset  # not at the top: it loads matplotlib and requests

    states = random.getstate(), np.random.get_state()  # the package seeds both
    try:
        options = get_dataset_args()
        options.seed = TRAINING_SEED
        training = make_dataset(options)
        options.seed, options.num_samples, options.train_split = TEST_SEED, spec.test_images, 0.0
        test = make_dataset(options)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    x_train, x_test = training["x"].astype(np.float32), test["x_test"].astype(np.float32)
    return {"x_train": x_train, "y_train": training["y"], "x_test": x_test, "y_test": test["y_test"]}


def read_first_of_cifar100(name: str, spec: Spec, data_dir: Path) -> dict[str, np.ndarray]:
    """The first `spec.classes` classes of CIFAR-100, and of each the first images, as many as `spec` has."""
    whole, arrays = read("CIFAR100", data_dir), {}
    for part, n in (("train", spec.train_images), ("test", spec.test_images)):
        x, y = whole[f"x_{part}"], whole[f"y_{part}"]
        index = np.concatenate([np.flatnonzero(y == k)[: n // spec.classes] for k in range(spec.classes)])
        arrays |= {f"x_{part}": x[index], f"y_{part}": y[index]}
    return arrays


cifar, mnist1d = partial(read_cached, download_cifar), partial(read_cached, generate_mnist1d)
OF_CIFAR100 = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
# Well known to be wrong (the std is 0.2470, 0.2435, 0.2616); kept as the paper has it.
OF_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Not 0 and 1: the package standardizes the training signals together with its own test signals.
OF_MNIST1D = (-0.00032367,), (0.99764797,)
DATASETS = {  # training inputs, test inputs, classes, mean and std, how they are read
    "CIFAR100": Spec(50_000, 10_000, 100, *OF_CIFAR100, cifar, augmented=True, angle=15.0),
    "CIFAR10": Spec(50_000, 10_000, 10, *OF_CIFAR10, cifar, augmented=True),
    "CIFAR20-5k": Spec(5_000, 2_000, 20, *OF_CIFAR100, read_first_of_cifar100),
    "digits": Spec(1_437, 360, 10, (0.5,) * 3, (0.5,) * 3, read_digits),
    "mnist1d": Spec(4_000, 10_000, 10, *OF_MNIST1D, mnist1d, shape=(40,)),
}
