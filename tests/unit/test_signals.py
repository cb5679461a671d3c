# SPDX-License-Identifier: Apache-2.0
"""The draft's own uncertainty: top-K entropies, where the meta-path ends, strata."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_trees import top_k_entropy

from heterospec_vllm.draft.signals import meta_path_end
from heterospec_vllm.policy.strata import DEFAULT_STRATA, NUM_STRATA, Strata, fit_edges

few = settings(max_examples=60, deadline=None)


def entropy_by_hand(log_probs: list[float]) -> float:
    weights = [math.exp(x) for x in log_probs if x > -math.inf]
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0) if total else 0.0


@few
@given(
    st.lists(
        st.lists(st.one_of(st.floats(-30.0, 0.0), st.just(-math.inf)), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_entropy_is_that_of_the_renormalised_top(rows: list[list[float]]) -> None:
    found = top_k_entropy(np.array(rows, dtype=np.float32))
    assert found.shape == (len(rows),)
    assert (found >= 0).all() and (found <= math.log(4) + 1e-5).all()
    np.testing.assert_allclose(found, [entropy_by_hand(row) for row in rows], atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_even_choices_are_the_most_uncertain(k: int) -> None:
    even = top_k_entropy(np.full((2, 3, k), -7.0, dtype=np.float32))
    np.testing.assert_allclose(even, np.full((2, 3), math.log(k)), atol=1e-6)


def test_a_sure_node_has_no_entropy() -> None:
    rows = [[0.0, -np.inf, -np.inf], [0.0, -200.0, -900.0], [-np.inf] * 3]
    with np.errstate(all="raise", under="ignore"):
        found = top_k_entropy(np.array(rows, dtype=np.float32))
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_order_and_scale_of_the_children_do_not_matter() -> None:
    row = np.log(np.array([0.5, 0.2, 0.05], dtype=np.float32))
    expected = top_k_entropy(row)
    np.testing.assert_allclose(top_k_entropy(row[::-1]), expected, atol=1e-6)
    np.testing.assert_allclose(top_k_entropy(row - 40.0), expected, atol=1e-5)


# ---- the meta-path


def ends(log_probs: list[list[float]], local: list[list[float]], reading) -> list[int]:
    depths = np.array([1, 1, 2, 2])
    return meta_path_end(depths, np.array(log_probs), np.array(local), reading).tolist()


def test_the_readings_of_the_meta_path() -> None:
    """A takes the likeliest path among the deepest nodes, B the node that is likeliest after its parent."""
    log_probs = [[-0.1, -1.0, -0.9, -1.2]]
    local = [[-0.1, -1.0, -0.8, -0.2]]
    assert ends(log_probs, local, "A") == [2]
    assert ends(log_probs, local, "B") == [3]


@pytest.mark.parametrize("reading", ["A", "B"])
def test_requests_that_stopped_early_end_where_they_stopped(reading) -> None:
    none = -np.inf
    log_probs = [[-2.0, -1.0, none, none], [-0.1, -1.0, none, -3.0], [none] * 4]
    assert ends(log_probs, log_probs, reading)[:2] == [1, 3]
    # An absent candidate's own log-probability is -inf minus its parent's, or NaN.
    local = [[-2.0, -1.0, np.nan, np.nan], [-0.1, -1.0, np.nan, -2.0], [np.nan] * 4]
    assert ends(log_probs, local, reading)[:2] == [1, 3]


# ---- strata


def test_strata_count_the_edges_below() -> None:
    strata = Strata(((1.0, 2.0), (3.0,)))
    entropies = np.array([[0.0, 1.0, 1.01], [2.0, 2.5, 99.0]])
    assert strata.of(1, entropies).tolist() == [[0, 0, 1], [1, 2, 2]]
    assert strata.of(2, entropies).tolist() == [[0, 0, 0], [0, 0, 1]]
    assert strata.of(7, entropies).tolist() == strata.of(2, entropies).tolist()
    assert Strata(((),)).of(1, entropies).tolist() == [[0] * 3] * 2


def test_default_strata_cover_all_numbers() -> None:
    for depth in (1, 4, 8, 12):
        found = DEFAULT_STRATA.of(depth, np.linspace(0.0, depth * math.log(8), 200))
        assert (np.diff(found) >= 0).all()
        assert (found.min(), found.max()) == (0, NUM_STRATA - 1)


def test_fitted_edges_find_the_steps() -> None:
    rng = np.random.default_rng(0)
    entropies = rng.uniform(0.0, 8.0, 4000)
    rank = np.floor(entropies) + rng.normal(0.0, 0.1, 4000)  # eight plateaus
    edges = fit_edges(entropies, rank)
    np.testing.assert_allclose(edges, np.arange(1.0, 8.0), atol=0.05)


@few
@given(st.integers(2, 200), st.integers(0, 2**32 - 1))
def test_fitted_edges_always_make_strata(num_samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = fit_edges(np.round(rng.exponential(size=num_samples), 1), rng.random(num_samples))
    assert len(edges) <= NUM_STRATA - 1
    assert all(b > a for a, b in zip(edges, edges[1:], strict=False))


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="strata: found 1 samples, allowed: at least 2"):
        fit_edges(np.array([1.0]), np.array([1.0]))
