"""What the service asks of a prediction service, in words that any of them can answer."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from app.errors import FailureClass, ProviderError

# How Replicate writes a version that has a name; else it says `hidden`, `d-...` or the like.
VERSION = re.compile(r"[0-9a-f]{64}")

TERMINAL_STATES = frozenset({"succeeded", "failed", "canceled", "aborted"})

# Asked at the last moment before a create call is sent.
MaySend = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class PredictionRequest:
    """One create call. `cancel_after_seconds` is the provider's own deadline for the run.

    `webhook` is the address to which the provider reports, if any.
    """

    model_name: str
    input: dict[str, Any]
    cancel_after_seconds: int
    webhook: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One run at the provider, as last seen; `status` may be a word we do not know (yet)."""

    id: str
    status: str
    model_name: str
    input: dict[str, Any]
    output: Any = None
    error: str | None = None
    version: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    predict_time_seconds: float | None = None
    data_removed: bool = False

    @property
    def is_terminal(self) -> bool:
        """True when the provider will never change it again."""
        return self.status in TERMINAL_STATES


def split_model(model_name: str) -> tuple[str, str, str]:
    """Split `owner/name` or `owner/name:version` into owner, name and version (maybe empty)."""
    model, _, version = model_name.partition(":")
    owner, _, name = model.partition("/")
    return owner, name, version


@dataclass(frozen=True, slots=True)
class Sought:
    """What a create whose answer was lost has asked for: its prediction is looked for.

    With `has_own_seed` the input's seed was drawn at random for this create: with the prompt it
    identifies the prediction.
    """

    model_name: str
    input: dict[str, Any]
    has_own_seed: bool = False

    def may_be(self, seen: Prediction) -> bool:
        """Tell whether the prediction's input can be the one that was sent.

        A prompt with a seed of its own is enough: nothing then depends on how a provider shows
        the rest. Otherwise all must be as it was sent, but for files: one that was sent as a data
        URL may be shown under an address.
        """
        shown, sent = seen.input, self.input
        if self.has_own_seed:
            return all(shown.get(name) == sent.get(name) for name in ("prompt", "seed"))
        return shown.keys() == sent.keys() and all(
            shown[name] == value or _is_file(value) for name, value in sent.items()
        )

    def is_surely(self, seen: Prediction) -> bool:
        """Tell of one that may be it whether it is: made of this very input by this model."""
        return self.has_own_seed or (seen.input == self.input and self.is_of_model(seen))

    def is_of_model(self, seen: Prediction) -> bool:
        """Tell whether it is a prediction of the model, and version, that was asked for.

        Replicate has been recorded answering under another model's name than the one called:
        where the input cannot be anybody else's, the name does not matter. Nor does a version's,
        unless both are names of versions.
        """
        if self.has_own_seed:
            return True
        owner, name, version = split_model(self.model_name)
        known = VERSION.fullmatch(version) and VERSION.fullmatch(seen.version or "")
        return seen.model_name == f"{owner}/{name}" and (not known or version == seen.version)


def _is_file(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, str) and one.startswith("data:") for one in values)


def called_off() -> ProviderError:
    """Return the error of a create that `may_send` has stopped: nothing was sent."""
    return ProviderError(
        FailureClass.INTERNAL, "create_called_off", "The create call was not sent."
    )


class Provider(Protocol):
    """A prediction service. Every method may raise `ProviderError`, classified by the adapter.

    No method repeats a call by itself: a repeated create is a second bill.
    """

    name: str
    call_seconds: float
    """How long one call may be under way at the most, from sending to giving it up."""

    async def admit(self) -> None:
        """Return when a create may be made: within the provider's rate, and while it answers.

        Asked before the intent is committed, so that waiting (for minutes, if need be) is free.
        """
        ...

    async def create(
        self, request: PredictionRequest, may_send: MaySend | None = None
    ) -> Prediction:
        """Start one prediction; may return it finished.

        Raises: ProviderError - AMBIGUOUS whenever the provider may have accepted the call;
        UNAVAILABLE, THROTTLED and PERMANENT only when it certainly has not; INTERNAL when
        `may_send`, asked once all that takes time is done (connecting, say), called it off.
        """
        ...

    async def get(self, prediction_id: str) -> Prediction:
        """Read one prediction.

        Raises: PredictionNotFound; ProviderError(TRANSIENT | THROTTLED | PERMANENT).
        """
        ...

    def poll(self, prediction_ids: Collection[str]) -> AsyncIterator[tuple[str, Prediction | None]]:
        """Read many predictions with few calls: yield each as soon as it is read, by its id.

        None stands for one that the provider does not know (any more). Ids that could not be read
        now are left out.

        Raises: ProviderError(TRANSIENT | THROTTLED | PERMANENT).
        """
        ...

    async def find(self, sought: Sought, made_within_seconds: float) -> list[Prediction]:
        """Return the predictions that may be it, made in the last seconds, oldest first.

        An empty list means that the provider has none.
        Raises: ProviderError when the provider cannot say.
        """
        ...

    async def cancel(self, prediction_id: str) -> Prediction | None:
        """Ask the provider to stop a prediction; return it as it is then.

        One that has ended already is no error, nor one that the provider does not know: None.
        Raises: ProviderError(TRANSIENT | THROTTLED | PERMANENT).
        """
        ...

    async def input_schema(self, model_name: str) -> dict[str, Any] | None:
        """Return the model's input as a self-contained JSON Schema, or None when it has none.

        Raises: ProviderError when it cannot be fetched now.
        """
        ...

    async def webhook_secret(self) -> str:
        """Return the secret with which the provider signs its reports.

        Raises: ProviderError when it cannot be fetched, or the provider has none.
        """
        ...

    def download(self, url: str) -> AsyncIterator[bytes]:
        """Stream one output file in chunks, as the provider serves it.

        Raises (while iterating): ProviderError - PERMANENT `output_expired` when it is gone.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...
