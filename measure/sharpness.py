"""The loss over fixed batches: its value and Hessian at the present weights or beside them, and how sharp it is.

Sources: λ_max of the Hessian by Lanczos [ARPACK, through scipy], its trace by Hutchinson (1990), batch sharpness as in
Andreyev and Beneventano (edge of stochastic stability). Nothing here changes what it measures.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn

from measure.draws import estimate, isotropic, length, standard_error
from measure.gradients import Batch, Loss, trained, unchanged

PROBES = 16  # random vectors for a trace
TOLERANCE = 1e-3  # of λ_max, relative
# What a pass costs, in forward and backward passes of a gradient over the same images; measured with ResNet20, CPU.
VALUE, QUADRATIC, PRODUCT = 0.4, 3, 4


class Landscape:
    """f, the mean loss over the batches `probe`, as a function of the parameters `params` (default: `trained`).

    training: BatchNorm's mode, as in `unchanged`; in training mode the statistics are those of each probe batch.
    between: called before every pass over a batch with its cost, in images forward and backward; what it raises ends
    the measurement, with the weights put back.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: list[Batch],
        params: list[Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        training: bool | None = True,
        between: Callable[[float], None] = lambda cost: None,
    ):
        self.model, self.probe, self.loss = model, probe, loss
        self.params, self.training, self.between = params or trained(model), training, between
        self.images = sum(len(y) for _, y in probe)

    @torch.no_grad()
    def value(self) -> float:
        """f at the present weights."""
        total = 0.0
        with unchanged(self.model, self.training):
            for x, y in self.probe:
                self.between(VALUE * len(y))
                output = self.model(x)
                if self.loss is F.cross_entropy:
                    output = output.double()  # a mean in float32 may be off by more than what is looked for
                total += len(y) * self.loss(output, y).item()
        return total / self.images

    @contextmanager
    def moved(self, displacement: list[Tensor]) -> Iterator[None]:
        """The weights moved by `displacement`, one tensor a parameter, for a while."""
        held = [p.detach().clone() for p in self.params]
        try:
            with torch.no_grad():
                torch._foreach_add_(self.params, displacement)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, held)

    def rise(self, displacement: list[Tensor], at: float) -> float:
        """f beside the present weights, by `displacement`, less `at`."""
        with self.moved(displacement):
            return self.value() - at

    def rise_both_ways(self, displacement: list[Tensor], at: float) -> float:
        """The mean of `rise` by `displacement` and by its mirror image.

        For a symmetric law its expectation is that of `rise`, without the noise that is linear in the displacement:
        in one direction of many, that is many times as large as what curvature adds.
        """
        mirrored = [-each for each in displacement]
        return (self.rise(displacement, at) + self.rise(mirrored, at)) / 2

    def product(self, v: list[Tensor]) -> list[Tensor]:
        """H v, the Hessian of f times one tensor a parameter."""
        total = [torch.zeros_like(p) for p in self.params]
        with unchanged(self.model, self.training):
            for x, y in self.probe:
                self.between(PRODUCT * len(y))
                gradients = self._differentiable(x, y)
                torch._foreach_add_(total, self._again(gradients, v), alpha=len(y) / self.images)
        return total

    def quadratic(self, vectors: list[list[Tensor]]) -> np.ndarray:
        """vᵀHv for each of the vectors; (len(vectors),). Cheaper than as many `product`s: the gradient is shared."""
        found = np.zeros(len(vectors))
        with unchanged(self.model, self.training):
            for x, y in self.probe:
                gradients = self._differentiable(x, y)
                for i, v in enumerate(vectors):
                    self.between(QUADRATIC * len(y))
                    found[i] += len(y) / self.images * _dot(self._again(gradients, v, keep=True), v)
        return found

    def _differentiable(self, x: Tensor, y: Tensor) -> list[Tensor]:
        value = self.loss(self.model(x), y)
        return list(torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True))

    def _again(self, gradients: list[Tensor], v: list[Tensor], keep: bool = False) -> list[Tensor]:
        known = [(g, u) for g, u in zip(gradients, v, strict=True) if g.requires_grad]
        if not known:  # the loss is linear in the parameters
            return [torch.zeros_like(p) for p in self.params]
        outputs, weights = zip(*known, strict=True)
        found = torch.autograd.grad(outputs, self.params, weights, retain_graph=keep, materialize_grads=True)
        return list(found)


