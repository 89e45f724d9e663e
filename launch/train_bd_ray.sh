#!/usr/bin/env bash
# Bellman Distill on a GPU cluster: Qwen2.5-3B -> Qwen2.5-0.5B on Dolly, 8 GPUs a node. Exit status: the job's.
#
#   launch/ray_node.sh head            # on the first node; on the others: launch/ray_node.sh worker HEAD:6379
#   launch/train_bd_ray.sh
#
#   RAY_ADDRESS, RAY_AUTH_MODE, PYTHON, MODE: see common.sh
#   NUM_NODES       nodes with 8 GPUs each                                     (1)
#   TEACHER         teacher: model name or folder                              (Qwen/Qwen2.5-3B)
#   STUDENT         student: model name or folder                              (Qwen/Qwen2.5-0.5B)
#   OUT             folder of the run, on a disk that all nodes share          (ckpt/qwen2.5-0.5b-dolly-bd)
#
# Further arguments are options of train_bd_ray; the last one given wins. More options: openrlhf_bd/config.py.
DEFAULT_OUT=ckpt/qwen2.5-0.5b-dolly-bd
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NUM_NODES="${NUM_NODES:-1}"
TEACHER="${TEACHER:-Qwen/Qwen2.5-3B}"
STUDENT="${STUDENT:-Qwen/Qwen2.5-0.5B}"

# Offline the stages run one after another, each on all GPUs; online ranks and engines run side by side.
case "$MODE" in
    offline) layout=(
        --teacher.num_engines "$((8 * NUM_NODES))"
        --actor.num_gpus_per_node 8
    ) ;;
    *) layout=(
        --teacher.num_engines "$((2 * NUM_NODES))"
        --actor.num_gpus_per_node 4
        --vllm.num_engines "$((2 * NUM_NODES))"
    ) ;;
esac

submit openrlhf_bd.cli.train_bd_ray \
    --algo.distill.name bd \
    --algo.distill.preset robust \
    --algo.distill.mode "$MODE" \
    --algo.distill.pretrain_coef 1.0 \
    --teacher.model_name_or_path "$TEACHER" \
    --teacher.tensor_parallel_size 1 \
    --teacher.gpu_memory_utilization 0.9 \
    --actor.model_name_or_path "$STUDENT" \
    --actor.num_nodes "$NUM_NODES" \
    "${layout[@]}" \
    --actor.gradient_checkpointing_enable \
    --actor.adam.lr 5e-6 \
    --actor.max_norm 1.0 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.temperature 1.0 \
    --data.prompt_dataset databricks/databricks-dolly-15k \
    --data.input_key instruction \
    --data.context_key context \
    --data.label_key response \
    --data.prompt_wrapper paper \
    --data.max_prompt_len 256 \
    --data.max_len 512 \
    --data.pretrain_dataset Skylion007/openwebtext \
    --data.pretrain_key text \
    --train.batch_size 64 \
    --train.dynamic_batch_enable \
    --train.max_tokens_per_gpu 16384 \
    --train.max_epochs 3 \
    --train.seed 42 \
    --ds.zero_stage 2 \
    --ds.param_dtype bf16 \
    --ds.packing_samples \
    --ckpt.output_dir "$OUT" \
    --ckpt.save_steps 500 \
    --logger.logging_steps 1 \
    "$@"
