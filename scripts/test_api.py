"""Checks every endpoint of a running service and the shape of its errors; waits for no picture.

It creates a few jobs and cancels them at once. Usage:
python scripts/test_api.py [http://localhost:8000]
"""

import re
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.checks import (
    CheckFailed,
    Job,
    Report,
    create_job,
    expect,
    expect_problem,
    expect_status,
    read_job,
    run,
)

GENERATE = "/api/v1/generate"
PROMPT = "A serene mountain landscape at sunset with crystal clear lake reflections"
PARAMETERS = {"width": 1024, "height": 1024, "guidance_scale": 3.5}
PARAMETERS_TEXT = '{"width": 1024, "height": 1024, "guidance_scale": 3.5}'
JOB_FIELDS = {
    *("id", "prompt", "model_name", "parameters", "status", "created_at", "updated_at"),
    *("started_at", "completed_at", "retry_count", "next_attempt_at", "error_code"),
    *("error_message", "result_url", "file_size", "external_job_id", "outputs"),
}
HEALTH = {"status": "healthy", "service": "fleek-media-service", "version": "1.0.0"}
WRONG_BODIES: dict[str, Any] = {
    "an empty prompt": {"prompt": ""},
    "no prompt": {},
    "a prompt that is a number": {"prompt": 7},
    "a prompt of 10,001 characters": {"prompt": "x" * 10_001},
    "a NUL in the prompt": {"prompt": "a\0b"},
    "a NUL in the parameters": {"prompt": PROMPT, "parameters": {"style": "a\0b"}},
    "parameters that are a list": {"prompt": PROMPT, "parameters": [1]},
    "parameters that hold no JSON": {"prompt": PROMPT, "parameters": "{width: 1024}"},
    "parameters that hold no object": {"prompt": PROMPT, "parameters": "[1024]"},
    "a field that does not exist": {"prompt": PROMPT, "colour": "red"},
    "a status of the client's": {"prompt": PROMPT, "status": "completed"},
    "a body that is a list": [PROMPT],
}
WRONG_QUERIES = (
    "limit=0",
    "limit=101",
    "limit=many",
    "offset=-1",
    "status_filter=lost",
    "cursor=x",
)


def check_api(client: httpx.Client, report: Report) -> None:
    """Every check, in order."""
    check_system(client, report)
    check_job(client, report)
    for what, body in WRONG_BODIES.items():
        report.check(f"POST refuses {what}", refused, client, 422, "POST", GENERATE, json=body)
    report.check("POST refuses what is not JSON", refused_text, client)
    report.check("POST refuses a body over the limit", refused_size, client)
    for query in WRONG_QUERIES:
        path = f"/api/v1/jobs?{query}"
        report.check(f"The list refuses {query}", refused, client, 422, "GET", path)
    check_unknown(client, report)


def check_system(client: httpx.Client, report: Report) -> None:
    """The endpoints about the service itself."""
    report.check("GET / names the service", expect_root, client)
    report.check("GET /health is the documented constant", expect_health, client)
    report.check("GET /health/detailed measures each part", expect_detailed_health, client)
    report.check("GET /metrics counts jobs (JSON)", expect_metrics, client)
    report.check("GET /metrics for Prometheus", expect_prometheus, client)
    report.check("GET /info has configuration and endpoints", expect_info, client)
    report.check("GET /openapi.json describes every endpoint", expect_openapi, client)
    for path in ("/docs", "/redoc"):
        report.check(f"GET {path} is a page", expect_page, client, path)


def check_job(client: httpx.Client, report: Report) -> None:
    """A job's life at the API: created, read, listed, cancelled."""
    job = report.need("POST creates a job (parameters as a string)", created, client)
    report.check("GET status tells the whole job", expect_status_of, client, job)
    report.check("GET jobs lists it", expect_listed, client, job)
    cancelled = report.need("DELETE cancels a job", cancelled_job, client, report)
    path = f"/api/v1/jobs/{cancelled['id']}"
    report.check("DELETE refuses a job that has ended", refused, client, 409, "DELETE", path)
    report.check("The download says why there is none", expect_no_download, client, cancelled)
    report.check("There is no metadata", refused, client, 409, "GET", f"{path}/metadata")
    report.check("The first job can be cancelled too", cancel, client, job)


def check_unknown(client: httpx.Client, report: Report) -> None:
    """What does not exist, and what is no id at all."""
    paths = {
        "status": ("GET", "/api/v1/status/{}"),
        "metadata": ("GET", "/api/v1/jobs/{}/metadata"),
        "download": ("GET", "/api/v1/download/{}"),
        "cancel": ("DELETE", "/api/v1/jobs/{}"),
    }
    for what, (method, path) in paths.items():
        unknown, malformed = path.format(uuid4()), path.format("not-an-id")
        report.check(f"An unknown id is 404 ({what})", refused, client, 404, method, unknown)
        report.check(f"A malformed id is 422 ({what})", refused, client, 422, method, malformed)
    for path in (f"/media/{uuid4()}.png", "/media/..%2f..%2fconfig.env", "/nothing/here"):
        report.check(f"GET {path} is 404", refused, client, 404, "GET", path)
    report.check("A wrong method is 405", refused, client, 405, "GET", GENERATE)


def refused(client: httpx.Client, status: int, method: str, path: str, **more: Any) -> Job:
    """Return the problem that a request is answered with. Raises: CheckFailed, httpx.HTTPError."""
    return expect_problem(client.request(method, path, **more), status)


def refused_text(client: httpx.Client) -> None:
    """Raises: CheckFailed unless a body that is not JSON is refused."""
    headers = {"content-type": "application/json"}
    refused(client, 422, "POST", GENERATE, content=b'{"prompt": ', headers=headers)


