"""About the service itself: what it is, how it is, what it counts, how it is set."""

from typing import Any

from fastapi import APIRouter, Request, Response

from app import __version__
from app.api.deps import App
from app.api.health import DetailedHealthView, HealthView, measure_health
from app.api.metrics import MetricsView, metrics_view, prefers_prometheus, prometheus_text
from app.api.problems import RETRY_AFTER_SECONDS, problem_responses
from app.api.schemas import DEFAULT_MODEL, MAX_PROMPT_CHARACTERS
from app.config import Settings

TITLE = "Fleek Media Service"

ENDPOINTS = {
    "generate": "POST /api/v1/generate",
    "status": "GET /api/v1/status/{job_id}",
    "jobs": "GET /api/v1/jobs",
    "metadata": "GET /api/v1/jobs/{job_id}/metadata",
    "attempts": "GET /api/v1/jobs/{job_id}/attempts",
    "cancel": "DELETE /api/v1/jobs/{job_id}",
    "download": "GET /api/v1/download/{job_id}",
    "media": "GET /media/{filename}",
    "health": "GET /health",
    "health_detailed": "GET /health/detailed",
    "metrics": "GET /metrics",
    "info": "GET /info",
    "docs": "GET /docs",
    "redoc": "GET /redoc",
    "openapi": "GET /openapi.json",
}

router = APIRouter(tags=["system"])


@router.head("/", include_in_schema=False)
@router.get("/", summary="What this is", responses=problem_responses())
async def root() -> dict[str, Any]:
    """Return the service's name, version and where to go from here."""
    return {
        "service": TITLE,
        "version": __version__,
        "status": "running",
        "links": {"docs": "/docs", "health": "/health", "info": "/info", "metrics": "/metrics"},
    }


@router.head("/health", include_in_schema=False)  # as load balancers ask
@router.get("/health", summary="Is the process alive", responses=problem_responses())
async def health() -> HealthView:
    """Return a constant answer for load balancers; nothing is asked."""
    return HealthView()


@router.get(
    "/health/detailed",
    summary="Are its dependencies well",
    responses={
        503: {"model": DetailedHealthView, "description": "The database or the storage is away."},
        **problem_responses(),
    },
)
async def health_detailed(response: Response, app: App) -> DetailedHealthView:
    """Ask the database, Redis, the storage and the workers, now, for two seconds at most."""
    report = await measure_health(app)
    if report.status == "unhealthy":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return report


@router.get(
    "/metrics",
    summary="Counts of jobs, queue and workers",
    response_model=MetricsView,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **problem_responses(503),
    },
)
async def metrics(request: Request, app: App) -> MetricsView | Response:
    """Return JSON, or Prometheus text when the client accepts it before JSON."""
    stats = await app.repository.stats(app.settings.worker_lease_seconds)
    accept = request.headers.get("accept", "")
    if not prefers_prometheus(accept):
        return metrics_view(stats)
    body, content_type = prometheus_text(stats, accept)
    return Response(body, media_type=content_type)


@router.get("/info", summary="How it is set", responses=problem_responses())
async def info(app: App) -> dict[str, Any]:
    """Return the configuration that a client or an operator may see."""
    return {
        "service": TITLE,
        "version": __version__,
        "configuration": _configuration(app.settings),
        "endpoints": ENDPOINTS,
        "monitoring": {
            "flower": f"http://localhost:{app.settings.flower_port}",
            "health": "/health",
            "health_detailed": "/health/detailed",
            "metrics": "/metrics",
            "docs": "/docs",
        },
    }


def _configuration(settings: Settings) -> dict[str, Any]:
    """Name what is shown, so that no secret, address or path can slip in."""
    return {
        "provider": "mock" if settings.is_mock else "replicate",
        "default_model": DEFAULT_MODEL,
        "log_level": settings.log_level,
        "retries": {
            "max_retry_attempts": settings.max_retry_attempts,
            "retry_backoff_factor": settings.retry_backoff_factor,
            "retry_backoff_max_seconds": settings.retry_backoff_max_seconds,
            "on_unknown_outcome": settings.on_unknown_outcome,
        },
        "limits": {
            "max_prompt_characters": MAX_PROMPT_CHARACTERS,
            "max_body_bytes": settings.max_body_bytes,
            "max_output_bytes": settings.max_output_bytes,
            "max_output_pixels": settings.max_output_pixels,
            "queue_deadline_seconds": settings.queue_deadline_seconds,
            "job_deadline_seconds": settings.job_deadline_seconds,
            "starting_deadline_seconds": settings.starting_deadline_seconds,
            "running_deadline_seconds": settings.running_deadline_seconds,
        },
    }
