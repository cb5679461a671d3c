# SPDX-License-Identifier: Apache-2.0
"""How a function of vLLM is wrapped: the record of a wrap, what it relies on, and whether it still holds."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrap:
    """One wrapped function: what, why, until when, and the signature that the wrapper relies on."""

    module: str
    owner: str | None  # a class, or None for a function of the module
    name: str
    parameters: tuple[str, ...]
    why: str
    remove_when: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def target(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.name)))

    def find(self) -> Any:
        """The attribute as it is now, a staticmethod object included; None where it is gone."""
        try:
            return inspect.getattr_static(self._holder(), self.name, None)
        except ModuleNotFoundError:
            return None

    def reason(self) -> str | None:
        """Why the target cannot be wrapped or is no longer wrapped by us, or None."""
        current = _function(self.find())
        if current is None:
            return f"{self.target}: found no such function in vLLM {vllm_version()}"
        if self in _applied:
            if _applied[self] not in _chain(current):
                return (
                    f"{self.target}: found {current.__module__}.{current.__qualname__} in place "
                    "of the wrapper of heterospec, allowed: a plugin that calls what it replaces"
                )
            return None
        found = tuple(inspect.signature(current).parameters)
        if found != self.parameters:
            return f"{self.target}: found the parameters {found}, allowed: {self.parameters}"
        return None

    def apply(self) -> None:
        """Wraps the target; a second call does nothing. Only for a target without a `reason`."""
        if self not in _applied:
            _applied[self] = self._replace()

    @contextlib.contextmanager
    def while_loading(self) -> Iterator[None]:
        """Wraps the target for as long as a block runs. Raises ValueError where it cannot be wrapped."""
        reason = self.reason()
        if reason is not None:
            raise ValueError(f"heterospec: {reason}")
        raw = self.find()
        self._replace()
        try:
            yield
        finally:
            setattr(self._holder(), self.name, raw)

    def _replace(self) -> Callable[..., Any]:
        raw = self.find()
        original = _function(raw)
        wrapper = functools.wraps(original)(self.make(original))
        setattr(
            self._holder(), self.name, staticmethod(wrapper) if raw is not original else wrapper
        )
        return wrapper

    def _holder(self) -> Any:
        """What has the target as an attribute; None where it is gone."""
        module = importlib.import_module(self.module)
        return module if self.owner is None else getattr(module, self.owner, None)


_applied: dict[Wrap, Callable[..., Any]] = {}


def _function(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, staticmethod) else raw


def _chain(function: Any) -> list[Any]:
    """A function and all that it wraps, by the `__wrapped__` that functools.wraps leaves."""
    found = []
    while function is not None:
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return found


def vllm_version() -> str:
    """The version of the vLLM in this environment."""
    from vllm.version import __version__

    return __version__
