# SPDX-License-Identifier: Apache-2.0
"""One engine of ours in a child process that measures the steps of a point.

After the prompts are read, blocks of steps with a fixed tree and blocks of plain steps take turns on the same requests,
so prefill is in neither.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from heterospec_vllm.bench.child import Child, EngineFailed, answer, enter, thread_binding
from heterospec_vllm.bench.growth_points import (
    BLOCK_SIZE,
    TOKEN_BUDGET,
    UNMEASURED,
    GrowthSpec,
    Limits,
    Measured,
    Point,
    TreeBounds,
    answer_tokens,
    tokens_of,
    tree_bounds,
)

if TYPE_CHECKING:
    from heterospec_vllm.layers.op_timing import Timing

GIB = 1 << 30


class GrowthEngine(Child):
    """The engine in its child process; ``limits`` are known when it is loaded."""

    def __init__(
        self,
        target: str,
        head: str,
        points: list[Point],
        spec: GrowthSpec,
        arguments: dict[str, Any],
    ) -> None:
        """Raises EngineFailed where the engine does not start; nothing is left running then."""
        super().__init__(_serve, target, head, points, spec, arguments)
        try:
            loaded: _Loaded = self.receive(None)
        except EngineFailed:
            self.close()
            raise
        self.limits, self.threads = loaded.limits, loaded.threads

    def measure(self, point: Point) -> Measured:
        return self.ask(None, point)


# ---- in the child


@dataclass(frozen=True)
class _Loaded:
    limits: Limits
    threads: str


def _serve(
    pipe: Connection,
    target: str,
    head: str,
    points: list[Point],
    spec: GrowthSpec,
    arguments: dict[str, Any],
) -> None:
    """Answers with the engine's limits, then every point with what was measured."""
    enter()
    engines: list[Any] = []

    def load() -> _Loaded:
        llm, loaded = _load(target, head, points, spec, arguments)
        engines.append(llm)
        return loaded

    good = answer(pipe, load)
    while good:
        try:
            (point,) = pipe.recv()
        except EOFError:  # the parent is gone
            return
        good = answer(pipe, _measure, engines[0], point, spec)


