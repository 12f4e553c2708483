#!/usr/bin/env bash
# The paper's grid on the GPUs of this machine: `scripts/sweep.sh --help` says how. PYTHON names the interpreter.
python=${PYTHON:-python}
command -v "$python" >/dev/null || { echo "error: there is no interpreter '$python'; PYTHON names another" >&2; exit 2; }
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/sweep.py" "$@"
