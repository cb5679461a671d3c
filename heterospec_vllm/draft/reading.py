# SPDX-License-Identifier: Apache-2.0
"""Which of a step's requests the head reads now, which are kept for later, and for whom it then drafts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.draft.base import Reading, StepOutput
from heterospec_vllm.draft.progress import HeadProgress
from heterospec_vllm.policy.base import DraftPolicy, Scope


@dataclass(frozen=True)
class Feed:
    """What the head gets after a step."""

    tokens: (
        AcceptedTokens | None
    )  # of the requests it reads, kept ones first; None: nothing is read
    places: Ints  # [num_read] those requests, among the step's
    limits: Ints  # [num_read] most nodes of each one's next tree, 0: no draft
    reading: Reading


class HeadReader:
    """Decides with the policy what the head reads; owns how far it has read."""

    def __init__(self, progress: HeadProgress) -> None:
        self.progress = progress

    def feed(self, policy: DraftPolicy, scope: Scope, step: StepOutput) -> Feed:
        """Meet the step's requests and take what the head reads of them now."""
        progress, tokens, demand = self.progress, step.tokens, step.demand
        worth = self._is_worth_reading(policy, scope, step)
        unread = int((demand.followed & ~worth).sum())
        read_now = demand.followed & worth & (scope == "all")
        followed = demand.followed & progress.follow(step.req_ids, tokens, read_now)
        worth &= followed
        limits = np.where(worth, demand.limits, 0)
        read = worth if scope == "all" else self._probed(policy, scope, step.req_ids, limits)
        fed = progress.advance(step.req_ids, tokens, read, followed)
        caught_up = 0
        if fed is not None and fed is not tokens:
            caught_up = int(np.maximum(0, fed.num_tokens - tokens.num_tokens[read]).sum())
        places = np.flatnonzero(read)
        reading = Reading(caught_up, progress.take_late(), unread, bool(limits.any()))
        return Feed(fed, places, limits[places], reading)

    def _is_worth_reading(self, policy: DraftPolicy, scope: Scope, step: StepOutput) -> Bools:
        """[num_reqs] which requests the head should know, as far as the policy drafts for all."""
        if scope != "all":
            return np.ones(len(step.req_ids), dtype=np.bool_)
        unread = step.tokens.num_tokens + step.demand.prompt_left + self._pending(step.req_ids)
        return policy.is_worth_reading(
            unread, step.demand.tokens_left, len(step.req_ids), step.tokens.context
        )

    def _probed(self, policy: DraftPolicy, scope: Scope, req_ids: list[str], limits: Ints) -> Bools:
        """[num_reqs] the few requests that a probe drafts for: those that have the least to catch up on."""
        read = np.zeros(len(req_ids), dtype=np.bool_)
        if scope == "probe":
            behind = np.where(limits > 0, self._pending(req_ids), np.iinfo(np.int64).max)
            nearest = np.argsort(behind, kind="stable")[: policy.probe_requests]
            read[nearest] = limits[nearest] > 0
        return read

    def _pending(self, req_ids: list[str]) -> Ints:
        return np.array([self.progress.pending(req_id) for req_id in req_ids])
