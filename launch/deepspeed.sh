#!/usr/bin/env bash
# One node or several, by DeepSpeed's launcher. Arguments go to the script.
#   launch/deepspeed.sh --parallel zero2
#   SCRIPT=launch/deepspeed_train.py launch/deepspeed.sh --config launch/deepspeed/zero3.json
#   HOSTFILE=hosts launch/deepspeed.sh --parallel zero3                     (on one node, which reaches all by ssh)
#   HOSTFILE=hosts NODE_RANK=0 RDZV_ENDPOINT=node0:29500 launch/deepspeed.sh --parallel zero3       (on each, no ssh)
# Settings, besides SCRIPT and PYTHON (see settings.sh):
#   NPROC           ranks on each node; default: all GPUs, or the slots of HOSTFILE
#   HOSTFILE        the nodes, a line `name slots=ranks` each
#   NODE_RANK       this node's line in HOSTFILE, from 0: every node is started by hand
#   RDZV_ENDPOINT   host:port of node 0
set -euo pipefail
chosen=${NPROC:-}
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# launch/train.py, as most scripts, reads LOCAL_RANK and knows no --local_rank.
options=(--no_local_rank)
[ -z "$chosen" ] || options+=(--num_gpus "$chosen")
[ -z "${HOSTFILE:-}" ] || options+=(--hostfile "$HOSTFILE")
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    options+=(--master_addr "${RDZV_ENDPOINT%:*}" --master_port "${RDZV_ENDPOINT##*:}")
fi
if [ -n "${NODE_RANK:-}" ]; then
    needs HOSTFILE "the file with all nodes, a line such as 'node0 slots=8' each"
    needs RDZV_ENDPOINT "host:port of node 0, such as RDZV_ENDPOINT=node0:29500"
    options+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" "$SCRIPT" "$@"
