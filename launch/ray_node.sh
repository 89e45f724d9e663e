#!/usr/bin/env bash
# Starts Ray on this machine, with token authentication and the dashboard on the loopback address.
#
#   launch/ray_node.sh head [OPTION OF ray start]...               the first node; it has the dashboard and takes jobs
#   launch/ray_node.sh worker HEAD:6379 [OPTION OF ray start]...   every other one
#
#   RAY_AUTH_TOKEN_PATH   file with the token, the same on every node; the head writes one where there is none
#                                                                              (~/.ray/auth_token)
#   PYTHON                interpreter that has Ray, at the same path on every node
#                                                                              (.venv/bin/python3 if there, else python3)
#
# With --block it stays in the foreground and ends the node with itself; without, `ray stop` ends Ray on the machine.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
unset RAY_ADDRESS # of the job server; `ray start` would take it for the cluster's

start() {
    exec "$PYTHON" -m ray.scripts.scripts start --disable-usage-stats "$@"
}

case "${1:-}" in
    head)
        require_ray_token
        start --head --dashboard-host 127.0.0.1 "${@:2}"
        ;;
    worker)
        [[ -n "${2:-}" ]] || { echo "ray_node: no address; usage: launch/ray_node.sh worker HEAD:6379" >&2; exit 2; }
        if [[ "${RAY_AUTH_MODE:-token}" == token && -z "${RAY_AUTH_TOKEN:-}" && ! -s "$(ray_token_file)" ]]; then
            echo "ray_node: no token in $(ray_token_file); copy the head's file there, or name it in RAY_AUTH_TOKEN_PATH" >&2
            exit 2
        fi
        require_ray_token
        start --address "$2" "${@:3}"
        ;;
    *)
        echo "ray_node: '${1:-}' is neither head nor worker; usage: launch/ray_node.sh head, or worker HEAD:6379" >&2
        exit 2
        ;;
esac
