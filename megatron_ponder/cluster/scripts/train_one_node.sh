#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#
# Trains on the GPUs of one node, one rank on each, until it is done or out of time.
#
#     sbatch megatron_ponder/cluster/scripts/train_one_node.sh --config FILE.yaml
#
# The same command goes on from the latest checkpoint.

source megatron_ponder/cluster/scripts/words.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun "${srun_options[@]}" --wait=60 --label \
    "${python[@]}" -m megatron_ponder train "$@" --checkpoint.resume auto
