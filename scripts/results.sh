#!/usr/bin/env bash
# The study behind results/, from the runs to the front page: `bash scripts/results.sh --help` says how.
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/study.py" "$@"
