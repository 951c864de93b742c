# One image for the API (the default command), the worker, Flower and the migrations.
FROM python:3.13-slim-trixie AS builder

# uv installs what requirements.txt names, checks every hash, and stays behind in this stage.
# Wheels only: there is no compiler here, and nothing may need one.
WORKDIR /build
COPY requirements/uv.txt requirements.txt ./
RUN pip install --no-cache-dir --require-hashes --requirement uv.txt \
    && uv venv --python /usr/local/bin/python /opt/venv \
    && uv pip install --python /opt/venv --no-cache --require-hashes --no-build --compile-bytecode \
        --requirement requirements.txt

# A strict umask where the image is built must not hide the code from the user who runs it.
WORKDIR /app
COPY LICENSE alembic.ini ./
COPY alembic ./alembic
COPY app ./app
COPY scripts/init_db.py scripts/audit_storage.py ./scripts/
RUN python -m compileall -q . && chmod -R u=rwX,go=rX .


FROM python:3.13-slim-trixie

LABEL org.opencontainers.image.title="Replicate Media Service" \
      org.opencontainers.image.description="The durable layer between an application and Replicate" \
      org.opencontainers.image.licenses="MIT"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STORAGE_PATH=/app/storage/media \
    METADATA_PATH=/app/storage/metadata

# The one folder the service writes to; a new volume mounted there takes over its owner.
WORKDIR /app
RUN groupadd --system --gid 10001 app \
    && useradd --system --uid 10001 --gid app --no-create-home --home-dir /app app \
    && install --directory --owner app --group app storage

COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app ./

USER 10001:10001
VOLUME ["/app/storage"]
EXPOSE 8000

# http.client rather than urllib: a proxy of the environment cannot reach this address.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os; connection = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('API_PORT') or 8000), timeout=3); connection.request('GET', '/health'); raise SystemExit(connection.getresponse().status != 200)"]

CMD ["python", "-m", "app"]
