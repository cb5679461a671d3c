# SPDX-License-Identifier: Apache-2.0
"""Compiled loops against the same thing said in numpy, on ragged, empty, padded and NaN-poisoned input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_trees import from_parents

from heterospec_vllm.arrays import NO_ROW
from heterospec_vllm.draft.accepted_tokens import accepted_rows, firsts_and_context, true_blocks
from heterospec_vllm.draft.growth import children, level_positions, pack_frontier
from heterospec_vllm.engine.step import prompt_left, walked_rows
from heterospec_vllm.policy.decisions import inherit, within
from heterospec_vllm.policy.survival import KNOTS, NodeFeatures, SurvivalTables, along_paths
from heterospec_vllm.tree.outcomes import outcomes, tally
from heterospec_vllm.tree.pool import ranked
from heterospec_vllm.tree.trees import DraftTrees, chains

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def random_trees(rng: np.random.Generator, num_reqs: int, width: int) -> DraftTrees:
    """Parents first, distinct tokens, survivals that fall."""
    num_nodes = rng.integers(0, width + 1, num_reqs)
    real = np.arange(width) < num_nodes[:, None]
    parents = np.array(
        [[rng.integers(0, row + 1) for row in range(width)] for _ in range(num_reqs)]
    )
    parents = parents.reshape(num_reqs, width).astype(np.int64)
    tokens = np.argsort(rng.random((num_reqs, width)), axis=1)
    return from_parents(
        np.where(real, tokens, NO_ROW),
        np.where(real, parents, NO_ROW),
        np.where(real, rng.integers(0, 3, (num_reqs, width)), 0),
        num_nodes,
        log_probs=np.where(real, -rng.random((num_reqs, width)), 0),
        survivals=np.where(real, -np.sort(-rng.random((num_reqs, width)), axis=1), 0),
        strata=np.where(real, rng.integers(0, 8, (num_reqs, width)), 0),
    )


@few
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_children(seed: int, num_reqs: int, width: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    real = rng.random((num_reqs, width)) < 0.7
    rows = np.where(real, np.cumsum(real.ravel()).reshape(real.shape) - 1, NO_ROW)
    num_rows = max(1, int(real.sum()))
    local = np.log(rng.dirichlet(np.full(top_k + 1, 0.5), num_rows)[:, :top_k]).astype(np.float32)
    local[rng.random(local.shape) < 0.1] = -np.inf
    tokens = rng.integers(0, 99, (num_rows, top_k))
    columns = rng.integers(-1, 9, (num_reqs, width))
    log_probs = -rng.random((num_reqs, width)).astype(np.float32)
    entropies = rng.random((num_reqs, width)).astype(np.float32)
    survivals = rng.random((num_reqs, width))
    edges = np.array([0.3, 0.9, 1.5])
    got = children(columns, log_probs, entropies, survivals, rows, tokens, local, edges)
    got = [values.reshape(num_reqs, width, top_k) for values in got]
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.exp(local - np.maximum(local.max(axis=1, keepdims=True), -1e30))
        p = np.where(np.isfinite(local), p, 0.0)
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1e-30)
        own = -np.where(p > 0, p * np.log(p), 0.0).sum(axis=1)
    for req, place in np.argwhere(real):
        row = rows[req, place]
        np.testing.assert_array_equal(got[0][req, place], tokens[row])
        np.testing.assert_allclose(got[1][req, place], log_probs[req, place] + local[row])
        np.testing.assert_allclose(got[2][req, place], entropies[req, place] + own[row], atol=1e-6)
        expected = np.searchsorted(edges, got[2][req, place], side="left")
        np.testing.assert_array_equal(got[3][req, place], expected)
    assert (got[1][~real] == -np.inf).all()
    np.testing.assert_array_equal(got[4], np.broadcast_to(columns[..., None], got[4].shape))
    np.testing.assert_array_equal(got[5], np.broadcast_to(np.arange(top_k), got[5].shape))
    np.testing.assert_array_equal(got[6], np.broadcast_to(survivals[..., None], got[6].shape))


@few
@given(seeds)
def test_a_level_survives_as_its_nodes_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = SurvivalTables()
    shape = (3, 7)
    log_probs = -10 * rng.random(shape).astype(np.float32)
    log_probs[rng.random(shape) < 0.2] = np.nan
    log_probs[rng.random(shape) < 0.2] = -np.inf
    strata, kinds = rng.integers(0, 8, shape), rng.integers(0, 2, 3)
    parents, depth = rng.random(shape), int(rng.integers(1, 12))
    got = tables.of_level(log_probs, depth, strata, kinds, parents)
    own = tables.predict(
        NodeFeatures(
            log_probs,
            np.full(shape, depth),
            strata,
            np.repeat(kinds[:, None], shape[1], axis=1),
        )
    )
    absent = ~(log_probs > -np.inf)
    np.testing.assert_array_equal(got, np.where(absent, 0.0, along_paths(own, parents)))
    x = np.clip(np.nan_to_num(log_probs, nan=KNOTS[0]), KNOTS[0], KNOTS[-1])
    for at in np.ndindex(*shape):
        cell = tables.estimate[kinds[at[0]], min(depth, 8) - 1, strata[at]]
        np.testing.assert_allclose(own[at], np.interp(x[at], KNOTS, cell), atol=1e-9)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))
def test_frontier(seed: int, num_reqs: int, width: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.random((num_reqs, width * top_k)) < 0.4
    rows = rng.integers(0, 50, (num_reqs, width))
    tokens = rng.integers(0, 99, chosen.shape)
    log_probs, entropies = (rng.random(chosen.shape, np.float32) for _ in range(2))
    survivals, strata = rng.random(chosen.shape), rng.integers(0, 8, chosen.shape)
    tail = rng.integers(0, 99, (50, 2)).astype(np.int32)
    columns, *of_parents, own, reqs, parents, node_tokens, start, new_tail = pack_frontier(
        chosen, rows, tokens, log_probs, survivals, entropies, strata, 11, tail, 7
    )
    at = np.argwhere(chosen)
    real = own != NO_ROW
    for values, of in zip(of_parents, (log_probs, survivals, entropies, strata), strict=True):
        assert values.shape == own.shape and values.dtype == of.dtype
        np.testing.assert_array_equal(values[real], of[chosen])
    assert (of_parents[1][~real] == 0).all(), "padding survives nothing"
    np.testing.assert_array_equal(columns[real], 11 + at[:, 1])
    np.testing.assert_array_equal(reqs, at[:, 0])
    np.testing.assert_array_equal(parents, rows[at[:, 0], at[:, 1] // top_k])
    np.testing.assert_array_equal(node_tokens, tokens[chosen])
    np.testing.assert_array_equal(np.diff(start), chosen.sum(axis=1))
    assert own.shape[1] == chosen.sum(axis=1).max()
    np.testing.assert_array_equal(own[real], np.arange(len(at)))
    np.testing.assert_array_equal(new_tail[:, :2], tail[parents])
    np.testing.assert_array_equal(new_tail[:, 2], 7 + np.arange(len(at)))


@few
@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([4, 16]))
def test_true_rows(seed: int, counts: list[int], block_size: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 40, len(counts))
    positions = np.concatenate([np.arange(f, f + n) for f, n in zip(first, counts, strict=True)])
    table = rng.integers(0, 99, (len(counts), 13)).astype(np.int32)
    token_ids = rng.integers(0, 99, positions.size).astype(np.int32)
    nexts = rng.integers(0, 99, len(counts)).astype(np.int32)
    start, context_lens, before, slots, following, seq_lens = accepted_rows(
        np.array(counts), positions, table[:, :12], block_size, token_ids, nexts
    )
    expected = np.roll(token_ids, -1)
    expected[start[1:] - 1] = nexts
    np.testing.assert_array_equal(following, expected)
    np.testing.assert_array_equal(seq_lens, first + counts)
    blocks = true_blocks(np.array(counts), positions, table[:, :12], block_size)
    np.testing.assert_array_equal(blocks, slots // block_size)
    np.testing.assert_array_equal(np.diff(start), counts)
    np.testing.assert_array_equal(context_lens, first)
    for row, position in enumerate(positions):
        req = np.searchsorted(start, row, side="right") - 1
        seen = [*range(start[req], row + 1)]
        assert before[row].tolist() == seen + [NO_ROW] * (max(counts) - len(seen))
        block = table[req, position // block_size]
        assert slots[row] == block * block_size + position % block_size


@few
@given(seeds, st.integers(1, 4), st.integers(0, 6), st.integers(0, 9))
def test_within(seed: int, num_reqs: int, width: int, wanted: int) -> None:
    rng = np.random.default_rng(seed)
    present = rng.integers(0, width + 1, num_reqs)
    survivals = -np.sort(-rng.random((num_reqs, width)), axis=1)
    survivals[np.arange(width) >= present[:, None]] = 0.0
    limits = rng.integers(0, 9, num_reqs)
    want = np.minimum(np.minimum(limits, wanted), present)
    np.testing.assert_array_equal(within(survivals, limits, wanted), want)


@few
@given(seeds, st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_walked_rows(seed: int, chunks: list[int]) -> None:
    """Rows before the root (a prompt's chunk), then the visited ones."""
    rng = np.random.default_rng(seed)
    emitted = rng.integers(1, 4, len(chunks))
    nodes = emitted + rng.integers(0, 3, len(chunks))
    starts = np.concatenate([[0], np.cumsum(chunks + nodes)])
    roots = starts[:-1] + chunks
    paths = [
        np.sort(np.r_[0, rng.choice(np.arange(1, max(2, n)), e - 1, replace=False)])
        for n, e in zip(nodes, emitted, strict=True)
    ]
    rows = np.full((len(chunks), 4), NO_ROW)
    expected: list[int] = []
    for req, path in enumerate(paths):
        rows[req, : path.size] = path
        expected += [*range(starts[req], roots[req]), *(roots[req] + path).tolist()]
    got, num_tokens = walked_rows(starts, roots, rows, emitted)
    assert got.tolist() == expected
    np.testing.assert_array_equal(num_tokens, chunks + emitted)


@few
@given(seeds, st.integers(0, 5))
def test_prompt_left(seed: int, num_reqs: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, computed = rng.integers(1, 50, (2, num_reqs)).astype(np.int32)
    starts = np.cumsum([0, *rng.integers(0, 9, num_reqs), 7]).astype(np.int32)
    got = prompt_left(prompts, np.append(computed, np.int32(99)), starts)
    done = computed + np.diff(starts)[:num_reqs]
    np.testing.assert_array_equal(got, np.maximum(0, prompts - done))
    assert got.dtype == np.int64


def test_positions_end_at_the_models_length() -> None:
    got = level_positions(np.array([5, 98]), np.array([0, 1, 1]), 2, 99)
    assert got.tolist() == [7, 99, 99]


@few
@given(seeds)
def test_children_inherit_by_the_weight_of_their_parents(seed: int) -> None:
    rng = np.random.default_rng(seed)
    continuation = rng.random((2, 9, 8, 3))
    before = continuation.copy()
    kinds = rng.integers(0, 2, 2)
    strata, survivals = rng.integers(0, 8, (2, 4)), rng.random((2, 4))
    survivals[0, 1] = 0
    children = rng.random((2, 4, 3)) * survivals[..., None]
    inherit(continuation, kinds, 2, strata, survivals, children)
    expected = before.copy()
    for t in range(2):
        for s in range(8):
            parents = (kinds[:, None] == t) & (strata == s) & (survivals > 0)
            weight = 0.1 * survivals[parents]
            if weight.size:
                share = children[parents] / survivals[parents][:, None]
                mean = (weight[:, None] * share).sum(axis=0) / weight.sum()
                expected[t, 2, s] += min(weight.sum(), 0.5) * (mean - before[t, 2, s])
    np.testing.assert_allclose(continuation, expected, atol=1e-12)


@few
@given(seeds, st.integers(1, 5), st.integers(0, 9))
def test_trees(seed: int, num_reqs: int, width: int) -> None:
    """Taking, laying out, masks and matching on random trees."""
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, num_reqs, width)
    reqs = rng.integers(0, num_reqs, 3)
    keep = np.minimum(trees.num_nodes[reqs], rng.integers(0, 10, 3))
    taken = trees.take(reqs, keep)
    taken.check()
    laid = trees.laid_out()
    laid.check()
    context_lens = rng.integers(0, 99, num_reqs)
    placed = laid.placed(context_lens)
    np.testing.assert_array_equal(np.diff(placed.query_start_loc), trees.num_nodes + 1)
    np.testing.assert_array_equal(placed.seq_lens, context_lens + trees.num_nodes + 1)
    for req in range(num_reqs):
        count = trees.num_nodes[req]
        assert sorted(laid.tokens[req, :count]) == sorted(trees.tokens[req, :count])
        own = slice(placed.query_start_loc[req], placed.query_start_loc[req + 1])
        mask, positions = placed.ancestor_mask[own], placed.positions[own]
        assert (positions == context_lens[req] + laid.depths[req, : count + 1]).all()
        for row in range(count + 1):
            path, at = {row}, row
            while at:
                at = laid.parents[req, at]
                path.add(at)
            assert {j for j in range(64) if int(mask[row]) >> j & 1} == path
        for row in range(1, count + 1):
            token = laid.tokens[req, [row - 1]]
            found = laid.children_matching(np.array([req]), laid.parents[req, [row]], token)
            assert found[0] == row
        assert laid.children_matching(np.array([req]), np.array([0]), np.array([-7]))[0] == NO_ROW


@few
@given(seeds, st.integers(1, 4), st.integers(0, 9), st.integers(1, 5))
def test_placed_rows(seed: int, num_reqs: int, width: int, longest: int) -> None:
    """Whatever the pieces, a row sees its context, the text before it and its own ancestors, by slot."""
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, num_reqs, width).laid_out()
    text = rng.integers(0, 12, num_reqs)  # rows in front of a tree, or a request's only rows
    text = np.maximum(text, trees.num_nodes == 0)
    counts = text + np.where(trees.num_nodes > 0, trees.num_nodes + 1, 0)
    starts = np.concatenate([[0], np.cumsum(counts)])
    context_lens = rng.integers(0, 20, num_reqs)
    placed = trees.placed(context_lens, starts, longest)
    positions, masks, reqs = placed.positions, placed.ancestor_mask, placed.reqs
    piece_starts, seq_lens = placed.query_start_loc, placed.seq_lens
    assert piece_starts[-1] == starts[-1] and reqs.size == seq_lens.size == piece_starts.size - 1
    for piece, req in enumerate(reqs):
        first, stop = piece_starts[piece], piece_starts[piece + 1]
        assert starts[req] <= first < stop <= starts[req + 1]
        context = seq_lens[piece] - (stop - first)
        for row in range(first, stop):
            mask = int(masks[row])
            seen = {*range(context)} | {context + j for j in range(64) if mask >> j & 1}
            place = row - starts[req]
            wanted = {*range(context_lens[req] + min(place, text[req]))}
            node = place - text[req]
            if node < 0:  # text
                wanted.add(context_lens[req] + place)
                assert stop - first <= longest and positions[row] == context_lens[req] + place
            else:
                at, depth = node, 0
                while True:
                    wanted.add(context_lens[req] + text[req] + at)
                    if at == 0:
                        break
                    at, depth = trees.parents[req, at], depth + 1
                assert positions[row] == context_lens[req] + text[req] + depth
            assert seen == wanted


