"""The paper's three experiments: `python main.py --mode normal|critical|sampling`.

normal    train, and measure the test accuracy after each epoch
critical  count the steps until the running mean of the gradient norm is at most ε
sampling  after some steps, measure the search direction noise ω_t = d_t − ∇f(x_t)

Torch takes seconds to load, so whatever needs it is imported in `main`, once the arguments are known to be good.
"""

import os
import signal
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

from arguments import EXIT_STATUS, lagging, parse, planned_steps
from measure.quantities import EVALUATED, QUANTITIES, quantity
from training.stopping import StoppingRule, first_check, first_measured
from utils import Signals, Stopped, UserError, handling, out_of_memory, pick_device, say, set_up, usable_streams

if TYPE_CHECKING:
    from training.loop import Training

# --- the experiments: each takes a Training and returns its results ------------------------------------------


def normal(run: "Training") -> dict:
    """Train for --epochs, or until an epoch's mean training loss is below --until_loss; test after each epoch."""
    for window in run.windows(planned_steps(run.args)):
        epoch = run.epoch_with(window)
        epoch_over = run.step % run.steps_per_epoch == 0
        if epoch_over and run.args.until_loss and epoch.loss / epoch.inputs < run.args.until_loss:
            run.stop("finished")
        if (run.evaluation_due or run.outcome == "finished") and run.outcome != "diverged":
            run.results = {name: run.results[name] for name in run.results if name not in EVALUATED} | run.evaluate()
            run.results["best_accuracy"] = max(run.results["accuracy"], run.results.get("best_accuracy", 0.0))
            run.results["training_acc"] = 100 * epoch.hits / epoch.inputs
            run.results["training_loss"] = epoch.loss / epoch.inputs
    names = ("accuracy", "best_accuracy", "training_acc", "training_loss", "test_loss")
    return {name: run.results.get(name) for name in names}


def critical(run: "Training") -> dict:
    """Train until the running mean of ‖g_t‖ over all steps so far has been at most every ε."""
    args = run.args
    check = first_check(args.min_epochs, run.steps_per_epoch)
    rule = StoppingRule(args.eps, check)
    reached_before = rule.follow(np.frombuffer(run.record.norms.read(), "<f4"))
    last = run.step if reached_before else planned_steps(args)
    for window in run.windows(last, rule.earliest_end):
        if rule.follow(window.norms, run.total.norm, run.total.steps) and not run.outcome:
            run.stop("finished")
    sfo = {eps: None if steps is None else steps * args.batchsize for eps, steps in rule.reached.items()}
    bounds = [eps for eps, steps in rule.reached.items() if steps == check > 1]
    return {"steps_to_eps": rule.reached, "sfo": sfo, "at_first_check": bounds} | full_gradient_stop(run)


def full_gradient_stop(run: "Training") -> dict:
    """The first measured step at which ‖∇f(x_t)‖ is at most ε, and the measured step before it, for each ε."""
    rows = [row for row in run.record.measurements.rows() if row["full_gradient_norm"]]
    norms = {int(row["steps"]): float(row["full_gradient_norm"]) for row in reversed(rows)}
    found = {repr(eps): first_measured(norms, eps) for eps in run.args.eps if norms}
    names = ("steps_to_eps_full", "last_above_eps_full")
    return {name: {eps: each[i] for eps, each in found.items()} for i, name in enumerate(names) if norms}


def sampling(run: "Training") -> dict:
    """Train for the last of --steps; the loop measures ω_t at each, on the next mini-batch and before its update."""
    for _ in run.windows(planned_steps(run.args)):
        pass
    return {}


EXPERIMENTS = {"normal": normal, "critical": critical, "sampling": sampling}

# --- around them ---------------------------------------------------------------------------------------------


def main(args: Namespace) -> int:
    """Set up, run one experiment, and leave its record. Returns the exit status."""
    from training.data import load
    from training.loop import Training
    from training.record import Record

    record = Record(args)
    if summary := record.check():
        print(f"{summary['status']} already, after {summary['steps']} steps: {record.directory}")
        print_results(summary["results"], lagging(args.model, summary["steps"]))
        return EXIT_STATUS[summary["status"]]
    device = pick_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise UserError(f"argument --cuda_graph: it captures a CUDA graph, and the device is {device}")
    set_up(args)
    data = load(args.dataset, args.data_dir, device, args.seed)
    record.claim(data.checksum)
    checkpoint = record.load_checkpoint() if args.resume else None
    signals, status = Signals(), 1
    with handling(signals.remember):
        run = Training(args, data, record, signals)
        if checkpoint:
            run.load(checkpoint)
            print(f"resumed at step {run.step}: {record.directory}")
        record.begin(device, run.step)
        try:
            status = experiment(run)
        finally:
            with handling(signal.SIG_DFL):  # from here on one ends the process at once
                record.close(status)
    return status


def experiment(run: "Training") -> int:
    """Run the experiment of --mode, and record how it ended or was stopped. Returns the exit status."""
    try:
        results = EXPERIMENTS[run.args.mode](run)
    except Stopped as stop:
        run.save()
        print(f"stopped after step {run.step}, with a checkpoint; the same command with --resume goes on", flush=True)
        return 128 + stop.args[0]
    steps = run.total.steps
    results |= {key: value for key, value in run.results.items() if key not in results}
    results["ave-norm"] = run.total.norm / steps if steps else None
    results["max_gradient_norm"] = run.total.max_norm if steps else None
    if run.diverged_at:
        results["diverged_at_step"] = run.diverged_at
    missed = None in results.get("steps_to_eps", {}).values() or run.args.until_loss is not None
    status = run.outcome or ("not_reached" if missed else "finished")
    run.record.finish(status, steps, steps / run.steps_per_epoch, results)
    print(f"{status} after {steps} steps: {run.record.directory}")
    print_results(results, lagging(run.args.model, steps))
    return EXIT_STATUS[status]


def print_results(results: dict, doubt: str) -> None:
    """Show how a run ended: each number with what it means. doubt: what to say of the test data's."""
    for name, value in results.items():
        if name not in QUANTITIES or value is None or value == []:
            continue
        about = quantity(name)
        error = results.get(f"{name}_se")
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        shown += f" ± {error:.2g} s.e." if error is not None else ""
        meaning = f"{about.meaning}; {doubt}" if doubt and name.endswith("accuracy") else about.meaning
        print(f"  {name}: {shown}{f' {about.unit}' if about.unit else ''}  ({meaning})")
    sys.stdout.flush()


def run_and_report(args: Namespace) -> int:
    """Run `main`; print user and system errors as one line instead of a traceback. Returns the exit status."""
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
    with handling(signal.SIG_DFL):  # Ctrl-C while torch loads: no traceback
        import torch  # noqa: F401
    return run_and_report(args)


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
