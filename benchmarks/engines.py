# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own that stay loaded and run in turns, so that systems are compared side by side."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

# An idle engine's threads spin for about a second after its last step.
PAUSE_SECONDS = 1.5


@dataclass(frozen=True)
class Load:
    """What one timed run does: all prompts are sent at once, `max_num_seqs` bounds the batch."""

    prompts: list[list[int]] = field(repr=False)
    batch: int
    max_tokens: int
    phases: tuple[int, ...] = ()  # batch sizes one after the other instead of one; prompts go round
    temperature: float = 0.0  # above 0 every prompt has a seed of its own


@dataclass(frozen=True)
class Run:
    """One timed run of one system."""

    seconds: float
    num_tokens: int
    token_ids: list[list[int]] = field(repr=False)
    counters: dict[str, Any] | None  # ours; None for other engines

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class Engine:
    """An in-process `LLM` inside a child process."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_loaded(self) -> None:
        """Raises RuntimeError with the child's error where the engine does not start."""
        self._receive()

    def run(self, load: Load, policy: dict[str, Any] | None = None) -> Run:
        time.sleep(PAUSE_SECONDS)
        self._pipe.send((load, policy))
        return self._receive()

    def close(self) -> None:
        self._process.terminate()
        self._process.join(10)

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"engine {self.name} died") from None
        if isinstance(answer, BaseException):
            raise RuntimeError(f"engine {self.name}: {answer}") from answer
        return answer


def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    try:
        llm = LLM(enable_prefix_caching=False, **arguments)
    except (ValueError, RuntimeError) as error:
        pipe.send(error)
        return
    ours = (arguments.get("speculative_config") or {}).get("method") == "heterospec"
    pipe.send(None)
    while True:
        load, policy = pipe.recv()
        pipe.send(_timed(llm, load, policy, ours))


def _timed(llm: Any, load: Load, policy: dict[str, Any] | None, ours: bool) -> Run:
    from vllm import SamplingParams

    if policy is not None:
        llm.collective_rpc("set_heterospec_policy", kwargs=policy)
    if ours:
        llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
    params = [
        SamplingParams(
            temperature=load.temperature,
            max_tokens=load.max_tokens,
            ignore_eos=True,
            seed=number if load.temperature > 0 else None,
        )
        for number in range(len(load.prompts))
    ]
    outputs = []
    batches = _batches(load)
    start = time.perf_counter()
    for numbers in batches:
        part = [{"prompt_token_ids": load.prompts[n]} for n in numbers]
        outputs += llm.generate(part, [params[n] for n in numbers], use_tqdm=False)
    seconds = time.perf_counter() - start
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    counters = llm.collective_rpc("heterospec_counters")[0] if ours else None
    return Run(seconds, sum(map(len, token_ids)), token_ids, counters)


def _batches(load: Load) -> list[list[int]]:
    """Prompt numbers of each call."""
    count = len(load.prompts)
    if load.phases:
        starts = [sum(load.phases[:i]) for i in range(len(load.phases))]
        return [
            [(start + n) % count for n in range(size)]
            for start, size in zip(starts, load.phases, strict=True)
        ]
    return [list(range(i, min(i + load.batch, count))) for i in range(0, count, load.batch)]
