# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark: engines loaded in groups, systems in turns, every run a row on disk at once.

A run that was interrupted goes on where it stopped: rows that exist are not made again, failed ones are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.contenders import Contender, Outcome, requests_of
from heterospec_vllm.bench.engines import Position
from heterospec_vllm.bench.gate import judge
from heterospec_vllm.bench.loading import Failures, LoadedEngines
from heterospec_vllm.bench.prompt_sets import PromptSets, SetPrompt
from heterospec_vllm.bench.rows import Cell, Environment, Gate, Row
from heterospec_vllm.bench.show import cell_table
from heterospec_vllm.bench.spec import PLAIN, TUNED, BenchSpec, Planned, System
from heterospec_vllm.kernels import private_files

# Of the memory that is free when the first engine is loaded, the part that engines may take.
MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class _Key:
    cell: Cell
    system: str
    round: int


@dataclass(frozen=True)
class _Answers:
    """Plain decoding's greedy answers to a cell's requests, and what the target thinks along them."""

    token_ids: list[list[int]]
    forced: list[list[Position]]


class Bench:
    """One benchmark in one folder of results."""

    def __init__(
        self,
        spec: BenchSpec,
        cells: list[Planned],
        prompts: PromptSets,
        folder: Path,
        environment: Environment,
        # mode, key of the engine or server, the systems it serves
        make: Callable[[str, str, tuple[System, ...]], Contender],
        console: Console,
        free_memory: Callable[[], int],
    ) -> None:
        self.spec, self.cells, self.prompts, self.folder = spec, cells, prompts, folder
        self.environment, self.make, self.console = environment, make, console
        self.free_memory = free_memory
        self.done: set[_Key] = set()
        self.gates: dict[tuple[str, Cell], Gate] = {}
        self._plain_answers: dict[Cell, _Answers] = {}
        self._last_group = 0
        self.num_failed = self.num_different = 0
        for row in rows.read(folder / rows.ROWS, Row):
            self._last_group = max(self._last_group, row.group)
            if row.status != "failed":
                self.done.add(_Key(row.cell, row.system, row.round))
            if row.status == "different":
                self.num_different += 1
            if row.gate is not None and row.status != "failed":
                self.gates[row.system, row.cell.greedy] = row.gate

    # ---- planning

    def pending(self, planned: Planned, system: System) -> list[int]:
        """Rounds of a cell that a system has still to run."""
        return [
            r for r in range(planned.rounds) if _Key(planned.cell, system.name, r) not in self.done
        ]

    def run(self) -> int:
        """The exit code: 0, or 1 where a cell failed or a system's answers differ."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spec = yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False)
        private_files.write(self.folder / rows.SPEC, spec.encode())
        total = sum(len(self.pending(p, s)) for p in self.cells for s in p.systems)
        if not total:
            self.console.print("every row of this benchmark exists already")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=3600) as self.progress:
            self._task = self.progress.add_task("loading", total=total)
            for mode in ("offline", "serving"):
                self._run_mode(mode, [p for p in self.cells if p.cell.mode == mode])
        return int(bool(self.num_failed or self.num_different))

    def _run_mode(self, mode: str, cells: list[Planned]) -> None:
        systems: dict[str, dict[str, System]] = defaultdict(dict)
        for planned in cells:
            for system in planned.systems:
                if self.pending(planned, system):
                    systems[_engine_key(mode, system)][system.name] = system
        waiting = [key for key in systems if key not in (PLAIN, TUNED)]
        # Tuned by the others' rows.
        tuned = [key for key in systems if key == TUNED]
        if not systems:
            return
        plain = System(PLAIN, PLAIN)
        while True:
            if not waiting:
                waiting, tuned = tuned, []
            self._last_group += 1
            group = _Group(self, mode, self._last_group)
            try:
                group.engines.load({PLAIN: (plain,)})
                if PLAIN in group.engines.broken:
                    taken, waiting = waiting, []
                else:
                    room = self._room(group.engines[PLAIN])
                    taken, waiting = waiting[:room], waiting[room:]
                    group.engines.load({key: tuple(systems[key].values()) for key in taken})
                group.run([p for p in cells if self._concerns(p, mode, {PLAIN, *taken})])
            finally:
                group.engines.close()
            if not waiting and not tuned:
                return

    def _concerns(self, planned: Planned, mode: str, keys: set[str]) -> bool:
        return any(
            _engine_key(mode, s) in keys and self.pending(planned, s) for s in planned.systems
        )

    def _room(self, first: Contender) -> int:
        """How many more engines fit, if each takes what the first has taken."""
        if self.spec.max_engines is not None:
            return self.spec.max_engines - 1
        return max(1, int(MEMORY_SHARE * self.free_memory() / max(1, first.memory())))

    # ---- rows

    def write(self, planned: Planned, system: System, group: int, number: int, **values) -> Row:
        row = Row(
            cell=planned.cell,
            system=system.name,
            group=group,
            round=number,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            environment=values.pop("environment", self.environment),
            **values,
        )
        rows.append(self.folder / rows.ROWS, row)
        self.num_failed += row.status == "failed"
        self.num_different += row.status == "different"
        key = _Key(row.cell, row.system, row.round)
        if key in self.done:  # plain decoding beside another group of engines
            self.progress.update(self._task, total=1 + (self.progress.tasks[0].total or 0))
        if row.status != "failed":
            self.done.add(key)
        self.progress.advance(self._task)
        return row

    def fail(self, planned: Planned, system: System, group: int, reason: str) -> None:
        """Marks what is left of a cell for one system."""
        self.console.print(f"[red]failed[/]: {system.name}, {planned.cell.label}: {reason}")
        for number in self.pending(planned, system):
            self.write(planned, system, group, number, status="failed", reason=reason)

    def describe(self, text: str) -> None:
        self.progress.update(self._task, description=text)
        if not self.console.is_terminal:
            done, total = self.progress.tasks[0].completed, self.progress.tasks[0].total
            self.console.print(f"{time.strftime('%H:%M:%S')} {done:.0f}/{total:.0f} {text}")

    # ---- the gate

    def plain_answers(
        self, plain: Contender, cell: Cell, prompts: list[SetPrompt], fresh: Outcome | None = None
    ) -> _Answers:
        """Of a cell, from a timed greedy run where there is one."""
        key = cell.greedy
        if key not in self._plain_answers:
            answers = _greedy_answers(plain, System(PLAIN, PLAIN), cell, prompts, fresh)
            ids = [p.token_ids for p in requests_of(cell, prompts)]
            self._plain_answers[key] = _Answers(answers, plain.teacher_forced(ids, answers))
        return self._plain_answers[key]

    def gate(
        self,
        plain: Contender,
        system: System,
        contender: Contender,
        cell: Cell,
        prompts: list[SetPrompt],
        outcome: Outcome | None,
    ) -> Gate:
        """A system's greedy answers against plain decoding's, once for every cell's requests."""
        key = system.name, cell.greedy
        if key not in self.gates:
            answers = _greedy_answers(contender, system, cell, prompts, outcome)
            expected = self.plain_answers(plain, cell, prompts)
            self.gates[key] = judge(expected.token_ids, answers, expected.forced, self.spec.margin)
        return self.gates[key]


