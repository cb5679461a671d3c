# SPDX-License-Identifier: Apache-2.0
"""Wraps: their targets still exist in vLLM, they apply once, and they notice another patcher."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from heterospec_vllm import patching
from heterospec_vllm.layers.linears_cpu import DISPATCH
from heterospec_vllm.patching import Wrap
from heterospec_vllm.plugin import wraps
from heterospec_vllm.plugin.head_loading import LOADS
from heterospec_vllm.plugin.wraps import WRAPS


class Upstream:
    """Stands for a class of vLLM."""

    @staticmethod
    def parse(text: str) -> str:
        return text

    def check(self, value: int) -> int:
        return value


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Undoes what a test wraps here, so that tests do not see each other's wrappers."""
    originals = dict(vars(Upstream))
    applied = dict(patching._applied)
    yield
    Upstream.parse, Upstream.check = originals["parse"], originals["check"]  # type: ignore[method-assign]
    patching._applied.clear()
    patching._applied.update(applied)


def plus(suffix: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper that adds something to the result."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: original(*args) + suffix

    return make


def wrap(name: str, parameters: tuple[str, ...], suffix: Any) -> Wrap:
    return Wrap(
        module=__name__,
        owner="Upstream",
        name=name,
        parameters=parameters,
        why="a test",
        remove_when="the test ends",
        make=plus(suffix),
    )


CHECK = wrap("check", ("self", "value"), 1)
PARSE = wrap("parse", ("text",), "!")


RECORDS = (*WRAPS, DISPATCH, *LOADS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.target)
def test_target_exists_as_recorded(record: Wrap) -> None:
    """Fails on a vLLM that moved, renamed or changed what we wrap."""
    found = record.find()
    assert found is not None
    function = inspect.unwrap(found.__func__ if isinstance(found, staticmethod) else found)
    assert function.__module__ == record.module
    assert tuple(inspect.signature(function).parameters) == record.parameters
    assert record.reason() is None


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.target)
def test_record_is_complete(record: Wrap) -> None:
    assert record.why.endswith(".") and record.remove_when.endswith(".")


def test_apply_wraps_once() -> None:
    for _ in range(2):
        CHECK.apply()
        PARSE.apply()
    assert Upstream().check(1) == 2
    # A staticmethod stays one: called on an instance it gets no `self`.
    assert Upstream.parse("a") == Upstream().parse("a") == "a!"
    assert CHECK.reason() is None and PARSE.reason() is None


def test_a_wrap_for_the_time_of_a_block_leaves_no_trace() -> None:
    function, staticmethod_ = vars(Upstream)["check"], vars(Upstream)["parse"]
    with CHECK.while_loading(), PARSE.while_loading():
        assert Upstream().check(1) == 2 and Upstream().parse("a") == "a!"
    with pytest.raises(RuntimeError, match="loading"), CHECK.while_loading():
        raise RuntimeError("loading")
    assert vars(Upstream)["check"] is function and vars(Upstream)["parse"] is staticmethod_
    gone = Wrap(__name__, "Upstream", "gone", (), "a test", "never", plus(1))
    error = pytest.raises(ValueError, match="heterospec: .*found no such function")
    with error, gone.while_loading():
        pass


def test_changed_signature_is_a_reason() -> None:
    assert wrap("check", ("self", "number"), 1).reason() == (
        f"{__name__}.Upstream.check: found the parameters ('self', 'value'), "
        "allowed: ('self', 'number')"
    )


@pytest.mark.parametrize("module", [__name__, "vllm.no_such_module"])
def test_missing_target_is_a_reason(module: str) -> None:
    record = Wrap(module, "Upstream", "gone", (), "a test", "never", plus(1))
    reason = record.reason()
    assert reason is not None and f"{module}.Upstream.gone: found no such function" in reason


def test_a_patcher_that_drops_ours_is_a_reason() -> None:
    CHECK.apply()
    Upstream.check = lambda self, value: value  # type: ignore[method-assign]
    reason = CHECK.reason()
    assert reason is not None and "in place of the wrapper of heterospec" in reason


def test_a_patcher_that_calls_ours_is_fine() -> None:
    CHECK.apply()
    ours = Upstream.check

    @functools.wraps(ours)
    def theirs(self: Upstream, value: int) -> int:
        return ours(self, value) * 10

    Upstream.check = theirs  # type: ignore[method-assign]
    assert CHECK.reason() is None
    CHECK.apply()
    assert Upstream().check(1) == 20


def test_apply_all_leaves_what_it_cannot_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown vLLM must not fail to start for users without our config."""
    gone = Wrap("vllm.no_such_module", "Upstream", "gone", (), "a test", "never", plus(1))
    monkeypatch.setattr(wraps, "WRAPS", (gone, CHECK))
    wraps.apply_all()
    assert Upstream().check(1) == 2
