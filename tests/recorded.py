"""Records as main.py writes them, of made-up numbers."""

import csv
import json

import numpy as np

from arguments import parse, steps_per_epoch
from measure.quantities import columns
from training.record import MEASUREMENTS, METRICS


def record(runs, flags, steps, /, *, metrics=(), measured=(), norms=None, status="finished", results=(), **unknown):
    """Write the record of the run that `flags` ask for; `unknown`: arguments that no parser knows. Returns its folder.

    metrics, measured: rows as dicts, without the epoch; what they leave out was not measured.
    """
    args = parse(["--dataset=mnist1d", "--model=MLP", "--device=cpu", *flags.split()])
    per_epoch = steps_per_epoch(args)
    folder = runs / ("-".join([args.name, *map(str, unknown.values())]))
    folder.mkdir(parents=True)
    args = json.loads(json.dumps(vars(args) | unknown, default=str))
    summary = {"status": status, "mode": args["mode"], "steps": steps, "epochs": steps / per_epoch, "seconds": 1.5}
    summary |= {"args": args, "results": dict(results)}
    (folder / "args.json").write_text(json.dumps({"args": args}))
    (folder / "summary.json").write_text(json.dumps(summary))
    here = {"batchnorm": "train", "batch_size": args["batchsize"], "layer": "all", "draws": args["draws"]}
    write(folder / "metrics.csv", METRICS, metrics, per_epoch)
    write(folder / "measurements.csv", MEASUREMENTS, [here | row for row in measured], per_epoch)
    if norms is not None:
        np.asarray(norms, "<f4").tofile(folder / "gradient_norms.f32")
    return folder


def write(path, head, rows, per_epoch):
    if rows:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, head, lineterminator="\n")
            writer.writeheader()
            writer.writerows({"epoch": row["steps"] / per_epoch, **row} for row in rows)


def read(path):
    """The rows of a CSV as dicts: numbers where they are numbers, None where nothing stands."""

    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def one(table, **wanted):
    """The one row of a table with these values, as a dict."""
    for key, value in wanted.items():
        table = table[table[key] == value]
    assert len(table) == 1, table
    return table.iloc[0].to_dict()


# 97.5 % of Student's t, from a printed table
T = {1: 12.706204736, 2: 4.302652730, 7: 2.364624252, 15: 2.131449546, 31: 2.039513446, 63: 1.998340543}
OPTIMIZERS, SIZES, SEEDS = ("sgd", "shb", "nshb"), (50, 100, 200, 400), (0, 1, 2)


def study(runs):
    """Three optimizers, four b, three seeds: `normal` with norms and a measurement an epoch, and `critical` ones.

    At b = 100 one seed measured smoothing and sharpness too, and another was sampled once more with fewer draws.
    """
    rng = np.random.default_rng(5)
    for optimizer in OPTIMIZERS:
        for b in SIZES:
            for seed in SEEDS:
                flags = f"--optimizer={optimizer} --batchsize={b} --seed={seed}"
                per_epoch, u = 4000 // b, rng.uniform(0.9, 1.1)
                ends = [per_epoch * (i + 1) for i in range(4)]
                metrics = []
                for i, s in enumerate(ends):
                    row = {"steps": s, "training_loss": u / (i + 1), "g-norm": 2 * u / (i + 1)}
                    metrics.append(row | {"accuracy": 50 * u + i + b / 100})
                measured = [measurement(optimizer, b, s - per_epoch // 2, u) for s in ends]
                if b == 100 and seed == 0:
                    measured[-1] |= dict.fromkeys(columns("sharpness"), 3.0) | smoothing(optimizer, u)
                measured += [measured[-1] | {"batch_size": size, "c_squared": 90 * u} for size in (25, 800)]
                flags += " --epochs=4 --measure_every=1 --measure noise smoothing sharpness shape"
                norms = 0.4 + 4 / np.arange(1, ends[-1] + 1) + 30 * u / b
                flags += " --draw_batchsizes 25 800"
                record(runs, flags, ends[-1], metrics=metrics, measured=measured, norms=norms)
        few = [measurement(optimizer, 100, 20, 5.0)]
        record(runs, f"--mode=sampling --optimizer={optimizer} --batchsize=100 --steps 20 --draws 8", 20, measured=few)
    record(runs, "--mode=critical --optimizer=sgd --batchsize=50 --eps 1.2 1 --min_epochs=0", 9, norms=np.full(9, 5.0))


def measurement(optimizer, b, step, u):
    w = {"sgd": 1, "shb": 1, "nshb": 0.1}[optimizer]
    variance, memory = 100 * u / b * (1 + step / 1000), 0.0 if optimizer == "sgd" else 2 * u
    square = w * w * variance + memory
    return {
        **{"steps": step, "noise_norm": square**0.5, "full_gradient_norm": 1.2 * u, "noise_square": square},
        **{"delta": 0.1 * square**0.5, "delta_se": 0.002, "fresh": w * w * variance, "memory": memory},
        **{"injected": 0.0, "variance": variance, "variance_se": 0.1, "c_squared": b * variance, "c_squared_se": 4.0},
        **{"delta_as_shb": 0.3, "delta_as_nshb": 0.7, "isotropy": 40 * u, "effective_rank": 9.0},
    }


def smoothing(optimizer, u):
    """Of NSHB an interval that reaches zero."""
    scale = {"sgd": 1e-1, "shb": 1e-2, "nshb": 1e-3}[optimizer]
    found = {"probe_images": 100, "excess": scale, "displacement": 0.0}
    for kind, factor in (("real", 1.0), ("gaussian", 1.1), ("isotropic", 0.01), ("predicted", 1.05)):
        error = 0.6 if (optimizer, kind) == ("nshb", "real") else 0.05
        found |= {f"excess_{kind}": scale * factor * u, f"excess_{kind}_se": scale * factor * error}
    return found | {"excess_predicted_isotropic": 0.011 * scale, "excess_predicted_isotropic_se": 0.001 * scale}
