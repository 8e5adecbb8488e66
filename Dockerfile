# mamba-sft for NVIDIA GPUs:
#
#     docker build -t mamba-sft .
#     docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache:/cache" mamba-sft doctor
#     docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache:/cache" mamba-sft train mine.yaml
#
# CUDA comes with torch's own wheels, so the image needs the host's driver and nothing else of NVIDIA's. gcc is
# for Triton, which builds a small launcher for each kernel. Runs are written to /work, models and prepared rows
# are kept in /cache.
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /dist

FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc=4:12.2.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt constraints-tools.txt /tmp/
COPY --from=wheel /dist /tmp/dist
RUN wheel=$(echo /tmp/dist/*.whl) \
    && pip install --no-cache-dir -c /tmp/constraints.txt "${wheel}[gguf]" \
    && rm -r /tmp/dist /tmp/constraints.txt /tmp/constraints-tools.txt
ENV HF_HOME=/cache/huggingface MAMBA_SFT_CACHE=/cache/mamba-sft TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 user && mkdir -p /work /cache && chown user /work /cache
USER 1000
WORKDIR /work
ENTRYPOINT ["mamba-sft"]
CMD ["--help"]
