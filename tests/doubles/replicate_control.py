"""The control API of the Replicate double, under /_ledger: scripting it and reading its ledger."""

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.doubles.replicate_ledger import Ledger
from tests.doubles.replicate_replies import Problem
from tests.doubles.replicate_settings import Fault, Settings
from tests.doubles.replicate_webhooks import Webhooks

FAULT = TypeAdapter(Fault)


class ControlApi:
    """What tests use to script the double and to read its ledger; needs no token."""

    def __init__(self, ledger: Ledger, webhooks: Webhooks) -> None:
        self.ledger = ledger
        self.webhooks = webhooks

    def routes(self) -> list[Route]:
        return [
            Route("/_ledger", self.get_ledger, methods=["GET"]),
            Route("/_ledger", self.reset, methods=["DELETE"]),
            Route("/_ledger/settings", self.merge_settings, methods=["PUT"]),
            Route("/_ledger/faults", self.push_fault, methods=["POST"]),
            Route("/_ledger/faults", self.clear_faults, methods=["DELETE"]),
        ]

    async def get_ledger(self, request: Request) -> Response:
        return JSONResponse(self.ledger.snapshot())

    async def reset(self, request: Request) -> Response:
        self.webhooks.reset()
        self.ledger.reset()
        return Response(status_code=204)

    async def merge_settings(self, request: Request) -> Response:
        """Also fills the rate limit's burst again."""
        merged = self.ledger.settings.model_dump() | await request.json()
        try:
            self.ledger.configure(Settings.model_validate(merged))
        except ValidationError as error:
            raise Problem(422, str(error)) from error
        return JSONResponse(self.ledger.settings.model_dump(mode="json"))

    async def push_fault(self, request: Request) -> Response:
        try:
            fault = FAULT.validate_json(await request.body())
        except ValidationError as error:
            raise Problem(422, str(error)) from error
        self.ledger.faults.append(fault)
        return Response(status_code=201)

    async def clear_faults(self, request: Request) -> Response:
        self.ledger.faults.clear()
        return Response(status_code=204)
