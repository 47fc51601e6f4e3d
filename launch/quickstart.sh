#!/usr/bin/env bash
# From a machine with only Python and pip to a picture: two ranks train a small transformer under FSDP2, once clipped
# by distclip and once not, and the clipped run is compared with one process. A few minutes, most of them the install.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv train

export OMP_NUM_THREADS=1
train() {
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py \
        --parallel fsdp2 --model transformer --data text "$@"
}
echo
echo "1/2  Without clipping (the norm is only measured), two ranks, FSDP2"
train --rule none --out runs/quickstart/unclipped
echo
echo "2/2  Clipped at a global norm of 1, two ranks, FSDP2, then the same on one process"
train --rule global_norm=1.0 --out runs/quickstart/clipped --compare
echo
echo "The pictures (loss, and the norm before and after clipping):"
echo "  $PWD/runs/quickstart/unclipped/steps.png"
echo "  $PWD/runs/quickstart/clipped/steps.png"
