#!/usr/bin/env bash
# The tests marked gpu, on a machine with a CUDA GPU and its own PyTorch: nothing is installed, $PYTHON (python3) is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH="$PWD" "${PYTHON:-python3}" -m pytest --device cuda -p no:cacheprovider "$@" tests
