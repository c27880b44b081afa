# One image for workers, studies and the dashboard.
#
#   docker build -t saeopt .                                         whatever torch build pip's index offers (on Linux: CUDA)
#   docker build -t saeopt --build-arg TORCH_INDEX=URL .             torch from this index (PyTorch publishes one per CPU/CUDA build)
#   docker build -t saeopt --build-arg APT_PACKAGES="gcc libc6-dev"  for GPUs: Triton compiles its launcher with gcc
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS packages
ARG TORCH_INDEX=
ARG TORCH_VERSION=2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
# torch alone first: it is most of the download, and its layer outlives every change of the other packages.
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH_VERSION"
WORKDIR /app
COPY pyproject.toml constraints.txt ./
# An empty package stands in for the code, so that no change of the code runs this again; the editable install finds the real one in /app.
RUN mkdir saeopt && touch saeopt/__init__.py README.md \
    && pip install -c constraints.txt -e ".[gguf,tensorboard]" \
    && find /opt/venv -type d \( -name tests -o -name test \) -path '*/site-packages/*' -not -path '*/torch/*' -prune -exec rm -rf {} +

FROM ${BASE_IMAGE}
ARG APT_PACKAGES=
RUN if [ -n "$APT_PACKAGES" ]; then apt-get update -qq \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $APT_PACKAGES \
      && rm -rf /var/lib/apt/lists/*; fi
# Folders under /data are open to every user, so that the container may run as the host's (UID and GID in .env): a new named volume takes
# over the mode of the folder that it covers.
RUN useradd --create-home --uid 1000 saeopt \
    && mkdir -p /data/output /data/cache /data/huggingface /data/locks /results && chmod 1777 /data /data/*
COPY --from=packages /opt/venv /opt/venv
# A user without an entry in /etc/passwd has no name and no home; torch asks for both.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data/cache/home USER=saeopt LOGNAME=saeopt \
    HF_HOME=/data/huggingface XDG_CACHE_HOME=/data/cache SAEOPT_CACHE_DIR=/data/cache MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor TRITON_CACHE_DIR=/data/cache/triton
WORKDIR /app
# Configs name their output relative to the working directory.
RUN ln -s /data/output /app/output
COPY pyproject.toml ./
COPY configs configs
COPY studies studies
COPY scripts/container scripts/container
COPY saeopt saeopt
USER saeopt
VOLUME ["/data/output", "/data/cache", "/data/huggingface"]
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["scripts/container/health"]
ENTRYPOINT ["scripts/container/entrypoint"]
CMD ["saeopt", "--help"]
