# API, scheduler, migrations and Flower: everything that decides or shows. No torch in here.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/gpuyard
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gpuyard gpuyard
COPY shared shared
COPY scheduler scheduler
COPY workers workers
RUN pip install -c constraints.txt '.[scheduler,monitor]' \
    && ! python -c 'import torch' 2>/dev/null \
    && useradd --create-home --uid 1000 gpuyard \
    && install -d -o gpuyard -g gpuyard /data /flower
USER gpuyard
VOLUME /data
ENV GPUYARD_DATA=/data
CMD ["gpuyard", "scheduler"]
