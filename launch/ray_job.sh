#!/usr/bin/env bash
# `ray job submit` that ends with the job's own exit status. Arguments are those of `ray job submit`:
#
#   launch/ray_job.sh --working-dir . -- python3 -m openrlhf_bd.cli.train_bd_ray --config configs/mine.yaml
#
#   RAY_ADDRESS     address of the job server                                  (http://127.0.0.1:8265)
#   RAY_AUTH_MODE   "token" where the cluster asks for one; then RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
#                   ~/.ray/auth_token has it                                   (as in Ray)
#   PYTHON          interpreter that has Ray, on this machine                  (.venv/bin/python3 if there, else python3)
#
# `ray job submit` itself ends with 1 whatever the driver's status was, and with 0 for a job that was stopped.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
DEFAULT_PYTHON=python3
[[ -x "$HERE/../.venv/bin/python3" ]] && DEFAULT_PYTHON="$HERE/../.venv/bin/python3"
PYTHON="${PYTHON:-$DEFAULT_PYTHON}"
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}"

# Ray joins the command's words with spaces, in double quotes those that contain one, and gives the line to a shell.
refuse_shell_characters() {
    local word reason=""
    for word in "$@"; do
        case "$word" in
            *[\$\`\"]*) reason='$, ` or "' ;;
            *[[:space:]]*) ;;
            *[\;\&\|\<\>\*\?\(\)\'\\\[\{\!]* | [~#]*) reason="a shell character" ;;
        esac
        if [[ -n "$reason" ]]; then
            echo "ray_job: '$word' has $reason, which would not reach the job as it is; put it into a --config file." >&2
            exit 2
        fi
    done
}

arguments=("$@")
while (($# > 0)) && [[ "$1" != -- ]]; do shift; done
if (($# < 2)); then
    echo "ray_job: no command; usage: launch/ray_job.sh <options of ray job submit> -- <command>" >&2
    exit 2
fi
shift
refuse_shell_characters "$@"

id="bd-$(date +%Y%m%d-%H%M%S)-$$-$RANDOM"
submit_status=0
"$PYTHON" -m ray.scripts.scripts job submit --submission-id "$id" "${arguments[@]}" || submit_status=$?
exec "$PYTHON" "$HERE/job_exit_status.py" "$RAY_ADDRESS" "$id" "$submit_status"
