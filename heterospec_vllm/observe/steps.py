# SPDX-License-Identifier: Apache-2.0
"""A record of decoding steps for people: each drafted candidate, whether it was verified, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShownNode:
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
class ShownStep:
    """One decoding step as people see it."""

    root: int
    nodes: list[ShownNode]
    num_drafted: int
    num_verified: int
    num_accepted: int
    num_levels: int
    price: float
    seconds: float


def read_steps(recorded: list[dict[str, Any]]) -> list[ShownStep]:
    """The steps of a :class:`StepRecorder` with every candidate's state and reason."""
    return [_read(step) for step in recorded]


def _read(step: dict[str, Any]) -> ShownStep:
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
            ShownNode(
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
    return ShownStep(
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
