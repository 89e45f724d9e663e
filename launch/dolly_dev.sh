#!/usr/bin/env bash
# Dolly from nothing to a distilled student on two CPU cores: tiny models, SFT of teacher and student, distillation,
# evaluation. Every stage is resumable: run the script again.
#
#   DATA=folder   with dolly/{train,valid,test}.jsonl, self_inst/test.jsonl, vicuna/test.jsonl, pretrain/novels.jsonl;
#                 records have "instruction", "input" and "output", pre-training records "text"
#   TOKENIZER=    folder or hub name of a tokenizer          (openai-community/gpt2)
#   OUT=          folder of the runs                         (runs/dolly)
#   PYTHON=       interpreter with openrlhf_bd installed     (.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:?set DATA to the folder of the data sets, see the head of this script}
TOKENIZER=${TOKENIZER:-openai-community/gpt2}
OUT=${OUT:-runs/dolly}
PYTHON=${PYTHON:-.venv/bin/python}

files=(
  --data.prompt_dataset "$DATA/dolly/train.jsonl"
  --data.context_key input
  --data.label_key output
  --eval.dataset "$DATA/dolly/valid.jsonl"
)

[[ -d $OUT/teacher_init ]] || "$PYTHON" -m openrlhf_bd.cli.new_model \
  --tokenizer "$TOKENIZER" \
  --hidden_size 192 \
  --num_layers 4 \
  --num_heads 6 \
  --num_kv_heads 2 \
  --intermediate_size 512 \
  --seed 1 \
  --output_dir "$OUT/teacher_init"

[[ -d $OUT/student_init ]] || "$PYTHON" -m openrlhf_bd.cli.new_model \
  --tokenizer "$TOKENIZER" \
  --hidden_size 128 \
  --num_layers 2 \
  --num_heads 4 \
  --intermediate_size 384 \
  --seed 2 \
  --output_dir "$OUT/student_init"

"$PYTHON" -m openrlhf_bd.cli.train_bd_ray \
  --config configs/dev/dolly_sft.yaml \
  "${files[@]}" \
  --actor.model_name_or_path "$OUT/teacher_init" \
  --train.max_epochs 3 \
  --ckpt.output_dir "$OUT/teacher"

"$PYTHON" -m openrlhf_bd.cli.train_bd_ray \
  --config configs/dev/dolly_sft.yaml \
  "${files[@]}" \
  --actor.model_name_or_path "$OUT/student_init" \
  --train.max_epochs 2 \
  --ckpt.output_dir "$OUT/sft"

"$PYTHON" -m openrlhf_bd.cli.train_bd_ray \
  --config configs/dev/dolly.yaml \
  "${files[@]}" \
  --teacher.model_name_or_path "$OUT/teacher" \
  --actor.model_name_or_path "$OUT/sft" \
  --data.pretrain_dataset "$DATA/pretrain/novels.jsonl" \
  --data.pretrain_key text \
  --eval.test_datasets "dolly=$DATA/dolly/test.jsonl,self_inst=$DATA/self_inst/test.jsonl,vicuna=$DATA/vicuna/test.jsonl" \
  --ckpt.output_dir "$OUT/bd"
