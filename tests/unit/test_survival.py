# SPDX-License-Identifier: Apache-2.0
"""Survival tables: what they say before they have seen anything, and how they learn."""

import numpy as np
import pytest
from draft_stream import stream, tempered
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from heterospec_vllm.policy.survival import (
    KNOTS,
    PROFILE_SHAPE,
    TABLE_DEPTH,
    NodeFeatures,
    SurvivalTables,
    along_paths,
    default_prior,
    log_loss,
    monotone,
)

few = settings(max_examples=60, deadline=None)


def nodes(log_probs, depth=1, stratum=0, kind=0) -> NodeFeatures:
    log_probs = np.asarray(log_probs, dtype=np.float32)
    full = [np.full(log_probs.shape, value) for value in (depth, stratum, kind)]
    return NodeFeatures(log_probs, *full)


def profile_table() -> np.ndarray:
    """Any table that rises along the path probability and tells depths, strata and kinds apart."""
    rate = np.exp(0.7 * KNOTS)[None, None, None, :]
    depth = 0.9 ** np.arange(PROFILE_SHAPE[1])[None, :, None, None]
    stratum = (1.0 - 0.05 * np.arange(PROFILE_SHAPE[2]))[None, None, :, None]
    return 0.9 * rate * depth * stratum * np.array([1.0, 0.8])[:, None, None, None]


# ---- reading


def test_values_lie_on_the_lines_between_knots() -> None:
    prior = profile_table()
    tables = SurvivalTables(prior=prior)
    for kind, depth, stratum in ((0, 1, 0), (1, 3, 5), (0, 8, 7)):
        cell = prior[kind, depth - 1, stratum]
        found = tables.predict(nodes(KNOTS, depth, stratum, kind))
        np.testing.assert_allclose(found, cell, atol=1e-6)
        between = nodes(0.25 * KNOTS[:-1] + 0.75 * KNOTS[1:], depth, stratum, kind)
        expected = 0.25 * cell[:-1] + 0.75 * cell[1:]
        np.testing.assert_allclose(tables.predict(between), expected, atol=1e-6)


def test_the_ends_of_the_table_hold_beyond() -> None:
    tables = SurvivalTables(prior=profile_table())
    low, high = tables.predict(nodes([KNOTS[0], 0.0]))
    beyond = tables.predict(nodes([-50.0, -np.inf, np.nan, 0.1]))
    assert beyond.tolist() == [low, low, low, high]
    deep = tables.predict(nodes([-1.0], depth=TABLE_DEPTH + 3))
    assert deep == tables.predict(nodes([-1.0], depth=TABLE_DEPTH))


def test_any_shape_is_predicted() -> None:
    tables = SurvivalTables()
    grid = nodes(-np.arange(6.0).reshape(2, 3), depth=2)
    found = tables.predict(grid)
    assert found.shape == (2, 3)
    assert found[1, 2] == tables.predict(grid[1, 2:])[0]


def test_the_default_is_the_lowered_path_probability() -> None:
    tables = SurvivalTables()
    for depth in (1, 4):
        found = tables.predict(nodes(KNOTS[3:-1], depth))
        np.testing.assert_allclose(found, np.exp(KNOTS[3:-1]) * 0.9**depth, atol=1e-6)
    assert (default_prior()[:, 1:] <= default_prior()[:, :-1]).all()


def test_a_profile_is_believed_until_something_was_seen() -> None:
    prior = profile_table()
    tables = SurvivalTables(prior=prior)
    tables.refresh()
    for kinds in tables.estimate.reshape(-1, *PROFILE_SHAPE):  # ordinary requests, then the others
        np.testing.assert_allclose(kinds, prior, atol=1e-9)
    tables.observe(nodes([]), np.zeros(0))
    assert np.isfinite(tables.estimate).all()


# ---- order


