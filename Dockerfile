# sest with PyPI's torch, which brings CUDA: docker build -t sest . && docker run --gpus all -v "$PWD:/work" sest info FILE
FROM python:3.12-slim

# numba and torch.compile want a compiler at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# A CPU build of torch is far smaller: pass where one lies.
ARG PIP_EXTRA_INDEX_URL=""
ARG EXTRAS="hub,filters,web,s3"
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY sest /src/sest
COPY cli /src/cli
COPY cache /src/cache
RUN pip install -c /src/constraints.txt "/src[${EXTRAS}]" && rm -rf /src

# What numba and torch compile lies in the container, and its user need not be root.
ENV NUMBA_CACHE_DIR=/tmp/numba TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /work
ENTRYPOINT ["sest"]
CMD ["--help"]