class _Group:
    """Engines that are loaded together, plain vLLM always among them."""

    def __init__(self, bench: Bench, mode: str, number: int) -> None:
        self.bench, self.mode, self.number = bench, mode, number
        self.engines = LoadedEngines(
            lambda key, systems: bench.make(mode, key, systems),
            bench.describe,
            bench.console.print,
        )

    def run(self, cells: Iterable[Planned]) -> None:
        for planned in cells:
            self.engines.revive()  # one that died in a cell gets another chance in the next
            self._run_cell(planned)

    def _run_cell(self, planned: Planned) -> None:
        bench, cell = self.bench, planned.cell
        prompts = bench.prompts.of(cell)
        here = [s for s in planned.systems if _engine_key(self.mode, s) in self.engines]
        mine = [s for s in here if bench.pending(planned, s)]
        if mine and mine[0].name != PLAIN:  # its rows are of another group
            mine.insert(0, System(PLAIN, PLAIN))
        for system in list(mine):
            broken = self.engines.broken
            reason = broken.get(_engine_key(self.mode, system))
            if PLAIN in broken:
                reason = reason or f"plain: {broken[PLAIN]}"
            if reason is not None:
                bench.fail(planned, system, self.number, reason)
                mine.remove(system)
        for system in list(mine):
            bench.describe(f"warming up {system.name}: {cell.label}")
            self._guarded(planned, system, mine, self._warm_up, prompts)
        done: list[Row] = []
        for number in range(planned.rounds):
            bench.describe(f"round {number + 1} of {planned.rounds}: {cell.label}")
            turn = [s for s in mine if number in bench.pending(planned, s)]
            if turn and turn[0].name != PLAIN:
                turn.insert(0, mine[0])
            for system in turn:
                if system in mine:
                    row = self._guarded(planned, system, mine, self._round, prompts, number)
                    if row is not None:
                        done.append(row)
        if done:
            bench.console.print(cell_table(cell, done))

    def _guarded(self, planned: Planned, system: System, mine: list[System], act, *values):
        """``act``, or nothing where the engine fails in it: the cell is marked, the rest goes on."""
        key = _engine_key(self.mode, system)
        try:
            return act(planned, system, *values)
        except Failures as error:
            self.engines.bury(key)
            for other in [s for s in mine if _engine_key(self.mode, s) == key]:
                self.bench.fail(planned, other, self.number, str(error))
                mine.remove(other)
            if key == PLAIN:  # nothing can be compared
                for other in list(mine):
                    self.bench.fail(planned, other, self.number, f"plain: {error}")
                mine.clear()
            return None

    def _contender(self, system: System) -> Contender:
        return self.engines[_engine_key(self.mode, system)]

    def _warm_up(self, planned: Planned, system: System, prompts: list[SetPrompt]) -> None:
        self._contender(system).warm_up(
            system, planned.cell, prompts, self.bench.spec.warmup_tokens
        )

    def _round(
        self, planned: Planned, system: System, prompts: list[SetPrompt], number: int
    ) -> Row:
        bench, cell = self.bench, planned.cell
        contender, plain = self._contender(system), self.engines[PLAIN]
        outcome = contender.run(system, cell, prompts)
        if system.name == PLAIN:
            bench.plain_answers(plain, cell, prompts, outcome)
        gate = bench.gate(plain, system, contender, cell, prompts, outcome)
        environment = bench.environment.model_copy(update={"threads": contender.threads})
        if gate.different:
            reason = f"{gate.different} of {gate.same + gate.near_ties + gate.different} answers differ from plain's"
            return bench.write(
                planned, system, self.number, number,
                status="different", reason=reason, gate=gate, counters=outcome.counters,
                environment=environment,
            )  # fmt: skip
        return bench.write(
            planned, system, self.number, number,
            status="ok", gate=gate, counters=outcome.counters, environment=environment,
            seconds=round(outcome.seconds, 4),
            num_tokens=outcome.num_tokens,
            request_seconds=outcome.request_seconds
            and [round(s, 4) for s in outcome.request_seconds],
            serving=outcome.serving,
        )  # fmt: skip


def _greedy_answers(
    contender: Contender,
    system: System,
    cell: Cell,
    prompts: list[SetPrompt],
    outcome: Outcome | None,  # of a timed run of the cell
) -> list[list[int]]:
    """Those of the timed run where it was greedy and tells them, else of a run of their own."""
    if outcome is not None and outcome.answers is not None and cell.temperature == 0:
        return outcome.answers
    return contender.greedy(system, cell, prompts)


def _engine_key(mode: str, system: System) -> str:
    """Systems with one key share an engine; a server's policy cannot be switched."""
    return system.engine if mode == "offline" else system.name