@few
@given(
    st.lists(
        st.tuples(
            st.floats(-12.0, 0.0), st.integers(1, 10), st.integers(0, 7), st.integers(0, 1),
            st.booleans(),
        ),
        max_size=300,
    ),
    st.integers(1, 300),
)  # fmt: skip
def test_likelier_paths_never_survive_less(seen: list[tuple], times: int) -> None:
    tables = SurvivalTables()
    if seen:
        *features, accepted = (np.array(column) for column in zip(*seen, strict=True))
        for _ in range(times // len(seen) + 1):
            tables.observe(NodeFeatures(*features), accepted.astype(np.float32))
    tables.refresh()
    assert ((tables.estimate > 0) & (tables.estimate < 1)).all()
    line = np.linspace(-10.0, 0.0, 60)
    for depth, stratum, kind in {(s[1], s[2], s[3]) for s in seen} | {(1, 0, 0)}:
        found = tables.predict(nodes(line, depth, stratum, kind))
        assert (np.diff(found) >= -1e-7).all()


@few
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0.1, 1000.0)), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_monotone_is_isotonic_regression(rows: list[list[tuple[float, float]]]) -> None:
    table, weights = np.moveaxis(np.array(rows), -1, 0)
    found = monotone(table, weights)
    for row, weight, got in zip(table, weights, found, strict=True):
        expected = isotonic_regression(row, weights=weight).x
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_what_was_never_seen_gives_way() -> None:
    """Else a head that is always sure and always wrong would be believed for ever."""
    tables = SurvivalTables()
    for _ in range(4):
        tables.observe(nodes([-0.05] * 200), np.zeros(200))
    tables.refresh()
    assert tables.predict(nodes([-0.05]))[0] < 0.1


def test_children_survive_no_more_often_than_parents() -> None:
    survivals, parents = np.array([[0.9, 0.2, 0.0]]), np.array([[0.5, 0.5, 1.0]])
    assert along_paths(survivals, parents).tolist() == [[0.5, 0.2, 0.0]]


# ---- learning


def true_rate(found: NodeFeatures) -> np.ndarray:
    rate = 0.95 * np.exp(0.8 * found.log_probs) * 0.85 ** (found.depths - 1)
    return rate * (1.0 - 0.06 * found.strata) * np.where(found.kinds == 1, 0.7, 1.0)


def random_nodes(rng: np.random.Generator, count: int) -> NodeFeatures:
    return NodeFeatures(
        -rng.exponential(1.5, count).astype(np.float32),
        rng.integers(1, 5, count),
        rng.integers(0, 8, count),
        rng.integers(0, 2, count),
    )


def test_learning_converges_to_the_true_rates() -> None:
    rng = np.random.default_rng(2)
    tables = SurvivalTables()
    for _ in range(300):
        seen = random_nodes(rng, 1000)
        tables.observe(seen, (rng.random(1000) < true_rate(seen)).astype(np.float32))
    tables.refresh()
    new = random_nodes(rng, 4000)
    error = np.abs(tables.predict(new) - true_rate(new))
    assert error.mean() < 0.015
    assert np.quantile(error, 0.99) < 0.06


# Every path probability, so that order along it takes nothing back.
SPREAD = np.linspace(-6.0, 0.0, 600)


def test_rates_that_change_are_followed() -> None:
    """With the default memory; without forgetting the old outcomes would go on counting as much as the new."""
    rng = np.random.default_rng(3)
    tables, elephant = SurvivalTables(), SurvivalTables(memory=1e9)
    for rate in (1.0, 0.2):
        for _ in range(200):
            accepted = (rng.random(SPREAD.size) < rate * np.exp(SPREAD)).astype(np.float32)
            for learner in (tables, elephant):
                learner.observe(nodes(SPREAD), accepted)
    ratio = [float(found.predict(nodes([-1.2]))[0] / np.exp(-1.2)) for found in (tables, elephant)]
    assert ratio == pytest.approx([0.27, 0.6], abs=0.05)


