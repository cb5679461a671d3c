# SPDX-License-Identifier: Apache-2.0
"""What runs a cell: an in-process engine or a server, behind one face."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console

from heterospec_vllm.bench.engines import Engine, Load, Position
from heterospec_vllm.bench.prompt_sets import SetPrompt
from heterospec_vllm.bench.rows import Cell, Serving
from heterospec_vllm.bench.serving import ServedSystem
from heterospec_vllm.bench.spec import System


@dataclass(frozen=True)
class Outcome:
    """One timed run, whatever ran it."""

    seconds: float
    num_tokens: int
    counters: dict[str, Any] | None
    answers: list[list[int]] | None = field(repr=False)  # None where the client does not tell
    request_seconds: list[float] | None = None
    serving: Serving | None = None


class Contender(Protocol):
    """One loaded engine or server."""

    @property
    def threads(self) -> str:
        """How its threads are bound, in words."""
        ...

    def begin(self) -> None:
        """Starts to load, where others may load meanwhile."""

    def start(self) -> None:
        """Returns when it is loaded."""

    def warm_up(
        self, system: System, cell: Cell, prompts: list[SetPrompt], tokens: int
    ) -> None: ...

    def run(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> Outcome: ...

    def greedy(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> list[list[int]]:
        """[num_requests] greedy answers under the cell's load."""
        ...

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]: ...

    def memory(self) -> int: ...

    def close(self) -> None: ...


def phases(cell: Cell) -> tuple[int, ...]:
    """Requests of each call, one call after the other."""
    if cell.load == "rising":
        up = [4**n for n in range(10) if 4**n <= cell.concurrency]
        return (*up, *up[-2::-1])
    if cell.load != "batches" and cell.concurrency > 1:
        return (cell.num_prompts,)
    full, rest = divmod(cell.num_prompts, cell.concurrency)
    return (cell.concurrency,) * full + (rest,) * bool(rest)


def requests_of(cell: Cell, prompts: list[SetPrompt]) -> list[SetPrompt]:
    """The prompt of every request in the order sent."""
    return [prompts[n % len(prompts)] for n in range(sum(phases(cell)))]


class OfflineContender:
    """An ``LLM`` in a process of its own."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "begin() first"
        return self._engine

    @property
    def threads(self) -> str:
        return self.engine.threads

    def begin(self) -> None:
        self._engine = Engine(**self._arguments)

    def start(self) -> None:
        self.engine.wait_until_loaded()

    def _load(self, cell: Cell, prompts: list[SetPrompt], temperature: float) -> Load:
        ids = [p.token_ids for p in prompts]
        return Load(ids, phases(cell), cell.output_lens(), temperature, cell.concurrency)

    def warm_up(self, system: System, cell: Cell, prompts: list[SetPrompt], tokens: int) -> None:
        ids = [p.token_ids for p in prompts[: cell.concurrency]]
        self.engine.run(
            Load(ids, (len(ids),), [tokens] * len(ids), at_once=len(ids)), system.policy
        )

    def run(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> Outcome:
        run = self.engine.run(self._load(cell, prompts, cell.temperature), system.policy)
        alone = cell.concurrency == 1 and cell.load == "steady"
        return Outcome(
            run.seconds,
            run.num_tokens,
            run.counters,
            run.token_ids,
            run.phase_seconds if alone else None,
        )

    def greedy(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> list[list[int]]:
        return self.engine.run(self._load(cell, prompts, 0.0), system.policy).token_ids

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]:
        return self.engine.teacher_forced(prompts, answers)

    def memory(self) -> int:
        return self.engine.memory()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


class ServedContender:
    """A ``vllm serve`` process, driven by ``vllm bench serve``."""

    threads = "vllm serve"

    def __init__(
        self, served: ServedSystem, console: Console, goodput: dict[str, float] | None
    ) -> None:
        self._served, self._console, self._goodput = served, console, goodput

    def begin(self) -> None:
        """Servers start one after the other: a port is free until its server has it."""

    def start(self) -> None:
        self._served.start(self._console)

    def warm_up(self, system: System, cell: Cell, prompts: list[SetPrompt], tokens: int) -> None:
        texts = [p.text for p in prompts[: cell.concurrency]]
        self._served.greedy_answers(texts, tokens)

    def run(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> Outcome:
        run = self._served.run(cell, [p.text for p in prompts], goodput=self._goodput)
        return Outcome(run.seconds, run.num_tokens, run.counters, None, serving=run.serving)

    def greedy(self, system: System, cell: Cell, prompts: list[SetPrompt]) -> list[list[int]]:
        texts = [p.text for p in requests_of(cell, prompts)]
        return self._served.greedy_answers(texts, cell.output_len, concurrency=cell.concurrency)

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]:
        return self._served.teacher_forced(prompts, answers)

    def memory(self) -> int:
        return self._served.memory()

    def close(self) -> None:
        self._served.close()


def offline_arguments(
    target: str, dtype: str, max_model_len: int, most: int, config: dict[str, Any] | None
) -> dict[str, Any]:
    """vLLM's engine arguments, the same for every system but for the speculative config."""
    return {
        "model": target,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max(2, most),
        "speculative_config": config,
    }
