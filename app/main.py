"""The API application: assembly only."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from app import __version__
from app.api import files, generate, jobs, system, webhooks
from app.api.deps import Ring, open_services
from app.api.middleware import (
    AnswersInTime,
    ClearStart,
    CrossOriginProtection,
    JsonBodies,
    RequestContext,
)
from app.api.problems import UnexpectedErrors, describe_problems, install_problem_handlers
from app.api.recent import AnswerRecent
from app.config import Settings, get_settings
from app.logging import configure_logging
from app.providers import create_provider
from app.providers.base import Provider
from app.tasks.doorbell import ring as ring_doorbell

DESCRIPTION = """
The durable layer between an application and Replicate. POST a prompt and follow the job: it
survives every crash, is paid for once, and its outputs are kept. Errors are
`application/problem+json` (RFC 9457); times are ISO 8601 in UTC.
"""
TAGS = [
    {"name": "jobs", "description": "Create, follow, list and cancel generation jobs."},
    {"name": "files", "description": "The generated files."},
    {"name": "webhooks", "description": "Reports from the provider."},
    {"name": "system", "description": "Health, metrics and configuration."},
]
EXPOSED_HEADERS = [
    *("Location", "Link", "X-Total-Count", "X-Request-ID", "Retry-After"),
    *("ETag", "Accept-Ranges", "Content-Range", "Content-Disposition"),
]


class MediaServiceApp(FastAPI):
    """FastAPI, with the errors of the OpenAPI document under their own media type."""

    def openapi(self) -> dict[str, Any]:
        """See `FastAPI.openapi`."""
        schema = super().openapi()
        describe_problems(schema)
        return schema


def create_app(
    settings: Settings, *, provider: Provider | None = None, ring: Ring = ring_doorbell
) -> FastAPI:
    """Assemble the API. `provider` (for input schemas) is by default what the settings name.

    Everything that connects or writes is made when the server starts, in the lifespan.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asked = provider or create_provider(settings)
        async with open_services(settings, asked, ring) as services:
            app.state.services = services
            yield

    app = MediaServiceApp(
        title=system.TITLE,
        version=__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        license_info={"name": "MIT", "identifier": "MIT"},
        lifespan=lifespan,
        middleware=_middleware(settings),
        strict_content_type=False,  # for `curl -d`; see `CrossOriginProtection`
        redirect_slashes=False,  # to an address made of what the client says that our name is
    )
    install_problem_handlers(app)
    for module in (generate, jobs, files, webhooks, system):
        app.include_router(module.router)
    return app


def _middleware(settings: Settings) -> list[Middleware]:
    """Outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origin_list,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    return [
        Middleware(ClearStart),
        Middleware(AnswerRecent, answer=files.answer),
        Middleware(RequestContext),
        *([cors] if settings.cors_origin_list else []),
        Middleware(UnexpectedErrors),
        Middleware(AnswersInTime),
        Middleware(CrossOriginProtection, allowed_origins=settings.cors_origin_list),
        Middleware(JsonBodies, max_bytes=settings.max_body_bytes),
    ]


def _default_app() -> FastAPI:
    settings = get_settings()
    configure_logging(settings.log_level)
    return create_app(settings)


app = _default_app()
