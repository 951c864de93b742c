"""Checks everything else a running service can do: metadata, lists, cancels, ranges, many at once.

It makes about eight pictures; against Replicate (a real token) they are paid ones. Usage:
python scripts/test_complete_features.py [http://localhost:8000]
"""

import hashlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.checks import (
    TRIES,
    CheckFailed,
    Job,
    Report,
    completed_job,
    create_job,
    ended_job,
    expect,
    expect_problem,
    expect_status,
    is_simulated_failure,
    living_worker,
    read_job,
    run,
)

JOBS = "/api/v1/jobs"
PROMPT = "an astronaut riding a horse on mars, hd, dramatic lighting"
PARAMETERS = {
    "width": 768,
    "height": 768,
    "scheduler": "K_EULER",
    "num_outputs": 1,
    "guidance_scale": 7.5,
    "num_inference_steps": 4,
    "seed": 7,
}
OUTPUTS = 2
AT_ONCE = 5
PAGE = 2
NEXT_LINK = re.compile(r'<([^>]+)>; rel="next"')


def check_features(client: httpx.Client, report: Report) -> None:
    """Every check, in order."""
    report.need("A worker is alive", living_worker, client)
    before = report.check("The metrics count jobs", metrics, client)
    job = report.need(
        "A job with every parameter completes",
        completed_job,
        client,
        report,
        prompt=PROMPT,
        parameters=PARAMETERS,
    )
    report.check("Its metadata has every parameter", expect_metadata, client, job)
    check_files(client, report, job)
    report.check(f"A job with {OUTPUTS} outputs keeps both", several_outputs, client, report)
    report.check(f"{AT_ONCE} jobs at once all end", concurrent_jobs, client, report)
    check_lists(client, report, job)
    check_cancel(client, report)
    if before is not None:
        report.check("The metrics have counted the jobs", expect_counted, client, before)
    report.check("The configuration shows the provider", expect_info, client)
    report.check("The documentation has examples and errors", expect_documented, client)


def check_files(client: httpx.Client, report: Report, job: Job) -> None:
    """Conditional and range requests, at both addresses of the file."""
    whole = report.need("The picture can be downloaded", download, client, job)
    paths = {
        "The download": f"/api/v1/download/{job['id']}",
        "The media file": f"/media/{job['id']}.png",
    }
    for what, path in paths.items():
        report.check(f"{what} comes in ranges", expect_range, client, path, whole)
        report.check(f"{what} gives its last bytes", expect_suffix, client, path, whole)
        report.check(f"{what} refuses what lies outside", expect_outside, client, path, whole)
        report.check(f"{what} knows an unchanged copy (304)", expect_unchanged, client, path)
        report.check(f"{what} answers HEAD", expect_head, client, path, whole)


def check_lists(client: httpx.Client, report: Report, job: Job) -> None:
    """Filter, order, offset and cursor."""
    for status in ("pending", "processing", "completed", "failed", "cancelled"):
        report.check(f"The list shows only {status} jobs", expect_filtered, client, status)
    report.check("The completed jobs have the new one", expect_listed, client, job)
    report.check("The list is newest first", expect_newest_first, client)
    report.check("An offset skips jobs", expect_offset, client)
    report.check("Following the cursor shows no job twice", expect_pages, client)


def check_cancel(client: httpx.Client, report: Report) -> None:
    """A cancel sticks."""
    cancelled = report.check("A cancel ends a job", cancelled_job, client, report)
    if cancelled is not None:
        report.check("It stays cancelled", expect_still_cancelled, client, cancelled)


def metrics(client: httpx.Client) -> Job:
    """Return the metrics. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.get("/metrics")
    expect_status(answer, 200)
    found: Job = answer.json()["metrics"]
    expect({"jobs_total", "jobs_by_status"} <= found.keys(), f"They are {sorted(found)}.")
    return found


def expect_counted(client: httpx.Client, before: Job) -> None:
    """Raises: CheckFailed unless this run's jobs were added to the counts."""
    after = metrics(client)
    made = 1 + 1 + AT_ONCE + 1
    expect(after["jobs_total"] >= before["jobs_total"] + made, f"{after['jobs_total']} in all.")
    for status in ("completed", "cancelled"):
        more = after["jobs_by_status"][status] > before["jobs_by_status"][status]
        expect(more, f"No more {status} jobs than before.")


