"""What `--mode sampling` measures at one step: rows of measurements, shape and landscape.csv (docs/measuring.md)."""

from argparse import Namespace
from collections.abc import Callable
from itertools import groupby

import numpy as np
from torch import Tensor

import landscape
from arguments import OPTIMIZERS, planned_steps
from measure.draws import augmentation, flat
from measure.gradients import full_gradient, trained
from measure.noise import batch_noise, budget
from measure.optimizers import ExactMemory, affine
from measure.shape import shape
from progress import Progress
from training import Training

# The columns of measurements.csv between batch_size and accuracy; without --draws, only those of one draw are known.
OF_TRAINING = ("noise_norm", "memory_noise_frozen", "staleness")  # say nothing of another batch size
HEAD = ("steps", "batchnorm", "batch_size")
BUDGET = (
    *("draws", "full_gradient_norm", "noise_norm", "noise_square", "delta", "delta_se"),
    *("delta_renamed", "delta_renamed_se", "fresh", "memory", "injected"),
    *("memory_noise_frozen", "staleness", "variance", "variance_se", "c_squared", "c_squared_se", "batchnorm_bias"),
    *("noise_scale", "largest_gradient_norm"),
)


def measured_steps(args: Namespace) -> set[int]:
    """The steps to measure at: those of --steps that the run reaches, and its last."""
    last = planned_steps(args)
    return {step for step in args.earlier_steps if step < last} | {last}


class Shadow:
    """Under --exact_memory K, feeds an ExactMemory with the full gradients of the K steps before a measured one."""

    def __init__(self, run: Training, at: set[int]):
        self.run, self.at, self.memory = run, at, ExactMemory(run.model, run.optimizer)
        run.before_step, run.attached["exact_memory"] = self.before_step, self
        self.load_state_dict(run.attached_state.get("exact_memory"))

    def before_step(self) -> None:
        """Take in ∇f(x_k) before the update that leaves x_k, if the next measured step is near."""
        run, wanted = self.run, self.run.args.exact_memory
        ahead = min((step - run.step for step in self.at if step > run.step), default=wanted + 1)
        if ahead > wanted:
            return
        if ahead == wanted:
            self.memory = ExactMemory(run.model, run.optimizer)
        chunks = run.data.full_pass(run.step, run.args.full_grad_batchsize)
        with run.autocast():
            self.memory.add(full_gradient(run.model, chunks, run.data.size, run.check_signals))

    def state_dict(self) -> dict:
        """For checkpoints."""
        return self.memory.shadow.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        """Go back to where `state_dict` was called."""
        if state:
            self.memory.shadow.load_state_dict(state)


def measure_step(run: Training, shadow: Shadow | None) -> tuple[dict, dict]:
    """Measure all that the arguments ask for at the present x_t, and keep it. What is not finite is a divergence.

    Returns the results for the summary, those of the training batch's own ω, and under --draws its budget; and what
    the dashboard shows. Both are empty after a divergence.
    """
    args, results, rows, shapes, landscapes = run.args, {}, [], [], []
    accuracy, test_loss = run.evaluate()
    progress = Progress(run, images(run))
    try:
        for batchnorm in args.measure_batchnorm:
            numbers, full = measure_batch(run, batchnorm, progress)
            if not np.isfinite(numbers["noise_norm"]):
                run.stop("diverged", run.step + 1)
                return {}, {}
            results = results or numbers
            more = measure_more(run, batchnorm, full, shadow, progress)
            head, kept = {"steps": run.step, "batchnorm": batchnorm}, []
            for b in sizes(args):
                keep = kept.append if (args.shape or args.smoothing) and b == args.batchsize else None
                known = (
                    measure_draws(run, batchnorm, full, b, keep, progress) if args.draws else one_draw(args, numbers)
                )
                if b != args.batchsize:
                    known |= dict.fromkeys(OF_TRAINING)
                row = head | {"batch_size": b} | {key: known.get(key) for key in BUDGET} | more
                rows.append(row | {"accuracy": accuracy, "test_loss": test_loss})
            if args.shape:
                shapes += [head | row for row in shape_rows(run, kept, full, progress)]
            if args.smoothing or args.sharpness:
                delta = [row["delta"] for row in rows if row["batch_size"] == args.batchsize][-1]
                landscapes.append(head | landscape.measure(run, batchnorm, full, kept, delta, progress))
    finally:
        progress.bar.close()
    for file, found in (("measurements", rows), ("shape", shapes), ("landscape", landscapes)):
        run.record.append(getattr(run.record, file), found)
    if args.draws:
        results["budget"] = next(row for row in rows if row["batch_size"] == args.batchsize)
    if landscapes:
        results["landscape"] = landscapes[0]
    return results, shown(args, rows, shapes, landscapes)


