"""A real S3 server for the tests: SeaweedFS from its wheel, on loopback."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.service import BIN
from tests.ports import free_port

# The key pair that may use it.
KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run it with an empty bucket `media`, and all else off; give its address."""
    port = free_port()
    ports = {name: free_port() for name in ("master", "volume", "filer", "admin")}
    command = [
        *(str(BIN / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-bucket=media", f"-s3.port={port}", "-webdav=false", "-admin.ui=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *(f"-{name}.port={number}" for name, number in ports.items()),
        *(f"-{name}.port.grpc={free_port()}" for name in ports),
        f"-s3.port.grpc={free_port()}",
    ]
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **KEYS}, stdout=log, stderr=log, cwd=folder
        )
    try:
        _wait_until_ready(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _wait_until_ready(port: int) -> None:
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        try:
            # 403: it answers, and the bucket exists, but not for everybody.
            reply = httpx.get(f"http://127.0.0.1:{port}/media", trust_env=False)
            if reply.status_code in (200, 403):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")
