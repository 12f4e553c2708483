#!/usr/bin/env bash
# The paper's grid as a SLURM array, one task a run. Submit it in the repository, the environment activated:
#
#   sbatch scripts/sweep_slurm.sh MODE [any other flag of main.py, but not --optimizer, --batchsize, --seed, --name]
#   sbatch --array=0-98%8 --time=12:00:00 scripts/sweep_slurm.sh critical --eps 1.0 0.7 0.5
#
# A task that is preempted is queued again by SLURM; for one that its time limit has stopped, submit the same line
# again: every run goes on from its checkpoint, and what is finished ends at once.
#SBATCH --job-name=role_of_momentum
#SBATCH --array=0-98
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
# B: is the batch shell, which exec below turns into python; without it only steps started by srun get the signal.
#SBATCH --signal=B:TERM@120
set -u
die() { echo "error: $*" >&2; exit 2; }

optimizers=(sgd shb nshb)
batchsizes=(8 16 32 64 128 256 512 1024 2048 4096 8192)
seeds=(0 1 2)

(($#)) || die "the first argument is the mode: normal, critical or sampling"
k=${SLURM_ARRAY_TASK_ID-}
[[ -n $k ]] || die "this is not a task of a SLURM array; submit the script with sbatch"
o=$((k % ${#optimizers[@]})) k=$((k / ${#optimizers[@]}))
s=$((k % ${#seeds[@]})) b=$((k / ${#seeds[@]})) # the small batches, which take longest, come first
((b < ${#batchsizes[@]})) || die "--array: task $SLURM_ARRAY_TASK_ID is beyond the grid"
exec "${PYTHON:-python}" main.py "${@:2}" --mode "$1" --optimizer "${optimizers[o]}" \
    --batchsize "${batchsizes[b]}" --seed "${seeds[s]}" --resume
