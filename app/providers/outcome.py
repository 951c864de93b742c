"""What an ended prediction means for the job: what it made, or why it made nothing."""

import re
from collections.abc import Iterator
from typing import Any

from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction

# Codes in a failed prediction's error text that name a fault of the platform, not of the input:
# E1000 unknown, E6716 timeout starting (replicate.com/docs/reference/error-codes).
PLATFORM_FAULT = re.compile(r"\bE(1000|6716)\b")
MODERATION = re.compile(r"nsfw|flagged|sensitive|content policy|\bE005\b", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"\bE1001\b|out of memory", re.IGNORECASE)

# The whole of a text, not its beginning: people and models write of addresses.
# No two parts of it match the same characters: of a long text each is looked at once.
ADDRESS = re.compile(
    r"https?://[^\s/?#]+(?:[/?#]\S*)?|mock:\S+|data:(?:[^\s,]*|[^,]*;base64),.*", re.DOTALL
)

MESSAGE_CHARS = 500
# More values than this beside files make sense only together: each word's place in a film, say.
MOST_SINGLE_VALUES = 10


def raise_for_outcome(prediction: Prediction) -> None:
    """Return only if the terminal prediction succeeded and its output is still there.

    Raises: ProviderError - TRANSIENT where a new, separately paid prediction is worth it.
    """
    if prediction.status == "succeeded":
        if prediction.output is None and prediction.data_removed:
            raise ProviderError(
                FailureClass.PERMANENT,
                "output_expired",
                "The provider deleted the output before it could be stored.",
            )
        return
    raise _failure(prediction)


def _failure(prediction: Prediction) -> ProviderError:
    said = (prediction.error or "no reason given")[:MESSAGE_CHARS]
    if prediction.status == "aborted":
        return ProviderError(
            FailureClass.TRANSIENT,
            "prediction_aborted",
            "The provider did not start the prediction in time.",
        )
    if prediction.status == "canceled":
        return ProviderError(
            FailureClass.PERMANENT,
            "prediction_canceled",
            "The prediction was canceled at the provider, or ran into its deadline.",
        )
    if MODERATION.search(said):
        return ProviderError(FailureClass.PERMANENT, "content_policy", said)
    if OUT_OF_MEMORY.search(said):
        return ProviderError(FailureClass.PERMANENT, "out_of_memory", said)
    if PLATFORM_FAULT.search(said):
        return ProviderError(FailureClass.TRANSIENT, "prediction_failed", said)
    return ProviderError(FailureClass.PERMANENT, "prediction_failed", said)


def output_values(output: Any) -> list[Any]:
    """Return what a prediction's output is made of, in order: each becomes one file.

    An output may be nothing, one value, or lists and objects of them at any depth. With addresses
    of files in it every value stands for itself, be it an address or not; an empty text says
    nothing, and where there are many other values the whole output is one document beside the
    files. Without any a list of texts is one text, and everything else one document that makes
    sense only as a whole: an embedding, say, or a caption with its score.
    """
    leaves = list(_leaves(output))
    addresses = sum(map(is_address, leaves))
    is_text = isinstance(output, list) and all(isinstance(item, str | None) for item in output)
    if is_text and leaves:
        # A language model gives its text in pieces, and an address may be one of them.
        are_files = is_address(leaves[0]) or 2 * addresses >= len(leaves)
        return _beside_files(output, leaves) if are_files else ["".join(leaves)]
    return _beside_files(output, leaves) if addresses or not leaves else [output]


def _beside_files(output: Any, leaves: list[Any]) -> list[Any]:
    values = [leaf for leaf in leaves if leaf != ""]
    files = list(filter(is_address, values))
    are_many = len(values) - len(files) > MOST_SINGLE_VALUES
    return [*files, output] if are_many else values


def is_address(value: Any) -> bool:
    """Tell whether this is where a file can be fetched, or the file itself as a data URL."""
    return isinstance(value, str) and ADDRESS.fullmatch(value) is not None


def _leaves(output: Any) -> Iterator[Any]:
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list):
        for item in output:
            yield from _leaves(item)
    elif output is not None:
        yield output
