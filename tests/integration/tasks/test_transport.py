"""The connection to the broker that the workers use."""

import pytest
from kombu.exceptions import OperationalError

from app.tasks import transport
from app.tasks.celery_app import celery_app


def test_its_pauses_do_not_grow_with_the_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_SECONDS", 0.02)
    pauses: list[float] = []
    connection = celery_app.connection_for_read("redis://127.0.0.1:1/0")
    with pytest.raises(OperationalError):
        connection.ensure_connection(
            lambda _, seconds: pauses.append(seconds),
            max_retries=6,
            interval_start=0,
            interval_step=0.01,  # type: ignore[arg-type]
        )
    assert len(pauses) >= 5
    assert max(pauses) <= 0.02
