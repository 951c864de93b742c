"""The plain commands as processes: from a prompt to a stored picture, whatever is killed."""

import hashlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Thread

import httpx
import pytest
import redis
from celery import Celery
from PIL import Image

from scripts.servers import Postgres, Valkey
from tests.doubles.replicate_server import ReplicateServer
from tests.e2e.service import BIN, Service, end, wait_for
from tests.ports import free_port
from tests.process import run
from tests.s3_server import KEYS

StartService = Callable[..., Service]


@pytest.fixture
def start_service(database: Postgres, valkey: Valkey, tmp_path: Path) -> Iterator[StartService]:
    """Start the API with the given settings on top of the test's servers and folders."""
    services = []

    def start(**settings: str) -> Service:
        environment = {
            "DATABASE_URL": database.url,
            "REDIS_URL": valkey.url,
            "STORAGE_PATH": str(tmp_path / "storage" / "media"),
            "REPLICATE_MOCK_DELAY_MIN": "0.2",
            "REPLICATE_MOCK_DELAY_MAX": "1",
            "REPLICATE_MOCK_FAILURE_RATE": "0",
            **settings,
        }
        _flush(valkey)  # a message that another test has left would be heard
        logs = tmp_path / "logs"
        logs.mkdir()
        service = Service(environment, logs)
        services.append(service)
        service.start_api()
        return service

    yield start
    for service in services:
        service.__exit__()


@pytest.fixture
def real(start_service: StartService, replicate: ReplicateServer) -> Service:
    """The service in real mode, against the double of Replicate."""
    return start_service(REPLICATE_API_TOKEN=replicate.token, REPLICATE_BASE_URL=replicate.origin)


def picture(service: Service, job_id: str) -> Image.Image:
    data = service.client.get(f"/api/v1/download/{job_id}").raise_for_status().content
    image = Image.open(BytesIO(data))
    image.load()
    return image


class TestMock:
    def test_a_burst_of_jobs_on_one_worker_all_complete(self, start_service: StartService) -> None:
        service = start_service()
        service.start_worker()

        def post(number: int) -> str:
            return service.generate(f"a harbour {number}", width=128, height=96)

        with ThreadPoolExecutor(16) as threads:
            ids = list(threads.map(post, range(200)))
        assert service.wait_until_idle()["completed"] == 200
        sizes = {picture(service, job_id).size for job_id in ids}
        assert sizes == {(128, 96)}
        assert "Traceback" not in service.logs()
        assert "a harbour" not in service.logs()

    def test_flower_shows_the_worker_and_the_finished_task(
        self, start_service: StartService
    ) -> None:
        service = start_service(FLOWER_UNAUTHENTICATED_API="true")
        port = free_port()
        flower = ("celery", "-A", "app.tasks.celery_app", "flower")
        service.run(*flower, "--address=127.0.0.1", f"--port={port}")
        dashboard = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        wait_for(lambda: _reachable(dashboard), "Flower")
        service.start_worker()
        job_id = service.generate("a fox", width=64, height=64)
        service.wait_until_idle()

        def state() -> object:
            return dashboard.get("/api/tasks").json().get(job_id, {}).get("state")

        wait_for(lambda: state() == "SUCCESS", "the task in Flower")
        workers = dashboard.get("/api/workers", params={"refresh": "1"}).json()
        assert [name.startswith("celery@") for name in workers] == [True]
        assert dashboard.get(f"/task/{job_id}").status_code == 200
        dashboard.close()


def _reachable(client: httpx.Client) -> bool:
    try:
        return client.get("/healthcheck").is_success
    except httpx.TransportError:
        return False


class TestStorageInABucket:
    def test_a_job_goes_from_prompt_to_download(
        self, start_service: StartService, s3_url: str, tmp_path: Path
    ) -> None:
        service = start_service(STORAGE_URL="s3://media/e2e", AWS_ENDPOINT_URL=s3_url, **KEYS)
        service.start_worker()
        job_id = service.generate("a lighthouse", width=640, height=400)
        assert service.wait_until_idle()["completed"] == 1
        assert picture(service, job_id).size == (640, 400)
        [output] = service.status(job_id)["outputs"]
        data = service.client.get(f"/media/{job_id}.png").content
        assert hashlib.sha256(data).hexdigest() == output["sha256"]
        metadata = service.client.get(f"/api/v1/jobs/{job_id}/metadata").json()
        assert metadata["outputs"][0]["sha256"] == output["sha256"]
        assert not list(tmp_path.glob("storage/**/*.png"))


