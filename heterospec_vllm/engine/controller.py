# SPDX-License-Identifier: Apache-2.0
"""What lives between two steps, for any model runner: drafts by request, the head's progress, the policy, learning.

A runner calls, in the order of a step: :meth:`Controller.match` (which scheduled drafts are verified),
:meth:`trees_for` (in the order of the batch), :meth:`learn` (after the walk) and :meth:`draft` (the next trees).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.draft.progress import HeadProgress
from heterospec_vllm.draft.tree_drafter import TreeDrafter
from heterospec_vllm.draft.true_tokens import TrueTokens
from heterospec_vllm.observe.counters import StepCounters
from heterospec_vllm.observe.step_recorder import StepRecorder
from heterospec_vllm.policy.base import Batch, Cycle, Demand, DraftPolicy, Scope
from heterospec_vllm.policy.cost import DECODE_TOKENS
from heterospec_vllm.policy.survival import NodeFeatures
from heterospec_vllm.replay.recorders import TraceRecorder
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.outcomes import outcomes
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import Walk

# A longer pause between two steps means that the engine was idle.
IDLE_SECONDS = 0.05


@dataclass(frozen=True)
class _Place:
    """A request's place in the batch of trees that was drafted together."""

    trees: DraftTrees
    req: int
    tokens: list[int]


@dataclass
class _Clock:
    """When the parts of the current step began, on the host's clock."""

    step: float = 0.0
    forward: float = 0.0
    end: float = 0.0  # of the step before


@dataclass(frozen=True)
class _LastDraft:
    """What the next step's cycle began with."""

    scope: Scope
    num_reqs: int
    seconds: float
    caught_up: bool  # tokens of earlier steps were in it
    possible: bool  # for some request


