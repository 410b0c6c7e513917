# Sourced by the scripts beside it that train.

# run_and_requeue COMMAND...
#
# Runs a job step. When SLURM announces the end of the job's time to this script (--signal=B:USR1@SECONDS), all ranks are
# told: they save after the step they are in and end with code 75, for which the job is put back into the queue. So are
# ranks that ended by themselves because the next checkpoint would not fit into the time that is left, and a step that
# has failed because a node is gone. A job that is cancelled saves as well, and is not put back.
run_and_requeue() {
    local told="" cancelled="" again=yes code=0 reason="" step
    # the ranks read it, to know how much time is left
    SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null) && export SLURM_JOB_END_TIME
    trap 'told=yes; again=yes; kill -USR1 "$step"' USR1 # srun passes it on to all ranks
    trap 'cancelled=yes; again=yes' TERM                # SLURM sends it to the ranks as well
    "$@" &
    step=$!
    # bash answers a signal only while nothing runs in the foreground, and the answer interrupts `wait`
    while [ -n "$again" ]; do
        again=""
        wait "$step"
        code=$?
    done
    if [ "$code" -eq 0 ] || [ -n "$cancelled" ]; then
        return "$code"
    elif [ "$code" -eq 75 ]; then
        reason="it has saved"
    elif [ -n "$told" ]; then
        reason="it was told to leave" # while it was starting, perhaps
    elif [ "$code" -ne 2 ] && ! nodes_answer; then
        reason="a node does not answer"
    fi
    if [ -n "$reason" ] && [ -z "$cancelled" ]; then
        echo "$(date +%T) exit code $code, $reason: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script
    fi
    return "$code"
}

# Whether every node of the job still starts processes.
nodes_answer() {
    timeout 60 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --quiet true
}
