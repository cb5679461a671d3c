# SPDX-License-Identifier: Apache-2.0
"""Engines and servers loaded together: started two at a time, restarted after a death, all closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from heterospec_vllm.bench.child import EngineFailed
from heterospec_vllm.bench.contenders import Contender
from heterospec_vllm.bench.spec import OURS, System
from heterospec_vllm.demo.server import ServerFailed

Failures = (EngineFailed, ServerFailed)
# Compiling keeps one core busy for minutes. Ours may time its steps as it starts, and starts alone.
AT_ONCE = 2

Systems = tuple[System, ...]


class LoadedEngines:
    """By key; what does not start is remembered with the reason."""

    def __init__(
        self,
        make: Callable[[str, Systems], Contender],
        describe: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._make, self._describe, self._warn = make, describe, warn
        self._systems: dict[str, Systems] = {}
        self._loading: dict[str, Contender] = {}
        self._loaded: dict[str, Contender] = {}
        self._died: set[str] = set()
        self.broken: dict[str, str] = {}  # why an engine does not start

    def __getitem__(self, key: str) -> Contender:
        return self._loaded[key]

    def __contains__(self, key: str) -> bool:
        """Whether it was asked for, loaded or not."""
        return key in self._systems

    def load(self, wanted: Mapping[str, Systems]) -> None:
        """Starts all, ours last, and returns when each is loaded or broken."""
        waiting = sorted(wanted, key=lambda key: key == OURS)
        self._systems.update(wanted)
        while waiting or self._loading:
            while waiting and self._has_room(waiting[0]):
                self._begin(waiting.pop(0))
            if self._loading:
                self._describe(f"loading {' and '.join(self._loading)}")
                self._finish(next(iter(self._loading)))

    def _has_room(self, key: str) -> bool:
        return len(self._loading) < (1 if key == OURS else AT_ONCE)

    def _begin(self, key: str) -> None:
        try:
            contender = self._make(key, self._systems[key])
            self._loading[key] = contender
            contender.begin()
        except (*Failures, ValueError) as error:
            self._give_up(key, error)

    def _finish(self, key: str) -> None:
        try:
            self._loading[key].start()
        except (*Failures, ValueError) as error:
            self._give_up(key, error)
        else:
            self._loaded[key] = self._loading.pop(key)

    def _give_up(self, key: str, error: Exception) -> None:
        self.broken[key] = str(error)
        self._warn(f"[red]{key} does not start[/]: {error}")
        contender = self._loading.pop(key, None)
        if contender is not None:
            contender.close()

    def bury(self, key: str) -> None:
        """Closes one that died; :meth:`revive` starts it again."""
        self._died.add(key)
        self._loaded.pop(key).close()

    def revive(self) -> None:
        died, self._died = self._died, set()
        self.load({key: self._systems[key] for key in died})

    def close(self) -> None:
        """Also those that are loading, after an interruption."""
        for contender in (*self._loading.values(), *self._loaded.values()):
            contender.close()
        self._loading.clear()
        self._loaded.clear()
