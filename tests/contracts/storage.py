"""The contract of `Storage`.

class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "media", tmp_path / "metadata")
"""

import asyncio
import hashlib
import os
import time
from uuid import UUID, uuid4

import pytest

from app.errors import LeaseLost, StorageError
from app.storage.base import (
    Checkpoint,
    Storage,
    StoredFile,
    media_key,
    metadata_key,
    thumbnail_key,
)
from app.storage.workspaces import remove_leftovers

KEY = media_key("picture.png")
# More than any adapter moves at once, and not a multiple of anything.
LARGE = hashlib.shake_256(b"large").digest((3 << 20) + 17)
# Goes to S3 in parts.
HUGE = hashlib.shake_256(b"huge").digest((20 << 20) + 17)


class StorageContract:
    """Derive it, and give the fixture `storage`: an empty one for each test."""

    @pytest.mark.parametrize(
        "key", [KEY, metadata_key(UUID(int=7)), thumbnail_key("picture.png", 256)]
    )
    async def test_what_is_put_can_be_read(self, storage: Storage, key: str) -> None:
        await put(storage, key, b"\x89PNG\x00content")
        assert await read(storage, key) == b"\x89PNG\x00content"
        assert await storage.size(key) == 12

    async def test_media_and_metadata_of_one_name_are_two_files(self, storage: Storage) -> None:
        await put(storage, "media/same.json", b"media")
        await put(storage, "metadata/same.json", b"metadata")
        assert await read(storage, "media/same.json") == b"media"
        assert await read(storage, "metadata/same.json") == b"metadata"

    async def test_put_takes_the_local_file_away(self, storage: Storage) -> None:
        path = storage.workspace / "new"
        path.write_bytes(b"content")
        await storage.put(KEY, path)
        assert not path.exists()
        assert list(storage.workspace.iterdir()) == []

    async def test_the_workspace_takes_files_from_the_start(self, storage: Storage) -> None:
        assert storage.workspace.is_dir()
        assert list(storage.workspace.iterdir()) == []

    async def test_a_second_put_replaces_the_first(self, storage: Storage) -> None:
        await put(storage, KEY, b"the first, longer content")
        await put(storage, KEY, b"second")
        assert await read(storage, KEY) == b"second"
        assert await storage.size(KEY) == 6

    @pytest.mark.parametrize("content", [b"content", LARGE, HUGE], ids=["small", "large", "huge"])
    async def test_the_same_bytes_again_are_already_stored(
        self, storage: Storage, content: bytes
    ) -> None:
        asked = Owner()
        await put(storage, KEY, content, asked)
        await put(storage, KEY, content, asked)
        assert asked.times == 0
        assert await read(storage, KEY) == content
        assert list(storage.workspace.iterdir()) == []

    @pytest.mark.parametrize("content", [b"other..", HUGE[::-1]], ids=["small", "huge"])
    async def test_other_bytes_replace_the_file_of_a_job_still_owned(
        self, storage: Storage, content: bytes
    ) -> None:
        asked = Owner()
        await put(storage, KEY, b"content" if len(content) == 7 else HUGE, asked)
        await put(storage, KEY, content, asked)
        assert asked.times == 1
        assert await read(storage, KEY) == content

    @pytest.mark.parametrize("content", [b"zombie!", b"longer than it", HUGE])
    async def test_who_has_lost_the_job_replaces_nothing(
        self, storage: Storage, content: bytes
    ) -> None:
        await put(storage, KEY, b"content")
        with pytest.raises(LeaseLost):
            await put(storage, KEY, content, Owner(lost=True))
        assert await read(storage, KEY) == b"content"

    async def test_of_many_first_writers_all_but_one_are_asked(self, storage: Storage) -> None:
        owners = [Owner() for _ in range(8)]
        contents = [b"%d" % number for number in range(8)]
        writes = zip(contents, owners, strict=True)
        await asyncio.gather(*(put(storage, KEY, content, owner) for content, owner in writes))
        assert sum(owner.times == 0 for owner in owners) == 1
        assert await read(storage, KEY) in contents

    async def test_a_deleted_file_is_gone_and_may_come_again(self, storage: Storage) -> None:
        await put(storage, KEY, b"content")
        await put(storage, "media/other.png", b"other")
        await storage.delete(KEY)
        await storage.delete(KEY)
        assert await storage.size(KEY) is None
        assert await read(storage, "media/other.png") == b"other"
        await put(storage, KEY, b"again", Owner(lost=True))
        assert await read(storage, KEY) == b"again"

    async def test_a_folder_is_listed_without_the_others(self, storage: Storage) -> None:
        names = {f"{number}.png" for number in range(30)}
        await storage.check()
        await asyncio.gather(*(put(storage, media_key(name), name.encode()) for name in names))
        await put(storage, metadata_key(UUID(int=7)), b"{}")
        await put(storage, thumbnail_key("0.png", 256), b"webp")
        assert {file.name for file in await listed(storage, "media")} == names
        assert {file.size_bytes for file in await listed(storage, "media")} == {5, 6}
        assert [file.name for file in await listed(storage, "metadata")] == [f"{UUID(int=7)}.json"]
        [thumbnail] = await listed(storage, "thumbnails")
        assert thumbnail.name == "0.png.256.webp"
        assert abs(thumbnail.modified_at.timestamp() - time.time()) < 60

    async def test_an_empty_folder_lists_nothing(self, storage: Storage) -> None:
        await storage.check()
        for folder in ("media", "metadata", "thumbnails"):
            assert await listed(storage, folder) == []

    async def test_no_other_folder_can_be_listed(self, storage: Storage) -> None:
        for folder in ("", ".", "..", "media/..", ".incoming", "other"):
            with pytest.raises(StorageError):
                await listed(storage, folder)

    async def test_an_empty_file_is_a_file(self, storage: Storage) -> None:
        await put(storage, KEY, b"")
        assert await storage.size(KEY) == 0
        assert await read(storage, KEY) == b""

    async def test_a_large_file_comes_back_in_bounded_chunks(self, storage: Storage) -> None:
        await put(storage, KEY, LARGE)
        chunks = [chunk async for chunk in storage.read(KEY)]
        assert b"".join(chunks) == LARGE
        assert len(chunks) > 1
        assert b"" not in chunks

    @pytest.mark.parametrize(
        ("start", "length"),
        [
            (0, 1),
            (5, 10),
            (0, None),
            (len(LARGE) - 1, None),
            (len(LARGE) - 10, 100),  # beyond the end: what there is
            (1 << 20, (1 << 20) + 1),
            (len(LARGE), None),
            (4096, 4096),
            (7, 0),
        ],
    )
    async def test_a_part_can_be_read(
        self, storage: Storage, start: int, length: int | None
    ) -> None:
        await put(storage, KEY, LARGE)
        end = None if length is None else start + length
        assert await read(storage, KEY, start, length) == LARGE[start:end]
        assert (
            await storage.load(KEY, start, len(LARGE) if length is None else length)
            == LARGE[start:end]
        )

    async def test_reading_can_stop_early(self, storage: Storage) -> None:
        await put(storage, KEY, LARGE)
        async for chunk in storage.read(KEY):
            assert LARGE.startswith(chunk)
            break
        assert await read(storage, KEY, 0, 3) == LARGE[:3]

    async def test_an_unknown_key_has_no_size_and_can_not_be_read(self, storage: Storage) -> None:
        assert await storage.size(KEY) is None
        with pytest.raises(FileNotFoundError):
            await read(storage, KEY)
        with pytest.raises(FileNotFoundError):
            await storage.load(KEY, 0, 10)

    async def test_what_was_loaded_outlives_its_file(self, storage: Storage) -> None:
        await put(storage, KEY, LARGE)
        loaded = await storage.load(KEY, 5, len(LARGE))
        await put(storage, KEY, b"other")
        await storage.delete(KEY)
        assert loaded == LARGE[5:]

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "media",
            "media/",
            "picture.png",
            "/etc/passwd",
            "media//etc/passwd",
            "other/picture.png",
            "media/../metadata/x.json",
            "media/..",
            "media/.",
            "media/.hidden",
            "media/folder/picture.png",
            "../media/picture.png",
            "media/nul\x00.png",
        ],
    )
    async def test_a_key_that_leads_elsewhere_is_refused(self, storage: Storage, key: str) -> None:
        path = storage.workspace / "new"
        path.write_bytes(b"content")
        with pytest.raises(StorageError):
            await storage.put(key, path)
        with pytest.raises(StorageError):
            await storage.size(key)
        with pytest.raises(StorageError):
            await read(storage, key)
        with pytest.raises(StorageError):
            await storage.delete(key)

    async def test_a_put_without_its_file_is_an_error_and_changes_nothing(
        self, storage: Storage
    ) -> None:
        await put(storage, KEY, b"kept")
        with pytest.raises(StorageError):
            await storage.put(KEY, storage.workspace / "never-made")
        assert await read(storage, KEY) == b"kept"

    async def test_a_reader_never_sees_part_of_a_file(self, storage: Storage) -> None:
        versions = {bytes([number]) * (200_000 + number) for number in range(12)}
        await put(storage, KEY, min(versions))
        writing = asyncio.gather(*(put(storage, KEY, version) for version in versions))
        looks = 0
        while not writing.done() or looks < 3:
            assert await read(storage, KEY) in versions
            assert await storage.size(KEY) in {len(version) for version in versions}
            looks += 1
        await writing
        assert await read(storage, KEY) in versions

    async def test_check_passes_and_leaves_nothing(self, storage: Storage) -> None:
        await storage.check()
        assert list(storage.workspace.iterdir()) == []

    async def test_many_checks_at_once_do_not_disturb_each_other(self, storage: Storage) -> None:
        await asyncio.gather(*(storage.check() for _ in range(200)))

    async def test_clean_removes_what_was_left_long_ago_and_nothing_else(
        self, storage: Storage
    ) -> None:
        await put(storage, KEY, b"media")
        await put(storage, metadata_key(UUID(int=7)), b"metadata")
        for name, age_seconds in (("young", 0), ("old", 5000), ("older", 9000)):
            path = storage.workspace / name
            path.write_bytes(b"half")
            changed_at = time.time() - age_seconds
            os.utime(path, (changed_at, changed_at))
        assert await remove_leftovers(storage.workspaces, 3600) == 2
        assert [path.name for path in storage.workspace.iterdir()] == ["young"]
        assert await remove_leftovers(storage.workspaces, 3600) == 0
        assert await read(storage, KEY) == b"media"
        assert await read(storage, metadata_key(UUID(int=7))) == b"metadata"


class Owner:
    """Who is asked before a file is replaced, and counts it."""

    def __init__(self, *, lost: bool = False) -> None:
        self.times = 0
        self._lost = lost

    async def __call__(self) -> None:
        self.times += 1
        if self._lost:
            raise LeaseLost


async def put(
    storage: Storage, key: str, content: bytes, still_ours: Checkpoint | None = None
) -> None:
    """Store `content` the way the service does: a file in the workspace, then `put`."""
    path = storage.workspace / uuid4().hex
    path.write_bytes(content)
    await storage.put(key, path, still_ours)


async def listed(storage: Storage, folder: str) -> list[StoredFile]:
    """List a folder whole."""
    return [file async for file in storage.names(folder)]


async def read(storage: Storage, key: str, start: int = 0, length: int | None = None) -> bytes:
    """Read a file, or part of it, whole."""
    return b"".join([chunk async for chunk in storage.read(key, start, length)])
