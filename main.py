"""The paper's three experiments: `python main.py --mode normal|critical|sampling`.

normal    train, and measure the test accuracy every epoch
critical  count the steps until the running mean of the gradient norm is at most ε
sampling  after some steps, measure the search direction noise ω_t = d_t − ∇f(x_t)

`python main.py --help` lists the arguments, docs/record.md says what a run leaves behind.
Torch takes seconds to load, so whatever needs it is imported in `main`, once the arguments are known to be good.
"""

import signal
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import numpy as np

from arguments import EXIT_STATUS, parse, planned_steps
from messages import UserError, say, usable_streams
from state import first_crossing

if TYPE_CHECKING:
    from training import Training

# --- the experiments: each takes a Training and returns its results ------------------------------------------


def normal(run: "Training") -> dict:
    """Train for --epochs; after each, measure the test accuracy. Accuracies are in percent."""
    results = run.results
    for window in run.windows(planned_steps(run.args)):
        epoch_over = run.step % run.steps_per_epoch == 0 or run.step == run.last
        if epoch_over and not run.outcome:
            accuracy, test_loss = run.evaluate()
            if not np.isfinite(test_loss):
                run.stop("diverged", run.step + 1)
        run.commit(window)
        if epoch_over and not run.outcome:
            row = {
                "training_loss": run.epoch.loss / run.epoch.images,
                "training_acc": 100 * run.epoch.hits / run.epoch.images,
                "test_loss": test_loss,
                "accuracy": accuracy,
            }
            results |= row | {"best_accuracy": max(accuracy, results.get("best_accuracy", 0.0))}
            run.log(row | {"g-norm": run.epoch.norm / run.epoch.steps, "max_g-norm": run.epoch.max_norm})
    names = ("accuracy", "best_accuracy", "training_acc", "training_loss", "test_loss")
    return {name: results.get(name) for name in names}


def critical(run: "Training") -> dict:
    """Train until the running mean of ‖g_t‖ over all steps so far has been at most every ε.

    The device is read only now and then, so the loop runs a little past that step, but the record ends with it.
    """
    args, first_check = run.args, max(1, run.args.min_epochs * run.steps_per_epoch)
    reached = run.results["steps_to_eps"] = reached_before(run, first_check)
    last = planned_steps(args) if None in reached.values() else run.step
    for window in run.windows(last):
        means = run.total.running_norms(window) / window.steps
        for eps in args.eps:
            if reached[repr(eps)] is None:
                reached[repr(eps)] = first_crossing(means, int(window.steps[0]), eps, first_check)
        if None not in reached.values():
            run.stop("finished")
            window = window.until(max(reached.values()))
        run.commit(window)
        run.record.append_norms(window.norms)
        run.log_window(window)
    sfo = {eps: None if steps is None else steps * args.batchsize for eps, steps in reached.items()}
    bounds = [eps for eps, steps in reached.items() if steps == first_check > 1]
    return {"steps_to_eps": reached, "sfo": sfo, "at_first_check": bounds}


def reached_before(run: "Training", first_check: int) -> dict[str, int | None]:
    """The steps to every ε as far as the run has come; one that is new to it is looked for in its history."""
    known = run.results.get("steps_to_eps", {})
    new = [eps for eps in run.args.eps if repr(eps) not in known]
    if new:
        norms = run.record.norms.norms()
        means = np.cumsum(norms, dtype=np.float64) / np.arange(1, len(norms) + 1)
        known = known | {repr(eps): first_crossing(means, 1, eps, first_check) for eps in new}
    return {repr(eps): known[repr(eps)] for eps in run.args.eps}


def sampling(run: "Training") -> dict:
    """Train for --steps, then measure ω_t on the next mini-batch, before its update."""
    last = planned_steps(run.args)
    numbers = measure_noise(run) if last == 0 else {}
    for window in run.windows(last):
        if run.step == last and not run.outcome:
            numbers = measure_noise(run)
        run.commit(window)
        run.log_window(window)
    return numbers


def measure_noise(run: "Training") -> dict:
    """Measure ω_t at the present x_t and keep it; what is not finite is a divergence, and gives no numbers."""
    from measure.noise import measure

    epoch, start = divmod(run.step, run.steps_per_epoch)
    batch = next(run.data.epoch(epoch, run.args.batchsize, start))
    chunks = run.data.full_pass(run.step, run.args.full_grad_batchsize)
    with run.autocast():
        numbers, omega = measure(run.model, run.optimizer, batch, chunks, run.data.size, run.check_signals)
    if not np.isfinite(numbers["noise_norm"]):
        run.stop("diverged", run.step + 1)
        return {}
    run.record.save_omega(omega.numpy(), run.step)
    return numbers


EXPERIMENTS = {"normal": normal, "critical": critical, "sampling": sampling}

# --- around them ---------------------------------------------------------------------------------------------


def main(args: Namespace) -> int:
    """Set up, run one experiment, and leave its record. Returns the exit status."""
    import data as data_on_device
    from record import Record
    from training import Training
    from utils import Signals, pick_device, set_up

    record = Record(args)
    summary = record.check()
    if summary:
        print(f"{summary['status']} already, after {summary['steps']} steps: {record.directory}")
        return EXIT_STATUS[summary["status"]]
    device = pick_device(args.device)
    if args.compile and device.type != "cuda":
        raise UserError(f"argument --compile: it captures a CUDA graph, and the device is {device}")
    set_up(args)
    data = data_on_device.load(args.dataset, args.data_dir, device, args.seed)
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


def experiment(run: "Training") -> int:
    """Run the experiment of --mode, and record how it ended or where it was stopped. Returns the exit status."""
    from utils import Stopped

    try:
        results = EXPERIMENTS[run.args.mode](run)
    except Stopped as stop:
        run.save()
        print(f"stopped after step {run.step}, with a checkpoint; the same command with --resume goes on", flush=True)
        return 128 + stop.signum
    steps = run.total.steps
    results["mean_gradient_norm"] = run.total.norm / steps if steps else None
    results["max_gradient_norm"] = run.total.max_norm if steps else None
    if run.diverged_at:
        results["diverged_at_step"] = run.diverged_at
    missed = None in results.get("steps_to_eps", {}).values()
    status = run.outcome or ("not_reached" if missed else "finished")
    run.record.finish(status, steps, steps / run.steps_per_epoch, results)
    print_results(f"{status} after {steps} steps: {run.record.directory}", results)
    return EXIT_STATUS[status]


def print_results(heading: str, results: dict) -> None:
    """Show how a run ended."""
    print(heading)
    for key, value in results.items():
        print(f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}")
    if results.get("at_first_check"):
        print("  (at_first_check: reached when first looked at, perhaps before; these steps are upper bounds)")
    sys.stdout.flush()


def run_and_report(args: Namespace) -> int:
    """`main`, with what is not the program's own fault as one line on stderr. Returns the exit status."""
    from utils import out_of_memory

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


def cli(argv: list[str]) -> int:
    """The command line, checked before torch is loaded. Returns the exit status."""
    usable_streams()
    try:
        args = parse(argv)
    except (UserError, OSError) as error:
        say("error", error)
        return 2
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
    import torch  # noqa: F401

    signal.signal(signal.SIGINT, handler)
    return run_and_report(args)


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
