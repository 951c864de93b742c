"""One poller per process: wakes each waiting job when its prediction has ended."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import Prediction, Provider

LONGEST_PAUSE_SECONDS = 30.0
# From our cancel of an overdue prediction to giving it up, whatever the provider says.
CANCEL_GRACE_SECONDS = 30.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Watch:
    """One waited-for prediction; times on the process's monotonic clock."""

    future: asyncio.Future[Prediction]
    since: float = field(default_factory=time.monotonic)
    running_since: float | None = None
    cancelled_at: float | None = None


class PredictionWatcher:
    """Watches any number of predictions with few calls; holds no database connection.

    A provider that does not answer only makes it slower. A prediction that stays longer in
    `starting` (or in a state we do not know) or in `processing` than allowed is cancelled; if
    that does not end it, the wait for it ends.
    """

    def __init__(
        self,
        provider: Provider,
        *,
        interval_seconds: float,
        starting_seconds: float,
        running_seconds: float,
    ) -> None:
        self._provider = provider
        self._interval_seconds = interval_seconds
        self._starting_seconds = starting_seconds
        self._running_seconds = running_seconds
        self._watches: dict[str, _Watch] = {}
        self._nudge = asyncio.Event()

    async def wait(self, prediction_id: str) -> Prediction:
        """Return the prediction when it is terminal.

        Raises: PredictionNotFound when the provider no longer knows it;
        ProviderError(PERMANENT) when it is overdue and cannot be ended.
        """
        watch = _Watch(asyncio.get_running_loop().create_future())
        self._watches[prediction_id] = watch
        try:
            return await watch.future
        finally:
            self._watches.pop(prediction_id, None)

    def nudge(self, prediction_id: str) -> None:
        """Look now rather than at the next interval, if this prediction is waited for."""
        if prediction_id in self._watches:
            self._nudge.set()

    async def run(self) -> None:
        """Poll for ever; cancel the task to end it."""
        pause = self._interval_seconds
        while True:
            await self._pause(pause)
            try:
                await self._look()
                pause = self._interval_seconds
            except ProviderError as error:
                pause = min(max(error.retry_after_seconds or 0, 2 * pause), LONGEST_PAUSE_SECONDS)
                log.warning("poll_failed", code=error.code, pause_seconds=pause)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._nudge.wait(), seconds)
        self._nudge.clear()

    async def _look(self) -> None:
        if not self._watches:
            return
        try:
            seen = await self._provider.poll(list(self._watches))
        except PredictionNotFound:
            await self._look_one_by_one()
            return
        for prediction in seen.values():
            await self._judge(prediction)

    async def _look_one_by_one(self) -> None:
        """Find out which prediction the provider does not know."""
        for prediction_id in list(self._watches):
            try:
                await self._judge(await self._provider.get(prediction_id))
            except PredictionNotFound as error:
                self._wake(prediction_id, error)

    async def _judge(self, prediction: Prediction) -> None:
        watch = self._watches.get(prediction.id)
        if watch is None:
            return
        if prediction.is_terminal:
            self._wake(prediction.id, prediction)
            return
        now = time.monotonic()
        if prediction.status == "processing" and watch.running_since is None:
            watch.running_since = now
        if watch.cancelled_at is not None and now - watch.cancelled_at > CANCEL_GRACE_SECONDS:
            self._wake(prediction.id, _overdue())
        elif watch.cancelled_at is None and self._is_overdue(watch, now):
            log.warning("prediction_overdue", status=prediction.status)
            watch.cancelled_at = now
            await self._provider.cancel(prediction.id)

    def _is_overdue(self, watch: _Watch, now: float) -> bool:
        if watch.running_since is None:
            return now - watch.since > self._starting_seconds
        return now - watch.running_since > self._running_seconds

    def _wake(self, prediction_id: str, result: Prediction | Exception) -> None:
        watch = self._watches.get(prediction_id)
        if watch is None:
            return
        with suppress(asyncio.InvalidStateError):
            if isinstance(result, Exception):
                watch.future.set_exception(result)
            else:
                watch.future.set_result(result)


def _overdue() -> ProviderError:
    return ProviderError(
        FailureClass.PERMANENT,
        "prediction_deadline_exceeded",
        "The prediction neither ended in time nor could be canceled.",
    )
