#!/usr/bin/env bash
# The whole test suite, linter and type checker, in the environment that it makes itself. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv dev
if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
fi
# By files, because some of these share a port.
"$python" -m pytest --numprocesses 2 --dist loadfile --durations 25 "$@"
