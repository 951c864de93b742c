"""The errors that cross from one part of the service to another.

AppError                       safe to show: `detail` is written for the client
  Unauthorized            401
  JobNotFound             404
  BodyTooSlow             408  a part of the request never came
  InvalidInput            422
  JobNotReady             409  no file yet
  JobAlreadyFinished      409  a terminal job cannot be cancelled
  FileDeleted             410  the file was kept for its time, and then deleted
  ServiceUnavailable      503  something that the request needs is away
    AnswerTooLate         503  what it was to do may be done or not
ProviderError                  what a prediction service did, classified once at the adapter's edge
  PredictionNotFound           it does not know the prediction
StorageError                   the disk or the object store failed; always worth another try
LeaseLost                      the job is no longer this worker's: stop and write nothing
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar


class AppError(Exception):
    """An error whose `detail` a client may read."""

    status_code: ClassVar[int] = 500

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Unauthorized(AppError):
    """The caller has not proved to be who it must be."""

    status_code = 401


class InvalidInput(AppError):
    """The client's request cannot be accepted as it is.

    `errors` holds one `(path, message)` per fault; a path is `("body", "parameters", "width")`.
    """

    status_code = 422

    def __init__(
        self, detail: str, errors: Sequence[tuple[tuple[str | int, ...], str]] = ()
    ) -> None:
        super().__init__(detail)
        self.errors = errors


class BodyTooSlow(AppError):
    """The client began a request and did not send the rest of it."""

    status_code = 408

    def __init__(self) -> None:
        super().__init__("The rest of the request's body did not come in time.")


class JobNotFound(AppError):
    """There is no such job, or it has no such file."""

    status_code = 404


class JobNotReady(AppError):
    """The job has not completed, so what was asked for does not exist yet."""

    status_code = 409


class JobAlreadyFinished(AppError):
    """The job is completed, failed or cancelled: nothing can be cancelled any more."""

    status_code = 409


class FileDeleted(AppError):
    """The file was kept for as long as the settings say, and then deleted."""

    status_code = 410


class ServiceUnavailable(AppError):
    """Something the request needs is away for now; the client should come back."""

    status_code = 503


class AnswerTooLate(ServiceUnavailable):
    """Whatever the request waits for takes too long; what it was to do may be done or not."""

    def __init__(self) -> None:
        super().__init__(
            "The answer took too long. A POST may have had its effect all the same:"
            " repeated with the same `Idempotency-Key` it has it once."
        )


class FailureClass(StrEnum):
    """What a failure means for the job; `app.jobs.retry` turns it into a decision."""

    TRANSIENT = "transient"  # worth another try: a retry is counted where the attempt ends by it
    THROTTLED = "throttled"  # refused for its rate: wait as asked, no retry is counted
    UNAVAILABLE = "unavailable"  # nothing was sent: an outage may last, no retry is counted
    AMBIGUOUS = "ambiguous"  # may have been accepted and paid: reconcile before anything else
    PERMANENT = "permanent"  # would fail again: invalid input, moderation, auth, credit
    INTERNAL = "internal"  # our own disk or database, or the attempt goes on: no retry is counted


class ProviderError(Exception):
    """A call to the provider, or a prediction, did not succeed.

    `code` is stable and machine-readable, `message` is written for the client and holds nothing
    secret. `retry_after_seconds` is the provider's own wish, already bounded. `may_pass`: it is
    for good only if it is said several times.
    """

    def __init__(
        self,
        failure_class: FailureClass,
        code: str,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        may_pass: bool = False,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.failure_class = failure_class
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.may_pass = may_pass


class PredictionNotFound(ProviderError):
    """The provider does not know this prediction id (or has forgotten it)."""

    def __init__(self) -> None:
        super().__init__(
            FailureClass.PERMANENT,
            "prediction_not_found",
            "The provider no longer knows the prediction.",
        )


class StorageError(Exception):
    """A write or read in storage failed (no space, no permission, store unreachable)."""


class LeaseLost(Exception):
    """A guarded write changed no row: another worker, or a cancel, owns the job now."""
