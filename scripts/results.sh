#!/usr/bin/env bash
# The study behind results/, as docs/plan.md has it: its runs, then tables, figures and verdicts.
#
#   scripts/results.sh [PART …] [FLAGS]     # default: mnist1d
#
# mnist1d   arms, grid, cells, softmax, after_fit, memory and shape below: an MLP and softmax regression, five seeds; 53
#           minutes of two cores that had other work too
# confirm   the cells that the tests are about, again, on five fresh seeds; 14 minutes
# convnet   ConvNet1d, with BatchNorm, three seeds; 45 minutes of one core
# images    CIFAR20-5k, ResNet8: three optimizers, five batch sizes, three seeds; some 4 hours of a core a seed
# cifar100  CIFAR-100, ResNet20, early training: what the noise is made of, and whether it smooths; ResNet18 once; 8.4
#           hours of a core (results/cost.csv)
#
# FLAGS go to scripts/sweep.sh for every run, as --dry_run, or for a GPU: cifar100 --model ResNet18 --seeds "0 1 2".
# What is done is skipped, so the same command goes on. SEEDS and JOBS (runs at a time) may be set; RESULTS is where all
# of it goes (default: results). Exit status: 0 all done, 1 a run has ended badly, 2 bad argument, 130 stopped.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
results=${RESULTS:-results} python=${PYTHON:-python} status=0
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE-disabled}
parts=()
while [[ ${1-} && $1 != -* ]]; do
    parts+=("$1")
    shift
done
flags=("$@")

sweep() { # MODE FLAGS…: of the present part
    scripts/sweep.sh "$@" --seeds "${SEEDS:-$seeds}" --device cpu --runs_dir "$runs" \
        --jobs_per_gpu "${JOBS:-2}" "${flags[@]}"
    local ended=$?
    ((ended > 1)) && exit $ended
    ((ended == 0)) || status=1
}
fit() { sweep normal --dataset mnist1d --until_loss 0.01 --epochs 5000 --draws 16 "$@"; }
whole=(--model MLP --measure noise smoothing sharpness --probe_images 1000)

# --- mnist1d: about twelve measured steps a run -------------------------------------------------------------------

grid() { # three optimizers over b, η = 0.1, β = 0.9, each run to its fit
    for b in 8 16 32 64 128 256 512 1024; do
        fit "${whole[@]}" --optimizers "sgd nshb" --batchsizes $b --measure_every $((b > 8 ? 3 * b / 16 : 3)) --max_steps 20000
        fit "${whole[@]}" --optimizers shb --batchsizes $b --measure_every $((b > 64 ? b / 32 : b / 4)) --max_steps 10000
    done
}
arms() { # b = 256 with the noise of b = 16, and with isotropic noise as long
    fit "${whole[@]}" --optimizers sgd --batchsizes 256 --inject "covariance isotropic" --inject_batchsize 16 \
        --measure_every 48 --max_steps 20000
}
memory() { # the exact split of what momentum keeps
    for point in shb:128:4 shb:256:5 nshb:32:6 nshb:256:48; do
        IFS=: read -r optimizer b every <<<"$point"
        fit --model MLP --optimizers "$optimizer" --batchsizes "$b" --measure_every "$every" --max_steps 20000 \
            --exact_memory 44
    done
}
shape() { # is the noise normal, isotropic, heavy-tailed?
    sweep sampling --dataset mnist1d --model MLP --batchsizes "32 256" --optimizers "sgd nshb" --measure shape \
        --steps 0 1000 4000 8000
}
softmax() { # where ‖g‖ has a floor: b*, its power of 1/ε, and whether it depends on η. The sizes divide 4,000 nearly evenly
    for lr in 0.04 0.02; do
        sweep critical --dataset mnist1d --model Softmax --optimizers sgd --lr $lr --min_epochs 0 --eps 0.4 0.3 0.25 \
            --batchsizes "125 182 250 364 500 667 1000 1334 2000 4000" --max_steps 5000 --measure_every 4 --draws 16
    done
}
after_fit() { # on a network that fits, steps·ε is constant: no b*
    seeds="0 1 2" sweep critical --dataset mnist1d --model MLP --optimizers sgd --batchsizes "64 128 256" --eps 0.4 0.3 \
        --max_steps 40000
}
cells() { # other η and β, and the pairs of equal δ
    for cell in sgd:0.3:128:8 sgd:0.3:64:4 sgd:0.3:32:3 sgd:0.6:128:4 sgd:0.6:64:3 sgd:0.03:8:5 sgd:0.107:128:24 \
        sgd:0.107:256:48 nshb:0.3:64:4 nshb:1:128:4 nshb:1:256:5 shb:0.03:32:3 shb:0.03:64:4 shb:0.03:128:8 shb:0.01:16:3 \
        shb:0.01:32:6; do
        point "$cell" "${whole[@]}"
    done
    fit "${whole[@]}" --optimizers shb --beta1 0.5 --batchsizes 32 --measure_every 3 --max_steps 20000
}
point() { # OPTIMIZER:η:b:E FLAGS…
    local optimizer lr b every
    IFS=: read -r optimizer lr b every <<<"$1"
    fit --optimizers "$optimizer" --lr "$lr" --batchsizes "$b" --measure_every "$every" --max_steps 30000 "${@:2}"
}

