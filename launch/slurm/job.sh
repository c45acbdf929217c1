#!/usr/bin/env bash
# What deepspeed.sbatch and torchrun.sbatch have in common; runs on the job's first node.
set -euo pipefail

output=${OUTPUT_DIR:-runs/slurm-$SLURM_JOB_ID} # the same after a requeue
read -ra engine_words <<<"$ENGINE"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
if [ -d .venv/bin ]; then
    export PATH=$PWD/.venv/bin:$PATH
fi

rm -f "$output/preempted"
trap : TERM USR1 # outlive srun, whose tasks get these signals too
status=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 launch/node.sh "${engine_words[@]}" \
    --config "$RECIPE" --output_dir "$output" --resume_from_checkpoint latest "$@" || status=$?

# Launchers do not always pass the ranks' status on: the run leaves a file, too.
if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" = CANCELLED ]; then
    exit "$status"
fi
if [ -e "$output/preempted" ] || [ "$status" -eq 75 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "stopped by a signal after $SLURM_RESTART_COUNT restarts (MAX_RESTARTS): no more" >&2
        exit "$status"
    fi
    echo "stopped by a signal: back into the queue, to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
