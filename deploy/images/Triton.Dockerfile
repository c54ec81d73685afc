# NVIDIA's Triton server with what our stages need, for the chart's `triton` (docs/triton.md):
#
#     docker build -f deploy/images/Triton.Dockerfile -t registry.example/team/collage-triton:0.1.0 \
#       --build-arg BASE=python:3.12-slim-bookworm@sha256:... --build-arg SERVER=...tritonserver:25.XX-py3@sha256:... .
#
# SERVER is NVIDIA's `tritonserver` container for Python models, by its digest. Its Python has to be 3.11 or later, and
# BASE one of the same version: wheels are chosen by it. Neither was run where this was written; Triton 2.51 was, from
# the wheel nvidia-pytriton, with the same packages (tests/test_triton.py).
ARG BASE
ARG SERVER

FROM ${BASE} AS installing
WORKDIR /source
COPY . .
RUN PIP_CONSTRAINT=/source/constraints.txt python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels packages/client .
# A folder that the server's Python reads, not an environment with a Python of its own.
RUN set -- /wheels/collage_diffusion-*.whl && \
    python -m pip install --no-cache-dir --only-binary :all: -c constraints.txt --target /app \
      /wheels/collage_client-*.whl "$1[triton]" && \
    python -c 'import sys; open("/app/.python", "w").write("%d.%d" % sys.version_info[:2])'

FROM ${SERVER} AS triton
COPY --from=installing /app /app
RUN test "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$(cat /app/.python)" && \
    ln -sf "$(command -v python3)" /usr/local/bin/python
ENV PATH=/opt/tritonserver/bin:${PATH} PYTHONPATH=/app/collage_diffusion:/app PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /tmp
USER 10001:10001
