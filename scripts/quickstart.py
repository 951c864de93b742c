"""From a prompt to a picture in one command, on servers of our own: scripts/quickstart.sh runs it.

PostgreSQL and Valkey run from their wheels with their data in `.quickstart`, so DATABASE_URL,
DATABASE_URL_SYNC, REDIS_URL and CELERY_BROKER_URL are set here. Everything else is the user's, from
the environment or `config.env`. Only where the user has set nothing do values differ from the
service's defaults: the mock takes 1-2 seconds (REPLICATE_MOCK_DELAY_MIN, _MAX) and never fails
(REPLICATE_MOCK_FAILURE_RATE), since a first picture must not fail by design, and STORAGE_BASE_URL
names the port that the API has.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from app.config import Settings, get_settings
from scripts.servers import HOST, Postgres, ServerError, Valkey, is_taken
from scripts.supervise import Child

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".quickstart"
DEFAULT_PROMPT = "a lighthouse at dawn"
ANSWER_SECONDS = 60.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.2
PORT_RELEASE_SECONDS = 1.0
CELERY = ("celery", "-A", "app.tasks.celery_app")
TERMINAL = ("completed", "failed", "cancelled")

Job = dict[str, Any]  # as the API tells it

console = Console(highlight=False, markup=False, soft_wrap=True)


class Running(NamedTuple):
    """What was started, and where it answers."""

    servers: tuple[Postgres, Valkey]
    programs: dict[str, Child]
    environment: dict[str, str]
    api_url: str
    flower_url: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after Ctrl-C or, with --once, a saved picture."""
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("prompt", nargs="*", help=f"what to paint (default: {DEFAULT_PROMPT})")
    parser.add_argument("--once", action="store_true", help="stop after the picture is saved")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        return _run(" ".join(options.prompt) or DEFAULT_PROMPT, once=options.once)
    except KeyboardInterrupt:
        return 130 if options.once else 0
    except ServerError as error:
        return _fail(str(error))
    except OSError as error:  # no space, no right to write
        return _fail(f"The quickstart cannot go on: {error.strerror} ({error.filename or DATA}).")


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return 1


def _run(prompt: str, *, once: bool) -> int:
    begun_at = time.monotonic()
    settings = get_settings()
    _check_port(settings.api_port, "the API", "API_PORT")
    _check_port(settings.flower_port, "Flower", "FLOWER_PORT")
    with ExitStack() as stack:
        running = _start(stack, settings)
        _wait_for(running, "API", f"{running.api_url}/health")
        console.print(f"Serving after {time.monotonic() - begun_at:.1f} s.")
        # Only now: on a small machine it would keep the API and the worker waiting for a processor.
        flower = ("flower", f"--address={HOST}", f"--port={settings.flower_port}")
        _launch(running, "Flower", *CELERY, *flower)
        job = _generate(running, prompt)
        _wait_for(running, "Flower", running.flower_url)
        _report(job, settings, running)
        if not once:
            console.print("Ctrl-C stops everything; jobs and pictures stay.")
            _serve(running)
        return 0 if job.get("status") == "completed" else 1


def _check_port(port: int, user: str, setting: str) -> None:
    """Waits a moment, as the guards of a killed quickstart need one to free the port."""
    deadline = time.monotonic() + PORT_RELEASE_SECONDS
    while is_taken(port):
        if time.monotonic() > deadline:
            raise ServerError(f"Port {port} for {user} is taken: set {setting} to a free one.")
        time.sleep(0.1)


def _start(stack: ExitStack, settings: Settings) -> Running:
    """Start everything; the stack stops it, and is deaf to a second Ctrl-C while it does."""
    console.print("Starting PostgreSQL and Valkey ...")
    postgres = stack.enter_context(Postgres(DATA / "postgres"))
    valkey = stack.enter_context(Valkey(DATA / "valkey"))
    environment = _environment(settings, postgres, valkey)
    _note_urls(environment)
    _migrate(environment)
    console.print("Starting the API, a worker and Flower ...")
    urls = (f"http://{HOST}:{port}" for port in (settings.api_port, settings.flower_port))
    running = Running((postgres, valkey), {}, environment, *urls)
    stack.callback(_stop, running.programs)
    web = ("--host", HOST, "--port", str(settings.api_port), "--timeout-graceful-shutdown", "3")
    _launch(running, "API", "uvicorn", "app.main:app", *web)
    _launch(running, "worker", *CELERY, "worker")
    return running


def _environment(settings: Settings, postgres: Postgres, valkey: Valkey) -> dict[str, str]:
    # PGSSLMODE, PGSERVICE and the like are about the user's own servers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment |= {
        "DATABASE_URL": postgres.url,
        "DATABASE_URL_SYNC": postgres.sync_url,
        "REDIS_URL": valkey.url,
        "CELERY_BROKER_URL": valkey.url,
        "PYTHONUNBUFFERED": "1",
    }
    chosen = settings.model_fields_set
    if not {"replicate_mock_delay_min", "replicate_mock_delay_max"} & chosen:
        environment |= {"REPLICATE_MOCK_DELAY_MIN": "1", "REPLICATE_MOCK_DELAY_MAX": "2"}
    if "replicate_mock_failure_rate" not in chosen:
        environment["REPLICATE_MOCK_FAILURE_RATE"] = "0"
    if "storage_base_url" not in chosen:
        environment["STORAGE_BASE_URL"] = f"http://localhost:{settings.api_port}/media"
    return environment


