#!/bin/bash
#SBATCH --job-name=preprocess
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Tokenises a corpus on all nodes, with as many processes on each as it has cores for the job.
#
#     sbatch --nodes 4 megatron_ponder/cluster/scripts/preprocess.sh --input corpus/ --output-prefix data/corpus \
#         --tokenizer data/tokenizer.model --append-eod
#
# The files are those of one process, byte for byte. The same command goes on from what is finished.

source megatron_ponder/cluster/scripts/words.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun "${srun_options[@]}" --label \
    "${python[@]}" -m megatron_ponder preprocess --workers "$SRUN_CPUS_PER_TASK" "$@"
