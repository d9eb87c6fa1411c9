# Postgres with pgvector, and with the extension that takes the shortest way to the index service:
# docker build --target postgres .
FROM pgvector/pgvector:pg17 AS link
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev make postgresql-server-dev-17 \
    && rm -rf /var/lib/apt/lists/*
COPY extension /src
RUN make -C /src && make -C /src install DESTDIR=/link

FROM pgvector/pgvector:pg17 AS postgres
COPY --from=link /link /

# The index service.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
# hnswlib is compiled for the processor it is built on: build where it is to run, or for older ones
# with --build-arg HNSWLIB_NO_NATIVE=1, which searches more slowly.
ARG HNSWLIB_NO_NATIVE=
RUN python -m venv /opt/ehub && /opt/ehub/bin/pip install --no-cache-dir /src

FROM python:3.12-slim-bookworm
RUN useradd --system --create-home --home-dir /var/lib/ehub ehub
COPY --from=build /opt/ehub /opt/ehub
ENV PATH=/opt/ehub/bin:$PATH \
    EHUB_DATA_DIR=/var/lib/ehub
USER ehub
VOLUME /var/lib/ehub
EXPOSE 6433 9433
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9433/health', timeout=4)"]
ENTRYPOINT ["ehub"]
CMD ["serve", "--listen", "0.0.0.0:6433", "--pages", "0.0.0.0:9433"]
