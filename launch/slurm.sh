#!/usr/bin/env bash
# SLURM, by srun and torchrun: one task a node, which starts the node's ranks. Submit it from the repository's root;
# arguments after its name go to the script, sbatch's own stand before it.
#   sbatch launch/slurm.sh --parallel fsdp2
#   NPROC=4 sbatch --nodes 4 --gpus-per-node 4 launch/slurm.sh --parallel hsdp
# Settings, besides NPROC (default: the GPUs that SLURM gave the node), SCRIPT and PYTHON (see settings.sh):
#   REPO   where distclip's repository lies on the nodes; default: where sbatch was called
#   PORT   of the first node, for torchrun; default: one that follows from the job's number
#SBATCH --job-name=distclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
set -euo pipefail
# sbatch runs a copy of this file, somewhere else: what lies beside it is found from REPO.
REPO=${REPO:-$SLURM_SUBMIT_DIR}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

export NNODES=$SLURM_JOB_NUM_NODES
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-auto}}
export RDZV_ENDPOINT=${nodes[0]}:${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export RDZV_ID=$SLURM_JOB_ID
# sbatch's --cpus-per-task does not reach srun by itself any more.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

srun --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 bash "$REPO/launch/torchrun_nodes.sh" "$@"
