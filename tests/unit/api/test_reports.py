"""Copies of a report: taken once, unless that went wrong."""

import asyncio
from uuid import uuid4

import pytest

from app.api import reports as module
from app.api.reports import Key, Reports

KEY: Key = (uuid4(), "msg_1")


class Work:
    """Counts how often it is done; fails as long as it is told to."""

    def __init__(self) -> None:
        self.done = 0
        self.fails = False

    async def __call__(self) -> None:
        self.done += 1
        await asyncio.sleep(0.01)
        if self.fails:
            raise ConnectionError


async def test_copies_are_taken_once() -> None:
    reports, work = Reports(), Work()
    await asyncio.gather(*(reports.take(KEY, work) for _ in range(20)))
    await reports.take(KEY, work)
    assert work.done == 1


async def test_the_same_id_at_another_address_is_another_report() -> None:
    reports, work = Reports(), Work()
    await reports.take(KEY, work)
    await reports.take((uuid4(), KEY[1]), work)
    assert work.done == 2


async def test_what_failed_fails_for_all_and_is_taken_again() -> None:
    reports, work = Reports(), Work()
    work.fails = True
    ends = await asyncio.gather(
        *(reports.take(KEY, work) for _ in range(3)), return_exceptions=True
    )
    assert [type(end) for end in ends] == [ConnectionError] * 3
    work.fails = False
    await reports.take(KEY, work)
    assert work.done == 2


async def test_whoever_leaves_does_not_stop_it() -> None:
    reports, work = Reports(), Work()
    leaving = asyncio.create_task(reports.take(KEY, work))
    await asyncio.sleep(0)
    leaving.cancel()
    await reports.take(KEY, work)
    assert (work.done, leaving.cancelled()) == (1, True)


async def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    reports, work = Reports(), Work()
    for number in (1, 2, 3, 3, 1):
        await reports.take((KEY[0], str(number)), work)
    assert work.done == 4