def _load(
    target: str, head: str, points: list[Point], spec: GrowthSpec, arguments: dict[str, Any]
) -> tuple[Any, _Loaded]:
    """vLLM's ``LLM``, sized for the points that the target can hold, and its limits."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    model = EngineArgs(model=target, **arguments).create_model_config()
    lengths = {point: tokens_of(point, spec) for point in points}
    fitting = [point for point in points if lengths[point] <= model.max_model_len] or points[:1]
    # The head's layer may be larger than one of the target's.
    layers = model.get_total_num_hidden_layers() + 2
    token_bytes = (
        2 * layers * model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
    )
    most = max(p.requests * (math.ceil(lengths[p] / BLOCK_SIZE) + 1) for p in fitting)
    gib = math.ceil(most * BLOCK_SIZE * token_bytes / GIB)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gib))
    widest = tree_bounds(max(point.nodes for point in fitting))
    rows_a_step = max(point.requests * (point.nodes + 1) for point in fitting)
    given = {
        "max_model_len": min(model.max_model_len, max(lengths[p] for p in fitting)),
        "max_num_seqs": max(2, *(point.requests for point in fitting)),
        "max_num_batched_tokens": max(TOKEN_BUDGET, 2 * rows_a_step),
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "speculative_config": {"method": "heterospec", "model": head, **_static(widest)},
    }
    llm = LLM(target, **{**arguments, **given})
    cache = llm.llm_engine.vllm_config.cache_config
    limits = Limits(model.max_model_len, cache.num_gpu_blocks, cache.block_size)
    return llm, _Loaded(limits, thread_binding())


def _static(bounds: TreeBounds) -> dict[str, Any]:
    return {"policy": "static", **vars(bounds)}


def _measure(llm: Any, point: Point, spec: GrowthSpec) -> Measured:
    batch = _Decoding(llm, point, spec)
    batch.switch(**_static(tree_bounds(point.nodes)))
    batch.read_prompts()
    trees: list[_Step] = []
    plain: list[_Step] = []
    verified = 0
    for _ in range(spec.rounds):
        batch.switch(**_static(tree_bounds(point.nodes)))
        trees += batch.steps(spec.steps_a_round)
        verified += batch.verified_nodes()
        batch.switch(policy="plain")
        plain += batch.steps(spec.steps_a_round)
    batch.stop()
    names = sorted({name for step in trees for name in step.spans_ms})
    attention = _time_attention(llm, point)
    return Measured(
        ms_per_step=statistics.median(step.ms for step in trees),
        ms_plain=statistics.median(step.ms for step in plain),
        spans_ms={n: statistics.median(s.spans_ms.get(n, 0.0) for s in trees) for n in names},
        nodes=verified / (len(trees) * point.requests),
        requests=min(step.requests for step in trees + plain),
        attention_ms=None if attention is None else 1e3 * attention.ours,
        vllm_attention_ms=None if attention is None else 1e3 * attention.vllm,
    )


@dataclass(frozen=True)
class _Step:
    """One step of the engine."""

    ms: float
    requests: int  # that emitted something
    spans_ms: dict[str, float]


class _Decoding:
    """The requests of one point while they decode."""

    def __init__(self, llm: Any, point: Point, spec: GrowthSpec) -> None:
        from vllm import SamplingParams

        self._llm, self._engine = llm, llm.llm_engine
        params = SamplingParams(
            temperature=0.0,
            max_tokens=answer_tokens(point, spec),
            ignore_eos=True,
            detokenize=False,
        )
        self._ids = [f"{point} #{number}" for number in range(point.requests)]
        for request_id, prompt in zip(self._ids, _prompts(llm, point), strict=True):
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params.clone())

    def switch(self, **policy: Any) -> None:
        """Another policy from the next step on."""
        self._llm.collective_rpc("set_heterospec_policy", kwargs=policy)

    def read_prompts(self) -> None:
        """Steps until every request has emitted a token."""
        waiting = set(self._ids)
        while waiting and self._engine.has_unfinished_requests():
            waiting -= {output.request_id for output in self._engine.step()}

    def steps(self, count: int) -> list[_Step]:
        """``count`` steps after some that are not measured; counters are those of the measured ones."""
        for _ in range(UNMEASURED):
            self._engine.step()
        self._llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
        self._llm.collective_rpc("heterospec_clock", args=(True,))
        measured = [self._step() for _ in range(count)]
        self._llm.collective_rpc("heterospec_clock", args=(False,))
        return measured

    def _step(self) -> _Step:
        start = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - start
        spans = self._llm.collective_rpc("heterospec_clock", args=(True,))[0]
        return _Step(1e3 * seconds, len(outputs), {n: 1e3 * s for n, (s, _) in spans.items()})

    def verified_nodes(self) -> int:
        return self._llm.collective_rpc("heterospec_counters")[0]["verified_nodes"]

    def stop(self) -> None:
        self._engine.abort_request(self._ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def _prompts(llm: Any, point: Point) -> Iterator[list[int]]:
    """Random tokens of the vocabulary without special ones; the same for every tree."""
    model = llm.llm_engine.vllm_config.model_config
    size, special = model.get_vocab_size(), set()
    if not model.skip_tokenizer_init:
        tokenizer = llm.get_tokenizer()
        size = min(size, len(tokenizer))
        special = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {token_id for token_id, token in added.items() if token.special}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known = getattr(model.hf_text_config, name, None)
        special |= set(known) if isinstance(known, list) else {known}
    usable = [token_id for token_id in range(size) if token_id not in special]
    rng = random.Random(0)
    for _ in range(point.requests):
        yield rng.choices(usable, k=point.context)


def _time_attention(llm: Any, point: Point) -> Timing | None:
    """One layer's call of our op and of vLLM's, on the engine's own threads; None without our kernel."""
    from heterospec_vllm.kernels.cpu.library import is_available
    from heterospec_vllm.layers.op_timing import Case, Heads, measure

    if not is_available():
        return None
    config = llm.llm_engine.vllm_config
    case = Case(point.context, point.nodes + 1, point.requests)
    return measure(case, Heads.of(config), config.model_config.dtype)
