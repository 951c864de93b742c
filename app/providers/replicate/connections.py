"""How Replicate is reached: creates on connections of their own, each made for one call."""

import asyncio
import socket
import ssl
import struct
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
import ssrfguard.httpx
from replicate import AsyncReplicate
from ssrfguard import Policy

from app.providers.base import MaySend
from app.providers.replicate.failures import CalledOff

CREATE_CONNECTIONS = 128  # httpx's pool scans all of them at every request: hundreds are not cheap
READ_CONNECTIONS = 8
# How long `may_send` may take; after that the create is called off, as nothing was sent yet.
MAY_SEND_SECONDS = 5.0

# What the create call of this context asks at the last moment before it is sent.
asked_before_sending: ContextVar[MaySend | None] = ContextVar("asked_before_sending", default=None)


@dataclass(frozen=True, slots=True)
class Access:
    """Where the API is, who asks, and for how long it may keep silent."""

    base_url: str
    token: str = field(repr=False)
    timeout: httpx.Timeout
    tls: ssl.SSLContext  # one for all: it takes 30 ms to read the roots

    @property
    def origin(self) -> httpx.URL:
        """The API's own scheme, host and port (and whatever else the address has)."""
        return httpx.URL(self.base_url)


def client_for_creates(access: Access) -> AsyncReplicate:
    """Return a client without keep-alive, whose connections send nothing once they are closed.

    A request on a connection that the server has just closed fails in a way that cannot be told
    from an accepted one. And Linux goes on sending what a closed socket holds for a minute or more,
    also for a process that was killed: a create would arrive long after we have asked whether it
    did.
    """
    lingering = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport = httpx.AsyncHTTPTransport(
        verify=access.tls,
        limits=httpx.Limits(max_connections=CREATE_CONNECTIONS, max_keepalive_connections=0),
        proxy=_proxy_for(access.origin),
        socket_options=[lingering],
    )
    return _client(access, transport=transport)


def client_for_reads(access: Access) -> AsyncReplicate:
    """Return a client that keeps its few connections: a read may safely be repeated."""
    limits = httpx.Limits(max_connections=READ_CONNECTIONS)
    return _client(access, limits=limits, verify=access.tls)


def client_for_files(access: Access) -> httpx.AsyncClient:
    """Return a client that reaches public addresses only: which one is a model's to say.

    Not where the API itself is unencrypted, a double on this machine: its files are here, too. Nor
    behind a proxy, which looks the names up and has to know what may be reached.
    """
    if access.origin.scheme == "http" or {"https", "all"} & getproxies().keys():
        return plain_client(access)
    policy = Policy(allowed_schemes=frozenset({"https"}), allowed_ports=frozenset({443}))
    # An HTTP_PROXY alone is not for https; ssrfguard refuses to start beside one.
    return ssrfguard.httpx.AsyncClient(
        policy=policy, timeout=access.timeout, verify=access.tls, trust_env=False
    )


def plain_client(access: Access) -> httpx.AsyncClient:
    """Return a client that goes where it is sent, and sends nobody a token by itself."""
    return httpx.AsyncClient(timeout=access.timeout, verify=access.tls)


def _client(access: Access, **connecting: Any) -> AsyncReplicate:
    return AsyncReplicate(
        bearer_token=access.token,
        base_url=f"{access.base_url}/v1",
        max_retries=0,  # the package would repeat a create on time-outs and 5xx
        timeout=access.timeout,
        http_client=httpx.AsyncClient(
            timeout=access.timeout,
            follow_redirects=False,
            **connecting,
            event_hooks={"request": [_ask_before_sending]},
        ),
    )


async def _ask_before_sending(request: httpx.Request) -> None:
    """Have the connection ask `may_send` when it is made and nothing is sent yet.

    To connect takes time, in which the job may have been cancelled or taken over.
    """
    may_send = asked_before_sending.get()
    if may_send is None:
        return

    async def trace(event: str, _: object) -> None:
        if event == "http11.send_request_headers.started":
            await _raise_unless(may_send)

    request.extensions["trace"] = trace


async def _raise_unless(may_send: MaySend) -> None:
    try:
        # Bounded here: were it the whole call's time-out, our own delay would be the provider's.
        async with asyncio.timeout(MAY_SEND_SECONDS):
            allowed = await may_send()
    except Exception as error:
        raise CalledOff from error
    if not allowed:
        raise CalledOff


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names, as httpx reads it for its own transports."""
    named = getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
