"""The state machine's provider: a ledger in memory, with calls that are under way for a while."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from app.providers.base import TERMINAL_STATES, Prediction

NOT_BILLED = frozenset({"failed", "canceled", "aborted"})


@dataclass(eq=False)
class Created:
    """One accepted create, and how it stands."""

    id: str
    input: dict[str, Any]
    job_id: UUID
    attempt_id: UUID
    status: str = "starting"

    @property
    def is_terminal(self) -> bool:
        """True when it will never change again."""
        return self.status in TERMINAL_STATES

    def end(self, status: str) -> None:
        """Finish, unless it is over already."""
        self.status = self.status if self.is_terminal else status

    def seen(self) -> Prediction:
        """Return it as the provider would answer now."""
        return Prediction(self.id, self.status, "a/b", self.input, output=["https://x/o.png"])


@dataclass(eq=False)
class Call:
    """One create call from the moment it is sent; `answer` is what comes back, if anything."""

    job_id: UUID
    attempt_id: UUID
    input: dict[str, Any]
    answer: "Created | str | None" = None  # a prediction, a refusal's word, or not known yet
    is_over: bool = False


@dataclass
class Ledger:
    """What was accepted, oldest first."""

    creates: list[Created] = field(default_factory=list)

    def accept(self, call: Call) -> Created:
        """Create a prediction: the only place where money is spent."""
        created = Created(f"p{len(self.creates)}", call.input, call.job_id, call.attempt_id)
        self.creates.append(created)
        return created

    def find(self, wanted: dict[str, Any]) -> Sequence[Created]:
        """Return the predictions with this exact input, oldest first."""
        return [created for created in self.creates if created.input == wanted]

    def by_id(self, prediction_id: str) -> Created:
        """Return one prediction; it must exist."""
        return next(created for created in self.creates if created.id == prediction_id)

    def paid_for(self, job_ids: Collection[UUID]) -> int:
        """Count these jobs' creates that the provider has not reported as without a result."""
        ours = [created for created in self.creates if created.job_id in job_ids]
        return sum(created.status not in NOT_BILLED for created in ours)
