# SPDX-License-Identifier: Apache-2.0
"""Long work shows how far it is wherever its output goes."""

import io

import pytest
from rich.console import Console

from heterospec_vllm.cli import progress
from heterospec_vllm.cli.progress import watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by ten seconds whenever it is read."""
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(times)))


def _console(**options: object) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100, **options), text  # type: ignore[arg-type]


def test_a_file_gets_a_line_now_and_then_and_one_at_the_end(clock: None) -> None:
    console, text = _console()
    assert list(watched(range(5), "tracing", console)) == [0, 1, 2, 3, 4]
    assert text.getvalue().splitlines() == [
        "tracing: 2 of 5, 20 s",
        "tracing: 4 of 5, 40 s",
        "tracing: 5 of 5, 50 s",
    ]


def test_nothing_to_do_prints_nothing(clock: None) -> None:
    console, text = _console()
    assert list(watched([], "tracing", console)) == []
    assert text.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    console, text = _console(force_terminal=True)
    assert list(watched("abc", "timing", console)) == ["a", "b", "c"]
    assert "timing" in text.getvalue() and "100%" in text.getvalue()
