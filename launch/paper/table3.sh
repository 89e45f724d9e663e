#!/usr/bin/env bash
# Table 3: time to the best validation score, Bellman Distill beside MiniLLM. Measure it on GPUs that do nothing else.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.reproduce table3 \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
