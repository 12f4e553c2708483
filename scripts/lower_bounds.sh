#!/usr/bin/env bash
# Install the lowest versions that requirements.txt allows, once, and run a short set of tests with them: all modes,
# figures, a notebook, wandb offline. Tried with Python 3.10.13: 323 passed.
#
#   PYTHON=python3.10 scripts/lower_bounds.sh [DIR]      # default: .venv-lower, of 6 GB
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
env=${1:-.venv-lower}
if [[ ! -e $env/complete ]]; then
    "${PYTHON:-python3.10}" -m venv "$env" && "$env/bin/pip" install --quiet uv || exit
    "$env/bin/uv" pip install --quiet --python "$env/bin/python" --resolution lowest-direct -r requirements.txt || exit
    touch "$env/complete"
fi
tests=(tests/test_{experiments,figures,report,docs,wandb,data,shb}.py)
"$env/bin/python" -m pytest -W ignore::DeprecationWarning "${tests[@]}" "${@:2}"
