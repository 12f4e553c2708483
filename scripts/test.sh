#!/usr/bin/env bash
# Check style and run all tests, in the active virtual environment or one made for it; arguments go to pytest.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh
ruff check . && ruff format --check . && python -m pytest "$@"
