# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote: what is no JSON object in a regular file is refused at once, in one line."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from heterospec_vllm import input_files
from heterospec_vllm.input_files import NoJson, parse, read_object


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        read_object(path, "field")
    words = str(raised.value)
    assert words.startswith("field: found ") and ", allowed: a file with a JSON object" in words
    assert words.isprintable() and len(words) < 800
    return words


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "a FIFO without a writer": (os.mkfifo, "a pipe"),
    "socket": (_socket, "a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "dangling link": (lambda path: path.symlink_to(path.with_name("nowhere")), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = KINDS[kind]
    path = tmp_path / "config.json"
    make(path)
    assert words in refusal(path) and str(path) in refusal(path)


def test_a_pipe_of_the_shell_is_not_read() -> None:
    """`--speculative-config <(...)`: its content would be gone when the config is built again."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b'{"method": "heterospec"}')
        assert "a pipe" in refusal(Path(f"/dev/fd/{reader}"))
        os.set_blocking(reader, False)
        assert os.read(reader, 99).startswith(b"{")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 256, "File name too long"),
        ("a\0b", "no path"),
        ("\ud800", "no path"),
        ("~nobodyatall/x", "No such file"),
        ("a\nb", r"a\nb"),
    ],
)
def test_names_that_no_file_has(name: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "invalid JSON"),
        (b"{", "line 1 column 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"x": {"\\n": 1, "\\n": 2}}', r"the key '\n' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "[1, 2] (list)"),
        (b"nul", "invalid JSON"),
        (b'"\\ud800"', r"'\ud800' (str)"),
    ],
)
def test_what_is_no_object(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert f"found {2**40} bytes" in refusal(path)


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    deep = json.loads("[" * 50 + "]" * 50)
    for content in ({}, {"a": [1, 2.5, None]}, {"deep": deep, "big": 10**400, "ü": "ü"}):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert read_object(path, "field") == content
    path.write_bytes(b"\xef\xbb\xbf{}")
    link = tmp_path / "link.json"
    link.symlink_to(path)
    assert read_object(link, "field") == {}


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with input_files.opened(path, "a file") as (file, _):
        assert input_files.read_bytes(file, path, 0, 2) == b"{}"
        with pytest.raises(ValueError, match="found the end of"):
            input_files.read_bytes(file, path, 1, 2)


def test_text_as_well_as_bytes() -> None:
    assert parse('{"a": 1}') == parse(b'{"a": 1}') == {"a": 1}
    with pytest.raises(NoJson):
        parse('{"a": 1, "a": 1}')
