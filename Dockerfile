# leximl and its run notebooks: papermill is the entry, /project the folder it works in. How to use it: docker.md.
#   docker build -t leximl .
#   docker build -t leximl:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#                --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker build -t leximl --build-arg PREFETCH="distilbert-base-uncased --dataset imdb ag_news" .

# The base: any Debian or Ubuntu, with Python 3.11 to 3.13 or without one
ARG BASE=python:3.12-slim
FROM ${BASE}

# Where torch comes from: this index has builds for CPUs alone; that of PyPI brings CUDA's libraries along
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The extras of the package, such as "embedded,oracle"
ARG EXTRAS=all

RUN if ! command -v python3 > /dev/null; then \
        apt-get update && \
        DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && \
        rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
    { echo "the base brings $(python3 --version), leximl needs Python 3.11 to 3.13"; exit 1; }

ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    JUPYTER_PREFER_ENV_PATH=1 \
    HF_HOME=/opt/huggingface \
    HOME=/home/leximl \
    USER=leximl

# What the package needs first: this layer is built anew only when the requirements change
WORKDIR /opt/leximl
COPY settings.ini setup.py pyproject.toml MANIFEST.in constraints.txt README.md LICENSE ./
RUN python3 -m venv /opt/venv && \
    pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)" && \
    mkdir leximl && touch leximl/__init__.py && \
    pip install -c constraints.txt ".[${EXTRAS}]" && \
    rm -rf leximl build *.egg-info

# Then the package itself, and the notebooks
COPY leximl leximl
RUN pip install --no-deps --force-reinstall .
COPY nbs /nbs

# No root from here on. The folders are open to any user, since `docker run --user` may name another one
RUN useradd --create-home --uid 10001 leximl && \
    mkdir -p /project "${HF_HOME}" && \
    chown leximl /project "${HF_HOME}" && \
    chmod 777 /project "${HOME}"
USER leximl

# Models and datasets for a container without a network, in the words of `leximl prefetch`
ARG PREFETCH=""
RUN if [ -n "${PREFETCH}" ]; then leximl prefetch ${PREFETCH}; fi && \
    chmod -R a+rwX "${HF_HOME}"

WORKDIR /project
ENTRYPOINT ["papermill"]
CMD ["--help"]
