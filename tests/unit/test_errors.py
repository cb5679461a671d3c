# SPDX-License-Identifier: Apache-2.0
"""What pydantic refuses, in words: one short line a fault, whatever was found."""

import itertools
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from heterospec_vllm.errors import (
    WHOLE,
    allowed_at,
    clauses_of,
    faults_of,
    joined,
    one_line,
    shown,
    shown_name,
    shown_path,
)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[int, Field(ge=1, le=9)] = 1
    share: Annotated[float, Field(gt=0, le=1)] = 1
    any_number: Annotated[float, Field(allow_inf_nan=False)] = 0
    flag: bool = True
    names: dict[str, str] = {}


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    inner: Inner = Inner()
    several: list[Inner] = []
    told: int = Field(default=0, json_schema_extra={"allowed": "what the field says"})
    kind: Literal["a", "b"] | None = None
    first: Annotated[Literal[0, 1], WHOLE] = 0
    rising: list[int] = []

    @field_validator("rising")
    @classmethod
    def _rise(cls, values: list[int]) -> list[int]:
        if values != sorted(values):
            raise ValueError("numbers must rise")
        return values


def clauses(**values: Any) -> str:
    return clauses_of_dict(values)


def clauses_of_dict(values: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(values)
    words = clauses_of(raised.value, Outer, values)
    assert words.isprintable() and len(words) < 1200
    return words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inner": {"size": 0}}, "inner.size: found 0, allowed: an integer from 1 to 9"),
        ({"inner": {"size": True}}, "inner.size: found True, allowed: an integer from 1 to 9"),
        ({"inner": {"size": "5"}}, "inner.size: found '5', allowed: an integer from 1 to 9"),
        ({"inner": {"size": 10**400}}, "an integer from 1 to 9"),
        ({"inner": {"size": 10**5000}}, "inner.size: found a large int, allowed"),
        ({"inner": {"share": 2}}, "inner.share: found 2, allowed: a number > 0 and <= 1"),
        ({"inner": {"any_number": float("nan")}}, "found nan, allowed: a finite number"),
        ({"inner": {"flag": 1}}, "inner.flag: found 1, allowed: true, false"),
        ({"inner": None}, "inner: found null, allowed: a mapping"),
        ({"inner": {"names": {"a": 5}}}, "inner.names.a: found 5, allowed: a text"),
        ({"inner": {"sise": 1}}, "inner.sise: unknown key, allowed: size, share, any_number, flag"),
        ({"several": [{}, {"size": 0}]}, "several.1.size: found 0, allowed: an integer"),
        ({"told": "x"}, "told: found 'x', allowed: what the field says"),
        ({"kind": "c"}, "kind: found 'c', allowed: 'a', 'b' or null"),
        ({"first": True}, "first: found True, allowed: 0, 1"),
        ({"first": 1.0}, "first: found 1.0, allowed: 0, 1"),
        ({"rising": [2, 1]}, "rising: numbers must rise"),
    ],
    ids=itertools.count(),
)
def test_a_clause(values: dict[str, Any], words: str) -> None:
    assert words in clauses_of_dict(values)


@pytest.mark.parametrize("where", ["inner", None])
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("\ud800", r"\ud800: unknown key"),
        ("a\nb", r"a\nb: unknown key"),
        ("\x1b[31m", r"\x1b[31m: unknown key"),
        ("k" * 2**20, "k" * 77 + "...: unknown key"),
        ("", ": unknown key"),
        (5, "5: unknown key"),
        (None, "None: unknown key"),
    ],
    ids=["surrogate", "line break", "escape", "1 MB", "empty", "integer", "null"],
)
def test_an_odd_key(where: str | None, key: Any, words: str) -> None:
    found = clauses_of_dict({where: {key: 1}} if where else {key: 1})
    assert words in found and (f"{where}.{words}" if where else words) in found
    assert ", allowed: " in found


def test_an_odd_key_where_any_text_is_one() -> None:
    assert "inner.names" in clauses(inner={"names": {5: "x"}})


@pytest.mark.parametrize("values", [[1], "x", None, 5])
def test_no_mapping_at_all(values: Any) -> None:
    assert "found" in clauses_of_dict(values)


def test_many_faults_are_counted() -> None:
    words = clauses(**{f"key{n}": 1 for n in range(1000)})
    assert words.count("unknown key") == 10 and words.endswith("; and 990 more")
    assert joined(["a", "b"], "; ") == "a; b"


def test_a_fault_of_what_lies_above_is_left_out() -> None:
    values = {"inner": {"size": 0, "share": 0}}
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(values)
    assert [fault.key for fault in faults_of(raised.value, Outer, values)] == [
        "inner.size",
        "inner.share",
    ]


def test_a_key_that_resembles_another() -> None:
    values = {"kinds": 1}
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(values)
    assert faults_of(raised.value, Outer, values)[0].hint == " (did you mean 'kind'?)"


def test_words_of_values() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10**6, deep, {1: [[[[2]]]]}, list(range(1000)), "a\nb", b"\xff" * 999):
        text = shown(value)
        assert len(text) <= 80 and text.isprintable(), text
    assert shown_name("a\n") == "a\\n" and shown_name("ä") == "ä"
    assert shown_path("/a b/\udcff") == r"/a b/\udcff"
    assert one_line("a\r\nb") == r"a\r\nb"


def test_allowed_comes_from_the_types() -> None:
    assert allowed_at(Outer, ("inner", "size")) == "an integer from 1 to 9"
    assert allowed_at(Outer, ("several",)) == "a list, each entry a mapping"
    assert allowed_at(Outer, ("several", 3, "flag")) == "true, false"
    assert allowed_at(Outer, ("told",)) == "what the field says"
