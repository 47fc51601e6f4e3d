#!/usr/bin/env bash
# One node, by torchrun. Arguments go to the script.
#   launch/torchrun.sh --parallel fsdp2 --model transformer
#   NPROC=4 SCRIPT=my_train.py launch/torchrun.sh --my-argument
# Settings: NPROC, SCRIPT, PYTHON (see settings.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$SCRIPT" "$@"
