# The gateway as an installed package. Its configuration and the manifests it reads are mounted below the working
# folder under the names they have in the repository.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
RUN pip install --no-cache-dir --prefix=/install .

FROM python:3.11-slim-bookworm
COPY --from=build /install /usr/local
RUN useradd --system --uid 10001 --no-create-home fingerpost
USER 10001
WORKDIR /fingerpost
ENV PYTHONUNBUFFERED=1
EXPOSE 8801
ENTRYPOINT ["python", "-m", "gateway"]
CMD ["--config", "deploy/docker/config.yaml"]
