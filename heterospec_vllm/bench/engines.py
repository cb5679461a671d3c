# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own that stay loaded and run in turns, so that systems are compared side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from heterospec_vllm.bench.child import Child, answer, enter, thread_binding
from heterospec_vllm.bench.pause import PAUSE_SECONDS
from heterospec_vllm.bench.peer_repairs import repair_sampling_on_cpu

TOP = 20  # of the target's choices at a position, for near-ties and entropies
LOAD_TIMEOUT = 1200.0  # seconds
# vLLM's own counters of its drafters, `vllm:spec_decode_...`
DRAFTER_COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
SLOWEST = 1.0  # seconds a token; a run that takes longer than all its tokens at that pace hangs


@dataclass(frozen=True)
class Load:
    """What one timed run does: as many prompts a call as ``phases`` says, prompts going round."""

    prompts: list[list[int]] = field(repr=False)
    phases: tuple[int, ...]
    max_tokens: list[int]  # [num_prompts]
    temperature: float = 0.0  # above 0 every prompt has a seed of its own
    at_once: int = 1  # most requests in the engine; the next is sent when one ends

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


class Engine(Child):
    """An in-process ``LLM`` inside a child process."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(_serve, arguments)
        self.threads = ""

    def wait_until_loaded(self) -> None:
        """Raises EngineFailed with the child's error where the engine does not start."""
        self.threads = self.receive(LOAD_TIMEOUT)

    def run(self, load: Load, policy: dict[str, Any] | None = None) -> Run:
        time.sleep(PAUSE_SECONDS)
        tokens = sum(map(len, load.prompts)) + load.num_requests * max(load.max_tokens)
        return self.ask(60 + SLOWEST * tokens, _timed, load, policy)

    def teacher_forced(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[Position]]:
        """[num_prompts][answer length] what the target thinks of each given answer, in one pass each."""
        return self.ask(60 + 5.0 * len(prompts), _teacher_forced, prompts, answers)


def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    enter()
    loaded: list[Any] = []

    def load() -> str:
        repair_sampling_on_cpu()
        from vllm import LLM

        loaded.append(LLM(enable_prefix_caching=False, disable_log_stats=False, **arguments))
        return thread_binding()

    if not answer(pipe, load):
        return
    ours = (arguments.get("speculative_config") or {}).get("method") == "heterospec"
    while True:
        try:
            function, *values = pipe.recv()
        except EOFError:  # the parent is gone
            return
        answer(pipe, function, loaded[0], ours, *values)


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
            max_tokens=load.max_tokens[number],
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
        outputs = _answers(llm, part, [params[n] for n in numbers], load.at_once)
        seconds.append(time.perf_counter() - start)
        token_ids += [list(output.outputs[0].token_ids) for output in outputs]
    if ours:
        counters = llm.collective_rpc("heterospec_counters")[0]
    else:
        after = _drafter_counters(llm)
        counters = {name: after[name] - before[name] for name in after} or None
    return Run(seconds, token_ids, counters)


def _answers(llm: Any, prompts: list[Any], params: list[Any], at_once: int) -> list[Any]:
    """[num_prompts] final outputs with at most ``at_once`` requests in the engine."""
    if len(prompts) <= at_once:
        return llm.generate(prompts, params, use_tqdm=False)
    engine, waiting = llm.llm_engine, iter(enumerate(zip(prompts, params, strict=True)))
    final: dict[str, Any] = {}
    for number, (prompt, of_prompt) in islice(waiting, at_once):
        engine.add_request(str(number), prompt, of_prompt)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            final[output.request_id] = output
            for number, (prompt, of_prompt) in islice(waiting, 1):
                engine.add_request(str(number), prompt, of_prompt)
    return [final[str(number)] for number in range(len(prompts))]


def _drafter_counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters of drafts since the engine started; {} where nothing drafts."""
    wanted = {f"vllm:spec_decode_{name}": name for name in DRAFTER_COUNTERS}
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
