# syntax=docker/dockerfile:1
# Two images: `api` (no torch in it) and `worker` (CPU). Dockerfile.gpu makes the one for GPUs.
#   docker build --target api -t nullspace-api .
#   docker build --target worker -t nullspace-worker .
# Mirrors and proxies: --build-arg PIP_INDEX_URL=... (and the other PIP_ variables).

FROM python:3.12-slim AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/nullspace && /opt/nullspace/bin/pip install uv
ENV PATH=/opt/nullspace/bin:$PATH VIRTUAL_ENV=/opt/nullspace
WORKDIR /src

FROM build AS build-api
COPY . .
RUN pip install -c constraints.txt . && pip uninstall --yes uv

FROM build AS build-worker
# torch first and alone: this layer survives every change of ours. Its CPU build is asked for by
# name, unless the build arguments name places of their own.
COPY constraints.txt .
RUN if [ -n "${PIP_INDEX_URL}${PIP_EXTRA_INDEX_URL}${PIP_FIND_LINKS}" ]; \
    then pip install -c constraints.txt torch; \
    else uv pip install --torch-backend=cpu -c constraints.txt torch; fi
COPY . .
RUN pip install -c constraints.txt ".[worker]" && pip uninstall --yes uv

FROM python:3.12-slim AS base
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp nullspace \
    && install -d -o nullspace -g nullspace -m 0750 /data /cache /models
ENV PATH=/opt/nullspace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NULLSPACE_DATA=/data HF_HOME=/cache HOME=/tmp
WORKDIR /tmp
USER 10001:10001

FROM base AS worker
COPY --from=build-worker /opt/nullspace /opt/nullspace
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s CMD ["nullspace", "worker", "--check"]
CMD ["nullspace", "worker"]

FROM base AS api
COPY --from=build-api /opt/nullspace /opt/nullspace
EXPOSE 8600
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8600/readyz', timeout=4)"]
CMD ["nullspace", "api", "--host", "0.0.0.0", "--port", "8600"]
