#!/usr/bin/env bash
# The paper's figures from runs of your own, on MNIST-1D: three to five minutes on two cores once the installation is done.
# Nothing is downloaded but the packages. Run again, it shows the finished runs' results at once.
#
# MNIST-1D is 4,000 generated signals of 40 numbers in 10 classes. An MLP fits them in seconds, so that every run is
# trained to its end. It is not CIFAR-100: see results/README.md for what was measured there.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh

export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE-disabled} # networks this small gain nothing from a second thread
runs=runs/quickstart figures=figures/quickstart
sweep() {
    echo "$ scripts/sweep.sh $*"
    scripts/sweep.sh "$@" --dataset mnist1d --device cpu --runs_dir "$runs" --jobs_per_gpu 2 --seeds "0 1" || exit
}

# How well does it generalize, and how large is the noise? Each run to its fit, or to 10,000 updates.
sweep normal --model MLP --batchsizes "8 16 64 128 256 512" --until_loss 0.01 --epochs 10000 --max_steps 10000 \
    --measure_every 25 --draws 16
# How many updates until the mean gradient norm is at most ε? Softmax regression: its gradient noise never vanishes.
sweep critical --model Softmax --lr 0.02 --batchsizes "128 256 512 1024 2048" --min_epochs 0 --eps 0.5 0.4 --max_steps 2000

echo "$ python figures.py $runs --out $figures"
python figures.py "$runs" --out "$figures" || exit
python scripts/quickstart.py "$figures"
