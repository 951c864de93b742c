"""Every failure of a call to Replicate, classified: what it proves, and what follows from it."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from replicate import APIConnectionError, APIError, APIStatusError

from app.errors import FailureClass, ProviderError
from app.providers.base import called_off
from app.providers.governor import LONGEST_PAUSE_SECONDS
from app.providers.outcome import MESSAGE_CHARS
from app.providers.replicate.answers import as_utc, own_date, storable

RETRY_AFTER_BOUNDS_SECONDS = (1.0, LONGEST_PAUSE_SECONDS)

ACCOUNT_REFUSALS = {
    401: ("provider_auth", "The provider refused this service's credentials."),
    402: ("insufficient_credit", "The provider's account has no credit."),
    403: ("provider_auth", "The provider refused this service's credentials."),
}

# The only failures that prove that a request was never sent.
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class CalledOff(Exception):
    """`may_send` said no, or could not say."""


@contextmanager
def classified(*, creating: bool) -> Iterator[None]:
    """Raise ProviderError for whatever a call raises.

    What proves nothing is AMBIGUOUS when `creating`, else TRANSIENT.
    """
    unsure = FailureClass.AMBIGUOUS if creating else FailureClass.TRANSIENT
    try:
        yield
    except APIError as error:
        raise _classify(error, creating=creating) from error
    except TimeoutError as error:
        raise ProviderError(
            unsure, "provider_no_answer", "The provider did not answer in time."
        ) from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL),
        RecursionError,  # JSON nested a thousand levels deep
    ) as error:
        raise ProviderError(
            unsure, "provider_error", "The provider's answer made no sense."
        ) from error


def _classify(error: APIError, *, creating: bool) -> ProviderError:
    unsure = FailureClass.AMBIGUOUS if creating else FailureClass.TRANSIENT
    if isinstance(error, APIStatusError):
        refusal = _refusal(error, creating=creating)
        return refusal or ProviderError(
            unsure, "provider_error", f"The provider answered with status {error.status_code}."
        )
    if isinstance(error.__cause__, CalledOff):
        return called_off()
    if isinstance(error, APIConnectionError) and isinstance(error.__cause__, NOT_SENT):
        return ProviderError(
            FailureClass.UNAVAILABLE if creating else FailureClass.TRANSIENT,
            "provider_unreachable",
            "The provider could not be reached.",
        )
    return ProviderError(unsure, "provider_no_answer", "The provider did not answer.")


def _refusal(error: APIStatusError, *, creating: bool) -> ProviderError | None:
    """Return what a clear "no" means; None for an answer that may mean anything."""
    status = error.status_code
    if status == 429:
        return ProviderError(
            FailureClass.THROTTLED,
            "provider_throttled",
            "The provider asked to slow down.",
            retry_after_seconds=_retry_after(error),
        )
    if status in ACCOUNT_REFUSALS:
        # On a read this is no reason to give up a prediction that is already paid.
        lasting = FailureClass.PERMANENT if creating else FailureClass.TRANSIENT
        return ProviderError(lasting, *ACCOUNT_REFUSALS[status])
    if not creating or not 400 <= status < 500 or status in (408, 409, 425):
        return None
    if status == 404:
        return ProviderError(
            FailureClass.PERMANENT, "model_not_found", "The provider does not know this model."
        )
    return ProviderError(FailureClass.PERMANENT, "invalid_input", _detail(error))


def _detail(error: APIStatusError) -> str:
    body = error.body
    detail = body.get("detail") if isinstance(body, dict) else None
    if isinstance(detail, str) and detail:
        return f"The provider refused the input: {storable(detail)}"[:MESSAGE_CHARS]
    return "The provider refused the input."


def _retry_after(error: APIStatusError) -> float | None:
    """Return the longest wait that the 429 asks for, in seconds, within bounds; None if none.

    It may stand in the header (seconds or a date), in the body, or in its text only.
    """
    body = error.body if isinstance(error.body, dict) else {}
    text = re.search(r"resets in ~?(\d+(?:\.\d+)?)s", str(body.get("detail")))
    said = [error.response.headers.get("retry-after", ""), str(body.get("retry_after"))]
    said.append(text[1] if text else "")
    answered_at = own_date(error.response) or datetime.now(UTC)
    asked = [seconds for value in said if (seconds := _seconds(value, answered_at)) is not None]
    low, high = RETRY_AFTER_BOUNDS_SECONDS
    return min(max(low, *asked), high) if asked else None


def _seconds(value: str, answered_at: datetime) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return None if math.isnan(seconds) else seconds
    try:
        return (as_utc(parsedate_to_datetime(value)) - answered_at).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
