# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a YAML file, a clause a field: its name, what was found, what is allowed.

What is allowed is read from the types of the fields, so that it is said wherever a value is wrong and nowhere twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

MOST_SHOWN = 80  # characters of a value
Path = tuple[int | str, ...]


def clauses_of(error: ValidationError, kind: type[BaseModel], values: dict[str, Any]) -> str:
    """One sentence for all faults of ``values``, which were read as a ``kind``."""
    clauses: dict[Path, str] = {}
    for problem in error.errors(include_url=False):
        path = _path(problem, values)
        clauses.setdefault(path, _clause(problem, path, kind))
    # A mapping that is wrong inside is also no text where a text would do: only the former helps.
    inner = [p for p in clauses if not any(q[: len(p)] == p and q != p for q in clauses)]
    return "; ".join(clauses[path] for path in inner)


def _path(problem: Any, values: Any) -> Path:
    """Where in the file; pydantic's own location also names the members of a union."""
    path: list[int | str] = []
    for part in problem["loc"]:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            path.append(part)
            values = values[part]
    return (*path, problem["loc"][-1]) if problem["type"] == "missing" else tuple(path)


def _clause(problem: Any, path: Path, kind: type[BaseModel]) -> str:
    where = ".".join(map(str, path))
    if problem["type"] == "value_error":  # ours, which says everything
        message = problem["msg"].removeprefix("Value error, ").removeprefix(f"{where}: ")
        return f"{where}: {message}" if where else message
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key, allowed: {', '.join(_keys(kind, path[:-1]))}"
    if problem["loc"][-1] == "[key]":
        allowed = problem.get("ctx", {}).get("expected", "a text")
        above = ".".join(map(str, path[:-1]))
        return f"{above}: found the key {problem['input']!r}, allowed: {allowed}"
    found = "nothing" if problem["type"] == "missing" else _shown(problem["input"])
    allowed = next((_words(*one) for one in _declared(kind, (), path)), problem["msg"])
    return f"{where}: found {found}, allowed: {allowed}"


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def _keys(kind: type[BaseModel], path: Path) -> list[str]:
    """Of the mapping at a path."""
    members = (m for one in _declared(kind, (), path) for m, _ in _members(*one))
    return [key for m in members if _is_model(m) for key in m.model_fields]


def _declared(annotation: Any, bounds: tuple, path: Path) -> Iterator[tuple[Any, tuple]]:
    """The types, with their bounds, that the value at a path may have."""
    if not path:
        yield annotation, bounds
        return
    part, *rest = path
    for member, _ in _members(annotation, bounds):
        arguments = get_args(member)
        if _is_model(member) and part in member.model_fields:
            field = member.model_fields[part]
            yield from _declared(field.annotation, tuple(field.metadata), tuple(rest))
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
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        limits = [
            f"{sign} {getattr(bound, name)}"
            for bound in bounds
            for name, sign in signs.items()
            if hasattr(bound, name)
        ]
        return f"a {'whole ' * (member is int)}number {' and '.join(limits)}".strip()
    if get_origin(member) is list:
        least = next((b.min_length for b in bounds if getattr(b, "min_length", 0)), 0)
        several = f" of at least {least}" if least else ""
        return f"a list{several}, each entry {_words(get_args(member)[0], ())}"
    if get_origin(member) is tuple:
        return f"a list of {len(get_args(member))}"
    return {str: "a text", NoneType: "null"}.get(member, "a mapping")
