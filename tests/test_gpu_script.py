"""scripts/gpu.sh on a CPU: an interpreter that only notes how it is called takes Python's place."""

import os
import subprocess

import pytest
from conftest import ROOT

import arguments
import bench

PYTHON = r"""#!/bin/sh
[ "$1" != -c ] || exit $NO_GPU
printf '%s\t' "$@" >> "calls"; echo >> "calls"
case "$*" in
"-m pytest"*) eval "$TESTS" ;;
main.py*) eval "$MAIN" ;;
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs the script, in which tests and main.py do what is given in shell; its end and the command lines."""
    (tmp_path / "python").write_text(PYTHON.replace("calls", str(tmp_path / "calls")))
    (tmp_path / "python").chmod(0o755)

    def run(no_gpu=0, minutes="1", tests="", main=""):
        (tmp_path / "calls").write_text("")
        environment = {"NO_GPU": str(no_gpu), "MINUTES": minutes, "TESTS": tests, "MAIN": main}
        environment |= {"PYTHON": str(tmp_path / "python")}
        command = ["bash", str(ROOT / "scripts" / "gpu.sh"), str(tmp_path / "out")]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        return done, [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def test_all_parts_are_done_once_with_command_lines_that_are_taken(gpu, tmp_path):
    done, (tests, *benches, main) = gpu()
    assert (done.returncode, done.stderr, tests[-1]) == (0, "", "tests/test_cuda.py")
    for words, graph in zip(benches, (False, True), strict=True):
        args = arguments.parse(bench.command_line(words[1:])[1])
        assert (args.cuda_graph, args.device) == (graph, "cuda")
    args = arguments.parse(main[1:])
    assert (args.mode, args.optimizer, args.model, args.batchsize) == ("critical", "shb", "ResNet18", 1024)
    assert args.eps == [1.0, 0.7, 0.5] and args.resume and args.cuda_graph and args.max_steps is None
    again, calls = gpu()
    assert (again.returncode, calls) == (0, []) and again.stdout.count("done already") == 4


def test_what_fails_or_takes_too_long_is_tried_again_and_the_rest_goes_on(gpu):
    done, calls = gpu(tests="echo 1 failed; exit 1", main="trap 'exit 143' TERM; sleep 9 & wait", minutes="0.01")
    assert done.returncode == 1 and "1 failed\ntests: exit status 1, see " in done.stdout
    assert len(calls) == 4 and not arguments.parse(calls[3][1:]).cuda_graph
    done, calls = gpu(main="exit 143")
    assert done.returncode == 143 and len(calls) == 2 and arguments.parse(calls[1][1:]).cuda_graph
    assert gpu(main="sleep 9", minutes="0.01")[0].returncode == 124
    assert gpu()[0].returncode == 0


def test_without_a_gpu_it_is_one_error_line(gpu, tmp_path):
    done, calls = gpu(no_gpu=1)
    assert (done.returncode, done.stdout, done.stderr, calls) == (2, "", "error: torch finds no CUDA GPU here\n", [])
    assert not (tmp_path / "out").exists()
