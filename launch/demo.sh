#!/usr/bin/env bash
# The distillation of `make demo` as a job of a running Ray cluster. Its exit status is the job's.
#
#   launch/ray_node.sh head --num-gpus 4       # on a machine without GPUs: logical ones
#   launch/demo.sh
#
#   RAY_ADDRESS, RAY_AUTH_MODE, PYTHON, MODE: see common.sh
#   METHODS         methods to compare, separated by spaces                    (bd:robust seqkd)
#   SEED            seed of the run                                            (42)
#   OUT             folder for the results, on a disk that all nodes share     (runs/demo)
#
# Further arguments go to the demo.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

METHODS="${METHODS:-bd:robust seqkd}"
SEED="${SEED:-42}"

submit openrlhf_bd.demo.pipeline \
    --methods "$METHODS" \
    --mode "$MODE" \
    --seed "$SEED" \
    --output_dir "$OUT" \
    "$@"
