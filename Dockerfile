# scalora_dist on NVIDIA GPUs (CUDA 13.0). The image for CPUs is in Dockerfile.cpu.
#
#   docker build -t scalora_dist .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" --entrypoint torchrun scalora_dist \
#       --nproc_per_node 8 -m scalora_dist train --fsdp --config recipe.yaml --output_dir runs/mine
#
# The base has nvcc, with which DeepSpeed compiles kernels (offload) on first use, and which
# flash-attn is built with: --build-arg EXTRAS=demo,flash,liger,peft,quant builds it too, which takes long.
# The version of its toolkit is that of torch's CUDA in constraints-cuda.txt.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

# NCCL's InfiniBand transport needs libibverbs with its drivers. Triton compiles with Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
        ibverbs-providers libibverbs1 libnuma1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 scalora \
    && install --directory --owner=scalora /work \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

# The large libraries come before the project, so that a change of it builds the last layers only.
COPY constraints.txt constraints-cuda.txt /opt/scalora_dist/
RUN pip install -c /opt/scalora_dist/constraints-cuda.txt torch setuptools wheel hatchling \
    && pip install -c /opt/scalora_dist/constraints-cuda.txt --no-build-isolation deepspeed transformers
ARG EXTRAS=demo,liger,peft,quant
ARG MAX_JOBS=4
COPY . /opt/scalora_dist/
RUN pip install -c /opt/scalora_dist/constraints-cuda.txt --no-build-isolation "/opt/scalora_dist[$EXTRAS]"

USER 10001
WORKDIR /work
ENTRYPOINT ["scalora"]
CMD ["--help"]
