# ftconvert alone: conversion is work for a CPU, so there is no torch and no CUDA in it.
# Base images are pinned by version. A digest is better still: `docker buildx imagetools inspect python:3.11.13-slim-bookworm`
# tells today's, and python:3.11.13-slim-bookworm@sha256:... pins it.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY setup.cfg pyproject.toml README.md LICENSE constraints.txt ./
COPY converter converter
COPY model_repository model_repository
COPY evaluator evaluator
RUN pip install -c constraints.txt '.[gcs,hub]'

FROM python:3.11.13-slim-bookworm
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["ftconvert"]