# --- the others ---------------------------------------------------------------------------------------------------

confirm() {
    for cell in sgd:0.1:16:3 sgd:0.1:32:6 sgd:0.1:64:12 sgd:0.1:128:24 nshb:0.1:16:3 nshb:0.1:32:6 nshb:0.1:64:12 \
        nshb:0.1:128:24 sgd:0.107:128:24 sgd:0.107:256:48 shb:0.01:16:3 sgd:0.3:128:8 sgd:0.3:32:3 nshb:1:256:5; do
        point "$cell" --model MLP
    done
    arms
    softmax
}
convnet() {
    for b in 16 64 256 1024; do
        fit --model ConvNet1d --batchsizes $b --measure_every $((b / 4)) --max_steps 10000 --measure noise sharpness \
            --probe_images 1000
    done
}
images() {
    sweep normal --dataset CIFAR20-5k --model ResNet8 --batchsizes "16 32 64 128 256" --until_loss 0.01 --epochs 100 \
        --max_steps 3200 --recalibrate --measure_every 16 --measure smoothing --draws 16 --probe_images 200
}
images_memory() { # the exact split of what momentum keeps, once, in the middle of an epoch
    seeds=0 sweep sampling --dataset CIFAR20-5k --model ResNet8 --optimizers "shb nshb" --batchsizes 128 --steps 3100 \
        --draws 16 --exact_memory 44
}
short_batch() { # an epoch ends, after update 1,580, with a batch of 8 images: what does it do to accuracy?
    seeds="0 1" sweep sampling --dataset CIFAR20-5k --model ResNet8 --optimizers "sgd shb" --batchsizes 64 \
        --steps 1570 1579 1580 1581 1584 1590 1600
}
cifar100() {
    local sample=(sampling --dataset CIFAR100 --model ResNet20)
    sweep "${sample[@]}" --batchsizes 128 --measure shape --draw_batchsizes 8 32 512 --steps 0 50 400 1600
    sweep "${sample[@]}" --optimizers sgd --batchsizes 16 --measure shape --draw_batchsizes 8 32 512 --steps 0 50 400 1600 4000
    sweep "${sample[@]}" --optimizers sgd --batchsizes 1024 --measure shape --draw_batchsizes 8 32 512 --steps 0 50 400
    sweep "${sample[@]}" --batchsizes 128 --measure smoothing sharpness --draws 32 --probe_images 500 --steps 400 1600
    sweep "${sample[@]}" --batchsizes 128 --measure smoothing --draws 64 --probe_images 500 --steps 400 1600
    sweep "${sample[@]}" --model ResNet18 --optimizers shb --batchsizes 128 --draws 16 --steps 0 100
}

dry=$([[ " ${flags[*]} " == *" --dry_run "* ]] && echo echo) # a dry run says what it would draw

run() { # FOLDER SEEDS PART…: the runs of these parts, and the tables and figures of each
    local folder=$results/$1 seeds=$2 part runs began
    # The records of the repository's own study lie in one archive.
    [[ -e $folder/runs.tar.xz && ! -e $folder/runs ]] && { $dry tar -xJf "$folder/runs.tar.xz" -C "$folder" || exit; }
    for part in "${@:3}"; do
        began=$SECONDS runs=$folder/runs/$part
        [[ $part == cifar100 ]] && runs=$results/runs folder=$results part=.
        ${parts_of[$part]-$part}
        echo "$part: $(((SECONDS - began) / 60)) minutes"
        # These are for the verdicts alone, which draw what they need.
        [[ $part == arms || $part == cells || $part == confirm ]] || $dry "$python" figures.py "$runs" --out "$folder/$part" || status=1
    done
}
declare -A parts_of=([.]=cifar100)
for group in "${parts[@]:-mnist1d}"; do
    case $group in
    mnist1d) run mnist1d "0 1 2 3 4" arms grid cells softmax after_fit memory shape ;;
    confirm) run confirm "5 6 7 8 9" confirm ;;
    convnet) run convnet "0 1 2" convnet ;;
    images) run images "0 1 2" images images_memory short_batch ;;
    cifar100) run . 0 cifar100 ;;
    *)
        echo "error: argument PART: got '$group', allowed are mnist1d, confirm, convnet, images, cifar100" >&2
        exit 2
        ;;
    esac
    [[ $group != mnist1d && $group != confirm ]] ||
        $dry "$python" scripts/verdicts.py "$results/$group/runs" --out "$results/$group" || status=1
done
exit $status
