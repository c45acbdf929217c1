#!/usr/bin/env bash
# Starts the ranks of one node: give it launch/train.py's options, once on every node.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 NPROC_PER_NODE=8 launch/node.sh --fsdp --config my.yaml
#
# COMMAND         train (the default), or doctor
# LAUNCHER        torchrun (the default; also for --ds_config), or deepspeed
# NNODES          nodes in all                     (1; Slurm's)
# NODE_RANK       this one, from 0                 (0; Slurm's)
# NPROC_PER_NODE  ranks of each node               (its GPUs that CUDA_VISIBLE_DEVICES shows, or 1)
# MASTER_ADDR     the first node's name or address (127.0.0.1)
# MASTER_PORT     a free port of it                (29500)
# PYTHON          the interpreter                  (python)
#
# SIGTERM or SIGUSR1 to this script reaches the ranks, which save and end, and not the launcher,
# which would kill them 30 s later. The status is the launcher's, but 75 (EX_TEMPFAIL: start it
# again) after a signal.
set -euo pipefail

# The launcher on the first node serves the store, to which each rank keeps four or five
# connections.
ulimit -Sn "$(ulimit -Hn)"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
# The indices of the GPUs that this job may use; on CPUs, those of the ranks.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
    count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || count=0
    count=${NPROC_PER_NODE:-$count}
    mapfile -t gpus < <(seq 0 $((count > 0 ? count - 1 : 0)))
fi
nodes=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
node=${NODE_RANK:-${SLURM_NODEID:-0}}
ranks=${NPROC_PER_NODE:-${#gpus[@]}}
if [ "$ranks" -gt "${#gpus[@]}" ]; then
    echo "error: NPROC_PER_NODE=$ranks, but CUDA_VISIBLE_DEVICES shows ${#gpus[@]}: set fewer" >&2
    exit 2
fi
address=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}")

case ${COMMAND:-train} in
train) script=("$here/train.py") ;;
doctor) script=(--module scalora_dist doctor) ;;
*)
    echo "error: COMMAND=$COMMAND: set train or doctor" >&2
    exit 2
    ;;
esac

case ${LAUNCHER:-torchrun} in
torchrun)
    command=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$node"
        --nproc_per_node "$ranks" "${address[@]}")
    ;;
deepspeed)
    # What `deepspeed --no_ssh` starts on a node; it takes the list of all nodes encoded.
    world=$("$python" -c 'if True:
        import base64, json, sys
        nodes, ranks, *gpus = (int(x) if x.isdigit() else x for x in sys.argv[1:])
        world = {f"node {node}": gpus[:ranks] for node in range(nodes)}
        print(base64.urlsafe_b64encode(json.dumps(world).encode()).decode())' \
        "$nodes" "$ranks" "${gpus[@]}")
    command=("$python" -m deepspeed.launcher.launch --world_info "$world" --node_rank "$node"
        "${address[@]}")
    ;;
*)
    echo "error: LAUNCHER=$LAUNCHER: set torchrun or deepspeed" >&2
    exit 2
    ;;
esac

# Slurm signals every process of a job step. The launcher must survive SIGUSR1. The ranks get SIGTERM
# below, which also ends ranks that are still loading.
(
    trap '' USR1
    exec "${command[@]}" "${script[@]}" "$@"
) &
launcher=$!

stopped=
# shellcheck disable=SC2329 # called by `trap`
pass_on() {
    local ranks
    stopped=yes
    # Not pgrep, which many images lack.
    mapfile -t ranks < <(grep -ls "^PPid:[[:space:]]$launcher\$" /proc/[0-9]*/status)
    ranks=("${ranks[@]#/proc/}")
    kill -TERM "${ranks[@]%/status}" 2>/dev/null || kill -TERM "$launcher" 2>/dev/null || true
}
trap pass_on TERM USR1

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ended `wait` before the launcher ended
    status=0
    wait "$launcher" || status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    status=75
fi
exit "$status"
