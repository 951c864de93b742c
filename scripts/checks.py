"""What the three checks of a running service share: its client, a readable report, ended jobs."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import httpx
from rich.console import Console

DEFAULT_URL = "http://localhost:8000"
PROBLEM_JSON = "application/problem+json"
TERMINAL = ("completed", "failed", "cancelled")
JOB_SECONDS = 300.0
POLL_SECONDS = 0.2
TRIES = 3
LOOPBACK = ("localhost", "127.0.0.1", "::1")

P = ParamSpec("P")
T = TypeVar("T")
Job = dict[str, Any]  # as the API tells it


class CheckFailed(Exception):
    """Something is not as it should be; the message says what."""


class _Stop(Exception):
    """A check failed without which the others make no sense."""


class Report:
    """A list of checks as they pass or fail, printed with the time that each has taken."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._started_at = time.monotonic()
        self._passed = self._failed = 0

    def check(self, name: str, body: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run one check and print how it went; return what it returns, or None if it failed."""
        started_at = time.monotonic()
        try:
            with self._console.status(name):
                result = body(*args, **kwargs)
        except Exception as error:
            # A surprise (an answer that lacks a field, say) is a failed check like any other.
            self._failed += 1
            self._console.print(f"✗ {name} ({_since(started_at)})", style="red")
            self._console.print(f"    {_reason(error)}", style="red")
            return None
        self._passed += 1
        self._console.print(f"✓ {name} ({_since(started_at)})")
        return result

    def need(self, name: str, body: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a check without which the others make no sense: they are left out when it fails."""
        failed = self._failed
        result = self.check(name, body, *args, **kwargs)
        if result is None or self._failed > failed:
            raise _Stop
        return result

    def note(self, text: str) -> None:
        """Print what is worth knowing about the check under way."""
        self._console.print(f"    {text}", style="yellow")

    def summary(self) -> int:
        """Print how many checks passed; return the exit code, 0 when all of them did."""
        style = "red" if self._failed else "green"
        counts = f"{self._passed} passed, {self._failed} failed"
        self._console.print(f"{counts} ({_since(self._started_at)})", style=style)
        return 1 if self._failed else 0


def run(
    description: str | None,
    checks: Callable[[httpx.Client, Report], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the checks against the service that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url", nargs="?", type=_url, default=DEFAULT_URL, help="of the service")
    url: httpx.URL = parser.parse_args(arguments).url
    report = Report()
    # A proxy of the environment cannot reach this machine's loopback address.
    # Files in a bucket are fetched there, so redirects are followed.
    trusting = url.host not in LOOPBACK
    with httpx.Client(
        base_url=url, timeout=30, trust_env=trusting, follow_redirects=True
    ) as client:
        try:
            client.get("/health")
        except httpx.HTTPError as error:
            print(f"No service answers at {url}: {_reason(error)}", file=sys.stderr)
            print("Start it with ./scripts/quickstart.sh or docker compose up -d.", file=sys.stderr)
            return 1
        try:
            checks(client, report)
        except _Stop:
            report.note("The other checks need this one and were left out.")
    return report.summary()


def _url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(f"{text} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{text} must be a URL like {DEFAULT_URL}")
    return url


def _since(started_at: float) -> str:
    seconds = time.monotonic() - started_at
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _reason(error: Exception) -> str:
    if isinstance(error, CheckFailed):
        return str(error)
    if isinstance(error, httpx.HTTPError):
        return f"{type(error).__name__}: {error}"
    return f"The answer is not what was expected ({type(error).__name__}: {error})."


def expect(condition: object, message: str) -> None:
    """Raises: CheckFailed with the message, unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def expect_status(answer: httpx.Response, status: int) -> None:
    """Raises: CheckFailed unless the answer has this status."""
    asked = f"{answer.request.method} {answer.request.url.raw_path.decode()}"
    said = "" if answer.is_success else f": {' '.join(answer.text.split())[:300]}"
    expect(
        answer.status_code == status,
        f"{asked} answered {answer.status_code} instead of {status}{said}",
    )


def expect_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the body of an error answer in the one shape that all errors have (RFC 9457).

    Raises: CheckFailed.
    """
    expect_status(answer, status)
    media_type = answer.headers.get("content-type", "")
    expect(media_type.startswith(PROBLEM_JSON), f"The error came as {media_type!r}.")
    body: dict[str, Any] = answer.json()
    missing = {"type", "title", "status", "detail"} - body.keys()
    expect(not missing, f"The error lacks {', '.join(sorted(missing))}.")
    expect(body["status"] == status, f"The error's own status is {body['status']}.")
    if status == 422:
        faults = body.get("errors")
        expect(faults, "The error does not say which fields are wrong.")
        expect(all(fault["path"] and fault["message"] for fault in faults or ()), f"{faults}")
    return body


def create_job(client: httpx.Client, **body: Any) -> Job:
    """POST a job and return it. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.post("/api/v1/generate", json=body)
    expect_status(answer, 201)
    job: Job = answer.json()
    return job


def read_job(client: httpx.Client, job_id: str) -> Job:
    """Return the job as it is now. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.get(f"/api/v1/status/{job_id}")
    expect_status(answer, 200)
    job: Job = answer.json()
    return job


def ended_job(client: httpx.Client, job: Job) -> Job:
    """Return the job once it has ended, in whichever way. Raises: CheckFailed, httpx.HTTPError."""
    deadline = time.monotonic() + JOB_SECONDS
    while job["status"] not in TERMINAL:
        expect(
            time.monotonic() < deadline,
            f"Job {job['id']} is still {job['status']} after {JOB_SECONDS:.0f} s;"
            f" its last error: {job['error_message']}",
        )
        time.sleep(POLL_SECONDS)
        job = read_job(client, job["id"])
    return job


def completed_job(client: httpx.Client, report: Report, **body: Any) -> Job:
    """Create a job and return it completed; try again when the mock failed it by design.

    Raises: CheckFailed, httpx.HTTPError.
    """
    for _ in range(TRIES):
        job = ended_job(client, create_job(client, **body))
        if job["status"] == "completed":
            return job
        expect(
            is_simulated_failure(job),
            f"Job {job['id']} ended {job['status']}: {job['error_message']}",
        )
        report.note(f"Job {job['id']} failed by design ({job['error_message']}): another one.")
    raise CheckFailed(f"{TRIES} jobs failed by design: lower REPLICATE_MOCK_FAILURE_RATE.")


def is_simulated_failure(job: Job) -> bool:
    """Tell whether the mock failed the job on purpose (REPLICATE_MOCK_FAILURE_RATE)."""
    return job["status"] == "failed" and "simulated" in (job["error_message"] or "").lower()


def living_worker(client: httpx.Client) -> int:
    """Return how many workers are alive. Raises: CheckFailed when none is, httpx.HTTPError."""
    answer = client.get("/health/detailed")
    expect_status(answer, 200)
    count: int = answer.json()["checks"]["workers"]["count"]
    expect(count > 0, "No worker is alive: start one, or jobs stay pending.")
    return count
