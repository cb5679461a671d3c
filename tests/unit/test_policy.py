# SPDX-License-Identifier: Apache-2.0
"""The pure decisions: which nodes to verify, which to expand, HeteroSpec's formulas, on or off."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.policy.decisions import (
    choose_nodes,
    expected_rate,
    hysteresis,
    in_beam,
    nodes_worth_expanding,
    tree_shape,
)
from heterospec_vllm.policy.paper import paper_action

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Survivals falling along each row, limits, the cost of each total and other requests."""
    num_reqs, width = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(seeds))
    survivals = rng.random((num_reqs, width))
    if draw(st.booleans()):
        survivals = np.round(survivals, 1)  # equal ones, zeros
    survivals = -np.sort(-survivals, axis=1)
    limits = np.array([draw(st.integers(0, width)) for _ in range(num_reqs)])
    most = draw(st.integers(0, num_reqs * width))
    cost = 0.1 + np.cumsum(rng.exponential(draw(st.sampled_from([0.01, 0.1, 1.0])), most + 1))
    return survivals, limits, cost, draw(st.integers(0, 3))


@few
@given(batches())
def test_chosen_nodes_earn_the_most_of_all_prefixes(batch) -> None:
    survivals, limits, cost, other_reqs = batch
    num_reqs = len(survivals)

    def tokens(counts) -> float:
        own = sum(survivals[req, :count].sum() for req, count in enumerate(counts))
        return num_reqs + other_reqs + own

    rates = {
        counts: tokens(counts) / cost[sum(counts)]
        for counts in itertools.product(*(range(limit + 1) for limit in limits))
        if sum(counts) < cost.size
    }
    choice = choose_nodes(survivals, limits, cost, other_reqs)
    counts = tuple(choice.num_nodes.tolist())
    assert counts in rates, "beyond a limit, or beyond the budget of the step"
    assert rates[counts] == pytest.approx(max(rates.values()), rel=1e-9)
    assert choice.rate == pytest.approx(rates[counts], rel=1e-9)
    assert choice.expected_tokens == pytest.approx(tokens(counts), rel=1e-9)


@few
@given(batches(), st.floats(0.001, 1.0), st.floats(1.05, 20.0))
def test_more_expensive_nodes_are_never_chosen_more(batch, slope: float, dearer: float) -> None:
    survivals, limits, cost, other_reqs = batch
    counts = np.arange(cost.size)
    cheap = choose_nodes(survivals, limits, 1.0 + slope * counts, other_reqs)
    dear = choose_nodes(survivals, limits, 1.0 + slope * dearer * counts, other_reqs)
    assert (dear.num_nodes <= cheap.num_nodes).all()


def test_free_nodes_are_all_taken_and_dear_ones_never() -> None:
    survivals = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.5]])
    limits = np.array([3, 2])
    free = choose_nodes(survivals, limits, np.ones(7))
    assert free.num_nodes.tolist() == [2, 2], "a node that never survives is worth nothing"
    dear = choose_nodes(survivals, limits, 1.0 + np.arange(7.0))
    assert dear.num_nodes.tolist() == [0, 0]
    assert (dear.expected_tokens, dear.rate) == (2.0, 2.0)


def test_other_requests_make_a_longer_step_dearer() -> None:
    """Each of them waits for the nodes of this one without gaining by them."""
    survivals, cost = np.array([[0.5]]), np.array([1.0, 1.2])
    assert choose_nodes(survivals, np.array([1]), cost).num_nodes.tolist() == [1]
    assert choose_nodes(survivals, np.array([1]), cost, 5).num_nodes.tolist() == [0]


# ---- levels


def expanded_of(survivals: np.ndarray, continuation: np.ndarray, **costs: Any) -> np.ndarray:
    """``continuation``: [num_reqs, num_candidates, top_k], as if every node had its own temperature and stratum."""
    num_reqs, width, _ = continuation.shape
    strata = np.tile(np.arange(width), (num_reqs, 1))
    return nodes_worth_expanding(survivals, strata, np.arange(num_reqs), continuation, **costs)