def sharpness(
    f: Landscape, batches: Iterable[Batch], delta: float, pairs: int, generator: torch.Generator
) -> dict[str, float]:
    """How sharp f is at the present weights; standard errors are of the random vectors and batches (measure.md, 6).

    batches: mini-batches B of the size of training, two or more, on which the loss and its Hessian H_B are those of
    training. delta: length of a random displacement u, isotropic with E‖u‖² = delta²; pairs: how many u, at least 2,
    each taken with −u. generator: of all that is random. Returns
      lambda_max        the largest eigenvalue of H, within 0.1 %; nan where ARPACK gives up (H zero or not finite)
      trace             tr H, with trace_se
      average_sharpness E f(x + u) − f(x), with average_sharpness_se
      batch_sharpness   E[gᵀH_B g]/E‖g‖² over the batches, with batch_sharpness_se
    Where every gradient is zero, batch sharpness is nan. ValueError for fewer than two batches.
    """
    at, start = f.value(), isotropic(f.params, 1.0, generator)
    traces = f.quadratic(signs(f.params, generator))
    rises = np.array([f.rise_both_ways(isotropic(f.params, delta, generator), at) for _ in range(pairs)])
    return {
        "lambda_max": largest_eigenvalue(f, start),
        **estimate("trace", traces),
        **estimate("average_sharpness", rises),
        **batch_sharpness(f, batches),
    }


def largest_eigenvalue(f: Landscape, start: list[Tensor]) -> float:
    """λ_max of the Hessian of f, by Lanczos from the vector `start`; nan as in `sharpness`."""
    sizes = [p.numel() for p in f.params]

    def multiply(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(v.reshape(-1)).split(sizes)
        product = f.product([_like(p, part.view(p.shape)) for p, part in zip(f.params, parts, strict=True)])
        return _vector(product)

    operator = LinearOperator((sum(sizes),) * 2, matvec=multiply, dtype=np.float64)
    if sum(sizes) < 3:  # too small for Lanczos
        return float(np.linalg.eigvalsh(operator @ np.eye(sum(sizes)))[-1])
    options = {"k": 1, "which": "LA", "v0": _vector(start), "tol": TOLERANCE, "return_eigenvectors": False}
    try:
        return float(eigsh(operator, **options)[0])
    except ArpackError:
        return float("nan")


def signs(like: list[Tensor], generator: torch.Generator) -> list[list[Tensor]]:
    """PROBES vectors of independent signs ±1, for Hutchinson's E[vᵀHv] = tr H."""

    def draw(p: Tensor) -> Tensor:
        return _like(p, 2.0 * torch.randint(2, p.shape, generator=generator, device=generator.device) - 1)

    return [[draw(p) for p in like] for _ in range(PROBES)]


def batch_sharpness(f: Landscape, batches: Iterable[Batch]) -> dict[str, float]:
    """As `sharpness` has it: a ratio of two means; its standard error is that of the delta method."""
    pairs = []
    with unchanged(f.model, f.training):
        for x, y in batches:
            f.between(PRODUCT * len(y))
            gradients = f._differentiable(x, y)
            g = [each.detach() for each in gradients]
            pairs.append((_dot(f._again(gradients, g), g), length(g) ** 2))
    if len(pairs) < 2:
        raise ValueError(f"batch sharpness needs two or more batches, got {len(pairs)}")
    curvature, square = np.array(pairs).T
    if not square.any():
        return {"batch_sharpness": float("nan"), "batch_sharpness_se": float("nan")}
    ratio = curvature.mean() / square.mean()
    error = standard_error(curvature - ratio * square) / square.mean()
    return {"batch_sharpness": float(ratio), "batch_sharpness_se": float(error)}


def _like(p: Tensor, values: Tensor) -> Tensor:
    return values.to(p.device, p.dtype)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((u.double() * v.double()).sum() for u, v in zip(a, b, strict=True)).item()


def _vector(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([t.reshape(-1) for t in tensors]).cpu().double().numpy()
