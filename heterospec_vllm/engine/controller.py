# SPDX-License-Identifier: Apache-2.0
"""What lives between two steps, for any model runner: pending drafts, the policy, and what steps teach it.

A runner calls, in the order of a step: :meth:`Controller.match` (which scheduled drafts are verified),
:meth:`learn` (after the walk) and :meth:`draft` (the next trees).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import numpy as np

from heterospec_vllm.arrays import Ints
from heterospec_vllm.draft.base import Draft, Drafted, Drafter, StepOutput
from heterospec_vllm.engine.ledger import StepLedger, StepSize
from heterospec_vllm.engine.pending import MatchedDrafts, PendingDrafts
from heterospec_vllm.observe.alarm import AcceptanceAlarm
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.step_recorder import StepRecorder
from heterospec_vllm.policy.base import DraftPlan, DraftPolicy, Scope
from heterospec_vllm.policy.survival import NodeFeatures
from heterospec_vllm.replay.recorders import TraceRecorder
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.outcomes import outcomes
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import Walk


class Controller:
    """Asks the policy what is verified and drafted, the drafter for trees, and keeps them until the next step."""

    def __init__(self, drafter: Drafter, policy: DraftPolicy) -> None:
        self.drafter = drafter
        self.policy = policy
        self.recorder: TraceRecorder | None = None
        self.step_recorder: StepRecorder | None = None
        self._pending = PendingDrafts()
        self._ledger = StepLedger()
        self._alarm = AcceptanceAlarm()
        self._plan: DraftPlan | None = None  # of the latest draft
        self._num_verified = 0  # nodes of the current step
        self._context = 0.0  # tokens of context of all requests of the step before

    @property
    def counters(self) -> StepCounters:
        return self._ledger.counters

    def reset_counters(self) -> None:
        self._ledger.counters = StepCounters()

    def match(
        self,
        scheduled: dict[
            str, list[int]
        ],  # draft tokens by request, a prefix of what was handed over
        num_tokens: int,  # of the step, drafts included
        num_reqs: int,
    ) -> MatchedDrafts:
        """The drafts that the step verifies."""
        self._ledger.begin()
        others = num_tokens - sum(map(len, scheduled.values()))

        def keep(trees: DraftTrees) -> Ints:
            assert self._plan is not None
            return self._plan.keep(
                trees.survivals, trees.num_nodes, others, num_reqs, self._context
            )

        matched = self._pending.match(scheduled, keep)
        self._num_verified = self.counters.budget = matched.num_nodes
        self.counters.dropped_drafts += matched.num_dropped
        self._ledger.forward()
        return matched

    def sampling(self) -> AbstractContextManager[None]:
        """Around the walk: its time is counted apart from the forward pass."""
        return self._ledger.sampling()

    def learn(self, trees: DraftTrees, walked: Walk, kinds: Ints) -> None:
        """After the walk: verified nodes and whether each was reached. kinds: [num_reqs] of the requests."""
        self._alarm.walked(int((trees.num_nodes > 0).sum()), int(walked.num_accepted.sum()))
        self.counters.nothing_accepted = int(self._alarm.on)
        if self.step_recorder is not None:
            self.step_recorder.walked(trees, walked)
        if not self.policy.learns:
            return
        *features, accepted = outcomes(
            trees.log_probs,
            trees.depths,
            trees.strata,
            trees.num_nodes,
            walked.rows,
            kinds,
        )
        nodes = NodeFeatures(*features)
        if walked.stopped is not None and walked.stopped.any():
            # What lies behind a stop was not looked at.
            depths = np.where(walked.stopped, walked.num_emitted, trees.max_depth + 1)
            tested = nodes.depths < np.repeat(depths, trees.num_nodes)
            nodes, accepted = nodes[tested], accepted[tested]
        self.policy.observe_nodes(nodes, accepted)

    def end_step(self) -> None:
        """The step's tokens leave the engine before :meth:`draft` is called; their time is taken here."""
        self._ledger.tokens_left()

    def draft(
        self,
        step: StepOutput,
        num_step_tokens: int,  # drafts included
    ) -> list[list[int]]:
        """[num_reqs] node tokens of each request's next tree, best first; [] where nothing is drafted."""
        num_reqs, counters = len(step.req_ids), self.counters
        size = StepSize(num_step_tokens, self._num_verified, num_reqs, self._context)
        self._ledger.end_step(self.policy, size, num_emitted=len(step.tokens.token_ids))
        for req_id in step.req_ids:
            self._pending.remove(req_id)
        start = time.perf_counter()
        self._context = step.tokens.context
        # Requests whose prompts are still read will decode, too: a burst is judged by all of them.
        with CLOCK.span("policy"):
            scope = self.policy.scope(num_reqs, self._context)
        counters.expected_gain = self.policy.expected_gain
        counters.price_of_time = 0.0
        drafted = self.drafter.propose_trees(self.policy, scope, step)
        self._count(scope, drafted)
        drafts: list[list[int]] = [[] for _ in step.req_ids]
        if drafted.draft is not None:
            self._hand_over(step, drafted.draft, drafts)
        self._ledger.end_draft(
            scope,
            num_reqs,
            start,
            caught_up=drafted.reading.caught_up > 0,
            possible=drafted.reading.possible,
        )
        return drafts

    def _hand_over(self, step: StepOutput, draft: Draft, drafts: list[list[int]]) -> None:
        """Keeps the trees for the next step; fills the drafts of those who got one."""
        self._plan = draft.plan
        req_ids = [step.req_ids[place] for place in draft.places]
        if self.recorder is not None:
            self.recorder.record(req_ids, draft.pool, draft.tokens, draft.drafting)
        if self.step_recorder is not None:
            root = int(draft.tokens.next_token_ids[draft.drafting[0]])
            self.step_recorder.drafted(root, draft.pool, *draft.plan.prices(), draft.seconds)
        given = self._pending.put(req_ids, draft.trees)
        for place, tokens in zip(draft.places.tolist(), given, strict=True):
            drafts[place] = tokens

    def _count(self, scope: Scope, drafted: Drafted) -> None:
        counters, draft = self.counters, drafted.draft
        counters.probes += scope == "probe"
        counters.pauses += scope == "pause"
        counters.caught_up_tokens += drafted.reading.caught_up
        counters.late_contexts += drafted.reading.late_contexts
        counters.unread_requests += drafted.reading.unread
        counters.head_passes += drafted.head_passes
        if draft is not None:
            counters.draft_steps += 1
            counters.drafted_nodes += draft.num_candidates
            if draft.plan.choice is not None:
                counters.price_of_time = draft.plan.choice.rate

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
        self._pending.remove(req_id)
        self.drafter.remove(req_id)
