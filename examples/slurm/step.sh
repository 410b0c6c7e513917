# Sourced by the scripts of this folder that train.

# run_and_requeue COMMAND...
#
# Runs a job step. When SLURM announces the end of the job's time to this script (--signal=B:USR1@SECONDS), all ranks are
# told: they save after the step they are in and end with code 75, for which the job is put back into the queue. So are
# ranks that ended by themselves because the next checkpoint would not fit into the time that is left. A job that is
# cancelled saves as well, and is not put back.
run_and_requeue() {
    local told="" cancelled="" again=yes code=0 step
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
    if [ -z "$cancelled" ] && { [ "$code" -eq 75 ] || { [ -n "$told" ] && [ "$code" -ne 0 ]; }; }; then
        echo "$(date +%T) saved, with code $code; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script
    fi
    return "$code"
}
