"""nginx for the benchmark and the tests: docs/nginx.conf as it is, but on loopback and free ports.

Debian and Ubuntu: apt-get install nginx-light; it need not run as a service.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

DOCUMENTED = Path(__file__).resolve().parents[1] / "docs" / "nginx.conf"
START_SECONDS = 10.0
FRAME = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{ worker_connections 256; }}
http {{
    types {{ image/png png; }}
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {documented}
    server {{
        listen 127.0.0.1:{static_port};
        location / {{ root {media}; sendfile on; tcp_nopush on; }}
    }}
}}
"""


def installed() -> bool:
    """Tell whether there is an nginx on this machine."""
    return shutil.which("nginx", path=_path()) is not None


class Nginx:
    """The documented server in front of an API (`port`), and the bare files (`static_port`).

    Use as a context manager; `media` is the folder of the files.
    """

    def __init__(self, folder: Path, *, api_port: int, port: int, static_port: int) -> None:
        self.port = port
        self.static_port = static_port
        self._api_port = api_port
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, media: Path) -> Self:
        """Return when it answers. Raises: RuntimeError with its own words when it does not."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "nginx.conf"
        config.write_text(self._config(media))
        command = ["nginx", "-c", str(config), "-e", str(self._folder / "error.log")]
        self._process = subprocess.Popen(command, env={**os.environ, "PATH": _path()})
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.static_port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError((self._folder / "error.log").read_text())
            time.sleep(0.05)
        return self

    @property
    def pid(self) -> int:
        """The master's process id; its workers are its children."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()

    def _config(self, media: Path) -> str:
        documented = (
            DOCUMENTED.read_text()
            .replace("listen 80;", f"listen 127.0.0.1:{self.port};")
            .replace("127.0.0.1:8000", f"127.0.0.1:{self._api_port}")
            .replace("/var/lib/replicate-media-service/media", str(media))
        )
        return FRAME.format(
            folder=self._folder,
            user="user root;" if os.geteuid() == 0 else "",  # else it could not enter our folders
            documented=documented,
            static_port=self.static_port,
            media=media,
        )


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
