# SPDX-License-Identifier: Apache-2.0
"""Prompt files: a JSON object a line, with `prompt` or `turns`."""

import json
from pathlib import Path
from typing import Any

_ALLOWED = "a JSON object with `prompt`, a text, or `turns`, a list of texts"
_MAX_SHOWN = 80  # bytes of a refused line


def texts_of(path: Path) -> list[str]:
    """The prompts of a JSONL file in its order; of `turns`, the first.

    Raises ValueError for a file that is missing or empty and for a line that holds no prompt.
    """
    if not path.is_file():
        raise ValueError(
            f"prompts: found no file {path}, allowed: a JSONL file; a line is {_ALLOWED}"
        )
    # In bytes, because str.splitlines also splits at characters that JSON texts may hold.
    with path.open("rb") as lines:
        texts = [_text(path, number, line) for number, line in enumerate(lines, 1)]
    if not texts:
        raise ValueError(f"{path}: found no line, allowed: lines that each are {_ALLOWED}")
    return texts


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        text = _first_text(json.loads(line))
    except ValueError:  # no JSON, or no UTF-8
        text = None
    if text is None:
        shown = line.strip()[:_MAX_SHOWN].decode(errors="replace")
        raise ValueError(f"{path}, line {number}: found {shown!r}, allowed: {_ALLOWED}")
    return text


def _first_text(row: Any) -> str | None:
    """`prompt`, else the first of `turns`; None where neither is a text of some length."""
    if not isinstance(row, dict):
        return None
    turns = row.get("turns")
    first_turn = turns[0] if isinstance(turns, list) and turns else None
    for text in (row.get("prompt"), first_turn):
        if isinstance(text, str) and text:
            return text
    return None