def _note_urls(environment: dict[str, str]) -> None:
    """Write down where the servers are, for scripts that run beside it; with passwords."""
    path = DATA / "env"
    path.touch(mode=0o600)
    names = ("DATABASE_URL", "DATABASE_URL_SYNC", "REDIS_URL")
    path.write_text("".join(f"export {name}='{environment[name]}'\n" for name in names))


def _migrate(environment: dict[str, str]) -> None:
    migration = _module("migrations", ("alembic", "upgrade", "head"), environment)
    migration.wait()
    if migration.poll() != 0:
        raise ServerError(_obituary("migration of the database", migration))


def _launch(running: Running, name: str, *command: str) -> None:
    running.programs[name] = _module(name, command, running.environment)


def _module(name: str, command: Sequence[str], environment: dict[str, str]) -> Child:
    logs = DATA / "logs"
    logs.mkdir(exist_ok=True)
    return Child(
        # Not the scripts in .venv/bin: their first line, the path of Python, has a length limit.
        [sys.executable, "-m", *command],
        log_path=logs / f"{name.lower()}.log",
        environment=environment,
        folder=ROOT,
    )


def _wait_for(running: Running, name: str, url: str) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    with _client(running) as client:
        while not _answers(client, url):
            _check(running)
            if time.monotonic() > deadline:
                log_path = running.programs[name].log_path
                raise ServerError(f"The {name} does not answer at {url}; see {log_path}.")
            time.sleep(0.05)


def _client(running: Running) -> httpx.Client:
    # trust_env: a proxy of the environment cannot reach our loopback address.
    return httpx.Client(base_url=running.api_url, timeout=10, trust_env=False)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def _check(running: Running) -> None:
    """Raises ServerError when one of the children has ended, with what it said last."""
    for name, program in running.programs.items():
        if program.poll() is not None:
            raise ServerError(_obituary(name, program))
    for server in running.servers:
        if not server.is_running():
            raise ServerError(f"{server.name} has ended: {server.last_words()}")


def _obituary(name: str, program: Child) -> str:
    said = "\n".join(program.output()[-15:])
    return (
        f"The {name} has ended with exit code {program.poll()};"
        f" the last lines of {program.log_path}:\n{said}"
    )


def _generate(running: Running, prompt: str) -> Job:
    """Submit the prompt and show the job until it ends; the job as the API last told it."""
    console.print(f"Prompt: {prompt}")
    with _client(running) as client:
        answer = _submit(client, prompt, running)
        if not answer.is_success:
            return {"error_message": answer.json()["detail"]}
        show = _show_bar if console.is_terminal else _show_lines
        return show(answer.json(), lambda job: _look(client, job, running))


def _submit(client: httpx.Client, prompt: str, running: Running) -> httpx.Response:
    try:
        return client.post("/api/v1/generate", json={"prompt": prompt})
    except httpx.TransportError as error:
        _check(running)
        raise ServerError(f"The API does not answer: {error}.") from error


def _look(client: httpx.Client, job: Job, running: Running) -> Job:
    """The job as it is a moment later; as it was, when the API has no answer."""
    time.sleep(POLL_SECONDS)
    _check(running)
    try:
        latest: Job = client.get(f"/api/v1/status/{job['id']}").raise_for_status().json()
    except httpx.HTTPError:
        return job
    return latest


def _show_bar(job: Job, look: Callable[[Job], Job]) -> Job:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(job["status"], total=None)
        while job["status"] not in TERMINAL:
            job = look(job)
            progress.update(bar, description=job["status"])
        progress.update(bar, total=1, completed=job["status"] == "completed")
    return job


def _show_lines(job: Job, look: Callable[[Job], Job]) -> Job:
    shown = ""
    while True:
        if job["status"] != shown:
            shown = job["status"]
            console.print(f"Job {job['id']}: {shown}")
        if shown in TERMINAL:
            return job
        job = look(job)


def _report(job: Job, settings: Settings, running: Running) -> None:
    if job.get("status") == "completed":
        console.print(f"Picture   {_place(job, settings)}")
        if settings.is_storage_local:
            console.print(f"Metadata  {settings.metadata_directory.resolve() / job['id']}.json")
    else:
        console.print(f"There is no picture: {job.get('error_message') or job['status']}")
    console.print(f"API       {running.api_url}")
    console.print(f"Docs      {running.api_url}/docs")
    console.print(f"Flower    {running.flower_url}")


def _place(job: Job, settings: Settings) -> str:
    """Where the first output lies; its address, where that is a bucket."""
    url: str = job["outputs"][0]["url"]
    if not settings.is_storage_local:
        return url
    return str(settings.media_directory.resolve() / url.rpartition("/")[2])


def _serve(running: Running) -> None:
    while True:
        _check(running)
        time.sleep(POLL_SECONDS)


def _stop(programs: dict[str, Child]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    console.print("Stopping ...")
    for program in programs.values():
        program.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for program in programs.values():
        if not program.wait(max(0.0, deadline - time.monotonic())):
            program.stop()


if __name__ == "__main__":
    sys.exit(main())
