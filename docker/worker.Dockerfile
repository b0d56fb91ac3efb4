# The worker: torch and transformers, and tini's job is done by `init: true` in docker-compose.yml.
# TORCH_INDEX chooses the build of torch: leave it empty for CUDA, or give the address of PyTorch's
# CPU wheels for a small image without it.
FROM python:3.11-slim

ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/gpuyard
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY gpuyard gpuyard
COPY shared shared
COPY scheduler scheduler
COPY workers workers
RUN pip install -c constraints.txt '.[worker]' \
    && useradd --create-home --uid 1000 gpuyard \
    && install -d -o gpuyard -g gpuyard /data
USER gpuyard
VOLUME /data
ENV GPUYARD_DATA=/data
CMD ["gpuyard", "worker"]
