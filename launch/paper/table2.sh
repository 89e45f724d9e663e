#!/usr/bin/env bash
# Table 2: candidate sets of mass p = 0.5, 0.8 and 1, for one student of each family.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.reproduce table2 \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
