# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what counts as a prompt, and what a faulty line is answered with."""

import re
from pathlib import Path

import pytest

from heterospec_vllm.prompts import texts_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "a"}', "a"),
        ('{"id": 3, "turns": ["b", "c"]}', "b"),
        ('{"prompt": "a", "turns": ["b"]}', "a"),
        ('{"prompt": "", "turns": ["b"]}', "b"),
        ('{"prompt": null, "turns": ["b"]}', "b"),
        ('{"prompt": "two\\nlines"}', "two\nlines"),
        ('{"prompt": "naïve 日本"}', "naïve 日本"),
        ('{"prompt": "one\u2028text\u0085of one line"}', "one\u2028text\u0085of one line"),
    ],
)
def test_first_user_message(file: Path, line: str, text: str) -> None:
    file.write_text(line + "\n", encoding="utf-8")
    assert texts_of(file) == [text]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_lines_keep_their_order(file: Path, end: str) -> None:
    separator = end or "\n"
    lines = [f'{{"prompt": "{i}"}}' for i in range(12)]
    file.write_bytes((separator.join(lines) + end).encode())
    assert texts_of(file) == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": 1, "question": "a"}',
        b'{"prompt": ""}',
        b'{"prompt": 3}',
        b'{"turns": []}',
        b'{"turns": "a"}',
        b'{"turns": [{"role": "user"}]}',
        b'["a"]',
        b'"a"',
        b"null",
        b"no json",
        b'{"prompt": "torn',
        b"",
    ],
)
def test_faulty_line_is_named(file: Path, line: bytes) -> None:
    file.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    expected = f"{file}, line 2: found {line.decode()!r}, allowed: a JSON object with `prompt`"
    with pytest.raises(ValueError, match=re.escape(expected) + ".*`turns`"):
        texts_of(file)


def test_other_encoding_is_refused(file: Path) -> None:
    file.write_bytes('{"prompt": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: found '.*na\ufffdve"):
        texts_of(file)


def test_long_faulty_line_is_cut(file: Path) -> None:
    file.write_text('{"question": "' + 1000 * "a" + '"}\n')
    with pytest.raises(ValueError, match="line 1") as raised:
        texts_of(file)
    assert len(str(raised.value)) < len(str(file)) + 250


def test_empty_file_is_refused(file: Path) -> None:
    file.touch()
    with pytest.raises(ValueError, match=re.escape(f"{file}: found no line, allowed: ")):
        texts_of(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"found no file {path}, allowed: ")):
            texts_of(path)
