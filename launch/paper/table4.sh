#!/usr/bin/env bash
# Table 4: with and without the chi-squared regulariser, for GPT-2 760M and Qwen2.5 0.5B.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.reproduce table4 \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