def expect_metadata(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed unless the document tells what was asked and what was made."""
    answer = client.get(f"{JOBS}/{job['id']}/metadata")
    expect_status(answer, 200)
    document: dict[str, Any] = answer.json()
    expected = {
        **PARAMETERS,
        "prompt": PROMPT,
        "model_name": job["model_name"],
        "external_job_id": job["external_job_id"],
    }
    wrong = [name for name, value in expected.items() if document.get(name) != value]
    expect(not wrong, f"Missing or different: {', '.join(wrong)}.")
    expect(document["created_at"], "The time is missing.")
    stored = document["outputs"][0]
    expect(stored["sha256"] == job["outputs"][0]["sha256"], "The SHA-256 is another one.")


def download(client: httpx.Client, job: Job) -> bytes:
    """Return the bytes of the job's first output. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.get(f"/api/v1/download/{job['id']}")
    expect_status(answer, 200)
    return answer.content


def expect_range(client: httpx.Client, path: str, whole: bytes) -> None:
    """Raises: CheckFailed unless bytes 10 to 109 come alone."""
    answer = client.get(path, headers={"range": "bytes=10-109"})
    expect_status(answer, 206)
    expect(answer.content == whole[10:110], "Other bytes than those asked for came.")
    span = answer.headers["content-range"]
    expect(span == f"bytes 10-109/{len(whole)}", f"Content-Range: {span}")


def expect_suffix(client: httpx.Client, path: str, whole: bytes) -> None:
    """Raises: CheckFailed unless the last 12 bytes come alone."""
    answer = client.get(path, headers={"range": "bytes=-12"})
    expect_status(answer, 206)
    expect(answer.content == whole[-12:], "Other bytes than the last ones came.")


def expect_outside(client: httpx.Client, path: str, whole: bytes) -> None:
    """Raises: CheckFailed unless a range behind the end is 416."""
    answer = client.get(path, headers={"range": f"bytes={len(whole)}-"})
    expect_problem(answer, 416)
    span = answer.headers["content-range"]
    expect(span == f"bytes */{len(whole)}", f"Content-Range: {span}")


def expect_unchanged(client: httpx.Client, path: str) -> None:
    """Raises: CheckFailed unless a client that has the file gets no bytes."""
    etag = client.head(path).headers["etag"]
    answer = client.get(path, headers={"if-none-match": etag})
    expect_status(answer, 304)
    expect(not answer.content, f"{len(answer.content)} bytes came.")
    other = client.get(path, headers={"if-none-match": '"other"'})
    expect_status(other, 200)


def expect_head(client: httpx.Client, path: str, whole: bytes) -> None:
    """Raises: CheckFailed unless HEAD tells the size without the bytes."""
    answer = client.head(path)
    expect_status(answer, 200)
    length = answer.headers["content-length"]
    expect(length == str(len(whole)), f"Content-Length: {length}")


def several_outputs(client: httpx.Client, report: Report) -> None:
    """Raises: CheckFailed, httpx.HTTPError unless each output is there under its own name."""
    job = completed_job(client, report, prompt=PROMPT, parameters={"num_outputs": OUTPUTS})
    outputs = job["outputs"]
    expect(len(outputs) == OUTPUTS, f"The job has {len(outputs)} outputs.")
    for output in outputs:
        answer = client.get(f"/media/{output['url'].rpartition('/')[2]}")
        expect_status(answer, 200)
        sha256 = hashlib.sha256(answer.content).hexdigest()
        expect(sha256 == output["sha256"], f"Output {output['index']} has other bytes.")
    expect(outputs[0]["sha256"] != outputs[1]["sha256"], "Both outputs are the same picture.")


def concurrent_jobs(client: httpx.Client, report: Report) -> None:
    """Raises: CheckFailed, httpx.HTTPError unless all complete, or fail by design."""

    def generate(number: int) -> Job:
        return ended_job(client, create_job(client, prompt=f"{PROMPT}, number {number}"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = list(pool.map(generate, range(AT_ONCE)))
    by_design = sum(is_simulated_failure(job) for job in jobs)
    if by_design:
        report.note(f"{by_design} of them failed by design.")
    others = [job for job in jobs if job["status"] != "completed" and not is_simulated_failure(job)]
    ends = "; ".join(f"{job['id']} {job['status']}: {job['error_message']}" for job in others)
    expect(not others, ends)


def list_jobs(client: httpx.Client, **query: Any) -> list[Job]:
    """Return one page. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.get(JOBS, params=query)
    expect_status(answer, 200)
    jobs: list[Job] = answer.json()
    return jobs


def expect_filtered(client: httpx.Client, status: str) -> None:
    """Raises: CheckFailed when a job of another status is listed."""
    found = {job["status"] for job in list_jobs(client, status_filter=status, limit=100)}
    expect(found <= {status}, f"Listed: {', '.join(found)}.")


def expect_listed(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed unless the completed job is among the newest completed ones."""
    listed = list_jobs(client, status_filter="completed", limit=100)
    expect(job["id"] in [one["id"] for one in listed], "It is not in the list.")


def expect_newest_first(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    times = [job["created_at"] for job in list_jobs(client, limit=100)]
    expect(times == sorted(times, reverse=True), "It is not.")


def expect_offset(client: httpx.Client) -> None:
    """Raises: CheckFailed unless the page after one job begins with the second."""
    for _ in range(TRIES):  # somebody else's new job may come in between
        first = [job["id"] for job in list_jobs(client, limit=PAGE + 1)]
        second = [job["id"] for job in list_jobs(client, limit=PAGE, offset=1)]
        if second == first[1:]:
            return
    raise CheckFailed(f"{second} is not {first} without the first.")


def expect_pages(client: httpx.Client) -> None:
    """Raises: CheckFailed unless three pages by their `Link` are one list without gaps."""
    seen: list[str] = []
    path = f"{JOBS}?limit={PAGE}"
    for _ in range(3):
        answer = client.get(path)
        expect_status(answer, 200)
        expect(len(answer.json()) == PAGE, f"A page of {len(answer.json())}.")
        seen += [job["id"] for job in answer.json()]
        following = NEXT_LINK.search(answer.headers.get("link", ""))
        if following is None:
            raise CheckFailed("There is no next page.")
        path = following[1]
    expect(len(set(seen)) == len(seen), "A job came twice.")
    everything = [job["id"] for job in list_jobs(client, limit=100)]
    start = everything.index(seen[0])
    expect(seen == everything[start : start + len(seen)], "A job was left out.")


def cancelled_job(client: httpx.Client, report: Report) -> Job:
    """Return a job that was cancelled. Raises: CheckFailed, httpx.HTTPError."""
    for _ in range(TRIES):
        job = create_job(client, prompt=PROMPT)
        answer = client.delete(f"{JOBS}/{job['id']}")
        if answer.status_code != 409:
            expect_status(answer, 200)
            cancelled: Job = answer.json()
            expect(cancelled["status"] == "cancelled", f"It is {cancelled['status']}.")
            return cancelled
        report.note("The job had ended before it could be cancelled: another one.")
    raise CheckFailed("No job could be cancelled before it ended.")


def expect_still_cancelled(client: httpx.Client, job: Job) -> None:
    """Raises: CheckFailed when the job has changed, or can be cancelled again."""
    again = expect_problem(client.delete(f"{JOBS}/{job['id']}"), 409)
    expect("cancelled" in again["detail"], f"It says: {again['detail']}")
    now = read_job(client, job["id"])
    expect(now == job, f"It is {now['status']}.")
    expect(now["completed_at"] is not None, "It does not say when it ended.")


def expect_info(client: httpx.Client) -> None:
    """Raises: CheckFailed."""
    answer = client.get("/info")
    expect_status(answer, 200)
    body = answer.json()
    provider = body["configuration"]["provider"]
    expect(provider in ("mock", "replicate"), f"The provider is {provider!r}.")
    for name, path in body["monitoring"].items():
        if path.startswith("/"):
            expect(client.get(path).status_code == 200, f"monitoring.{name} does not answer.")


def expect_documented(client: httpx.Client) -> None:
    """Raises: CheckFailed unless each endpoint names its errors, and POST has an example."""
    answer = client.get("/openapi.json")
    expect_status(answer, 200)
    document = answer.json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            problems = [code for code in operation["responses"] if code >= "400"]
            expect(problems, f"{method.upper()} {path} names no error.")
    examples = document["components"]["schemas"]["GenerateRequest"].get("examples")
    expect(examples, "POST /api/v1/generate has no example.")


if __name__ == "__main__":
    sys.exit(run(__doc__, check_features))
