"""Where a server's files lie and which account runs it: PostgreSQL refuses root.

Root runs the servers as `nobody`, who must reach the programs and the data, while a checkout may
lie where only root can enter (/root). No permission of a folder that exists is ever changed: what
the account cannot reach is placed below a folder of our own (`SHARED_FOLDERS`) instead.
"""

import contextlib
import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.supervise import ServerError

SHARED_FOLDERS = (
    Path("/var/lib/replicate-media-service"),
    Path("/var/tmp/replicate-media-service"),
)
ACCOUNT_NAMES = ("nobody", "daemon")


class Account(NamedTuple):
    """The user and group ids a server runs with."""

    user: int
    group: int


class Place(NamedTuple):
    """`home` holds the locks; `files` below it belongs to the account, and is the server's own."""

    home: Path
    files: Path
    account: Account | None


def place_for(data_path: Path) -> Place:
    """The place of the server whose folder is `data_path`; made when it does not exist.

    It is `data_path` itself, unless we are root and the account cannot work there.
    Raises ServerError when no place can be had, OSError when the disk refuses.
    """
    files = data_path / "server"
    if os.geteuid() != 0:
        files.mkdir(mode=0o700, exist_ok=True)
        return Place(data_path, files, None)
    redirected = _shared_folder() / "data" / _key(data_path)
    if not redirected.exists():
        account = _give(files)
        if _is_usable(files, account):
            return Place(data_path, files, account)
        if any(files.iterdir()):
            raise ServerError(
                f"The data in {files} can no longer be reached by user {account.user}."
            )
        files.rmdir()
        _make_home(redirected, data_path)
    files = redirected / "server"
    return Place(redirected, files, _give(files))


def programs(package: Path, parts: Sequence[str]) -> Path:
    """The folder from which `parts` (paths beside `package`) can be run by the server's account.

    That is `package`'s parent, or for root a copy of the parts, made once for each version.
    """
    if os.geteuid() != 0:
        return package.parent
    wheel = next(package.parent.glob(f"{package.name}-*.dist-info/WHEEL"))
    build = wheel.parent.name.encode() + wheel.read_bytes()  # the version, and the platform
    folder = _shared_folder() / "programs" / hashlib.sha256(build).hexdigest()[:16]
    if not folder.exists():
        _copy(package.parent, parts, folder)
    return folder


def _give(files: Path) -> Account:
    """Make the folder and give it to the account; one that has an unprivileged owner keeps it."""
    files.mkdir(mode=0o700, exist_ok=True)
    status = files.stat()
    if status.st_uid != 0:
        return Account(status.st_uid, status.st_gid)
    account = _unprivileged_account()
    try:
        os.chown(files, account.user, account.group)
    except OSError as error:  # a container or user namespace without the right or without the user
        raise _bound_to_root(error) from error
    return account


def _unprivileged_account() -> Account:
    for name in ACCOUNT_NAMES:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise ServerError(
        f"PostgreSQL refuses root, and none of the users {ACCOUNT_NAMES} exists here."
    )


def _is_usable(files: Path, account: Account) -> bool:
    """Whether the account can write in the folder; tried, as modes do not tell all (ACLs, NFS)."""
    try:
        attempt = subprocess.run(
            ["/bin/sh", "-c", 'mkdir "$0/$$" && rmdir "$0/$$"', str(files)],
            user=account.user,
            group=account.group,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise _bound_to_root(error) from error
    return attempt.returncode == 0


def _bound_to_root(error: OSError) -> ServerError:
    return ServerError(
        "PostgreSQL refuses root, and root may not become another user here "
        f"({error.strerror}): run this as a normal user."
    )


def _shared_folder() -> Path:
    for folder in SHARED_FOLDERS:
        with contextlib.suppress(OSError):
            if not folder.exists():
                _make_passable(folder)
            status = folder.lstat()
            # /var/tmp is open to everybody: a folder somebody else has put there is not ours.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and not status.st_mode & 0o022:
                return folder
    raise ServerError(f"None of the folders {', '.join(map(str, SHARED_FOLDERS))} can be used.")


def _make_passable(folder: Path) -> None:
    """Make a folder of ours that every account may pass through, whatever the umask is."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o711)


def _key(data_path: Path) -> str:
    """Changes when `data_path` is deleted and made anew: with a new password, the data is new."""
    secret = data_path / "password"
    content = secret.read_bytes() if secret.exists() else b""
    return hashlib.sha256(os.fsencode(data_path) + b"\0" + content).hexdigest()[:16]


def _make_home(home: Path, data_path: Path) -> None:
    """Make the folder and what tells whose it is; delete those that nobody can come back to."""
    _make_passable(home.parent)
    for other in home.parent.iterdir():
        with contextlib.suppress(OSError):  # another start may be deleting it too
            if _is_forsaken(other) and not _is_locked(other):
                shutil.rmtree(other)
    partial = Path(tempfile.mkdtemp(dir=home.parent.parent))
    (partial / "origin").write_text(str(data_path))
    partial.chmod(0o711)
    _move_whole(partial, home)


def _is_forsaken(home: Path) -> bool:
    """Whether the home's data path was made anew since, or was a temporary folder and is gone.

    Any other path that is gone may be on a volume that is not mounted now: its data stays.
    """
    origin = Path((home / "origin").read_text())
    if (origin / "password").exists():
        return _key(origin) != home.name
    return origin.is_relative_to(Path(tempfile.gettempdir()).resolve())


def _is_locked(home: Path) -> bool:
    for path in home.glob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def _copy(source: Path, parts: Sequence[str], folder: Path) -> None:
    _make_passable(folder.parent)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for part in parts:
        if (source / part).exists():
            shutil.copytree(source / part, partial / part, symlinks=True)
    for path in (partial, *partial.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if executable else 0o644)
    _move_whole(partial, folder)


def _move_whole(partial: Path, folder: Path) -> None:
    """Give the folder its name, unless somebody else has made it meanwhile."""
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.exists():
            raise
