"""`python -m app`: the API server with the configured host and port."""

from pathlib import Path

import uvicorn

from app.config import get_settings
from app.logging import configure_logging


def main() -> None:
    """Serve until stopped; `API_DEBUG` restarts the server whenever the code changes."""
    settings = get_settings()
    configure_logging(settings.log_level)
    uvicorn.run(
        "app.main:app",
        host=settings.api_host,
        port=settings.api_port,
        reload=settings.api_debug,
        reload_dirs=[str(Path(__file__).parent)] if settings.api_debug else None,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
