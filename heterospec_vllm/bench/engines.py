# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own that stay loaded and run in turns, so that systems are compared side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from heterospec_vllm.bench.pause import PAUSE_SECONDS

TOP = 20  # of the target's choices at a position, for near-ties and entropies
LOAD_TIMEOUT = 1200.0  # seconds
# What vLLM raises for arguments or models that it cannot serve.
STARTING = (ValueError, RuntimeError, OSError, AssertionError, KeyError, TypeError)
SLOWEST = 1.0  # seconds a token; a run that takes longer than all its tokens at that pace hangs


@dataclass(frozen=True)
class Load:
    """What one timed run does: as many prompts at a time as ``phases`` says, prompts going round."""

    prompts: list[list[int]] = field(repr=False)
    phases: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0  # above 0 every prompt has a seed of its own

    @classmethod
    def steady(
        cls, prompts: list[list[int]], batch: int, max_tokens: int, temperature: float = 0.0
    ) -> Load:
        full, rest = divmod(len(prompts), batch)
        return cls(prompts, (batch,) * full + (rest,) * bool(rest), max_tokens, temperature)

    @property
    def num_requests(self) -> int:
        return sum(self.phases)


@dataclass(frozen=True)
class Run:
    """One timed run of one system."""

    phase_seconds: list[float]
    token_ids: list[list[int]] = field(repr=False)  # [num_requests], in the order sent
    counters: dict[str, Any] | None  # ours, or those of vLLM's drafters

    @property
    def seconds(self) -> float:
        return sum(self.phase_seconds)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Position:
    """What the target thinks at one position of an answer, with everything before it given."""

    top: dict[int, float]  # log-probability of its likeliest tokens


class EngineFailed(RuntimeError):
    """The engine did not start, died or does not answer; the message says what is known."""


class Engine:
    """An in-process ``LLM`` inside a child process."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.name = name
        self.threads = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_loaded(self) -> None:
        """Raises EngineFailed with the child's error where the engine does not start."""
        self.threads = self._receive(LOAD_TIMEOUT)

    def run(self, load: Load, policy: dict[str, Any] | None = None) -> Run:
        time.sleep(PAUSE_SECONDS)
        tokens = sum(map(len, load.prompts)) + load.num_requests * load.max_tokens
        return self._ask(60 + SLOWEST * tokens, _timed, load, policy)

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]:
        """[num_prompts][answer length] what the target thinks of each given answer, in one pass each."""
        return self._ask(60 + 5.0 * len(prompts), _teacher_forced, prompts, answers)

    def memory(self) -> int:
        """Bytes of the child that are its own."""
        import psutil

        return int(psutil.Process(self._process.pid).memory_full_info().uss)

    def close(self) -> None:
        """Ends the child; safe to call twice."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _ask(self, timeout: float, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise EngineFailed(self._death()) from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                raise EngineFailed(f"no answer within {timeout:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise EngineFailed(self._death()) from None
        if isinstance(answer, BaseException):
            raise EngineFailed(f"{type(answer).__name__}: {answer}") from answer
        return answer

    def _death(self) -> str:
        self._process.join(5)
        return f"the engine's process ended with status {self._process.exitcode}"


def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import torch
        from vllm import LLM

        llm = LLM(enable_prefix_caching=False, disable_log_stats=False, **arguments)
        pipe.send(
            f"in-process, {torch.get_num_threads()} OpenMP threads, VLLM_CPU_OMP_THREADS_BIND="
            f"{os.environ.get('VLLM_CPU_OMP_THREADS_BIND', 'auto')}"
        )
    except STARTING as error:
        pipe.send(_sendable(error))
        return
    ours = (arguments.get("speculative_config") or {}).get("method") == "heterospec"
    while True:
        try:
            function, *values = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            pipe.send(function(llm, ours, *values))
        except STARTING as error:
            pipe.send(_sendable(error))


def _sendable(error: Exception) -> RuntimeError:
    """vLLM's own exceptions need not survive pickling."""
    return RuntimeError(f"{type(error).__name__}: {error}")


def _timed(llm: Any, ours: bool, load: Load, policy: dict[str, Any] | None) -> Run:
    from vllm import SamplingParams

    if policy is not None:
        llm.collective_rpc("set_heterospec_policy", kwargs=policy)
    if ours:
        llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
    before = _drafter_counters(llm)
    count = len(load.prompts)
    params = [
        SamplingParams(
            temperature=load.temperature,
            max_tokens=load.max_tokens,
            ignore_eos=True,
            detokenize=False,
            seed=number if load.temperature > 0 else None,
        )
        for number in range(count)
    ]
    seconds, token_ids, first = [], [], 0
    for size in load.phases:
        numbers = [n % count for n in range(first, first + size)]
        first += size
        part = [{"prompt_token_ids": load.prompts[n]} for n in numbers]
        start = time.perf_counter()
        outputs = llm.generate(part, [params[n] for n in numbers], use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        token_ids += [list(output.outputs[0].token_ids) for output in outputs]
    if ours:
        counters = llm.collective_rpc("heterospec_counters")[0]
    else:
        after = _drafter_counters(llm)
        counters = {name: after[name] - before[name] for name in after} or None
    return Run(seconds, token_ids, counters)


def _drafter_counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters of drafts since the engine started; {} where nothing drafts."""
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    wanted = {f"vllm:spec_decode_{name}": name for name in names}
    totals: dict[str, int] = {}
    for metric in llm.get_metrics():
        if metric.name in wanted:
            name = wanted[metric.name]
            totals[name] = totals.get(name, 0) + int(metric.value)
    return totals


def _teacher_forced(
    llm: Any, ours: bool, prompts: list[list[int]], answers: list[list[int]]
) -> list[list[Position]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP, detokenize=False)
    pairs = list(zip(prompts, answers, strict=True))
    requests = [{"prompt_token_ids": prompt + answer} for prompt, answer in pairs]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [
        [
            Position({token: value.logprob for token, value in chosen.items()})
            for chosen in output.prompt_logprobs[len(prompt) :]
        ]
        for output, (prompt, _) in zip(outputs, pairs, strict=True)
    ]