@st.composite
def levels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict]:
    num_reqs, width, top_k = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), 3)
    rng = np.random.default_rng(draw(seeds))
    survivals = rng.random((num_reqs, width)) * rng.integers(0, 2, (num_reqs, width))
    continuation = rng.random((num_reqs, width, top_k))
    costs = {
        "node_seconds": draw(st.floats(0.0, 0.5)),
        "row_seconds": draw(st.floats(0.0, 0.5)),
        "level_seconds": draw(st.floats(0.0, 1.0)),
        "beam": draw(st.integers(1, 5)),
    }
    return survivals, continuation, costs


@few
@given(levels(), st.floats(0.01, 3.0))
def test_a_level_earns_the_most_of_all_within_the_beam(level, price: float) -> None:
    survivals, continuation, costs = level
    chosen = expanded_of(survivals, continuation, price=price, **costs)

    def gain(req: int, node: int) -> float:
        children = survivals[req, node] * continuation[req, node] - price * costs["node_seconds"]
        return sum(max(0.0, child) for child in children) - price * costs["row_seconds"]

    gains = np.array(
        [[gain(req, node) for node in range(chosen.shape[1])] for req in range(len(chosen))]
    )
    best = -np.sort(-np.maximum(gains, 0.0) * (survivals > 0), axis=1)[:, : costs["beam"]]
    earned = best.sum() - price * costs["level_seconds"]
    assert (chosen.sum(axis=1) <= costs["beam"]).all()
    assert not chosen[survivals <= 0].any()
    if earned > 1e-9:
        assert gains[chosen].sum() == pytest.approx(best.sum(), rel=1e-9)
    elif earned < -1e-9:
        assert not chosen.any()


@few
@given(levels(), st.floats(0.01, 3.0), st.floats(1.0, 5.0))
def test_a_higher_price_expands_no_more_nodes(level, price: float, dearer: float) -> None:
    survivals, continuation, costs = level
    cheap = expanded_of(survivals, continuation, price=price, **costs)
    dear = expanded_of(survivals, continuation, price=price * dearer, **costs)
    assert (dear.sum(axis=1) <= cheap.sum(axis=1)).all()


def test_the_beam_keeps_what_earns_most_not_what_survives_most() -> None:
    """Ranked by survival the sure node without likely children would take the place and the level would not pay."""
    survivals, continuation = np.array([[0.9, 0.5]]), np.array([[[0.2], [1.0]]])
    for price in (1.0, 2.0):
        chosen = expanded_of(
            survivals, continuation, price=price, node_seconds=0.15, row_seconds=0.0,
            level_seconds=0.05, beam=1,
        )  # fmt: skip
        assert chosen.tolist() == [[False, True]]


def test_requests_share_the_start_of_a_level() -> None:
    def expanded(num_reqs: int) -> int:
        chosen = expanded_of(
            np.full((num_reqs, 1), 0.5), np.full((num_reqs, 1, 1), 0.6), price=1.0,
            node_seconds=0.1, row_seconds=0.1, level_seconds=0.25, beam=1,
        )  # fmt: skip
        return int(chosen.sum())

    assert (expanded(1), expanded(2), expanded(3)) == (0, 0, 3)  # each earns 0.1


def test_nothing_survives_nothing_is_expanded() -> None:
    chosen = expanded_of(
        np.zeros((2, 3)), np.ones((2, 3, 2)), price=1.0, node_seconds=0.0, row_seconds=0.0,
        level_seconds=0.0, beam=3,
    )  # fmt: skip
    assert not chosen.any()


# ---- the beam


@few
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.sampled_from([0.0, -0.5, -1.0, -2.0, -np.inf, np.nan]),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    st.integers(0, 5),
)
def test_the_beam_is_the_first_of_the_best(scores: list[list[float]], beam: int) -> None:
    chosen = in_beam(np.array(scores), beam)
    for row, taken in zip(scores, chosen.tolist(), strict=True):
        present = [i for i, score in enumerate(row) if score > -np.inf]
        best = sorted(present, key=lambda i: (-row[i], i))[:beam]
        assert [i for i, is_taken in enumerate(taken) if is_taken] == sorted(best)


# ---- what to expect of the next step


def test_expected_rate_is_that_of_the_best_budget() -> None:
    curve, cost = np.array([0.8, 0.4, 0.1]), np.array([1.0, 1.2, 1.5, 2.5])
    # (1 + sums of the curve) / cost: 1, 1.5, 1.4667, 0.92
    assert expected_rate(curve, 1, cost) == pytest.approx(1.8 / 1.2)
    assert expected_rate(curve, 4, cost) == pytest.approx(4 * 1.8 / 1.2)
    assert expected_rate(curve, 1, np.array([1.0, 9.0, 9.0, 9.0])) == 1.0


