#!/bin/bash
#SBATCH --job-name=generate
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.log
#
# Continues the prompts in a file, one a line: each job of the array a part of them, on a node of its own.
#
#     PROMPTS=prompts.txt OUTPUT=runs/texts sbatch --array=0-15 megatron_ponder/cluster/scripts/generate.sh --checkpoint runs/x
#
# `cat runs/texts/*.jsonl` has one JSON object for each prompt, in the order of the file.

source megatron_ponder/cluster/scripts/words.sh
words srun_options "${SRUN_OPTIONS:-}"
words python "${PYTHON:-python}"
: "${PROMPTS:?of which file? set PROMPTS}" "${OUTPUT:?into which folder? set OUTPUT}"
parts=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))

# Each line becomes a text in JSON, so that no prompt is taken for an option, however it begins, and any number fits.
set -o pipefail
prompts=$(split --number="l/$part/$parts" -- "$PROMPTS" |
    LC_ALL=C sed 's/\r$//; s/[\\"]/\\&/g; s/\t/\\t/g; s/.*/"&"/') || exit 2
if [ -z "$prompts" ]; then exit 0; fi # more parts than prompts

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
mkdir -p -- "$OUTPUT" || exit 2
file=$(printf '%s/part-%05d.jsonl' "$OUTPUT" "$part")
srun "${srun_options[@]}" "${python[@]}" -m megatron_ponder generate "$@" --prompts-file - <<< "$prompts" > "$file.partial" &&
    mv -- "$file.partial" "$file"
