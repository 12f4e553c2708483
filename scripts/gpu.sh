#!/usr/bin/env bash
# On a machine with a GPU, once: what this repository has not measured there. `scripts/gpu.sh --help` says more.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
