"""One poller per process: wakes each waiting job when its prediction has ended."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import Prediction, Provider

LONGEST_PAUSE_SECONDS = 30.0
# From the deadline of a prediction to giving it up, whatever the provider says.
CANCEL_GRACE_SECONDS = 30.0
# A call that hangs must not hold up whoever waits for another prediction.
CANCELS_AT_ONCE = 8
# The provider may say once that it does not know what it has just made, or a proxy before it may.
MISSING_SECONDS = 30.0
MISSING_READS = 3  # after one nothing may have been read for as long

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Watch:
    """One waited-for prediction; times on the process's monotonic clock.

    More than one run may wait for it: a job that was freed and claimed again in this process has
    a second one before the first is stopped.
    """

    futures: set[asyncio.Future[Prediction]] = field(default_factory=set)
    since: float = field(default_factory=time.monotonic)
    running_since: float | None = None
    overdue_since: float | None = None
    missing_since: float | None = None
    misses: int = 0  # since then
    cancelling: asyncio.Task[None] | None = None  # stays once the cancel was heard


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
        self._cancels = asyncio.Semaphore(CANCELS_AT_ONCE)

    async def wait(self, prediction_id: str) -> Prediction:
        """Return the prediction when it is terminal.

        Raises: PredictionNotFound when the provider has not known it for `MISSING_SECONDS`;
        ProviderError(PERMANENT) when it is overdue and cannot be ended.
        """
        watch = self._watches.setdefault(prediction_id, _Watch())
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        watch.futures.add(future)
        try:
            return await future
        finally:
            watch.futures.discard(future)
            if not watch.futures:
                self._watches.pop(prediction_id, None)

    def nudge(self, prediction_id: str) -> None:
        """Look now rather than at the next interval, if this prediction is waited for."""
        if prediction_id in self._watches:
            self._nudge.set()

    async def run(self) -> None:
        """Poll for ever; cancel the task to end it."""
        async with asyncio.TaskGroup() as tasks:
            await self._poll(tasks)

    async def _poll(self, tasks: asyncio.TaskGroup) -> None:
        pause = self._interval_seconds
        while True:
            await self._pause(pause)
            try:
                await self._look(tasks)
                pause = self._interval_seconds
            except ProviderError as error:
                pause = min(max(error.retry_after_seconds or 0, 2 * pause), LONGEST_PAUSE_SECONDS)
                log.warning("poll_failed", code=error.code, pause_seconds=pause)
            except Exception:
                # Without it nobody would hear of any prediction again.
                pause = LONGEST_PAUSE_SECONDS
                log.exception("poll_failed", pause_seconds=pause)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nudge.wait()
        self._nudge.clear()

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        if not self._watches:
            return
        async for prediction_id, seen in self._provider.poll(list(self._watches)):
            watch = self._watches.get(prediction_id)
            if watch is None:
                continue
            if seen is None:
                self._miss(prediction_id, watch)
            else:
                watch.missing_since, watch.misses = None, 0
                self._judge(seen, watch, tasks)

    def _miss(self, prediction_id: str, watch: _Watch) -> None:
        now = time.monotonic()
        watch.misses += 1
        if watch.missing_since is None:
            watch.missing_since = now
            log.warning("prediction_missing", prediction_id=prediction_id)
        elif now - watch.missing_since > MISSING_SECONDS and watch.misses >= MISSING_READS:
            self._wake(prediction_id, PredictionNotFound())

    def _judge(self, prediction: Prediction, watch: _Watch, tasks: asyncio.TaskGroup) -> None:
        if prediction.is_terminal:
            self._wake(prediction.id, prediction)
            return
        now = time.monotonic()
        if prediction.status == "processing" and watch.running_since is None:
            watch.running_since = now
        if watch.overdue_since is not None or self._is_overdue(watch, now):
            self._end(prediction, watch, now, tasks)

    def _end(
        self, prediction: Prediction, watch: _Watch, now: float, tasks: asyncio.TaskGroup
    ) -> None:
        """Cancel an overdue prediction, again until it was heard; then give it up."""
        if watch.overdue_since is None:
            watch.overdue_since = now
            log.warning("prediction_overdue", prediction_id=prediction.id, status=prediction.status)
        if now - watch.overdue_since > CANCEL_GRACE_SECONDS:
            self._wake(prediction.id, _overdue())
        elif watch.cancelling is None:
            watch.cancelling = tasks.create_task(self._cancel(prediction.id, watch))

    async def _cancel(self, prediction_id: str, watch: _Watch) -> None:
        """Never raises: others are being cancelled beside it."""
        try:
            async with self._cancels:
                if watch.futures:  # somebody waits for it still
                    await self._provider.cancel(prediction_id)
        except Exception as error:
            watch.cancelling = None
            log.warning(
                "prediction_not_cancelled",
                prediction_id=prediction_id,
                code=error.code if isinstance(error, ProviderError) else type(error).__name__,
            )

    def _is_overdue(self, watch: _Watch, now: float) -> bool:
        if watch.running_since is None:
            return now - watch.since > self._starting_seconds
        return now - watch.running_since > self._running_seconds

    def _wake(self, prediction_id: str, result: Prediction | Exception) -> None:
        watch = self._watches.get(prediction_id)
        for future in watch.futures if watch else ():
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _overdue() -> ProviderError:
    return ProviderError(
        FailureClass.PERMANENT,
        "prediction_deadline_exceeded",
        "The prediction neither ended in time nor could be canceled.",
    )