def test_a_cell_never_seen_moves_with_the_bias_of_its_depth() -> None:
    def survival(depth: int, stratum: int, kind: int = 0) -> float:
        return float(tables.predict(nodes([-0.3], depth, stratum, kind))[0])

    tables = SurvivalTables()
    before = {depth: survival(depth, 6) for depth in (2, 3)}
    for _ in range(5):
        tables.observe(nodes(SPREAD, depth=2, stratum=0), np.zeros(SPREAD.size))
    tables.refresh()
    assert survival(2, 0) < 0.05
    assert survival(2, 6) < 0.4 * before[2], "another stratum of the depth that was seen"
    assert survival(2, 6) < survival(3, 6) < before[3], "another depth follows, less"
    # Greedy outcomes say nothing of samples.
    assert survival(2, 6, 1) == pytest.approx(before[2], abs=1e-6)


def test_a_few_outcomes_move_little_and_many_move_all() -> None:
    def after(count: int) -> float:
        tables = SurvivalTables(prior=np.full(PROFILE_SHAPE, 0.5))
        tables.observe(nodes([0.0] * count), np.ones(count))
        tables.refresh()
        return float(tables.predict(nodes([0.0]))[0])

    found = [after(count) for count in (0, 1, 10, 100, 1000)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.5) and found[1] < 0.6 and found[-1] > 0.95


def test_the_estimate_is_refreshed_by_itself() -> None:
    tables = SurvivalTables(refresh_every=8)
    before = tables.estimate.copy()
    tables.observe(nodes([-0.3] * 7), np.ones(7))
    assert (tables.estimate == before).all()
    tables.observe(nodes([-0.3]), np.ones(1))
    assert (tables.estimate != before).any()


# ---- how well, how soon

HEADS = {
    "calibrated": tempered(1.0, 1.0),
    "overconfident": tempered(0.8, 0.9),
    "worse with depth": tempered(0.9, 0.97, by_depth=0.06),
    "underconfident": tempered(1.3, 0.95),
    "worse where uncertain": tempered(1.0, 0.97, by_stratum=0.05),
}


def expected_loss(found: np.ndarray, survivals: np.ndarray) -> float:
    """The mean log-loss over all outcomes that could have been, so that the test draws no noise."""
    return float(-(survivals * np.log(found) + (1 - survivals) * np.log1p(-found)).mean())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(3))
def test_200_steps_bring_the_loss_within_5_percent_of_the_truth(head: str, seed: int) -> None:
    """From the default prior; the truth is each node's own probability, which no table can know."""
    tables = SurvivalTables()
    seen, accepted, _ = stream(HEADS[head], 200, seed)
    for step in range(0, accepted.size, 6):
        tables.observe(seen[step : step + 6], accepted[step : step + 6])
    new, _, survivals = stream(HEADS[head], 500, seed + 100)
    loss = expected_loss(tables.predict(new).astype(np.float64), survivals)
    truth = expected_loss(np.clip(survivals, 1e-6, 1 - 1e-6), survivals)
    assert truth < loss < 1.05 * truth


def test_a_poor_head_is_found_out_in_200_steps() -> None:
    """The default's loss is a fifth above the truth; most of it must go."""
    poor = tempered(0.6, 0.7)
    seen, accepted, _ = stream(poor, 200, 0)
    new, _, survivals = stream(poor, 500, 100)
    tables = SurvivalTables()
    truth = expected_loss(np.clip(survivals, 1e-6, 1 - 1e-6), survivals)
    before = expected_loss(tables.predict(new).astype(np.float64), survivals) / truth
    for step in range(0, accepted.size, 6):
        tables.observe(seen[step : step + 6], accepted[step : step + 6])
    after = expected_loss(tables.predict(new).astype(np.float64), survivals) / truth
    assert before > 1.15
    assert after - 1 < 0.4 * (before - 1)


def test_log_loss_by_hand() -> None:
    found = log_loss(np.array([0.5, 0.8]), np.array([1.0, 0.0]))
    assert found == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    assert np.isfinite(log_loss(np.array([0.0, 1.0]), np.array([1.0, 0.0])))
    tables = SurvivalTables()
    seen = nodes([-0.3, -1.2])
    assert tables.log_loss(seen, np.ones(2)) == log_loss(tables.predict(seen), np.ones(2))
