# A real Triton without a GPU: the server in nvidia-pytriton (numpy stays below 2 by constraints.txt), and the CPU backends.
# Debian's own Python image has the shared libpython that Triton's Python backend needs. Pinned as images/converter.Dockerfile
# says. torch comes from PyTorch's CPU packages: those of PyPI bring several GB of CUDA. It comes alone, because that index does
# not have the pinned version of everything torch needs.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY setup.cfg pyproject.toml README.md LICENSE constraints.txt ./
RUN pip install --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY converter converter
COPY model_repository model_repository
COPY evaluator evaluator
RUN pip install -c constraints.txt '.[serve,gcs]'

FROM python:3.11.13-slim-bookworm
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000 8001 8002
ENTRYPOINT ["ftconvert", "serve", "--address=0.0.0.0"]
