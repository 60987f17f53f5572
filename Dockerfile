# syntax=docker/dockerfile:1
# The server with everything it needs. For NVIDIA GPUs:      docker build -t collm .
# For machines without one:         docker build -t collm:cpu --build-arg DEVICE=cpu .
# Smaller with --build-arg TORCH_INDEX=..., the extra index that PyTorch publishes for CPU wheels.
# Runs as a user without rights; the root file system may be read-only, with /tmp and /var/cache/collm writable. What is
# compiled at run time is loaded from the latter, which must not be mounted noexec (as Docker mounts a tmpfs).

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=gpu
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/collm
# All: where torch's CPU build is not found, the versions of the CUDA libraries come from gpu.txt.
COPY requirements/*.txt requirements/
COPY scripts/install.sh scripts/
RUN --mount=type=cache,target=/root/.cache/pip \
    TORCH_INDEX="${TORCH_INDEX}" scripts/install.sh /opt/collm/bin/python "${DEVICE}"
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY server server
COPY training training
COPY bench bench
RUN /opt/collm/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
ARG DEVICE=gpu
LABEL org.opencontainers.image.title="collm" \
      org.opencontainers.image.description="Co-LLM as an OpenAI-compatible inference server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      collm.device="${DEVICE}"
# A C++ compiler: vLLM and Triton build kernels at run time. libnuma: vLLM's CPU worker links it.
# The versions are the base image's release's, which gets security fixes only: no pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 collm \
    && useradd --uid 10001 --gid collm --no-create-home --home-dir /var/cache/collm --shell /usr/sbin/nologin collm \
    && install --directory --owner collm --group collm /var/cache/collm
COPY --from=build /opt/collm /opt/collm
WORKDIR /app
COPY deploy/config deploy/config
COPY models models
ENV PATH=/opt/collm/bin:$PATH \
    HOME=/var/cache/collm \
    XDG_CACHE_HOME=/var/cache/collm \
    HF_HOME=/var/cache/collm/huggingface \
    TRITON_CACHE_DIR=/var/cache/collm/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/collm/torchinductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-m", "server.healthcheck"]
ENTRYPOINT ["python", "-m", "server", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--config", "deploy/config/demo.toml"]
