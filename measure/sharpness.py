"""The loss beside the present weights, its Hessian, and how sharp it is, over fixed batches: the probe.

Sources: λ_max of the Hessian by Lanczos [ARPACK, through scipy], its trace by Hutchinson (1990), batch sharpness as in
Andreyev and Beneventano (edge of stochastic stability). Nothing here changes what it measures. A vector of weights,
such as a displacement, is a list with one tensor for each of `objective.params`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from measure.draws import estimate, isotropic, length, refuse_copies, standard_error
from measure.gradients import Batch, Objective, images

Halves = list[list[Batch]]  # disjoint halves of the probe, each in batches
PROBES = 16  # random vectors for a trace
TOLERANCE = 1e-3  # of λ_max, relative
# Cost of a product with the Hessian, and of one more with the same gradient, as that of `measure.gradients.VALUE`.
PRODUCT, QUADRATIC = 4, 3


def sharpness(
    objective: Objective,
    halves: Halves,
    batches: Iterable[Batch],
    delta: float,
    pairs: int,
    generator: torch.Generator,
    along: dict[str, list[Tensor]] | None = None,
) -> dict[str, float]:
    """How sharp f is at the present weights; standard errors are of the random vectors and batches.

    halves: of the probe, disjoint, each a list of batches; f is the mean loss of both. What differs between them is
    due to the images chosen. batches: mini-batches B of the size of training, two or more of one size, on which the
    loss and its Hessian H_B are those of training. delta: length of a random displacement u, isotropic with
    E‖u‖² = delta²; pairs: how many u, 2 or more, each taken with −u. generator: of all that is random. along: vectors
    v, as {name: one tensor a parameter}, whose vᵀHv/‖v‖² is name_curvature; nan for a vector of zeros. Returns numbers
    named as in measure/quantities.py: λ_max, the mean of the halves', each within 0.1 %, nan where ARPACK gives up (H
    zero or not finite); batch sharpness is nan if all gradients are zero. ValueError for fewer than two batches.
    """
    at, start = values(objective, halves), isotropic(objective.params, 1.0, generator)
    vectors, along = signs(objective.params, generator), along or {}
    forms = np.array([quadratic(objective, half, [*vectors, *along.values()]) for half in halves])
    traces = forms[:, : len(vectors)]
    displacements = (isotropic(objective.params, delta, generator) for _ in range(pairs))
    largest = [largest_eigenvalue(objective, half, start) for half in halves]
    found = {
        "probe_images": sum(map(images, halves)),
        **by_half("lambda_max", np.array(largest)),
        **estimate("hessian_trace", traces.mean(0)),
        **by_half("hessian_trace", traces.mean(1)),
        **estimate("average_sharpness", rises(objective, halves, at, displacements, mirrored=True).mean(1)),
        **batch_sharpness(objective, batches),
    }
    for (name, v), form in zip(along.items(), forms.mean(0)[len(vectors) :], strict=True):
        square = length(v) ** 2
        found[f"{name}_curvature"] = float(form) / square if square else float("nan")
    return found


def by_half(name: str, of_halves: np.ndarray) -> dict[str, float]:
    """The mean over the halves of the probe as `name`, and each of them as name_half1, name_half2."""
    each = {f"{name}_half{i}": float(value) for i, value in enumerate(of_halves, 1)}
    return {name: float(of_halves.mean())} | each


@contextmanager
def moved(objective: Objective, displacement: list[Tensor]) -> Iterator[None]:
    """The weights moved by `displacement` for a while."""
    held = [p.detach().clone() for p in objective.params]
    try:
        with torch.no_grad():
            torch._foreach_add_(objective.params, displacement)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(objective.params, held)


def values(objective: Objective, halves: Halves) -> np.ndarray:
    """f of each half of the probe at the present weights."""
    return np.array([objective.value(half) for half in halves])


def rises(
    objective: Objective,
    halves: Halves,
    at: np.ndarray,
    displacements: Iterable[list[Tensor]],
    mirrored: bool = False,
) -> np.ndarray:
    """f of each half beside the present weights, by each of the displacements, less `at`; (displacements, halves).

    mirrored: the mean of that and of the same for the mirror image. For a symmetric law the expectation is the same,
    without the noise that is linear in the displacement: in one direction of many, that is many times as large as what
    curvature adds.
    """

    def rise(displacement: list[Tensor]) -> np.ndarray:
        with moved(objective, displacement):
            return values(objective, halves) - at

    if mirrored:
        return np.array([(rise(v) + rise([-each for each in v])) / 2 for v in displacements])
    return np.array([rise(v) for v in displacements])


def hessian_product(objective: Objective, probe: list[Batch], v: list[Tensor]) -> list[Tensor]:
    """H v, H the Hessian of f."""
    n = images(probe)
    with objective.unchanged():
        total = [torch.zeros_like(p) for p in objective.params]
        for x, y in probe:
            objective.between(PRODUCT * len(y))
            product = _again(objective, _differentiable(objective, x, y), v)
            torch._foreach_add_(total, product, alpha=len(y) / n)
    return total


def quadratic(objective: Objective, probe: list[Batch], vectors: list[list[Tensor]]) -> np.ndarray:
    """vᵀHv for each of the vectors; (len(vectors),). Cheaper than as many products: the gradient is shared."""
    found, n = np.zeros(len(vectors)), images(probe)
    with objective.unchanged():
        for x, y in probe:
            gradients = _differentiable(objective, x, y)
            for i, v in enumerate(vectors):
                objective.between(QUADRATIC * len(y))
                found[i] += len(y) / n * dot(_again(objective, gradients, v, keep=True), v)
    return found


def _differentiable(objective: Objective, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of the loss of a batch, as something that can be differentiated once more."""
    with sdpa_kernel(SDPBackend.MATH):  # no other kernel of attention has a second derivative
        value = objective.loss(objective.model(x), y)
    return list(torch.autograd.grad(value, objective.params, create_graph=True, materialize_grads=True))


