# SPDX-License-Identifier: Apache-2.0
"""DraftTrees, the walk over them and the KV moves that follow: properties over random trees."""

import dataclasses
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.arrays import NO_ROW
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.compact import plan_moves
from heterospec_vllm.verify.scorer_v1 import walk_logits
from heterospec_vllm.verify.walk import walk

few = settings(max_examples=60, deadline=None)
VOCAB = 12
TYPES = {
    "tokens": np.int64,
    "log_probs": np.float32,
    "survivals": np.float64,
    "strata": np.int64,
    "entropies": np.float32,
    "parents": np.int64,
    "ranks": np.int64,
}


@st.composite
def pools(draw: st.DrawFn) -> CandidatePool:
    """What a drafter proposes: levels of `top_k` children for the best `top_k` nodes, some requests stopping early."""
    num_reqs, top_k, depth = (draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ties = draw(st.booleans())
    stops = [draw(st.integers(1, depth)) for _ in range(num_reqs)]
    rows = [_expand(rng, top_k, depth, stop, ties) for stop in stops]
    columns = {
        name: np.array([[node[name] for node in row] for row in rows]) for name in rows[0][0]
    }
    columns["survivals"] = columns["survivals"].astype(np.float32)  # as trees keep them
    return CandidatePool(**{name: columns[name].astype(dtype) for name, dtype in TYPES.items()})


def _expand(
    rng: np.random.Generator, top_k: int, depth: int, stop: int, ties: bool
) -> list[dict[str, Any]]:
    pool: list[dict[str, Any]] = []
    root = {"log_probs": 0.0, "survivals": 1.0, "entropies": 0.0}
    frontier = [(NO_ROW, root)]
    for level in range(1, depth + 1):
        children = []
        for column, parent in frontier:
            steps = np.zeros(top_k) if ties else -np.sort(rng.exponential(size=top_k))
            for rank, token in enumerate(rng.choice(VOCAB, top_k, replace=False)):
                # The survival is not a function of the probability, only falling along the path.
                survival = parent["survivals"] * (1.0 if ties else rng.random())
                node = {
                    "tokens": int(token),
                    "log_probs": parent["log_probs"] + steps[rank],
                    "survivals": survival,
                    "strata": int(rng.integers(8)),
                    "entropies": parent["entropies"] + rng.random(),
                    "parents": column,
                    "ranks": rank,
                }
                if level > stop:
                    node |= {"log_probs": -np.inf, "survivals": 0.0}
                children.append((len(pool), node))
                pool.append(node)
        frontier = sorted(children, key=lambda child: -child[1]["log_probs"])[:top_k]
    return pool


@st.composite
def trees(draw: st.DrawFn) -> DraftTrees:
    pool = draw(pools())
    most = [draw(st.integers(0, 20)) for _ in range(pool.tokens.shape[0])]
    tree = DraftTrees.from_pool(pool, np.array(most))
    return tree.laid_out() if draw(st.booleans()) else tree


def _paths(tokens: np.ndarray, parents: np.ndarray, nodes: list[int]) -> list[tuple[int, ...]]:
    """The tokens from the root to each of the nodes; `parents` of a node is a node or NO_ROW."""
    paths = []
    for node in nodes:
        path, at = [], node
        while at != NO_ROW:
            path.append(int(tokens[at]))
            at = int(parents[at])
        paths.append(tuple(path[::-1]))
    return paths


def _nodes_of(tree: DraftTrees, req: int) -> dict[tuple[int, ...], tuple[float, ...]]:
    """What a tree says of each node, in the order of its rows, by the node's path of tokens."""
    nodes = list(range(int(tree.num_nodes[req])))
    paths = _paths(tree.tokens[req], tree.parents[req, 1:] - 1, nodes)
    return {
        path: (
            float(tree.log_probs[req, node]),
            float(tree.survivals[req, node]),
            int(tree.strata[req, node]),
            int(tree.ranks[req, node + 1]),
            int(tree.depths[req, node + 1]),
        )
        for node, path in zip(nodes, paths, strict=True)
    }


@few
@given(pools(), st.data())
def test_a_cut_tree_is_connected_and_best(pool: CandidatePool, data: st.DataObject) -> None:
    num_reqs = pool.tokens.shape[0]
    most = np.array([data.draw(st.integers(0, 20)) for _ in range(num_reqs)])
    cut = DraftTrees.from_pool(pool, most)
    cut.check()
    present = (pool.survivals > 0).sum(axis=1)
    assert (cut.num_nodes == np.minimum(most, present)).all()
    for req in range(num_reqs):
        kept = _nodes_of(cut, req)
        assert len(kept) == cut.num_nodes[req]
        best = np.sort(pool.survivals[req])[::-1][: len(kept)]
        assert [node[1] for node in kept.values()] == best.tolist()
        columns = np.flatnonzero(pool.survivals[req] > 0).tolist()
        paths = _paths(pool.tokens[req], pool.parents[req], columns)
        for column, path in zip(columns, paths, strict=True):
            if path in kept:
                assert kept[path] == (
                    float(pool.log_probs[req, column]),
                    float(pool.survivals[req, column]),
                    int(pool.strata[req, column]),
                    int(pool.ranks[req, column]),
                    len(path),
                )


@few
@given(pools(), st.data())
def test_ranked_candidates_at_hand_change_nothing(pool: CandidatePool, data: st.DataObject) -> None:
    most = np.array([data.draw(st.integers(0, 20)) for _ in range(pool.tokens.shape[0])])
    cut = DraftTrees.from_pool(pool, most)
    again = DraftTrees.from_pool(pool, most, pool.ranked(pool.tokens.shape[1]))
    for field in dataclasses.fields(cut):
        np.testing.assert_array_equal(getattr(cut, field.name), getattr(again, field.name))


@few
@given(pools(), st.data())
def test_the_meta_path_comes_first(pool: CandidatePool, data: st.DataObject) -> None:
    """From the root always to the best child; every node stays what it was, the others in their order."""
    most = np.array([data.draw(st.integers(0, 20)) for _ in range(pool.tokens.shape[0])])
    cut = DraftTrees.from_pool(pool, most)
    tree = cut.laid_out()
    tree.check()
    assert (tree.num_nodes == cut.num_nodes).all()
    for req in range(tree.num_reqs):
        before, after = _nodes_of(cut, req), _nodes_of(tree, req)
        assert after == before
        meta: list[tuple[int, ...]] = []
        while True:
            above = meta[-1] if meta else ()
            children = [path for path in before if path[:-1] == above]
            if not children:
                break
            meta.append(children[0])
        others = [path for path in before if path not in meta]
        assert list(after) == meta + others


@few
@given(trees(), st.data())
def test_any_prefix_is_a_tree(tree: DraftTrees, data: st.DataObject) -> None:
    reqs = np.array(data.draw(st.permutations(range(tree.num_reqs))))
    cut = np.array([data.draw(st.integers(0, int(n))) for n in tree.num_nodes[reqs]])
    prefix = tree.take(reqs, cut)
    prefix.check()
    for i, req in enumerate(reqs):
        kept = list(_nodes_of(tree, req).items())[: cut[i]]
        assert list(_nodes_of(prefix, i).items()) == kept


@few
@given(st.lists(trees(), min_size=1, max_size=3))
def test_batches_join(batches: list[DraftTrees]) -> None:
    joined = DraftTrees.concatenate(batches)
    joined.check()
    expected = [_nodes_of(batch, req) for batch in batches for req in range(batch.num_reqs)]
    assert [_nodes_of(joined, req) for req in range(joined.num_reqs)] == expected


@few
@given(trees())
def test_ancestor_bits_are_the_path(tree: DraftTrees) -> None:
    placed = tree.placed(np.zeros(tree.num_reqs, dtype=np.int64))
    for req in range(tree.num_reqs):
        mask = placed.ancestor_mask[placed.query_start_loc[req] :].view(np.uint64)
        for row in range(int(tree.num_nodes[req]) + 1):
            path, at = [row], row
            while at != 0:
                at = int(tree.parents[req, at])
                path.append(at)
            assert int(mask[row]) == sum(1 << r for r in path)
            assert len(path) == tree.depths[req, row] + 1


@few
@given(trees())
def test_chains_are_told_from_trees(tree: DraftTrees) -> None:
    for req in range(tree.num_reqs):
        n = int(tree.num_nodes[req])
        parents = tree.parents[req, 1 : n + 1].tolist()
        assert tree.is_chain[req] == (parents == list(range(n)))


def _answers(tree: DraftTrees, seed: int) -> np.ndarray:
    """[num_reqs, max_nodes + 1] what the target says at each row, often what some child carries."""
    rng = np.random.default_rng(seed)
    says = rng.integers(0, VOCAB, (tree.num_reqs, tree.max_nodes + 1))
    for req in range(tree.num_reqs):
        for row in range(1, int(tree.num_nodes[req]) + 1):
            if rng.random() < 0.6:
                says[req, tree.parents[req, row]] = tree.tokens[req, row - 1]
    return says


@few
@given(trees(), st.integers(0, 2**32 - 1))
def test_the_walk_emits_what_the_target_says(tree: DraftTrees, seed: int) -> None:
    """Against a walk by hand; and no row but the visited ones is ever asked for."""
    says = _answers(tree, seed)
    asked = []

    def sample(reqs, rows, depth):
        asked.extend(zip(reqs.tolist(), rows.tolist(), strict=True))
        assert (tree.depths[reqs, rows] == depth).all()
        return says[reqs, rows]

    walked = walk(tree, sample)
    visited = []
    for req in range(tree.num_reqs):
        row, expected = 0, []
        while row != NO_ROW:
            visited.append((req, row))
            token = says[req, row]
            expected.append(token)
            children = [
                r
                for r in range(1, int(tree.num_nodes[req]) + 1)
                if tree.parents[req, r] == row and tree.tokens[req, r - 1] == token
            ]
            row = children[0] if children else NO_ROW
        n = int(walked.num_emitted[req])
        assert walked.tokens[req, :n].tolist() == expected
        assert (walked.tokens[req, n:] == NO_ROW).all()
        assert (walked.rows[req, n:] == NO_ROW).all()
    assert sorted(asked) == sorted(visited)


@few
@given(trees(), st.integers(0, 2**32 - 1))
def test_greedy_batches_are_walked_by_the_same_rule(tree: DraftTrees, seed: int) -> None:
    """Where the library is there the scorer's is C++; without it this compares the walk with itself."""
    says = _answers(tree, seed)
    expected = walk(tree, lambda reqs, rows, _: says[reqs, rows])
    num_rows = tree.num_nodes + 1
    first_row = np.cumsum(num_rows) - num_rows
    picked = says[np.arange(says.shape[1]) < num_rows[:, None]]
    logits = torch.nn.functional.one_hot(torch.from_numpy(picked), VOCAB).float()
    got = walk_logits(tree, logits, first_row)
    for name in ("rows", "tokens", "num_emitted"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@few
@given(trees(), st.integers(0, 2**32 - 1))
def test_moves_leave_the_accepted_path_in_place(tree: DraftTrees, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def sample(reqs, rows, depth):
        if tree.max_nodes == 0:
            return np.zeros(reqs.size, dtype=np.int64)
        return tree.tokens[reqs, rng.integers(0, tree.max_nodes, reqs.size)]

    walked = walk(tree, sample)
    widths = tree.num_nodes + 1
    root_rows = np.cumsum(widths) - widths
    moves = plan_moves(walked, root_rows)
    slots = np.arange(int(widths.sum()))  # slot i holds token row i
    for source, target in zip(moves.sources, moves.targets, strict=True):
        assert target < source
        slots[target] = slots[source]
    for req, root in enumerate(root_rows):
        n = int(walked.num_emitted[req])
        assert slots[root : root + n].tolist() == (root + walked.rows[req, :n]).tolist()
    in_place = (walked.rows <= np.arange(walked.rows.shape[1])).all()
    assert (moves.num_moves == 0) == in_place


def test_an_empty_batch_of_drafts() -> None:
    empty = DraftTrees.empty(3)
    empty.check()
    assert empty.is_chain.all() and empty.max_depth == 0
    walked = walk(empty, lambda reqs, rows, depth: np.array([7, 8, 9]))
    assert walked.tokens.tolist() == [[7], [8], [9]]
    assert walked.num_accepted.tolist() == [0, 0, 0]


def test_levels_join_side_by_side() -> None:
    def level(first: int) -> CandidatePool:
        columns = {
            name: (100 * i + np.arange(first, first + 4).reshape(2, 2)).astype(dtype)
            for i, (name, dtype) in enumerate(TYPES.items())
        }
        return CandidatePool(**columns)

    names = [field.name for field in dataclasses.fields(CandidatePool)]
    joined = CandidatePool.concatenate([level(0), level(4), level(8)])
    for i, name in enumerate(names):
        expected = 100 * i + np.array([[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]])
        np.testing.assert_array_equal(getattr(joined, name), expected)


def test_nan_survivals_never_win() -> None:
    nothing = np.zeros((1, 4), dtype=np.int64)
    pool = CandidatePool(
        tokens=np.array([[1, 2, 3, 4]]),
        log_probs=np.array([[np.nan, -1.0, np.nan, -2.0]], dtype=np.float32),
        survivals=np.array([[np.nan, 0.5, np.nan, 0.2]], dtype=np.float32),
        strata=nothing,
        entropies=nothing.astype(np.float32),
        parents=np.array([[NO_ROW, NO_ROW, 0, 1]]),
        ranks=nothing,
    )
    cut = DraftTrees.from_pool(pool, np.array([4]))
    cut.check()
    assert cut.tokens.tolist()[0][:2] == [2, 4]
    assert cut.num_nodes.tolist() == [2]
