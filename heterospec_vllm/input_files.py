# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote: only regular ones are opened, without waiting, and JSON in them is taken with care.

Every fault is a ValueError of one line: what was found, in which file, what is allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterospec_vllm.errors import shown, shown_message, shown_path

MOST_BYTES = 16_000_000  # of a JSON file; the largest that we know is a hundredth of it
MOST_LEVELS = 100  # of brackets inside each other
MOST_DIGITS = 4000  # of an integer; Python reads a few more


class NoJson(ValueError):
    """Text that is no JSON; the message is what was found in its place."""


_KINDS = {
    stat.S_IFDIR: "Is a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def opened(path: Path, allowed: str) -> Iterator[tuple[int, int]]:
    """(file descriptor, length) of a regular file. A pipe is not read: its content would be gone the second time."""
    try:
        # Asked before it is opened, too: opening a device may do something.
        _require_regular(os.stat(path).st_mode)
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, allowed) from None
    try:
        found = os.fstat(file)
        try:
            _require_regular(found.st_mode)
        except OSError as error:
            raise _unreadable(path, error, allowed) from None
        yield file, found.st_size
    finally:
        os.close(file)


def read_bytes(file: int, path: Path, first: int, num_bytes: int) -> bytes:
    """Bytes of an opened file, all of them."""
    parts, missing = [], num_bytes
    while missing:
        try:
            part = os.pread(file, missing, first + num_bytes - missing)
        except OSError as error:
            raise _unreadable(path, error, "one that can be read") from None
        if not part:
            end = first + num_bytes - missing
            raise ValueError(f"found the end of {shown_path(path)} at {end}, allowed: later")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_object(path: Path, field: str) -> dict[str, Any]:
    """The object in a JSON file; the message begins with the field that names the file."""
    allowed = "a file with a JSON object"
    try:
        with opened(path, allowed) as (file, length):
            if length > MOST_BYTES:
                raise ValueError(
                    f"found {length} bytes at {shown_path(path)}, "
                    f"allowed: {allowed} of at most {MOST_BYTES}"
                )
            content = read_bytes(file, path, 0, length)
        return parse_object(content, f"at {shown_path(path)}", allowed)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def parse_object(content: bytes, where: str, allowed: str) -> dict[str, Any]:
    """The JSON object that some bytes are; `where` says whose they are."""
    try:
        found = parse(content)
    except NoJson as error:
        raise ValueError(f"found {error} {where}, allowed: {allowed}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"found {shown(found)} ({kind}) {where}, allowed: {allowed}")
    return found


def parse(content: bytes | str) -> Any:
    """What JSON text means. Raises NoJson."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise NoJson(f"bytes that are not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise NoJson(f"invalid JSON ({shown_message(error)})") from None
    except RecursionError:
        raise NoJson("brackets nested too deeply") from None
    if _is_deep(value):
        raise NoJson("brackets nested too deeply")
    return value


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(0, _KINDS.get(stat.S_IFMT(mode), "no regular file"))


def _unreadable(path: Path, error: Exception, allowed: str) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) else "no path"
    return ValueError(
        f"found no readable file ({reason}) at {shown_path(path)}, allowed: {allowed}"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, _ in pairs if counts[key] > 1)
        raise NoJson(f"the key {shown(twice)} twice")
    return content


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise NoJson(f"an integer of {len(digits)} digits")
    return int(digits)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
