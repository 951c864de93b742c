"""What the Replicate double remembers: every prediction accepted, and each one's life."""

import asyncio
import base64
import math
import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from tests.doubles import clock
from tests.doubles.replicate_settings import FATE_FAULTS, Fault, Kind, Settings

TERMINAL = frozenset({"succeeded", "failed", "canceled", "aborted"})
PAGE_SIZE = 100


@dataclass(frozen=True, kw_only=True)
class CreateRequest:
    """A create call that passed every check."""

    model: str
    version: str
    input: dict[str, Any]
    webhook: str | None
    webhook_events_filter: list[str] | None
    headers: dict[str, str]  # the ones that change what happens: prefer, cancel-after
    hold_seconds: float
    cancel_after_seconds: float | None
    called_at: float  # when the call came in: faults may have delayed its effect


@dataclass(kw_only=True)
class Download:
    """One request to an output URL, whatever it was answered."""

    name: str
    authorization: bool  # an Authorization header came along
    host: str


@dataclass(kw_only=True)
class WebhookCall:
    """One copy of a webhook as it was sent; status 0: no answer."""

    event: str
    sent_at: str
    status: int
    seconds: float


@dataclass(kw_only=True)
class LedgerEntry:
    """What the ledger tells about one accepted create."""

    id: str
    model: str
    version: str
    input: dict[str, Any]
    called_at: str
    created_at: str
    status: str  # at the time of asking
    completed_at: str | None
    headers: dict[str, str]
    webhook: str | None
    webhook_events_filter: list[str] | None
    reply_delivered: bool  # the create call was answered with this prediction
    cancel_calls: list[str]  # when, ISO 8601
    downloads: list[Download]
    webhook_calls: list[WebhookCall]


class Prediction:
    """One accepted create. Its whole future is a timeline, read against the clock on demand."""

    def __init__(self, request: CreateRequest, settings: Settings, created_at: float) -> None:
        # 26 characters like the recorded ids.
        self.id = base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()
        self.request = request
        self.created_at = created_at
        self.output_kind = settings.output_kind
        self.fate: Fault | None = None
        self.output_at = math.inf  # output complete this early, whatever the status says
        self.deadline_at: float | None = None
        self.reply_delivered = False
        self.cancel_calls: list[str] = []
        self.downloads: list[Download] = []
        self.webhook_calls: list[WebhookCall] = []
        self._canceled = asyncio.Event()
        done_at = created_at + settings.latency_seconds
        self.timeline = [
            (created_at, "starting"),
            (min(created_at + settings.starting_seconds, done_at), "processing"),
            (done_at, "succeeded"),
        ]

    @property
    def prompt(self) -> str:
        return str(self.request.input.get("prompt", ""))

    def decide(self, fate: Fault) -> None:
        """Replace the ordinary course of events by `fate`."""
        self.fate = fate
        done_at = self.timeline[-1][0]
        if fate.kind == "fail":
            self.timeline[-1] = (done_at, "failed")
        elif fate.kind == "status_sequence":
            self.timeline = [(self.created_at + at, status) for at, status in fate.sequence]
        elif fate.kind == "processing_with_output":
            self.output_at = done_at
            self.timeline[-1] = (done_at + fate.seconds, "succeeded")

    def set_deadline(self, seconds: float) -> None:
        """`Cancel-After`: aborted when still starting by then, canceled when running."""
        self.deadline_at = self.created_at + seconds
        status = self.status_at(self.deadline_at)
        if status not in TERMINAL:
            self._end(self.deadline_at, "aborted" if status == "starting" else "canceled")

    def cancel(self, now: float) -> None:
        """Record a cancel call; a terminal prediction stays as it is."""
        self.cancel_calls.append(iso(now))
        if self.status_at(now) not in TERMINAL:
            self._end(now, "canceled")
            self._canceled.set()

    def _end(self, at: float, status: str) -> None:
        self.timeline = [step for step in self.timeline if step[0] < at] + [(at, status)]

    def status_at(self, now: float) -> str:
        """The status word at `now`, also one that Replicate does not have."""
        return next((status for at, status in reversed(self.timeline) if at <= now), "starting")

    def started_at(self, now: float) -> float | None:
        """When it began to run, None if it had not by `now`."""
        return next((at for at, word in self.timeline if word == "processing" and at <= now), None)

    def completed_at(self, now: float) -> float | None:
        """When it ended, None while it had not."""
        if self.status_at(now) not in TERMINAL:
            return None
        return next(at for at, status in self.timeline if status in TERMINAL)

    def has_output(self, now: float) -> bool:
        status = self.status_at(now)
        return status == "succeeded" or (status == "processing" and self.output_at <= now)

    async def settle(self, hold_seconds: float) -> None:
        """Wait until the output is complete or the prediction terminal, `hold_seconds` at most."""
        until = clock.now() + hold_seconds
        await self._pass(min(until, self._ends_at(), self.output_at))

    async def ended(self) -> None:
        """Wait until the prediction is terminal, for ever if need be."""
        await self._pass(self._ends_at())

    async def _pass(self, at: float) -> None:
        """Return at this time, or as soon as the prediction is canceled."""
        while (left := at - clock.now()) > 0:
            try:
                async with asyncio.timeout(None if left == math.inf else left):
                    await self._canceled.wait()
            except TimeoutError:
                continue  # timers may fire a little early: look at the clock again
            return

    def _ends_at(self) -> float:
        return next((at for at, status in self.timeline if status in TERMINAL), math.inf)

    def entry(self, now: float) -> LedgerEntry:
        return LedgerEntry(
            id=self.id,
            model=self.request.model,
            version=self.request.version,
            input=self.request.input,
            called_at=iso(self.request.called_at),
            created_at=iso(self.created_at),
            status=self.status_at(now),
            completed_at=iso(ended_at) if (ended_at := self.completed_at(now)) else None,
            headers=self.request.headers,
            webhook=self.request.webhook,
            webhook_events_filter=self.request.webhook_events_filter,
            reply_delivered=self.reply_delivered,
            cancel_calls=self.cancel_calls,
            downloads=self.downloads,
            webhook_calls=self.webhook_calls,
        )


