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

from heterospec_vllm.arrays import NO_ROW, Floats, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.tree.pool import CandidatePool, Ranked
from heterospec_vllm.tree.rows import PlacedRows, place_rows

_TREES = (
    "Tuple((i8[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], i8[::1], f4[:,::1], f4[:,::1], i8[:,::1]))"
)


@compiled(_TREES + "(i8, i8)")
def empty(num_reqs, width):
    """The fields of ``DraftTrees`` without a node."""
    return (
        np.full((num_reqs, width), NO_ROW, np.int64),
        np.full((num_reqs, width + 1), NO_ROW, np.int64),
        np.zeros((num_reqs, width + 1), np.int64),
        np.zeros((num_reqs, width + 1), np.int64),
        np.zeros(num_reqs, np.int64),
        np.zeros((num_reqs, width), np.float32),
        np.zeros((num_reqs, width), np.float32),
        np.zeros((num_reqs, width), np.int64),
    )


@compiled(_TREES + "(i8[:,:], f4[:,:], f8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:], i8)")
def cut(
    tokens,  # [num_reqs, pool_size], likewise the next five
    log_probs,
    survivals,
    strata,
    parents,
    ranks,
    order,  # [num_reqs, >= width] columns, best first
    limits,  # [num_reqs]
    width,
):
    """The fields of ``DraftTrees`` cut out of a pool; nodes without a survival end a tree."""
    num_reqs, pool_size = tokens.shape
    trees = empty(num_reqs, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    row_of = np.empty(pool_size, np.int64)
    for req in range(num_reqs):
        row_of[:] = NO_ROW
        present = 0
        for place in range(width):
            present += survivals[req, order[req, place]] > 0.0
        count = min(limits[req], present)
        out_num_nodes[req] = count
        for place in range(count):
            column = order[req, place]
            row_of[column] = place + 1
            parent = parents[req, column]
            above = 0 if parent < 0 else row_of[parent]
            out_tokens[req, place] = tokens[req, column]
            out_parents[req, place + 1] = above
            out_depths[req, place + 1] = out_depths[req, above] + 1
            out_ranks[req, place + 1] = ranks[req, column]
            out_log_probs[req, place] = log_probs[req, column]
            out_survivals[req, place] = survivals[req, column]
            out_strata[req, place] = strata[req, column]
    return trees


_FIELDS = "i8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:], f4[:,:], f4[:,:], i8[:,:]"


@compiled(f"{_TREES}({_FIELDS}, i8[:], i8[:])")
def take(
    tokens,  # the fields of DraftTrees
    parents,
    depths,
    ranks,
    _,
    log_probs,
    survivals,
    strata,
    reqs,  # [num_reqs']
    num_nodes,  # [num_reqs']
):
    """The trees of some requests, each cut to a prefix."""
    count = reqs.size
    width = 0
    for i in range(count):
        width = max(width, num_nodes[i])
    trees = empty(count, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    for i in range(count):
        req = reqs[i]
        out_num_nodes[i] = num_nodes[i]
        for place in range(num_nodes[i]):
            out_tokens[i, place] = tokens[req, place]
            out_parents[i, place + 1] = parents[req, place + 1]
            out_depths[i, place + 1] = depths[req, place + 1]
            out_ranks[i, place + 1] = ranks[req, place + 1]
            out_log_probs[i, place] = log_probs[req, place]
            out_survivals[i, place] = survivals[req, place]
            out_strata[i, place] = strata[req, place]
    return trees


@compiled(f"{_TREES}({_FIELDS})")
def lay_out(tokens, parents, depths, ranks, num_nodes, log_probs, survivals, strata):
    """The same trees with the meta-path in the rows that follow the root, the rest in the order it was."""
    num_reqs, width = tokens.shape
    trees = empty(num_reqs, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    new_row = np.zeros(width + 1, np.int64)
    for req in range(num_reqs):
        count = out_num_nodes[req] = num_nodes[req]
        new_row[:] = 0
        current = next_row = 0
        for row in range(1, count + 1):  # a parent comes first, so its best child follows later
            if parents[req, row] == current:
                next_row += 1
                new_row[row] = next_row
                current = row
        for row in range(1, count + 1):
            if new_row[row] == 0:
                next_row += 1
                new_row[row] = next_row
        for row in range(1, count + 1):
            to = new_row[row]
            out_parents[req, to] = new_row[parents[req, row]]
            out_depths[req, to] = depths[req, row]
            out_ranks[req, to] = ranks[req, row]
            out_tokens[req, to - 1] = tokens[req, row - 1]
            out_log_probs[req, to - 1] = log_probs[req, row - 1]
            out_survivals[req, to - 1] = survivals[req, row - 1]
            out_strata[req, to - 1] = strata[req, row - 1]
    return trees


@compiled("b1[::1](i8[:,:], i8[:])")
def chains(
    parents,  # [num_reqs, max_nodes + 1]
    num_nodes,  # [num_reqs]
):
    """[num_reqs] whether every node is the child of the row before it."""
    out = np.ones(num_nodes.size, np.bool_)
    for req in range(num_nodes.size):
        for row in range(1, num_nodes[req] + 1):
            if parents[req, row] != row - 1:
                out[req] = False
    return out


# ---- after the walk


@compiled("i8[::1](i8[:,:], i8[:,:], i8[:], i8[:], i8[:])")
def children_matching(
    parents,  # [num_reqs, max_nodes + 1]
    tokens,  # [num_reqs, max_nodes]
    reqs,  # [num_active]
    rows,  # [num_active]
    emitted,  # [num_active]
):
    """[num_active] the child row of a request's row that carries a token, NO_ROW where there is none."""
    out = np.full(reqs.size, NO_ROW, np.int64)
    for i in range(reqs.size):
        req = reqs[i]
        for row in range(rows[i] + 1, parents.shape[1]):  # parents come first
            if parents[req, row] == rows[i] and tokens[req, row - 1] == emitted[i]:
                out[i] = row
                break
    return out


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
        return chains(self.parents, self.num_nodes)

    @classmethod
    def empty(cls, num_reqs: int) -> DraftTrees:
        return cls(*empty(num_reqs, 0))

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
            *cut(
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

    def take(
        self,
        reqs: Ints,  # [num_reqs'] rows of this batch
        num_nodes: Ints,  # [num_reqs'] nodes kept of each (a prefix)
    ) -> DraftTrees:
        """The trees of some requests, each cut to a prefix (what vLLM's scheduler does to a draft)."""
        return DraftTrees(*take(*self._fields, reqs, num_nodes))

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
        return DraftTrees(*lay_out(*self._fields))

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
            *place_rows(self.parents, self.depths, self.num_nodes, starts, context_lens, piece_rows)
        )

    def children_matching(
        self,
        reqs: Ints,  # [num_active]
        rows: Ints,  # [num_active] current row of each
        tokens: Ints,  # [num_active] token that the target emitted there
    ) -> Ints:
        """[num_active] the child row that carries the token, NO_ROW where there is none."""
        return children_matching(self.parents, self.tokens, reqs, rows, tokens)

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