@few
@given(seeds, st.integers(1, 4), st.integers(0, 9))
def test_outcomes_and_tally(seed: int, num_reqs: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, num_reqs, width).laid_out()
    visited = np.full((num_reqs, trees.max_depth + 1), NO_ROW)
    visited[:, 0] = 0
    for req in range(num_reqs):  # some path from the root
        for depth in range(1, trees.max_depth + 1):
            below = np.flatnonzero(trees.parents[req] == visited[req, depth - 1])
            if not below.size or rng.random() < 0.3:
                break
            visited[req, depth] = rng.choice(below)
    kinds = rng.integers(0, 2, num_reqs)
    found = outcomes(trees.log_probs, trees.depths, trees.strata, trees.num_nodes, visited, kinds)
    real = np.arange(trees.max_nodes) < trees.num_nodes[:, None]
    hit = np.zeros((num_reqs, trees.max_nodes + 1))
    np.put_along_axis(hit, np.maximum(visited, 0), 1.0, axis=1)
    expected = (
        trees.log_probs[real],
        trees.depths[:, 1:][real],
        trees.strata[real],
        np.repeat(kinds, trees.num_nodes),
        hit[:, 1:][real],
    )
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    by_stratum, by_depth, others, num_trees, branches = tally(
        trees.parents, trees.depths, trees.ranks, trees.num_nodes, trees.strata, visited, 8
    )
    np.testing.assert_array_equal(by_stratum[0], np.bincount(trees.strata[real], minlength=8))
    assert by_stratum[1].sum() == num_trees == (trees.num_nodes > 0).sum()
    assert by_stratum[2].sum() == trees.depths.max(axis=1).sum()
    assert by_depth.sum() == (visited > 0).sum()
    ranks = np.take_along_axis(trees.ranks, np.maximum(visited, 0), axis=1)
    assert others == ((visited > 0) & (ranks > 0)).sum()
    assert branches == bool((~trees.is_chain).any())


