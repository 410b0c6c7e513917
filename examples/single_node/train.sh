#!/bin/bash
# Trains on the GPUs of this machine, without a scheduler.
#
#     examples/single_node/train.sh --config FILE.yaml --parallel.zero_stage 2
#
# RANKS is the number of GPUs unless it is set; on a machine without any, set it. After Ctrl-C, `kill -USR1` on this
# script's process, or a reboot, the same command goes on from the latest checkpoint.

source megatron_ponder/cluster/scripts/words.sh
words python "${PYTHON:-python}"
ranks=${RANKS:-$(nvidia-smi --list-gpus 2> /dev/null | grep --count '^GPU ')}
if [ "$ranks" = 0 ]; then
    echo "error: nvidia-smi finds no GPU on this machine; set RANKS to the number of processes, such as RANKS=2" >&2
    exit 2
fi
exec "${python[@]}" -m megatron_ponder torchrun --standalone --nproc-per-node "$ranks" \
    -m megatron_ponder train "$@" --checkpoint.resume auto
