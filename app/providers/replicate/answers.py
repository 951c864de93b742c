"""Reads Replicate's answers, whatever they hold."""

import math
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from app.providers.base import Prediction
from app.providers.replicate.search import Page

# A clock that differs by more from the provider's is plainly wrong.
CLOCK_DIFFERENCE = timedelta(hours=1)


def read_prediction(body: Any) -> Prediction:
    """Read a prediction object; only `id` and `status` must be there.

    Recorded answers leave out fields that the schema requires, and know more states than it.
    Values of other types than the schema's are left out: each would be refused by the database,
    and so make a paid prediction one that can not be written down.
    Raises: ValueError - not a prediction.
    """
    if not isinstance(body, dict):
        raise ValueError("not a prediction")
    identity, status = body.get("id"), body.get("status")
    if not (isinstance(identity, str) and identity and isinstance(status, str)):
        raise ValueError("not a prediction")
    if identity != storable(identity):
        raise ValueError("not a prediction's id")
    metrics = body.get("metrics")
    return Prediction(
        id=identity,
        status=storable(status),
        model_name=str(body.get("model") or ""),
        input=given if isinstance(given := body.get("input"), dict) else {},
        output=body.get("output"),
        error=None if body.get("error") is None else storable(str(body["error"])),
        version=storable(body["version"]) if isinstance(body.get("version"), str) else None,
        created_at=_time(body.get("created_at")),
        started_at=_time(body.get("started_at")),
        completed_at=_time(body.get("completed_at")),
        predict_time_seconds=_seconds(metrics.get("predict_time"))
        if isinstance(metrics, dict)
        else None,
        data_removed=bool(body.get("data_removed")),
    )


def read_page(entries: Any, response: httpx.Response) -> Page:
    """Read what can be read: one strange entry must not hide the others. Raises: TypeError."""
    predictions, unreadable = [], 0
    for entry in entries:
        try:
            predictions.append(read_prediction(entry))
        except ValueError:
            unreadable += 1
    return Page(predictions, _answered_at(response), unreadable)


def _answered_at(response: httpx.Response) -> datetime:
    """Return when the provider answered by its own clock; by ours if it does not say.

    Ours also if it is a little behind: to look too far back costs a page, not far enough a second
    create.
    """
    ours = datetime.now(UTC)
    at = own_date(response) or ours
    return min(at, ours) if abs(at - ours) < CLOCK_DIFFERENCE else at


def own_date(response: httpx.Response) -> datetime | None:
    """Return when the provider says that it answered; None if it does not say."""
    try:
        return as_utc(parsedate_to_datetime(response.headers["date"]))
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def as_utc(at: datetime) -> datetime:
    """Return the time with its zone: UTC unless it says otherwise."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def storable(text: str) -> str:
    """Drop what PostgreSQL keeps in no text: NUL, and halves of a surrogate pair."""
    return text.replace("\0", "").encode(errors="replace").decode()


def _time(value: Any) -> datetime | None:
    """Read a time, UTC unless it says otherwise; one that makes no sense costs no prediction."""
    try:
        at = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        return None
    return as_utc(at)


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
