# syntax=docker/dockerfile:1
# Serves a trained detector on a CPU, a checkpoint or an OpenVINO export, read from /model: docs/serve.md.
#
#   docker build -t flowood .
#   docker run --rm -p 8000:8000 -v "$PWD/weights/openvino:/model:ro" flowood

FROM python:3.12-slim AS build
# PyTorch without CUDA: a version with the suffix +cpu goes before the same one without.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY anomalib_flowood anomalib_flowood
COPY configs configs
RUN /opt/venv/bin/pip install '.[export,serve]' && /opt/venv/bin/pip check

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 flowood
COPY --from=build /opt/venv /opt/venv
# glibc hands the buffers of every operation back to the system, which slows a backbone down: as in the Makefile.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_TRIM_THRESHOLD_=536870912 \
    MALLOC_MMAP_THRESHOLD_=33554432
USER flowood
WORKDIR /home/flowood
EXPOSE 8000
# Imports and the first image take some ten seconds.
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["flowood", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
