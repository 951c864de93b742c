"""One job's run against the double of Replicate: every outcome, and death at every step."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID, uuid4

import psycopg
import pytest

from app.config import Settings
from app.errors import FailureClass, LeaseLost, ProviderError
from app.jobs import submission
from app.jobs.lifecycle import BEGUN_AT_ONCE, Lifecycle, LifecyclePolicy, Outcome, RunResult
from app.jobs.models import Job, JobStatus
from app.jobs.outputs import OutputKeeper
from app.jobs.parameters import ParameterChecker
from app.jobs.reconcile import ReconcilePolicy
from app.jobs.repository import JobRepository, NewJob
from app.jobs.retry import RetryPolicy
from app.jobs.settlement import absent
from app.jobs.submission import SubmitPolicy
from app.jobs.watch import PredictionWatcher
from app.providers.base import PredictionRequest
from app.providers.replicate import ReplicateProvider
from app.storage import create_storage
from app.storage.base import Storage, media_key, metadata_key
from app.storage.s3 import S3Storage
from scripts.servers import Postgres
from tests.doubles.replicate_server import ReplicateServer
from tests.doubles.ungoverned import Ungoverned
from tests.s3_server import KEYS

pytestmark = pytest.mark.usefixtures("watching")

ABORTED = {"kind": "status_sequence", "sequence": [[0.1, "aborted"]]}


class Died(BaseException):
    """The process ends here: nothing after this line happens."""


@dataclass
class Parts:
    """A worker's parts, with a retry that is due at once."""

    repository: JobRepository
    provider: ReplicateProvider
    keeper: OutputKeeper
    watcher: PredictionWatcher
    lifecycle: Lifecycle
    storage: Storage
    media: Path

    async def add(self, **parameters: Any) -> UUID:
        new = NewJob("a lighthouse", "acme/painter", parameters)
        return (await self.repository.add(new, 60)).id

    def change_reconcile_policy(self, **changes: Any) -> None:
        reconciler = self.lifecycle._reconciler
        reconciler._policy = replace(reconciler._policy, **changes)

    async def run(self, job_id: UUID, *, at_once: bool = False) -> RunResult:
        return await self.lifecycle.run(job_id, uuid4(), Mock(), at_once=at_once)

    async def run_to_the_end(self, job_id: UUID) -> list[Outcome]:
        """Run as often as the sweep would ring."""
        outcomes = []
        while not (await self.job(job_id)).status.is_terminal:
            outcomes.append((await self.run(job_id)).outcome)
            assert len(outcomes) < 20
        return outcomes

    async def job(self, job_id: UUID) -> Job:
        job = await self.repository.get(job_id)
        assert job is not None
        return job

    async def assert_stored(self, job_id: UUID) -> None:
        """Row and files agree."""
        [output] = (await self.repository.outputs([job_id]))[job_id]
        data = await _read(self.storage, media_key(output.name))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (output.size_bytes, output.sha256)
        document = json.loads(await _read(self.storage, metadata_key(job_id)))
        assert document["job_id"] == str(job_id)
        assert document["outputs"][0]["sha256"] == output.sha256
        assert list(self.storage.workspace.iterdir()) == []


async def _read(storage: Storage, key: str) -> bytes:
    return b"".join([chunk async for chunk in storage.read(key)])


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return create_storage(settings)


@pytest.fixture
async def parts(
    settings: Settings, repository: JobRepository, replicate: ReplicateServer, storage: Storage
) -> AsyncIterator[Parts]:
    provider = ReplicateProvider(
        replicate.token,
        replicate.origin,
        timeout_seconds=20,
        prefer_wait_seconds=1,
        governor=Ungoverned(),
    )
    watcher = PredictionWatcher(
        provider, interval_seconds=0.05, starting_seconds=30, running_seconds=30
    )
    keeper = OutputKeeper(
        provider,
        storage,
        max_bytes=10 << 20,
        max_pixels=10_000_000,
        deadline_seconds=30,
        concurrency=4,
    )
    checker = ParameterChecker(provider.input_schema)
    policy = LifecyclePolicy(
        retry=RetryPolicy(max_retries=3, backoff_factor=1, backoff_max_seconds=0, grace_seconds=0),
        job_deadline_seconds=60,
        begun_at_once=BEGUN_AT_ONCE,
        submit=SubmitPolicy(cancel_after_seconds=60, webhook_base_url=None),
        reconcile=ReconcilePolicy(
            call_seconds=0, grace_seconds=0, deadline_seconds=30, on_unknown_outcome="fail"
        ),
    )
    lifecycle = Lifecycle(repository, repository, provider, watcher, keeper, checker.knows, policy)
    yield Parts(repository, provider, keeper, watcher, lifecycle, storage, settings.storage_path)
    await checker.aclose()
    await provider.aclose()


