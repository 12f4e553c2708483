"""A data set on the device: shuffling, and augmentation of images in one gather.

Augmented pixels equal those of torchvision's PIL pipeline: RandomCrop(32, padding=4), RandomHorizontalFlip, and for
CIFAR-100 RandomRotation(15). What an epoch draws depends on the seed and the epoch alone.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import datasets
from datasets import DATASETS, Spec

SHUFFLING, MEASURING, DRAWING, PAIRING = 1, 2, 3, 4  # streams of random numbers: measuring never changes training
SMOOTHING, PROBING, INJECTING, RECALIBRATING = 5, 6, 7, 8
BLOCK = 1024  # inputs gathered at once: at small batches the launches of a block serve many steps


class Data:
    """A data set on a device.

    x_train, x_test: images (n, h, w, c), uint8, or standardized vectors (n, d), float32. y_train, y_test: labels (n,),
    int64. Batches are normalized float32 images (b, c, h, w), or vectors (b, d), and labels (b,).
    layout: the memory order of images and weights: channels_last on CUDA. On the CPU torch's BatchNorm would then sum
    in float32, and ∇f in chunks of 1,000 be off by 1 %, not 0.1 %.
    """

    def __init__(self, spec: Spec, arrays: dict[str, np.ndarray], device: torch.device, seed: int):
        self.spec, self.device, self.seed = spec, device, seed
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.size = len(arrays["x_train"])
        self.checksum = 0  # the CRC-32 by which a run knows its data again: 0.1 s for CIFAR's 184 MB
        for name in sorted(arrays):
            self.checksum = zlib.crc32(np.ascontiguousarray(arrays[name]), self.checksum)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if len(spec.shape) == 1:
            mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
            tensors |= {name: (tensors[name] - mean) / std for name in ("x_train", "x_test")}
        self.x_train, self.x_test = (tensors[name].to(device) for name in ("x_train", "x_test"))
        self.y_train, self.y_test = (tensors[name].to(device, torch.int64) for name in ("y_train", "y_test"))
        self.mean = torch.tensor(spec.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(spec.std, device=device).view(-1, 1, 1)
        self.white = torch.tensor(255.0, device=device)  # CUDA would multiply by a number's inexact reciprocal
        self.grid = torch.arange(1024, dtype=torch.int32, device=device)

    def epoch(self, number: int, batchsize: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` from the `start`-th on: a fresh permutation, the partial batch kept."""
        return self._pass((self.seed, SHUFFLING, number), batchsize, start)

    def full_pass(self, step: int, batchsize: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All training inputs once, in chunks of `batchsize`, augmented from the stream kept for measuring."""
        return self._pass((self.seed, MEASURING, step), batchsize)

    def draws(self, step: int, batchsize: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` independent batches, each as training draws one: different inputs, augmented anew."""
        for i in range(count):
            yield next(self._pass((self.seed, DRAWING, step, batchsize, i), batchsize, size=batchsize))

    def augmented_pairs(self, step: int, batchsize: int, count: int) -> Iterator[tuple]:
        """`count` pairs of batches; both batches of one hold the same inputs, augmented independently."""
        for i in range(count):
            rng = np.random.default_rng((self.seed, PAIRING, step, batchsize, i))
            order = rng.permutation(self.size)[:batchsize]
            yield tuple(next(self._batches(rng, order, batchsize)) for _ in range(2))

    def independent(self, step: int, batchsize: int, draw: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two independent batches for the noise to inject: at a step, or for a draw there, by its number from 1 on."""
        rng = np.random.default_rng((self.seed, INJECTING, step, draw))
        for _ in range(2):
            order = rng.choice(self.size, batchsize, replace=False)  # does not take longer with more images
            yield next(self._batches(rng, order, batchsize))

    def probe(self, count: int, batchsize: int) -> list[list[tuple[Tensor, Tensor]]]:
        """`count` training inputs in two disjoint halves, each in batches, augmented once: the same in every run."""
        (x, y), half = next(self._pass((self.seed, PROBING), count, size=count)), count // 2
        parts = (x[:half], y[:half]), (x[half:], y[half:])
        return [list(zip(x.split(batchsize), y.split(batchsize), strict=True)) for x, y in parts]

    def for_batchnorm(self, step: int, count: int, batchsize: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` training inputs in batches, augmented, for new running statistics at a step."""
        return self._pass((self.seed, RECALIBRATING, step), batchsize, size=count)

    def generator(self, *key: int) -> torch.Generator:
        """A new generator of torch's on the device, seeded from (seed, *key); on the CPU torch uses 32 bits of it."""
        seed = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def test(self, batchsize: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test inputs in batches, never augmented."""
        for x, y in zip(self.x_test.split(batchsize), self.y_test.split(batchsize), strict=True):
            yield self.normalize(x), y

    def _pass(self, key: tuple[int, ...], batchsize: int, start: int = 0, size: int | None = None) -> Iterator:
        """The first `size` images (default: all) of a permutation in batches, from the `start`-th batch on."""
        rng = np.random.default_rng(key)
        return self._batches(rng, rng.permutation(self.size)[:size], batchsize, start)

    def _batches(self, rng: np.random.Generator, order: np.ndarray, batchsize: int, start: int = 0) -> Iterator:
        plan = draw_augmentation(rng, len(order), self.spec.angle) if self.spec.augmented else None
        order = torch.from_numpy(order.astype(np.int32)).to(self.device)
        plan = None if plan is None else torch.from_numpy(plan).to(self.device)
        block = max(1, BLOCK // batchsize) * batchsize
        for at in range(start * batchsize, len(order), block):
            index = order[at : at + block]
            x = self.normalize(self.images(index, None if plan is None else plan[at : at + block]))
            y = self.y_train.index_select(0, index)
            yield from zip(x.split(batchsize), y.split(batchsize), strict=True)

    def images(self, index: Tensor, plan: Tensor | None = None) -> Tensor:
        """Training inputs as stored, by `index`, int32 (b,); augmented if `plan` has rows of `draw_augmentation`."""
        if plan is None:
            return self.x_train.index_select(0, index)
        # From an output pixel back to its source: PIL's rotation in 16.16 fixed point, the flip, the crop.
        x, y = self.grid & 31, self.grid >> 5
        a, b, c, d, e, f, sign, dx, dy = plan.view(-1, 9, 1).unbind(1)
        x, y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
        u, v = x * sign + dx, y + dy
        inside = ((x | y | u | v) >> 5) == 0  # all four in 0..31: a negative number has high bits too
        at = index.view(-1, 1) * 1024
        at = torch.where(inside, at + (v * 32 + u), at)
        pixels = self.x_train.view(-1, 3).index_select(0, at.view(-1))
        return pixels.view(-1, 32, 32, 3).mul_(inside.view(-1, 32, 32, 1))  # black borders and corners

    def normalize(self, x: Tensor) -> Tensor:
        """uint8 images (b, h, w, c) → float32 (b, c, h, w), as ToTensor and Normalize; vectors stay as they are."""
        if x.ndim == 2:
            return x
        x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.layout)
        return x.div_(self.white).sub_(self.mean).div_(self.std)


def draw_augmentation(rng: np.random.Generator, n: int, angle: float) -> np.ndarray:
    """n random crops, flips and rotations in [−angle, angle], as of `augmentation`; distributed as torchvision's."""
    dx, dy = rng.integers(-4, 5, size=(2, n))
    return augmentation(dx, dy, rng.random(n) < 0.5, rng.uniform(-angle, angle, n))


def augmentation(dx: np.ndarray, dy: np.ndarray, flip: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Rows (n, 9), int32, of given crops (dx, dy: pixels, −4 … 4), flips (bool) and rotations (degrees).

    A row is a, b, c, d, e, f, sign, dx, dy: the rotation takes the output pixel (x, y) to
    ((ax + by + c) >> 16, (dx + ey + f) >> 16), as PIL's nearest rotation about the centre (16, 16) does it.
    """
    radians = -np.radians(np.mod(degrees, 360.0))
    # Pillow rounds the matrix to 15 digits, and so do we, to meet its fixed-point numbers exactly.
    cos, sin = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    c, f = 16 - (cos * 16 + sin * 16), 16 - (-sin * 16 + cos * 16)
    c, f = c + 0.5 * cos + 0.5 * sin, f - 0.5 * sin + 0.5 * cos
    matrix = [np.floor(v * 65536 + 0.5) for v in (cos, sin, c, -sin, cos, f)]
    rows = [*matrix, np.where(flip, -1, 1), np.where(flip, 31 + dx, dx), dy]
    return np.stack(rows, axis=1).astype(np.int32)


def load(name: str, data_dir: Path, device: torch.device, seed: int) -> Data:
    """The data set `name` on `device`. Raises UserError if its files are damaged, or missing and not to be had."""
    return Data(DATASETS[name], datasets.read(name, data_dir), device, seed)