def shown(args: Namespace, rows: list[dict], shapes: list[dict], landscapes: list[dict]) -> dict:
    """The rows as one of the dashboard's, in groups: noise/…, variance/…, shape/…, smoothing/…, sharpness/….

    Those of a second BatchNorm mode have groups of their own: noise_eval/…
    """
    found, second = {}, {mode: f"_{mode}" for mode in args.measure_batchnorm[1:]}
    for row in rows:
        mode = second.get(row["batchnorm"], "")
        if row["batch_size"] == args.batchsize:
            found |= {f"noise{mode}/{key}": row[key] for key in row if key not in HEAD and row[key] is not None}
        if args.draws:
            found |= {f"variance{mode}/{key}_b{row['batch_size']}": row[key] for key in ("variance", "c_squared")}
    for row in shapes:
        mode = second.get(row["batchnorm"], "")
        if row["layer"] == "all":
            found |= {f"shape{mode}/{key}": row[key] for key in row if key not in (*HEAD, "layer")}
    for row in landscapes:
        for group, keys in landscape.GROUPS.items():
            found |= {f"{group}{second.get(row['batchnorm'], '')}/{key}": row[key] for key in keys if key in row}
    return found


def sizes(args: Namespace) -> list[int]:
    """The batch sizes that are drawn: that of training, and those of --draw_batchsizes."""
    return sorted({args.batchsize, *args.draw_batchsizes})


def augmentation_pairs(run: Training) -> int:
    """How many pairs of batches tell augmentation's part of the variance: one for four draws of --draw_batchsizes."""
    return run.args.draws // 4 if run.args.draw_batchsizes and run.data.spec.augmented else 0


def images(run: Training) -> int:
    """How many images a measurement takes forward and backward, but for its first batch and the test images."""
    drawn = run.args.draws * sum(sizes(run.args)) + 2 * augmentation_pairs(run) * run.args.batchsize
    return len(run.args.measure_batchnorm) * (run.data.size + drawn + landscape.images(run.args))


def measure_batch(run: Training, batchnorm: str, progress: Progress) -> tuple[dict, list[Tensor]]:
    """The numbers of ω_t of the batch that training takes next, and ∇f; ω itself is kept at the run's last step."""
    args, training = run.args, batchnorm == "train"
    chunks = run.data.full_pass(run.step, args.full_grad_batchsize)
    between = progress.chunks_of(args.full_grad_batchsize)
    with run.autocast():
        full = full_gradient(run.model, chunks, run.data.size, between, training=training)
        batch = run.next_batch()
        numbers, omega = batch_noise(run.model, run.optimizer, batch, full, training=training, **of_run(run))
    last = run.step == planned_steps(args) and batchnorm == args.measure_batchnorm[0]
    if last and np.isfinite(numbers["noise_norm"]):
        run.record.save_omega(omega.numpy(), run.step)
    return numbers, full


def of_run(run: Training) -> dict:
    """What measure.noise must know of a run: its injected noise, and its other name (measure.md, section 7).

    SHB at η is NSHB at η/(1 − β): one trajectory, to which the paper's definition gives two δ.
    """
    beta = run.args.beta1
    renamed = {"shb": 1 / (1 - beta), "nshb": 1 - beta}.get(run.args.optimizer)
    return {"injected": run.args.injected_noise, "generator": run.noise_generator, "renamed": renamed}


def one_draw(args: Namespace, numbers: dict) -> dict:
    """What measurements.csv holds without --draws: of the training batch alone."""
    known = ("full_gradient_norm", "noise_norm", "delta", "delta_renamed")
    return {"draws": 0, "injected": args.injected_noise**2} | {key: numbers.get(key) for key in known}


def measure_draws(
    run: Training, batchnorm: str, full: list[Tensor], b: int, keep: Callable | None, progress: Progress
) -> dict:
    """The budget of ω_t over --draws batches of b images. keep: as `measure.noise.budget` takes it."""
    draws = run.data.draws(run.step, b, run.args.draws)
    between, training = progress.chunks_of(b), batchnorm == "train"
    with run.autocast():
        return budget(
            run.model,
            run.optimizer,
            run.next_batch(),
            full,
            draws,
            run.data.size,
            training=training,
            between=between,
            keep=keep,
            **of_run(run),
        )


def measure_more(
    run: Training, batchnorm: str, full: list[Tensor], shadow: Shadow | None, progress: Progress
) -> dict[str, float | None]:
    """Augmentation's part of the variance at the batch size of training, and the exact split of the memory."""
    more, pairs, training = {}, augmentation_pairs(run), batchnorm == "train"
    if pairs:
        between = progress.chunks_of(2 * run.args.batchsize)
        batches = run.data.augmented_pairs(run.step, run.args.batchsize, pairs)
        with run.autocast():
            more |= augmentation(run.model, batches, training=training, between=between)
    if shadow:
        split = shadow.memory.split(full)
        more |= split if training else dict.fromkeys(split)  # its full gradients are those of training mode
    return more


def shape_rows(run: Training, kept: list[Tensor], full: list[Tensor], progress: Progress) -> list[dict]:
    """The shape of the noise over the draws `kept`: a row for the whole vector, and one for each layer."""
    named = [(name.rpartition(".")[0], p) for name, p in run.model.named_parameters() if p.requires_grad]
    layers = {layer: sum(p.numel() for _, p in group) for layer, group in groupby(named, key=lambda pair: pair[0])}
    directions = {}
    if OPTIMIZERS[run.args.optimizer]:  # SGD has no memory
        _, memory = affine(run.optimizer, trained(run.model))
        directions["memory"] = flat(memory)
    found = shape(kept, flat(full), directions, layers, progress.chunks_of(0))
    return [{"layer": layer} | numbers for layer, numbers in found.items()]
