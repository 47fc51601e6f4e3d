#!/usr/bin/env bash
# Several nodes, by torchrun: start it on each of them, in any order. Arguments go to the script.
#   NNODES=2 RDZV_ENDPOINT=node0:29400 launch/torchrun_nodes.sh --parallel fsdp2
# Settings, besides NPROC, SCRIPT, PYTHON (see settings.sh):
#   NNODES          how many nodes
#   RDZV_ENDPOINT   host:port of one of them, where the others find each other
#   RDZV_ID         a name for the job; another one for each job that uses the endpoint. Default: distclip
#   NODE_RANK       0, 1, ...: fixes the order of the nodes; RDZV_ENDPOINT is then on node 0. Default: any order
#   LOCAL_ADDR      this node's address, where its host name does not lead the others to it (several networks, a name
#                   that stands for 127.0.0.1); RDZV_ENDPOINT then has such an address too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
needs NNODES "the number of nodes, such as NNODES=2"
needs RDZV_ENDPOINT "host:port of one of the nodes, such as RDZV_ENDPOINT=node0:29400"

host=${RDZV_ENDPOINT%:*}
if [ -n "${NODE_RANK:-}" ]; then
    # torchrun heeds a node's rank only where nothing has to be found out: its c10d rendezvous gives ranks by itself.
    meeting=(--node-rank "$NODE_RANK" --master-addr "$host" --master-port "${RDZV_ENDPOINT##*:}")
else
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-distclip}")
    # It knows the node of the endpoint by its host name alone: without this all nodes would wait for another one.
    [ "$host" != "${LOCAL_ADDR:-}" ] || meeting+=(--rdzv-conf is_host=1)
fi
[ -z "${LOCAL_ADDR:-}" ] || meeting+=(--local-addr "$LOCAL_ADDR")
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" "${meeting[@]}" "$SCRIPT" "$@"
