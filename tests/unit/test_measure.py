# SPDX-License-Identifier: Apache-2.0
"""Costs measured at start-up: which sizes are tried, and what the table makes of them."""

import pytest

from heterospec_vllm.policy.cost import TOKEN_KNOTS, table_from_samples
from heterospec_vllm.runners import measure


class Clock:
    """A machine on which a token takes as long as it is told to."""

    def __init__(self, seconds_per_token: float) -> None:
        self.now, self.seconds_per_token = 0.0, seconds_per_token
        self.sizes: list[int] = []

    def run(self, num_tokens: int) -> None:
        self.now += num_tokens * self.seconds_per_token
        self.sizes.append(num_tokens)


def sizes_and_seconds(monkeypatch: pytest.MonkeyPatch, clock: Clock, most: int = 1000):
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return measure._measure(clock.run, measure.TOKENS, most)


def test_a_fast_machine_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, seconds = sizes_and_seconds(monkeypatch, Clock(1e-4))
    assert tuple(sizes) == measure.ROUNDS * measure.TOKENS
    assert seconds == pytest.approx(sizes * 1e-4)


def test_a_slow_machine_is_not_kept_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger sizes continue the line of those that were measured."""
    clock = Clock(0.04)
    sizes, seconds = sizes_and_seconds(monkeypatch, clock)
    tried = tuple(dict.fromkeys(sizes.tolist()))
    assert tried == measure.TOKENS[: len(tried)] and 256 not in tried
    assert clock.now < 6
    assert table_from_samples(TOKEN_KNOTS, sizes, seconds).at(256) == pytest.approx(256 * 0.04)


def test_the_least_sizes_are_measured_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, _ = sizes_and_seconds(monkeypatch, Clock(10.0))
    assert tuple(sizes) == measure.LEAST_ROUNDS * measure.TOKENS[: measure.LEAST_SIZES]


def test_a_machine_that_slows_down_does_not_change_what_a_token_costs_relative_to_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half as fast from the middle on: one size after another would say that the larger ones are twice as dear."""
    clock = Clock(1e-3)
    plain_run = clock.run

    def run(num_tokens: int) -> None:
        clock.seconds_per_token = 1e-3 if clock.now < 0.9 else 2e-3
        plain_run(num_tokens)

    monkeypatch.setattr(clock, "run", run)
    sizes, seconds = sizes_and_seconds(monkeypatch, clock)
    table = table_from_samples(TOKEN_KNOTS, sizes, seconds)
    assert table.at(64) / table.at(1) == pytest.approx(64, rel=0.01)


@pytest.mark.parametrize(("most", "expected"), [(8, (1, 4, 8)), (7, (1, 4)), (1, (1,))])
def test_no_size_above_what_fits(monkeypatch: pytest.MonkeyPatch, most: int, expected) -> None:
    sizes, _ = sizes_and_seconds(monkeypatch, Clock(1e-4), most)
    assert tuple(sizes) == measure.ROUNDS * expected
