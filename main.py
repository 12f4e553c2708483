"""The paper's three experiments: `python main.py --mode normal|critical|sampling`.

normal    train, and measure the test accuracy every epoch
critical  count the steps until the running mean of the gradient norm is at most ε
sampling  after some steps, measure the search direction noise ω_t = d_t − ∇f(x_t)

`python main.py --help` lists the arguments, README.md says what a run leaves behind.
"""

import signal
import sys
from argparse import Namespace

from arguments import EXIT_STATUS, UserError, parse, planned_steps, run_state, say, usable_streams

if __name__ == "__main__":  # before torch is loaded: a typo is answered at once
    usable_streams()
    try:
        ARGS = parse(sys.argv[1:])
        if ARGS.print_name:
            print(run_state(ARGS), ARGS.runs_dir / ARGS.name)
            sys.exit(0)
    except (UserError, OSError) as error:
        say("error", error)
        sys.exit(2)
    if (HANDLER := signal.getsignal(signal.SIGINT)) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
from noise import measure, unchanged
from record import Record
from theory import first_crossing
from training import Training
from utils import Signals, Stopped, out_of_memory, pick_device, set_up


def normal(run: Training) -> dict:
    """Train for --epochs; after each, measure the test accuracy. Accuracies are in percent."""
    results = run.results
    run.last = planned_steps(run.args)
    for window in run.windows():
        epoch_over = (run.step % run.steps_per_epoch == 0 or run.step == run.last) and not run.diverged_at
        if epoch_over:
            accuracy, test_loss = evaluate(run)
            if not np.isfinite(test_loss):
                run.diverged_at, epoch_over = run.step + 1, False
        epoch = run.sums.setdefault("epoch", dict.fromkeys(("steps", "images", "loss", "hits", "norm", "max"), 0))
        run.count(window)
        epoch["steps"] += len(window.steps)
        epoch["images"] += int(window.sizes.sum())
        epoch["loss"] += float(window.losses @ window.sizes)
        epoch["hits"] += float(window.hits.sum())
        epoch["norm"] += float(window.norms.sum())
        epoch["max"] = max(epoch["max"], float(window.norms.max()))
        if epoch_over:
            row = {
                "training_loss": epoch["loss"] / epoch["images"],
                "training_acc": 100 * epoch["hits"] / epoch["images"],
                "test_loss": test_loss,
                "accuracy": accuracy,
            }
            results |= row | {"best_accuracy": max(accuracy, results.get("best_accuracy", 0.0))}
            run.log(row | {"g-norm": epoch["norm"] / epoch["steps"], "max_g-norm": epoch["max"]})
            del run.sums["epoch"]
    names = ("accuracy", "best_accuracy", "training_acc", "training_loss", "test_loss")
    return {name: results.get(name) for name in names}


def critical(run: Training) -> dict:
    """Train until the running mean of ‖g_t‖ over all steps so far has been at most every ε.

    The device is read only now and then, so the loop runs a little past that step, but the record ends with it.
    """
    args, first_check = run.args, max(1, run.args.min_epochs * run.steps_per_epoch)
    reached = run.results["steps_to_eps"] = reached_before(run, first_check)
    run.last = planned_steps(args) if None in reached.values() else run.step
    for window in run.windows():
        means = run.running_sums(window) / window.steps
        for eps in args.eps:
            if reached[repr(eps)] is None:
                reached[repr(eps)] = first_crossing(means, int(window.steps[0]), eps, first_check)
        if None not in reached.values():
            run.save()
            run.last, run.diverged_at = run.step, None
            window = window.until(max(reached.values()))
        run.count(window)
        run.record.append_norms(window.norms)
        run.log_window(window)
    sfo = {eps: None if steps is None else steps * args.batchsize for eps, steps in reached.items()}
    bounds = [eps for eps, steps in reached.items() if steps == first_check > 1]
    return {"steps_to_eps": reached, "sfo": sfo, "at_first_check": bounds}


def reached_before(run: Training, first_check: int) -> dict[str, int | None]:
    """The steps to every ε as far as the run has come; one that is new to it is looked for in its history."""
    known = run.results.get("steps_to_eps", {})
    new = [eps for eps in run.args.eps if repr(eps) not in known]
    if new:
        norms = run.record.history.read()
        means = np.cumsum(norms, dtype=np.float64) / np.arange(1, len(norms) + 1)
        known = known | {repr(eps): first_crossing(means, 1, eps, first_check) for eps in new}
    return {repr(eps): known[repr(eps)] for eps in run.args.eps}


