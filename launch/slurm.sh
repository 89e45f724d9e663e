#!/usr/bin/env bash
#SBATCH --job-name=openrlhf_bd
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
# A Ray cluster over the nodes of a Slurm job, for the length of one command. Exit status: the command's.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 12:00:00 launch/slurm.sh launch/paper/table1.sh --mode online
#
# from the root of the sources, at the same path on every node, as everything it names (docs/clusters.md). The same
# command again goes on where a cancelled or timed-out one was.
#
#   ROOT            folder of the sources                                      (the folder of sbatch)
#   PYTHON          interpreter of the job, at the same path on every node     (.venv/bin/python3 if there, else python3)
#   HEAD_IP         address of the first node for the others                   (the one of its default route)
#   RAY_PORT        of the cluster                                             (6379)
#   DASHBOARD_PORT  of jobs and dashboard, on the loopback address alone       (8265)
#   WAIT_S          longest wait for all nodes, seconds                        (300)
#   LOGS            folder of the nodes' logs and the token, on a shared disk  (runs/slurm-JOB)
#   NODE_OPTIONS    further options of `ray start` on every node               (none)
set -euo pipefail

fail() {
    echo "slurm: $1" >&2
    exit "${2:-2}"
}

[[ -n "${SLURM_JOB_NODELIST:-}" ]] || fail "not in a Slurm job; usage: sbatch --nodes N launch/slurm.sh COMMAND"
(($# > 0)) || fail "no command; usage: sbatch --nodes N launch/slurm.sh launch/paper/table1.sh"
# Slurm runs a copy of this file from a folder of its own.
cd "${ROOT:-${SLURM_SUBMIT_DIR:?}}"
[[ -f launch/ray_node.sh ]] || fail "$PWD: no launch/ray_node.sh here; run sbatch in the root of the sources, or set ROOT"
# shellcheck source-path=SCRIPTDIR source=common.sh
source launch/common.sh
RAY_PORT="${RAY_PORT:-6379}"
export RAY_ADDRESS="http://127.0.0.1:${DASHBOARD_PORT:-8265}"
LOGS="$(realpath -m "${LOGS:-runs/slurm-$SLURM_JOB_ID}")"
read -ra node_options <<<"${NODE_OPTIONS:-}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]} > 0)) || fail "scontrol names no node for $SLURM_JOB_NODELIST"

# A token of this job's own, unless the user brings one.
mkdir -p "$LOGS"
[[ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]] || export RAY_AUTH_TOKEN_PATH="$LOGS/auth_token"
require_ray_token

declare -A node_pids=()
command_pid=""
cluster=starting
# Each background job is a process group of its own, so that it ends with all that it started.
set -m

# shellcheck disable=SC2329 # called by the trap
end_all() {
    trap '' INT TERM
    local pid
    # A command that was interrupted leaves its job behind, whose driver would outlive the cluster.
    [[ -z "$command_pid" || "$cluster" != whole ]] || timeout 60 "$PYTHON" "$ROOT/launch/stop_jobs.py" || true
    for pid in $command_pid "${node_pids[@]}"; do
        kill -TERM -- "-$pid" 2>/dev/null || true
    done
    for _ in $(seq 30); do
        [[ -n "$(jobs -r)" ]] || break
        sleep 1
    done
    for pid in $(jobs -rp); do
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
}
trap end_all EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# start_node NODE ARGUMENT OF ray_node.sh...: one step of the job; it lasts as long as the node.
start_node() {
    # One task that may use all of the node: Ray divides it.
    srun --nodes=1 --ntasks=1 --nodelist="$1" --cpu-bind=none --export=ALL \
        "$ROOT/launch/ray_node.sh" "${@:2}" --block --node-name "$1" "${node_options[@]}" >"$LOGS/$1.log" 2>&1 &
    node_pids[$1]=$!
}

# run COMMAND...: in the background, so that a signal reaches this shell at once; returns its status.
run() {
    local status=0
    "$@" &
    command_pid=$!
    wait "$command_pid" || status=$?
    command_pid=""
    return "$status"
}

# wait_for_nodes NODE...
wait_for_nodes() {
    local node started=()
    for node in "$@"; do
        started+=("$node=${node_pids[$node]}")
    done
    run "$PYTHON" "$ROOT/launch/wait_for_nodes.py" --timeout_s "${WAIT_S:-300}" --logs "$LOGS" "${started[@]}"
}

HEAD_IP="${HEAD_IP:-$("$PYTHON" -c 'import ray; print(ray.util.get_node_ip_address())')}"
echo "slurm: ${#nodes[@]} node(s), head ${nodes[0]} at $HEAD_IP:$RAY_PORT; logs in $LOGS"
start_node "${nodes[0]}" head --node-ip-address "$HEAD_IP" --port "$RAY_PORT" --dashboard-port "${DASHBOARD_PORT:-8265}" \
    --temp-dir "/tmp/ray-$SLURM_JOB_ID"
wait_for_nodes "${nodes[0]}"
for node in "${nodes[@]:1}"; do
    start_node "$node" worker "$HEAD_IP:$RAY_PORT"
done
wait_for_nodes "${nodes[@]}"
cluster=whole

run "$@"
