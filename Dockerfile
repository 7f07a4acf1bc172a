# GPU image: CUDA 13.0, Python 3.12, torch 2.13, megatron-core 0.19.2, Transformer Engine 2.20, this project.
#
#   docker build -t megatron-encdec .
#   docker run --rm --gpus all megatron-encdec doctor
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" \
#       megatron-encdec pretrain examples/biphasic_210m.yaml --nproc 8
#
#   docker build --build-arg DEVICE=cpu -t megatron-encdec:cpu .      no CUDA, no Transformer Engine: to try things
#   buildah build -t megatron-encdec .                                the same, in OCI format
#
# Several nodes: add --network host (NCCL's own ports) and --device /dev/infiniband where there is one, and the options
# --nnodes, --node-rank and --master of `pretrain`; examples/kubernetes/ and examples/slurm/ have them.
# What is mounted must be writable by user 1000, or add --user.
#
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS may be given by --build-arg: the way to a mirror, and to torch's
# CPU build (for DEVICE=cpu; without it torch's CUDA build comes, which is several GB and works too).
# No RUN below has a pipe: OCI images keep no SHELL, so that `pipefail` would have to stand in each that has one.

ARG DEVICE=gpu
ARG BASE_GPU=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04
ARG BASE_CPU=ubuntu:24.04
FROM ${BASE_GPU} AS gpu
FROM ${BASE_CPU} AS cpu
FROM ${DEVICE}
ARG DEVICE
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

# The ib and rdma packages: NCCL over InfiniBand. Their versions are the base image's release's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates ibverbs-providers libibverbs1 librdmacm1 python3-dev python3-venv rdma-core tini zstd \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    MEGATRON_ENCDEC_PYTHON=/opt/venv/bin/python \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# From what changes least to what changes most: torch, then Transformer Engine, then this project's other dependencies.
# Transformer Engine's kernels come compiled (core_cu13); its binding to torch is C++ that is compiled here against it
# and against the headers of cuDNN's frontend: so both are there first, and nothing is built in isolation from them.
ENV PIP_CONSTRAINT="/tmp/constraints.txt /tmp/constraints_gpu.txt"
COPY tools/constraints.txt tools/constraints_gpu.txt /tmp/
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --upgrade pip==26.3 setuptools==84.2.1 \
    && pip install torch==2.13.0 numpy==2.4.6
RUN if [ "$DEVICE" = gpu ]; then \
        pip install wheel==0.48.0 ninja==1.13.2 pybind11==3.1.0 nvidia-cudnn-frontend==1.32.0 \
        && NVTE_FRAMEWORK=pytorch MAX_JOBS=8 \
            pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==2.20.2"; \
    fi

# Ubuntu's image has a user 1000 already, named ubuntu; other bases may not.
RUN { id 1000 || useradd --uid 1000 --create-home encdec; } && mkdir /workspace && chown 1000:1000 /workspace
WORKDIR /workspace
COPY --chown=1000:1000 . .
RUN pip install --editable ".[dev]" \
    && chown -R 1000:1000 /workspace
USER 1000

ENTRYPOINT ["tini", "--", "megatron-encdec"]
CMD ["doctor"]
