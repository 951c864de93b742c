"""The JSON that goes in and out of the Replicate double: create requests and prediction objects."""

import asyncio
import base64
import re
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tests.doubles import clock
from tests.doubles.replicate_ledger import TERMINAL, CreateRequest, Prediction, iso
from tests.doubles.replicate_models import invalid_fields
from tests.doubles.replicate_replies import MEDIA_TYPES, Problem, connection, extension, picture
from tests.doubles.replicate_settings import Settings

PREFER = re.compile(r"wait(?:=([1-9][0-9]?))?")
MAXIMUM_HOLD_SECONDS = 60
CANCEL_AFTER = re.compile(r"(?=.)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
OPTIONAL_FIELDS = {"webhook": str, "webhook_events_filter": list, "stream": bool}
WEBHOOK_EVENTS = {"start", "output", "logs", "completed"}


async def create_body(request: Request, *required: str) -> dict[str, Any]:
    """The JSON object of a create call. Problem 400/422: no object, or a wrong field."""
    try:
        body = await request.json()
    except ValueError as error:
        raise Problem(400, "The request body is not valid JSON.") from error
    if not isinstance(body, dict):
        raise Problem(422, "The request body must be an object.")
    if missing := [name for name in required if name not in body]:
        raise Problem(422, f"{', '.join(missing)} is required.")
    if unknown := sorted(body.keys() - {*required, *OPTIONAL_FIELDS}):
        raise Problem(422, f"Additional property {', '.join(unknown)} is not allowed.")
    _check_types(body)
    return body


def _check_types(body: dict[str, Any]) -> None:
    if not isinstance(body["input"], dict):
        raise Problem(422, "input must be an object.")
    for name, kind in OPTIONAL_FIELDS.items():
        if not isinstance(body.get(name, kind()), kind):
            raise Problem(422, f"{name} must be of type {kind.__name__}.")
    if not WEBHOOK_EVENTS.issuperset(body.get("webhook_events_filter", [])):
        raise Problem(422, f"webhook_events_filter takes {', '.join(sorted(WEBHOOK_EVENTS))}.")


def create_request(
    request: Request, body: dict[str, Any], model: str, version: str, settings: Settings
) -> CreateRequest:
    """What a create call asks for. Problem 422: an input or a header that is not accepted."""
    headers = request.headers
    invalid = list(invalid_fields(body["input"])) if settings.schemas else []
    if invalid:
        detail = "".join(f"- {field['field']}: {field['description']}\n" for field in invalid)
        raise Problem(422, detail, title="Input validation failed", invalid_fields=invalid)
    return CreateRequest(
        model=model,
        version=version,
        input=body["input"],
        webhook=body.get("webhook"),
        webhook_events_filter=body.get("webhook_events_filter"),
        headers={name: headers[name] for name in ("prefer", "cancel-after") if name in headers},
        hold_seconds=_hold_seconds(headers.get("prefer")),
        cancel_after_seconds=_cancel_after_seconds(
            headers.get("cancel-after"), settings.minimum_cancel_after_seconds
        ),
        called_at=request.state.called_at,
    )


def _hold_seconds(prefer: str | None) -> float:
    if prefer is None:
        return 0
    match = PREFER.fullmatch(prefer)
    if match is None:
        raise Problem(422, "Prefer must be wait or wait=n with n from 1 to 60.")
    return min(int(match[1] or MAXIMUM_HOLD_SECONDS), MAXIMUM_HOLD_SECONDS)


def _cancel_after_seconds(text: str | None, minimum_seconds: float) -> float | None:
    if text is None:
        return None
    match = CANCEL_AFTER.fullmatch(text)
    if match is None:
        raise Problem(422, "Cancel-After must be a duration such as 30, 30s, 5m or 1h30m45s.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total_seconds = hours * 3600 + minutes * 60 + seconds
    if total_seconds < minimum_seconds:
        raise Problem(422, f"Cancel-After must be at least {minimum_seconds} seconds.")
    return total_seconds


class CreatedReply:
    """The answer to a create: held as long as `Prefer` asks, rendered when it leaves.

    201: the prediction; 202: the hold is over and the output is not complete. It leaves after the
    task `after`, if one is given.
    """

    def __init__(
        self,
        prediction: Prediction,
        settings: Settings,
        origin: str,
        after: asyncio.Task[None] | None = None,
    ) -> None:
        self.headers = MutableHeaders({"location": prediction_urls(prediction, origin)["get"]})
        if prediction.request.hold_seconds:
            self.headers["preference-applied"] = "wait"
        self._prediction = prediction
        self._settings = settings
        self._origin = origin
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hold_seconds = self._prediction.request.hold_seconds
        if hold_seconds:
            await self._prediction.settle(hold_seconds)
        if self._after is not None:
            await asyncio.wait([self._after])
        now = clock.now()
        done = self._prediction.has_output(now) or self._prediction.status_at(now) in TERMINAL
        body = prediction_body(self._prediction, self._settings, self._origin, now)
        reply = JSONResponse(body, 201 if done or not hold_seconds else 202, self.headers)
        client_is_gone = connection(scope).is_closing()
        await reply(scope, receive, send)
        self._prediction.reply_delivered = not client_is_gone


def prediction_body(
    prediction: Prediction, settings: Settings, origin: str, now: float
) -> dict[str, Any]:
    """The prediction object as it is at `now`, with the oddities that recorded replies have."""
    status = prediction.status_at(now)
    started_at, completed_at = prediction.started_at(now), prediction.completed_at(now)
    removed = completed_at is not None and now >= completed_at + settings.retention_seconds
    inputs = prediction.request.input
    shows_output = prediction.has_output(now) and not removed
    body = {
        "id": prediction.id,
        "model": prediction.request.model,
        "version": prediction.request.version,
        "input": {} if removed else dict(sorted(inputs.items())),  # recorded: keys come back sorted
        "logs": "" if removed or started_at is None else f"Using seed: {inputs.get('seed', 0)}\n",
        "output": output_of(prediction, settings.files_origin or origin) if shows_output else None,
        "data_removed": removed,
        "error": _error(prediction, status),
        "source": "api",
        "status": status,
        "created_at": iso(prediction.created_at),
        "urls": prediction_urls(prediction, origin),
    } | _times(prediction, started_at, completed_at)
    if status == "starting" and settings.bare_starting_bodies:
        del body["output"], body["data_removed"]
    return body


def prediction_urls(prediction: Prediction, origin: str) -> dict[str, str]:
    url = f"{origin}/v1/predictions/{prediction.id}"
    web = f"https://replicate.com/p/{prediction.id}"
    return {"cancel": f"{url}/cancel", "get": url, "web": web}


def _error(prediction: Prediction, status: str) -> str | None:
    if status != "failed":
        return None
    return prediction.fate.error if prediction.fate is not None else None


def _times(
    prediction: Prediction, started_at: float | None, completed_at: float | None
) -> dict[str, Any]:
    times: dict[str, Any] = {}
    if prediction.deadline_at is not None:
        times["deadline"] = iso(prediction.deadline_at)
    if started_at is not None:
        times["started_at"] = iso(started_at)
    if completed_at is not None:
        times["completed_at"] = iso(completed_at)
        times["metrics"] = {"total_time": round(completed_at - prediction.created_at, 6)}
        if started_at is not None:
            times["metrics"]["predict_time"] = round(completed_at - started_at, 6)
    return times


def output_of(prediction: Prediction, files_origin: str) -> Any:
    """The output of a prediction that has one, in the shape the settings asked for at its time."""
    if prediction.fate is not None and prediction.fate.kind == "output":
        return prediction.fate.output
    model, inputs = prediction.request.model, prediction.request.input
    if model.endswith("/writer"):
        return [f"{word} " for word in f"Once upon a time: {inputs['prompt']}".split()]
    if model.endswith("/judge"):
        return {"caption": inputs["prompt"], "score": 0.5}
    suffix = extension(model, inputs)
    urls = [
        f"{files_origin}/files/{prediction.id}/out-{index}.{suffix}"
        for index in range(output_count(inputs))
    ]
    if prediction.output_kind == "data_url":
        encoded = base64.b64encode(picture(prediction.id, 0, inputs)).decode()
        return f"data:{MEDIA_TYPES[suffix]};base64,{encoded}"
    outputs = {
        "list": urls,
        "string": urls[0],
        "none": None,
        "empty": [],
        "object": {"images": urls, "seed": inputs.get("seed", 0)},
        "html": "<html><body>Not a URL</body></html>",
    }
    return outputs[prediction.output_kind]


def output_count(inputs: dict[str, Any]) -> int:
    wanted = inputs.get("num_outputs")
    return wanted if isinstance(wanted, int) and 1 <= wanted <= 4 else 1


def parse_time(text: str | None) -> float | None:
    """An ISO 8601 query parameter as seconds since the epoch, UTC unless it says otherwise."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise Problem(400, f"{text} is not an ISO 8601 time.") from error
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
