#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#
# Evaluates a run once the job that trains it has succeeded.
#
#     sbatch --dependency=afterok:JOB megatron_ponder/cluster/scripts/evaluate.sh --checkpoint runs/x --output runs/x/evaluation.json

source megatron_ponder/cluster/scripts/words.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun "${srun_options[@]}" "${python[@]}" -m megatron_ponder evaluate "$@"
