"""The command line: every flag, checked before anything slow or lasting happens. No torch."""

import argparse
import functools
import os
import re
from collections.abc import Callable

from combinations import check_injection, check_sampling
from converters import Parser, device, number, one_of, path, run_name
from datasets import DATASETS
from messages import UserError
from models import NETWORKS

ENDLESS = 2**62  # more steps than a run can make
EXIT_STATUS = {"finished": 0, "not_reached": 0, "diverged": 3}
FULL_GRAD_BATCHSIZE = 1000
PROBE_IMAGES = 2000
WANDB_MODES = ("online", "offline", "disabled")

# The optimizers of shb.py, each the class of that name in capitals, and the arguments of its class that have a flag.
# They are listed here because torch takes seconds to load.
OPTIMIZERS = {
    "sgd": {},
    "shb": {"momentum": "beta1"},
    "nshb": {"momentum": "beta1"},
    "qhm": {"momentum": "beta1", "nu": "nu"},
}

# What has no say in the result: where and how a run is made, and what is logged.
ADMINISTRATION = {
    *("device", "data_dir", "runs_dir", "name", "resume", "checkpoint_every"),
    *("wandb_entity", "wandb_project", "wandb_mode", "save_memory"),
}
ONE_MODE_ONLY = {
    "epochs": "normal",
    **dict.fromkeys(("eps", "min_epochs", "full_grad_every"), "critical"),
    **dict.fromkeys(("steps", "earlier_steps", "draws", "draw_batchsizes"), "sampling"),
    **dict.fromkeys(("measure_batchnorm", "shape", "exact_memory"), "sampling"),
    **dict.fromkeys(("smoothing", "sharpness", "probe_images"), "sampling"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py; its defaults are those of the authors' command line where they have the flag."""
    parser = Parser(
        prog="main.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Search direction noise and critical batch sizes of SGD with and without momentum.",
        epilog="In the names of flags, - and _ mean the same. Exit status: 0 finished, 3 diverged, 2 error, "
        "130 or 143 stopped with a checkpoint.",
    )
    _add_experiment(parser.add_argument_group("the experiment (paper, section 2)").add_argument)
    _add_machine(parser.add_argument_group("how it runs").add_argument)
    _add_record(parser.add_argument_group("the record").add_argument)
    return parser


POSITIVE = number(float, "a finite number above 0, at most 1e38", lambda v: 0 < v <= 1e38)
COUNT = number(int, "a whole number of at least 1", lambda v: 1 <= v < 2**53)
WHOLE = number(int, "a whole number of at least 0", lambda v: 0 <= v < 2**53)
SHARE = number(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)
LENGTH = number(float, "a finite number of at least 0, at most 1e38", lambda v: 0 <= v <= 1e38)
BETA = number(float, "a number from 0 up to, but not including, 1", lambda v: 0 <= v < 1)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63)
SECONDS = number(float, "a finite number of seconds of at least 0", lambda v: v >= 0)


def _add_experiment(add: Callable) -> None:
    add("--mode", **one_of("normal", "critical", "sampling"), default="normal", help="which of the three")
    add("--dataset", **one_of(*DATASETS), default="CIFAR100", help="digits needs no download")
    add("--model", **one_of(*NETWORKS), default="ResNet18", help="network")
    add("--optimizer", **one_of(*OPTIMIZERS), default="shb", help="search direction")
    add("--epochs", type=COUNT, default=200, metavar="N", help="normal: passes over the training images")
    add("--lr", type=POSITIVE, default=0.1, metavar="ETA", help="learning rate")
    add("--batchsize", type=COUNT, default=8, metavar="B", help="images a step")
    add("--beta1", type=BETA, default=0.9, metavar="BETA", help="momentum factor of shb, nshb and qhm")
    add("--nu", type=SHARE, default=0.5, help="qhm: weight of the momentum; 0 is sgd, 1 is nshb")
    injected = "adds isotropic Gaussian noise u, E‖u‖² = R², to every search direction (not with --compile)"
    add("--injected_noise", type=LENGTH, default=0.0, metavar="R", help=injected)
    add("--eps", type=POSITIVE, nargs="+", default=[0.5], help="critical: one or more thresholds")
    add("--min_epochs", type=WHOLE, default=11, metavar="N", help="critical: passes before the check starts")
    every = "critical: stop by ‖∇f‖ too, a full pass every E epochs; E = 1 doubles the cost"
    add("--full_grad_every", type=POSITIVE, metavar="E", help=every)
    add("--steps", type=WHOLE, nargs="+", default=[10_000], metavar="N", help="sampling: updates before a measurement")
    chunk = f"chunk of the full gradient, in images (default: {FULL_GRAD_BATCHSIZE}, or all if fewer)"
    add("--full_grad_batchsize", type=COUNT, default=argparse.SUPPRESS, metavar="B", help=chunk)
    add("--draws", type=WHOLE, default=0, metavar="M", help="sampling: further mini-batches, for the budget of ω")
    sizes = "sampling: batch sizes to draw beside that of training, for C²"
    add("--draw_batchsizes", type=COUNT, nargs="+", default=[], metavar="B", help=sizes)
    modes = "sampling: BatchNorm's mode in measuring, one or both"
    add("--measure_batchnorm", **one_of("train", "eval"), nargs="+", default=["train"], help=modes)
    add("--shape", action="store_true", help="sampling: normality, isotropy and tails of the draws")
    smoothing = "sampling: loss under the noise of P of the draws, and under as many Gaussian and isotropic controls"
    add("--smoothing", type=WHOLE, default=0, metavar="P", help=smoothing)
    add("--sharpness", action="store_true", help="sampling: λ_max, trace, average-direction and batch sharpness")
    probe = (
        f"sampling: images whose loss --smoothing and --sharpness look at (default: {PROBE_IMAGES}, or all if fewer)"
    )
    add("--probe_images", type=COUNT, default=argparse.SUPPRESS, metavar="N", help=probe)
    memory = "sampling: splits the memory exactly by the full gradients of the last K steps, each a full pass"
    add("--exact_memory", type=WHOLE, default=0, metavar="K", help=memory)
    add("--max_steps", type=COUNT, metavar="N", help="ends any mode after so many updates")
    add("--seed", type=SEED, default=0, help="of weights, shuffling, augmentation, measuring")


def _add_machine(add: Callable) -> None:
    precisions = (
        "default: PyTorch's, as the paper (TF32 convolutions on CUDA); ieee: float32 throughout; bf16: autocast"
    )
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--precision", **one_of("default", "ieee", "bf16"), default="default", help=precisions)
    add("--compile", action="store_true", help="CUDA: replay the step as one captured graph")
    add("--deterministic", action="store_true", help="CUDA: same seed, same bits, slower")
    add("--save_memory", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--data_dir", type=path, default="data", metavar="DIR", help="where the data sets are cached")


def _add_record(add: Callable) -> None:
    add("--runs_dir", type=path, default="runs", metavar="DIR", help="where runs are recorded")
    add("--name", type=run_name, help="directory of this run below runs_dir (default: made of its arguments)")
    add("--resume", action="store_true", help="go on from the newest good checkpoint; start if there is none")
    add("--checkpoint_every", type=SECONDS, default=300.0, metavar="SECONDS", help="between two checkpoints")
    add("--wandb_entity", type=run_name, default="XXXXXX", help="account to log to; XXXXXX: none, log offline")
    add("--wandb_project", type=run_name, default="role_of_momentum", help="project to log to")
    add("--wandb_mode", **one_of(*WANDB_MODES), help="default: WANDB_MODE, or by the entity")


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked arguments, `name` filled in. Raises UserError naming argument, value and what is allowed."""
    normalized = [
        re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word, flags=re.DOTALL) for word in argv
    ]
    args = build_parser().parse_args(normalized)
    images = DATASETS[args.dataset].train_images
    args.full_grad_batchsize = getattr(args, "full_grad_batchsize", default_chunk(args))
    args.probe_images = getattr(args, "probe_images", default_probe(args))
    relevant = result_arguments(args)
    for flag in ("batchsize", "full_grad_batchsize", "probe_images"):
        if flag in relevant and getattr(args, flag) > images:
            raise UserError(
                f"argument --{flag}: got {getattr(args, flag)}, allowed is at most the {images} training images "
                f"of {args.dataset}"
            )
    args.eps = sorted(set(args.eps), reverse=True)
    check_injection(args)
    check_sampling(args, images)
    args.wandb_mode = args.wandb_mode or _wandb_mode(args.wandb_entity)
    args.name = args.name or _default_name(args)
    return args


def _full_gradients(args: argparse.Namespace) -> bool:
    """Whether the run `args` measures full gradients."""
    return args.mode == "sampling" or (args.mode == "critical" and args.full_grad_every is not None)


def default_probe(args: argparse.Namespace) -> int:
    """Images to look at the loss of where no number is given."""
    return min(PROBE_IMAGES, DATASETS[args.dataset].train_images)


def default_chunk(args: argparse.Namespace) -> int:
    """Images in a chunk of the full gradient where none is given: as the paper's, or all of a smaller data set."""
    return min(FULL_GRAD_BATCHSIZE, DATASETS[args.dataset].train_images)


def _wandb_mode(entity: str) -> str:
    given = os.environ.get("WANDB_MODE") or ("offline" if entity == "XXXXXX" else "online")
    mode = {"dryrun": "offline", "run": "online"}.get(given, given)  # wandb's older names
    if mode not in WANDB_MODES:
        raise UserError(f"argument --wandb_mode: the variable WANDB_MODE is {given!r}, allowed are {WANDB_MODES}")
    return mode


def _default_name(args: argparse.Namespace) -> str:
    """What makes the result, the usual only by its value, the rest only where it is not the default.

    Not so ε, and the cap of `critical`: more of them can be added to one and the same run.
    """
    relevant = result_arguments(args)
    usual = ("mode", "dataset", "model", "optimizer", "batchsize", "lr", "beta1", "nu", "seed")
    added_later = ("eps", "max_steps") if args.mode == "critical" else ()
    parts = [args.mode, args.dataset, args.model, args.optimizer, f"b{args.batchsize}", f"lr{_short(args.lr)}"]
    parts += [f"beta{_short(args.beta1)}"] if "beta1" in relevant else []
    parts += [f"nu{_short(args.nu)}"] if "nu" in relevant else []
    usual_values = defaults() | {"full_grad_batchsize": default_chunk(args), "steps": 10_000, "earlier_steps": []}
    usual_values["probe_images"] = default_probe(args)
    for key, value in relevant.items():
        if key not in (*usual, *added_later) and value != usual_values[key]:
            text = "+".join(map(str, value)) if isinstance(value, list) else value
            text = _short(value) if isinstance(value, float) else text
            parts.append(key if value is True else f"{key}{text}")
    return "-".join([*parts, f"seed{args.seed}"])


@functools.cache
def defaults() -> dict:
    """Every argument as it is where it is not given."""
    return vars(build_parser().parse_args([]))


def _short(value: float) -> str:
    """The shortest text that is `value` again, 1 and not 1.0."""
    return repr(value).removesuffix(".0")


def result_arguments(args: argparse.Namespace) -> dict:
    """The arguments that have a say in what the run `args` computes: none of other modes, no β for SGD."""
    left_out = {key for key, mode in ONE_MODE_ONLY.items() if mode != args.mode} | ADMINISTRATION
    if not _full_gradients(args):
        left_out.add("full_grad_batchsize")
    if not (args.smoothing or args.sharpness):
        left_out.add("probe_images")
    for flags in OPTIMIZERS.values():
        left_out |= set(flags.values()) - set(OPTIMIZERS[args.optimizer].values())
    return {key: value for key, value in vars(args).items() if key not in left_out}


def planned_steps(args: argparse.Namespace) -> int:
    """The updates after which a run ends at the latest; ENDLESS for `critical` without --max_steps."""
    own = {"normal": args.epochs * steps_per_epoch(args), "critical": ENDLESS, "sampling": args.steps}[args.mode]
    return min(own, args.max_steps or ENDLESS)


def steps_per_epoch(args: argparse.Namespace) -> int:
    """Updates in one pass over the training images, the partial last batch included."""
    return -(-DATASETS[args.dataset].train_images // args.batchsize)
