# Training on NVIDIA GPUs, with vLLM: torch's wheels contain CUDA, so the machine needs only the driver and the NVIDIA
# Container Toolkit.
#   docker build --tag rlrt_lightning .
#   docker run --gpus all --ipc=host --volume "$PWD/runs:/work/runs" --volume ~/.cache/huggingface:/root/.cache/huggingface \
#     rlrt_lightning fit --config recipes/gsm8k-qwen3-0.6b
FROM python:3.12-slim
# Triton, which vLLM and torch.compile use, needs a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
ARG EXTRAS=vllm,lora
COPY . /source
RUN pip install --no-cache-dir "/source[${EXTRAS}]" && rm -rf /source
WORKDIR /work
ENTRYPOINT ["python", "-m", "rlrt_lightning"]
CMD ["--help"]