@few
@given(seeds, st.integers(1, 4))
def test_equal_trees_choose_at_the_expected_rate(seed: int, num_reqs: int) -> None:
    rng = np.random.default_rng(seed)
    curve = -np.sort(-rng.random(3))
    cost = 0.5 + np.cumsum(rng.random(4))
    choice = choose_nodes(np.tile(curve, (num_reqs, 1)), np.full(num_reqs, 3), np.interp(
        np.arange(3 * num_reqs + 1), num_reqs * np.arange(4), cost))  # fmt: skip
    # Linear between equal budgets: no unequal one can beat the best of them.
    assert choice.rate == pytest.approx(expected_rate(curve, num_reqs, cost), rel=1e-9)


# ---- HeteroSpec's formulas

# d' and drafted tokens with the root for N = 60, 50, 48 in the strata 0, 1, 2; d = 8, alpha = 4.
# Worked by hand from 0.3 N, 0.6 N, N, rounded to the nearest, plus alpha - i.
PAPER_TABLE = {
    0: [(12, (22, 19, 18)), (11, (39, 33, 32)), (10, (62, 52, 50))],
    1: [(11, (21, 18, 17)), (10, (38, 32, 31)), (9, (61, 51, 49))],
}


@pytest.mark.parametrize("first_index", [0, 1])
@pytest.mark.parametrize("alpha", [4, None], ids=["alpha 4", "alpha from the depth"])
def test_paper_action_is_the_worked_table(first_index: int, alpha: int | None) -> None:
    strata = np.arange(8)
    for column, total in enumerate((60, 50, 48)):
        action = paper_action(
            strata, depth=8, num_nodes=total - 1, first_index=first_index, alpha=alpha
        )
        rows = PAPER_TABLE[first_index]
        assert action.depths[:3].tolist() == [depth for depth, _ in rows]
        assert (action.num_nodes[:3] + 1).tolist() == [totals[column] for _, totals in rows]
        assert (action.depths[3:] == 8).all() and (action.num_nodes[3:] == total - 1).all()


@pytest.mark.parametrize(("depth", "alpha"), [(1, 1), (5, 3), (6, 3), (8, 4)])
def test_alpha_is_half_the_depth_rounded_up(depth: int, alpha: int) -> None:
    action = paper_action(np.array([0]), depth=depth, num_nodes=10)
    assert action.depths.tolist() == [depth + alpha] == [depth + math.ceil(depth / 2)]


@few
@given(st.integers(1, 63), st.integers(1, 16), st.integers(0, 1))
def test_paper_action_always_drafts(num_nodes: int, depth: int, first_index: int) -> None:
    action = paper_action(np.arange(8), depth=depth, num_nodes=num_nodes, first_index=first_index)
    assert (action.num_nodes >= 1).all() and (action.depths >= depth).all()
    assert (np.diff(action.depths) <= 0).all(), "the less certain, the less deep"
    most = num_nodes + math.ceil(depth / 2)
    assert (action.num_nodes <= most).all()


# ---- on or off, bounds


def test_hysteresis_has_a_band() -> None:
    def after(on: bool, gains: list[float]) -> list[bool]:
        states = []
        for gain in gains:
            on = hysteresis(on, gain, start=1.03, stop=1.0)
            states.append(on)
        return states

    assert after(False, [1.02, 1.03, 1.01, 1.0, 0.99, 1.02]) == [False, *[True] * 3, *[False] * 2]
    assert after(True, [1.001, 1.029] * 4) == [True] * 8
    assert after(False, [1.001, 1.029] * 4) == [False] * 8


def test_shapes() -> None:
    chain = tree_shape("chain", 16, 6, 8)
    assert (chain.num_nodes, chain.max_depth, chain.top_k) == (6, 6, 1)
    assert tree_shape("chain", 3, 6, 8).num_nodes == 3
    for policy in ("static", "paper", "marginal"):
        shape = tree_shape(policy, 16, 6, 8)
        assert (shape.num_nodes, shape.max_depth, shape.top_k) == (16, 6, 8)