def sampling(run: Training) -> dict:
    """Train for --steps, then measure ω_t on the next mini-batch, before its update."""
    run.last = planned_steps(run.args)
    numbers = measure_noise(run) if run.last == 0 else {}
    for window in run.windows():
        if run.step == run.last and not run.diverged_at:
            numbers = measure_noise(run)
        run.count(window)
        run.log_window(window)
    return numbers


def measure_noise(run: Training) -> dict:
    """Measure ω_t at the present x_t and keep it; what is not finite is a divergence, and gives no numbers."""
    epoch, start = divmod(run.step, run.steps_per_epoch)
    batch = next(run.data.epoch(epoch, run.args.batchsize, start))
    with run.autocast():
        numbers, omega = measure(
            run.model,
            run.optimizer,
            batch,
            run.data,
            run.step,
            run.args.full_grad_batchsize,
            run.check_signals,
        )
    if not np.isfinite(numbers["noise_norm"]):
        run.diverged_at = run.step + 1
        return {}
    run.record.save_omega(omega.numpy(), run.step)
    return numbers


@torch.no_grad()
def evaluate(run: Training) -> tuple[float, float]:
    """Accuracy in percent and mean loss over the test images, in evaluation mode; reads the device once."""
    totals = torch.zeros(2, device=run.data.device)
    with unchanged(run.model, training=False), run.autocast():
        for x, y in run.data.test(min(max(run.args.batchsize, 100), 1000)):
            run.check_signals()
            logits = run.model(x).float()
            totals += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
    hits, loss = totals.tolist()
    return 100 * hits / len(run.data.y_test), loss / len(run.data.y_test)


def main(args: Namespace) -> int:
    """Set up, run one experiment, and leave its record. Returns the exit status."""
    record = Record(args)
    summary = record.check()
    if summary:
        print(f"{summary['status']} already, after {summary['steps']} steps: {record.directory}")
        return EXIT_STATUS[summary["status"]]
    device = pick_device(args.device)
    if args.compile and device.type != "cuda":
        raise UserError(f"argument --compile: it captures a CUDA graph, and the device is {device}")
    set_up(args)
    data = datasets.load(args.dataset, args.data_dir, device, args.seed)
    record.claim(data.checksum)
    checkpoint = record.load_checkpoint() if args.resume else None
    run = Training(args, data, record, Signals())
    if checkpoint:
        run.load(checkpoint)
        print(f"resumed at step {run.step}: {record.directory}")
    record.begin(device, run.step)
    status = 1
    try:
        status = experiment(run)
    finally:
        Signals.forget()
        record.close(status)
    return status


def experiment(run: Training) -> int:
    """Run the experiment of --mode, and record how it ended or where it was stopped. Returns the exit status."""
    try:
        results = {"normal": normal, "critical": critical, "sampling": sampling}[run.args.mode](run)
    except Stopped as stop:
        run.save()
        print(f"stopped after step {run.step}, with a checkpoint; the same command with --resume goes on", flush=True)
        return 128 + stop.signum
    steps = run.sums["steps"]
    results["mean_gradient_norm"] = run.sums["norm"] / steps if steps else None
    results["max_gradient_norm"] = run.sums["max_norm"] if steps else None
    complete = None not in results.get("steps_to_eps", {}).values()
    status = "diverged" if run.diverged_at else "finished" if complete else "not_reached"
    if run.diverged_at:
        results["diverged_at_step"] = run.diverged_at
    run.record.finish(status, steps, steps / run.steps_per_epoch, results)
    return EXIT_STATUS[status]


def run_and_report(args: Namespace) -> int:
    """`main`, with what is not the program's own fault as one line on stderr. Returns the exit status."""
    try:
        return main(args)
    except UserError as error:
        message, status = error, 2
    except (OSError, RuntimeError, MemoryError) as error:
        if not (isinstance(error, OSError) or out_of_memory(error)):
            raise
        message, status = error if str(error) else "out of memory", 1
    except KeyboardInterrupt:
        message, status = "interrupted before the first step", 130
    say("error", message)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, HANDLER)
    sys.exit(run_and_report(ARGS))
