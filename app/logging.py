"""Structured logs: JSON lines, or columns on a terminal; one format for every library's lines."""

import logging
import logging.config
import sys
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

# What they say at INFO we say ourselves, with more context and without query strings; at DEBUG
# Replicate's client and what is below it tell whole inputs and headers.
QUIET = (
    "replicate",
    "httpx",
    "httpcore",
    "uvicorn.access",
    "celery.worker.strategy",
    "celery.app.trace",
)
LOGGED_ID_CHARS = 32


def configure_logging(level: str) -> None:
    """Send everything to standard error at `level`; bound context vars appear in every line."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        _drop_color_message,
        _shorten_prediction_ids,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(_config(level, shared))


def _config(level: str, shared: list[Processor]) -> dict[str, Any]:
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": shared,
        "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers()],
    }
    handler = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "all"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"all": formatter},
        "handlers": {"all": handler},
        "root": {"handlers": ["all"], "level": level},
        "loggers": {
            # uvicorn brings handlers of its own; its lines go through ours instead.
            "uvicorn": {"handlers": [], "propagate": True},
            "uvicorn.error": {"handlers": [], "propagate": True},
            **{name: {"level": "WARNING"} for name in QUIET},
        },
    }


def _renderers() -> list[Processor]:
    """Render tracebacks without local variables: these hold prompts and tokens."""
    if sys.stderr.isatty():
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    return [
        structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
        _shorten_exceptions,
        structlog.processors.JSONRenderer(),
    ]


def _shorten_exceptions(_: Any, __: str, event_dict: EventDict) -> EventDict:
    """Keep the first line of each exception: PostgreSQL quotes whole rows in the others."""
    for error in event_dict.get("exception") or ():
        error["exc_value"] = error["exc_value"].partition("\n")[0][:300]
    return event_dict


def _drop_color_message(_: Any, __: str, event_dict: EventDict) -> EventDict:
    """Drop uvicorn's second copy of each message, made for terminals."""
    event_dict.pop("color_message", None)
    return event_dict


def _shorten_prediction_ids(_: Any, __: str, event_dict: EventDict) -> EventDict:
    """Replicate's have 26 characters; the mock's are long, because they carry the prompt."""
    if isinstance(event_dict.get("prediction_id"), str):
        event_dict["prediction_id"] = event_dict["prediction_id"][:LOGGED_ID_CHARS]
    return event_dict
