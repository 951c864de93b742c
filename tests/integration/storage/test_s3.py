"""Storage in a bucket: the contract on a real S3 server, and what the network may do to it."""

import socket
import time
from pathlib import Path
from uuid import uuid4

import pytest

from app.errors import StorageError
from app.storage.base import Storage
from app.storage.s3 import S3Storage
from tests.contracts.storage import KEY, StorageContract, put, read


def bucket(endpoint_url: str, workspace: Path, *, secret: str = "test-secret") -> S3Storage:
    return S3Storage(
        f"s3://media/{uuid4().hex}",
        workspace,
        endpoint_url=endpoint_url,
        region="us-east-1",
        access_key_id="test-key",
        secret_access_key=secret,
    )


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, tmp_path: Path) -> Storage:
        return bucket(s3_url, tmp_path / "workspace")


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

    async def test_two_prefixes_do_not_see_each_other(self, s3_url: str, tmp_path: Path) -> None:
        ours, theirs = bucket(s3_url, tmp_path / "a"), bucket(s3_url, tmp_path / "b")
        await put(ours, KEY, b"content")
        assert await theirs.size(KEY) is None
