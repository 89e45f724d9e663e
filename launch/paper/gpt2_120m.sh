#!/usr/bin/env bash
# GPT-2 1.5B to 120M: SFT, KD, SeqKD, MiniLLM and Bellman Distill on Dolly.
# For a node of eight GPUs; fewer: docs/clusters.md. Variables: launch/common.sh. Further arguments are options of every job.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

submit openrlhf_bd.cli.pipeline configs/paper/gpt2_120m.yaml \
    --scale "$SCALE" \
    --mode "$MODE" \
    --data "$DATA" \
    --output_dir "$OUT" \
    "$@"