@dataclass(frozen=True)
class Page:
    """One page of the list, newest first, with the cursors of its neighbours."""

    predictions: list[Prediction]
    next: str | None
    previous: str | None


class Ledger:
    """Everything the double remembers; one instance per server, used from its event loop only."""

    def __init__(self) -> None:
        self.generation = 0  # how often it was emptied
        self.reset()

    def reset(self) -> None:
        """Forget predictions, counters, faults and settings."""
        self.generation += 1
        self.predictions: list[Prediction] = []  # in order of creation
        self.by_id: dict[str, Prediction] = {}
        self.model_of_version: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.create_calls: list[float] = []
        self.faults_fired: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.configure(Settings())

    def configure(self, settings: Settings) -> None:
        self.settings = settings
        clock.ahead_seconds = settings.clock_ahead_seconds
        self._tokens = float(settings.creates_burst)
        self._tokens_at = clock.now()

    def take_fault(self, on: Kind, kinds: Collection[str], prompt: str) -> Fault | None:
        """The first fault that strikes this request, one of its times used up."""
        fault = next((fault for fault in self.faults if fault.matches(on, kinds, prompt)), None)
        if fault is not None:
            fault.times = None if fault.times is None else fault.times - 1
            self.faults_fired[f"{on} {fault.kind}"] += 1
        return fault

    def throttled_seconds(self) -> float:
        """Token bucket of the creates: 0 takes a token, else how long until there is one."""
        rate = self.settings.creates_per_minute
        if rate is None:
            return 0.0
        now = clock.now()
        refill = (now - self._tokens_at) * rate / 60
        self._tokens = min(self._tokens + refill, float(self.settings.creates_burst))
        self._tokens_at = now
        if self._tokens < 1:
            return (1 - self._tokens) * 60 / rate
        self._tokens -= 1
        return 0.0

    def accept(self, request: CreateRequest) -> Prediction:
        """Create a prediction: the only place where one comes to be, and where it would be billed.

        Creation times differ by a microsecond at least, so that they order the list.
        """
        earliest = self.predictions[-1].created_at + 1e-6 if self.predictions else 0.0
        created_at = round(max(clock.now(), earliest), 6)
        prediction = Prediction(request, self.settings, created_at)
        fate = self.take_fault("create", FATE_FAULTS, prediction.prompt)
        if fate is not None:
            prediction.decide(fate)
        if request.cancel_after_seconds is not None:
            prediction.set_deadline(request.cancel_after_seconds)
        self.predictions.append(prediction)
        self.by_id[prediction.id] = prediction
        return prediction

    def page(self, cursor: str | None, after: float | None, before: float | None) -> Page:
        """One page of the predictions created in [after, before). ValueError: a bad cursor."""
        lag = self.settings.list_lag_seconds
        listed_before = clock.now() - lag if lag else math.inf
        first = 0 if after is None else self._created_before(after)
        last = self._created_before(min(listed_before, before or math.inf))
        start, end = _window(cursor, first, last)
        return Page(
            predictions=self.predictions[start:end][::-1],
            next=_cursor("older", start) if start > first else None,
            previous=_cursor("newer", end) if end < last else None,
        )

    def _created_before(self, at: float) -> int:
        return bisect_left(self.predictions, at, key=lambda prediction: prediction.created_at)

    def snapshot(self) -> dict[str, Any]:
        """The ledger as JSON: `creates` in order of creation, and what was counted."""
        now = clock.now()
        return {
            "creates": [asdict(prediction.entry(now)) for prediction in self.predictions],
            "create_calls": [iso(at) for at in self.create_calls],
            "requests": dict(self.requests),
            "faults_fired": dict(self.faults_fired),
        }


def _window(cursor: str | None, first: int, last: int) -> tuple[int, int]:
    """Indexes [start, end) of the page that `cursor` names among the predictions [first, last)."""
    if cursor is None:
        return max(first, last - PAGE_SIZE), max(first, last)
    direction, _, index = base64.urlsafe_b64decode(cursor).decode().partition(" ")
    edge = min(max(int(index), first), last)
    if direction == "older":
        return max(first, edge - PAGE_SIZE), edge
    return edge, min(last, edge + PAGE_SIZE)


def _cursor(direction: str, index: int) -> str:
    return base64.urlsafe_b64encode(f"{direction} {index}".encode()).decode()


def iso(at: float) -> str:
    """Seconds since the epoch as Replicate writes a time: UTC, microseconds, Z."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