def refused_size(client: httpx.Client) -> None:
    """Raises: CheckFailed unless a body is refused that is larger than /info says."""
    limit: int = client.get("/info").json()["configuration"]["limits"]["max_body_bytes"]
    refused(client, 413, "POST", GENERATE, json={"prompt": "x" * limit})


def expect_root(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    answer = client.get("/")
    expect_status(answer, 200)
    body = answer.json()
    expect(body["service"] == "Fleek Media Service", f"The service is {body['service']!r}.")
    expect(body["version"] and body["links"], "Version or links are missing.")


def expect_health(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    answer = client.get("/health")
    expect_status(answer, 200)
    expect(answer.json() == HEALTH, f"It is {answer.text}")


def expect_detailed_health(client: httpx.Client) -> None:
    """Raises: CheckFailed unless every part is well."""
    answer = client.get("/health/detailed")
    checks: dict[str, Job] = answer.json()["checks"]
    for part in ("database", "redis", "storage", "workers"):
        expect(checks[part]["latency_ms"] >= 0, f"The {part} has no latency.")
    ill = [part for part, check in checks.items() if check["status"] != "healthy"]
    expect(not ill, f"Not healthy: {', '.join(ill)}.")
    expect_status(answer, 200)


def expect_metrics(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    answer = client.get("/metrics")
    expect_status(answer, 200)
    metrics = answer.json()["metrics"]
    expect(
        metrics["jobs_total"] == sum(metrics["jobs_by_status"].values()),
        "The total is not the sum of the statuses.",
    )


def expect_prometheus(client: httpx.Client) -> None:
    """Raises: CheckFailed unless the text format comes when it is asked for."""
    answer = client.get("/metrics", headers={"accept": "text/plain"})
    expect_status(answer, 200)
    media_type = answer.headers["content-type"]
    expect(media_type.startswith("text/plain"), f"It came as {media_type}.")
    expect("# TYPE " in answer.text, "It is no Prometheus text.")


def expect_info(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    answer = client.get("/info")
    expect_status(answer, 200)
    body = answer.json()
    missing = {"configuration", "endpoints", "monitoring"} - body.keys()
    expect(not missing, f"It lacks {', '.join(missing)}.")
    secret = re.search(r"r8_|://[^/\s]*@", answer.text)
    expect(secret is None, "It shows a token, or a URL with a password.")


def expect_openapi(client: httpx.Client) -> None:
    """Raises: CheckFailed unless every endpoint that /info names is described."""
    answer = client.get("/openapi.json")
    expect_status(answer, 200)
    described = {
        (method.upper(), path.partition("{")[0])
        for path, operations in answer.json()["paths"].items()
        for method in operations
    }
    named = client.get("/info").json()["endpoints"].values()
    wanted = {(entry.split()[0], entry.split()[1].partition("{")[0]) for entry in named}
    pages = {("GET", path) for path in ("/docs", "/redoc", "/openapi.json")}
    missing = wanted - described - pages
    expect(not missing, f"Not described: {sorted(missing)}.")


def expect_page(client: httpx.Client, path: str) -> None:
    """Raises: CheckFailed."""
    answer = client.get(path)
    expect_status(answer, 200)
    expect("text/html" in answer.headers["content-type"], "It is no page.")


def created(client: httpx.Client) -> Job:
    """Return a new job after checking its answer. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.post(GENERATE, json={"prompt": PROMPT, "parameters": PARAMETERS_TEXT})
    expect_status(answer, 201)
    job: Job = answer.json()
    expect(job["status"] == "pending", f"A new job is {job['status']}.")
    expect(job["retry_count"] == 0, f"A new job has {job['retry_count']} retries.")
    expect(job["parameters"] == PARAMETERS, f"The parameters became {job['parameters']}.")
    location = answer.headers.get("location", "")
    expect(location.endswith(f"/api/v1/status/{job['id']}"), f"Location: {location}")
    return job


def expect_status_of(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed unless the job can be read with all its fields."""
    now = read_job(client, job["id"])
    missing = JOB_FIELDS - now.keys()
    expect(not missing, f"The job lacks {', '.join(sorted(missing))}.")
    same = ("id", "prompt", "model_name", "parameters", "created_at")
    changed = [name for name in same if now[name] != job[name]]
    expect(not changed, f"Changed since it was created: {', '.join(changed)}.")


def expect_listed(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed unless the job is among the newest."""
    answer = client.get("/api/v1/jobs", params={"limit": 100})
    expect_status(answer, 200)
    expect(job["id"] in [listed["id"] for listed in answer.json()], "It is not in the list.")
    expect(int(answer.headers["x-total-count"]) >= 1, "X-Total-Count says there are none.")


def cancelled_job(client: httpx.Client, report: Report) -> Job:
    """Return a job that was cancelled. Raises: CheckFailed, httpx.HTTPError."""
    for _ in range(3):
        job = cancel(client, create_job(client, prompt=PROMPT))
        if job["status"] == "cancelled":
            return job
        report.note("The job had ended before it could be cancelled: another one.")
    raise CheckFailed("No job could be cancelled before it ended.")


def cancel(client: httpx.Client, job: Job) -> Job:
    """Return the job cancelled, or as it had ended. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.delete(f"/api/v1/jobs/{job['id']}")
    if answer.status_code == 409:
        expect_problem(answer, 409)
    else:
        expect_status(answer, 200)
        expect(answer.json()["status"] == "cancelled", f"It is {answer.json()['status']}.")
    return read_job(client, job["id"])


def expect_no_download(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed unless the answer tells the job's status."""
    problem = refused(client, 409, "GET", f"/api/v1/download/{job['id']}")
    expect(job["status"] in problem["detail"], f"It says: {problem['detail']}")


if __name__ == "__main__":
    sys.exit(run(__doc__, check_api))
