#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains on all GPUs of all nodes: SLURM starts one rank on each. Saves and starts again before the time limit.
#
#     sbatch --nodes 4 megatron_ponder/cluster/scripts/train.sh --config FILE.yaml --parallel.tensor 8

source megatron_ponder/cluster/scripts/words.sh
source megatron_ponder/cluster/scripts/step.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
# srun gives its processes the cores that were asked for only if it is told so too
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# --distribution=block: ranks that follow each other are on one node, as tensor ranks have to be.
# --wait: a minute after the first rank has ended, all others are.
run_and_requeue srun "${srun_options[@]}" --distribution=block --wait=60 --label \
    "${python[@]}" -m megatron_ponder train "$@" --checkpoint.resume auto
