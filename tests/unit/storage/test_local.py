"""Storage in local folders: what the disk may do to it, beside the contract."""

import asyncio
import errno
import os
import shutil
import stat
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import LeaseLost, StorageError
from app.storage.base import Storage
from app.storage.local import LocalStorage
from app.storage.workspaces import remove_leftovers
from tests.contracts.storage import KEY, Owner, StorageContract, listed, put, read

METADATA_KEY = "metadata/picture.json"


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "media", tmp_path / "metadata")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "media", tmp_path / "metadata")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root and `mount`")
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestFolders:
    def test_they_are_made_with_their_parents(self, tmp_path: Path) -> None:
        LocalStorage(tmp_path / "a" / "media", tmp_path / "b" / "metadata")
        assert (tmp_path / "a" / "media").is_dir()
        assert (tmp_path / "b" / "metadata").is_dir()

    async def test_files_outlive_the_process_that_wrote_them(self, tmp_path: Path) -> None:
        folders = tmp_path / "media", tmp_path / "metadata"
        await put(LocalStorage(*folders), KEY, b"content")
        assert await read(LocalStorage(*folders), KEY) == b"content"

    async def test_a_key_is_a_file_name(self, storage: LocalStorage, tmp_path: Path) -> None:
        await put(storage, KEY, b"media")
        await put(storage, METADATA_KEY, b"metadata")
        assert (tmp_path / "media" / "picture.png").read_bytes() == b"media"
        assert (tmp_path / "metadata" / "picture.json").read_bytes() == b"metadata"

    async def test_a_later_change_of_directory_does_not_move_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        storage = LocalStorage(Path("media"), Path("metadata"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        await put(storage, KEY, b"content")
        assert (tmp_path / "media" / "picture.png").exists()

    def test_a_file_in_their_place_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "media").write_text("not a folder")
        with pytest.raises(StorageError, match="storage folders"):
            LocalStorage(tmp_path / "media", tmp_path / "metadata")

    def test_the_workspace_is_on_the_same_file_system(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        assert storage.workspace.stat().st_dev == (tmp_path / "media").stat().st_dev


class TestDurability:
    async def test_content_is_flushed_before_it_gets_its_name_and_the_folder_after(
        self, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "media" / "picture.png"
        flushed: list[tuple[bool, bool]] = []

        def fsync(descriptor: int) -> None:
            flushed.append((target.exists(), stat.S_ISDIR(os.fstat(descriptor).st_mode)))

        monkeypatch.setattr(os, "fsync", fsync)
        await put(storage, KEY, b"content")
        assert flushed == [(False, False), (True, True)]

    async def test_a_failed_flush_stores_nothing(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        await put(storage, KEY, b"old")
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match="Input/output error"):
            await put(storage, KEY, b"new")
        assert await read(storage, KEY) == b"old"

    async def test_metadata_may_lie_on_another_file_system(
        self, tmp_path: Path, small_disk: Path
    ) -> None:
        storage = LocalStorage(tmp_path / "media", small_disk / "metadata")
        await put(storage, METADATA_KEY, b"first")
        await put(storage, METADATA_KEY, b"second")
        assert await read(storage, METADATA_KEY) == b"second"
        assert files_in(small_disk / "metadata") == ["picture.json"]
        assert list(storage.workspace.iterdir()) == []


class TestWithoutHardLinks:
    """As on FAT, and some network file systems."""

    @pytest.fixture(autouse=True)
    def no_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)

    async def test_files_are_stored_all_the_same(self, storage: LocalStorage) -> None:
        await put(storage, KEY, b"content")
        assert await read(storage, KEY) == b"content"
        assert list(storage.workspace.iterdir()) == []

    async def test_who_has_lost_the_job_replaces_nothing(self, storage: LocalStorage) -> None:
        await put(storage, KEY, b"content")
        with pytest.raises(LeaseLost):
            await put(storage, KEY, b"zombie", Owner(lost=True))
        assert await read(storage, KEY) == b"content"


class TestAddresses:
    async def test_there_are_none(self, storage: Storage) -> None:
        await put(storage, KEY, b"content")
        assert await storage.url(KEY, 60) is None


class TestListing:
    async def test_what_is_no_file_of_ours_is_left_out(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        await put(storage, KEY, b"content")
        (tmp_path / "media" / ".hidden").write_bytes(b"")
        (tmp_path / "media" / "folder").mkdir()
        assert [file.name for file in await listed(storage, "media")] == ["picture.png"]

    async def test_more_names_than_one_look_brings(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        for number in range(2500):
            (tmp_path / "media" / f"{number}.png").touch()
        assert len({file.name for file in await listed(storage, "media")}) == 2500

    async def test_a_lost_folder_is_an_error(self, storage: LocalStorage, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "metadata")
        with pytest.raises(StorageError, match="cannot list metadata"):
            await listed(storage, "metadata")


class TestClean:
    async def test_it_removes_half_copied_metadata_but_no_document_however_old(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        await put(storage, METADATA_KEY, b"metadata")
        (tmp_path / "metadata" / ".incoming" / "copy").write_bytes(b"half")
        for path in (tmp_path / "metadata").rglob("*"):
            os.utime(path, (0, 0))
        assert await remove_leftovers(storage.workspaces, 3600) == 1
        assert await read(storage, METADATA_KEY) == b"metadata"

    async def test_it_takes_no_memory_however_much_is_stored(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        """It is done every minute, and a million names are hundreds of megabytes."""
        for number in range(5000):
            for folder in ("media", "metadata"):
                (tmp_path / folder / f"{number}.json").touch()
        tracemalloc.start()
        try:
            assert await remove_leftovers(storage.workspaces, 3600) == 0
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 200_000  # the names alone: 500,000

    async def test_a_lost_workspace_is_an_error(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        shutil.rmtree(tmp_path / "media")
        with pytest.raises(StorageError, match="workspace"):
            await remove_leftovers(storage.workspaces, 3600)

    async def test_many_at_once_count_every_file_once(self, storage: LocalStorage) -> None:
        for number in range(50):
            path = storage.workspace / str(number)
            path.write_bytes(b"half")
            os.utime(path, (0, 0))
        assert (
            sum(
                await asyncio.gather(
                    *(remove_leftovers(storage.workspaces, 3600) for _ in range(8))
                )
            )
            == 50
        )


class TestFullDisk:
    async def test_what_does_not_fit_is_an_error_and_the_old_file_stays(
        self, tmp_path: Path, small_disk: Path
    ) -> None:
        storage = LocalStorage(tmp_path / "media", small_disk / "metadata")
        await put(storage, METADATA_KEY, b"old")
        with pytest.raises(StorageError, match="No space left"):
            await put(storage, METADATA_KEY, bytes(2 << 20))
        assert await read(storage, METADATA_KEY) == b"old"
        assert files_in(small_disk / "metadata") == ["picture.json"]

    async def test_check_tells_and_a_freed_disk_is_well_again(self, small_disk: Path) -> None:
        storage = LocalStorage(small_disk / "media", small_disk / "metadata")
        filling = small_disk / "filling"
        with pytest.raises(OSError, match="No space left"):
            filling.write_bytes(bytes(2 << 20))
        with pytest.raises(StorageError, match="No space left"):
            await storage.check()
        filling.unlink()
        await storage.check()
        assert list(storage.workspace.iterdir()) == []


class TestLostFolders:
    """As root no permission is ever missing, so the folder is a file instead."""

    @pytest.fixture
    def spoiled(self, storage: LocalStorage, tmp_path: Path) -> LocalStorage:
        shutil.rmtree(tmp_path / "metadata")
        (tmp_path / "metadata").write_text("not a folder")
        return storage

    async def test_put_is_an_error(self, spoiled: LocalStorage) -> None:
        with pytest.raises(StorageError, match="Not a directory"):
            await put(spoiled, METADATA_KEY, b"content")

    async def test_size_is_an_error_and_not_none(self, spoiled: LocalStorage) -> None:
        with pytest.raises(StorageError, match="Not a directory"):
            await spoiled.size(METADATA_KEY)

    async def test_read_is_an_error_and_not_a_missing_file(self, spoiled: LocalStorage) -> None:
        with pytest.raises(StorageError, match="Not a directory"):
            await read(spoiled, METADATA_KEY)

    async def test_check_looks_at_the_metadata_too(self, spoiled: LocalStorage) -> None:
        with pytest.raises(StorageError, match="not writable"):
            await spoiled.check()

    async def test_check_looks_at_the_media(self, storage: LocalStorage, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "media")
        with pytest.raises(StorageError, match="not writable"):
            await storage.check()

    async def test_an_error_never_names_a_path(self, spoiled: LocalStorage, tmp_path: Path) -> None:
        with pytest.raises(StorageError) as caught:
            await put(spoiled, METADATA_KEY, b"content")
        assert str(tmp_path) not in str(caught.value)
