"""Replicate's HTTP API as the double speaks it."""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.doubles import clock
from tests.doubles.replicate_bodies import (
    CreatedReply,
    create_body,
    create_request,
    output_count,
    parse_time,
    prediction_body,
)
from tests.doubles.replicate_ledger import Download, Ledger, Prediction
from tests.doubles.replicate_models import model_document, version_document
from tests.doubles.replicate_replies import (
    MEDIA_TYPES,
    Dropped,
    Problem,
    Reply,
    extension,
    file_reply,
    made_file,
    status_reply,
)
from tests.doubles.replicate_settings import (
    EXCHANGE_FAULTS,
    FILE_FAULTS,
    Fault,
    Kind,
)
from tests.doubles.replicate_webhooks import Webhooks

Handler = Callable[[Request], Awaitable[Reply]]

VERSION = re.compile(r"(?:([^/:]+/[^/:]+):)?([0-9a-f]{64})|([^/:]+/[^/:]+)")
OUTPUT_NAME = re.compile(r"out-(\d+)\.([a-z0-9]+)")
NOT_FOUND = "The requested resource could not be found."


class ReplicateApi:
    """The part of Replicate's HTTP API that the service uses, and the output files."""

    def __init__(self, ledger: Ledger, webhooks: Webhooks) -> None:
        self.ledger = ledger
        self.webhooks = webhooks

    def routes(self) -> list[Route]:
        prediction, model = "/v1/predictions/{prediction_id}", "/v1/models/{owner}/{name}"
        return [
            self._route("create", "POST", "/v1/predictions", self.create),
            self._route("create", "POST", f"{model}/predictions", self.create_for_model),
            self._route("get", "GET", prediction, self.get_prediction),
            self._route("list", "GET", "/v1/predictions", self.list_predictions),
            self._route("cancel", "POST", f"{prediction}/cancel", self.cancel),
            self._route("models", "GET", model, self.get_model),
            self._route("models", "GET", f"{model}/versions/{{version}}", self.get_version),
            self._route("account", "GET", "/v1/account", self.get_account),
            self._route("secret", "GET", "/v1/webhooks/default/secret", self.get_secret),
            self._route("download", "GET", "/files/{prediction_id}/{file_name}", self.download),
        ]

    def _route(self, kind: Kind, method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Reply:
            self._admit(kind, request)
            current = self._unless_reset(handler)
            fault = self.ledger.take_fault(kind, EXCHANGE_FAULTS, await self._prompt(request))
            reply = await _exchange(fault, current, request)
            if fault is None and kind != "download":
                remaining = "599" if kind == "create" else "2999"
                reply.headers.update({"ratelimit-remaining": remaining, "ratelimit-reset": "1"})
            return reply

        return Route(path, endpoint, methods=[method])

    def _unless_reset(self, handler: Handler) -> Handler:
        """Drop what was held back since before a reset: it would look like the next test's."""
        generation = self.ledger.generation

        async def current(request: Request) -> Reply:
            if self.ledger.generation != generation:
                return Dropped(reset=False)
            return await handler(request)

        return current

    def _admit(self, kind: Kind, request: Request) -> None:
        """Count the request, then refuse it for its token or for the rate limit."""
        self.ledger.requests[kind] += 1
        request.state.called_at = clock.now()
        if kind == "create":
            self.ledger.create_calls.append(request.state.called_at)
        if kind == "download":
            self._note_download(request)
            return
        accepted = {f"Bearer {token}" for token in self.ledger.settings.tokens}
        if request.headers.get("authorization") not in accepted:
            detail = "You did not pass a valid authentication token"
            raise Problem(401, detail, title="Unauthenticated")
        if kind == "create" and (wait_seconds := self.ledger.throttled_seconds()):
            self.ledger.requests["throttled"] += 1
            raise _throttled(math.ceil(wait_seconds))

    def _note_download(self, request: Request) -> None:
        prediction = self.ledger.by_id.get(request.path_params["prediction_id"])
        if prediction is not None:
            note = Download(
                name=request.path_params["file_name"],
                authorization="authorization" in request.headers,
                host=request.headers.get("host", ""),
            )
            prediction.downloads.append(note)

    async def _prompt(self, request: Request) -> str:
        """The prompt of the prediction that the request names or would create."""
        prediction = self.ledger.by_id.get(request.path_params.get("prediction_id", ""))
        if prediction is not None:
            return prediction.prompt
        try:
            return str((await request.json())["input"]["prompt"])
        except (ValueError, TypeError, KeyError):
            return ""

    async def create(self, request: Request) -> Reply:
        body = await create_body(request, "version", "input")
        model, version = self._resolve(body["version"])
        return self._accept(request, body, model, version)

    async def create_for_model(self, request: Request) -> Reply:
        model = self._known_model(request)
        if not self.ledger.settings.is_official(model):
            raise Problem(404, NOT_FOUND)
        return self._accept(request, await create_body(request, "input"), model, "hidden")

    def _resolve(self, version: object) -> tuple[str, str]:
        """Model and version that a create's `version` field means."""
        match = VERSION.fullmatch(version) if isinstance(version, str) else None
        if match is not None:
            model_of_version, version_id, official_model = match.groups()
            listed_model = self.ledger.model_of_version.get(version_id, "acme/unlisted")
            model = official_model or model_of_version or listed_model
            allowed = version_id or self.ledger.settings.is_official(model)
            if allowed and model not in self.ledger.settings.unknown_models:
                return model, version_id or "hidden"
        detail = "The specified version does not exist (or you may not be permitted to use it)."
        raise Problem(422, detail, title="Invalid version or not permitted")

    def _known_model(self, request: Request) -> str:
        model = f"{request.path_params['owner']}/{request.path_params['name']}"
        if model in self.ledger.settings.unknown_models:
            raise Problem(404, NOT_FOUND)
        return model

    def _accept(self, request: Request, body: dict[str, Any], model: str, version: str) -> Reply:
        settings = self.ledger.settings
        create = create_request(request, body, model, version, settings)
        prediction, origin = self.ledger.accept(create), _origin(request)
        start_webhook = self.webhooks.report_on(prediction, settings, origin)
        return CreatedReply(prediction, settings, origin, start_webhook)

    async def get_prediction(self, request: Request) -> Reply:
        return JSONResponse(self._body(self._prediction(request), request))

    def _prediction(self, request: Request) -> Prediction:
        prediction = self.ledger.by_id.get(request.path_params["prediction_id"])
        if prediction is None:
            raise Problem(404, NOT_FOUND)
        return prediction

    def _body(self, prediction: Prediction, request: Request) -> dict[str, Any]:
        return prediction_body(prediction, self.ledger.settings, _origin(request), clock.now())

    async def list_predictions(self, request: Request) -> Reply:
        query = request.query_params
        after, before = (
            parse_time(query.get("created_after")),
            parse_time(query.get("created_before")),
        )
        if query.get("source") == "web":  # every prediction here came by the API
            return JSONResponse({"previous": None, "next": None, "results": []})
        try:
            page = self.ledger.page(query.get("cursor"), after, before)
        except ValueError as error:
            raise Problem(400, "Invalid cursor.") from error

        def neighbour(cursor: str | None) -> str | None:
            return cursor and str(request.url.include_query_params(cursor=cursor))

        results = [self._body(prediction, request) for prediction in page.predictions]
        for body in results:
            del body["logs"]
        links = {"previous": neighbour(page.previous), "next": neighbour(page.next)}
        return JSONResponse(links | {"results": results})

    async def cancel(self, request: Request) -> Reply:
        prediction = self._prediction(request)
        prediction.cancel(clock.now())
        return JSONResponse(self._body(prediction, request))

    async def get_model(self, request: Request) -> Reply:
        model, settings = self._known_model(request), self.ledger.settings
        official = settings.is_official(model)
        document = model_document(model, is_official=official, schemas=settings.schemas)
        if document["latest_version"] is not None:
            self.ledger.model_of_version[document["latest_version"]["id"]] = model
        return JSONResponse(document)

    async def get_version(self, request: Request) -> Reply:
        model, version_id = self._known_model(request), request.path_params["version"]
        if not (self.ledger.settings.schemas and re.fullmatch("[0-9a-f]{64}", version_id)):
            raise Problem(404, NOT_FOUND)
        self.ledger.model_of_version[version_id] = model
        return JSONResponse(version_document(version_id))

    async def get_account(self, request: Request) -> Reply:
        account = {"type": "organization", "username": "acme", "name": "Acme", "github_url": None}
        return JSONResponse(account)

    async def get_secret(self, request: Request) -> Reply:
        return JSONResponse({"key": self.ledger.settings.webhook_secret})

    async def download(self, request: Request) -> Reply:
        prediction = self._prediction(request)
        index = self._file_index(prediction, request.path_params["file_name"])
        if index is None:
            return Response("Not Found", 404, media_type="text/plain")
        fault = self.ledger.take_fault("download", FILE_FAULTS, prediction.prompt)
        model, inputs = prediction.request.model, prediction.request.input
        content = await asyncio.to_thread(made_file, model, prediction.id, index, inputs)
        return file_reply(content, MEDIA_TYPES[extension(model, inputs)], fault)

    def _file_index(self, prediction: Prediction, file_name: str) -> int | None:
        """Which output the name means; None when it is no output, not made yet or expired."""
        now = clock.now()
        completed_at = prediction.completed_at(now) or now
        expired = now >= completed_at + self.ledger.settings.file_lifetime_seconds
        match = OUTPUT_NAME.fullmatch(file_name)
        if match is None or expired or not prediction.has_output(now):
            return None
        index, suffix = int(match[1]), match[2]
        model, inputs = prediction.request.model, prediction.request.input
        is_one = index < output_count(inputs) and suffix == extension(model, inputs)
        return index if is_one else None


async def _exchange(fault: Fault | None, handler: Handler, request: Request) -> Reply:
    """Answer by `handler`, or as a fault has it before or after the handler has acted."""
    if fault is None:
        return await handler(request)
    if fault.kind == "delay":
        await asyncio.sleep(fault.seconds)
    if fault.kind == "drop":
        return Dropped(reset=fault.reset)
    if fault.kind == "status":
        return status_reply(fault)
    reply = await handler(request)
    if fault.kind == "accept_then_delay":
        await asyncio.sleep(fault.seconds)
    if fault.kind == "accept_then_drop":
        return Dropped(reset=fault.reset)
    if fault.kind == "accept_then_status":
        return status_reply(fault)
    return reply


def _throttled(wait_seconds: int) -> Problem:
    detail = f"Request was throttled. Your rate limit resets in ~{wait_seconds}s."
    headers = {"retry-after": str(wait_seconds)}
    return Problem(429, detail, headers=headers, retry_after=wait_seconds)


def _origin(request: Request) -> str:
    """Where the client reached us: URLs in replies lead through the same proxy, if there is one."""
    return str(request.base_url).rstrip("/")
