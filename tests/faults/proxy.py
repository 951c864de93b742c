"""A TCP proxy on loopback that can pass, refuse, reset, delay, cut, silently hold, and answer."""

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16
BACKLOG = 4096


@dataclass(eq=False)
class _Link:
    """One proxied connection: the client's side, the server's side, and what was sent back."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    replied_bytes: int = 0
    flowing: asyncio.Event = field(default_factory=asyncio.Event)


class FaultProxy:
    """Stands in front of one port of this machine; use as a context manager.

    It runs on a thread of its own. Every method takes effect before it returns and may be called
    from any thread; the last of `pass_on`, `refuse`, `hold`, `answer` decides, `delay` and
    `cut_replies` come on top of passing.
    """

    def __init__(self, target_port: int) -> None:
        self.connections = 0  # accepted so far
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        # Bound but never listening: it keeps the port for us while connections are refused.
        self._reservation = _bound(0)
        self.port: int = self._reservation.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = False
        self._answer: bytes | None = None
        self._delay_seconds = 0.0
        self._cut_after_bytes: int | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reservation.close()

    def pass_on(self) -> None:
        """End every fault: accept again, and deliver what was held."""
        self._do(self._pass_on())

    def refuse(self) -> None:
        """Reset all connections and refuse new ones, as a stopped server does."""
        self._do(self._refuse())

    def reset(self) -> None:
        """Reset (RST) the connections there are; new ones pass."""
        self._do(self._reset())

    def hold(self) -> None:
        """Go silent: no byte and no FIN in either direction; new connections open, unanswered.

        What was sent meanwhile is delivered by `pass_on`, even if its sender has given up.
        """
        self._do(self._hold())

    def forget(self) -> None:
        """After `hold`: new connections pass, the others stay silent for ever (a fail-over)."""
        self._do(self._forget())

    def answer(self, response: bytes) -> None:
        """Answer every HTTP request with this (head and body, to be the connection's last)."""
        self._do(self._answer_with(response))

    def delay(self, seconds: float) -> None:
        """Hold back every chunk, in both directions, for so long; 0 ends it."""
        self._do(self._set(delay_seconds=seconds))

    def cut_replies(self, after_bytes: int | None) -> None:
        """Reset each new connection once so many bytes came back from the server; None ends it.

        With 0 the server gets the whole request and the client nothing: accepted, then dropped.
        """
        self._do(self._set(cut_after_bytes=after_bytes))

    @property
    def open_connections(self) -> int:
        """How many connections there are now."""
        return len(self._links)

    # --- on the loop -------------------------------------------------------------------------

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        if self._server is None:
            listener = _bound(self.port)
            self._server = await asyncio.start_server(self._serve, sock=listener, backlog=BACKLOG)

    async def _pass_on(self) -> None:
        await self._set(delay_seconds=0, cut_after_bytes=None, held=False, answer=None)
        await self._listen()
        for link in self._links:
            link.flowing.set()

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()
        self._held = False

    async def _reset(self) -> None:
        for link in list(self._links):
            _abort(link.client)
            _abort(link.server)
            link.flowing.set()
        self._links.clear()
        await asyncio.sleep(0)  # closed sockets, not only scheduled ones

    async def _hold(self) -> None:
        self._held = True
        for link in self._links:
            link.flowing.clear()
        await self._listen()

    async def _forget(self) -> None:
        self._held = False
        self._links.clear()

    async def _answer_with(self, response: bytes) -> None:
        await self._set(answer=response)
        await self._reset()
        await self._listen()

    async def _set(self, **values: bytes | float | int | None) -> None:
        for name, value in values.items():
            setattr(self, f"_{name}", value)

    async def _close(self) -> None:
        await self._refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            await self._relay(reader, client)

    async def _relay(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        link = _Link(client)
        self._links.add(link)
        if not self._held:
            link.flowing.set()
        try:
            await link.flowing.wait()
            if reader._eof:  # type: ignore[attr-defined] # gave up while nobody answered
                return
            if self._answer is not None:
                await _answer_one(reader, client, self._answer)
                return
            replies, link.server = await asyncio.open_connection(HOST, self._target_port)
            await asyncio.gather(
                self._pump(link, reader, link.server),
                self._pump(link, replies, client, replies=True),
            )
        except BaseException:
            _abort(client)
            raise
        finally:
            self._links.discard(link)
            for side in (client, link.server):
                if side is not None:
                    side.close()

    async def _pump(
        self,
        link: _Link,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        *,
        replies: bool = False,
    ) -> None:
        """Carry one direction of a link; `replies` are what `cut_replies` counts."""
        with suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                if self._delay_seconds:
                    await asyncio.sleep(self._delay_seconds)
                await link.flowing.wait()
                if replies and not self._may_reply(link, chunk):
                    return
                sink.write(chunk)
                await sink.drain()
            await link.flowing.wait()
        if not sink.is_closing():
            with suppress(OSError):
                sink.write_eof()

    def _may_reply(self, link: _Link, chunk: bytes) -> bool:
        """Count a reply; one that goes too far is sent in part, then the connection is reset."""
        limit = self._cut_after_bytes
        if limit is None:
            return True
        left = limit - link.replied_bytes
        link.replied_bytes += len(chunk)
        if len(chunk) < left:
            return True
        link.client.write(chunk[: max(left, 0)])
        # A FIN after the bytes when there are any: a RST would take them back.
        link.client.close() if left > 0 else _abort(link.client)
        _abort(link.server)
        return False


async def _answer_one(
    reader: asyncio.StreamReader, client: asyncio.StreamWriter, response: bytes
) -> None:
    """Read one request to its end, then answer it: earlier, and the client might see a reset."""
    with suppress(asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)
        client.write(response)
        await client.drain()


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((HOST, port))
    return listener


def _abort(writer: asyncio.StreamWriter | None) -> None:
    """Close with RST: a socket that lingers for zero seconds sends no FIN."""
    if writer is None:
        return
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
