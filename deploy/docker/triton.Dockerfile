# The vendor's Triton Inference Server plus what model_repository/*/1/model.py imports.
ARG TRITON_IMAGE
FROM ${TRITON_IMAGE}
ARG REQUIREMENTS=triton-requirements.txt
COPY deploy/docker/triton-requirements.txt deploy/docker/triton-requirements-gpu.txt /tmp/
# The image's Python belongs to its distribution, and Triton's Python backend starts that one.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir --requirement /tmp/${REQUIREMENTS}
