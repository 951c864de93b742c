"""The state machine: workers, clients, sweeps and a provider in any order, on the real SQL.

A run does what `Lifecycle` does, one step per rule, so any other step can come in between: that is
a pause, and a run whose job was taken away meanwhile is a zombie. Time stands still but for
`time_passes`, and all durations are such that one passage of time is longer than any wait that is
meant to be over by then.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from uuid import UUID, uuid4

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.errors import FailureClass, LeaseLost, ProviderError
from app.jobs.lifecycle import _phase_to_keep
from app.jobs.models import Attempt, Charged, JobPhase, JobStatus, Output
from app.jobs.repository import MAX_CRASHES, Claim, JobRepository, NewJob
from app.jobs.retry import RetryPolicy, decide
from app.jobs.settlement import Settlement
from app.providers.base import PredictionRequest
from tests.faults.machine_database import Database, check_change, check_rows
from tests.faults.machine_provider import Call, Created, Ledger

T = TypeVar("T")

# In seconds of the machine's time. A call is under way for one passage of time at most, and the
# grace is longer than the window in which a call begins plus the time that it is under way.
SUBMIT_WINDOW = 1000
PASSAGE = 1100
GRACE = 3000
GIVE_UP = 6000
LEASE = 1000
INTERNAL_DELAY = 500
QUEUE_DEADLINES = (1500, 100_000)
JOB_DEADLINES = (4000, 100_000)
POLICY = RetryPolicy(max_retries=2, backoff_factor=300, backoff_max_seconds=500, grace_seconds=0)

WORKERS = 3
MOST_JOBS = 4
MOST_CANCELS = 3
MODEL = "a/b"
CALL_ENDS = {"refused": "refused", "throttled": "throttled", "dropped": "dropped"}
PREDICTION_ENDS = {"refused": "canceled", "throttled": "failed", "dropped": "failed"}
AFTER_A_CANCEL = "a create was sent after a confirmed cancel"

# What may happen, and how often.
STEPS = [
    *["go_on"] * 14,
    "add",
    "cancel",
    "time_passes",
    "beat",
    "die",
    "hand_back",
    "release",
    "release_dead",
    "finish_cancels",
    "expire",
    "fail_poisoned",
    "ring",
    "deliver",
    "report",
    "stop_orphans",
    "give_orphans_up",
]

# Which of the things at hand: modulo their number.
which = st.integers(0, 11)
twists = st.sampled_from(["none", "none", "none", "refused", "throttled", "dropped"])
one_worker = st.integers(0, WORKERS - 1)


@dataclass(eq=False)
class Run:
    """One worker's run of one job: `stage` says what it does next."""

    worker: int
    claim: Claim
    stage: str
    attempt: Attempt | None
    intended_at: int = 0
    call: Call | None = None
    created: Created | None = None
    found: Sequence[Created] | None = None

    @property
    def job_id(self) -> UUID:
        return self.claim.job.id

    @property
    def open_attempt(self) -> Attempt:
        assert self.attempt is not None
        return self.attempt

    @property
    def is_waiting(self) -> bool:
        """True while only time or the provider can bring it on."""
        if self.stage == "outwaiting":
            return True
        if self.stage == "calling":
            return self.call is not None and not self.call.is_over
        return self.stage == "waiting" and not self.prediction.is_terminal

    @property
    def prediction(self) -> Created:
        assert self.created is not None
        return self.created


@dataclass
class World:
    """What outlives one program: the loop, the repository, the second pair of eyes."""

    runner: asyncio.Runner
    repository: JobRepository
    database: Database
    on_unknown_outcome: str = "fail"
    steps: dict[str, int] = field(default_factory=dict)  # how often what was reached


