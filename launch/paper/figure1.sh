#!/usr/bin/env bash
# Fig. 1: mass and size of the candidate sets.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.reproduce figure1 \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
