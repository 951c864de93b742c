"""The provider's reports that are being taken, or were lately: of many copies one is enough."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any
from uuid import UUID

# The attempt of the address, and the id under which a report is signed and sent again.
Key = tuple[UUID, str]
REMEMBERED = 10_000


class Reports:
    """Takes each report once in this process; another process may take it as well."""

    def __init__(self) -> None:
        self._taken: dict[Key, asyncio.Task[None]] = {}

    async def take(self, key: Key, take: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Await `take()`, or the one that has begun; whoever leaves early does not stop it.

        Raises whatever it raises; then the next copy is taken anew.
        """
        task = self._taken.get(key)
        if task is None:
            task = self._taken[key] = asyncio.create_task(take())
            task.add_done_callback(partial(self._settle, key))
        await asyncio.shield(task)

    def _settle(self, key: Key, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception():
            self._taken.pop(key, None)
        while len(self._taken) > REMEMBERED:
            del self._taken[next(iter(self._taken))]
