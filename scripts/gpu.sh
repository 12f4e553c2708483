#!/usr/bin/env bash
# On a machine with a GPU: run the CUDA tests, measure the speed, and take one published point of the paper.
#
#   scripts/gpu.sh [DIR]      # default: results/gpu
#
# tests      tests/test_cuda.py, to DIR/tests.log
# speed      bench.py, eager and with --cuda_graph, to DIR/bench.log and DIR/bench_cuda_graph.log
# published  SHB, ResNet18, CIFAR-100, b = 1024, steps to ε = 1.0, 0.7, 0.5, in DIR/runs; with --cuda_graph if the tests
#            passed; beside the published 5,314, 9,599 and 15,982 steps
#
# Each part may take MINUTES (default: 9). What is done is left out; the same command goes on where it was. DATA_DIR is
# where CIFAR-100 lies or is downloaded to (default: data), PYTHON the interpreter. It needs torch, torchvision, numpy,
# tqdm and pytest.
# Exit status: 0 all done, 1 a part has failed, 2 no GPU, 124 time was over: run it again, 130 or 143 stopped.
case ${1-} in -*)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
out=$(realpath -m "${1:-results/gpu}") data=$(realpath -m "${DATA_DIR:-data}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python} status=0
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch finds no CUDA GPU here" >&2
    exit 2
fi
mkdir -p "$out" || exit

part() { # NAME COMMAND…: run it for at most MINUTES; the log, and the mark that it is done, lie in DIR
    local name=$1 ended
    shift
    if [[ -e $out/$name.done ]]; then
        echo "$name: done already"
        return 0
    fi
    echo "$name: $*"
    timeout --foreground -k 60 "${MINUTES:-9}m" "$python" "$@" >>"$out/$name.log" 2>&1
    ended=$?
    tail -n 1 "$out/$name.log"
    case $ended in
    0) touch "$out/$name.done" ;;
    124) [[ $status == 1 ]] || status=124 ;;
    129 | 130 | 143) exit $ended ;;
    *) status=1 ;;
    esac
    echo "$name: exit status $ended, see $out/$name.log"
    return $ended
}

part tests -m pytest -o addopts= -p no:cacheprovider -q tests/test_cuda.py && graph=--cuda_graph
bench=(bench.py --models ResNet18 --batchsizes 8 32 128 1024 --modes normal --device cuda)
part bench "${bench[@]}"
part bench_cuda_graph "${bench[@]}" --cuda_graph
published=(--mode critical --optimizer shb --batchsize 1024 --eps 1.0 0.7 0.5 --name published --resume)
part published main.py "${published[@]}" ${graph-} --device cuda --data_dir "$data" --runs_dir "$out/runs"
exit $status
