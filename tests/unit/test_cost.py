# SPDX-License-Identifier: Apache-2.0
"""Cost tables: reading them, learning from noisy steps, what can never happen to them."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heterospec_vllm.policy.cost import (
    DRIFT_RATE,
    ROW_KNOTS,
    TABLES,
    TOKEN_KNOTS,
    CostTable,
    StepCosts,
    table_from_samples,
)

few = settings(max_examples=60, deadline=None)
KNOTS = (1, 2, 4, 8, 16)


def table(trust: float = 4.0) -> CostTable:
    return CostTable(KNOTS, np.array([1.0, 1.5, 2.0, 4.0, 12.0]), trust)


def step_costs() -> StepCosts:
    def line(knots: tuple[int, ...], start: float, slope: float) -> CostTable:
        return CostTable(knots, start + slope * np.array(knots))

    return StepCosts(
        verify=line(TOKEN_KNOTS, 0.02, 0.001),
        first_pass=line(TOKEN_KNOTS, 0.003, 0.0001),
        level=line(ROW_KNOTS, 0.002, 0.0002),
        request_seconds=0.0005,
        context_seconds=0.000001,
    )


# ---- reading


def test_values_lie_on_the_lines_between_knots() -> None:
    counts = [0, 1, 1.5, 3, 6, 16, 20]
    assert table()(np.array(counts)).tolist() == [1.0, 1.0, 1.25, 1.75, 3.0, 12.0, 16.0]
    assert [table().at(count) for count in counts] == table()(np.array(counts)).tolist()
    assert table().slope(8, 4) == 1.0


def test_a_falling_table_is_made_to_rise() -> None:
    assert CostTable((1, 2, 3), np.array([2.0, 1.0, 3.0])).seconds.tolist() == [2.0, 2.0, 3.0]


# ---- learning


def check(costs: CostTable) -> None:
    assert np.isfinite(costs.seconds).all()
    assert (costs.seconds > 0).all()
    assert (np.diff(costs.seconds) >= 0).all()
    # The two ways to read it agree.
    np.testing.assert_allclose([costs.at(knot) for knot in costs.knots], costs(costs.knots))


seconds = st.one_of(
    st.floats(1e-6, 1e3),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-300, 1e300]),
)


@few
@given(
    st.lists(st.tuples(st.floats(0.0, 40.0), seconds), max_size=60),
    st.sampled_from([0.0, 4.0, 100.0]),
)
@example([(15.0, 1e-6)] * 40 + [(12.0, 1e-6)] * 40, 0.0)
@example([(2.5, 1e3)] * 30 + [(7.0, 1e-6)] * 30, 0.0)
def test_no_measurements_break_a_table(measured: list[tuple[float, float]], trust: float) -> None:
    """A free or unlimited step would switch speculation on or off for good."""
    costs = table(trust)
    for count, value in measured:
        costs.observe(count, value)
        check(costs)


def test_a_steep_table_stays_positive() -> None:
    costs = CostTable((1, 2, 4), np.array([0.001, 0.001, 1.0]))
    for _ in range(20):
        costs.observe(3, 1e-6)
        check(costs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_no_measurement_is_ignored(value: float) -> None:
    costs = table()
    costs.observe(4, value)
    assert costs.seconds.tolist() == table().seconds.tolist()
    costs.observe(4, 3.0)
    assert costs.seconds.tolist() != table().seconds.tolist()


@pytest.mark.parametrize("shape", ["line", "bend", "flat"])
def test_noisy_measurements_lead_to_the_true_curve(shape: str) -> None:
    true = {
        "line": lambda n: 0.02 + 0.001 * n,
        "bend": lambda n: 0.02 + 0.002 * np.maximum(n - 8.0, 0.0),
        "flat": lambda n: 0.02 + 0.0 * n,
    }[shape]
    rng = np.random.default_rng(1)
    costs = CostTable(TOKEN_KNOTS, np.full(len(TOKEN_KNOTS), 0.1))  # far off, and flat
    counts = rng.integers(1, 65, 6000)
    for count in counts:
        costs.observe(int(count), float(true(count) * rng.lognormal(0.0, 0.1)))
    seen = np.arange(1, 65)
    np.testing.assert_allclose(costs(seen), true(seen.astype(float)), rtol=0.06)


def test_a_machine_that_slows_down_is_followed() -> None:
    costs = table()
    for _ in range(500):
        costs.observe(8, 4.0)
    for _ in range(100):
        costs.observe(8, 6.0)
    assert costs.at(8) == pytest.approx(6.0, rel=0.05)


@few
@given(st.floats(1.0, 20.0), st.floats(1e-6, 1e6), st.integers(0, 60))
def test_one_outlier_moves_a_table_by_a_bounded_amount(
    count: float, outlier: float, before: int
) -> None:
    costs = table()
    for _ in range(before):
        costs.observe(count, costs.at(count))
    counts, expected = np.arange(1.0, 16.5, 0.5), costs.at(count)
    held = costs(counts)
    costs.observe(count, outlier)
    # A fresh table gives a measurement a fifth, one that has seen many a 25th; twice the expected
    # is the most that counts. 1.21: the most a knot moves for the point between it and the next.
    share = max(0.04, 1.0 / (1.0 + 4.0 + 0.5 * before)) if before else 0.2
    most = DRIFT_RATE * held + 1.21 * share * expected * (1 + DRIFT_RATE)
    assert (np.abs(costs(counts) - held) <= most + 1e-9).all()


def test_what_slows_everything_keeps_the_shape() -> None:
    """Only steps of 8 tokens are seen while the machine takes half as long again: 4 must not look cheap."""
    costs = table(trust=50.0)
    before = costs.at(4) / costs.at(8)
    for _ in range(300):
        costs.observe(8, 1.5 * table().at(8))
    assert costs.at(8) == pytest.approx(1.5 * table().at(8), rel=0.05)
    assert costs.at(4) / costs.at(8) == pytest.approx(before, rel=0.2)


def test_a_long_prefill_teaches_no_more_than_its_share() -> None:
    """Beyond the last knot the line is a guess; its error in seconds may exceed all that the knot holds."""
    costs = table()
    costs.observe(2000, 1.0)  # the line says 1996
    assert costs.seconds.tolist() == [1.0, 1.5, 2.0, 4.0, pytest.approx(12.0 * (1 - 0.5 * 0.2))]
    costs = table()
    for _ in range(300):
        costs.observe(200, 300.0)
    assert costs.at(200) == pytest.approx(300.0, rel=0.02)


def test_trusted_values_move_less() -> None:
    fresh, trusted = table(trust=1.0), table(trust=20.0)
    fresh.observe(8, 5.0)
    trusted.observe(8, 5.0)
    assert 4.0 < trusted.at(8) < fresh.at(8) <= 5.0


def test_neighbours_give_way_to_what_was_seen() -> None:
    costs = CostTable(KNOTS, np.full(5, 2.0), trust=0.0)
    costs.observe(4, 3.0)
    held = 2.0 * (1 + DRIFT_RATE * 0.5)  # all follow the surprise a little
    assert costs.seconds.tolist() == pytest.approx([held, held, 3.0, 3.0, 3.0])
    costs = CostTable(KNOTS, np.full(5, 2.0), trust=0.0)
    costs.observe(4, 1.5)
    held = 2.0 * (1 - DRIFT_RATE * 0.25)
    assert costs.seconds.tolist() == pytest.approx([1.5, 1.5, 1.5, held, held])


# ---- a step, and the file


def test_a_step_costs_its_tokens_requests_and_context() -> None:
    costs = step_costs()
    # 10 rows on 3 requests of 1000 tokens of context together: each row sees its own request's
    assert costs.step(10, 3, 1000.0) == pytest.approx(0.03 + 0.0015 + 0.001 * 10 / 3)
    np.testing.assert_allclose(
        costs.cycles(3, 9, 3, 1000.0, 0.004), 0.004 + costs.steps(np.arange(3, 13), 3, 1000.0)
    )
    found = costs.steps(np.array([3, 10]), 3, 1000.0)
    plain = costs.verify.at(3) + 0.0015 + 0.001
    np.testing.assert_allclose(found, [plain, 0.0315 + 0.001 * 10 / 3])
    plain = step_costs()
    costs.observe_step(8, 3, 1000.0, 0.05)
    plain.verify.observe(8, 0.05 - 0.0015 - 0.001 * 8 / 3)
    assert costs.verify.seconds.tolist() == plain.verify.seconds.tolist()


def test_costs_survive_the_file() -> None:
    costs = step_costs()
    costs.observe_step(8, 3, 1000.0, 0.0612345678)
    again = StepCosts.from_dict(json.loads(json.dumps(costs.as_dict())))
    for name in TABLES:
        before, after = getattr(costs, name), getattr(again, name)
        assert after.knots.tolist() == before.knots.tolist()
        np.testing.assert_allclose(after.seconds, before.seconds, atol=1e-7)
    assert again.request_seconds == costs.request_seconds
    assert again.context_seconds == costs.context_seconds
    assert again.as_dict() == costs.as_dict()


# ---- from samples


def test_samples_become_their_medians() -> None:
    counts = np.array([2, 2, 2, 8, 8, 8])
    costs = table_from_samples(KNOTS, counts, np.array([1.0, 1.1, 99.0, 4.0, 4.1, 4.2]))
    np.testing.assert_allclose(costs.seconds, [1.1, 1.1, 2.1, 4.1, 8.1])


def test_samples_that_fall_are_pooled_by_their_number() -> None:
    counts, seconds = np.array([1, 4, 4, 4, 16]), np.array([2.0, 1.0, 1.0, 1.0, 3.0])
    costs = table_from_samples(KNOTS, counts, seconds)
    check(costs)
    assert (costs.at(1), costs.at(4), costs.at(16)) == (1.25, 1.25, 3.0)


@few
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(1e-4, 10.0)), min_size=1, max_size=20))
def test_any_samples_make_a_table(samples: list[tuple[int, float]]) -> None:
    counts, seconds = (np.array(column) for column in zip(*samples, strict=True))
    costs = table_from_samples(KNOTS, counts, seconds)
    check(costs)
    # Between knots a steep pair of samples is continued to the next knot, so there is no upper bound.
    assert costs.at(counts.min()) >= seconds.min() - 1e-9


def test_one_count_alone_is_flat() -> None:
    costs = table_from_samples(KNOTS, np.array([4, 4]), np.array([1.0, 3.0]))
    assert costs.seconds.tolist() == [2.0] * 5
