# SPDX-License-Identifier: Apache-2.0
"""Draft trees of a batch: the record, its invariants and how a tree is cut out of a candidate pool.

A tree of ``n`` draft nodes has ``n + 1`` rows. Row 0 is the root: the token that the target emitted last.
Row ``r`` (``r >= 1``) is draft node ``r - 1`` of the flat list that vLLM schedules. Invariants, held by every
:class:`DraftTrees` this module makes and checked by :meth:`DraftTrees.check`:

* parents first: ``parents[r] < r``, so every prefix of the rows is itself a connected tree;
* depths: ``depths[0] == 0`` and ``depths[r] == depths[parents[r]] + 1``;
* siblings carry distinct tokens, so the walk is deterministic;
* once laid out, the meta-path (from the root always to the most likely child) comes first: rows ``1..d``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from heterospec_vllm import tree_loops
from heterospec_vllm.compiled import NO_ROW as NO_ROW

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Ranked:
    """The best candidates of each request's pool, best first; absent ones at the end."""

    columns: Ints  # [num_reqs, width]
    survivals: Floats  # [num_reqs, width] float64, 0 where absent
    num_present: int  # candidates of the whole pool, ranked here or not


@dataclass(frozen=True)
class CandidatePool:
    """Everything the draft head proposed for a batch in one step, before nodes are chosen.

    Columns are in expansion order: a parent's column is lower than its children's. A request that was not expanded as
    far as others has absent candidates: log-probability -inf, survival 0.
    """

    tokens: Ints  # [num_reqs, pool_size]
    log_probs: Floats  # [num_reqs, pool_size] cumulative from the root, non-increasing along a path
    survivals: Floats  # [num_reqs, pool_size] what nodes are ranked by, non-increasing along a path
    strata: Ints  # [num_reqs, pool_size] of the entropy summed along the node's path
    entropies: Floats  # [num_reqs, pool_size] that entropy, in nats
    parents: Ints  # [num_reqs, pool_size] column of the parent, NO_ROW = child of the root
    ranks: (
        Ints  # [num_reqs, pool_size] place among its siblings by draft probability, 0 = most likely
    )

    def ranked(self, width: int) -> Ranked:
        """The best candidates; parents come before their children.

        The sort is stable and a child never survives its parent, so every prefix is connected.
        """
        survivals = np.asarray(self.survivals, dtype=np.float64)
        return Ranked(*tree_loops.ranked(survivals, min(width, survivals.shape[1])))

    @classmethod
    def concatenate(cls, levels: list[CandidatePool]) -> CandidatePool:
        """The levels of one draft side by side."""
        joined, *others = levels
        for level in others:
            joined = cls(*tree_loops.side_by_side(*joined._fields, *level._fields))
        return joined

    @property
    def _fields(self) -> tuple:
        return (
            self.tokens, self.log_probs, self.survivals, self.strata, self.entropies,
            self.parents, self.ranks,
        )  # fmt: skip


@dataclass(frozen=True)
class PlacedRows:
    """The rows of a batch in a step, request by request, in pieces that attend by a mask.

    A tree is one piece, the text before it or without one as many as it takes, each with those before it as context.
    """

    positions: Ints  # [num_rows] they follow the depth
    query_start_loc: Ints32  # [num_pieces + 1]
    seq_lens: Ints32  # [num_pieces] the context and the rows
    ancestor_mask: Ints  # [num_rows] bit j: sees row j of its own piece
    reqs: Ints  # [num_pieces] request of each


