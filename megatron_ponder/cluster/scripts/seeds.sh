#!/bin/bash
#SBATCH --job-name=seeds
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#
# Trains one model for each number of the array, from that seed, in a run folder of its own below $RUNS.
#
#     RUNS=runs/seeds sbatch --array=0-9 megatron_ponder/cluster/scripts/seeds.sh --config FILE.yaml

source megatron_ponder/cluster/scripts/words.sh
source megatron_ponder/cluster/scripts/step.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
seed=$SLURM_ARRAY_TASK_ID

run_and_requeue srun "${srun_options[@]}" --distribution=block --wait=60 --label \
    "${python[@]}" -m megatron_ponder train "$@" --checkpoint.resume auto \
    --training.seed "$seed" --training.run_dir="${RUNS:-runs/seeds}/seed-$seed"
