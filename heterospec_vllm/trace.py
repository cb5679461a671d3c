# SPDX-License-Identifier: Apache-2.0
"""Traces: every candidate that the head proposed, position by position, with nothing of the target but its tokens.

A trace is taken with wide trees of which nothing is verified, so that there is one draft at every position of every
answer. Whatever a policy would have chosen at a position can be replayed from it: the target's tokens are known.
Columns of the file (``heterospec calibrate --trace``; numpy ``.npz``):

* ``request`` ``[num_drafts]``: number of the request;
* ``position`` ``[num_drafts]``: place in the text of the root, the last token that is known when the draft begins;
* ``tokens``, ``log_probs``, ``entropies``, ``parents``, ``ranks`` ``[num_drafts, pool_size]``: the candidates in
  expansion order (see ``CandidatePool``);
* ``text``, ``text_start`` ``[num_requests + 1]``: token ids of prompts and answers, one after the other;
* ``answer_start`` ``[num_requests]``: first answer token of each request within its text;
* ``sampled`` ``[num_requests]``: 1 where the answer was sampled, 0 where it was greedy.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from pathlib import Path

import numpy as np

from heterospec_vllm.kernels import private_files
from heterospec_vllm.policies import Batch, DraftPolicy, Scope
from heterospec_vllm.policy import TreeShape
from heterospec_vllm.tree import CandidatePool, Floats, Ints

# What numpy raises for files that are empty, cut short, damaged, of another kind or with other columns.
_UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class TracePolicy(DraftPolicy):
    """Drafts the widest tree of its bounds and verifies nothing."""

    def propose(self, batch: Batch, survivals: Floats, draft_seconds: float) -> Ints:
        return np.zeros_like(batch.limits)

    @property
    def beam(self) -> int:
        return self.shape.top_k


class CostRecorder(DraftPolicy):
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
        self.shape, self.max_depth = shape, shape.max_depth
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
        """One draft of a batch: ``tokens`` are the true tokens of all fed requests."""
        ends = np.cumsum(tokens.num_tokens)[drafting] - 1
        self.names += names
        # The root is the token that follows the last true token.
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


@dataclass(frozen=True)
class Trace:
    """A recorded trace (columns: module docstring)."""

    request: Ints
    position: Ints
    tokens: Ints
    log_probs: Floats
    entropies: Floats
    parents: Ints
    ranks: Ints
    text: Ints
    text_start: Ints
    answer_start: Ints
    sampled: Ints

    def save(self, path: Path) -> None:
        """Writes the file atomically; it is private, since it holds prompts and answers."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with private_files.beside(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises ValueError naming the file for one that is no trace."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{name: file[name] for name in cls.__dataclass_fields__})
        except _UNREADABLE as error:
            raise ValueError(
                f"trace: found no readable trace at {path} ({error}), "
                "allowed: a file written by `heterospec calibrate --trace`"
            ) from None

    @cached_property
    def depths(self) -> Ints:
        """[num_drafts, pool_size] depth of each candidate, 1 for the root's children."""
        depths = np.ones(self.parents.shape, dtype=np.int64)
        rows = np.arange(self.parents.shape[0])
        for column in range(self.parents.shape[1]):
            parent = self.parents[:, column]
            above = depths[rows, np.maximum(parent, 0)]
            depths[:, column] = np.where(parent >= 0, above + 1, 1)
        return depths

    def accepted(self) -> np.ndarray:
        """[num_drafts, pool_size] candidates that lie on the answer's own path."""
        depths = self.depths
        start = self.text_start[self.request] + self.position
        stop = self.text_start[self.request + 1]
        at = start[:, None] + depths
        inside = at < stop[:, None]
        truth = self.text[np.minimum(at, self.text.size - 1)]
        match = (self.tokens == truth) & inside & (self.log_probs > -np.inf)
        on_path = np.zeros(match.shape, dtype=np.bool_)
        rows = np.arange(match.shape[0])
        for column in range(match.shape[1]):
            parent = self.parents[:, column]
            above = np.where(parent >= 0, on_path[rows, np.maximum(parent, 0)], True)
            on_path[:, column] = match[:, column] & above
        return on_path
