#!/usr/bin/env bash
# The paper's grid: one main.py run per optimizer, batch size and seed, side by side on the GPUs there are.
#
#   scripts/sweep.sh MODE [--optimizers "sgd shb nshb"] [--batchsizes "8 16 ... 8192"] [--seeds "0 1 2"]
#                         [--gpus "0 1"] [--jobs_per_gpu 1] [--dry_run] [any other flag of main.py]
#
# --dry_run names every run and its state, and writes nothing. Each run logs to RUNS_DIR/NAME.log. Ctrl-C (or
# SIGTERM) lets every run write its checkpoint; the same command goes on from there and skips what is finished.
# Runs start in the order of the lists. PYTHON names the interpreter (default: python). For several at a time on a
# CPU set OMP_NUM_THREADS to its cores divided by their number, or they wait for one another.
# Exit status: 0 every run has ended well, 1 some have not, 2 bad argument, 130 stopped.
set -uf # no globbing: the lists are split into words, and no more
die() { echo "error: $*" >&2; exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash 4.4 or newer is needed, this is $BASH_VERSION"

# --- arguments
python=${PYTHON:-python}
main=$(dirname "${BASH_SOURCE[0]}")/../main.py
go_on="to go on, run the same command again: ${0@Q} ${*@Q}"
case ${1-} in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    "" | -*) die "the first argument is the mode: normal, critical or sampling" ;;
esac
mode=$1 dry_run=0 flags=()
shift
# Longest first, so that no long run is left over when the other slots are idle. A small batch makes for many
# steps; but sampling takes the same number of steps at each b, and there the large batches are the long ones.
optimizers="sgd shb nshb" batchsizes="8 16 32 64 128 256 512 1024 2048 4096 8192" seeds="0 1 2" jobs_per_gpu=1
[[ $mode != sampling ]] || batchsizes="8192 4096 2048 1024 512 256 128 64 32 16 8"
# Where the driver is broken, nvidia-smi complains on stdout.
found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null) || found=""
gpus=$found
[[ ! -v CUDA_VISIBLE_DEVICES ]] || gpus=${CUDA_VISIBLE_DEVICES//,/ } # a cluster's or a user's choice
chosen=$gpus
while (($#)); do
    flag=${1%%=*} flag=${flag//-/_}
    case $flag in
        __dry_run) dry_run=1 ;;
        __optimizers | __batchsizes | __seeds | __gpus | __jobs_per_gpu)
            if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2-}; set -- "${@:2}"; fi
            [[ $value == *[![:space:],]* ]] || die "--${flag#__} needs a value"
            printf -v "${flag#__}" %s "${value//,/ }" ;;
        __mode | __optimizer | __batchsize | __seed | __name | __resume | __print_name)
            die "--${flag#__} is the sweep's own; it takes --optimizers, --batchsizes and --seeds" ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ $jobs_per_gpu =~ ^[1-9][0-9]?$ ]] || die "--jobs_per_gpu $jobs_per_gpu: must be 1 to 99"