class TestDeath:
    def test_a_job_posted_without_a_worker_runs_when_one_starts(
        self, start_service: StartService
    ) -> None:
        service = start_service()
        job_id = service.generate("an owl", width=64, height=64)
        assert service.status(job_id)["status"] == "pending"
        service.start_worker()
        service.wait_until_idle()
        assert service.status(job_id)["status"] == "completed"

    def test_a_killed_workers_jobs_are_finished_and_paid_once(
        self, real: Service, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=6)
        worker = real.start_worker()
        ids = [real.generate(f"a bridge {n}", width=64, height=64) for n in range(50)]
        wait_for(lambda: len(replicate.creates()) == 50, "all creates")
        end(worker, signal.SIGKILL)
        assert real.counts()["processing"] > 0
        real.start_worker()
        assert real.wait_until_idle()["completed"] == 50
        assert len(replicate.creates()) == 50
        assert {picture(real, job_id).size for job_id in ids} == {(64, 64)}

    def test_a_stopped_worker_hands_its_jobs_back(
        self, real: Service, replicate: ReplicateServer, valkey: Valkey
    ) -> None:
        replicate.configure(latency_seconds=8)
        worker = real.start_worker()
        with _celery_events(valkey) as events:
            for n in range(20):
                real.generate(f"a bridge {n}", width=64, height=64)
            wait_for(lambda: len(replicate.creates()) == 20, "all creates")
            assert end(worker) < 10
            wait_for(lambda: events["worker-offline"], "the worker's last event")
        assert real.counts()["processing"] == 20
        assert events["task-started"] == 20
        assert not events["task-succeeded"] + events["task-failed"], "Flower shows them as over"
        real.start_worker()
        assert real.wait_until_idle()["completed"] == 20
        assert len(replicate.creates()) == 20

    def test_a_flushed_broker_only_delays(
        self, start_service: StartService, valkey: Valkey
    ) -> None:
        service = start_service()
        ids = [service.generate("a kite", width=64, height=64) for _ in range(10)]
        _flush(valkey)
        service.start_worker()
        service.wait_until_idle()
        assert {service.status(job_id)["status"] for job_id in ids} == {"completed"}


def _flush(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()


@contextmanager
def _celery_events(valkey: Valkey) -> Iterator[Counter[str]]:
    """Count what workers tell Flower, by type."""
    seen: Counter[str] = Counter()
    app = Celery(broker=valkey.url)
    app.conf.broker_transport_options = {"global_keyprefix": "media:"}
    with app.connection() as connection:
        count = {"*": lambda event: seen.update([event["type"]])}
        receiver = app.events.Receiver(connection, handlers=count)
        listening = Thread(target=receiver.capture, kwargs={"wakeup": False})
        listening.start()
        try:
            wait_for(lambda: seen, "the worker's heartbeat")  # from now on nothing is missed
            yield seen
        finally:
            receiver.should_stop = True
            listening.join()


class TestCancel:
    def test_a_cancel_sticks_and_reaches_the_provider(
        self, real: Service, replicate: ReplicateServer, valkey: Valkey
    ) -> None:
        replicate.configure(latency_seconds=60)
        real.start_worker()
        with _celery_events(valkey) as events:
            job_id = real.generate("a whale", width=64, height=64)
            wait_for(lambda: len(replicate.creates()) == 1, "the create")
            response = real.client.delete(f"/api/v1/jobs/{job_id}")
            assert (response.status_code, response.json()["status"]) == (200, "cancelled")
            wait_for(lambda: replicate.creates()[0].cancel_calls, "the provider's cancel", 15)
            wait_for(lambda: events["task-revoked"], "its end in Flower", 15)
        assert real.client.delete(f"/api/v1/jobs/{job_id}").status_code == 409
        assert real.status(job_id)["status"] == "cancelled"
        assert not events["task-succeeded"]


class TestStart:
    @pytest.mark.parametrize(
        "command",
        [
            ("uvicorn", "app.main:app", "--port", "1"),
            ("celery", "-A", "app.tasks.celery_app", "worker"),
        ],
    )
    def test_a_wrong_setting_stops_it_with_the_variables_name(
        self, command: tuple[str, ...]
    ) -> None:
        program, *arguments = command
        ended = run([str(BIN / program), *arguments], MAX_RETRY_ATTEMPTS="many")
        assert ended.returncode != 0
        assert "MAX_RETRY_ATTEMPTS: Input should be a valid integer" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_worker_that_can_not_store_anything_ends(self) -> None:
        command = [str(BIN / "celery"), "-A", "app.tasks.celery_app", "worker"]
        ended = run(command, STORAGE_PATH="/dev/null/media")
        assert ended.returncode != 0
        assert "worker_not_started" in ended.stderr

    def test_another_pool_is_refused(self, start_service: StartService) -> None:
        service = start_service()
        worker = service.run("celery", "-A", "app.tasks.celery_app", "worker", "--pool=solo")
        assert worker.wait(timeout=60) != 0
        assert "--pool threads only" in service.logs()
