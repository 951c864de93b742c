"""One poller per process: wakes each waiting job when its prediction has ended."""

import asyncio
from contextlib import suppress

import structlog

from app.errors import PredictionNotFound, ProviderError
from app.providers.base import Prediction, Provider

LONGEST_PAUSE_SECONDS = 30.0

log = structlog.get_logger(__name__)


class PredictionWatcher:
    """Watches any number of predictions with few calls; holds no database connection.

    A provider that does not answer only makes it slower: who gives up, and when, is decided by
    the job's deadline.
    """

    def __init__(self, provider: Provider, interval_seconds: float) -> None:
        self._provider = provider
        self._interval = interval_seconds
        self._waiting: dict[str, asyncio.Future[Prediction]] = {}

    async def wait(self, prediction_id: str) -> Prediction:
        """Return the prediction when it is terminal.

        Raises: PredictionNotFound when the provider no longer knows it.
        """
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._waiting[prediction_id] = future
        try:
            return await future
        finally:
            self._waiting.pop(prediction_id, None)

    async def run(self) -> None:
        """Poll for ever; cancel the task to end it."""
        pause = self._interval
        while True:
            await asyncio.sleep(pause)
            try:
                await self._look()
                pause = self._interval
            except ProviderError as error:
                pause = min(max(error.retry_after_seconds or 0, 2 * pause), LONGEST_PAUSE_SECONDS)
                log.warning("poll_failed", code=error.code, pause_seconds=pause)

    async def _look(self) -> None:
        if not self._waiting:
            return
        try:
            seen = await self._provider.poll(list(self._waiting))
        except PredictionNotFound:
            await self._look_one_by_one()
            return
        for prediction in seen.values():
            if prediction.is_terminal:
                self._wake(prediction.id, prediction)

    async def _look_one_by_one(self) -> None:
        """Find out which prediction the provider does not know."""
        for prediction_id in list(self._waiting):
            try:
                prediction = await self._provider.get(prediction_id)
            except PredictionNotFound as error:
                self._wake(prediction_id, error)
            else:
                if prediction.is_terminal:
                    self._wake(prediction_id, prediction)

    def _wake(self, prediction_id: str, result: Prediction | Exception) -> None:
        future = self._waiting.get(prediction_id)
        if future is None:
            return
        with suppress(asyncio.InvalidStateError):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
