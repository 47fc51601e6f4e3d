#!/usr/bin/env bash
# One node or several, by `accelerate launch`. Arguments go to the script.
#   CONFIG=launch/accelerate/fsdp2.yaml SCRIPT=launch/accelerate/train.py launch/accelerate.sh
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=node0:29500 CONFIG=... SCRIPT=... launch/accelerate.sh    (on node 1: NODE_RANK=1)
# Settings, besides SCRIPT and PYTHON (see settings.sh):
#   CONFIG          a file that `accelerate config` wrote, or one of launch/accelerate
#   NPROC           ranks on each node; default: what CONFIG says
#   NNODES          how many nodes; default: what CONFIG says. With it, on each node:
#   NODE_RANK       0, 1, ...
#   RDZV_ENDPOINT   host:port of node 0
set -euo pipefail
chosen=${NPROC:-}
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
needs CONFIG "a configuration of Accelerate, such as CONFIG=launch/accelerate/fsdp2.yaml"

options=(--config_file "$CONFIG")
if [ -n "${NNODES:-}" ]; then
    needs NODE_RANK "this node's number: 0, 1, ..."
    needs RDZV_ENDPOINT "host:port of node 0, such as RDZV_ENDPOINT=node0:29500"
    options+=(--num_machines "$NNODES" --machine_rank "$NODE_RANK")
    options+=(--main_process_ip "${RDZV_ENDPOINT%:*}" --main_process_port "${RDZV_ENDPOINT##*:}")
fi
# Accelerate counts the ranks of all nodes together.
[ -z "$chosen" ] || options+=(--num_processes "$((chosen * ${NNODES:-1}))")
exec "$PYTHON" -m accelerate.commands.accelerate_cli launch "${options[@]}" "$SCRIPT" "$@"
