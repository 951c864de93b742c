"""Searches in the provider's list of predictions: one reading answers all that wait for it.

After a crash hundreds of creates may have to be looked up at once, and each look-up would read the
same pages: that alone would use up the rate of calls that the provider allows.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime

from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction, PredictionRequest, of_model

# Yields the predictions made since then in pages, newest first.
ReadPages = Callable[[datetime], AsyncIterator[list[Prediction]]]


class _Search:
    """One request that is looked for, and what the reading has shown of it so far."""

    def __init__(self, request: PredictionRequest, created_after: datetime) -> None:
        self.created_after = created_after
        self.error: ProviderError | None = None
        self._request = request
        self._matches: list[Prediction] = []
        self._input_deleted = False

    def look_at(self, seen: Prediction) -> None:
        """Compare one prediction of the list."""
        if seen.data_removed:
            self._input_deleted |= self._may_be(seen)
        elif seen.input == self._request.input and self._may_be(seen):
            self._matches.append(seen)

    def _may_be(self, seen: Prediction) -> bool:
        if seen.created_at is not None and seen.created_at < self.created_after:
            return False
        # Replicate has been recorded answering under another model's name than the one called:
        # where the input cannot be anybody else's, the name does not matter.
        return self._request.has_own_seed or of_model(seen, self._request.model_name)

    def found(self) -> list[Prediction]:
        """Return the matches, oldest first; raise what keeps the list from being a proof."""
        if self.error is not None:
            raise self.error
        if not self._matches and self._input_deleted:
            raise ProviderError(
                FailureClass.PERMANENT,
                "input_deleted",
                "The provider has deleted by which input a prediction could be recognised.",
            )
        return self._matches[::-1]


class PredictionSearch:
    """Looks for predictions by their input; searches that come together share one reading."""

    def __init__(self, read_pages: ReadPages) -> None:
        self._read_pages = read_pages
        self._waiting: list[_Search] = []
        self._reading = asyncio.Lock()

    async def find(self, request: PredictionRequest, created_after: datetime) -> list[Prediction]:
        """See `Provider.find`. The list is read after the call began, never earlier.

        So whoever comes while it is being read waits for the next reading, which the first of
        those who wait does for all.
        """
        search = _Search(request, created_after)
        self._waiting.append(search)
        try:
            async with self._reading:
                if search in self._waiting:
                    await self._read()
        finally:
            self._forget([search])
        return search.found()

    async def _read(self) -> None:
        searches = list(self._waiting)
        try:
            async for page in self._read_pages(min(s.created_after for s in searches)):
                for seen in page:
                    for search in searches:
                        search.look_at(seen)
        except ProviderError as error:
            for search in searches:
                search.error = error
        # Not when it was interrupted: the next in line then reads for them.
        self._forget(searches)

    def _forget(self, searches: list[_Search]) -> None:
        self._waiting = [search for search in self._waiting if search not in searches]
