"""Every error answer: one shape, RFC 9457 `application/problem+json`, and nothing inner in it."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import AnswerTooLate, AppError, InvalidInput, ServiceUnavailable, StorageError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
MAX_ERRORS = 50
MAX_PATH_CHARACTERS = 200

# Their names in RFC 9110; Python's `http` module had older ones before 3.13.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
# What the framework raises by itself, in our words.
_DETAILS = {
    404: "There is nothing at this path.",
    405: "This path does not answer to this method.",
    413: "The request body is larger than this service accepts.",
}
_UNREADABLE = "The request body is not JSON in UTF-8 that can be read."
_DATABASE_AWAY = (
    "The database is not available right now. The request may be repeated; a POST that was given"
    " an `Idempotency-Key` has its effect once."
)
_STORAGE_AWAY = "The file storage is not available right now."

# PostgreSQL's classes: connection, resources, operator intervention (shutdown), system error;
# and while a server is being set up or replaced: authorization, no such database, read-only.
_AWAY_SQLSTATES = ("08", "53", "57", "58", "28", "3D", "25006")

log = structlog.get_logger(__name__)


class FieldError(BaseModel):
    """One fault of a request."""

    path: str = Field(examples=["body.parameters.width"])
    message: str = Field(examples=["must be at most 1440"])


class Problem(BaseModel):
    """An error answer (RFC 9457)."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no such job."])
    request_id: str = Field(description="Also in the `X-Request-ID` header and in our logs.")
    errors: list[FieldError] | None = Field(None, description="What is wrong where: 422 only.")


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    errors: Sequence[tuple[Sequence[str | int], str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make an error answer; `detail` and `errors` are shown to the client as they are."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "request_id": request.state.request_id,
    }
    if errors is not None:
        shown = errors[:MAX_ERRORS]
        body["errors"] = [{"path": _dotted(path), "message": text} for path, text in shown]
    if status == 503:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS), **(headers or {})}
    return JSONResponse(body, status, headers, MEDIA_TYPE)


def install_problem_handlers(app: FastAPI) -> None:
    """Make `app` answer every expected error with a problem; `UnexpectedErrors` does the rest."""
    app.add_exception_handler(AppError, _app_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)


class UnexpectedErrors:
    """ASGI middleware: 503 when the database or the storage is away, else 500 with a traceback
    in the log. Either way the client learns only the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; see the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            return  # nobody waits for an answer; the request's line in the log has no status
        except Exception as error:
            response = problem_for(Request(scope), error)
            if not started:
                await response(scope, receive, send)


def problem_for(request: Request, error: Exception) -> Response:
    """Make the answer to an error that no handler knows, and log it; nothing inner is shown."""
    if is_database_away(error):
        log.warning("database_away", error=type(error).__name__)
        return problem(request, 503, _DATABASE_AWAY)
    if isinstance(error, AnswerTooLate):
        log.warning("answer_too_late", path=request.url.path)
    if isinstance(error, AppError):  # of a layer around the routes
        return problem(request, error.status_code, error.detail)
    if isinstance(error, StorageError):
        log.error("storage_failed", error=str(error))
        return problem(request, 503, _STORAGE_AWAY)
    log.error("unexpected_error", exc_info=error)
    detail = "Something went wrong in the service. The request's id finds it in the logs."
    return problem(request, 500, detail)


def is_database_away(error: Exception) -> bool:
    """Tell whether the error means that PostgreSQL cannot be reached or is going down.

    asyncpg's connect errors arrive bare: `OSError` (of which `TimeoutError` is one), or its own
    class with a `sqlstate`.
    """
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout | OSError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    origin = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(origin, "sqlstate", None)).startswith(_AWAY_SQLSTATES)


async def _app_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AppError)  # noqa: S101 - what the handler is registered for
    errors = error.errors if isinstance(error, InvalidInput) else None
    if isinstance(error, ServiceUnavailable):
        log.warning("service_unavailable", detail=error.detail)
    return problem(request, error.status_code, error.detail, errors=errors)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    if error.status_code == 400:
        # FastAPI's word for a body that is not UTF-8, nested without end, and the like.
        return problem(request, 422, _UNREADABLE, errors=[(("body",), "must be valid JSON")])
    detail = _DETAILS.get(error.status_code, error.detail)
    return problem(request, error.status_code, detail, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    faults = [_fault(fault) for fault in error.errors()]
    path, text = faults[0]
    return problem(request, 422, f"{_dotted(path)}: {text}", errors=faults)


def _fault(fault: Mapping[str, Any]) -> tuple[tuple[str | int, ...], str]:
    """Say a Pydantic error without the value that caused it."""
    path = tuple(fault["loc"])
    if fault["type"] == "json_invalid":
        return ("body",), f"is not valid JSON: {fault['ctx']['error']} (character {path[-1]})"
    if fault["type"] == "model_attributes_type":
        return path, "must be a JSON object, sent as application/json"
    if fault["type"] == "extra_forbidden":
        return path, "is not a field of this request"
    return path, str(fault["msg"]).removeprefix("Value error, ")


def _dotted(path: Sequence[str | int]) -> str:
    """Join a path; it may end in a client's own field name, however long."""
    return ".".join(str(part) for part in path)[:MAX_PATH_CHARACTERS]


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's `responses` must say about its errors (500 comes by itself)."""
    return {
        status: {"model": Problem, "description": _DESCRIPTIONS[status]}
        for status in (*statuses, 500)
    }


_DESCRIPTIONS = {
    401: "The signature is missing, wrong or too old, or meant for another address.",
    403: "A browser's page of an origin that is not one of `CORS_ORIGINS` has sent this.",
    404: "No such job, or it has no such file.",
    408: "The rest of the request's body did not come in time.",
    409: "The job's status does not allow this; `detail` names the status.",
    410: "The files were kept for as long as the settings say, and then deleted.",
    412: "The file is not the version that `If-Match` names.",
    413: "The request body is larger than `MAX_BODY_BYTES` (a report: than four times as much).",
    416: "The range lies outside the file; `Content-Range` tells its size.",
    422: "The request is not valid; `errors` tells what is wrong where.",
    500: "Something went wrong in the service.",
    503: "The database or the storage is away or slow; come back after `Retry-After` seconds.",
}


def describe_problems(schema: dict[str, Any]) -> None:
    """Put the OpenAPI document's problems under their own media type, which FastAPI cannot.

    Its own description of a 422 goes: it is added even where no value can be wrong.
    """
    for path in schema["paths"].values():
        for operation in path.values():
            for status, response in list(operation["responses"].items()):
                body = response.get("content", {}).get("application/json", {}).get("schema", {})
                if body.get("$ref", "").endswith("/HTTPValidationError"):
                    del operation["responses"][status]
                if body.get("$ref", "").endswith("/Problem"):
                    example = _example(int(status), response["description"])
                    response["content"] = {MEDIA_TYPE: {"schema": body, "example": example}}
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)


def _example(status: int, description: str) -> dict[str, Any]:
    example = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": description,
        "request_id": "3f2b8c1d9e4a4c0f8a7b6c5d4e3f2a1b",
    }
    if status == 422:
        example["errors"] = [{"path": "body.parameters.width", "message": "must be at most 1440"}]
    return example


def _title(status: int) -> str:
    return _TITLES.get(status) or HTTPStatus(status).phrase