@pytest.fixture
async def watching(parts: Parts) -> AsyncIterator[None]:
    task = asyncio.create_task(parts.watcher.run())
    yield
    task.cancel()


@pytest.fixture(autouse=True)
def _no_pause_for_own_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.retry.INTERNAL_DELAY_SECONDS", 0)
    monkeypatch.setattr("app.jobs.outputs.DOUBTS_SECONDS", (0.0, 0.0))


class TestOutcomes:
    async def test_a_prompt_becomes_a_stored_picture(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        job_id = await parts.add(width=96, height=64)
        assert (await parts.run(job_id)).outcome is Outcome.COMPLETED
        job = await parts.job(job_id)
        [create] = replicate.creates()
        assert (job.status, job.external_job_id) == (JobStatus.COMPLETED, create.id)
        assert (job.error_code, job.retry_count) == (None, 0)
        await parts.assert_stored(job_id)

    async def test_the_input_is_the_clients_with_a_seed_of_ours(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        await parts.run(await parts.add(width=96, guidance_scale=3.5))
        [create] = replicate.creates()
        seed = create.input.pop("seed")
        assert isinstance(seed, int)
        given = {"prompt": "a lighthouse", "width": 96, "guidance_scale": 3.5}
        assert create.input == given | {"output_format": "png"}

    async def test_a_clients_output_format_is_kept(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        await parts.run(await parts.add(output_format="webp"))
        assert replicate.creates()[0].input["output_format"] == "webp"

    async def test_who_stores_the_original_format_asks_for_none(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        submitter = parts.lifecycle._submitter
        submitter._policy = replace(submitter._policy, ask_for_png=False)
        await parts.run(await parts.add())
        assert "output_format" not in replicate.creates()[0].input

    @pytest.mark.parametrize(("maximum", "draws"), [(65_535, True), (255, False)])
    async def test_a_seed_of_ours_is_one_that_the_model_takes(
        self,
        parts: Parts,
        replicate: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        maximum: int,
        draws: bool,
    ) -> None:
        properties = {"seed": {"type": "integer", "minimum": 256, "maximum": maximum}}

        async def schema(_: str) -> dict[str, Any]:
            return {"type": "object", "properties": properties}

        checker = ParameterChecker(schema)
        monkeypatch.setattr(parts.lifecycle._submitter, "_knows_parameter", checker.knows)
        for _ in range(5):
            await parts.run(await parts.add())
        seeds = [create.input.get("seed") for create in replicate.creates()]
        assert all(256 <= seed <= maximum for seed in seeds if seed is not None)
        assert any(seed is not None for seed in seeds) is draws
        await checker.aclose()

    async def test_a_clients_seed_is_kept(self, parts: Parts, replicate: ReplicateServer) -> None:
        await parts.run(await parts.add(seed=7))
        assert replicate.creates()[0].input["seed"] == 7

    async def test_a_second_message_is_a_no_op(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        job_id = await parts.add()
        results = await asyncio.gather(*(parts.run(job_id) for _ in range(5)))
        assert sorted(result.outcome for result in results) == ["completed"] + ["skipped"] * 4
        assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        assert len(replicate.creates()) == 1

    async def test_a_slow_prediction_is_polled(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=3)
        assert (await parts.run(await parts.add())).outcome is Outcome.COMPLETED
        assert replicate.ledger().requests["get"] >= 1


class TestFailures:
    async def test_a_platform_fault_is_retried_with_a_new_prediction(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.push_fault("create", "fail", times=2)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry", "retry", "completed"]
        assert (await parts.job(job_id)).retry_count == 2
        assert len(replicate.creates()) == 3

    async def test_retries_run_out(self, parts: Parts, replicate: ReplicateServer) -> None:
        replicate.push_fault("create", "fail", times=None)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry"] * 3 + ["failed"]
        job = await parts.job(job_id)
        assert (job.retry_count, job.error_code) == (3, "prediction_failed")
        assert len(replicate.creates()) == 4

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (400, "invalid_input"),
            (401, "provider_auth"),
            (402, "insufficient_credit"),
            (404, "model_not_found"),
            (422, "invalid_input"),
        ],
    )
    async def test_a_refusal_is_final(
        self, parts: Parts, replicate: ReplicateServer, status: int, code: str
    ) -> None:
        replicate.push_fault("create", "status", status=status, times=None)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["failed"]
        assert (await parts.job(job_id)).error_code == code
        assert replicate.ledger().requests["create"] == 1

    @pytest.mark.parametrize(
        ("fault", "outcome", "error_class", "charged", "has_time"),
        [
            ({"kind": "fail"}, "failed", "transient", "yes", True),
            ({"kind": "fail", "error": "NSFW"}, "failed", "permanent", "yes", True),
            (ABORTED, "aborted", "transient", "no", False),
            ({"kind": "status", "status": 422}, "invalid_input", "permanent", "no", False),
            ({"kind": "status", "status": 429}, "provider_throttled", "throttled", "no", False),
        ],
    )
    async def test_the_ledger_says_how_the_attempt_ended_and_what_it_costs(
        self,
        parts: Parts,
        replicate: ReplicateServer,
        fault: dict[str, Any],
        outcome: str,
        error_class: str,
        charged: str,
        has_time: bool,
    ) -> None:
        replicate.push_fault("create", **fault)
        job_id = await parts.add()
        await parts.run(job_id)
        [attempt] = await parts.repository.attempts(job_id)
        assert attempt.state == "settled"
        assert (attempt.outcome, attempt.error_class) == (outcome, error_class)
        assert attempt.charged == charged
        assert (attempt.predict_time_seconds is not None) is has_time

    async def test_moderation_is_final(self, parts: Parts, replicate: ReplicateServer) -> None:
        replicate.push_fault("create", "fail", error="NSFW content detected", times=None)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["failed"]
        job = await parts.job(job_id)
        assert (job.error_code, job.error_message) == ("content_policy", "NSFW content detected")

    async def test_throttling_costs_no_attempt(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "app.providers.replicate.failures.RETRY_AFTER_BOUNDS_SECONDS", (0.01, 0.02)
        )
        replicate.push_fault("create", "status", status=429, times=5)
        job_id = await parts.add()
        await self._until_done(parts, job_id)
        job = await parts.job(job_id)
        assert (job.status, job.retry_count, job.throttle_count) == ("completed", 0, 5)

    async def _until_done(self, parts: Parts, job_id: UUID) -> None:
        while not (await parts.job(job_id)).status.is_terminal:
            await parts.run(job_id)
            await asyncio.sleep(0.02)

    async def test_a_failed_download_is_repeated_not_the_prediction(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.push_fault("download", "status", status=503, times=4)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry"] * 4 + ["completed"]
        assert (await parts.job(job_id)).retry_count == 0
        assert len(replicate.creates()) == 1

    async def test_a_full_disk_is_waited_for(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("app.storage.local._move_durably", full)
            job_id = await parts.add()
            result = await parts.run(job_id)
            assert (result.outcome, result.error_code) == ("retry", "storage_unavailable")
        assert await parts.run_to_the_end(job_id) == ["completed"]
        assert len(replicate.creates()) == 1

    async def test_a_bad_file_fails_with_words(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.push_fault("download", "truncate", times=None)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["failed"]
        job = await parts.job(job_id)
        assert (job.error_code, job.error_message) == ("invalid_output", "The picture is damaged.")
        assert list(parts.media.glob("*.png")) == []


class TestLostCreates:
    @pytest.mark.parametrize("kind", ["accept_then_drop", "accept_then_status"])
    async def test_an_accepted_create_without_an_answer_is_adopted(
        self, parts: Parts, replicate: ReplicateServer, kind: str
    ) -> None:
        replicate.push_fault("create", kind)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry", "completed"]
        assert len(replicate.creates()) == 1
        assert (await parts.job(job_id)).retry_count == 0
        await parts.assert_stored(job_id)

    @pytest.mark.parametrize("kind", ["drop", "status"])
    async def test_a_create_that_never_arrived_is_made_again_and_counts(
        self, parts: Parts, replicate: ReplicateServer, kind: str
    ) -> None:
        replicate.push_fault("create", kind)
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry", "retry", "completed"]
        assert len(replicate.creates()) == 1
        assert (await parts.job(job_id)).retry_count == 1

    async def test_equal_jobs_do_not_share_a_prediction(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.push_fault("create", "accept_then_drop", times=4)
        ids = [await parts.add(seed=5) for _ in range(8)]
        await asyncio.gather(*(parts.run_to_the_end(job_id) for job_id in ids))
        jobs = [await parts.job(job_id) for job_id in ids]
        assert {job.status for job in jobs} == {JobStatus.COMPLETED}
        assert len({job.external_job_id for job in jobs}) == 8
        assert len(replicate.creates()) == 8

    async def test_what_nobody_can_prove_is_not_paid_again(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        parts.change_reconcile_policy(deadline_seconds=0.2)
        replicate.push_fault("create", "accept_then_drop")
        replicate.push_fault("list", "drop", times=None)
        job_id = await parts.add()
        assert await parts.run(job_id) == RunResult(Outcome.RETRY, "provider_no_answer", 0)
        assert (await parts.run(job_id)).outcome is Outcome.RETRY
        await asyncio.sleep(0.3)
        assert (await parts.run_to_the_end(job_id))[-1] == "failed"
        assert (await parts.job(job_id)).error_code == "provider_outcome_unknown"
        assert len(replicate.creates()) == 1
        # The sweep goes on looking for it, to stop it if it runs.
        assert [
            orphan.attempt.job_id for orphan in await parts.repository.take_orphans(10, known=False)
        ] == [job_id]

    async def test_it_is_found_although_the_databases_clock_was_set_back(
        self, parts: Parts, replicate: ReplicateServer, database: Postgres
    ) -> None:
        replicate.push_fault("create", "accept_then_drop")
        job_id = await parts.add()
        await parts.run(job_id)
        with psycopg.connect(database.sync_url) as connection:
            connection.execute("UPDATE attempts SET created_at = now() + interval '5 min'")
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        assert len(replicate.creates()) == 1

    @pytest.mark.parametrize("is_known", [True, False])
    async def test_it_waits_while_the_service_has_another_provider(
        self,
        parts: Parts,
        replicate: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        is_known: bool,
    ) -> None:
        """Started without its token, a worker has the mock, which knows of no prediction."""
        job_id = await parts.add()
        with monkeypatch.context() as patch:
            step = "record_prediction" if is_known else "begin_attempt"
            _die(patch, parts, f"repository.{step}", "after")
            with pytest.raises(Died):
                await parts.run(job_id)
        await parts.repository.release_dead(0)
        with monkeypatch.context() as patch:
            patch.setattr(parts.provider, "name", "mock")
            result = await parts.run(job_id)
        assert (result.outcome, result.error_code) == (Outcome.RETRY, "provider_changed")
        assert len(replicate.creates()) == is_known
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        assert (await parts.job(job_id)).retry_count == (not is_known)

    async def test_a_report_that_comes_in_the_last_moment_saves_it(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.push_fault("create", "accept_then_drop")
        job_id = await parts.add()
        await parts.run(job_id)
        [attempt] = await parts.repository.attempts(job_id)
        [made] = replicate.creates()

        async def find(*_: Any) -> Any:
            assert await parts.repository.adopt(attempt.id, await parts.provider.get(made.id))
            raise ProviderError(FailureClass.PERMANENT, "input_deleted", "")

        with monkeypatch.context() as patch:
            patch.setattr(parts.provider, "find", find)
            assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        assert (await parts.job(job_id)).status is JobStatus.PROCESSING
        await parts.repository.release_dead(0)
        assert await parts.run_to_the_end(job_id) == ["completed"]
        assert len(replicate.creates()) == 1

    async def test_unless_the_operator_wants_it(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        parts.change_reconcile_policy(deadline_seconds=0.1, on_unknown_outcome="resubmit")
        replicate.push_fault("create", "accept_then_drop")
        replicate.push_fault("list", "drop", times=None)
        job_id = await parts.add()
        for _ in range(2):
            assert (await parts.run(job_id)).outcome is Outcome.RETRY
        await asyncio.sleep(0.1)
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        assert len(replicate.creates()) == 2

    @pytest.mark.parametrize("status", [429, 500])
    async def test_one_look_that_fails_proves_nothing_however_old_the_intent(
        self, parts: Parts, replicate: ReplicateServer, status: int
    ) -> None:
        """All workers were away for longer than the list may be silent."""
        parts.change_reconcile_policy(deadline_seconds=0.2)
        replicate.push_fault("create", "accept_then_drop")
        job_id = await parts.add()
        await parts.run(job_id)
        await asyncio.sleep(0.3)
        replicate.push_fault("list", "status", status=status, times=3)
        assert (await parts.run(job_id)).outcome is Outcome.RETRY
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        assert len(replicate.creates()) == 1

    @pytest.mark.parametrize(("status", "gap_seconds"), [(429, 60), (500, 0.1)])
    async def test_nor_do_two_that_are_no_one_silence(
        self,
        parts: Parts,
        replicate: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        gap_seconds: float,
    ) -> None:
        """A 429 is an answer, of a kind; and what lies far apart is not one long failure."""
        monkeypatch.setattr("app.jobs.reconcile.LONGEST_GAP_SECONDS", gap_seconds)
        parts.change_reconcile_policy(deadline_seconds=0.2)
        replicate.push_fault("create", "accept_then_drop")
        job_id = await parts.add()
        await parts.run(job_id)
        for _ in range(2):
            await asyncio.sleep(0.3)
            replicate.push_fault("list", "status", status=status, times=3)
            await self._until_it_has_looked(parts, job_id)
            replicate.clear_faults()
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        assert len(replicate.creates()) == 1

    async def _until_it_has_looked(self, parts: Parts, job_id: UUID) -> None:
        """Run the job once it is due: a 429 asks for a second."""
        while (result := await parts.run(job_id)).outcome is Outcome.SKIPPED:
            await asyncio.sleep(0.05)
        assert result.outcome is Outcome.RETRY

    @pytest.mark.parametrize("ahead_seconds", [600, -600])
    async def test_whatever_the_providers_clock_says(
        self, parts: Parts, replicate: ReplicateServer, ahead_seconds: int
    ) -> None:
        replicate.configure(clock_ahead_seconds=ahead_seconds)
        replicate.push_fault("create", "accept_then_drop")
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["retry", "completed"]
        assert len(replicate.creates()) == 1

    async def test_a_seed_of_null_is_nobodys_own(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        """Without a schema none is drawn, and the input may be another model's as well."""
        replicate.configure(schemas=False)
        replicate.push_fault("create", "accept_then_drop")
        other = NewJob("a lighthouse", "acme/other", {"seed": None})
        others = (await parts.repository.add(other, 60)).id
        await parts.run(others)
        replicate.push_fault("create", "drop")
        job_id = await parts.add(seed=None)
        await parts.run(job_id)
        # Whose the one prediction is can not be known until the other job has it.
        assert (await parts.run(job_id)).error_code == "provider_outcome_pending"
        assert await parts.run_to_the_end(others) == ["completed"]
        assert (await parts.run_to_the_end(job_id))[-1] == "completed"
        models = ["acme/other", "acme/painter"]
        assert [made.model for made in replicate.creates()] == models

    @pytest.mark.parametrize(
        ("model", "image"),
        [("acme/other", "data:,x"), ("acme/painter", "https://replicate.delivery/x")],
    )
    async def test_an_equal_prediction_of_nobodys_is_no_proof_of_absence(
        self, parts: Parts, replicate: ReplicateServer, model: str, image: str
    ) -> None:
        """Replicate does not always name the model that was called, nor show a file as sent."""
        shown = {"prompt": "a lighthouse", "seed": 7, "image": image}
        replicate.configure(schemas=False)
        replicate.push_fault("create", "drop")
        job_id = await parts.add(seed=7, image="data:,x")
        await parts.run(job_id)
        made = await parts.provider.create(PredictionRequest(model, shown, 60))
        assert (await parts.run(job_id)).error_code == "provider_outcome_pending"
        parts.change_reconcile_policy(deadline_seconds=0)
        assert (await parts.run(job_id)).error_code == "provider_outcome_unknown"
        assert [create.id for create in replicate.creates()] == [made.id]

    async def test_our_own_failure_after_the_intent_does_not_shorten_the_grace(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Created, and the id could not be written down: the list may show it late."""
        for name in ("RECORD_SECONDS", "RECORD_PAUSE_SECONDS"):
            monkeypatch.setattr(submission, name, 0)
        parts.change_reconcile_policy(call_seconds=1, grace_seconds=2)
        replicate.configure(list_lag_seconds=1.5)
        job_id = await parts.add()
        with monkeypatch.context() as patch:
            patch.setattr(
                parts.repository, "record_prediction", Mock(side_effect=ConnectionRefusedError)
            )
            assert (await parts.run(job_id)).error_code == "internal_error"
        assert await parts.run_to_the_end(job_id) == ["completed"]
        assert len(replicate.creates()) == 1

    async def test_one_that_the_provider_accepts_late_is_not_made_again(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its worker was killed in the middle of the call, and the call goes on."""
        parts.change_reconcile_policy(call_seconds=3)
        job_id = await parts.add()
        with monkeypatch.context() as patch:
            _die(patch, parts, "repository.begin_attempt", "after")
            with pytest.raises(Died):
                await parts.run(job_id)
        [attempt] = await parts.repository.attempts(job_id)

        async def arrive_late() -> None:
            await asyncio.sleep(1.5)  # after the first look, before the call must be over
            await parts.provider.create(PredictionRequest(attempt.model_name, attempt.input, 60))

        arriving = asyncio.create_task(arrive_late())
        await parts.repository.release_dead(0)
        assert await parts.run_to_the_end(job_id) == ["completed"]
        await arriving
        assert len(replicate.creates()) == 1

    async def test_whoever_has_lost_the_job_keeps_the_id_as_insistently(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(submission, "RECORD_PAUSE_SECONDS", 0)
        failures = _fail_at_first(monkeypatch, parts.repository, "adopt")
        lost = Mock(side_effect=LeaseLost)
        monkeypatch.setattr(parts.repository, "record_prediction", lost)
        job_id = await parts.add()
        assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        [attempt], [made] = await parts.repository.attempts(job_id), replicate.creates()
        assert (attempt.prediction_id, made.cancel_calls, failures) == (made.id, [], [])

    async def test_its_id_is_kept_although_the_database_is_away_for_a_moment(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(submission, "RECORD_PAUSE_SECONDS", 0)
        failures = _fail_at_first(monkeypatch, parts.repository, "record_prediction")
        job_id = await parts.add()
        assert await parts.run_to_the_end(job_id) == ["completed"]
        assert failures == []
        assert len(replicate.creates()) == 1
        assert replicate.ledger().requests.get("list", 0) == 0

    async def test_its_late_answer_is_left_to_whoever_has_the_job_by_now(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = parts.provider.create

        async def slow(*args: Any) -> Any:
            prediction = await create(*args)
            await parts.repository.release_dead(0)
            assert await parts.repository.claim(job_id, uuid4(), 60) is not None
            return prediction

        job_id = await parts.add()
        with monkeypatch.context() as patch:
            patch.setattr(parts.provider, "create", slow)
            assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        [made] = replicate.creates()
        [attempt] = await parts.repository.attempts(job_id)
        assert (attempt.state, attempt.prediction_id) == ("submitted", made.id)
        await parts.repository.release_dead(0)
        assert await parts.run_to_the_end(job_id) == ["completed"]
        assert len(replicate.creates()) == 1

    async def test_it_is_stopped_if_its_job_is_creating_another_by_now(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It came after the create was called absent: it belongs to nobody."""
        repository, create = parts.repository, parts.provider.create
        replicate.configure(latency_seconds=30)

        async def too_slow(request: PredictionRequest, *args: Any) -> Any:
            prediction = await create(request, *args)
            await repository.release_dead(0)
            claim = await repository.claim(job_id, uuid4(), 60)
            assert claim is not None
            assert claim.attempt is not None
            lost = absent(claim.attempt)
            await repository.retry_later(
                claim.lease, delay_seconds=0, error_code="c", error_message="m", settlement=lost
            )
            again = await repository.claim(job_id, uuid4(), 60)
            assert again is not None
            await repository.begin_attempt(again.lease, "replicate", request)
            return prediction

        job_id = await parts.add()
        monkeypatch.setattr(parts.provider, "create", too_slow)
        assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        [made] = replicate.creates()
        assert len(made.cancel_calls) == 1
        first, second = await repository.attempts(job_id)
        assert (first.outcome, first.prediction_id, second.state) == ("absent", None, "intent")


# Every step that changes something outside the process. The provider's ledger must show exactly one
# create in the end, wherever the process dies, before the step or right after it.
STEPS = [
    "repository.claim",
    "repository.begin_attempt",
    "provider.create",
    "repository.record_prediction",
    "watcher.wait",
    "repository.begin_storing",
    "keeper._fetch",
    "keeper._storage.put",
    "keeper._put_metadata",
    "repository.complete",
]


def _fail_at_first(
    patch: pytest.MonkeyPatch, repository: JobRepository, write: str
) -> list[Exception]:
    """Have the database away for the first three tries of a write; return those still to come."""
    real: Callable[..., Awaitable[Any]] = getattr(repository, write)
    failures: list[Exception] = [ConnectionRefusedError()] * 3

    async def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return await real(*args)

    patch.setattr(repository, write, failing)
    return failures


class TestDeath:
    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize("step", STEPS)
    async def test_the_next_owner_goes_on_and_pays_once(
        self,
        parts: Parts,
        replicate: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
        moment: str,
    ) -> None:
        replicate.configure(latency_seconds=0.3)
        monkeypatch.setattr(parts.provider, "_prefer_wait_seconds", 0)  # so that it must wait
        job_id = await parts.add()
        with monkeypatch.context() as patch:
            died = _die(patch, parts, step, moment)
            with pytest.raises(Died):
                await parts.run(job_id)
            assert died()
        await parts.repository.release_dead(0)  # what the sweep does about a silent worker
        await parts.run_to_the_end(job_id)
        assert (await parts.job(job_id)).status is JobStatus.COMPLETED
        assert len(replicate.creates()) == 1
        await parts.assert_stored(job_id)


class TestDeathBesideABucket(TestDeath):
    """The same with the files on S3."""

    @pytest.fixture
    def storage(self, s3_url: str, tmp_path: Path) -> Storage:
        return S3Storage(
            f"s3://media/{uuid4().hex}",
            tmp_path / "workspace",
            endpoint_url=s3_url,
            region="us-east-1",
            access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )


def _die(patch: pytest.MonkeyPatch, parts: Parts, step: str, moment: str) -> Callable[[], bool]:
    """Make the process die around one step; return whether it has."""
    *path, name = step.split(".")
    owner: Any = parts
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    dead = []

    async def dying(*args: Any, **kwargs: Any) -> Any:
        if moment == "after":
            await original(*args, **kwargs)
        dead.append(True)
        raise Died

    patch.setattr(owner, name, dying)
    return lambda: bool(dead)


class TestFlood:
    """However many jobs are new, those that are paid for come first."""

    async def test_a_job_that_has_begun_passes_the_line(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun = await parts.add()
        with monkeypatch.context() as patch:
            _die(patch, parts, "repository.record_prediction", "after")
            with pytest.raises(Died):
                await parts.run(begun)
        await parts.repository.release_dead(0)
        async with _only_turn_taken(parts):
            waiting = asyncio.create_task(parts.run(await parts.add()))
            assert (await parts.run(begun, at_once=True)).outcome is Outcome.COMPLETED
            assert len(replicate.creates()) == 1
        assert (await waiting).outcome is Outcome.COMPLETED

    async def test_who_waits_in_line_owns_nothing(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        job_id = await parts.add()
        async with _only_turn_taken(parts):
            waiting = asyncio.create_task(parts.run(job_id))
            await asyncio.sleep(0.1)
            assert (await parts.job(job_id)).status is JobStatus.PENDING
            await parts.repository.cancel(job_id)
        assert (await waiting).outcome is Outcome.SKIPPED
        assert replicate.creates() == []

    async def test_none_is_begun_while_too_many_are_not_stored(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.jobs.backpressure.UNSTORED_LIMIT", 1)
        storing, go_on = asyncio.Event(), asyncio.Event()
        keep = parts.keeper.keep

        async def slow(*args: Any) -> Any:
            storing.set()
            await go_on.wait()
            return await keep(*args)

        monkeypatch.setattr(parts.keeper, "keep", slow)
        first = asyncio.create_task(parts.run(await parts.add()))
        await storing.wait()
        second = asyncio.create_task(parts.run(await parts.add()))
        await asyncio.sleep(0.3)
        assert len(replicate.creates()) == 1
        go_on.set()
        assert {(await run).outcome for run in (first, second)} == {Outcome.COMPLETED}

    async def test_nor_while_too_many_can_not_be_stored(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.jobs.backpressure.UNSTORED_LIMIT", 2)
        monkeypatch.setattr("app.jobs.backpressure.REMEMBERED_SECONDS", 3)
        ids = [await parts.add() for _ in range(3)]
        with monkeypatch.context() as full:
            full.setattr("app.storage.local._move_durably", Mock(side_effect=OSError(28, "full")))
            for job_id in ids[:2]:
                assert (await parts.run(job_id)).error_code == "storage_unavailable"
            third = asyncio.create_task(parts.run(ids[2]))
            await asyncio.sleep(0.2)
            assert len(replicate.creates()) == 2
            # Whoever is paid for is tried again all the same.
            assert (await parts.run(ids[0], at_once=True)).error_code == "storage_unavailable"
        for job_id in ids[:2]:
            assert (await parts.run(job_id, at_once=True)).outcome is Outcome.COMPLETED
        assert (await third).outcome is Outcome.COMPLETED


@asynccontextmanager
async def _only_turn_taken(parts: Parts) -> AsyncIterator[None]:
    """Have room for one job to be begun, and that one taken."""
    parts.lifecycle._turns = asyncio.Semaphore(1)
    async with parts.lifecycle._turns:
        yield


class TestPausedWorker:
    async def test_no_create_follows_a_long_pause_after_a_cancel(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await parts.add()
        begin = parts.repository.begin_attempt

        async def begin_then_pause(*args: Any) -> Any:
            attempt = await begin(*args)
            await parts.repository.cancel(job_id)
            return attempt

        monkeypatch.setattr(parts.repository, "begin_attempt", begin_then_pause)
        monkeypatch.setattr(submission, "SUBMIT_WINDOW_SECONDS", 0)
        assert (await parts.run(job_id)).outcome is Outcome.SKIPPED
        assert replicate.creates() == []


class TestMissing:
    async def test_one_404_does_not_end_a_paid_job(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=2)
        replicate.push_fault("get", "status", status=404, times=2)
        job_id = await parts.add()
        assert (await parts.run(job_id)).outcome is Outcome.COMPLETED

    async def test_many_do_and_leave_it_to_be_stopped(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.jobs.watch.MISSING_SECONDS", 0.2)
        replicate.configure(latency_seconds=60)
        replicate.push_fault("get", "status", status=404, times=None)
        job_id = await parts.add()
        assert (await parts.run(job_id)).error_code == "prediction_not_found"
        [orphan] = await parts.repository.take_orphans(10)
        assert orphan.attempt.job_id == job_id


class TestCrashCount:
    async def test_a_database_that_fails_is_no_crash(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(submission, "RECORD_PAUSE_SECONDS", 0)
        end, failures = parts.repository.end_decoding, [ConnectionRefusedError()] * 3

        async def failing(*args: Any) -> None:
            if failures:
                raise failures.pop()
            await end(*args)

        monkeypatch.setattr(parts.repository, "end_decoding", failing)
        job_id = await parts.add(output_format="webp")
        assert (await parts.run(job_id)).outcome is Outcome.COMPLETED
        assert (failures, (await parts.job(job_id)).crash_count) == ([], 0)

    async def test_nor_is_one_whose_answer_is_lost(
        self, parts: Parts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin = parts.repository.begin_decoding

        async def unheard(*args: Any) -> None:
            await begin(*args)
            raise ConnectionResetError

        job_id = await parts.add(output_format="webp")
        with monkeypatch.context() as patch:
            patch.setattr(parts.repository, "begin_decoding", unheard)
            assert await parts.run(job_id) == RunResult(Outcome.RETRY, "internal_error", 0)
        assert (await parts.job(job_id)).crash_count == 0
        assert await parts.run_to_the_end(job_id) == ["completed"]


class TestDeadlines:
    @pytest.mark.parametrize("stuck_in", ["starting", "processing", "meditating"])
    async def test_an_overdue_prediction_is_cancelled(
        self, parts: Parts, replicate: ReplicateServer, stuck_in: str
    ) -> None:
        replicate.push_fault("create", "status_sequence", sequence=[[0, stuck_in]], times=None)
        parts.watcher._starting_seconds = parts.watcher._running_seconds = 0.2
        job_id = await parts.add()
        await parts.run(job_id)
        [create, *_] = replicate.creates()
        assert create.cancel_calls
        job = await parts.job(job_id)
        assert job.error_code in ("prediction_canceled", "prediction_aborted")

    async def test_one_that_cannot_be_ended_is_given_up_with_words(
        self, parts: Parts, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.jobs.watch.CANCEL_GRACE_SECONDS", 0.2)
        replicate.push_fault("cancel", "status", status=404, times=None)
        replicate.configure(latency_seconds=60)
        parts.watcher._running_seconds = 0.2
        job_id = await parts.add()
        assert (await parts.run(job_id)).outcome is Outcome.FAILED
        job = await parts.job(job_id)
        assert job.error_code == "prediction_deadline_exceeded"
        assert job.error_message == "The prediction neither ended in time nor could be canceled."

    async def test_the_provider_is_told_the_deadline(
        self, parts: Parts, replicate: ReplicateServer
    ) -> None:
        await parts.run(await parts.add())
        assert replicate.creates()[0].headers["cancel-after"] == "60s"
