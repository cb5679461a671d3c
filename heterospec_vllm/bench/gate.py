# SPDX-License-Identifier: Apache-2.0
"""No timing without the same answers: greedy outputs against plain vLLM's, near-ties excused and counted."""

from __future__ import annotations

import math

from heterospec_vllm.bench.engines import Position
from heterospec_vllm.bench.rows import Gate


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token in which two answers differ, None where one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def gap(position: Position, token: int) -> float:
    """Nats by which the target likes its best token more than ``token``; inf for one beyond its top choices."""
    if token not in position.top:
        return math.inf
    return max(position.top.values()) - position.top[token]


def judge(
    plain: list[list[int]],  # [num_prompts] plain decoding's greedy answers
    answers: list[list[int]],  # [num_prompts] of the system
    forced: list[list[Position]],  # [num_prompts][answer length] along plain decoding's answers
    near_tie: float,  # nats
) -> Gate:
    """Compares up to the first difference of each answer: behind it the texts are not comparable.

    A difference is numeric noise where, with plain decoding's own text before it, the target likes both tokens
    almost equally well: both within ``near_tie`` of its best. An answer of another length is different.
    """
    same = ties = different = 0
    largest = 0.0
    for expected, got, positions in zip(plain, answers, forced, strict=True):
        at = first_difference(expected, got)
        if at is None:
            same += len(expected) == len(got)
            different += len(expected) != len(got)
            continue
        distance = max(gap(positions[at], got[at]), gap(positions[at], expected[at]))
        largest = max(largest, distance)
        ties += distance <= near_tie
        different += distance > near_tie
    # JSON has no infinity; a token that is not among the first choices is farther than any tie.
    return Gate(
        same=same, near_ties=ties, different=different, largest_gap=min(round(largest, 4), 99.0)
    )
