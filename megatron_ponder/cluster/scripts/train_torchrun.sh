#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains on all GPUs of all nodes: SLURM starts one torchrun on each node, which starts a rank on each of its GPUs.
#
#     sbatch --nodes 4 megatron_ponder/cluster/scripts/train_torchrun.sh --config FILE.yaml --parallel.tensor 8
#
# RANKS_PER_NODE is the number of GPUs of a node unless it is set.

source megatron_ponder/cluster/scripts/words.sh
source megatron_ponder/cluster/scripts/step.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# This is torchrun that passes signals on and keeps the exit code of its ranks.
run_and_requeue srun "${srun_options[@]}" --wait=60 --label \
    "${python[@]}" -m megatron_ponder torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${RANKS_PER_NODE:-${SLURM_GPUS_PER_NODE##*:}}" \
    --master-addr="$first" --master-port="$port" \
    -m megatron_ponder train "$@" --checkpoint.resume auto
