# The image of GPU clusters: every package of requirements/gpu.lock, and the sources at /opt/openrlhf_bd.
#
#   docker build --tag registry.example.com/openrlhf_bd:0.1.0 .
#
# launch/kuberay/rayjob.yaml names that image; docs/clusters.md says how to build, push and use it. It holds no secrets:
# tokens and keys come from the cluster (Ray's token, HF_TOKEN, OPENAI_API_KEY, WANDB_API_KEY).

# The CUDA release of torch's build in gpu.lock (nvidia-cuda-runtime 13.0). devel: flash-attn is built, and Triton,
# FlashInfer and DeepSpeed compile kernels when they run.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.9.9
FROM ${UV_IMAGE} AS uv

FROM ${CUDA_IMAGE} AS environment
COPY --from=uv /uv /usr/local/bin/uv
# The lock file is for this Python.
ARG PYTHON_VERSION=3.11.14
ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH
RUN uv venv --python "${PYTHON_VERSION}" --managed-python /opt/venv
WORKDIR /build
COPY requirements/gpu.lock .
# deepspeed and rouge-score come as sources: deepspeed does not build where torch can be imported, so they come first.
RUN --mount=type=cache,target=/root/.cache/uv \
    grep -E '^(setuptools|wheel|packaging|psutil|py-cpuinfo|numpy|ninja)==' gpu.lock >tools.txt \
    && grep -E '^(deepspeed|rouge-score)==' gpu.lock >sources.txt \
    && grep -vE '^(#|deepspeed==|rouge-score==)' gpu.lock >wheels.txt \
    && uv pip install --no-deps --requirement tools.txt \
    && DS_BUILD_OPS=0 uv pip install --no-deps --no-build-isolation --requirement sources.txt \
    && uv pip install --no-deps --requirement wheels.txt
# Optional, and an hour of compiling: FLASH_ATTN=flash-attn==2.8.3. Without it attention is torch's (attn: auto).
ARG FLASH_ATTN=""
ARG MAX_JOBS=8
RUN --mount=type=cache,target=/root/.cache/uv \
    test -z "${FLASH_ATTN}" || MAX_JOBS="${MAX_JOBS}" uv pip install --no-deps --no-build-isolation "${FLASH_ATTN}"

FROM ${CUDA_IMAGE}
# A C compiler is there (devel); `ip`, `ps` and wget are what KubeRay's probes and Ray's reports call.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates iproute2 procps wget \
    && rm -rf /var/lib/apt/lists/*
COPY --from=environment /opt/python /opt/python
COPY --from=environment /opt/venv /opt/venv
# Not root; the number is what volumes are to belong to (fsGroup in the manifest).
RUN useradd --create-home --uid 10001 --shell /bin/bash ray
COPY --chown=root:root . /opt/openrlhf_bd
ENV PATH=/opt/venv/bin:$PATH \
    PYTHON=/opt/venv/bin/python3 \
    PYTHONPATH=/opt/openrlhf_bd \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 10001
WORKDIR /opt/openrlhf_bd
CMD ["python3", "-m", "openrlhf_bd.cli.main", "--help"]
