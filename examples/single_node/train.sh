#!/bin/bash
# Trains on the GPUs of this machine, without a scheduler.
#
#     examples/single_node/train.sh --config FILE.yaml --parallel.zero_stage 2
#
# RANKS is the number of GPUs unless it is set; on a machine without any, set it. After Ctrl-C, `kill -USR1` on this
# script's process, or a reboot, the same command goes on from the latest checkpoint.

ranks=${RANKS:-$(nvidia-smi --list-gpus | wc -l)}
exec ${PYTHON:-python} tools/torchrun.py --standalone --nproc-per-node "$ranks" \
    pretrain_ponder.py "$@" --checkpoint.resume auto
