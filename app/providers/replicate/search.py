"""Searches in the provider's list of predictions: one reading answers all that wait for it.

After a crash hundreds of creates may have to be looked up at once, and each look-up would read the
same pages: that alone would use up the rate of calls that the provider allows.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta

from app import clock
from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction, Sought

# An answer's own date has whole seconds, and may not come from the clock that dates predictions.
MARGIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of the list, newest first; `answered_at` is on the provider's own clock."""

    predictions: Sequence[Prediction]
    answered_at: datetime
    unreadable: int = 0  # entries that are no predictions as we know them


# Reads the whole list.
ReadPages = Callable[[], AsyncGenerator[Page, None]]


class _Search:
    """One create that is looked for; its future gets the matches, oldest first."""

    def __init__(self, sought: Sought, made_within_seconds: float) -> None:
        self.future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self._sought = sought
        self._since = clock.now() - made_within_seconds
        self._matches: list[Prediction] = []
        self._input_deleted = self._is_unsure = False

    def look_at(self, page: Page) -> None:
        """Compare the predictions of one page; end when the rest of the list is older.

        How long ago we asked for a prediction is known by our clock, when it was made by the
        provider's: the two may differ by any amount.
        """
        age = timedelta(seconds=clock.now() - self._since + MARGIN_SECONDS)
        self._is_unsure |= page.unreadable > 0
        for seen in page.predictions:
            if seen.created_at is not None and seen.created_at < page.answered_at - age:
                self.end()
                return
            if seen.data_removed:
                self._input_deleted |= self._sought.is_of_model(seen)
            elif self._sought.may_be(seen):
                self._matches.append(seen)

    def end(self) -> None:
        """All there is has been seen."""
        if self._matches or not (self._input_deleted or self._is_unsure):
            if not self.future.done():
                self.future.set_result(self._matches[::-1])
        elif self._input_deleted:
            self.fail(_unsure(FailureClass.PERMANENT, "input_deleted", "has deleted"))
        else:
            self.fail(_unsure(FailureClass.TRANSIENT, "provider_error", "does not say"))

    def fail(self, error: BaseException) -> None:
        """The list could not be read as far as this search needs it."""
        if not self.future.done():
            self.future.set_exception(error)


class PredictionSearch:
    """Looks for predictions by their input; searches that come together share one reading."""

    def __init__(self, read_pages: ReadPages) -> None:
        self._read_pages = read_pages
        self._waiting: list[_Search] = []
        self._reader: asyncio.Task[None] | None = None

    async def find(self, sought: Sought, made_within_seconds: float) -> list[Prediction]:
        """See `Provider.find`. The list is read after the call began, never earlier: whoever
        comes while it is being read waits for the next reading.
        """
        search = _Search(sought, made_within_seconds)
        self._waiting.append(search)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_for_all())
        return await search.future

    async def aclose(self) -> None:
        """Stop reading; whoever waits is not answered any more."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _read_for_all(self) -> None:
        while self._waiting:
            searches, self._waiting = self._waiting, []
            try:
                await self._read(searches)
            except Exception as error:
                for search in searches:
                    search.fail(error)

    async def _read(self, searches: list[_Search]) -> None:
        async with aclosing(self._read_pages()) as pages:
            async for page in pages:
                searches = [search for search in searches if not search.future.done()]
                for search in searches:
                    search.look_at(page)
                if all(search.future.done() for search in searches):
                    return
        for search in searches:
            search.end()


def _unsure(failure_class: FailureClass, code: str, what: str) -> ProviderError:
    return ProviderError(
        failure_class, code, f"The provider {what} by which input a prediction could be recognised."
    )
