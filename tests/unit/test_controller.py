# SPDX-License-Identifier: Apache-2.0
"""What the controller says of steps in which nothing is verified, and what it tells the policy of them."""

import numpy as np
import torch

from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.draft.base import Drafted, StepOutput
from heterospec_vllm.draft.progress import HeadProgress
from heterospec_vllm.draft.reading import HeadReader
from heterospec_vllm.engine.controller import Controller
from heterospec_vllm.policy.base import Cycle, Demand, PlainPolicy
from heterospec_vllm.policy.decisions import TreeShape


def test_a_plain_step_has_no_budget() -> None:
    controller = Controller(None, PlainPolicy(TreeShape(1, 1, 1)))  # type: ignore[arg-type] - nothing is drafted
    controller.counters.budget = 5  # of the step before
    assert controller.match({}, num_tokens=3, num_reqs=3).tokens == {}
    assert controller.counters.budget == 0
    assert controller.match({"gone": [1, 2]}, num_tokens=5, num_reqs=3).tokens == {}
    assert controller.counters.budget == 0 and controller.counters.dropped_drafts == 1


class Heard(PlainPolicy):
    """Asks for drafts for everybody and notes which cycles it is told of."""

    def __init__(self) -> None:
        super().__init__(TreeShape(1, 1, 1))
        self.cycles: list[Cycle] = []
        self.expected_gain = 1.5

    def scope(self, num_reqs, context):
        return "all"

    def observe_cycle(self, cycle: Cycle) -> None:
        self.cycles.append(cycle)


def draft_for_one(controller: Controller, first: int, count: int, demand: Demand) -> None:
    """The end of a step over some tokens of one request."""
    tokens = AcceptedTokens(
        token_ids=torch.full((count,), 5),
        positions=torch.arange(first, first + count),
        features=torch.zeros(count, 3),
        num_tokens=np.array([count]),
        next_token_ids=torch.tensor([6], dtype=torch.int32),
        block_table=torch.ones(1, 1, dtype=torch.int32),
        context_starts=np.zeros(1, dtype=np.int64),
    )
    step = StepOutput(["r1"], tokens, demand, np.zeros(1, dtype=np.int64))
    controller.draft(step, num_step_tokens=count)


class ReadsOnly:
    """A drafter that reads and never drafts; notes the positions of what it read and for how many it could draft."""

    def __init__(self) -> None:
        self.fed: list[tuple[list[int], int]] = []
        self._reader = HeadReader(HeadProgress(num_blocks=8, block_size=16))

    def propose_trees(self, policy, scope, step) -> Drafted:
        feed = self._reader.feed(policy, scope, step)
        if feed.tokens is not None:
            self.fed.append((feed.tokens.positions.tolist(), int((feed.limits > 0).sum())))
        return Drafted(feed.reading)


def test_steps_in_which_nobody_could_be_drafted_for_say_nothing_of_drafts() -> None:
    """A phase of grammars alone would pass for speculation that earns nothing."""
    policy = Heard()
    controller = Controller(ReadsOnly(), policy)  # type: ignore[arg-type]
    for position, limit in enumerate((0, 0, 3, 3, 0)):
        controller.match({}, num_tokens=1, num_reqs=1)
        demand = Demand(np.array([True]), np.array([limit]), np.array([9]), np.array([0]))
        draft_for_one(controller, position, 1, demand)
    assert controller.counters.expected_gain == policy.expected_gain
    # The draft before a step decides: those behind the third and the fourth.
    assert [cycle.speculated for cycle in policy.cycles] == [True, True]


class Reads(Heard):
    """Reads a request while it has many tokens left."""

    def is_worth_reading(self, num_unread, tokens_left, num_reqs, context):
        self.unread = num_unread.tolist()
        return tokens_left > 9


def test_an_unread_request_is_kept_and_read_when_it_is_worth_it() -> None:
    policy, drafter = Reads(), ReadsOnly()
    controller = Controller(drafter, policy)  # type: ignore[arg-type]
    unread = []
    # A prompt of 5 tokens in two parts, then a token a step.
    for first, count, prompt_left, tokens_left in [
        (0, 3, 2, 9), (3, 2, 0, 9), (5, 1, 0, 8), (6, 1, 0, 99), (7, 1, 0, 98)
    ]:  # fmt: skip
        controller.match({}, num_tokens=count, num_reqs=1)
        demand = Demand(
            np.array([True]), np.array([3]), np.array([tokens_left]), np.array([prompt_left])
        )
        draft_for_one(controller, first, count, demand)
        unread.append(policy.unread)
    assert unread == [[5], [5], [6], [7], [1]]
    assert drafter.fed == [([0, 1, 2, 3, 4, 5, 6], 1), ([7], 1)]
    assert controller.counters.unread_requests == 3 and controller.counters.caught_up_tokens == 6
    # Nothing was drafted behind the steps that left it unread, so they are no measure of drafts.
    assert [cycle.speculated for cycle in policy.cycles] == []
