"""A stand-in for Replicate inside the process: same states, same failures, drawn pictures."""

import asyncio
import base64
import json
import random
import zlib
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import uuid4

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers import pictures
from app.providers.base import MaySend, Prediction, PredictionRequest, Sought, called_off

PREFIX = "mock-"
PROMPT_CHARS = 200  # a little more than a picture can show
# Of those cancelled; each is as long as its prompt.
CANCELED_REMEMBERED = 10_000
STARTING_SHARE = 0.2  # of the whole delay
TRANSIENT_SHARE = 0.8  # of the simulated failures; the others are final

TRANSIENT_ERROR = "E1000: simulated failure of the platform"
PERMANENT_ERROR = "Simulated refusal: flagged as sensitive"

INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "negative_prompt": {"type": "string"},
        "width": {"type": "integer", "minimum": 16, "maximum": 2048},
        "height": {"type": "integer", "minimum": 16, "maximum": 2048},
        "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
        "scheduler": {"type": "string"},
        "guidance_scale": {"type": "number", "minimum": 0, "maximum": 50},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 500},
        "prompt_strength": {"type": "number", "minimum": 0, "maximum": 1},
        "aspect_ratio": {"type": "string"},
        "megapixels": {"type": "string"},
        "output_format": {"type": "string", "enum": ["png", "webp", "jpg"]},
        "output_quality": {"type": "integer", "minimum": 0, "maximum": 100},
        "go_fast": {"type": "boolean"},
        "disable_safety_checker": {"type": "boolean"},
    },
}


@dataclass(frozen=True, slots=True)
class _Run:
    """All there is to know about a mock prediction; its id *is* this, encoded.

    So any worker can go on with the prediction of one that died, as at the real provider.
    """

    model: str
    prompt: str
    seed: int
    width: int
    height: int
    outputs: int
    created_at: float
    delay_seconds: float
    error: str | None
    nonce: str

    @property
    def id(self) -> str:
        text = json.dumps(list(asdict(self).values()), separators=(",", ":"), ensure_ascii=False)
        return PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")

    @classmethod
    def of(cls, prediction_id: str) -> Self:
        """Decode an id.

        Raises: PredictionNotFound.
        """
        code = prediction_id.removeprefix(PREFIX)
        try:
            packed = base64.urlsafe_b64decode(code + "=" * (-len(code) % 4))
            run = cls(*json.loads(zlib.decompress(packed)))
        except (ValueError, TypeError, zlib.error):
            raise PredictionNotFound from None
        if run.id != prediction_id:  # base64 and zlib overlook what is too much
            raise PredictionNotFound
        return run


class MockProvider:
    """Behaves like Replicate without a network.

    A prediction takes between `delay_min` and `delay_max` seconds; the share `failure_rate` of
    them fails, four in five of these in a way that is worth another attempt.
    """

    name = "mock"
    call_seconds = 0.0

    def __init__(self, delay_min: float, delay_max: float, failure_rate: float) -> None:
        self._delays = (delay_min, delay_max)
        self._failure_rate = failure_rate
        self._canceled: deque[str] = deque(maxlen=CANCELED_REMEMBERED)

    async def admit(self) -> None:
        """See `Provider.admit`: the mock has no limits."""

    async def create(
        self, request: PredictionRequest, may_send: MaySend | None = None
    ) -> Prediction:
        """See `Provider.create`."""
        if may_send is not None and not await may_send():
            raise called_off()
        given = request.input
        run = _Run(
            model=request.model_name,
            prompt=str(given.get("prompt", ""))[:PROMPT_CHARS],
            seed=_integer(given.get("seed"), random.getrandbits(32)),
            width=_integer(given.get("width"), 1024),
            height=_integer(given.get("height"), 1024),
            outputs=_integer(given.get("num_outputs"), 1),
            created_at=datetime.now(UTC).timestamp(),
            delay_seconds=random.uniform(*self._delays),
            error=self._error(),
            nonce=uuid4().hex[:8],
        )
        return self._prediction(run)

    async def get(self, prediction_id: str) -> Prediction:
        """See `Provider.get`."""
        return self._prediction(_Run.of(prediction_id))

    async def poll(
        self, prediction_ids: Collection[str]
    ) -> AsyncIterator[tuple[str, Prediction | None]]:
        """See `Provider.poll`."""
        for prediction_id in prediction_ids:
            try:
                yield prediction_id, await self.get(prediction_id)
            except PredictionNotFound:
                yield prediction_id, None

    async def find(self, sought: Sought, made_within_seconds: float) -> list[Prediction]:
        """See `Provider.find`: what no id was kept of never existed here, and cost nothing."""
        del sought, made_within_seconds
        return []

    async def cancel(self, prediction_id: str) -> Prediction | None:
        """See `Provider.cancel`; known to this process only, which is enough for a mock."""
        try:
            if not (await self.get(prediction_id)).is_terminal:
                self._canceled.append(prediction_id)
            return await self.get(prediction_id)
        except PredictionNotFound:
            return None

    async def input_schema(self, model_name: str) -> dict[str, Any] | None:
        """See `Provider.input_schema`: one schema for every model."""
        del model_name
        return INPUT_SCHEMA

    async def webhook_secret(self) -> str:
        """See `Provider.webhook_secret`: the mock reports to nobody."""
        raise ProviderError(FailureClass.PERMANENT, "no_webhooks", "The mock sends no reports.")

    async def download(self, url: str) -> AsyncIterator[bytes]:
        """See `Provider.download`; `url` is `mock:{prediction id}/{index}`."""
        prediction_id, _, index = url.removeprefix("mock:").rpartition("/")
        run = _Run.of(prediction_id)
        yield await asyncio.to_thread(
            pictures.draw,
            run.prompt,
            seed=run.seed + int(index),
            width=run.width,
            height=run.height,
        )

    async def aclose(self) -> None:
        """See `Provider.aclose`."""

    def _error(self) -> str | None:
        if random.random() >= self._failure_rate:
            return None
        return TRANSIENT_ERROR if random.random() < TRANSIENT_SHARE else PERMANENT_ERROR

    def _prediction(self, run: _Run) -> Prediction:
        """Compute the state that the prediction has by now."""
        created = datetime.fromtimestamp(run.created_at, UTC)
        started = created + timedelta(seconds=run.delay_seconds * STARTING_SHARE)
        ended = created + timedelta(seconds=run.delay_seconds)
        status = self._status(run, started, ended)
        done = status == "succeeded"
        return Prediction(
            id=run.id,
            status=status,
            model_name=run.model,
            input={"prompt": run.prompt, "seed": run.seed},
            output=[f"mock:{run.id}/{index}" for index in range(run.outputs)] if done else None,
            error=run.error if status == "failed" else None,
            version="mock",
            created_at=created,
            started_at=started if status != "starting" else None,
            completed_at=ended if status in ("succeeded", "failed") else None,
            predict_time_seconds=(ended - started).total_seconds() if done else None,
        )

    def _status(self, run: _Run, started: datetime, ended: datetime) -> str:
        now = datetime.now(UTC)
        if run.id in self._canceled:
            return "canceled"
        if now >= ended:
            return "failed" if run.error else "succeeded"
        return "processing" if now >= started else "starting"


def _integer(value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        return int(value)  # JSON Schema's `integer` takes it too
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProviderError(FailureClass.PERMANENT, "invalid_input", f"not an integer: {value!r}")
    return value
