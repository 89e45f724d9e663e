# shellcheck shell=bash
# What the launch scripts share. Sourced by them, it starts nothing; each script says which of these it uses:
#
#   RAY_ADDRESS     address of the job server                                  (http://127.0.0.1:8265)
#   RAY_AUTH_MODE   "token" or "disabled"                                      (token, where ray_token.sh finds one)
#   PYTHON          interpreter of the job, at the same path on every node     (.venv/bin/python3 if there, else python3)
#   MODE            offline, or online: rows are made while the student trains (offline)
#   SCALE           full, or toy: models and data of a laptop                  (full)
#   DATA            folder of the data sets, on a disk that all nodes share    (data)
#   OUT             folder of the results, on a disk that all nodes share      (runs/<script>; toy: runs/<script>-toy)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DEFAULT_PYTHON=python3
[[ -x "$ROOT/.venv/bin/python3" ]] && DEFAULT_PYTHON="$ROOT/.venv/bin/python3"
export PYTHON="${PYTHON:-$DEFAULT_PYTHON}"
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}"
MODE="${MODE:-offline}"
SCALE="${SCALE:-full}"
# The job runs in a copy of this folder, which Ray removes: a relative path would vanish with it.
DATA="$(realpath -m "${DATA:-$ROOT/data}")"
DEFAULT_OUT="${DEFAULT_OUT:-runs/$(basename "$0" .sh)}"
[[ "$SCALE" == full ]] || DEFAULT_OUT+="-$SCALE"
OUT="$(realpath -m "${OUT:-$ROOT/$DEFAULT_OUT}")"

# shellcheck source-path=SCRIPTDIR source=ray_token.sh
source "$ROOT/launch/ray_token.sh"
use_ray_token

# submit MODULE ARGUMENT...: runs `python -m MODULE` as a job in a copy of this folder, and ends with its exit status.
submit() {
    # Ray uploads the working directory (sources only; it refuses large ones) and leaves out what .gitignore names, too.
    exec "$ROOT/launch/ray_job.sh" \
        --address "$RAY_ADDRESS" \
        --working-dir "$ROOT" \
        --runtime-env-json '{"excludes": [".git", ".venv*", "runs", "ckpt", "/data", "wandb"]}' \
        -- "$PYTHON" -u -m "$@"
}
