#!/usr/bin/env bash
# The three modes on the embedded digits, in about three minutes on two cores once the installation is done.
# Nothing is downloaded but the packages. Run again, it shows the finished runs' results at once.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh

run() {
    echo
    echo "$ python main.py $*"
    python main.py "$@" --dataset digits --model ResNet20 --batchsize 64 --lr 0.05 --resume || exit
}
run --mode normal --name quickstart-normal --epochs 10
run --mode critical --name quickstart-critical --min_epochs 1 --eps 2.0 1.5
for optimizer in sgd shb nshb; do
    run --mode sampling --name "quickstart-sampling-$optimizer" --optimizer "$optimizer" --steps 100
done

echo
python - <<'END'
import json
from pathlib import Path


def results(name):
    summary = json.loads((Path("runs") / f"quickstart-{name}" / "summary.json").read_text())
    return summary["results"] | {"seconds": summary["seconds"]}


normal, critical = results("normal"), results("critical")
print("What was measured, with ResNet20 on scikit-learn's digits, b = 64, lr = 0.05:")
print(f"  normal    SHB: test accuracy {normal['accuracy']:.1f} %, best {normal['best_accuracy']:.1f} %")
for eps, steps in critical["steps_to_eps"].items():
    sfo = critical["sfo"][eps]
    print(f"  critical  SHB: mean gradient norm at most {eps} after {steps} steps, SFO complexity {sfo} gradients")
for name in ("sgd", "shb", "nshb"):
    r = results(f"sampling-{name}")
    print(
        f"  sampling  {name.upper():4s}: search direction noise {r['noise_norm']:.3f}, mini-batch gradient noise "
        f"{r['gradient_noise_norm']:.3f}; degree of smoothing {r['delta']:.4f}"
    )
seconds = [results(name)["seconds"] for name in ("normal", "critical", "sampling-shb")]
print("  It took {:.0f}, {:.0f} and {:.0f} s: normal, critical, sampling with SHB.".format(*seconds))
print("It lies in runs/quickstart-*: summary.json, metrics.csv, and omega.npy or gradient_norms.f32.")
END
