"""Which format of the metrics a client wants."""

import pytest

from app.api.metrics import prefers_prometheus, prometheus_text
from app.jobs.repository import QueueStats


@pytest.mark.parametrize(
    ("accept", "prometheus"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("text/plain", True),
        ("TEXT/PLAIN; version=0.0.4", True),
        ("text/plain, */*;q=0.1", True),
        ("text/plain, application/json", False),
        ("text/plain;q=0.5, application/json", False),
        ("text/plain, application/json;q=0.5", True),
        ("application/openmetrics-text; version=1.0.0", True),
        ("text/plain;q=0", False),
        ("text/plain;q=x", False),
        (",;,q=1;", False),
    ],
)
def test_prefers_prometheus(accept: str, prometheus: bool) -> None:
    assert prefers_prometheus(accept) is prometheus


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain;version=abc",
        "text/plain;version=1.x",
        'text/plain;version="0.0.4"',
        "application/openmetrics-text;version=1.x",
    ],
)
def test_a_version_that_is_none_is_answered_with_plain_text(accept: str) -> None:
    stats = QueueStats({"pending": 1}, 0.0, 0, 0.0, 0, 0)
    body, content_type = prometheus_text(stats, accept)
    assert b"media_queue_depth 1.0" in body
    assert content_type.startswith("text/plain; version=0.0.4")
