"""ReplicateProvider over real HTTP: one POST per create, and every failure classified."""

import asyncio
import base64
import gzip
import json
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme

from app.errors import FailureClass, PredictionNotFound, ProviderError
from app.providers.base import PredictionRequest, Sought
from app.providers.governor import Call
from app.providers.outcome import output_values
from app.providers.replicate import ReplicateProvider, client, connections
from tests.contracts.provider import Provide, ProviderContract, fetched, finished, polled
from tests.doubles.replicate_server import LedgerSnapshot, ReplicateServer
from tests.doubles.ungoverned import Ungoverned

# One loop for the whole file: a provider costs 0.1 s to make, most of it for its certificates.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "acme/painter"
VERSION = "5" * 64
INPUT = {"prompt": "a lighthouse", "seed": 7}
REQUEST = PredictionRequest(MODEL, INPUT, cancel_after_seconds=60)
SOUGHT = Sought(MODEL, INPUT)
HTML = "<html><body><h1>502 Bad Gateway</h1></body></html>"
A_DAY_SECONDS = 86400.0

Fault = tuple[str, dict[str, Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(replicate_server: ReplicateServer) -> AsyncIterator[ReplicateProvider]:
    async with new_provider(replicate_server.origin) as provider:
        yield provider


@pytest.fixture
def double(replicate: ReplicateServer) -> ReplicateServer:
    """The double, empty; its predictions end at once."""
    replicate.configure(starting_seconds=0, latency_seconds=0)
    return replicate


@pytest.fixture
def provider(shared: ReplicateProvider, double: ReplicateServer) -> ReplicateProvider:
    """A patient provider that never asks to wait, on an empty double."""
    return shared


class Reports(Ungoverned):
    """Admits everything, and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    async def admit(self, call: Call) -> None:
        self.told.append(("admit", call))

    async def throttled(self, call: Call, seconds: float) -> None:
        self.told.append(("throttled", call, seconds))

    async def succeeded(self, call: Call) -> None:
        self.told.append(("succeeded", call))

    async def failed(self, call: Call) -> None:
        self.told.append(("failed", call))


@pytest.fixture(autouse=True)
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure shows at once; `test_a_page_that_fails_is_asked_for_again` has the other tries."""
    monkeypatch.setattr(client, "TRIES_PER_PAGE", 1)


@asynccontextmanager
async def new_provider(
    origin: str,
    *,
    timeout_seconds: float = 10,
    wait: int = 0,
    token: str = ReplicateServer.token,
    governor: Reports | None = None,
) -> AsyncIterator[ReplicateProvider]:
    made = ReplicateProvider(
        token,
        origin,
        timeout_seconds=timeout_seconds,
        prefer_wait_seconds=wait,
        governor=governor or Ungoverned(),
    )
    yield made
    await made.aclose()


async def ledger_with(double: ReplicateServer, **requests: int) -> LedgerSnapshot:
    """The ledger, as soon as these have come in: whoever sent them may have given up before."""
    async with asyncio.timeout(30):
        while (ledger := double.ledger()).requests != requests:
            await asyncio.sleep(0.01)
    return ledger


async def failure(call: Awaitable[Any]) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await call
    assert ReplicateServer.token not in f"{caught.value.message} {caught.value!r}"
    return caught.value


class Host:
    """An HTTP server of a few lines: keeps what it is sent, answers what it is told."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.reply: bytes | Callable[[str], bytes] = answer(b"content")
        self.hangs = False
        self.left = asyncio.Event()

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["Host"]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls) as server:
            scheme = "https" if tls else "http"
            self.origin = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(header(head, "content-length") or 0)
            self.heads.append(head)
            self.bodies.append(await reader.readexactly(length))
            path = head.split()[1]
            writer.write(self.reply(path) if callable(self.reply) else self.reply)
            await writer.drain()
            if self.hangs:
                await reader.read()
                self.left.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def header(head: str, name: str) -> str | None:
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    return {key.lower(): value for key, value in lines.items()}.get(name)


def answer(body: bytes, status: str = "200 OK", **headers: Any) -> bytes:
    """A whole HTTP response; a header's underscores are hyphens, None leaves it out."""
    given = {"content_length": len(body), "connection": "close"} | headers
    lines = [
        f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value is not None
    ]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def prediction_json(**fields: Any) -> bytes:
    known = {"id": "p1", "status": "starting", "model": MODEL, "version": "hidden", "input": INPUT}
    return json.dumps(known | fields).encode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_host() -> AsyncIterator[Host]:
    async with Host().running() as running:
        yield running


@pytest.fixture
def host(running_host: Host) -> Host:
    running_host.reset()
    return running_host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def to_host(running_host: Host) -> AsyncIterator[ReplicateProvider]:
    """A provider whose API is the `host`."""
    async with new_provider(running_host.origin) as provider:
        yield provider


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty(replicate_server: ReplicateServer) -> AsyncIterator[ReplicateProvider]:
    """A provider that waits half a second for an answer."""
    async with new_provider(replicate_server.origin, timeout_seconds=0.5) as provider:
        yield provider


class TestContract(ProviderContract):
    @pytest.fixture
    def provide(self, provider: ReplicateProvider, double: ReplicateServer) -> Provide:
        def provide(seconds: float = 0, failing: bool = False) -> ReplicateProvider:
            double.configure(starting_seconds=0, latency_seconds=seconds)
            if failing:
                double.push_fault("create", "fail", times=None)
            return provider

        return provide


class TestCreateOnTheWire:
    async def test_an_official_model_has_its_own_address(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(prediction_json(), "201 Created")
        await to_host.create(PredictionRequest("acme/painter", INPUT, 60))
        assert host.heads[0].startswith("POST /v1/models/acme/painter/predictions HTTP/1.1")
        assert json.loads(host.bodies[0]) == {"input": INPUT}

    async def test_a_version_is_named_in_the_body(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(prediction_json(), "201 Created")
        await to_host.create(PredictionRequest(f"acme/painter:{VERSION}", INPUT, 60))
        assert host.heads[0].startswith("POST /v1/predictions HTTP/1.1")
        assert json.loads(host.bodies[0]) == {"input": INPUT, "version": f"acme/painter:{VERSION}"}

    async def test_it_carries_the_token_and_its_own_deadline(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(prediction_json(), "201 Created")
        await to_host.create(PredictionRequest(MODEL, INPUT, 900))
        assert header(host.heads[0], "authorization") == f"Bearer {ReplicateServer.token}"
        assert header(host.heads[0], "cancel-after") == "900s"
        assert header(host.heads[0], "prefer") is None

    @pytest.mark.parametrize("model", [MODEL, f"{MODEL}:{VERSION}"])
    async def test_it_asks_to_wait_as_long_as_configured(
        self, double: ReplicateServer, model: str
    ) -> None:
        async with new_provider(double.origin, wait=5) as provider:
            prediction = await provider.create(PredictionRequest(model, INPUT, 60))
        [create] = double.creates()
        assert create.headers == {"prefer": "wait=5", "cancel-after": "60s"}
        assert prediction.status == "succeeded"
        assert prediction.output

    @pytest.mark.parametrize(
        ("variable", "scheme"), [("http_proxy", "http://"), ("http_proxy", ""), ("all_proxy", "")]
    )
    async def test_it_goes_through_the_proxy_that_the_environment_names(
        self, host: Host, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
    ) -> None:
        host.reply = answer(prediction_json(), "201 Created")
        monkeypatch.setenv(variable, host.origin.replace("http://", scheme))
        monkeypatch.setenv("no_proxy", "elsewhere.test")
        for name in ("api", "elsewhere"):
            async with new_provider(f"http://{name}.test", timeout_seconds=2) as provider:
                with suppress(ProviderError):
                    await provider.create(REQUEST)
        [head] = host.heads
        assert head.startswith("POST http://api.test/v1/")

    @pytest.mark.parametrize("model", [MODEL, f"{MODEL}:{VERSION}"])
    async def test_it_says_where_to_report(
        self, provider: ReplicateProvider, double: ReplicateServer, model: str
    ) -> None:
        webhook = "https://media.example/webhooks/7"
        await provider.create(PredictionRequest(model, INPUT, 60, webhook=webhook))
        [create] = double.creates()
        assert create.webhook == webhook
        assert create.webhook_events_filter == ["start", "completed"]

    async def test_the_double_knows_both_forms_apart(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        await provider.create(PredictionRequest(MODEL, INPUT, 60))
        seen = await provider.create(PredictionRequest(f"{MODEL}:{VERSION}", INPUT, 60))
        assert [create.version for create in double.creates()] == ["hidden", VERSION]
        assert (seen.model_name, seen.version) == (MODEL, VERSION)

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"guidance_scale": 7.5, "strength": 1.0, "tiny": 1e-9, "large": 2**53 + 1},
            {"flag": True, "off": False, "nothing": None, "zero": 0, "minus": -1},
            {"nested": {"a": [1, {"b": [[], {}]}, "c"]}, "list": ["x", "y"]},
            {"ünïcödé": "灯台 🌅", "quotes": '"\\/\b\f\n\r\t', "zero width": "\u200b\u2028"},
            {"image": "data:image/png;base64,aGVsbG8=", "file": "https://files/x.png"},
            {"version": "mine", "model": "x", "webhook": "https://x", "input": {"input": 1}},
            {"camelCase": 1, "snake_case": 2, "kebab-case": 3, "": 4},
        ],
    )
    async def test_the_input_reaches_the_model_unchanged(
        self, provider: ReplicateProvider, double: ReplicateServer, more: dict[str, Any]
    ) -> None:
        double.configure(schemas=False)
        given = {"prompt": "a lighthouse"} | more
        await provider.create(PredictionRequest(MODEL, given, 60))
        [create] = double.creates()
        assert json.dumps(create.input, sort_keys=True) == json.dumps(given, sort_keys=True)


ACCEPTED_OR_NOT: list[Fault] = [
    ("status", {"status": 500}),
    ("status", {"status": 502, "body": HTML}),
    ("status", {"status": 503, "headers": {"retry-after": "0"}}),
    ("status", {"status": 504, "body": ""}),
    ("status", {"status": 520}),
    ("status", {"status": 408}),
    ("status", {"status": 409}),
    ("status", {"status": 425}),
    # What the package obeys when its retries are on.
    ("status", {"status": 500, "headers": {"x-should-retry": "true", "retry-after-ms": "1"}}),
    ("drop", {"reset": True}),
    ("drop", {"reset": False}),
    ("accept_then_drop", {"reset": True}),
    ("accept_then_drop", {"reset": False}),
    ("accept_then_status", {"status": 500}),
    ("accept_then_status", {"status": 502, "body": HTML}),
    ("accept_then_status", {"status": 503}),
    ("accept_then_status", {"status": 504}),
    # Not followed: a repeated POST would be a second create.
    ("accept_then_status", {"status": 307, "headers": {"location": "/v1/predictions"}}),
    ("accept_then_status", {"status": 303, "headers": {"location": "/v1/predictions"}}),
    ("accept_then_status", {"status": 302, "headers": {"location": "http://["}}),
    # A success that says nothing.
    ("accept_then_status", {"status": 201, "body": HTML}),
    ("accept_then_status", {"status": 201, "body": ""}),
    ("accept_then_status", {"status": 201, "body": "{"}),
    ("accept_then_status", {"status": 201, "body": "null"}),
    ("accept_then_status", {"status": 201, "body": []}),
    ("accept_then_status", {"status": 201, "body": ["p1"]}),
    ("accept_then_status", {"status": 201, "body": 7}),
    ("accept_then_status", {"status": 201, "body": {}}),
    ("accept_then_status", {"status": 200, "body": {"id": "p1"}}),
    ("accept_then_status", {"status": 201, "body": {"id": 5, "status": "starting"}}),
    ("accept_then_status", {"status": 201, "body": {"id": "", "status": "starting"}}),
    ("accept_then_status", {"status": 202, "body": {"id": "p1", "status": None}}),
    ("accept_then_status", {"status": 204, "body": ""}),
]


class TestCreateIsSentOnce:
    @pytest.mark.parametrize(("kind", "fields"), ACCEPTED_OR_NOT)
    @pytest.mark.parametrize("model", [MODEL, f"{MODEL}:{VERSION}"])
    async def test_what_may_have_been_accepted_is_ambiguous(
        self,
        provider: ReplicateProvider,
        double: ReplicateServer,
        kind: str,
        fields: dict[str, Any],
        model: str,
    ) -> None:
        double.push_fault("create", kind, **fields, times=None)
        error = await failure(provider.create(PredictionRequest(model, INPUT, 60)))
        assert error.failure_class is FailureClass.AMBIGUOUS
        ledger = double.ledger()
        assert ledger.requests == {"create": 1}
        assert len(ledger.creates) == kind.startswith("accept")

    async def test_a_time_out_is_ambiguous(
        self, hasty: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("create", "accept_then_delay", seconds=30, times=None)
        began = time.monotonic()
        error = await failure(hasty.create(REQUEST))
        assert 0.4 < time.monotonic() - began < 20
        assert (error.failure_class, error.code) == (FailureClass.AMBIGUOUS, "provider_no_answer")
        ledger = await ledger_with(double, create=1)
        assert ledger.requests == {"create": 1}
        assert len(ledger.creates) == 1

    async def test_what_was_not_sent_by_then_never_is(self) -> None:
        """A host that stood still finds a connection that was reset, and only half a create."""
        request = PredictionRequest(MODEL, {"prompt": "p" * 500_000}, 60)
        with socket.socket() as host:
            host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host.bind(("127.0.0.1", 0))
            host.listen()
            origin = f"http://127.0.0.1:{host.getsockname()[1]}"
            async with new_provider(origin, timeout_seconds=0.4) as provider:
                error = await failure(provider.create(request))
            assert error.failure_class is FailureClass.AMBIGUOUS
            connection, _ = await asyncio.to_thread(host.accept)
            received, is_reset = await asyncio.to_thread(_read_all, connection)
        assert is_reset
        assert received < 500_000

    async def test_nor_is_what_a_killed_process_had_not_sent(self) -> None:
        with socket.socket() as host:
            host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host.bind(("127.0.0.1", 0))
            host.listen()
            origin = f"http://127.0.0.1:{host.getsockname()[1]}"
            creating = await asyncio.create_subprocess_exec(sys.executable, "-c", CREATE, origin)
            connection, _ = await asyncio.to_thread(host.accept)
            await asyncio.to_thread(connection.recv, 1, socket.MSG_PEEK)
            await asyncio.sleep(0.5)  # by now the kernel has all of it, and the host a part
            creating.kill()
            await creating.wait()
            received, is_reset = await asyncio.to_thread(_read_all, connection)
        assert is_reset
        assert 0 < received < 500_000

    @pytest.mark.parametrize(
        "reply",
        [
            answer(prediction_json(), "201 Created", content_length=10_000),
            answer(prediction_json(), "201 Created", content_encoding="gzip"),
            b"HTTP/1.1 201 Created\r\ncontent-le",
            b"220 mail.example ESMTP\r\n",
            b"\x00\x01\x02",
            b"",
        ],
        ids=["cut", "not gzip", "half a head", "mail", "noise", "nothing"],
    )
    async def test_an_answer_that_breaks_off_is_ambiguous(
        self, to_host: ReplicateProvider, host: Host, reply: bytes
    ) -> None:
        host.reply = reply
        error = await failure(to_host.create(REQUEST))
        assert error.failure_class is FailureClass.AMBIGUOUS
        assert len(host.heads) == 1

    @pytest.mark.parametrize("wait", [0, 5])
    async def test_a_connection_that_is_refused_is_proven_unsent(self, wait: int) -> None:
        with closed_port() as port:
            async with new_provider(f"http://127.0.0.1:{port}", wait=wait) as provider:
                error = await failure(provider.create(REQUEST))
        assert error.failure_class is FailureClass.UNAVAILABLE
        assert error.code == "provider_unreachable"

    async def test_a_failed_tls_handshake_is_proven_unsent(self, double: ReplicateServer) -> None:
        origin = double.origin.replace("http:", "https:")
        async with new_provider(origin) as provider:
            error = await failure(provider.create(REQUEST))
        assert error.failure_class is FailureClass.UNAVAILABLE
        assert double.ledger().requests == {}

    async def test_no_free_connection_is_proven_unsent(
        self, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connections, "CREATE_CONNECTIONS", 1)
        double.configure(starting_seconds=60, latency_seconds=60)
        async with new_provider(double.origin, timeout_seconds=0.4, wait=30) as provider:
            first = asyncio.create_task(provider.create(REQUEST))
            await ledger_with(double, create=1)
            error = await failure(provider.create(REQUEST))
            assert error.failure_class is FailureClass.UNAVAILABLE
            first.cancel()
            await asyncio.wait([first])
        assert double.ledger().requests == {"create": 1}

    async def test_a_create_uses_a_fresh_connection(
        self, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One kept alive may be closed just as it is used again: an ambiguity of our own making."""
        opened: list[Any] = []
        connect = asyncio.get_running_loop().create_connection

        async def counted(*arguments: Any, **options: Any) -> Any:
            opened.append(arguments)
            return await connect(*arguments, **options)

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", counted)
        async with new_provider(double.origin) as provider:
            for _ in range(3):
                await provider.create(REQUEST)
        assert len(opened) == 3


CREATE = """
import asyncio, sys
from app.providers.base import PredictionRequest
from app.providers.replicate import ReplicateProvider
from tests.doubles.ungoverned import Ungoverned
waits = {"timeout_seconds": 60, "prefer_wait_seconds": 0}
provider = ReplicateProvider("t", sys.argv[1], governor=Ungoverned(), **waits)
asyncio.run(provider.create(PredictionRequest("acme/painter", {"prompt": "p" * 500_000}, 60)))
"""


def _read_all(connection: socket.socket) -> tuple[int, bool]:
    """Return how many bytes come, and whether the connection is reset then."""
    connection.settimeout(5)
    received = 0
    with connection:
        try:
            while chunk := connection.recv(1 << 16):
                received += len(chunk)
        except ConnectionResetError:
            return received, True
    return received, False


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class TestThrottled:
    @pytest.mark.parametrize(
        ("headers", "body", "seconds"),
        [
            ({"retry-after": "7"}, None, 7),
            ({"retry-after": "2.5"}, None, 2.5),
            ({"retry-after": "7"}, HTML, 7),
            ({"retry-after": "7"}, ["slow down"], 7),
            ({}, {"detail": "Slow down.", "retry_after": 5}, 5),
            ({}, {"detail": "Slow down.", "retry_after": "5"}, 5),
            ({}, {"detail": "Request was throttled. Your rate limit resets in ~8s."}, 8),
            ({}, {"detail": "Request was throttled. Your rate limit resets in 30s."}, 30),
            # Whoever says most is right.
            ({"retry-after": "3"}, {"detail": "resets in ~9s", "retry_after": 6}, 9),
            ({"retry-after": "3"}, {"detail": "resets in ~1s", "retry_after": 6}, 6),
            # Bounded on both sides.
            ({"retry-after": "86400"}, None, 300),
            ({"retry-after": "inf"}, None, 300),
            ({}, {"retry_after": 86_400}, 300),
            ({}, {"retry_after": 10**400}, 300),
            ({}, {"detail": "resets in ~86400s"}, 300),
            ({"retry-after": "0"}, None, 1),
            ({"retry-after": "-30"}, None, 1),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None, 1),
            ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, None, 300),
            # Nothing said: our own growing pauses then apply.
            ({}, None, None),
            ({}, "", None),
            ({}, HTML, None),
            ({}, [], None),
            ({}, {"detail": None, "retry_after": None}, None),
            ({"retry-after": "soon"}, None, None),
            ({"retry-after": "nan"}, None, None),
            ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None, None),
        ],
    )
    async def test_the_wait_that_is_asked_for_is_found_wherever_it_stands(
        self,
        provider: ReplicateProvider,
        double: ReplicateServer,
        headers: dict[str, str],
        body: Any,
        seconds: float | None,
    ) -> None:
        double.push_fault("create", "status", status=429, headers=headers, body=body, times=None)
        error = await failure(provider.create(REQUEST))
        assert (error.failure_class, error.code) == (FailureClass.THROTTLED, "provider_throttled")
        assert error.retry_after_seconds == seconds
        assert double.ledger().requests == {"create": 1}

    async def test_a_date_is_a_wait_too(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
        double.push_fault("create", "status", status=429, headers={"retry-after": at})
        error = await failure(provider.create(REQUEST))
        assert error.retry_after_seconds is not None
        assert 25 < error.retry_after_seconds <= 30

    @pytest.mark.parametrize("minutes", [-10, 10])
    async def test_a_date_is_read_by_the_providers_clock(
        self, to_host: ReplicateProvider, host: Host, minutes: int
    ) -> None:
        theirs = datetime.now(UTC) + timedelta(minutes=minutes)
        dates = (theirs, theirs + timedelta(seconds=30))
        date, retry_after = (format_datetime(at, usegmt=True) for at in dates)
        host.reply = answer(b"{}", "429 Too Many Requests", date=date, retry_after=retry_after)
        error = await failure(to_host.create(REQUEST))
        assert error.retry_after_seconds == 30

    async def test_the_doubles_own_limit(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(creates_per_minute=6, creates_burst=1)
        await provider.create(REQUEST)
        error = await failure(provider.create(REQUEST))
        assert error.failure_class is FailureClass.THROTTLED
        assert error.retry_after_seconds == 10  # 6 per minute

    async def test_reads_are_throttled_alike(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("get", "status", status=429, headers={"retry-after": "4"}, times=None)
        error = await failure(provider.get("p1"))
        assert error.failure_class is FailureClass.THROTTLED
        assert error.retry_after_seconds == 4
        assert double.ledger().requests == {"get": 1}


class TestRefused:
    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (400, "invalid_input"),
            (401, "provider_auth"),
            (402, "insufficient_credit"),
            (403, "provider_auth"),
            (404, "model_not_found"),
            (405, "invalid_input"),
            (413, "invalid_input"),
            (422, "invalid_input"),
        ],
    )
    @pytest.mark.parametrize("body", [None, HTML, [], ""], ids=["problem", "html", "list", "none"])
    async def test_a_refusal_is_final(
        self,
        provider: ReplicateProvider,
        double: ReplicateServer,
        status: int,
        code: str,
        body: Any,
    ) -> None:
        double.push_fault("create", "status", status=status, body=body, times=None)
        error = await failure(provider.create(REQUEST))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, code)
        assert error.message
        assert double.ledger().requests == {"create": 1}

    async def test_what_is_wrong_with_the_input_is_passed_on_within_bounds(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        body = {"title": "x", "detail": "width: must be\x00 at most 1440. " + "x" * 1000}
        double.push_fault("create", "status", status=422, body=body)
        error = await failure(provider.create(REQUEST))
        assert "width: must be at most 1440." in error.message
        assert len(error.message) <= 500

    async def test_a_wrong_token(self, double: ReplicateServer) -> None:
        async with new_provider(double.origin, token="r8_other") as provider:
            error = await failure(provider.create(REQUEST))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "provider_auth")
        assert "r8_other" not in str(error)
        assert double.creates() == []

    async def test_an_unknown_model(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(unknown_models=[MODEL])
        error = await failure(provider.create(REQUEST))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "model_not_found")

    async def test_an_unknown_version(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(unknown_models=[MODEL])
        request = PredictionRequest(f"{MODEL}:{VERSION}", INPUT, 60)
        error = await failure(provider.create(request))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_input")
        assert "version does not exist" in error.message


class TestHeldWaits:
    async def test_only_so_many_creates_are_held_at_once(
        self, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "HELD_WAITS", 4)
        double.configure(starting_seconds=0, latency_seconds=0.4)
        async with new_provider(double.origin, wait=5) as provider:
            ended = await asyncio.gather(*(provider.create(REQUEST) for _ in range(7)))
            assert sorted(prediction.status for prediction in ended) == (
                ["processing"] * 3 + ["succeeded"] * 4
            )
            # All of them have let go again.
            double.reset()
            await asyncio.gather(*(provider.create(REQUEST) for _ in range(4)))
            assert [create.headers.get("prefer") for create in double.creates()] == ["wait=5"] * 4

    async def test_a_failed_create_is_held_no_longer(
        self, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "HELD_WAITS", 1)
        async with new_provider(double.origin, wait=5) as provider:
            for fault in (500, 422, 429):
                double.push_fault("create", "status", status=fault)
                await failure(provider.create(REQUEST))
            canceled = asyncio.create_task(provider.create(REQUEST))
            await asyncio.sleep(0)
            canceled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await canceled
            double.configure(starting_seconds=0, latency_seconds=0)
            await provider.create(REQUEST)
        assert double.creates()[-1].headers["prefer"] == "wait=5"

    async def test_the_default_bound_leaves_connections_for_creates_that_do_not_wait(self) -> None:
        assert 0 < client.HELD_WAITS < connections.CREATE_CONNECTIONS

    async def test_a_wait_that_ends_early_returns_the_running_prediction(
        self, double: ReplicateServer
    ) -> None:
        double.configure(starting_seconds=60, latency_seconds=60)
        # The wait is added to the time-out, or it would end as an ambiguous one.
        async with new_provider(double.origin, wait=1, timeout_seconds=0.9) as provider:
            prediction = await provider.create(REQUEST)
        assert prediction.status == "starting"


class TestGet:
    async def test_every_field_is_read(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(starting_seconds=0, latency_seconds=0.05)
        seen = await finished(provider, REQUEST)
        [create] = double.creates()
        assert (seen.id, seen.status, seen.model_name) == (create.id, "succeeded", MODEL)
        assert (seen.input, seen.version, seen.error) == (INPUT, "hidden", None)
        assert seen.output == [f"{double.origin}/files/{create.id}/out-0.png"]
        assert seen.created_at == datetime.fromisoformat(create.created_at)
        assert seen.predict_time_seconds == pytest.approx(0.05)
        assert seen.data_removed is False

    @pytest.mark.parametrize(
        ("status", "terminal"),
        [
            ("aborted", True),
            ("canceled", True),
            ("failed", True),
            ("succeeded", True),
            ("starting", False),
            ("processing", False),
            ("queued", False),
            ("SUCCEEDED", False),
        ],
    )
    async def test_every_status_is_read_known_or_not(
        self, provider: ReplicateProvider, double: ReplicateServer, status: str, terminal: bool
    ) -> None:
        double.push_fault("create", "status_sequence", sequence=[[0, status]])
        created = await provider.create(REQUEST)
        for seen in (
            created,
            await provider.get(created.id),
            (await polled(provider, [created.id]))[created.id],
        ):
            assert seen is not None
            assert (seen.status, seen.is_terminal) == (status, terminal)

    async def test_output_may_come_before_the_end(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("create", "processing_with_output", seconds=60)
        seen = await provider.create(REQUEST)
        assert seen.status == "processing"
        assert seen.output
        assert not seen.is_terminal

    @pytest.mark.parametrize(
        ("kind", "count"),
        [("list", 1), ("string", 1), ("none", 0), ("empty", 0), ("data_url", 1), ("object", 2)],
    )
    async def test_an_output_has_any_shape(
        self, provider: ReplicateProvider, double: ReplicateServer, kind: str, count: int
    ) -> None:
        double.configure(output_kind=kind)
        created = await provider.create(REQUEST)
        assert len(output_values(created.output)) == count

    async def test_removed_data_is_seen(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(retention_seconds=0)
        seen = await provider.create(REQUEST)
        assert (seen.data_removed, seen.output, seen.input) == (True, None, {})

    @pytest.mark.parametrize(
        "fields",
        [
            {"input": None, "model": None, "version": None, "metrics": None, "output": None},
            {"metrics": [], "created_at": 5, "completed_at": None},
            {"metrics": {"predict_time": "long"}, "created_at": "yesterday"},
            {"created_at": "2026-13-45T99:00:00Z", "error": {"code": 1}, "urls": None},
        ],
    )
    async def test_only_id_and_status_must_be_right(
        self, to_host: ReplicateProvider, host: Host, fields: dict[str, Any]
    ) -> None:
        host.reply = answer(prediction_json(**fields))
        for seen in (await to_host.create(REQUEST), await to_host.get("p1")):
            assert (seen.id, seen.status) == ("p1", "starting")

    async def test_a_time_without_a_zone_is_utc(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(prediction_json(created_at="2026-01-02T03:04:05.678901"))
        seen = await to_host.get("p1")
        assert seen.created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    async def test_an_error_is_text_that_a_database_can_keep(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(prediction_json(status="failed", error="a\x00b \ud800 ü"))
        assert (await to_host.get("p1")).error == "ab ? ü"


READS: dict[str, Callable[[ReplicateProvider], Awaitable[Any]]] = {
    "get": lambda provider: provider.get("p1"),
    "list": lambda provider: provider.find(SOUGHT, A_DAY_SECONDS),
    "cancel": lambda provider: provider.cancel("p1"),
    "models": lambda provider: provider.input_schema(MODEL),
}
COMES_BACK: list[Fault] = [
    ("status", {"status": 500}),
    ("status", {"status": 502, "body": HTML}),
    ("status", {"status": 503, "headers": {"x-should-retry": "true", "retry-after": "0"}}),
    ("status", {"status": 504}),
    ("status", {"status": 401}),
    ("status", {"status": 402}),
    ("status", {"status": 403, "body": HTML}),
    ("status", {"status": 408}),
    ("status", {"status": 302, "headers": {"location": "/v1/account"}}),
    ("drop", {"reset": True}),
    ("drop", {"reset": False}),
]


class TestReads:
    @pytest.mark.parametrize(("kind", "fields"), COMES_BACK)
    @pytest.mark.parametrize("on", READS)
    async def test_nothing_but_a_clear_answer_ends_a_prediction_that_is_paid(
        self,
        provider: ReplicateProvider,
        double: ReplicateServer,
        on: str,
        kind: str,
        fields: dict[str, Any],
    ) -> None:
        double.push_fault(on, kind, **fields, times=None)
        error = await failure(READS[on](provider))
        assert error.failure_class is FailureClass.TRANSIENT
        assert double.ledger().requests == {on: 1}

    @pytest.mark.parametrize("status", [400, 405, 410, 422])
    @pytest.mark.parametrize("on", ["get", "list"])
    async def test_no_other_refusal_does_either(
        self, provider: ReplicateProvider, double: ReplicateServer, on: str, status: int
    ) -> None:
        double.push_fault(on, "status", status=status, times=None)
        error = await failure(READS[on](provider))
        assert error.failure_class is FailureClass.TRANSIENT

    @pytest.mark.parametrize(
        "body", [HTML, "", "{", "null", "7", [], ["x"], {}, {"results": None}, {"results": [{}]}]
    )
    @pytest.mark.parametrize("on", ["get", "list"])
    async def test_an_answer_without_sense_is_asked_for_again(
        self, provider: ReplicateProvider, double: ReplicateServer, on: str, body: Any
    ) -> None:
        double.push_fault(on, "status", status=200, body=body, content_type="application/json")
        error = await failure(READS[on](provider))
        assert error.failure_class is FailureClass.TRANSIENT

    @pytest.mark.parametrize("body", [HTML, "null", [], {"latest_version": 7}])
    async def test_a_model_without_sense_is_asked_for_again(
        self, provider: ReplicateProvider, double: ReplicateServer, body: Any
    ) -> None:
        double.push_fault("models", "status", status=200, body=body)
        assert (await failure(READS["models"](provider))).failure_class is FailureClass.TRANSIENT

    async def test_a_time_out_is_asked_again(
        self, hasty: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("get", "delay", seconds=30, times=None)
        error = await failure(hasty.get("p1"))
        assert error.failure_class is FailureClass.TRANSIENT
        assert (await ledger_with(double, get=1)).requests == {"get": 1}

    async def test_a_refused_connection_is_asked_again(self) -> None:
        with closed_port() as port:
            async with new_provider(f"http://127.0.0.1:{port}") as provider:
                for call in READS.values():
                    error = await failure(call(provider))
                    assert error.failure_class is FailureClass.TRANSIENT

    async def test_only_a_prediction_can_be_not_found_and_not_the_list(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("list", "status", status=404, times=None)
        error = await failure(provider.find(SOUGHT, A_DAY_SECONDS))
        assert error.failure_class is FailureClass.TRANSIENT
        assert not isinstance(error, PredictionNotFound)

    @pytest.mark.parametrize("status", [403, 404, 500])
    async def test_without_the_list_each_prediction_is_read(
        self, provider: ReplicateProvider, double: ReplicateServer, status: int
    ) -> None:
        ids = await created_ids(provider, 3)
        double.push_fault("list", "status", status=status, times=None)
        assert (await polled(provider, ids)).keys() == set(ids)

    async def test_a_throttled_list_is_not_followed_by_more_calls(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        ids = await created_ids(provider, 3)
        double.push_fault("list", "status", status=429, times=None)
        error = await failure(polled(provider, ids))
        assert error.failure_class is FailureClass.THROTTLED
        assert double.ledger().requests.get("get", 0) == 0

    async def test_a_model_that_is_not_found_has_no_schema(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(unknown_models=[MODEL])
        for name in (MODEL, f"{MODEL}:{VERSION}"):
            assert await provider.input_schema(name) is None

    async def test_models_without_a_schema_have_none(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(schemas=False)
        assert await provider.input_schema(MODEL) is None

    async def test_a_version_has_its_own_schema(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        schema = await provider.input_schema(f"{MODEL}:{VERSION}")
        assert schema is not None
        assert "prompt" in schema["properties"]
        assert double.ledger().requests == {"models": 1}


async def created_ids(provider: ReplicateProvider, count: int) -> list[str]:
    creates = await asyncio.gather(*(provider.create(REQUEST) for _ in range(count)))
    return [created.id for created in creates]


class TestPoll:
    async def test_nothing_costs_nothing(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        assert await polled(provider, []) == {}
        assert double.ledger().requests == {}

    async def test_one_is_read_by_itself(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        [one] = await created_ids(provider, 1)
        assert (await polled(provider, [one])).keys() == {one}
        assert double.ledger().requests == {"create": 1, "get": 1}

    async def test_one_page_watches_a_hundred(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        ids = await created_ids(provider, 100)
        assert (await polled(provider, ids)).keys() == set(ids)
        assert double.ledger().requests == {"create": 100, "list": 1}
        # Others on the same account fill a page as well.
        await created_ids(provider, 50)
        double.push_fault("get", "status", status=500, times=None)
        assert (await polled(provider, ids)).keys() == set(ids)
        assert double.ledger().requests == {"create": 150, "list": 3}

    async def test_the_more_there_are_the_more_pages_are_read(
        self, provider: ReplicateProvider, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "PAGES_PER_POLL", 1)
        ids = await created_ids(provider, 150)
        assert (await polled(provider, ids)).keys() == set(ids)
        assert double.ledger().requests == {"create": 150, "list": 2}

    async def test_what_no_page_shows_is_read_by_itself(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        ids = await created_ids(provider, 5)
        double.configure(list_lag_seconds=3600)
        assert (await polled(provider, ids)).keys() == set(ids)
        assert double.ledger().requests == {"create": 5, "list": 1, "get": 5}

    async def test_reads_are_bounded_and_nobody_is_left_out_for_ever(
        self, provider: ReplicateProvider, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "GETS_PER_POLL", 4)
        ids = await created_ids(provider, 8)
        double.configure(list_lag_seconds=3600)
        seen: set[str] = set()
        for _ in range(20):
            found = await polled(provider, ids)
            assert len(found) == 4
            seen |= found.keys()
        assert seen == set(ids)

    async def test_what_was_read_counts_even_when_the_next_call_fails(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        def reply(path: str) -> bytes:
            if path.startswith("/v1/predictions/"):
                return answer(b"", "500 Internal Server Error")
            listed = [json.loads(prediction_json(id=id_)) for id_ in ("p1", "p2")]
            return answer(json.dumps({"next": None, "results": listed}).encode())

        host.reply = reply
        assert (await polled(to_host, ["p1", "p2", "p3"])).keys() == {"p1", "p2"}

    async def test_when_nothing_was_read_the_failure_is_told(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(list_lag_seconds=3600)
        double.push_fault("get", "status", status=429, headers={"retry-after": "9"}, times=None)
        error = await failure(polled(provider, ["p1", "p2"]))
        assert error.failure_class is FailureClass.THROTTLED
        assert error.retry_after_seconds == 9


class TestFind:
    async def test_the_one_with_this_exact_input_is_found(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(schemas=False)
        given = {"prompt": "ünïcödé 🌅", "b": 1.5, "a": {"deep": [1, None, {"x": True}]}, "seed": 7}
        wanted = PredictionRequest(MODEL, given, 60)
        created = await provider.create(wanted)
        for other in (
            {**given, "seed": 8},
            {**given, "more": 1},
            {"prompt": given["prompt"]},
            {**given, "a": {"deep": [1, None, {"x": False}]}},
            {},
        ):
            await provider.create(PredictionRequest(MODEL, other, 60))
        assert [seen.id for seen in await provider.find(Sought(MODEL, given), A_DAY_SECONDS)] == [
            created.id
        ]

    @pytest.mark.parametrize("ahead_seconds", [600, -600, 0])
    async def test_how_long_ago_is_told_by_the_providers_own_clock(
        self,
        provider: ReplicateProvider,
        double: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        ahead_seconds: int,
    ) -> None:
        double.configure(clock_ahead_seconds=ahead_seconds)
        created = await provider.create(REQUEST)
        assert [seen.id for seen in await provider.find(SOUGHT, 1)] == [created.id]
        if ahead_seconds <= 0:  # else ours is taken, and it is looked back for longer
            monkeypatch.setattr("app.providers.replicate.search.MARGIN_SECONDS", -60.0)
            assert await provider.find(SOUGHT, 30) == []

    async def test_none_is_an_empty_list(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        assert await provider.find(SOUGHT, A_DAY_SECONDS) == []

    async def test_it_looks_through_every_page_oldest_first(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        first = await provider.create(REQUEST)
        other = PredictionRequest(MODEL, {**INPUT, "seed": 8}, 60)
        await asyncio.gather(*(provider.create(other) for _ in range(210)))
        last = await provider.create(REQUEST)
        found = await provider.find(SOUGHT, A_DAY_SECONDS)
        assert [seen.id for seen in found] == [first.id, last.id]
        assert double.ledger().requests["list"] == 3

    async def test_a_list_without_end_proves_nothing(
        self, provider: ReplicateProvider, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "PAGES_PER_SEARCH", 2)
        await created_ids(provider, 201)
        other = Sought(MODEL, {**INPUT, "seed": 8})
        error = await failure(provider.find(other, A_DAY_SECONDS))
        assert error.failure_class is FailureClass.TRANSIENT
        assert double.ledger().requests["list"] == 2

    async def test_a_page_that_fails_is_asked_for_again(
        self, provider: ReplicateProvider, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "TRIES_PER_PAGE", 3)
        ids = await created_ids(provider, 101)
        wanted = await provider.get(ids[0])
        double.push_fault("list", "status", status=500, times=2)
        sought = Sought(MODEL, wanted.input)
        assert wanted.id in [seen.id for seen in await provider.find(sought, A_DAY_SECONDS)]
        assert double.ledger().requests["list"] == 4
        double.push_fault("list", "status", status=429, times=1)
        error = await failure(provider.find(sought, A_DAY_SECONDS))
        assert error.failure_class is FailureClass.THROTTLED

    async def test_a_page_that_fails_proves_nothing(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        await created_ids(provider, 101)
        other = Sought(MODEL, {**INPUT, "seed": 8})
        double.push_fault("list", "delay", seconds=0)
        double.push_fault("list", "status", status=500)
        error = await failure(provider.find(other, A_DAY_SECONDS))
        assert error.failure_class is FailureClass.TRANSIENT
        assert double.ledger().requests["list"] == 2

    async def test_a_prediction_whose_input_was_deleted_may_be_it(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        """After an hour Replicate forgets inputs: no list proves then that there is no match."""
        await provider.create(PredictionRequest(MODEL, {**INPUT, "seed": 8}, 60))
        assert await provider.find(SOUGHT, A_DAY_SECONDS) == []
        double.configure(retention_seconds=0)
        error = await failure(provider.find(SOUGHT, A_DAY_SECONDS))
        # It will never come back: asking again is of no use.
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "input_deleted")
        elsewhere = Sought("acme/sculptor", INPUT)
        assert await provider.find(elsewhere, A_DAY_SECONDS) == []
        elsewhere = Sought("acme/sculptor", INPUT, has_own_seed=True)
        assert (await failure(provider.find(elsewhere, A_DAY_SECONDS))).code == "input_deleted"

    async def test_it_is_shown_under_whatever_name(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        created = await provider.create(REQUEST)
        sought = Sought("acme/sculptor", INPUT)
        assert [seen.id for seen in await provider.find(sought, A_DAY_SECONDS)] == [created.id]

    async def test_a_strange_entry_hides_no_other(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        good = {"id": "p1", "status": "starting", "model": MODEL, "input": INPUT}
        strange = [{"id": None, "status": "starting"}, {}, 7, None, {**good, "id": "a\x00b"}]
        host.reply = answer(json.dumps({"next": None, "results": [*strange, good]}).encode())
        assert [seen.id for seen in await to_host.find(SOUGHT, 60)] == ["p1"]
        seen = await polled(to_host, ["p1", "p2"])
        assert seen["p1"] is not None
        other = Sought(MODEL, {**INPUT, "seed": 8})
        assert (await failure(to_host.find(other, 60))).failure_class is FailureClass.TRANSIENT

    async def test_the_token_follows_no_address_out_of_a_body(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        def reply(path: str) -> bytes:
            following = None if "cursor" in path else "http://evil.test/v1/predictions?cursor=c2"
            return answer(json.dumps({"next": following, "results": []}).encode())

        host.reply = reply
        assert await to_host.find(SOUGHT, A_DAY_SECONDS) == []
        assert host.heads[1].startswith("GET /v1/predictions?cursor=c2 ")

    @pytest.mark.parametrize("following", ["https://x/v1/predictions", "http://x:y/?c=1", "x", 7])
    async def test_a_next_page_that_can_not_be_reached_proves_nothing(
        self, to_host: ReplicateProvider, host: Host, following: Any
    ) -> None:
        host.reply = answer(json.dumps({"next": following, "results": []}).encode())
        error = await failure(to_host.find(SOUGHT, A_DAY_SECONDS))
        assert error.failure_class is FailureClass.TRANSIENT


class TestCancel:
    async def test_it_reaches_the_provider_once(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(starting_seconds=60, latency_seconds=60)
        created = await provider.create(REQUEST)
        await provider.cancel(created.id)
        [create] = double.creates()
        assert (create.status, len(create.cancel_calls)) == ("canceled", 1)

    @pytest.mark.parametrize("status", [400, 404, 409, 410, 422])
    async def test_a_prediction_that_can_not_be_canceled_any_more_is_no_error(
        self, provider: ReplicateProvider, double: ReplicateServer, status: int
    ) -> None:
        double.push_fault("cancel", "status", status=status)
        await provider.cancel("p1")


class TestDownload:
    async def test_the_api_itself_gets_the_token(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        created = await provider.create(REQUEST)
        assert await fetched(provider, created.output[0])
        [note] = double.creates()[0].downloads
        assert note.authorization
        assert note.host == double.origin.removeprefix("http://")

    @pytest.mark.parametrize(
        ("name", "gets_it"),
        [
            ("replicate.delivery", True),
            ("pbxt.replicate.delivery", True),
            ("notreplicate.delivery", False),
            ("replicate.delivery.test", False),
        ],
    )
    async def test_so_does_replicates_host_of_files_and_no_other(
        self,
        double: ReplicateServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        gets_it: bool,
    ) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(tls)
        look_up = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda _, *more, **given: look_up("127.0.0.1", *more, **given)
        )
        async with AsyncExitStack() as stack:
            files = await stack.enter_async_context(Host().running(tls))
            provider = await stack.enter_async_context(new_provider(double.origin))
            address = files.origin.replace("127.0.0.1", name)
            assert await fetched(provider, f"{address}/x.png") == b"content"
        [head] = files.heads
        assert head.startswith("GET /x.png HTTP/1.1")
        assert header(head, "authorization") == (
            f"Bearer {ReplicateServer.token}" if gets_it else None
        )

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/webhooks/default/secret",
            "/v1/predictions",
            "/v1/files",
            "/v1/files/",
            "/v1/files/../webhooks/default/secret",
            "/v1/files/%2e%2e/webhooks/default/secret",
            "/files/p1/../../v1/account",
            "//v1/account",
            "/",
        ],
    )
    async def test_nothing_else_of_the_account_is_read_in_a_models_name(
        self, provider: ReplicateProvider, double: ReplicateServer, path: str
    ) -> None:
        error = await failure(fetched(provider, f"{double.origin}{path}"))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")
        assert double.ledger().requests == {}

    @pytest.mark.parametrize(
        "url",
        [
            "https://127.0.0.1/x.png",
            "https://10.0.0.1/x.png",
            "https://169.254.169.254/latest/meta-data",
            "https://[::1]/x.png",
            "https://[::ffff:10.0.0.1]/x.png",
            "https://2130706433/x.png",
            "https://localhost/x.png",
            "https://replicate.delivery:8443/x.png",
        ],
    )
    async def test_what_is_not_public_is_not_reached(
        self, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        async with new_provider("https://api.replicate.com") as provider:
            error = await failure(fetched(provider, url))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")

    @pytest.mark.parametrize("proxy", [{}, {"HTTP_PROXY": "http://proxy.test:3128"}])
    async def test_a_resolver_that_misleads_is_no_fault_of_the_file(
        self, monkeypatch: pytest.MonkeyPatch, proxy: dict[str, str]
    ) -> None:
        """And a proxy for http alone is none for files."""
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in proxy.items():
            monkeypatch.setenv(name, value)
        look_up = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda _, *more, **given: look_up("127.0.0.1", *more, **given)
        )
        async with new_provider("https://api.replicate.com") as provider:
            error = await failure(fetched(provider, "https://replicate.delivery/x.png"))
            assert (error.failure_class, error.code) == (FailureClass.TRANSIENT, "download_failed")
            error = await failure(fetched(provider, "https://files.test/x.png"))
            assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")

    async def test_an_unencrypted_address_elsewhere_is_refused_without_a_request(
        self, provider: ReplicateProvider, host: Host
    ) -> None:
        port = host.origin.rpartition(":")[2]
        for url in (
            f"{host.origin}/files/p1/x.png",
            f"http://localhost:{port}/x.png",
            f"HTTP://127.0.0.1:{port}/x.png",
        ):
            error = await failure(fetched(provider, url))
            assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")
        assert host.heads == []

    @pytest.mark.parametrize(
        "url",
        [
            "http://[",
            "https://[::1",
            "https:///x.png",
            "https://user:secret@127.0.0.1/x.png",
            "https://api.replicate.com@127.0.0.1/x.png",
            "http:x",
            "https: is what I write",
            "https://" + "x" * 70_000,
            "https://\ud800/",
        ],
    )
    async def test_what_is_no_good_address_is_refused(
        self, provider: ReplicateProvider, url: str
    ) -> None:
        error = await failure(fetched(provider, url))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")

    @pytest.mark.parametrize(
        ("url", "content"),
        [
            ("data:image/png;base64," + base64.b64encode(b"\x89PNG\x00").decode(), b"\x89PNG\x00"),
            ("data:;base64,aGVsbG8=", b"hello"),
            ("data:image/png;base64,aGVsbG8%3D", b"hello"),
            ("data:text/plain,hello%20you", b"hello you"),
            ("data:text/plain;charset=utf-8,h%C3%A9", "hé".encode()),
            ("data:,", b""),
            ("data:", b""),
        ],
    )
    async def test_data_urls_are_decoded_without_a_request(
        self, provider: ReplicateProvider, double: ReplicateServer, url: str, content: bytes
    ) -> None:
        assert await fetched(provider, url) == content
        assert double.ledger().requests == {}

    @pytest.mark.parametrize("data", ["aGVsbG8", "aGVsb*8=", "ü", "="])
    async def test_a_broken_data_url_is_refused(
        self, provider: ReplicateProvider, data: str
    ) -> None:
        error = await failure(fetched(provider, f"data:image/png;base64,{data}"))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")

    @pytest.mark.parametrize("status", [404, 410])
    async def test_a_deleted_file_has_expired(
        self, provider: ReplicateProvider, double: ReplicateServer, status: int
    ) -> None:
        double.push_fault("download", "status", status=status)
        created = await provider.create(REQUEST)
        error = await failure(fetched(provider, created.output[0]))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "output_expired")

    async def test_a_file_past_its_lifetime_has_expired(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(file_lifetime_seconds=0)
        created = await provider.create(REQUEST)
        assert (await failure(fetched(provider, created.output[0]))).code == "output_expired"

    @pytest.mark.parametrize("status", [201, 204, 206, 400, 401, 403, 429, 500, 502, 503, 504])
    async def test_any_other_answer_is_worth_another_download(
        self, provider: ReplicateProvider, double: ReplicateServer, status: int
    ) -> None:
        double.push_fault("download", "status", status=status, body="" if status == 204 else None)
        created = await provider.create(REQUEST)
        error = await failure(fetched(provider, created.output[0]))
        assert (error.failure_class, error.code) == (FailureClass.TRANSIENT, "download_failed")
        assert await fetched(provider, created.output[0])

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_not_followed(
        self, provider: ReplicateProvider, double: ReplicateServer, host: Host, status: int
    ) -> None:
        headers = {"location": f"{host.origin}/files/p1/x.png"}
        double.push_fault("download", "status", status=status, headers=headers)
        created = await provider.create(REQUEST)
        error = await failure(fetched(provider, created.output[0]))
        assert error.failure_class is FailureClass.TRANSIENT
        assert host.heads == []

    async def test_a_file_that_breaks_off_is_worth_another_download(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.push_fault("download", "cut")
        created = await provider.create(REQUEST)
        error = await failure(fetched(provider, created.output[0]))
        assert (error.failure_class, error.code) == (FailureClass.TRANSIENT, "download_failed")

    @pytest.mark.parametrize(
        "reply",
        [
            answer(b"half", content_length=8),
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\nhalf",
            b"HTTP/1.1 200 OK\r\ncontent-le",
            b"220 mail.example ESMTP\r\n",
            b"",
        ],
        ids=["length", "chunked", "half a head", "mail", "nothing"],
    )
    async def test_every_way_to_break_off_is_noticed(
        self, to_host: ReplicateProvider, host: Host, reply: bytes
    ) -> None:
        host.reply = reply
        error = await failure(fetched(to_host, f"{host.origin}/files/p1/x.png"))
        assert error.failure_class is FailureClass.TRANSIENT

    @pytest.mark.parametrize("reply", [b"", answer(b"half", content_length=8)])
    async def test_a_host_that_falls_silent_is_left_after_the_time_out(
        self, host: Host, reply: bytes
    ) -> None:
        host.reply, host.hangs = reply, True
        async with new_provider(host.origin, timeout_seconds=0.3) as provider:
            began = time.monotonic()
            error = await failure(fetched(provider, f"{host.origin}/files/p1/x.png"))
            assert 0.2 < time.monotonic() - began < 2
        assert error.failure_class is FailureClass.TRANSIENT
        await asyncio.wait_for(host.left.wait(), 5)


class TestCompressedFiles:
    """Nobody is asked to compress; what is compressed all the same stays within bounds."""

    async def test_no_compression_is_asked_for(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        await fetched(to_host, f"{host.origin}/files/p1/x.png")
        assert header(host.heads[0], "accept-encoding") == "identity"

    @pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 300_000])
    async def test_a_compressed_file_is_unpacked(
        self, to_host: ReplicateProvider, host: Host, size: int
    ) -> None:
        content = bytes(size)
        host.reply = answer(gzip.compress(content), content_encoding="gzip")
        assert await fetched(to_host, f"{host.origin}/files/p1/x.png") == content

    async def test_every_member_of_it_and_nothing_behind_them(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        """A host may send for ever, and what is not yielded counts for no limit."""
        members = gzip.compress(b"first, ") + gzip.compress(b"second")
        host.reply = answer(members + b"<script>" * (1 << 16), content_encoding="gzip")
        assert await fetched(to_host, f"{host.origin}/files/p1/x.png") == b"first, second"

    async def test_a_bomb_comes_in_small_pieces(
        self, to_host: ReplicateProvider, host: Host
    ) -> None:
        host.reply = answer(gzip.compress(bytes(64 << 20)), content_encoding="gzip")
        sizes = [len(chunk) async for chunk in to_host.download(f"{host.origin}/files/p1/x.png")]
        assert sum(sizes) == 64 << 20
        assert max(sizes) <= 1 << 20

    @pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "gzip, br", "nonsense"])
    async def test_any_other_compression_is_refused(
        self, to_host: ReplicateProvider, host: Host, encoding: str
    ) -> None:
        twice = gzip.compress(gzip.compress(b"content"))
        host.reply = answer(twice, content_encoding=encoding)
        error = await failure(fetched(to_host, f"{host.origin}/files/p1/x.png"))
        assert (error.failure_class, error.code) == (FailureClass.PERMANENT, "invalid_output")

    @pytest.mark.parametrize(
        "body", [b"no gzip at all", b"", gzip.compress(bytes(1000))[:-9]], ids=len
    )
    async def test_a_damaged_one_is_worth_another_download(
        self, to_host: ReplicateProvider, host: Host, body: bytes
    ) -> None:
        host.reply = answer(body, content_encoding="gzip")
        error = await failure(fetched(to_host, f"{host.origin}/files/p1/x.png"))
        assert error.failure_class is FailureClass.TRANSIENT


class TestWebhookSecret:
    async def test_it_is_the_accounts(
        self, provider: ReplicateProvider, double: ReplicateServer
    ) -> None:
        double.configure(webhook_secret="whsec_c2VjcmV0")
        assert await provider.webhook_secret() == "whsec_c2VjcmV0"

    @pytest.mark.parametrize("body", [b"", b"null", b"{}", b"[]", HTML.encode()])
    async def test_an_answer_without_it_is_asked_for_again(
        self, to_host: ReplicateProvider, host: Host, body: bytes
    ) -> None:
        host.reply = answer(body)
        error = await failure(to_host.webhook_secret())
        assert error.failure_class is FailureClass.TRANSIENT


class TestGovernor:
    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            (None, ("succeeded", Call.CREATE)),
            ({"status": 422}, ("succeeded", Call.CREATE)),  # the provider is well, the input is not
            ({"status": 401}, ("succeeded", Call.CREATE)),
            ({"status": 500}, ("failed", Call.CREATE)),
            ({"status": 502, "body": HTML}, ("failed", Call.CREATE)),
            ({"status": 201, "body": HTML}, ("failed", Call.CREATE)),
            ({"status": 429, "headers": {"retry-after": "7"}}, ("throttled", Call.CREATE, 7)),
            # Nothing said: a short pause, or all workers would go on as before.
            ({"status": 429, "body": ""}, ("throttled", Call.CREATE, 1)),
        ],
    )
    async def test_it_hears_how_each_create_went_once(
        self, double: ReplicateServer, fault: dict[str, Any] | None, told: tuple[Any, ...]
    ) -> None:
        if fault is not None:
            double.push_fault("create", "status", **fault)
        governor = Reports()
        async with new_provider(double.origin, governor=governor) as provider:
            with suppress(ProviderError):
                await provider.create(REQUEST)
        assert governor.told == [told]

    async def test_a_create_is_admitted_apart_from_its_call(self, double: ReplicateServer) -> None:
        governor = Reports()
        async with new_provider(double.origin, governor=governor) as provider:
            await provider.admit()
        assert governor.told == [("admit", Call.CREATE)]

    async def test_our_own_delay_is_not_the_providers(
        self, double: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def slow() -> bool:
            await asyncio.sleep(30)
            return True

        monkeypatch.setattr(connections, "MAY_SEND_SECONDS", 0.05)
        governor = Reports()
        async with new_provider(double.origin, governor=governor) as provider:
            with pytest.raises(ProviderError) as raised:
                await provider.create(REQUEST, slow)
        assert raised.value.failure_class is FailureClass.INTERNAL
        assert governor.told == []
        assert double.creates() == []

    async def test_every_read_is_admitted_and_reported(self, double: ReplicateServer) -> None:
        governor = Reports()
        async with new_provider(double.origin, governor=governor) as provider:
            created = await provider.create(REQUEST)
            governor.told.clear()
            await provider.get(created.id)
            await provider.cancel(created.id)
            await provider.find(SOUGHT, A_DAY_SECONDS)
            await provider.input_schema(MODEL)
            with pytest.raises(PredictionNotFound):
                await provider.get("nosuch")
            assert governor.told == [("admit", Call.OTHER), ("succeeded", Call.OTHER)] * 5
            governor.told.clear()
            double.push_fault("get", "drop")
            double.push_fault("list", "status", status=429, headers={"retry-after": "3"})
            await failure(provider.get(created.id))
            await failure(provider.find(SOUGHT, A_DAY_SECONDS))
        assert governor.told == [
            ("admit", Call.OTHER),
            ("failed", Call.OTHER),
            ("admit", Call.OTHER),
            ("throttled", Call.OTHER, 3),
        ]

    async def test_a_wrong_model_name_is_not_the_providers_failure(
        self, double: ReplicateServer
    ) -> None:
        """A few of them would open the breaker, and keep every worker from polling."""
        governor = Reports()
        double.configure(unknown_models=[MODEL])
        async with new_provider(double.origin, governor=governor) as provider:
            await provider.input_schema(MODEL)
        assert governor.told == [("admit", Call.OTHER), ("succeeded", Call.OTHER)]

    async def test_downloads_are_not_counted(self, double: ReplicateServer) -> None:
        governor = Reports()
        async with new_provider(double.origin, governor=governor) as provider:
            created = await provider.create(REQUEST)
            governor.told.clear()
            await fetched(provider, created.output[0])
        assert governor.told == []


async def test_closing_ends_every_connection(double: ReplicateServer) -> None:
    async with new_provider(double.origin) as provider:
        await finished(provider, REQUEST)
    with pytest.raises((RuntimeError, ProviderError)):
        await provider.get("p1")
