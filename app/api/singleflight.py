"""One run of one thing, however many ask for it at the same time."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class SingleFlight(Generic[Key, Result]):
    """Runs at most once for a key in this process; another process may run it as well.

    The last `remembered` results that were not errors answer later calls too.
    """

    def __init__(self, remembered: int = 0) -> None:
        self._remembered = remembered
        self._tasks: dict[Key, asyncio.Task[Result]] = {}
        self._ended: deque[Key] = deque()

    async def do(self, key: Key, run: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Join the run that is under way for this key, or start one; return what it returns.

        A caller that is cancelled does not stop it. Raises whatever it raises; then the next call
        runs anew.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(run())
            task.add_done_callback(partial(self._settle, key))
        return await asyncio.shield(task)

    def _settle(self, key: Key, task: asyncio.Task[Result]) -> None:
        if task.cancelled() or task.exception():
            del self._tasks[key]
            return
        self._ended.append(key)
        if len(self._ended) > self._remembered:
            del self._tasks[self._ended.popleft()]
