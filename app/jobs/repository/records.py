"""What goes into the repository and comes out of it, beside the rows themselves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

from app.jobs.models import Attempt, Job, Output


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client may say about a job."""

    prompt: str
    model_name: str
    parameters: Mapping[str, Any]
    request_id: str | None = None

    @property
    def fingerprint(self) -> str:
        """Return what tells this request from any other: a SHA-256 of what it asks for."""
        asked = [self.prompt, self.model_name, self.parameters]
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Outputs(list[Output]):
    """The outputs of one job in order, and since when their files are deleted, if they are."""

    deleted_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change one job, until another claim replaces the token."""

    job_id: UUID
    token: UUID


@dataclass(slots=True)
class Claim:
    """A claimed job with its open attempt: one that an earlier owner left, or our own by now."""

    job: Job
    lease: Lease
    attempt: Attempt | None
    attempt_age_seconds: float


@dataclass(frozen=True, slots=True)
class Orphan:
    """An open attempt of a job that has ended, and how long ago its intent was committed.

    `given_seed` is the client's, or None.
    """

    attempt: Attempt
    age_seconds: float
    given_seed: str | None


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The queue, what is paid for and not stored, and the workers, as of now; ages in seconds."""

    jobs_by_status: dict[str, int]
    oldest_pending_age_seconds: float
    unstored: int
    oldest_unstored_age_seconds: float
    workers: int
    worker_slots: int
