# SPDX-License-Identifier: Apache-2.0
"""Drafts between two steps: what was drafted for each request, and which of it a step verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from heterospec_vllm.arrays import Ints
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.trees import DraftTrees

# Trees of the matched requests -> [num_matched] nodes verified of each, a prefix.
Keep = Callable[[DraftTrees], Ints]


@dataclass(frozen=True)
class _Place:
    """A request's place in the batch of trees that was drafted together."""

    trees: DraftTrees
    req: int
    tokens: list[int]


@dataclass(frozen=True)
class MatchedDrafts:
    """The drafts that a step verifies."""

    tokens: dict[str, list[int]] = field(default_factory=dict)  # in the order of their rows
    trees: DraftTrees | None = None  # None where nothing is verified
    num_nodes: int = 0
    num_dropped: int = 0  # scheduled drafts that matched no tree
    _index: dict[str, int] = field(default_factory=dict)  # row of each request in the trees

    def trees_of(self, req_ids: list[str]) -> DraftTrees:
        """[num_reqs] the trees in the order of the batch, empty where a request has none."""
        assert self.trees is not None
        if [*self._index] == req_ids and len(req_ids) == self.trees.num_reqs:
            return self.trees
        rows = np.array([self._index.get(req_id, -1) for req_id in req_ids])
        counts = np.where(rows >= 0, self.trees.num_nodes[rows], 0)
        return self.trees.take(np.maximum(rows, 0), counts)


class PendingDrafts:
    """Owns what was drafted and not yet verified."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def put(
        self,
        req_ids: list[str],  # [num_drafting]
        trees: DraftTrees,  # [num_drafting]
    ) -> list[list[int]]:
        """[num_drafting] node tokens of each request's tree, best first, as they are handed to the scheduler."""
        counts = trees.num_nodes.tolist()
        drafts = []
        for row, (req_id, tokens) in enumerate(zip(req_ids, trees.tokens.tolist(), strict=True)):
            drafts.append(tokens[: counts[row]])
            if counts[row]:
                self._places[req_id] = _Place(trees, row, drafts[-1])
        return drafts

    def remove(self, req_id: str) -> None:
        self._places.pop(req_id, None)

    def match(self, scheduled: dict[str, list[int]], keep: Keep) -> MatchedDrafts:
        """What is verified of the scheduled drafts, each a prefix of what was handed over.

        What matches no tree (padding, resumed requests) is dropped.
        """
        matched: list[tuple[str, _Place, int]] = []
        for req_id, token_ids in scheduled.items():
            place = self._places.get(req_id)
            if place is not None and place.tokens[: len(token_ids)] == token_ids:
                matched.append((req_id, place, len(token_ids)))
        num_dropped = len(scheduled) - len(matched)
        if not matched:
            return MatchedDrafts(num_dropped=num_dropped)
        trees = _gathered(matched)
        kept = keep(trees)
        if (kept < trees.num_nodes).any():
            trees = trees.take(np.arange(trees.num_reqs), kept)
        trees = trees.laid_out()
        index: dict[str, int] = {}
        verified: dict[str, list[int]] = {}
        for row, ((req_id, _, _), count) in enumerate(zip(matched, kept.tolist(), strict=True)):
            if count:
                index[req_id] = row
                verified[req_id] = trees.tokens[row, :count].tolist()
        return MatchedDrafts(verified, trees, int(kept.sum()), num_dropped, index)


def _gathered(matched: list[tuple[str, _Place, int]]) -> DraftTrees:
    """The trees of requests that may have been drafted in different steps, each cut to what was scheduled."""
    sources: list[DraftTrees] = []
    for _, place, _ in matched:
        if not any(place.trees is source for source in sources):
            sources.append(place.trees)
    reqs = [place.req for _, place, _ in matched]
    counts = np.array([count for _, _, count in matched])
    if len(sources) == 1:
        (trees,) = sources
        if reqs == [*range(trees.num_reqs)] and (counts == trees.num_nodes).all():
            return trees  # most steps
        return trees.take(np.array(reqs), counts)
    first = np.cumsum([0, *(source.num_reqs for source in sources)]).tolist()
    offset = dict(zip(map(id, sources), first, strict=False))
    at = np.array([offset[id(place.trees)] + place.req for _, place, _ in matched])
    with CLOCK.span("gather trees"):
        return DraftTrees.concatenate(sources).take(at, counts)
