#!/usr/bin/env bash
# The distillation of `make demo` as a job of a running Ray cluster. Its exit status is the job's.
#
#   ray start --head --num-gpus 4 --dashboard-host 127.0.0.1     # on a machine without GPUs: logical ones
#   launch/demo.sh
#
#   RAY_ADDRESS     address of the job server                                  (http://127.0.0.1:8265)
#   RAY_AUTH_MODE   "token" where the cluster asks for one (see ray_job.sh)    (as in Ray)
#   PYTHON          interpreter of the job, at the same path on every node     (.venv/bin/python3 if there, else python3)
#   METHODS         methods to compare, separated by spaces                    (bd:robust seqkd)
#   SEED            seed of the run                                            (42)
#   OUT             folder for the results, on a disk that all nodes share     (runs/demo)
#
# Further arguments go to the demo.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DEFAULT_PYTHON=python3
[[ -x "$ROOT/.venv/bin/python3" ]] && DEFAULT_PYTHON="$ROOT/.venv/bin/python3"
export PYTHON="${PYTHON:-$DEFAULT_PYTHON}"
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}"
METHODS="${METHODS:-bd:robust seqkd}"
SEED="${SEED:-42}"
# The job runs in a copy of the working directory, which Ray removes: a relative folder would vanish with it.
OUT="$(realpath -m "${OUT:-$ROOT/runs/demo}")"
# Ray uploads the working directory (sources only; it refuses large ones) and leaves out what .gitignore names, too.
RUNTIME_ENV='{"excludes": [".git", ".venv*", "runs", "ckpt", "wandb"]}'

exec "$ROOT/launch/ray_job.sh" \
    --address "$RAY_ADDRESS" \
    --working-dir "$ROOT" \
    --runtime-env-json "$RUNTIME_ENV" \
    -- "$PYTHON" -u -m openrlhf_bd.demo.pipeline \
    --methods "$METHODS" \
    --seed "$SEED" \
    --output_dir "$OUT" \
    "$@"
