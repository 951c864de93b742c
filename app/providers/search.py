"""Searches in the provider's list of predictions: one reading answers all that wait for it.

After a crash hundreds of creates may have to be looked up at once, and each look-up would read the
same pages: that alone would use up the rate of calls that the provider allows.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime

from app.errors import FailureClass, ProviderError
from app.providers.base import Prediction, PredictionRequest, of_model

# Yields the predictions made since then in pages, newest first.
ReadPages = Callable[[datetime], AsyncGenerator[list[Prediction], None]]


class _Search:
    """One request that is looked for; its future gets the matches, oldest first."""

    def __init__(self, request: PredictionRequest, created_after: datetime) -> None:
        self.created_after = created_after
        self.future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self._request = request
        self._matches: list[Prediction] = []
        self._input_deleted = False

    def look_at(self, page: Sequence[Prediction]) -> None:
        """Compare the predictions of one page; end when the rest of the list is older."""
        for seen in page:
            if seen.created_at is not None and seen.created_at < self.created_after:
                self.end()
                return
            if seen.data_removed:
                self._input_deleted |= self._may_be(seen)
            elif seen.input == self._request.input and self._may_be(seen):
                self._matches.append(seen)

    def _may_be(self, seen: Prediction) -> bool:
        # Replicate has been recorded answering under another model's name than the one called:
        # where the input cannot be anybody else's, the name does not matter.
        return self._request.has_own_seed or of_model(seen, self._request.model_name)

    def end(self) -> None:
        """All there is has been seen."""
        if self._matches or not self._input_deleted:
            if not self.future.done():
                self.future.set_result(self._matches[::-1])
            return
        self.fail(
            ProviderError(
                FailureClass.PERMANENT,
                "input_deleted",
                "The provider has deleted by which input a prediction could be recognised.",
            )
        )

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

    async def find(self, request: PredictionRequest, created_after: datetime) -> list[Prediction]:
        """See `Provider.find`. The list is read after the call began, never earlier: whoever
        comes while it is being read waits for the next reading.
        """
        search = _Search(request, created_after)
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
        oldest = min(search.created_after for search in searches)
        async with aclosing(self._read_pages(oldest)) as pages:
            async for page in pages:
                searches = [search for search in searches if not search.future.done()]
                for search in searches:
                    search.look_at(page)
                if all(search.future.done() for search in searches):
                    return
        for search in searches:
            search.end()