class JobsMachine(RuleBasedStateMachine):
    """Any interleaving keeps the promises; see `check` for which."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.repository = self.world.repository
        self.ledger = Ledger()
        self.now = 0
        self.runs: list[Run] = []
        self.calls: list[Call] = []
        self.groups: dict[UUID, int] = {}  # jobs of one group send the same input
        self.shared: set[int] = set()
        self.workers: list[UUID] = []
        self.heard_at: dict[UUID, int] = {}
        self.cancels = 0
        self.cancelled: set[UUID] = set()
        self.world.database.forget()
        self.seen = self.world.database.see()
        self.before = self.seen

    # --- clients -----------------------------------------------------------------------------

    @initialize(deadline=st.sampled_from(QUEUE_DEADLINES))
    def start(self, deadline: int) -> None:
        """Begin with workers that live and a job: nothing else can happen before."""
        self.workers = [uuid4() for _ in range(WORKERS)]
        for worker in range(WORKERS):
            self.beat(worker)
        self._add(deadline, group=0)

    def add(self, deadline: int, *, twin: bool) -> None:
        """Add a job, perhaps with exactly the input of the last one."""
        if len(self.groups) == MOST_JOBS:
            return
        group = max(self.groups.values()) + (not twin)
        if twin:
            self.shared.add(group)
        self._add(deadline, group)

    def _add(self, deadline: int, group: int) -> None:
        job = self.do(self.repository.add(NewJob("p", MODEL, {}), deadline))
        self.groups[job.id] = group

    def cancel(self, n: int) -> None:
        """Ask for a cancel, or ask again."""
        if self.cancels == MOST_CANCELS or not self.unfinished():
            return
        self.cancels += 1
        job_id = self.pick(self.unfinished(), n)
        has_open_attempt = bool(self.seen.open_attempts(job_id))
        job = self.do(self.repository.cancel(job_id))
        assert job is not None
        assert job.status is JobStatus.CANCELLED or has_open_attempt
        self.count(f"cancel: {job.status}")
        self.note_cancels()

    def unfinished(self) -> list[UUID]:
        """Return the jobs that have not ended."""
        return [id_ for id_, job in self.seen.jobs.items() if job["completed_at"] is None]

    # --- messages, and one run step by step --------------------------------------------------

    @rule(what=st.sampled_from(STEPS), n=which, twist=twists, worker=one_worker)
    def step(self, what: str, n: int, twist: str, worker: int) -> None:
        """Anything happens. (As rules of their own, most programs would have too few of each.)"""
        if what == "go_on":
            self.go_on(n, twist, worker)
        elif what == "add":
            self.add(QUEUE_DEADLINES[n % 2], twin=twist == "none")
        elif what in ("beat", "die", "hand_back"):
            getattr(self, what)(worker)
        elif what in ("cancel", "release", "report"):
            getattr(self, what)(n)
        elif what == "deliver":
            self.deliver(n, worker)
        else:
            getattr(self, what)()

    def go_on(self, n: int, twist: str, worker: int) -> None:
        """What waits to happen, to a job, a run, a call or a prediction, happens well or badly."""
        running = [created for created in self.ledger.creates if not created.is_terminal]
        runs = self.ready()
        match self.pick([*runs, *self.free_jobs(), *self.calls, *running] or [None], n):
            case Run() as run:
                self.advance(run, smooth=twist == "none")
            case Call() as call:
                self._arrive(call, CALL_ENDS.get(twist, "accepted"))
            case Created() as created:
                created.end(PREDICTION_ENDS.get(twist, "succeeded"))
            case UUID() as job_id:
                self._claim(job_id, worker, JOB_DEADLINES[twist == "none"])

    def deliver(self, n: int, worker: int) -> None:
        """A message arrives for any job: early, late or twice."""
        self._claim(self.pick(list(self.groups), n), worker, JOB_DEADLINES[-1])

    def free_jobs(self) -> list[UUID]:
        """Return the jobs that may be claimed now."""
        return [
            job_id
            for job_id, job in self.seen.jobs.items()
            if job["status"] in ("pending", "processing")
            and (job["worker_id"], job["cancel_requested_at"]) == (None, None)
            and job["is_due"]
            and not job["is_late"]
            and job["crash_count"] < MAX_CRASHES
        ]

    def _claim(self, job_id: UUID, worker: int, deadline: int) -> None:
        expected = job_id in self.free_jobs()
        claim = self.do(self.repository.claim(job_id, self.workers[worker], deadline))
        assert (claim is not None) == expected
        if claim is not None:
            self._start_run(worker, claim)

    def _start_run(self, worker: int, claim: Claim) -> None:
        attempt = claim.attempt
        run = Run(worker, claim, "fresh", attempt)
        if attempt is not None and attempt.prediction_id is None:
            is_young = claim.attempt_age_seconds < SUBMIT_WINDOW
            may_still_be_sent = is_young and claim.job.phase is JobPhase.SUBMITTING
            run.stage = "outwaiting" if may_still_be_sent else "reconciling"
        elif attempt is not None:
            assert attempt.prediction_id is not None
            run.stage, run.created = "waiting", self.ledger.by_id(attempt.prediction_id)
        self.runs.append(run)
        self.count(f"claimed {run.stage}")

    def advance(self, run: Run, *, smooth: bool = True) -> None:
        """Let a run take its next step, unless it has to wait."""
        if run.stage != "over" and not run.is_waiting:
            getattr(self, f"_when_{run.stage}")(run, smooth=smooth)

    def ready(self) -> list[Run]:
        """Return the runs that have something to do; the others wait for the provider."""
        return [run for run in self.runs if run.stage != "over" and not run.is_waiting]

    def _when_fresh(self, run: Run, *, smooth: bool) -> None:
        """Commit the intent; only then may the create be sent."""
        request = PredictionRequest(MODEL, self._input(run.job_id), 60)
        run.intended_at = self.now
        begin = self.repository.begin_attempt(run.claim.lease, "x", request)
        attempt = self.write(run, begin, paying=True)
        if attempt is not None:
            run.attempt, run.stage = attempt, "intent"
            run.claim.attempt, run.claim.job.phase = attempt, JobPhase.SUBMITTING

    def _input(self, job_id: UUID) -> dict[str, Any]:
        group = self.groups[job_id]
        seed = f"client's {group}" if group in self.shared else str(uuid4())
        return {"prompt": "p", "seed": seed}

    def _when_intent(self, run: Run, *, smooth: bool) -> None:
        """Send the create in the window that the intent opens; after it, ask first."""
        if not smooth:
            settlement = Settlement(run.open_attempt.id, None, "provider_unreachable", Charged.NO)
            self.conclude(run, FailureClass.TRANSIENT, settlement)
        elif self.may_send(run):
            self.send(run)
        else:
            settlement = Settlement(run.open_attempt.id, None, "create_called_off", Charged.NO)
            self.conclude(run, FailureClass.INTERNAL, settlement)

    def may_send(self, run: Run) -> bool:
        """Ask, unless the window of the intent is still open."""
        if self.now - run.intended_at <= SUBMIT_WINDOW:
            return True
        run.intended_at = self.now
        lease, attempt = run.claim.lease, run.open_attempt
        may = self.do(self.repository.may_still_submit(lease, attempt.id))
        self.count(f"late for sending: {may}")
        return may

    def send(self, run: Run) -> None:
        """The create leaves; it is under way until it arrives or is lost."""
        attempt = run.open_attempt
        assert run.job_id not in self.cancelled, AFTER_A_CANCEL
        [row] = [a for a in self.seen.attempts[run.job_id] if a["id"] == str(attempt.id)]
        assert row["state"] == "intent", "a create was sent for an attempt that is over"
        run.call = Call(run.job_id, attempt.id, attempt.input)
        run.stage = "calling"
        self.calls.append(run.call)

    def _arrive(self, call: Call, how: str) -> None:
        """The provider gets the create, or the network loses it."""
        self.calls.remove(call)
        call.is_over = True
        self.count(f"create {how}")
        if how == "accepted":
            call.answer = self.ledger.accept(call)
        elif how != "dropped":
            call.answer = how

    def _when_calling(self, run: Run, *, smooth: bool) -> None:
        """The worker hears of its create, or only that the connection broke."""
        assert run.call is not None
        answer = run.call.answer if smooth else None
        charged_nothing = Settlement(run.open_attempt.id, None, str(answer), Charged.NO)
        if isinstance(answer, Created):
            run.created, run.stage = answer, "answered"
        elif answer == "refused":
            self.conclude(run, FailureClass.PERMANENT, charged_nothing)
        elif answer == "throttled":
            self.conclude(run, FailureClass.THROTTLED, charged_nothing)
        else:
            self.count("answer lost")
            self.conclude(run, FailureClass.AMBIGUOUS)

    def _when_answered(self, run: Run, *, smooth: bool) -> None:
        """Commit the id that the create gave."""
        created, attempt = run.prediction, run.open_attempt
        recorded = self._record(run, created)
        if recorded:
            return
        # Whoever has the job now must know of it; what belongs to nobody is stopped.
        self.do(self.repository.adopt(attempt.id, created.seen()))
        if not self.do(self.repository.is_known("x", created.id)):
            self.count("nobody's")
            created.end("canceled")
        if recorded is False:
            self.count("id is another's")
            self.conclude(run, FailureClass.AMBIGUOUS)

    def _record(self, run: Run, created: Created) -> Any:
        """Return whether the id is ours; None when the job is not."""
        lease, attempt = run.claim.lease, run.open_attempt
        recorded = self.write(
            run,
            self.repository.record_prediction(lease, attempt.id, created.seen()),
            cancelling=True,
        )
        if recorded:
            run.created, run.stage = created, "waiting"
            attempt.prediction_id = created.id
        return recorded

    def _when_reconciling(self, run: Run, *, smooth: bool) -> None:
        """Ask the provider what became of the create that nobody answers for."""
        if smooth:
            run.found, run.stage = list(self.ledger.find(run.open_attempt.input)), "reconciled"
        elif run.claim.attempt_age_seconds < GIVE_UP:
            self.conclude(run, FailureClass.INTERNAL)
        else:
            self.count("outcome unknown")
            self.conclude(run, FailureClass.PERMANENT)  # left open: the sweep looks for it

    def _when_reconciled(self, run: Run, *, smooth: bool) -> None:
        """Adopt what was found, wait while it may still arrive, or begin anew."""
        for created in run.found or ():
            recorded = self._record(run, created)
            if recorded is not False:
                self.count("adopted" if recorded else "adopted too late")
                return
        if run.claim.attempt_age_seconds < GRACE:
            self.conclude(run, FailureClass.AMBIGUOUS)
            return
        self.count("proven absent")
        settlement = Settlement(run.open_attempt.id, None, "absent", Charged.NO)
        self.conclude(run, FailureClass.TRANSIENT, settlement)

    def _when_waiting(self, run: Run, *, smooth: bool) -> None:
        """A poll shows how the prediction ended."""
        created, attempt = run.prediction, run.open_attempt
        if created.status == "succeeded":
            run.stage = "succeeded"
            return
        platform = created.status == "failed"
        failure = FailureClass.TRANSIENT if platform else FailureClass.PERMANENT
        self.conclude(
            run, failure, Settlement(attempt.id, created.id, created.status, Charged.UNKNOWN)
        )

    def _when_succeeded(self, run: Run, *, smooth: bool) -> None:
        """The checkpoint before each file."""
        if self.write(run, self.repository.begin_storing(run.claim.lease), done=True):
            run.stage = "decoding"

    def _when_decoding(self, run: Run, *, smooth: bool) -> None:
        """Should the worker die now, it will have been this job's doing."""
        beginning = self.repository.begin_decoding(run.claim.lease, run.claim.job.crash_count + 1)
        if self.write(run, beginning, done=True):
            run.stage = "decoded"

    def _when_decoded(self, run: Run, *, smooth: bool) -> None:
        """It was not; but only who has the job may say so."""
        job = self.seen.jobs[run.job_id]
        is_ours = (job["lease_token"], job["status"]) == (str(run.claim.lease.token), "processing")
        self.do(self.repository.end_decoding(run.claim.lease, run.claim.job.crash_count))
        taken_back = job["crash_count"] - self.seen.jobs[run.job_id]["crash_count"]
        assert taken_back == is_ours
        run.stage = "storing"

    def _when_storing(self, run: Run, *, smooth: bool) -> None:
        """Every file is durable; or else the disk is full, and the attempt goes on."""
        if not smooth:
            self.conclude(run, FailureClass.INTERNAL)
            return
        output = Output(
            job_id=run.job_id,
            index=0,
            name=f"{run.job_id}.png",
            media_type="image/png",
            size_bytes=1,
            sha256="0" * 64,
        )
        settlement = Settlement(run.open_attempt.id, run.prediction.id, "succeeded", Charged.YES)
        lease = run.claim.lease
        completing = self.repository.complete(lease, [output], settlement)
        if self.write(run, completing, known=settlement, done=True):
            self.count("completed")
        run.stage = "over"

    def conclude(
        self, run: Run, failure: FailureClass, settlement: Settlement | None = None
    ) -> None:
        """Decide by the service's own rules, and write it: the run is over."""
        job, lease = run.claim.job, run.claim.lease
        error = ProviderError(failure, "code", "message")
        decision = decide(
            error,
            retry_count=job.retry_count,
            throttle_count=job.throttle_count,
            policy=POLICY,
            jitter=0,
        )
        words: dict[str, Any] = {"error_code": "code", "error_message": "message"}
        known: Settlement | Attempt | None = settlement
        if decision is None:
            known = settlement or run.claim.attempt
            writing = self.repository.fail(
                lease, **words, settlement=settlement, left_open=run.claim.attempt
            )
        else:
            writing = self.repository.retry_later(
                lease,
                delay_seconds=decision.delay_seconds,
                **words,
                retries=decision.retries,
                throttles=decision.throttles,
                phase=None if settlement else _phase_to_keep(run.claim, error),
                settlement=settlement,
            )
        self.write(run, writing, known=known, done=True)
        run.stage = "over"

    # --- workers, sweeps and reports ---------------------------------------------------------

    def beat(self, worker: int) -> None:
        """A heartbeat."""
        worker_id = self.workers[worker]
        self.do(self.repository.heartbeat(worker_id, "x", 1, LEASE))
        self.heard_at[worker_id] = self.now

    def die(self, worker: int) -> None:
        """kill -9: its runs do nothing any more, its calls go on; another one starts."""
        self._forget_runs(worker)
        self.workers[worker] = uuid4()
        self.beat(worker)

    def hand_back(self, worker: int) -> None:
        """SIGTERM; its calls may still arrive."""
        self.do(self.repository.hand_back(self.workers[worker]))
        del self.heard_at[self.workers[worker]]
        self.die(worker)

    def _forget_runs(self, worker: int) -> None:
        self.runs = [run for run in self.runs if run.worker != worker and run.stage != "over"]

    def release_dead(self) -> None:
        """Jobs are taken from silent workers, and from nobody else."""
        freed = set(self.do(self.repository.release_dead(LEASE)))
        silent = {
            job_id
            for job_id, job in self.before.jobs.items()
            if job["worker_id"] is not None
            and self.heard_at.get(UUID(job["worker_id"]), -LEASE - 1) < self.now - LEASE
        }
        assert freed == silent
        if freed:
            self.count("taken from the silent")

    def release(self, n: int) -> None:
        """A run broke down (its database went away, say); the worker gives its job up."""
        for run in self.runs[n % MOST_JOBS :][:1]:
            self.do(self.repository.release(run.claim.lease))
            run.stage = "over"

    def finish_cancels(self) -> None:
        """The sweep ends what was to be cancelled."""
        self.do(self.repository.finish_cancels())
        self.note_cancels()

    def expire(self) -> None:
        """Only jobs past their deadline fail by it."""
        expired = set(self.do(self.repository.expire(100)))
        late = {
            job_id
            for job_id, job in self.before.jobs.items()
            if job["is_late"] and job["status"] in ("pending", "processing")
        }
        assert expired == late
        if expired:
            self.count("expired")

    def fail_poisoned(self) -> None:
        """Only jobs that crashed their workers again and again."""
        for job_id in self.do(self.repository.fail_poisoned(100)):
            assert self.before.jobs[job_id]["crash_count"] >= 3
            self.count("poisoned")

    def ring(self) -> None:
        """Only jobs without an owner are rung for."""
        for job_id in self.do(self.repository.due(100)):
            assert self.before.jobs[job_id]["worker_id"] is None

    def report(self, n: int) -> None:
        """The provider's webhook names the attempt; it comes late, twice, or never."""
        for created in self.ledger.creates[n % MOST_JOBS :][:1]:
            attempt = self.do(self.repository.attempt(created.attempt_id))
            assert attempt is not None
            if attempt.prediction_id is None:
                adopted = self.do(self.repository.adopt(attempt.id, created.seen()))
                self.count("reported" if adopted else "reported beside another")

    def stop_orphans(self, *, patient: bool = True) -> None:
        """Predictions of jobs that have ended are stopped."""
        for known in (True, False):
            for orphan in self.do(self.repository.take_orphans(100, known=known)):
                self._stop_orphan(orphan.attempt, patient)

    def give_orphans_up(self) -> None:
        """Nor is one waited for that has never shown."""
        self.stop_orphans(patient=False)

    def _stop_orphan(self, attempt: Attempt, patient: bool) -> None:
        ids = [attempt.prediction_id] if attempt.prediction_id else []
        found = [] if ids else self.ledger.find(attempt.input)
        if found and self.groups[attempt.job_id] in self.shared:
            found = [] if self.do(self.repository.has_twin(attempt)) else found
        for created in found:
            if self.do(self.repository.adopt(attempt.id, created.seen())):
                ids = [created.id]
                break
        for prediction_id in ids:
            self.ledger.by_id(prediction_id).end("canceled")
        if ids or not patient:
            outcome = "canceled" if ids else "absent"
            settlement = Settlement(attempt.id, ids[0] if ids else None, outcome, Charged.UNKNOWN)
            self.do(self.repository.settle_orphan(settlement))
            self.count(f"orphan {outcome}")

    def time_passes(self) -> None:
        """Every wait is over; a call that was under way has not arrived."""
        for call in self.calls:
            call.is_over = True
        self.calls = []
        for run in self.runs:
            run.stage = "reconciling" if run.stage == "outwaiting" else run.stage
        self.now += PASSAGE
        self.world.database.pass_time(PASSAGE)
        self.seen = self.world.database.see()

    # --- what must hold ----------------------------------------------------------------------

    def check(self) -> None:
        """Rows agree with each other and with the ledger, and changed only as they may."""
        check_rows(self.seen, POLICY.max_retries)
        check_change(self.before, self.seen)
        for job_id, job in self.seen.jobs.items():
            self._check_job(job_id, job)

    def _check_job(self, job_id: UUID, job: dict[str, Any]) -> None:
        counted = job["retry_count"] + job["throttle_count"]
        assert len(self.seen.attempts[job_id]) <= 1 + counted
        if job["status"] == "completed":
            assert self.ledger.by_id(job["external_job_id"]).status == "succeeded"

    @invariant()
    def nothing_is_paid_twice(self) -> None:
        """Creates that were not reported as without a result: one per job at most."""
        for group in set(self.groups.values()):
            members = [job_id for job_id, of in self.groups.items() if of == group]
            assert self.ledger.paid_for(members) <= len(members), "paid twice"

    def teardown(self) -> None:
        """Nothing is lost: once all is well, every job ends."""
        if not self.workers:
            return
        for _ in range(30):
            if all(job["completed_at"] for job in self.seen.jobs.values()):
                break
            self._one_good_round()
            self.nothing_is_paid_twice()
        statuses = [job["status"] for job in self.seen.jobs.values()]
        assert set(statuses) <= {"completed", "failed", "cancelled"}, statuses

    def _one_good_round(self) -> None:
        self.time_passes()
        for worker in range(WORKERS):
            self.die(worker)
        for duty in (self.release_dead, self.finish_cancels, self.expire, self.fail_poisoned):
            duty()
        for job_id in self.free_jobs():
            self._claim(job_id, 0, JOB_DEADLINES[-1])
        for run in self.runs:
            while run.stage not in ("over", "outwaiting"):
                self._one_good_step(run)

    def _one_good_step(self, run: Run) -> None:
        if run.call in self.calls:
            self._arrive(run.call, "accepted")
        if run.stage == "waiting":
            run.prediction.end("succeeded")
        self.advance(run)

    # --- tools -------------------------------------------------------------------------------

    def do(self, calling: Coroutine[Any, Any, T]) -> T:
        """Run one of the repository's coroutines."""
        try:
            return self.world.runner.run(calling)
        finally:
            self.before, self.seen = self.seen, self.world.database.see()
            self.check()

    def write(
        self,
        run: Run,
        writing: Coroutine[Any, Any, T],
        *,
        cancelling: bool = False,
        paying: bool = False,
        known: Settlement | Attempt | None = None,
        done: bool | None = None,
    ) -> Any:
        """Write in a run's name: it succeeds if and only if the job is still the run's, and the
        attempt that it settles, or leaves open, as the run knows it.

        Returns what `writing` does (or `done`), None when the lease is lost.
        """
        job = self.seen.jobs[run.job_id]
        is_last_claim = job["lease_token"] == str(run.claim.lease.token)
        allowed = is_last_claim and job["status"] == "processing"
        allowed = allowed and (cancelling or job["cancel_requested_at"] is None)
        allowed = allowed and not (paying and job["is_late"])
        allowed = allowed and self._is_as_known(run, known)
        before = self.seen.of(run.job_id)
        result = None
        try:
            result = self.do(writing)
            assert allowed, "written without a lease"
        except LeaseLost:
            assert not allowed, "the lease was good"
            assert is_last_claim or self.seen.of(run.job_id) == before, "a zombie wrote"
            self.count("lease lost")
            run.stage = "over"
            return None
        return result if done is None else done

    def _is_as_known(self, run: Run, known: Settlement | Attempt | None) -> bool:
        """False when the provider's report has given the attempt a prediction meanwhile."""
        if known is None:
            return True
        attempt_id = known.attempt_id if isinstance(known, Settlement) else known.id
        [row] = [a for a in self.seen.attempts[run.job_id] if a["id"] == str(attempt_id)]
        as_known: bool = row["prediction_id"] == known.prediction_id
        if not as_known:
            self.count("reported meanwhile")
        return as_known

    def note_cancels(self) -> None:
        """Remember whose cancel is confirmed: from now on nothing may be created for it."""
        self.cancelled |= {
            job_id for job_id, job in self.seen.jobs.items() if job["status"] == "cancelled"
        }

    def pick(self, things: Sequence[T], n: int) -> T:
        """Return one of them."""
        return things[n % len(things)]

    def count(self, what: str) -> None:
        """Note that the programs do get there."""
        self.world.steps[what] = self.world.steps.get(what, 0) + 1