class Controller:
    """Owns what was drafted and decides, with the policy, what is verified and what is drafted next."""

    def __init__(self, proposer: TreeDrafter, policy: DraftPolicy) -> None:
        self.proposer = proposer
        self.policy = policy
        self.counters = StepCounters()
        self.progress: HeadProgress | None = None
        self.recorder: TraceRecorder | None = None
        self.step_recorder: StepRecorder | None = None
        self._places: dict[str, _Place] = {}
        self._verified = DraftTrees.empty(0)
        self._index: dict[str, int] = {}
        self._clock = _Clock()
        self._last_draft = _LastDraft("none", 0, 0.0, False, False)
        self._num_verified = 0  # nodes of the current step
        self._context = 0.0
        self._sample_seconds = 0.0  # of the current step

    # ---- which scheduled drafts are verified

    def match(
        self, scheduled: dict[str, list[int]], num_tokens: int, num_reqs: int
    ) -> dict[str, list[int]]:
        """The nodes verified for each request, in the order of their rows.

        scheduled: the drafts in vLLM's step, a prefix of what was handed over; what matches no tree (padding, resumed
        requests) is dropped. num_tokens: tokens of the step, drafts included.
        """
        now = time.perf_counter()
        self._clock.step = self._clock.forward = now
        self._index = {}
        self._num_verified = self.counters.budget = 0
        matched: list[tuple[str, _Place, int]] = []
        for req_id, token_ids in scheduled.items():
            place = self._places.get(req_id)
            if place is not None and place.tokens[: len(token_ids)] == token_ids:
                matched.append((req_id, place, len(token_ids)))
            else:
                self.counters.dropped_drafts += 1
        if not matched:
            return {}
        trees = _gathered(matched)
        others = num_tokens - sum(map(len, scheduled.values()))
        keep = self.policy.keep(trees.survivals, trees.num_nodes, others, num_reqs, self._context)
        self._num_verified = self.counters.budget = int(keep.sum())
        if (keep < trees.num_nodes).any():
            trees = trees.take(np.arange(trees.num_reqs), keep)
        trees = trees.laid_out()
        self._verified = trees
        verified = {}
        for row, ((req_id, _, _), count) in enumerate(zip(matched, keep.tolist(), strict=True)):
            if count:
                self._index[req_id] = row
                verified[req_id] = trees.tokens[row, :count].tolist()
        self._clock.forward = time.perf_counter()
        self.counters.seconds["policy"] += self._clock.forward - now
        return verified

    def trees_for(self, req_ids: list[str]) -> DraftTrees:
        """The verified trees in the order of the batch, empty where a request has none."""
        if [*self._index] == req_ids and len(req_ids) == self._verified.num_reqs:
            return self._verified
        rows = np.array([self._index.get(req_id, -1) for req_id in req_ids])
        counts = np.where(rows >= 0, self._verified.num_nodes[rows], 0)
        return self._verified.take(np.maximum(rows, 0), counts)

    # ---- what the step taught

    def learn(self, trees: DraftTrees | None, walked: Walk | None, temperatures: Ints) -> None:
        """After the walk: verified nodes and whether each was reached. temperatures: [num_reqs] 0 greedy, 1 sampled."""
        if trees is None or walked is None:
            return
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
            temperatures,
        )
        self.policy.observe_nodes(NodeFeatures(*features), accepted)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the walk: its time is counted apart from the forward pass."""
        start = time.perf_counter()
        yield
        self._sample_seconds = time.perf_counter() - start
        self.counters.seconds["sample"] += self._sample_seconds

    def _observe_step(self, num_tokens: int, num_reqs: int) -> float:
        """The target's step with all that happens between two drafts: seconds since the last one ended."""
        clock, now = self._clock, time.perf_counter()
        gap = clock.step - clock.end
        gap = gap if 0 <= gap < IDLE_SECONDS else 0.0
        seconds = now - clock.step + gap
        # A prompt's token has no logits and costs less than a drafted one, for which it must not be taken.
        if num_tokens - self._num_verified == num_reqs or num_tokens > DECODE_TOKENS:
            self.policy.observe_step(num_tokens, num_reqs, self._context, seconds)
        self.counters.seconds["target"] += now - clock.forward - self._sample_seconds
        self._sample_seconds = 0.0
        self.counters.seconds["rest"] += gap
        return seconds

    def _observe_cycle(
        self, step_seconds: float, num_tokens: int, num_reqs: int, emitted: int
    ) -> None:
        """Only where everybody decoded and what was drafted was the same for all: other cycles compare with nothing."""
        last = self._last_draft
        only_decodes = num_tokens - self._num_verified == num_reqs == last.num_reqs
        speculated = self.policy.drafts_for_all(last.scope, num_reqs)
        if not only_decodes or last.caught_up or (last.scope == "probe" and not speculated):
            return
        if speculated and not last.possible:  # plain steps, whatever was asked for
            return
        self.policy.observe_cycle(
            Cycle(
                speculated=speculated,
                num_reqs=num_reqs,
                context=self._context,
                num_tokens=emitted,
                seconds=last.seconds + step_seconds,
            )
        )

    # ---- the next drafts

    def draft(
        self,
        req_ids: list[str],
        tokens: TrueTokens,  # of the step, every request
        demand: Demand,
        temperatures: Ints,  # [num_reqs]
        num_step_tokens: int,
    ) -> list[list[int]]:
        """Node tokens of each request's next tree, best first; [] where nothing is drafted."""
        assert self.progress is not None
        step_seconds = self._observe_step(num_step_tokens, len(req_ids))
        emitted = len(tokens.token_ids)  # where everybody decodes
        self._observe_cycle(step_seconds, num_step_tokens, len(req_ids), emitted)
        for req_id in req_ids:
            self._places.pop(req_id, None)
        start = time.perf_counter()
        self.counters.price_of_time = 0.0
        self._context = tokens.context
        # Requests whose prompts are still read will decode, too: a burst is judged by all of them.
        with CLOCK.span("policy"):
            scope = self.policy.scope(len(req_ids), self._context)
            self.counters.expected_gain = self.policy.expected_gain
            worth = self._is_worth_reading(scope, req_ids, tokens, demand)
        reads = demand.followed & worth & (scope == "all")
        follow = demand.followed & self.progress.follow(req_ids, tokens, reads)
        worth &= follow
        limits = np.where(worth, demand.limits, 0)
        feed = self._feed(scope, req_ids, worth, limits)
        fed = self.progress.advance(req_ids, tokens, feed, follow)
        caught_up = 0
        if fed is not None and fed is not tokens:
            caught_up = int(np.maximum(0, fed.num_tokens - tokens.num_tokens[feed]).sum())
            self.counters.caught_up_tokens += caught_up
        if scope in ("none", "probe"):
            self.counters.seconds_off += start - self._clock.step
        self.counters.late_contexts += self.progress.num_late
        self.progress.num_late = 0
        self.counters.probes += scope == "probe"
        self.counters.pauses += scope == "pause"
        drafts: list[list[int]] = [[] for _ in req_ids]
        if fed is not None:
            self._propose(req_ids, fed, feed, limits, temperatures, drafts)
        self._clock.end = time.perf_counter()
        seconds = self._clock.end - start
        self._last_draft = _LastDraft(
            scope, len(req_ids), seconds, caught_up > 0, bool(limits.any())
        )
        self.counters.seconds["draft"] += seconds
        return drafts

    def _is_worth_reading(
        self, scope: Scope, req_ids: list[str], tokens: TrueTokens, demand: Demand
    ) -> Bools:
        """[num_reqs] which requests the head should know, as far as the policy drafts for all."""
        if scope != "all":
            return np.ones(len(req_ids), dtype=np.bool_)
        assert self.progress is not None
        unread = tokens.num_tokens + demand.prompt_left
        unread += np.array([self.progress.pending(req_id) for req_id in req_ids])
        worth = self.policy.is_worth_reading(
            unread, demand.tokens_left, len(req_ids), self._context
        )
        if not worth.all():
            self.counters.unread_requests += int((demand.followed & ~worth).sum())
        return worth

    def _feed(self, scope: Scope, req_ids: list[str], worth: Bools, limits: Ints) -> Bools:
        """[num_reqs] whose tokens the head processes now."""
        if scope == "all":
            return worth
        feed = np.zeros(len(req_ids), dtype=np.bool_)
        assert self.progress is not None
        if scope == "probe":
            behind = np.array([self.progress.pending(req_id) for req_id in req_ids])
            behind = np.where(limits > 0, behind, np.iinfo(np.int64).max)
            nearest = np.argsort(behind, kind="stable")[: self.policy.probe_requests]
            feed[nearest] = limits[nearest] > 0
        return feed

    def _propose(
        self, req_ids, fed: TrueTokens, feed, limits: Ints, temperatures: Ints, drafts
    ) -> None:
        places = np.flatnonzero(feed)
        drafting = np.flatnonzero(limits[places] > 0)
        chosen = places[drafting]
        batch = Batch(
            num_reqs=len(req_ids),
            context=self._context,
            temperatures=temperatures[chosen],
            limits=limits[chosen],
        )
        draft = self.proposer.propose_trees(self.policy, batch, drafting, fed)
        self.counters.head_passes += 1 if draft is None else 1 + draft.num_levels
        if draft is None:
            return
        self.counters.draft_steps += 1
        self.counters.drafted_nodes += draft.num_candidates
        if self.policy.choice is not None:
            self.counters.price_of_time = self.policy.choice.rate
        names = [req_ids[i] for i in chosen]
        if self.recorder is not None:
            self.recorder.record(names, draft.pool, fed, drafting)
        if self.step_recorder is not None:
            root = int(fed.next_token_ids[drafting[0]])
            prices = self.policy.prices(batch)
            self.step_recorder.drafted(root, draft.pool, *prices, draft.seconds)
        tokens = draft.trees.tokens.tolist()
        counts = draft.trees.num_nodes.tolist()
        for i, (name, place) in enumerate(zip(names, chosen.tolist(), strict=True)):
            if counts[i]:
                drafts[place] = tokens[i][: counts[i]]
                self._places[name] = _Place(draft.trees, i, drafts[place])

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
        self._places.pop(req_id, None)
        if self.progress is not None:
            self.progress.remove(req_id)


def _gathered(matched: list[tuple[str, _Place, int]]) -> DraftTrees:
    """The trees of requests that may have been drafted in different steps, each cut to what was scheduled."""
    sources: list[DraftTrees] = []
    for _, place, _ in matched:
        if not any(place.trees is source for source in sources):
            sources.append(place.trees)
    reqs = [place.req for _, place, _ in matched]
    counts = np.array([count for _, _, count in matched])
    if len(sources) == 1:
        (trees,) = sources
        if reqs == [*range(trees.num_reqs)] and (counts == trees.num_nodes).all():
            return trees  # most steps
        return trees.take(np.array(reqs), counts)
    first = np.cumsum([0, *(source.num_reqs for source in sources)]).tolist()
    offset = dict(zip(map(id, sources), first, strict=False))
    at = np.array([offset[id(place.trees)] + place.req for _, place, _ in matched])
    with CLOCK.span("gather trees"):
        return DraftTrees.concatenate(sources).take(at, counts)
