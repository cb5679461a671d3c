# SPDX-License-Identifier: Apache-2.0
"""What the controller says of a step in which nothing is verified."""

from heterospec_vllm.controller import Controller
from heterospec_vllm.policies import PlainPolicy
from heterospec_vllm.policy import TreeShape


def test_a_plain_step_has_no_budget() -> None:
    controller = Controller(None, PlainPolicy(TreeShape(1, 1, 1)))  # type: ignore[arg-type] - nothing is drafted
    controller.counters.budget = 5  # of the step before
    assert controller.match({}, num_tokens=3, num_reqs=3) == {}
    assert controller.counters.budget == 0
    assert controller.match({"gone": [1, 2]}, num_tokens=5, num_reqs=3) == {}
    assert controller.counters.budget == 0 and controller.counters.dropped_drafts == 1
