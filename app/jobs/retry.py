"""From a failure to a decision: pure functions, no clock and no database."""

from dataclasses import dataclass

from app.errors import FailureClass, ProviderError

JITTER_SHARE = 0.1
# Our own disk or database: soon, and as often as the job's deadline allows.
INTERNAL_DELAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently; seconds."""

    max_retries: int
    backoff_factor: float
    backoff_max_seconds: float
    grace_seconds: float  # until the provider's list must show a create


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after the delay; the two counts say what it costs."""

    delay_seconds: float
    retries: int = 0
    throttles: int = 0


def decide(
    error: ProviderError,
    *,
    retry_count: int,
    throttle_count: int,
    policy: RetryPolicy,
    jitter: float,
) -> Retry | None:
    """Decide what follows from a failure; None: give up.

    `retry_count` and `throttle_count` are the job's counts so far, `jitter` is a random number
    in [0, 1). AMBIGUOUS waits like a retry, and long enough for the provider's list to show what
    was created, but does not count as one: only when the prediction turns out not to exist.
    """
    match error.failure_class:
        case FailureClass.PERMANENT:
            return None
        case FailureClass.TRANSIENT if retry_count >= policy.max_retries:
            return None
        case FailureClass.TRANSIENT:
            return Retry(backoff_seconds(retry_count + 1, policy, jitter), retries=1)
        case FailureClass.THROTTLED:
            asked = error.retry_after_seconds or backoff_seconds(throttle_count + 1, policy, 0)
            return Retry(_jittered(asked, jitter), throttles=1)
        case FailureClass.UNAVAILABLE:
            return Retry(backoff_seconds(throttle_count + 1, policy, jitter), throttles=1)
        case FailureClass.AMBIGUOUS:
            backoff = backoff_seconds(retry_count + 1, policy, jitter)
            return Retry(max(backoff, policy.grace_seconds))
        case FailureClass.INTERNAL:
            return Retry(_jittered(INTERNAL_DELAY_SECONDS, jitter))


def backoff_seconds(retry: int, policy: RetryPolicy, jitter: float) -> float:
    """Return the wait before retry number `retry` (1, 2, ...): factor ** n, capped, plus jitter."""
    # A large exponent would overflow a float long before it means anything.
    exponential = policy.backoff_factor ** min(retry, 64)
    return _jittered(min(exponential, policy.backoff_max_seconds), jitter)


def _jittered(seconds: float, jitter: float) -> float:
    """Add up to a tenth, never less: nobody comes back before the time that was promised."""
    return seconds * (1 + JITTER_SHARE * jitter)
