# SPDX-License-Identifier: Apache-2.0
"""What the cost of growth is measured at: the options, the points, the tree of each, and which of them are possible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict

from heterospec_vllm.bench import rows
from heterospec_vllm.config import MAX_NODES

Sweep = Literal["nodes", "requests", "context"]
# The same two head passes for every tree: only its width grows with the nodes.
TREE_DEPTH = 2
# Steps before those of a block are measured: the first one still verifies, or not yet, what was drafted before, and
# the head catches up with what it missed.
UNMEASURED = 2
# Least token budget of a step. Trees may take half of it, prompts get the rest.
TOKEN_BUDGET = 2048
BLOCK_SIZE = 128  # vLLM's default on CPU


def _whole(low: int, high: int | None = None) -> BeforeValidator:
    """Checks a whole number; the message says what is allowed."""
    allowed = f"from {low} to {high}" if high is not None else f">= {low}"

    def check(value: Any) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            raise ValueError(f"found {value!r}, allowed: a whole number {allowed}")
        return value

    return BeforeValidator(check)


Nodes = Annotated[int, _whole(1, MAX_NODES)]
Requests = Annotated[int, _whole(1)]
Context = Annotated[int, _whole(16)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fixed(_Spec):
    """What stays while something else is swept."""

    nodes: Nodes = 8
    requests: Requests = 4
    context: Context = 256


class GrowthSpec(_Spec):
    """Three sweeps; an empty list leaves one out."""

    nodes: list[Nodes] = [1, 2, 4, 8, 16, 32, 63]  # verified draft nodes of each request
    requests: list[Requests] = [1, 2, 4, 8, 16, 32, 64]
    context: list[Context] = [128, 256, 512, 1024, 2048, 4096]  # tokens of each prompt
    fixed: Fixed = Fixed()
    steps: Annotated[int, _whole(1)] = 24  # measured at each point, of ours and as many of plain
    rounds: Annotated[int, _whole(1)] = 3  # turns in which they are measured

    @property
    def steps_a_round(self) -> int:
        return -(-self.steps // self.rounds)


@dataclass(frozen=True)
class Point:
    """One batch to measure."""

    sweep: Sweep
    nodes: int
    requests: int
    context: int

    @property
    def value(self) -> int:
        return getattr(self, self.sweep)

    def __str__(self) -> str:
        return f"{self.sweep} {self.value}"


@dataclass(frozen=True)
class TreeBounds:
    """Options of the policy ``static``."""

    num_speculative_tokens: int
    max_depth: int
    top_k: int

    @property
    def capacity(self) -> int:
        """Candidates that the head proposes: those of the first level, and the beam's children a level."""
        beam = min(self.top_k, self.num_speculative_tokens)
        return self.top_k + (self.max_depth - 1) * beam * self.top_k


@dataclass(frozen=True)
class Limits:
    """What the engine can hold."""

    max_model_len: int  # tokens that the target takes
    kv_blocks: int
    block_size: int


@dataclass(frozen=True)
class Measured:
    """Medians over a point's steps, in milliseconds."""

    ms_per_step: float
    ms_plain: float
    spans_ms: dict[str, float]
    nodes: float  # verified for each request in each step, from the engine's counters
    requests: float  # that decoded in each step, the fewest of any block
    attention_ms: float | None
    vllm_attention_ms: float | None


def points_of(spec: GrowthSpec) -> list[Point]:
    """Every value of every sweep once, in the order of the spec."""
    sweeps: tuple[Sweep, ...] = get_args(Sweep)
    return [
        Point(sweep=sweep, **{**spec.fixed.model_dump(), sweep: value})
        for sweep in sweeps
        for value in dict.fromkeys(getattr(spec, sweep))
    ]


def remaining(
    points: Iterable[Point], done: Iterable[rows.GrowthRow], target_name: str
) -> list[Point]:
    """The points without a row of this target."""
    held = {
        Point(row.sweep, row.nodes, row.requests, row.context)
        for row in done
        if row.target == target_name
    }
    return [point for point in points if point not in held]


def tree_bounds(nodes: int) -> TreeBounds:
    """The narrowest tree of ``TREE_DEPTH`` levels that always has that many nodes."""
    tried = (TreeBounds(nodes, TREE_DEPTH, top_k) for top_k in range(2, 17))
    return next(bounds for bounds in tried if bounds.capacity >= nodes)


def answer_tokens(point: Point, spec: GrowthSpec) -> int:
    """Most tokens that a request emits until its point is measured, if every draft is accepted."""
    decoding = spec.rounds * (spec.steps_a_round + UNMEASURED)
    prefill = 1 + point.requests * point.context // (TOKEN_BUDGET // 2)
    return (prefill + decoding) * (TREE_DEPTH + 1) + decoding


def tokens_of(point: Point, spec: GrowthSpec) -> int:
    """Length that a request needs: prompt, answer, the next token and a tree."""
    return point.context + answer_tokens(point, spec) + 2 + point.nodes


def why_left_out(point: Point, spec: GrowthSpec, limits: Limits) -> str | None:
    """Why a point cannot be measured, or None."""
    length = tokens_of(point, spec)
    if length > limits.max_model_len:
        return (
            f"it needs {length} tokens (prompt, answer and tree), and the target takes "
            f"{limits.max_model_len}"
        )
    blocks = point.requests * -(-length // limits.block_size)
    if blocks >= limits.kv_blocks:  # vLLM keeps one block for itself
        return (
            f"its keys and values need {blocks} blocks of the KV cache, which has "
            f"{limits.kv_blocks} (VLLM_CPU_KVCACHE_SPACE)"
        )
    return None


def why_unfit(point: Point, measured: Measured) -> str | None:
    """Why what was measured is not what was asked for, or None."""
    if measured.requests != point.requests:
        return f"{measured.requests:g} of {point.requests} requests decoded in a step"
    if measured.nodes != point.nodes:
        return f"{measured.nodes:g} instead of {point.nodes} nodes a request and step were verified"
    return None
