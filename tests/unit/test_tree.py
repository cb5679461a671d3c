# SPDX-License-Identifier: Apache-2.0
"""DraftTrees, the walk over them and the KV moves that follow: properties over random trees."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heterospec_vllm.cache import plan_moves
from heterospec_vllm.tree import NO_ROW, CandidatePool, DraftTrees
from heterospec_vllm.verify import walk

VOCAB = 12


@st.composite
def pools(draw: st.DrawFn) -> CandidatePool:
    """What a drafter proposes: levels of `top_k` children for the best `top_k` nodes."""
    num_reqs, top_k, depth = (draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ties = draw(st.booleans())
    rows = [_expand(rng, top_k, depth, ties) for _ in range(num_reqs)]
    tokens, scores, parents, ranks = (np.array(column) for column in zip(*rows, strict=True))
    return CandidatePool(tokens, scores.astype(np.float32), parents, ranks)


def _expand(rng: np.random.Generator, top_k: int, depth: int, ties: bool) -> Sequence[list]:
    tokens: list[int] = []
    scores: list[float] = []
    parents: list[int] = []
    ranks: list[int] = []
    frontier = [(NO_ROW, 0.0)]
    for _ in range(depth):
        children = []
        for column, score in frontier:
            steps = np.zeros(top_k) if ties else -np.sort(rng.exponential(size=top_k))
            for rank, token in enumerate(rng.choice(VOCAB, top_k, replace=False)):
                children.append((len(tokens), score + steps[rank]))
                tokens.append(int(token))
                scores.append(score + steps[rank])
                parents.append(column)
                ranks.append(rank)
        frontier = sorted(children, key=lambda child: -child[1])[:top_k]
    return tokens, scores, parents, ranks


@st.composite
def trees(draw: st.DrawFn) -> DraftTrees:
    pool = draw(pools())
    most = [draw(st.integers(0, 20)) for _ in range(pool.tokens.shape[0])]
    return DraftTrees.from_pool(pool, np.array(most))


@given(pools(), st.data())
def test_a_cut_tree_is_connected_and_best(pool: CandidatePool, data: st.DataObject) -> None:
    num_reqs, pool_size = pool.tokens.shape
    most = np.array([data.draw(st.integers(0, 20)) for _ in range(num_reqs)])
    cut = DraftTrees.from_pool(pool, most)
    cut.check()
    assert (cut.num_nodes == np.minimum(most, pool_size)).all()
    for req in range(num_reqs):
        best = np.sort(pool.scores[req])[::-1][: most[req]]
        kept = _score_of_paths(pool, cut, req)
        np.testing.assert_allclose(np.sort(kept)[::-1], best, rtol=1e-6)


def _score_of_paths(pool: CandidatePool, cut: DraftTrees, req: int) -> np.ndarray:
    """Each node's score, found in the pool by its path of tokens."""
    by_path = {}
    for column in range(pool.tokens.shape[1]):
        path, at = [], column
        while at != NO_ROW:
            path.append(int(pool.tokens[req, at]))
            at = int(pool.parents[req, at])
        by_path[tuple(path[::-1])] = pool.scores[req, column]
    found = []
    for row in range(1, int(cut.num_nodes[req]) + 1):
        path, at = [], row
        while at != 0:
            path.append(int(cut.tokens[req, at - 1]))
            at = int(cut.parents[req, at])
        found.append(by_path[tuple(path[::-1])])
    return np.array(found, dtype=np.float32)


@given(trees())
def test_the_meta_path_comes_first(tree: DraftTrees) -> None:
    for req in range(tree.num_reqs):
        parents = tree.parents[req, 1 : tree.num_nodes[req] + 1].tolist()
        row = 0
        while row in parents:
            first_child = parents.index(row) + 1
            assert first_child == row + 1
            row = first_child


@given(trees(), st.data())
def test_any_prefix_is_a_tree(tree: DraftTrees, data: st.DataObject) -> None:
    reqs = np.array(data.draw(st.permutations(range(tree.num_reqs))))
    cut = np.array([data.draw(st.integers(0, int(n))) for n in tree.num_nodes[reqs]])
    prefix = tree.take(reqs, cut)
    prefix.check()
    for i, req in enumerate(reqs):
        assert (prefix.tokens[i, : cut[i]] == tree.tokens[req, : cut[i]]).all()


@given(st.lists(trees(), min_size=1, max_size=3))
def test_batches_join(batches: list[DraftTrees]) -> None:
    joined = DraftTrees.concatenate(batches)
    joined.check()
    assert joined.num_nodes.tolist() == [n for b in batches for n in b.num_nodes.tolist()]


@given(trees())
def test_ancestor_bits_are_the_path(tree: DraftTrees) -> None:
    mask = tree.ancestor_bitmask()
    for req in range(tree.num_reqs):
        for row in range(int(tree.num_nodes[req]) + 1):
            path, at = [row], row
            while at != 0:
                at = int(tree.parents[req, at])
                path.append(at)
            assert int(mask[req, row]) == sum(1 << r for r in path)
            assert len(path) == tree.depths[req, row] + 1


@given(trees())
def test_chains_are_told_from_trees(tree: DraftTrees) -> None:
    for req in range(tree.num_reqs):
        n = int(tree.num_nodes[req])
        parents = tree.parents[req, 1 : n + 1].tolist()
        assert tree.is_chain[req] == (parents == list(range(n)))


@given(trees(), st.integers(0, 2**32 - 1))
def test_the_walk_emits_what_the_target_says(tree: DraftTrees, seed: int) -> None:
    """Against a walk by hand; and no row but the visited ones is ever asked for."""
    rng = np.random.default_rng(seed)
    says = rng.integers(0, VOCAB, (tree.num_reqs, tree.max_nodes + 1))
    for req in range(tree.num_reqs):  # make matches likely
        for row in range(1, int(tree.num_nodes[req]) + 1):
            if rng.random() < 0.6:
                says[req, tree.parents[req, row]] = tree.tokens[req, row - 1]
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


def test_nan_scores_never_win() -> None:
    pool = CandidatePool(
        tokens=np.array([[1, 2, 3, 4]]),
        scores=np.array([[np.nan, -1.0, np.nan, -2.0]], dtype=np.float32),
        parents=np.array([[NO_ROW, NO_ROW, 0, 1]]),
        ranks=np.array([[0, 1, 0, 0]]),
    )
    cut = DraftTrees.from_pool(pool, np.array([2]))
    cut.check()
    assert cut.tokens.tolist() == [[2, 4]]
