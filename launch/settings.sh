# Sourced by the launchers beside it. Settings, by environment variables:
#   SCRIPT   what every rank runs; default: train.py beside this file
#   PYTHON   the interpreter; default: .venv of the repository where launch/quickstart.sh made one, else python3
#   NPROC    ranks on each node; default: one for each GPU, without GPUs one for each core
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$launch/../.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
SCRIPT=${SCRIPT:-$launch/train.py}
NPROC=${NPROC:-auto}
# Ranks share the cores; without it torchrun says that it chose 1, each time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Ends the script unless this variable is set: needs NAME "what it is, with an example".
needs() {
    if [ -z "${!1:-}" ]; then
        echo "$(basename "$0"): set $1, $2" >&2
        exit 2
    fi
}
