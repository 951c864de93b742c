"""The metrics: JSON for people, Prometheus text for scrapers."""

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel

from app.jobs.repository import QueueStats

PROMETHEUS_TYPES = ("text/plain", "application/openmetrics-text")
JSON_TYPES = ("application/json", "application/*", "*/*")


class QueueView(BaseModel):
    """Pending jobs: they wait for a worker, or for their next try."""

    depth: int
    oldest_age_seconds: float


class PredictionsView(BaseModel):
    """Predictions that are paid for and not stored: Replicate deletes outputs after an hour."""

    unstored: int
    oldest_age_seconds: float


class WorkersView(BaseModel):
    """Living workers, and how many jobs they hold at once."""

    alive: int
    slots: int


class MetricsBody(BaseModel):
    """The numbers."""

    jobs_total: int
    jobs_by_status: dict[str, int]
    queue: QueueView
    predictions: PredictionsView
    workers: WorkersView


class MetricsView(BaseModel):
    """The numbers as of `timestamp`."""

    metrics: MetricsBody
    timestamp: datetime


def metrics_view(stats: QueueStats) -> MetricsView:
    """Return the numbers as JSON shows them."""
    return MetricsView(
        metrics=MetricsBody(
            jobs_total=sum(stats.jobs_by_status.values()),
            jobs_by_status=stats.jobs_by_status,
            queue=QueueView(
                depth=stats.jobs_by_status["pending"],
                oldest_age_seconds=stats.oldest_pending_age_seconds,
            ),
            predictions=PredictionsView(
                unstored=stats.unstored, oldest_age_seconds=stats.oldest_unstored_age_seconds
            ),
            workers=WorkersView(alive=stats.workers, slots=stats.worker_slots),
        ),
        timestamp=datetime.now(UTC),
    )


def prometheus_text(stats: QueueStats, accept: str) -> tuple[bytes, str]:
    """Return the numbers in the text format that `accept` asks for, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats))
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # of a version that is none the library compares words with numbers
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


def prefers_prometheus(accept: str) -> bool:
    """Tell whether an `Accept` header ranks a Prometheus format above JSON."""
    weights = dict(_weighted(part) for part in accept.split(","))
    text = max(weights.get(name, 0) for name in PROMETHEUS_TYPES)
    json = next((weights[name] for name in JSON_TYPES if name in weights), 0)
    return text > json


def _weighted(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, float(parameter[2:])
            except ValueError:
                return name, 0
    return name, 1


class _Snapshot(Collector):
    """The numbers of one scrape as gauges."""

    def __init__(self, stats: QueueStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        jobs = GaugeMetricFamily("media_jobs", "Jobs by status.", labels=["status"])
        for status, count in stats.jobs_by_status.items():
            jobs.add_metric([status], count)
        yield jobs
        for name, text, value in (
            ("media_queue_depth", "Pending jobs.", stats.jobs_by_status["pending"]),
            (
                "media_queue_oldest_age_seconds",
                "Age of the oldest pending job.",
                stats.oldest_pending_age_seconds,
            ),
            ("media_predictions_unstored", "Paid for and not stored yet.", stats.unstored),
            (
                "media_predictions_oldest_age_seconds",
                "Age of the oldest of them: Replicate deletes outputs an hour after the end.",
                stats.oldest_unstored_age_seconds,
            ),
            ("media_workers", "Workers with a fresh heartbeat.", stats.workers),
            ("media_worker_slots", "Jobs that the living workers can hold.", stats.worker_slots),
        ):
            yield GaugeMetricFamily(name, text, value=value)