def test_other_types_are_refused() -> None:
    """An argument of another type would be compiled for in the middle of a step."""
    with pytest.raises(TypeError):
        chains(np.zeros((1, 2), np.int32), np.zeros(1, np.int64))


def test_vllm_can_look_at_every_module_beside_numba() -> None:
    """Wrapped target: see compiled.py. Without the wrap no CPU engine starts after numba was imported."""
    from llvmlite.binding import ffi
    from vllm.triton_utils.dispatcher import _rebind_kernels

    assert not hasattr(ffi.lib, "__dict__")
    assert callable(ffi.lib.LLVMPY_GetVersionInfo)
    assert hasattr(type(ffi.lib).__getattr__, "__wrapped__")
    _rebind_kernels([(object(), object())])  # type: ignore[list-item]


@few
@given(seeds, st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
def test_ranked(seed: int, num_reqs: int, pool_size: int, width: int) -> None:
    """Of equals the first ones first; what is absent, NaN or below zero comes last with a survival of 0."""
    rng = np.random.default_rng(seed)
    choices = np.array([np.nan, -0.5, 0.0, 0.2, 0.5, 0.9])
    survivals = rng.choice(choices, (num_reqs, pool_size))
    width = min(width, pool_size)
    columns, best, present = ranked(survivals, width)
    assert present == (survivals > 0).sum()
    key = -np.fmax(survivals, 0.0)
    want = np.argsort(key, axis=1, kind="stable")[:, :width]
    np.testing.assert_array_equal(columns, want)
    np.testing.assert_array_equal(best, -np.take_along_axis(key, want, axis=1))


@few
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), max_size=6))
def test_firsts_and_context(spans: list[tuple[int, int]]) -> None:
    num_tokens = np.array([count for _, count in spans], dtype=np.int64)
    positions = [first + i for first, count in spans for i in range(count)]
    firsts, context = firsts_and_context(num_tokens, np.array(positions, dtype=np.int64))
    assert firsts.tolist() == [first for first, _ in spans]
    assert context == sum(first + count - 1 for first, count in spans)
