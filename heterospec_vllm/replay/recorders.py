# SPDX-License-Identifier: Apache-2.0
"""Policies and records that note drafts and costs while an engine runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.policy.base import Batch, DraftPlan, DraftPolicy, FixedPlan, FixedPolicy, Scope
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.tree.pool import CandidatePool


class TracePlan(FixedPlan):
    """The widest tree of its bounds, of which nothing is verified."""

    def __init__(self, batch: Batch, shape: TreeShape) -> None:
        super().__init__(batch, shape)
        self.beam = shape.top_k

    def propose(self, survivals: Floats, draft_seconds: float) -> Ints:
        return np.zeros_like(self.batch.limits)


class TracePolicy(DraftPolicy):
    """Drafts for everybody and verifies nothing."""

    def plan(self, batch: Batch, scope: Scope = "all") -> DraftPlan:
        return TracePlan(batch, self.shape)


class CostRecorder(FixedPolicy):
    """Drafts fixed trees in turns, a step each, and notes what everything costs, for the cost tables of a profile.

    Steps of different trees lie side by side, so a machine that is slower for a while is slower for all of them.
    """

    def __init__(self, shapes: list[TreeShape | None]) -> None:
        """``shapes``: None is a step of plain decoding."""
        super().__init__(next((shape for shape in shapes if shape), TreeShape(1, 1, 1)))
        self._turns = cycle(shapes)
        self.steps: list[tuple[int, int, float, float]] = []  # tokens, requests, context, seconds
        self.first_passes: list[tuple[int, float]] = []  # tokens, seconds
        self.levels: list[tuple[int, float]] = []  # nodes expanded, seconds

    def observe_step(self, num_tokens: int, num_reqs: int, context: float, seconds: float) -> None:
        self.steps.append((num_tokens, num_reqs, context, seconds))

    def observe_first_pass(self, num_tokens: int, seconds: float) -> None:
        self.first_passes.append((num_tokens, seconds))

    def observe_level(self, num_rows: int, seconds: float) -> None:
        self.levels.append((num_rows, seconds))

    def scope(self, num_reqs: int, context: float) -> Scope:
        shape = next(self._turns)
        if shape is None:
            return "pause"
        self.shape = shape
        return "all"

    def samples(self) -> dict[str, list]:
        """What was noted, for the RPC."""
        return {"steps": self.steps, "first_passes": self.first_passes, "levels": self.levels}


@dataclass
class TraceRecorder:
    """Collects the drafts of an engine that runs a :class:`TracePolicy`."""

    names: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pools: list[CandidatePool] = field(default_factory=list)

    def record(self, names: list[str], pool: CandidatePool, tokens, drafting: Ints) -> None:
        """One draft of a batch: ``tokens`` are the accepted tokens of all fed requests."""
        ends = np.cumsum(tokens.num_tokens)[drafting] - 1
        self.names += names
        # The root is the token that follows the last accepted token.
        self.positions += (tokens.positions.numpy()[ends] + 1).tolist()
        self.pools.append(pool)

    def arrays(self) -> dict[str, np.ndarray | list[str]]:
        """The drafts as plain arrays, for the RPC: names of requests and the columns of the pools."""
        widest = max((pool.tokens.shape[1] for pool in self.pools), default=0)

        def stacked(name: str, fill: float, dtype: type) -> np.ndarray:
            parts = [getattr(pool, name) for pool in self.pools]
            padded = [
                np.pad(p, ((0, 0), (0, widest - p.shape[1])), constant_values=fill) for p in parts
            ]
            return np.concatenate(padded).astype(dtype) if padded else np.zeros((0, 0), dtype)

        return {
            "names": self.names,
            "position": np.array(self.positions, dtype=np.int32),
            "tokens": stacked("tokens", 0, np.int32),
            "log_probs": stacked("log_probs", -np.inf, np.float32),
            "entropies": stacked("entropies", 0, np.float32),
            "parents": stacked("parents", -1, np.int16),
            "ranks": stacked("ranks", 0, np.int8),
        }
