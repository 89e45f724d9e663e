#!/usr/bin/env bash
# Builds the environment of TRL for benchmarks/train_step.py and online_step.py, apart from the project's own: about 1.5 GB on CPU.
#   benchmarks/trl_environment.sh [FOLDER]      default .venv-trl; PYTHON chooses the interpreter, 3.11 or later
# On a machine whose package index has several builds of torch, choose one as usual (PIP_INDEX_URL, ...).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-.venv-trl}"
"${PYTHON:-python3}" -m venv "$folder"
# torch by itself and first: whatever comes after it finds its requirement met and fetches no other build.
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet \
    trl==1.16.0 \
    transformers==5.15.0 \
    tokenizers==0.22.2 \
    accelerate==1.15.0 \
    datasets==5.2.0 \
    numpy==2.3.5
"$folder/bin/python" -c 'import torch, trl, transformers; print(torch.__version__, trl.__version__, transformers.__version__)'
echo "now: PYTHONPATH=. python3 benchmarks/train_step.py --trl-python $folder/bin/python"
