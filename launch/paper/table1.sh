#!/usr/bin/env bash
# Table 1: Rouge-L of every method, for the GPT-2, OPT and Qwen2.5 students, beside the published figures.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.reproduce table1 \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
