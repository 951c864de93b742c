"""What the Replicate double can be told: its settings, and the faults to inject."""

import base64
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["create", "get", "list", "cancel", "models", "account", "secret", "download"]
OutputKind = Literal["list", "string", "none", "empty", "object", "data_url", "html"]

EXCHANGE_FAULTS = frozenset(
    {"status", "drop", "delay", "accept_then_drop", "accept_then_delay", "accept_then_status"}
)
FATE_FAULTS = frozenset({"fail", "status_sequence", "processing_with_output", "output"})
# Where a service under test claims to be reachable: webhooks must go to https.
WEBHOOK_ORIGIN = "https://media.test"

FILE_FAULTS = frozenset(
    {"truncate", "cut", "html", "empty", "slow", "wrong_content_type", "bytes", "flood"}
)


class Settings(BaseModel):
    """How the double behaves when no fault says otherwise; a change applies to later requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: frozenset[str] = frozenset({"r8_test"})
    starting_seconds: float = 0.05
    latency_seconds: float = 0.2  # from create to succeeded, boot included
    bare_starting_bodies: bool = True  # as recorded: no `output`, no `data_removed` yet
    minimum_cancel_after_seconds: float = 5
    file_lifetime_seconds: float = 3600  # output URLs answer 404 this long after completion
    retention_seconds: float = 3600  # then input, output and logs leave the prediction
    clock_ahead_seconds: float = 0  # of everybody else's; set it before the first create
    list_lag_seconds: float = 0  # age at which a prediction appears in the list
    all_official: bool = True
    official_models: frozenset[str] = frozenset()  # counts only while all_official is off
    unknown_models: frozenset[str] = frozenset()
    schemas: bool = True  # off: models publish no schema and inputs are not checked
    output_kind: OutputKind = "list"
    files_origin: str | None = None  # None: the origin the request was sent to
    creates_per_minute: float | None = None  # None: unlimited
    creates_burst: int = 1
    webhook_secret: str = "whsec_" + base64.b64encode(b"replicate-test-double-01").decode()
    # As they are at a prediction's creation:
    webhook_rewrite: str | None = None  # the origin that https://media.test is; None: no webhooks
    webhook_delay_seconds: float = 0  # from the event to its webhook
    webhook_copies: int = 1  # of each webhook, sent at once
    webhook_before_reply: bool = False  # a create is answered after its `start` webhook
    webhook_reversed: bool = False  # `start` is sent after `completed`

    def is_official(self, model: str) -> bool:
        return self.all_official or model in self.official_models


@dataclass(kw_only=True)
class Fault:
    """One thing to do wrong. Faults are tried in the order pushed; a match uses up one of `times`.

    Kinds for `on` anything: `status`, `drop` and `delay` act before the request has an effect,
    `accept_then_drop`, `accept_then_delay` and `accept_then_status` after it. Kinds that decide a
    prediction's fate (`on="create"`): `fail`, `status_sequence`, `processing_with_output`,
    `output`. Kinds that spoil a file (`on="download"`): `truncate`, `cut`, `html`, `empty`,
    `slow`, `wrong_content_type`, `bytes`, `flood`. One fault of the first group and one of the
    others can strike the same request.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    on: Literal["create", "get", "list", "cancel", "download", "models"]
    kind: str
    times: int | None = 1  # None: always
    probability: float = 1.0
    seed: int = 0  # of the draws that `probability` takes
    prompt_contains: str | None = None  # only for predictions with this text in their prompt

    status: int = 500  # status, accept_then_status
    headers: dict[str, str] = field(default_factory=dict)  # of any reply the fault makes up
    body: Any = None  # text is sent as it is, other JSON encoded, None = a problem document
    content_type: str | None = None
    body_base64: str = ""  # bytes
    seconds: float = 1.0  # delay, accept_then_delay; processing_with_output: time left to run
    reset: bool = True  # drops: RST, else FIN
    error: str = "Prediction failed for an unknown reason (E1000)."  # fail
    sequence: list[tuple[float, str]] = field(default_factory=list)  # [seconds, status] pairs
    output: Any = None  # output: sent as it is
    bytes_per_second: int = 100  # slow
    size_bytes: int | None = None  # flood: None = endless

    def __post_init__(self) -> None:
        allowed = EXCHANGE_FAULTS
        if self.on == "create":
            allowed = allowed | FATE_FAULTS
        if self.on == "download":
            allowed = allowed | FILE_FAULTS
        if self.kind not in allowed:
            raise ValueError(f"{self.kind!r} is no fault of {self.on}: {sorted(allowed)}")
        self._random = random.Random(self.seed)

    def matches(self, on: Kind, kinds: Collection[str], prompt: str) -> bool:
        """Whether this fault strikes now. Draws a random number only when all else fits."""
        fits = self.on == on and self.kind in kinds and self.times != 0
        if not fits or (self.prompt_contains or "") not in prompt:
            return False
        return self._random.random() < self.probability
