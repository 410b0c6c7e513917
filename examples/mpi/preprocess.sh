#!/bin/bash
# Tokenises a corpus under mpirun: each of RANKS processes tokenises its share, with the same files as one process.
#
#     HOSTS=node1,node2 RANKS=2 examples/mpi/preprocess.sh --input corpus/ --output-prefix data/corpus \
#         --tokenizer data/tokenizer.model --workers 32 --append-eod

source megatron_ponder/cluster/scripts/words.sh
words python "${PYTHON:-python}"
words options "${MPIRUN_OPTIONS:-}"
options+=(-np "${RANKS:?how many ranks? set RANKS}")
[ -n "${HOSTS:-}" ] && options+=(-host "$HOSTS")
exec mpirun "${options[@]}" "${python[@]}" -m megatron_ponder preprocess "$@"
