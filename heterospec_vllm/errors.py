# SPDX-License-Identifier: Apache-2.0
"""What pydantic refused, in words: the field, what was found, what is allowed. It is always one short line.

What is allowed is read from the types of the fields, so that it is said wherever a value is wrong and nowhere twice. A
field may say it itself: ``json_schema_extra={"allowed": ...}``.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import PydanticKnownError

MOST_SHOWN = 80  # characters of a value or a key
MOST_OF_PATH = 500  # characters of a file's path
Path = tuple[int | str, ...]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MOST_SHOWN
_SHORT.maxlevel = 3


@dataclass(frozen=True)
class Fault:
    """One field that is wrong."""

    path: Path  # where in what was read
    found: str  # the value, or "nothing"
    kind: str  # the value's type, "" where there is none
    allowed: str
    sentence: str = ""  # of a validator of ours, which says everything
    is_unknown_key: bool = False
    is_key: bool = False  # whether `found` is a key of the mapping at the path

    @property
    def key(self) -> str:
        """Where in what was read, in words."""
        return shown_key(self.path)

    @property
    def found_with_type(self) -> str:
        return f"{self.found} ({self.kind})" if self.kind else self.found

    @property
    def hint(self) -> str:
        """The known key that an unknown one resembles, in words; "" where there is none."""
        known = self.allowed.split(", ")
        close = difflib.get_close_matches(shown_name(self.path[-1]), known, n=1)
        return f" (did you mean '{close[0]}'?)" if close else ""

    @property
    def clause(self) -> str:
        """What stands behind a file's name: the field, what was found, what is allowed."""
        if self.sentence:
            sentence = self.sentence.removeprefix(f"{self.key}: ")
            return f"{self.key}: {sentence}" if self.key else sentence
        if self.is_unknown_key:
            return f"{self.key}: unknown key, allowed: {self.allowed}"
        found = "null" if self.kind == "NoneType" else self.found
        found = f"the key {found}" if self.is_key else found
        return f"{self.key}: found {found}, allowed: {self.allowed}"


def faults_of(error: ValidationError, model: type[BaseModel], values: Any) -> list[Fault]:
    """The faults of ``values``, which were read as a ``model``: at least one, at most one a place."""
    faults: dict[Path, Fault] = {}
    for problem in error.errors(include_url=False):
        fault = _fault(problem, model, values)
        faults.setdefault(fault.path, fault)
    # A mapping that is wrong inside is also no text where a text would do: only the former helps.
    above = {path[:length] for path in faults for length in range(len(path))}
    return [fault for path, fault in faults.items() if path not in above]


def clauses_of(error: ValidationError, model: type[BaseModel], values: Any) -> str:
    """One sentence for all faults."""
    return joined((fault.clause for fault in faults_of(error, model, values)), "; ")


def joined(sentences: Iterable[str], between: str, most: int = 10) -> str:
    """Sentences in a row; how many there are more than a reader would read."""
    listed = list(sentences)
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return between.join([*listed[:most], *more])


def allowed_at(model: type[BaseModel], path: Path) -> str:
    """What a place may hold, in words, from the field that declares it."""
    return next((words for *_, words in _declared(model, (), path)), "nothing")


# ---- values, keys and paths on one line


def shown(value: Any) -> str:
    """A value on one line, shortened."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a large {type(value).__name__}"
    return _cut(text, MOST_SHOWN)


def shown_name(name: Any) -> str:
    """A key on one line, shortened, without quotes."""
    text = name if isinstance(name, str) else shown(name)
    return _cut(one_line(text[: 2 * MOST_SHOWN]), MOST_SHOWN)


def shown_key(path: Path) -> str:
    return ".".join(map(shown_name, path))


def shown_path(path: Any) -> str:
    """A file's path on one line."""
    return _cut(one_line(str(path)), MOST_OF_PATH)


