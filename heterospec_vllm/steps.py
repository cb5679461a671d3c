# SPDX-License-Identifier: Apache-2.0
"""A record of decoding steps for people: each drafted candidate, whether it was verified, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heterospec_vllm.tree import CandidatePool, DraftTrees
from heterospec_vllm.verify import Walk

MOST_NODES = 200  # candidates kept of a step


@dataclass
class StepRecorder:
    """Notes the drafts of the first request of a batch and how they were walked."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    _drafted: dict[str, Any] | None = None

    def drafted(
        self, root: int, pool: CandidatePool, price: float, node_seconds: float, seconds: float
    ) -> None:
        """A draft of request 0: ``root`` is the token it continues; price in tokens per second."""
        if self._drafted is not None:  # nothing of the last draft was verified
            self.steps.append({**self._drafted, "verified": [], "accepted": []})
        order = pool.ranked(MOST_NODES).columns[0]
        order = np.sort(order[pool.survivals[0, order] > 0])
        self._drafted = {
            "root": root,
            "columns": order.tolist(),
            **{
                name: getattr(pool, name)[0, order].tolist()
                for name in ("tokens", "survivals", "entropies", "strata", "parents", "ranks")
            },
            "num_drafted": int((pool.survivals[0] > 0).sum()),
            "price": price,
            "node_seconds": node_seconds,
            "seconds": seconds,
        }

    def walked(self, trees: DraftTrees, walked: Walk | None) -> None:
        """What was verified of the last draft, and the path that was accepted."""
        if self._drafted is None:
            return
        count = int(trees.num_nodes[0])
        path = [] if walked is None else [int(row) for row in walked.rows[0] if row > 0]
        self._drafted["verified"] = _paths(trees, range(1, count + 1))
        self._drafted["accepted"] = _paths(trees, path)
        self.steps.append(self._drafted)
        self._drafted = None


def _paths(trees: DraftTrees, rows: Any) -> list[list[int]]:
    """The tokens from the root to each row: names a node whatever its place in the pool."""
    found = []
    for row in rows:
        path: list[int] = []
        while row > 0:
            path.append(int(trees.tokens[0, row - 1]))
            row = int(trees.parents[0, row])
        found.append(path[::-1])
    return found


@dataclass(frozen=True)
class Node:
    """One candidate as people see it."""

    column: int
    parent: int  # column, -1 for the root
    token: int
    survival: float
    entropy: float
    stratum: int
    rank: int
    state: str  # accepted, rejected, not verified
    reason: str  # why it was not verified


@dataclass(frozen=True)
class Step:
    """One decoding step as people see it."""

    root: int
    nodes: list[Node]
    num_drafted: int
    num_verified: int
    num_accepted: int
    num_levels: int
    price: float
    seconds: float


def read_steps(recorded: list[dict[str, Any]]) -> list[Step]:
    """The steps of a :class:`StepRecorder` with every candidate's state and reason."""
    return [_read(step) for step in recorded]


def _read(step: dict[str, Any]) -> Step:
    verified = {tuple(path) for path in step["verified"]}
    accepted = {tuple(path) for path in step["accepted"]}
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    nodes = []
    for i, column in enumerate(step["columns"]):
        parent = step["parents"][i]
        if parent not in paths:
            continue
        path = (*paths[parent], step["tokens"][i])
        paths[column] = path
        state = (
            "accepted" if path in accepted else "rejected" if path in verified else "not verified"
        )
        nodes.append(
            Node(
                column=column,
                parent=parent,
                token=step["tokens"][i],
                survival=step["survivals"][i],
                entropy=step["entropies"][i],
                stratum=step["strata"][i],
                rank=step["ranks"][i],
                state=state,
                reason=_reason(step, path, i, verified) if state == "not verified" else "",
            )
        )
    return Step(
        root=step["root"],
        nodes=nodes,
        num_drafted=step["num_drafted"],
        num_verified=len(verified),
        num_accepted=len(accepted),
        num_levels=max(map(len, paths.values())),
        price=step["price"],
        seconds=step["seconds"],
    )


def _reason(step: dict[str, Any], path: tuple[int, ...], i: int, verified: set) -> str:
    if len(path) > 1 and path[:-1] not in verified:
        return "its parent is not verified"
    cost = step["price"] * step["node_seconds"]
    if step["price"] and step["survivals"][i] < cost:
        return f"earns {step['survivals'][i]:.2f}, costs {cost:.2f} tokens"
    return "node limit"