@dataclass(frozen=True)
class DraftTrees:
    """Draft trees of ``num_reqs`` requests, padded to one width; nodes come best first until they are laid out."""

    tokens: Ints  # [num_reqs, max_nodes] draft tokens, NO_ROW beyond num_nodes
    parents: Ints  # [num_reqs, max_nodes + 1] parent row, NO_ROW for the root and beyond
    depths: Ints  # [num_reqs, max_nodes + 1] 0 for the root and beyond
    ranks: Ints  # [num_reqs, max_nodes + 1] place among siblings, 0 for the root and beyond
    num_nodes: Ints  # [num_reqs]
    log_probs: Floats  # [num_reqs, max_nodes] cumulative, 0 beyond num_nodes
    survivals: (
        Floats  # [num_reqs, max_nodes] as they were when the tree was drafted, 0 beyond num_nodes
    )
    strata: Ints  # [num_reqs, max_nodes] 0 beyond num_nodes

    @property
    def num_reqs(self) -> int:
        return self.tokens.shape[0]

    @property
    def max_nodes(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def max_depth(self) -> int:
        return int(self.depths.max(initial=0))

    @cached_property
    def is_chain(self) -> NDArray[np.bool_]:
        """[num_reqs] True where every node is the only child of the row before it (an empty tree is a chain)."""
        return tree_loops.chains(self.parents, self.num_nodes)

    @classmethod
    def empty(cls, num_reqs: int) -> DraftTrees:
        return cls(*tree_loops.empty(num_reqs, 0))

    @classmethod
    def from_pool(
        cls,
        pool: CandidatePool,
        num_nodes: Ints,  # [num_reqs] most nodes of each request's tree
        ranked: Ranked | None = None,  # the pool's, if it is at hand
    ) -> DraftTrees:
        """Keep each request's best candidates (EAGLE-2 rerank), best first."""
        num_reqs, pool_size = pool.tokens.shape
        width = min(int(num_nodes.max(initial=0)), pool_size)
        if width <= 0:
            return cls.empty(num_reqs)
        ranked = pool.ranked(width) if ranked is None else ranked
        return cls(
            *tree_loops.cut(
                pool.tokens,
                pool.log_probs,
                np.asarray(pool.survivals, dtype=np.float64),
                pool.strata,
                pool.parents,
                pool.ranks,
                ranked.columns,
                num_nodes,
                width,
            )
        )

    @classmethod
    def from_parents(
        cls,
        tokens: Ints,  # [num_reqs, max_nodes]
        node_parents: Ints,  # [num_reqs, max_nodes] parent row of each node
        node_ranks: Ints,  # [num_reqs, max_nodes]
        num_nodes: Ints,  # [num_reqs]
        *,
        log_probs: Floats
        | None = None,  # [num_reqs, max_nodes], likewise the others; zeros if not given
        survivals: Floats | None = None,
        strata: Ints | None = None,
    ) -> DraftTrees:
        """Add the root row and derive the depths; the node order is taken as it is."""
        num_reqs = tokens.shape[0]
        root = np.full((num_reqs, 1), NO_ROW)
        parents = np.concatenate([root, node_parents], axis=1)
        ranks = np.concatenate([root + 1, node_ranks], axis=1)
        depths = np.zeros_like(parents)
        above = parents
        while (above >= 0).any():
            depths += above >= 0
            above = np.where(
                above >= 0, np.take_along_axis(parents, np.maximum(above, 0), axis=1), NO_ROW
            )
        zeros = np.zeros(tokens.shape, dtype=np.float32)
        return cls(
            tokens,
            parents,
            depths,
            ranks,
            num_nodes,
            zeros if log_probs is None else np.asarray(log_probs, dtype=np.float32),
            zeros if survivals is None else np.asarray(survivals, dtype=np.float32),
            np.zeros_like(tokens) if strata is None else strata,
        )

    def take(
        self,
        reqs: Ints,  # [num_reqs'] rows of this batch
        num_nodes: Ints,  # [num_reqs'] nodes kept of each (a prefix)
    ) -> DraftTrees:
        """The trees of some requests, each cut to a prefix (what vLLM's scheduler does to a draft)."""
        return DraftTrees(*tree_loops.take(*self._fields, reqs, num_nodes))

    @property
    def _fields(self) -> tuple:
        return (
            self.tokens, self.parents, self.depths, self.ranks, self.num_nodes,
            self.log_probs, self.survivals, self.strata,
        )  # fmt: skip

    def laid_out(self) -> DraftTrees:
        """The same trees with the meta-path in the rows that follow the root, the rest as it was.

        The likely accepted path then lies where its keys and values have to end up.
        """
        return DraftTrees(*tree_loops.lay_out(*self._fields))

    @classmethod
    def concatenate(cls, batches: list[DraftTrees]) -> DraftTrees:
        """The requests of several batches one after the other, padded to the widest."""
        width = max(batch.max_nodes for batch in batches)

        def stack(name: str, fill: int, columns: int):
            arrays = [getattr(batch, name) for batch in batches]
            return np.concatenate(
                [
                    np.pad(a, ((0, 0), (0, columns - a.shape[1])), constant_values=fill)
                    for a in arrays
                ]
            )

        return cls(
            tokens=stack("tokens", NO_ROW, width),
            parents=stack("parents", NO_ROW, width + 1),
            depths=stack("depths", 0, width + 1),
            ranks=stack("ranks", 0, width + 1),
            num_nodes=np.concatenate([batch.num_nodes for batch in batches]),
            log_probs=stack("log_probs", 0, width),
            survivals=stack("survivals", 0, width),
            strata=stack("strata", 0, width),
        )

    def placed(
        self,
        context_lens: Ints,  # [num_reqs] tokens before the step's rows
        starts: Ints | None = None,  # [num_reqs + 1] where those rows start; none: trees alone
        piece_rows: int = 1,  # most rows of a piece of text
    ) -> PlacedRows:
        """The rows one after the other, as the step has them."""
        if starts is None:
            starts = np.concatenate([[0], np.cumsum(self.num_nodes + 1)])
        return PlacedRows(
            *tree_loops.place(
                self.parents, self.depths, self.num_nodes, starts, context_lens, piece_rows
            )
        )

    def children_matching(
        self,
        reqs: Ints,  # [num_active]
        rows: Ints,  # [num_active] current row of each
        tokens: Ints,  # [num_active] token that the target emitted there
    ) -> Ints:
        """[num_active] the child row that carries the token, NO_ROW where there is none."""
        return tree_loops.children_matching(self.parents, self.tokens, reqs, rows, tokens)

    def check(self) -> None:
        """Assert every invariant of the module's docstring (tests and debugging; not on the hot path)."""
        for req in range(self.num_reqs):
            n = int(self.num_nodes[req])
            parents, depths = self.parents[req], self.depths[req]
            assert 0 <= n <= self.max_nodes
            assert parents[0] == NO_ROW and depths[0] == 0
            assert (self.tokens[req, n:] == NO_ROW).all() and (parents[n + 1 :] == NO_ROW).all()
            for row in range(1, n + 1):
                assert 0 <= parents[row] < row
                assert depths[row] == depths[parents[row]] + 1
            children = list(zip(parents[1 : n + 1], self.tokens[req, :n], strict=True))
            assert len(set(children)) == n
