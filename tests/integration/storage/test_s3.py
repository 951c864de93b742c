"""Storage in a bucket: the contract on a real S3 server, and what the network may do to it."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import httpx
import pytest
from obstore.store import MemoryStore

from app.errors import StorageError
from app.storage import s3
from app.storage.base import Storage
from app.storage.s3 import S3Storage
from tests.contracts.storage import HUGE, KEY, StorageContract, put, read


async def ask(method: str, url: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.request(method, url, **options)


def bucket(
    endpoint_url: str, workspace: Path, *, secret: str = "test-secret", public: str | None = None
) -> S3Storage:
    return S3Storage(
        f"s3://media/{uuid4().hex}",
        workspace,
        endpoint_url=endpoint_url,
        public_endpoint_url=public,
        region="us-east-1",
        access_key_id="test-key",
        secret_access_key=secret,
    )


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, tmp_path: Path) -> Storage:
        return bucket(s3_url, tmp_path / "workspace")


class TestContractInMemory(StorageContract):
    """The same code on obstore's store in memory: nothing hangs on what one server does."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        storage = bucket("http://127.0.0.1:1", tmp_path / "workspace")
        storage._store = MemoryStore()  # type: ignore[assignment]
        return storage

    async def test_a_large_file_comes_back_in_bounded_chunks(self, storage: Storage) -> None:
        pytest.skip("what is in memory is there in one piece already")


class TestAddresses:
    @pytest.fixture
    def storage(self, s3_url: str, tmp_path: Path) -> S3Storage:
        return bucket(s3_url, tmp_path)

    async def test_anybody_may_get_the_file_there(self, storage: S3Storage) -> None:
        await put(storage, KEY, b"0123456789")
        reply = await ask("GET", await storage.url(KEY, 60), headers={"Range": "bytes=2-4"})
        assert (reply.status_code, reply.content) == (206, b"234")
        assert reply.headers["content-type"] == "image/png"
        assert reply.headers["content-disposition"] == 'attachment; filename="picture.png"'
        assert reply.headers["cache-control"] == "public, max-age=31536000, immutable"

    async def test_nobody_may_change_it_there(self, storage: S3Storage) -> None:
        await put(storage, KEY, b"content")
        url = await storage.url(KEY, 60)
        assert (await ask("PUT", url, content=b"other")).status_code == 403
        assert (await ask("DELETE", url)).status_code == 403
        assert await read(storage, KEY) == b"content"

    async def test_it_ends(self, storage: S3Storage) -> None:
        await put(storage, KEY, b"content")
        url = await storage.url(KEY, 1)
        await asyncio.sleep(2.1)  # the server knows whole seconds
        assert (await ask("GET", url)).status_code == 403

    async def test_it_is_good_for_one_file_only(self, storage: S3Storage) -> None:
        await put(storage, "media/other.png", b"content")
        url = (await storage.url(KEY, 60)).replace("picture.png", "other.png")
        assert (await ask("GET", url)).status_code == 403

    async def test_it_is_signed_for_the_host_that_clients_see(
        self, s3_url: str, tmp_path: Path
    ) -> None:
        public = s3_url.replace("127.0.0.1", "localhost")
        storage = bucket(s3_url, tmp_path, public=public)
        await put(storage, KEY, b"content")
        url = await storage.url(KEY, 60)
        assert url.startswith(f"{public}/media/")
        assert "test-secret" not in url
        assert (await ask("GET", url)).content == b"content"
        assert (await ask("GET", url.replace("localhost", "127.0.0.1"))).status_code == 403

    async def test_a_large_file_has_them_too(self, storage: S3Storage) -> None:
        await put(storage, "media/film.mp4", HUGE)
        reply = await ask("GET", await storage.url("media/film.mp4", 60))
        assert reply.content == HUGE
        assert reply.headers["content-type"] == "video/mp4"
        assert "-" in reply.headers["etag"]  # how S3 marks what came in parts


class TestFailures:
    async def _assert_fails(self, storage: S3Storage) -> None:
        path = storage.workspace / "new"
        path.write_bytes(b"content")
        for failing in (storage.put(KEY, path), storage.size(KEY), read(storage, KEY)):
            with pytest.raises(StorageError):
                await failing
        with pytest.raises(StorageError):
            await storage.check()
        assert path.exists()  # what was not stored is still there, to be stored again

    async def test_wrong_keys_are_a_storage_error(self, s3_url: str, tmp_path: Path) -> None:
        await self._assert_fails(bucket(s3_url, tmp_path, secret="wrong"))

    async def test_a_server_that_refuses_connections_is_one_in_time(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
            storage = bucket(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path)
            started = time.monotonic()
            with pytest.raises(StorageError):
                await storage.size(KEY)
            assert time.monotonic() - started < 20

    async def test_a_bucket_that_never_answers_is_one_in_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3, "SILENCE_SECONDS", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # it connects, and that is all
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            await self._fails_within(10, bucket(url, tmp_path))

    async def test_a_bucket_that_refuses_for_its_load_is_one_in_time(self, tmp_path: Path) -> None:
        async with answering(SLOW_DOWN) as url:
            await self._fails_within(20, bucket(url, tmp_path))

    async def _fails_within(self, seconds: float, storage: S3Storage) -> None:
        started = time.monotonic()
        await self._assert_fails(storage)
        assert time.monotonic() - started < seconds

    async def test_a_bucket_that_comes_back_takes_the_file(
        self, s3_url: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "new"
        path.write_bytes(b"content")
        async with answering(SLOW_DOWN) as url:
            with pytest.raises(StorageError):
                await bucket(url, tmp_path).put(KEY, path)
        back = bucket(s3_url, tmp_path)
        await back.put(KEY, path)
        assert await read(back, KEY) == b"content"

    async def test_two_prefixes_do_not_see_each_other(self, s3_url: str, tmp_path: Path) -> None:
        ours, theirs = bucket(s3_url, tmp_path / "a"), bucket(s3_url, tmp_path / "b")
        await put(ours, KEY, b"content")
        assert await theirs.size(KEY) is None


SLOW_DOWN = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    """A server that gives this answer to everything."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(reply)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class TestWorkspace:
    """The folder among everybody's temporary ones."""

    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Path:
        return tmp_path / "workspace"

    def test_nobody_else_can_read_it(self, workspace: Path) -> None:
        bucket("http://127.0.0.1:1", workspace)
        assert workspace.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("is_link", [True, False])
    def test_one_that_is_not_ours_is_refused(
        self, workspace: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
    ) -> None:
        if is_link:
            workspace.symlink_to(workspace.parent)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(StorageError, match="it is another user's"):
            bucket("http://127.0.0.1:1", workspace)

    async def test_one_that_was_tidied_away_is_made_again(self, workspace: Path) -> None:
        storage = bucket("http://127.0.0.1:1", workspace)
        storage._store = MemoryStore()  # type: ignore[assignment]
        await asyncio.to_thread(workspace.rmdir)
        await storage.check()
        assert await asyncio.to_thread(workspace.is_dir)

    async def test_one_that_takes_no_file_is_not_well(
        self, workspace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = bucket("http://127.0.0.1:1", workspace)
        storage._store = MemoryStore()  # type: ignore[assignment]
        monkeypatch.setattr(s3, "probe", Mock(side_effect=OSError))
        with pytest.raises(StorageError):
            await storage.check()