if [[ $gpus != "$chosen" ]]; then # by --gpus: with a wrong one, CUDA would see none, and the run take the CPU
    named=$(nvidia-smi -L 2>/dev/null) || named=""
    list=${found//$'\n'/, }
    for gpu in $gpus; do
        [[ " ${found//$'\n'/ } " == *" $gpu "* ]] || [[ $gpu == @(GPU|MIG)-* && $named == *"UUID: $gpu"* ]] ||
            die "--gpus: got '$gpu', nvidia-smi lists ${list:-none}"
    done
fi
command -v "$python" >/dev/null || die "there is no interpreter '$python'; PYTHON names another"
slots=()
for ((n = 0; n < jobs_per_gpu; n++)); do
    for gpu in ${gpus:--}; do slots+=("$gpu"); done # -: one slot, in which main.py chooses the device
done

# --- the plan: main.py says what each run is called and how it stands, or why it refuses
runs=() state=() path=() note=() status=() seconds=() todo=() runs_dir=.
declare -A taken=()
set_command() { # of run $1
    local o b s
    read -r o b s <<<"${runs[$1]}"
    command=("$python" "$main" "${flags[@]}" --mode "$mode" --optimizer "$o" --batchsize "$b" --seed "$s")
}
for b in $batchsizes; do for s in $seeds; do for o in $optimizers; do
    i=${#runs[@]}
    runs[i]="$o $b $s"
    set_command "$i"
    status[i]=- seconds[i]=- note[i]="" path[i]="$mode $o b=$b seed=$s"
    if ! answer=$("${command[@]}" --print_name 2>&1); then
        state[i]=refused note[i]=${answer##*$'\n'}
        continue
    fi
    answer=${answer##*$'\n'} # below any warning
    state[i]=${answer%% *} path[i]=${answer#* }
    [[ -z ${taken[${path[i]}]-} ]] || die "two runs of this sweep would be ${path[i]}: is a value listed twice?"
    taken[${path[i]}]=1 runs_dir=$(dirname -- "${path[i]}")
    if [[ ${state[i]} == new || ${state[i]} == unfinished ]]; then todo+=("$i"); fi
done; done; done
((${#taken[@]})) || die "${note[0]#error: }" # every run is refused: a bad argument
for i in "${!runs[@]}"; do printf '%-12s %s\n' "${state[i]}" "${path[i]##*/}${note[i]:+: ${note[i]}}"; done
echo "${#runs[@]} runs, ${#todo[@]} to do, ${#slots[@]} at a time"
((!dry_run)) || exit 0

# --- the runs
mkdir -p -- "$runs_dir" || die "cannot make $runs_dir"
export PYTHONUNBUFFERED=1 CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID} # count GPUs as nvidia-smi does
signals=0 told=0 next=0 pid=() job=() began=()
trap 'signals=$((signals + 1))' INT TERM HUP # the loop acts on it, never in the middle of a start
trap '' PIPE                                 # in `sweep.sh | tee`, Ctrl-C ends tee; the runs must still be told

start() { # the next run in slot $1
    local i=${todo[next++]} gpu=${slots[$1]#-}
    set_command "$i"
    set -m # a process group of its own: the terminal's Ctrl-C must reach a run once, through us
    (
        exec >>"${path[i]}.log" 2>&1 </dev/null || exit 1
        [[ -z $gpu ]] || export CUDA_VISIBLE_DEVICES=$gpu
        echo "$ ${command[*]@Q} --resume"
        exec "${command[@]}" --resume
    ) &
    set +m
    pid[$1]=$! job[$1]=$i began[$1]=$SECONDS
    echo "[$next/${#todo[@]}] started ${path[i]##*/}${gpu:+ on GPU $gpu}"
}
last_words() { # of the log $1: the error, whatever libraries have said at exit; or else the last line
    tail -n 100 "$1" | awk '{ last = $0 } /^\$ / { error = "" } /^error: / { error = $0 } END { print error ? error : last }'
}
ended() { # the run in slot $1
    local i=${job[$1]} summary=""
    wait "${pid[$1]}"
    status[i]=$? seconds[i]=$((SECONDS - began[$1])) pid[$1]=""
    case ${status[i]} in
        0 | 3) # in builtins only: a Ctrl-C of this moment would end a child process
            read -rd '' summary <"${path[i]}/summary.json"
            [[ $summary =~ \"status\":\ *\"([a-z_]+)\" ]] && state[i]=${BASH_REMATCH[1]} ;;
        2) state[i]=refused note[i]=$(last_words "${path[i]}.log") ;;
        130 | 143) state[i]=stopped ;;
        *) state[i]=failed note[i]="see ${path[i]}.log: $(last_words "${path[i]}.log")" ;;
    esac
    echo "${state[i]} ${path[i]##*/}${note[i]:+: ${note[i]}}"
}
mark() { # run $1, where its steps to an ε are only upper bounds
    local summary=""
    read -rd '' summary 2>/dev/null <"${path[$1]}/summary.json"
    if [[ $summary =~ \"at_first_check\":\ *\[([^]]+)\] ]]; then
        summary=${BASH_REMATCH[1]//[^0-9.e,+-]/}
        note[$1]="an upper bound, as reached at the first check: eps ${summary//,/ }"
    fi
}
while :; do
    running=()
    for s in "${!slots[@]}"; do
        if [[ -n ${pid[s]-} ]] && ! kill -0 "${pid[s]}" 2>/dev/null; then ended "$s"; fi
        if [[ -z ${pid[s]-} ]] && ((next < ${#todo[@]} && !signals)); then start "$s"; fi
        [[ -z ${pid[s]-} ]] || running+=("${pid[s]}")
    done
    ((${#running[@]})) || break
    if ((signals > 1)); then
        kill -KILL "${running[@]/#/-}"
        echo "killed; $go_on"
        exit 130
    elif ((signals && !told)); then
        kill -TERM "${running[@]}"
        told=1
        echo "stopping: each run writes its checkpoint; a second signal ends them at once"
    fi
    sleep 0.5 # not `wait -n`, which tells which run has ended only from bash 5.1 on
done

# --- the table
bad=0
printf '\n%-12s %6s %9s  %s\n' outcome status time run
for i in "${!runs[@]}"; do
    t=${seconds[i]}
    [[ $t == - ]] || printf -v t '%d:%02d:%02d' $((t / 3600)) $((t / 60 % 60)) $((t % 60))
    [[ -n ${note[i]} ]] || mark "$i"
    printf '%-12s %6s %9s  %s\n' "${state[i]}" "${status[i]}" "$t" "${path[i]##*/}${note[i]:+: ${note[i]}}"
    [[ ${state[i]} == finished || ${state[i]} == not_reached ]] || bad=1
done
((!signals)) || { echo "stopped; $go_on"; exit 130; }
exit "$bad"
