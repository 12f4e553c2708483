#!/usr/bin/env bash
# The paper's grid as a SLURM array, one task a run. Submit it in the repository, the environment activated:
#
#   sbatch scripts/sweep_slurm.sh MODE [any flag of scripts/sweep.sh or main.py]
#   sbatch --array=0-98%8 --time=12:00:00 scripts/sweep_slurm.sh critical --eps 1.0 0.7 0.5
#
# With lists of its own it is another size: `scripts/sweep.sh MODE --seeds "0 1" --count` says 66, so --array=0-65.
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
# B: is the batch shell, which becomes python; without it only steps started by srun get the signal.
#SBATCH --signal=B:TERM@120
task=${SLURM_ARRAY_TASK_ID-}
[[ -n $task ]] || { echo "error: this is not a task of a SLURM array; submit the script with sbatch" >&2; exit 2; }
exec "${PYTHON:-python}" scripts/sweep.py "$@" --task "$task"
