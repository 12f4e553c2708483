"""What `--smoothing` and `--sharpness` measure at one step: a row of landscape.csv (docs/measuring.md)."""

from argparse import Namespace

from torch import Tensor

from data import PROBING, SMOOTHING
from measure.sharpness import PROBES, PRODUCT, QUADRATIC, VALUE, Landscape, sharpness
from measure.smoothing import smoothing
from progress import Progress
from training import Training

CHUNK = 250  # probe images at once: a product with the Hessian holds several times what a gradient does
BATCHES = 32  # mini-batches for batch sharpness; points for average-direction sharpness, in mirrored pairs
PRODUCTS = 30  # with the Hessian until λ_max is known, about
KINDS = ("excess", "real", "gaussian", "isotropic", "predicted", "predicted_isotropic")
SHARPNESS = ("lambda_max", "trace", "trace_se", "average_sharpness", "average_sharpness_se")
SHARPNESS += ("batch_sharpness", "batch_sharpness_se")
# The columns of landscape.csv, by their groups in the dashboard. What is not asked for is empty.
GROUPS = {
    "smoothing": (
        *("points", "loss_x", "loss_y", "loss_z", "displacement"),
        *(f"{kind}{error}" for kind in KINDS for error in ("", "_se")),
        "fluctuation_norm",
    ),
    "sharpness": SHARPNESS,
}


def images(args: Namespace) -> int:
    """What a row costs in images, forward and backward."""
    probe, cost = args.probe_images, 0.0
    if args.smoothing:
        cost += probe * (VALUE * 3 * (args.smoothing + 1) + QUADRATIC * (args.draws // 2 + PROBES))
    if args.sharpness:
        cost += probe * (VALUE * (BATCHES + 1) + QUADRATIC * PROBES + PRODUCT * PRODUCTS)
        cost += PRODUCT * BATCHES * args.batchsize
    return round(cost)


def measure(
    run: Training, batchnorm: str, full: list[Tensor], draws: list[Tensor], delta: float, progress: Progress
) -> dict:
    """The row, but for its step and mode. draws: gradients, as `measure.noise.budget` keeps them. delta: measured δ.

    The loss is that of --probe_images training images, in chunks of CHUNK, in BatchNorm's mode `batchnorm`.
    """
    args, probe = run.args, list(run.data.probe(run.args.probe_images, CHUNK))
    f = Landscape(run.model, probe, training=batchnorm == "train", between=progress.before)
    row = {"probe_images": args.probe_images} | {key: None for keys in GROUPS.values() for key in keys}
    # Not under autocast: bfloat16 rounds the loss by tens of times what isotropic noise does to it.
    if args.smoothing:
        generator = run.data.generator(SMOOTHING, run.step)
        row |= smoothing(f, run.optimizer, full, draws, args.smoothing, generator, args.injected_noise)
    if args.sharpness:
        batches = run.data.draws(run.step, args.batchsize, BATCHES)
        row |= sharpness(f, batches, delta, BATCHES // 2, run.data.generator(PROBING, run.step))
    return row