def shown_message(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines = str(error).strip().splitlines()
    return shown(lines[0])[1:-1] if lines else type(error).__name__


def one_line(text: str) -> str:
    """Text whose line breaks, surrogates and the like are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


# ---- types


def _whole(value: Any) -> Any:
    if type(value) is not int:
        raise PydanticKnownError("int_type")
    return value


# For a Literal of integers, which takes true and 1.0 for 1 even where a model is strict.
WHOLE = BeforeValidator(_whole)


# ---- a fault of pydantic's


def _fault(problem: Any, model: type[BaseModel], values: Any) -> Fault:
    path, is_key = _place(problem, values)
    kind, value = problem["type"], problem["input"]
    told = problem.get("ctx", {}).get("found")  # of an error of ours
    if kind == "missing":
        return Fault(path, "nothing", "", allowed_at(model, path))
    if kind in ("extra_forbidden", "invalid_key") or (is_key and kind == "string_unicode"):
        return Fault(
            path, shown(value), "", ", ".join(_keys(model, path[:-1])), is_unknown_key=True
        )
    found, kind_of_value = told or shown(value), "" if told else type(value).__name__
    message = problem["msg"].removeprefix("Value error, ")
    if told or kind == "value_error":
        sentence = "" if told else message
        return Fault(path, found, kind_of_value, message, sentence)
    if is_key:
        allowed = problem.get("ctx", {}).get("expected", "a text")
        return Fault(path[:-1], found, kind_of_value, allowed, is_key=True)
    allowed = next((words for *_, words in _declared(model, (), path)), message)
    return Fault(path, found, kind_of_value, allowed)


def _place(problem: Any, values: Any) -> tuple[Path, bool]:
    """Where in what was read, and whether its key is at fault; pydantic also names the members of a union."""
    path: list[int | str] = []
    for part in problem["loc"]:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            path.append(part)
            values = values[part]
    if problem["type"] == "string_unicode" and isinstance(values, dict):
        return (*path, problem["input"]), True  # it gives no place to a key that is no text
    last = problem["loc"][-1:]
    if last == ("[key]",):
        return tuple(path), True
    if (
        problem["type"] in ("missing", "extra_forbidden", "invalid_key")
        and tuple(path[-1:]) != last
    ):
        path.extend(last)
    return tuple(path), False


def _keys(model: type[BaseModel], path: Path) -> list[str]:
    """Of the mapping at a path."""
    members = (
        m for kind, bounds, _ in _declared(model, (), path) for m, _ in _members(kind, bounds)
    )
    return [key for m in members if _is_model(m) for key in m.model_fields]


# ---- what is allowed


def _declared(annotation: Any, bounds: tuple, path: Path) -> Iterator[tuple[Any, tuple, str]]:
    """The types, with their bounds and in words, that the value at a path may have."""
    if not path:
        yield annotation, bounds, _words(annotation, bounds)
        return
    part, *rest = path
    for member, _ in _members(annotation, bounds):
        arguments = get_args(member)
        if _is_model(member) and part in member.model_fields:
            field = member.model_fields[part]
            told = field.json_schema_extra
            for kind, limits, words in _declared(
                field.annotation, tuple(field.metadata), tuple(rest)
            ):
                own = isinstance(told, dict) and not rest and told.get("allowed")
                yield kind, limits, str(own or words)
        elif get_origin(member) is dict:
            yield from _declared(arguments[1], (), tuple(rest))
        elif get_origin(member) in (list, tuple) and isinstance(part, int):
            item = arguments[min(part, len(arguments) - 1)]
            yield from _declared(item, (), tuple(rest))


def _members(annotation: Any, bounds: tuple) -> Iterator[tuple[Any, tuple]]:
    """The types of a union."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        further = (b for one in arguments[1:] for b in getattr(one, "metadata", (one,)))
        yield from _members(arguments[0], (*bounds, *further))
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _members(argument, bounds)
    else:
        yield annotation, bounds


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _words(annotation: Any, bounds: tuple) -> str:
    return " or ".join(_words_of_one(*member) for member in _members(annotation, bounds))


def _words_of_one(member: Any, bounds: tuple) -> str:
    if get_origin(member) is Literal:
        return ", ".join(repr(value) for value in get_args(member))
    if member in (int, float):
        return _words_of_number(member, bounds)
    if get_origin(member) is list:
        least = _bound("min_length", bounds)
        several = f" of at least {least}" if least else ""
        return f"a list{several}, each entry {_words(get_args(member)[0], ())}"
    if get_origin(member) is tuple:
        return f"a list of {len(get_args(member))}"
    words = {str: "a text", bool: "true, false", NoneType: "null", Any: "anything"}
    return words.get(member, "a mapping")


def _words_of_number(member: Any, bounds: tuple) -> str:
    low, high = _bound("ge", bounds), _bound("le", bounds)
    if member is int and None not in (low, high):
        return f"an integer from {low} to {high}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {_bound(name, bounds)}"
        for name, sign in signs.items()
        if _bound(name, bounds) is not None
    ]
    is_finite = not limits and _bound("allow_inf_nan", bounds) is False
    kind = "whole " if member is int else "finite " if is_finite else ""
    return f"a {kind}number {' and '.join(limits)}".strip()


def _bound(name: str, bounds: tuple) -> Any:
    return next((getattr(bound, name) for bound in bounds if hasattr(bound, name)), None)
