"""The command line: every flag, checked before anything slow or lasting happens. No torch."""

import argparse
import functools
import os
import re
from argparse import Namespace
from collections.abc import Callable

import models
from datasets import DATASETS
from models import NETWORKS
from utils import Parser, UserError, number, one_of, path

ENDLESS = 2**62  # more steps than a run can make
EXIT_STATUS = {"finished": 0, "not_reached": 0, "diverged": 3}
MODES = ("normal", "critical", "sampling")
INJECTED = ("covariance", "isotropic")
MEASURES = ("noise", "shape", "smoothing", "sharpness")
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

# What never affects a result: where and how a run is made, and what is logged.
ADMINISTRATION = {
    *("device", "data_dir", "runs_dir", "name", "resume", "checkpoint_every"),
    *("wandb_entity", "wandb_project", "wandb_mode", "save_memory"),
}
OF_MODE = {
    **dict.fromkeys(("epochs", "until_loss", "recalibrate"), "normal"),
    **dict.fromkeys(("eps", "min_epochs"), "critical"),
    "steps": "sampling",
}
OF_MEASURING = ("measure", "draws", "draw_batchsizes", "measure_batchnorm", "full_grad_batchsize", "exact_memory")


def matching(pattern: str, allowed: str) -> Callable:
    """A converter for argparse of texts that match a pattern."""

    def convert(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, allowed are {allowed}")
        return text

    return convert


NAME_ALLOWED = "up to 128 of the characters A-Z a-z 0-9 _ . , = + - with a letter, digit or _ in front"
NAME = matching(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,127}", NAME_ALLOWED)
DEVICES = "auto, cpu, cuda, cuda:0, cuda:1, … (mps has no float64, in which norms are summed)"
DEVICE = matching(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?", DEVICES)
POSITIVE = number(float, "a finite number above 0, at most 1e38", lambda v: 0 < v <= 1e38)
COUNT = number(int, "a whole number of at least 1", lambda v: 1 <= v < 2**53)
WHOLE = number(int, "a whole number of at least 0", lambda v: 0 <= v < 2**53)
DRAWS = number(int, "a whole number of at least 2", lambda v: 2 <= v < 2**53)
SHARE = number(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)
BETA = number(float, "a number from 0 up to, but not including, 1", lambda v: 0 <= v < 1)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63)
SECONDS = number(float, "a finite number of seconds of at least 0", lambda v: v >= 0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py; the defaults are the paper's."""
    parser = Parser(
        prog="main.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Search direction noise and critical batch sizes of SGD with and without momentum.",
        epilog="In the names of flags, - and _ mean the same. Exit status: 0 finished, 3 diverged, 2 error, "
        "129, 130 or 143 stopped with a checkpoint.",
    )
    add = parser.add_argument_group("the experiment (paper, section 2)").add_argument
    add("--mode", **one_of(*MODES), default="normal", help="which of the three experiments")
    add("--dataset", **one_of(*DATASETS), default="CIFAR100", help="mnist1d and digits need no download")
    add("--model", **one_of(*NETWORKS), default="ResNet18", help="network")
    add("--optimizer", **one_of(*OPTIMIZERS), default="shb", help="search direction")
    add("--epochs", type=COUNT, default=200, metavar="N", help="normal: passes over the training data")
    add("--until_loss", type=POSITIVE, metavar="L", help="normal: end after the first epoch with mean loss below L")
    add("--lr", type=POSITIVE, default=0.1, metavar="ETA", help="learning rate")
    add("--batchsize", type=COUNT, default=8, metavar="B", help="images a step")
    add("--beta1", type=BETA, default=0.9, metavar="BETA", help="momentum factor of shb, nshb and qhm")
    add("--nu", type=SHARE, default=0.5, help="qhm: weight of the momentum; 0 is sgd, 1 is nshb")
    add("--inject", **one_of(*INJECTED), help="adds noise as that of batches of --inject_batchsize, or isotropic")
    add("--inject_batchsize", type=COUNT, metavar="B", help="smaller than --batchsize")
    add("--eps", type=POSITIVE, nargs="+", default=[0.5], help="critical: one or more thresholds")
    add("--min_epochs", type=WHOLE, default=11, metavar="N", help="critical: passes before the check starts")
    add("--steps", type=WHOLE, nargs="+", default=[10_000], metavar="N", help="sampling: updates before a measurement")
    add("--max_steps", type=COUNT, metavar="N", help="ends any mode after so many updates")
    add("--seed", type=SEED, default=0, help="of weights, shuffling, augmentation, measuring")

    add = parser.add_argument_group("what is measured").add_argument
    add("--measure_every", type=POSITIVE, metavar="E", help="measure ω first, once in every E epochs, and at the end")
    add("--measure", **one_of(*MEASURES), nargs="+", default=[], help="beyond the paper's ω of one mini-batch")
    draws = "mini-batches for --measure (default: 32, or 64 for shape); alone it means --measure noise"
    add("--draws", type=DRAWS, default=argparse.SUPPRESS, metavar="M", help=draws)
    add("--draw_batchsizes", type=COUNT, nargs="+", default=[], metavar="B", help="more batch sizes to draw, for C²")
    add("--measure_batchnorm", **one_of("train", "eval"), nargs="+", default=["train"], help="BatchNorm's modes")
    chunk = f"chunk of the full gradient, in images (default: {FULL_GRAD_BATCHSIZE}, or all if fewer)"
    add("--full_grad_batchsize", type=COUNT, default=argparse.SUPPRESS, metavar="B", help=chunk)
    probe = f"images whose loss smoothing and sharpness look at (default: {PROBE_IMAGES}, or all if fewer)"
    add("--probe_images", type=DRAWS, default=argparse.SUPPRESS, metavar="N", help=probe)
    add("--recalibrate", action="store_true", help="normal: also test with BatchNorm's statistics recomputed")
    memory = "splits the memory by the full gradients of the last K steps, each a full pass"
    add("--exact_memory", type=WHOLE, default=0, metavar="K", help=memory)
    _add_running(parser)
    return parser


def _add_running(parser: Parser) -> None:
    add = parser.add_argument_group("how it runs").add_argument
    precisions = "default: PyTorch's, as the paper (TF32 on CUDA); ieee: float32 throughout; bf16: autocast"
    add("--device", type=DEVICE, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--precision", **one_of("default", "ieee", "bf16"), default="default", help=precisions)
    add("--cuda_graph", action="store_true", help="CUDA: replay the step as one captured graph")
    add("--deterministic", action="store_true", help="CUDA: same seed, same bits, slower")
    add("--save_memory", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--data_dir", type=path, default="data", metavar="DIR", help="where the data sets are cached")

    add = parser.add_argument_group("the record").add_argument
    add("--runs_dir", type=path, default="runs", metavar="DIR", help="where runs are recorded")
    add("--name", type=NAME, help="directory of this run below runs_dir (default: made of its arguments)")
    add("--resume", action="store_true", help="go on from the newest good checkpoint; start if there is none")
    add("--checkpoint_every", type=SECONDS, default=300.0, metavar="SECONDS", help="between two checkpoints")
    add("--wandb_entity", type=NAME, default="XXXXXX", help="account to log to; XXXXXX: none, log offline")
    add("--wandb_project", type=NAME, default="role_of_momentum", help="project to log to")
    add("--wandb_mode", **one_of(*WANDB_MODES), help="default: WANDB_MODE, or by the entity")


@functools.cache
def defaults() -> dict:
    """Every argument as it is where it is not given."""
    return vars(build_parser().parse_args([]))


def parse(argv: list[str]) -> Namespace:
    """The checked arguments, `name` filled in. UserError names the argument, what was given and what is allowed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {word[2:].partition("=")[0] for word in parser.given if word.startswith("--")}
    for flag in ("steps", "draw_batchsizes", "measure_batchnorm", "measure"):
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            raise UserError(f"argument --{flag}: got {_words(values)}, allowed is each value once")
    if args.measure or hasattr(args, "draws"):
        args.measure = [name for name in MEASURES if name == "noise" or name in args.measure]
    for flag, value in dependent_defaults(args).items():
        setattr(args, flag, getattr(args, flag, value))
    args.eps = sorted(set(args.eps), reverse=True)
    args.steps.sort()
    args.draw_batchsizes.sort()
    unused = unaffected(args)
    for flag in sorted(given & unused.keys()):
        raise UserError(f"argument --{flag}: got {_words(getattr(args, flag))}, but {unused[flag]}")
    _check(args)
    args.wandb_mode = args.wandb_mode or _wandb_mode(args.wandb_entity)
    args.name = args.name or _default_name(args)
    return args


def dependent_defaults(args: Namespace) -> dict:
    """The defaults that depend on other arguments: the paper's, but of images no more than there are."""
    images = DATASETS[args.dataset].train_images
    draws = 64 if "shape" in args.measure else 32 if args.measure else 1
    limited = {"full_grad_batchsize": FULL_GRAD_BATCHSIZE, "probe_images": PROBE_IMAGES}
    return {"draws": draws} | {flag: min(usual, images) for flag, usual in limited.items()}


def measures(args: Namespace) -> bool:
    """Whether the run `args` measures ω at all."""
    return args.mode == "sampling" or args.measure_every is not None


def unaffected(args: Namespace) -> dict[str, str]:
    """The flags that do not affect the run `args`, each with the reason."""
    unused = {flag: f"only --mode {mode} uses it" for flag, mode in OF_MODE.items() if mode != args.mode}
    if not args.inject:
        unused["inject_batchsize"] = "only --inject uses it"
    if args.mode == "sampling":
        unused["measure_every"] = "--mode sampling measures at --steps"
    if not set(args.measure) & {"smoothing", "sharpness"}:
        unused["probe_images"] = "only --measure smoothing or sharpness uses it"
    if not args.measure:
        unused["draw_batchsizes"] = "only --measure noise, or --draws, uses it"
    if not measures(args):
        unused |= dict.fromkeys((*OF_MEASURING, "probe_images"), f"--mode {args.mode} measures with --measure_every")
    own = set(OPTIMIZERS[args.optimizer].values())
    for flags in OPTIMIZERS.values():
        unused |= {flag: f"--optimizer {args.optimizer} does not use it" for flag in set(flags.values()) - own}
    return unused


def _check(args: Namespace) -> None:
    spec = DATASETS[args.dataset]
    if not models.takes(args.model, spec.shape):
        fitting = ", ".join(name for name in NETWORKS if models.takes(name, spec.shape))
        raise UserError(f"argument --model: got {args.model}, allowed with --dataset {args.dataset} are {fitting}")
    relevant = result_arguments(args)
    sizes = [(flag, getattr(args, flag)) for flag in ("batchsize", "full_grad_batchsize", "probe_images")]
    for flag, size in sizes + [("draw_batchsizes", size) for size in args.draw_batchsizes]:
        if flag in relevant and size > spec.train_images:
            allowed = f"at most the {spec.train_images} training images of {args.dataset}"
            raise UserError(f"argument --{flag}: got {size}, allowed is {allowed}")
    if args.inject and not 0 < (args.inject_batchsize or 0) < args.batchsize:
        allowed = f"1 to {args.batchsize - 1}, fewer images than --batchsize"
        raise UserError(f"argument --inject_batchsize: got {args.inject_batchsize}, allowed is {allowed}")
    if args.cuda_graph and args.inject:
        raise UserError(f"argument --inject: got {args.inject}, but a graph (--cuda_graph) cannot draw at each step")
    if args.draws < 4 and set(args.measure) & {"shape", "smoothing"}:
        raise UserError(f"argument --draws: got {args.draws}, allowed is 4 and more with shape or smoothing")


def _wandb_mode(entity: str) -> str:
    given = os.environ.get("WANDB_MODE") or ("offline" if entity == "XXXXXX" else "online")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):  # as transformers have taught people
        given = "disabled"
    if given not in WANDB_MODES:
        raise UserError(f"argument --wandb_mode: the variable WANDB_MODE is {given!r}, allowed are {WANDB_MODES}")
    return given


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def result_arguments(args: Namespace) -> dict:
    """The arguments that affect what the run `args` computes: none of other modes, no β for SGD."""
    unused = unaffected(args).keys() | ADMINISTRATION
    return {key: value for key, value in vars(args).items() if key not in unused}


def _default_name(args: Namespace) -> str:
    """The usual settings by their values; the others that affect the result only where they are not the default.

    Not ε, nor the cap of `critical`: more of them can be asked for later of the same run.
    """
    relevant, default = result_arguments(args), defaults() | dependent_defaults(args)
    usual = dict.fromkeys(("mode", "dataset", "model", "optimizer"), "")
    usual |= {"batchsize": "b", "lr": "lr", "beta1": "beta", "nu": "nu"}
    parts = [label + _short(relevant[key]) for key, label in usual.items() if key in relevant]
    added_later = ("eps", "max_steps") if args.mode == "critical" else ()
    for key in (action.dest for action in build_parser()._actions if action.dest in relevant):
        value = relevant[key]
        if key not in (*usual, *added_later, "seed") and value != default[key]:
            parts.append(key if value is True else f"{key}{_short(value)}")
    return "-".join([*parts, f"seed{args.seed}"])


def _short(value) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text


def planned_steps(args: Namespace) -> int:
    """The updates after which a run ends at the latest; ENDLESS for `critical` without --max_steps."""
    own = {"normal": args.epochs * steps_per_epoch(args), "critical": ENDLESS, "sampling": args.steps[-1]}[args.mode]
    return min(own, args.max_steps or ENDLESS)


def lagging(model: str, steps: float) -> str:
    """What to say of the test accuracy of a network after so few updates; empty where there is nothing to say."""
    late = steps < 100 and model not in models.WITHOUT_BATCHNORM
    return "may be low: BatchNorm's averages lag in the first 100 updates" if late else ""


def steps_per_epoch(args: Namespace) -> int:
    """Updates in one pass over the training data, the partial last batch included."""
    return -(-DATASETS[args.dataset].train_images // args.batchsize)
