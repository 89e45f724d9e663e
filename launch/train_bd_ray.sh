#!/usr/bin/env bash
# Bellman Distill on a GPU cluster: Qwen2.5-3B -> Qwen2.5-0.5B on Dolly, 8 GPUs a node. Exit status: the job's.
#
#   ray start --head --num-gpus 8 --dashboard-host 127.0.0.1     # on the head; other nodes: ray start --address HEAD:6379
#   launch/train_bd_ray.sh
#
#   RAY_ADDRESS     address of the job server                                  (http://127.0.0.1:8265)
#   RAY_AUTH_MODE   "token" where the cluster asks for one (see ray_job.sh)    (as in Ray)
#   PYTHON          interpreter of the job, at the same path on every node     (.venv/bin/python3 if there, else python3)
#   NUM_NODES       nodes with 8 GPUs each                                     (1)
#   TEACHER         teacher: model name or folder                              (Qwen/Qwen2.5-3B)
#   STUDENT         student: model name or folder                              (Qwen/Qwen2.5-0.5B)
#   OUT             folder of the run, on a disk that all nodes share          (ckpt/qwen2.5-0.5b-dolly-bd)
#
# Further arguments are options of train_bd_ray; the last one given wins. More options: openrlhf_bd/config.py.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DEFAULT_PYTHON=python3
[[ -x "$ROOT/.venv/bin/python3" ]] && DEFAULT_PYTHON="$ROOT/.venv/bin/python3"
export PYTHON="${PYTHON:-$DEFAULT_PYTHON}"
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}"
NUM_NODES="${NUM_NODES:-1}"
TEACHER="${TEACHER:-Qwen/Qwen2.5-3B}"
STUDENT="${STUDENT:-Qwen/Qwen2.5-0.5B}"
# The job runs in a copy of the working directory, which Ray removes: a relative folder would vanish with it.
OUT="$(realpath -m "${OUT:-$ROOT/ckpt/qwen2.5-0.5b-dolly-bd}")"
# Ray uploads the working directory (sources only; it refuses large ones) and leaves out what .gitignore names, too.
RUNTIME_ENV='{"excludes": [".git", ".venv*", "runs", "ckpt", "wandb"]}'

exec "$ROOT/launch/ray_job.sh" \
    --address "$RAY_ADDRESS" \
    --working-dir "$ROOT" \
    --runtime-env-json "$RUNTIME_ENV" \
    -- "$PYTHON" -u -m openrlhf_bd.cli.train_bd_ray \
    --algo.distill.name bd \
    --algo.distill.preset robust \
    --algo.distill.mode offline \
    --algo.distill.pretrain_coef 1.0 \
    --teacher.model_name_or_path "$TEACHER" \
    --teacher.num_engines "$((8 * NUM_NODES))" \
    --teacher.tensor_parallel_size 1 \
    --teacher.gpu_memory_utilization 0.9 \
    --actor.model_name_or_path "$STUDENT" \
    --actor.num_nodes "$NUM_NODES" \
    --actor.num_gpus_per_node 8 \
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