def _again(objective: Objective, gradients: list[Tensor], v: list[Tensor], keep: bool = False) -> list[Tensor]:
    """The gradient of gradientsᵀv. keep: for another v."""
    known = [(g, u) for g, u in zip(gradients, v, strict=True) if g.requires_grad]
    if not known:  # the loss is linear in the parameters
        return [torch.zeros_like(p) for p in objective.params]
    outputs, weights = zip(*known, strict=True)
    return list(torch.autograd.grad(outputs, objective.params, weights, retain_graph=keep, materialize_grads=True))


def largest_eigenvalue(objective: Objective, probe: list[Batch], start: list[Tensor]) -> float:
    """λ_max of the Hessian of f, by Lanczos from the vector `start`; nan as in `sharpness`."""
    params = objective.params
    sizes = [p.numel() for p in params]

    def multiply(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(v.reshape(-1)).split(sizes)
        shaped = [part.view(p.shape).to(p.device, p.dtype) for p, part in zip(params, parts, strict=True)]
        return _vector(hessian_product(objective, probe, shaped))

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
        bits = torch.randint(2, p.shape, generator=generator, device=generator.device)
        return (2.0 * bits - 1).to(p.device, p.dtype)

    return [[draw(p) for p in like] for _ in range(PROBES)]


def batch_sharpness(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """As `sharpness` has it: a ratio of two means; its standard error is that of the delta method."""
    pairs, sizes = [], set()
    with objective.unchanged():
        for x, y in refuse_copies(batches):
            objective.between(PRODUCT * len(y))
            sizes.add(len(y))
            gradients = _differentiable(objective, x, y)
            g = [each.detach() for each in gradients]
            pairs.append((dot(_again(objective, gradients, g), g), length(g) ** 2))
    if len(pairs) < 2 or len(sizes) > 1:
        raise ValueError(f"batch sharpness needs two or more batches of one size, got {len(pairs)} of {sorted(sizes)}")
    curvature, square = np.array(pairs).T
    if not square.any():
        return {"batch_sharpness": float("nan"), "batch_sharpness_se": float("nan")}
    ratio = curvature.mean() / square.mean()
    error = standard_error(curvature - ratio * square) / square.mean()
    return {"batch_sharpness": float(ratio), "batch_sharpness_se": float(error)}


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    """The inner product over all tensors together, in float64."""
    return sum((u.double() * v.double()).sum() for u, v in zip(a, b, strict=True)).item()


def _vector(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([t.reshape(-1) for t in tensors]).cpu().double().numpy()
