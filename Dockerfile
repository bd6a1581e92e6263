# syntax=docker/dockerfile:1
# Three images from one file, all without a compiler, a package manager's cache or root:
#   docker build -t metaserve:0.1.0 .                        cpu: the service, no torch (the default)
#   docker build -t metaserve:0.1.0-gpu --target gpu .       ONNX Runtime and torch on CUDA
#   docker build -t metaserve:0.1.0-export --target export . checkpoints -> packages; see docs/deploy.md
# What is installed stands with its hashes in deploy/requirements, which `make locks` writes.

ARG PYTHON=docker.io/library/python:3.11-slim-bookworm

# --- what each image installs, in a virtual environment that is copied as a whole ---
FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY deploy/requirements/build.txt deploy/requirements/build.txt
RUN python3 -m venv /build \
 && /build/bin/pip install --quiet --require-hashes --no-deps -r deploy/requirements/build.txt
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY app app
COPY models models
COPY export export
RUN /build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel .

FROM build AS build-cpu
COPY deploy/requirements/cpu.txt deploy/requirements/cpu.txt
COPY deploy/install.sh deploy/install.sh
RUN deploy/install.sh deploy/requirements/cpu.txt

FROM build AS build-gpu
COPY deploy/requirements/gpu.txt deploy/requirements/gpu.txt
COPY deploy/install.sh deploy/install.sh
RUN deploy/install.sh deploy/requirements/gpu.txt

# torch's CPU builds are not on the usual index: --build-arg TORCH_INDEX=... names the one that
# pytorch.org gives for them. Without it a local wheel directory of pip's configuration must have it.
FROM build AS build-export
ARG TORCH_INDEX=
COPY deploy/requirements/export.txt deploy/requirements/export.txt
COPY deploy/install.sh deploy/install.sh
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" deploy/install.sh deploy/requirements/export.txt

# --- what every image is ---
FROM ${PYTHON} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="metaserve" \
      org.opencontainers.image.description="Serves MetaFormer vision models over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A number above those of any host's users, so that it is nobody where it leaks out.
RUN groupadd --gid 10001 metaserve \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin metaserve \
 && install --directory --owner=10001 --group=10001 /models \
 # Nothing is installed here any more.
 && rm -rf $(python3 -c "import ensurepip, pip; print(*ensurepip.__path__, *pip.__path__)") \
    /usr/local/bin/pip* /usr/bin/pip*
ENV PATH=/opt/metaserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    METASERVE_HOST=0.0.0.0 \
    METASERVE_MODEL_STORE=/models
USER 10001:10001
WORKDIR /tmp

# --- images that serve ---
FROM base AS serving
EXPOSE 8000
STOPSIGNAL SIGTERM
# Readiness, for engines that have one question only; Kubernetes asks its three of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-m", "app.probe"]
ENTRYPOINT ["metaserve"]
CMD ["serve"]

FROM serving AS gpu
COPY --from=build-gpu /opt/metaserve /opt/metaserve
# What the NVIDIA container runtime hands in: the driver's libraries for computing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# --- the image that exports ---
FROM base AS export
COPY --from=build-export /opt/metaserve /opt/metaserve
WORKDIR /models
ENTRYPOINT ["metaserve"]
CMD ["export", "--help"]

# --- the default ---
FROM serving AS cpu
COPY --from=build-cpu /opt/metaserve /opt/metaserve
