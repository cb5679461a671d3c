# SPDX-License-Identifier: Apache-2.0
"""Whether the head's reading a prompt is worth what it costs."""

import numpy as np
import pytest
from fake_drafter import step_costs

from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.policy.marginal import MarginalPolicy

SHAPE = TreeShape(num_nodes=16, max_depth=6, top_k=4)


def reader(gain: float) -> tuple[MarginalPolicy, float]:
    """A policy in a batch of 16, and the seconds that it decodes a token in."""
    policy = MarginalPolicy(SHAPE, step_costs())
    policy.gain = lambda num_reqs, context: gain  # type: ignore[method-assign]
    policy.scope(16, 0.0)
    return policy, policy.costs.plain_step(16, 0.0) / 16


def test_reading_is_weighed_against_what_drafts_could_save() -> None:
    policy, token = reader(1.25)
    unread, left = np.array([10**6, 1000, 1000, 16]), np.array([1, 99, 101, 0])

    def worth() -> list[bool]:
        return policy.is_worth_reading(unread, left, 16, 0.0).tolist()

    assert all(worth()), "what reading costs is not known yet"
    policy.observe_reading(128, 1, 1.0)
    assert all(worth()), "a few tokens do not tell"
    # A gain of 1.25 saves 20 of 100 tokens' time, which is what a thousand tokens take to read.
    usual = policy.costs.first_pass.at(2)
    policy.observe_reading(1002, 2, usual + 20 * token)
    assert worth() == [False, False, True, True]
    policy.observe_reading(502, 2, usual + 5 * token)
    assert worth() == [False, True, True, True]


def test_the_gain_that_decides_is_corrected_by_measurements() -> None:
    policy, _ = reader(1.25)
    assert policy.expected_gain == 1.25
    policy.switch._size(16).error = -0.1
    policy.scope(16, 0.0)
    assert policy.expected_gain == pytest.approx(1.25 * np.exp(-0.1))


def test_one_slow_reading_does_not_stop_it_for_ever() -> None:
    policy, token = reader(1.25)
    unread, left = np.array([1000]), np.array([1000])
    policy.observe_reading(1001, 1, 1e4 * token)  # something was compiled
    waited = 0
    while not policy.is_worth_reading(unread, left, 16, 0.0).all():
        waited += 1
        assert waited < 500
    assert waited > 100
    policy.observe_reading(1001, 1, policy.costs.first_pass.at(1) + 20 * token)
    assert all(policy.is_worth_reading(unread, left, 16, 0.0).all() for _ in range(100))
