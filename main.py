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

    With --full_grad_every, until a measured ‖∇f(x_t)‖ has been so too. The device is read only now and then, so the
    loop runs a little past that step, but the record ends with it.
    """
    from full_gradients import FullGradients

    args, first_check = run.args, max(1, run.args.min_epochs * run.steps_per_epoch)
    reached = run.results["steps_to_eps"] = reached_before(run, first_check)
    full = FullGradients(run) if args.full_grad_every else None
    rules = [reached, full.reached] if full else [reached]
    if full and run.step == 0:
        full.measure()
        run.record.show({"steps": 0} | full.keep())
    last = planned_steps(args) if end_of(rules) is None else run.step
    for window in run.windows(last, read_at=full.at if full else ()):
        means = run.total.running_norms(window) / window.steps
        for eps in args.eps:
            if reached[repr(eps)] is None:
                reached[repr(eps)] = first_crossing(means, int(window.steps[0]), eps, first_check)
        end = end_of(rules)
        if full and run.step in full.at and not run.outcome and (end is None or run.step <= end):
            full.measure()
            end = end_of(rules)
        if end is not None:
            run.stop("finished")
            window = window.until(end)
        run.commit(window)
        run.record.append_norms(window.norms)
        run.log_window(window, full.keep() if full else {})
    sfo = {eps: None if steps is None else steps * args.batchsize for eps, steps in reached.items()}
    bounds = [eps for eps, steps in reached.items() if steps == first_check > 1]
    results = {"steps_to_eps": reached, "sfo": sfo, "at_first_check": bounds}
    return results | full.results() if full else results


def end_of(rules: list[dict[str, int | None]]) -> int | None:
    """The step at which every ε has been reached by every rule; None if one has not."""
    steps = [step for reached in rules for step in reached.values()]
    return None if None in steps else max(steps)


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
    """At each of --steps measure ω_t, on the next mini-batch and before its update; end with the largest."""
    from sampling import Shadow, measure_step, measured_steps

    at = measured_steps(run.args)
    shadow, results = Shadow(run, at) if run.args.exact_memory else None, {}
    if run.step == 0 and 0 in at:
        results, shown = measure_step(run, shadow)
        run.record.show({"steps": 0} | shown)
    for window in run.windows(max(at), read_at=at):
        shown = {}
        if run.step in at and not run.outcome:
            results, shown = measure_step(run, shadow)
        run.commit(window)
        run.log_window(window, shown)
    return results


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
    missed = any(None in results.get(rule, {}).values() for rule in ("steps_to_eps", "steps_to_eps_full"))
    status = run.outcome or ("not_reached" if missed else "finished")
    run.record.finish(status, steps, steps / run.steps_per_epoch, results)
    print_results(f"{status} after {steps} steps: {run.record.directory}", results)
    return EXIT_STATUS[status]


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_results(heading: str, results: dict) -> None:
    """Show how a run ended."""
    print(heading)
    for key, value in results.items():
        if isinstance(value, dict) and len(value) > 4:
            print(f"  {key}:")
            print(*(f"    {name}: {_short(number)}" for name, number in value.items()), sep="\n")
        else:
            print(f"  {key}: {_short(value)}")
    if results.get("at_first_check"):
        print("  (at_first_check: reached when first looked at, perhaps before; these steps are upper bounds)")
    if "full_gradient_every" in results:
        print(f"  (_full: the first measured step, one in {results['full_gradient_every']}; it is an upper bound)")
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
