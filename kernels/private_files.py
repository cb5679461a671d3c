# SPDX-License-Identifier: Apache-2.0
"""Files that code is loaded from, and files that nobody else may read or replace.

Folders made here have mode 0700, files 0600. A folder is used if it belongs to this account or to root, nobody else can
write it, and nobody else can replace it: the same holds for every folder above it, where a sticky one such as /tmp will
do. A file is opened without following a link, and only if it belongs to this account or to root and nobody else can
write it. Whoever loads code from a file also asks whether the file is whole (`is_whole`).

It lives among the kernels, which load a library and may import nothing of the plugin, and needs the standard library
only, so the plugin can use it without loading torch. docs/security.md tells users what is checked.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# A child of vLLM's logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.heterospec")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafePath(OSError):
    """Another account can write a path or replace it; the message says which, what was found and what is allowed."""


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, the same one once in a process."""
    logger.warning("heterospec: %s", text)


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/heterospec_vllm`, by default `~/.cache/heterospec_vllm`. Raises OSError without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise OSError("found no home folder for the cache, allowed: a folder in XDG_CACHE_HOME")
    return Path(root) / "heterospec_vllm"


# ---- folders


def make_folder(path: Path) -> Path:
    """The folder with its links resolved; made where it is missing, with those above it.

    Raises UnsafePath where another account can write or replace it, another OSError where it cannot be made.
    """
    path = path.absolute()
    for part in (path, *path.parents):
        if part.is_symlink():
            _check_owner(part, part.lstat(), "link")
    folder = Path(os.path.realpath(path))
    _check_folders(folder)
    for part in reversed((folder, *folder.parents)):
        if not part.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                part.mkdir(mode=0o700)
    _check_folders(folder)
    return folder


def _check_folders(folder: Path) -> None:
    """Raises UnsafePath for a folder, or one above it, that others can write; those that are missing pass."""
    for part in (folder, *folder.parents):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        is_above = part != folder
        if not (is_above and found.st_uid in _unmapped_accounts()):
            _check_owner(part, found, "folder")
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{part}: found no folder, allowed: a folder")
        if not (is_above and found.st_mode & stat.S_ISVTX):
            _check_mode(part, found, "folder")


@functools.cache
def _unmapped_accounts() -> frozenset[int]:
    """The number that root's folders show where the container maps this account but not root (Apptainer, Flatpak).

    Such folders cannot be told from those of other unmapped accounts, so they count as root's only above our own.
    """
    try:
        spans = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if not any(first == "0" for first, _, _ in spans):
            return frozenset({int(Path("/proc/sys/kernel/overflowuid").read_text())})
    except OSError:
        pass
    return frozenset()


def _check_owner(path: Path, found: os.stat_result, kind: str) -> None:
    own = os.geteuid()
    if found.st_uid not in (own, 0):
        allowed = f"account {own}'s or root's" if own else "root's"
        raise UnsafePath(f"{path}: found a {kind} of account {found.st_uid}, allowed: {allowed}")


def _check_mode(path: Path, found: os.stat_result, kind: str) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & _OTHERS_WRITE:
        raise UnsafePath(
            f"{path}: found a {kind} that others can write (mode {mode:04o}), allowed: one that only its owner can "
            "write (remove what you did not put there, then: chmod go-w)"
        )


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder of this process that is gone after the block. Raises UnsafePath where others can replace it."""
    folder = folder_of_process(prefix)
    try:
        yield make_folder(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def folder_of_process(prefix: str) -> Path:
    """A new private folder among the temporary ones; this process removes it when it exits.

    The folder of a process that was killed stays, until this account calls the function again. A lock tells which
    are in use, not the process id in the name: ids are reused, and another container may share the folder.
    """
    _remove_abandoned(prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
        if _is_locked(folder):
            atexit.register(_remove, folder, os.getpid())
            return folder


def _is_locked(folder: Path) -> bool:
    """Locks a new folder until this process ends; False where another one has just removed it as abandoned."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    with contextlib.suppress(
        OSError
    ):  # without locks in this file system nobody removes it, either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if folder.exists():
        return True
    os.close(descriptor)
    return False


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _remove(folder: Path, creator: int) -> None:
    # A forked child inherits the exit handler, but not the folder.
    if os.getpid() == creator:
        shutil.rmtree(folder, ignore_errors=True)


# ---- files


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that only this account or root could have written; with O_CREAT it is made (0600).

    Raises UnsafePath for any other file and for a link, another OSError where it cannot be opened.
    """
    try:
        # Not blocking, so that a pipe does not wait for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafePath(f"{path}: found a link, allowed: a file") from None
        raise
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnsafePath(f"{path}: found no regular file, allowed: a file")
        _check_owner(path, found, "file")
        _check_mode(path, found, "file")
        on_failure.pop_all()
    return descriptor


def opener(path: str, flags: int) -> int:
    """For `open(..., opener=opener)` of results: no link is followed, a new file is private."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new private file in the same folder; it takes the path's name after the block, unless that raises."""
    name_start = f".{path.name}-"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=name_start, suffix=path.suffix)
    os.close(descriptor)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write(path: Path, content: bytes) -> None:
    """Replaces the file by a private one; nobody sees a part of it."""
    with beside(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a lock file; the file is made if need be and never changed."""
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ---- files that code is loaded from


def keep(made: Path, path: Path) -> None:
    """Moves a file to its place, made private; its length and digest stand in a file beside it."""
    made.chmod(0o600)
    with made.open("rb") as file:
        write(_seal_path(path), _seal(file))
    made.replace(path)


def is_whole(path: Path) -> bool:
    """Whether the file is as `keep` left it; also False where there is none.

    Raises UnsafePath where another account could have written it or its digest.
    """
    try:
        with open(open_file(_seal_path(path)), "rb") as file:
            expected = file.read(200)
        with open(open_file(path), "rb") as file:
            return _seal(file) == expected
    except FileNotFoundError:
        return False


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _seal(file) -> bytes:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{os.fstat(file.fileno()).st_size} {digest}\n".encode()
