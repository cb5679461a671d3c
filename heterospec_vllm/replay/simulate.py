# SPDX-License-Identifier: Apache-2.0
"""Replays a trace under a policy: the same policy objects as in the engine, costs from tables instead of a clock.

A trace has a draft at every position of every answer and the target's tokens are known, so what a policy would have
drafted, verified and got accepted is exact. Requests run in lockstep batches. The oracle knows in hindsight, at every
step of every batch, at which level to stop drafting and how many of the best nodes to verify.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.draft.growth import Frontier, grow
from heterospec_vllm.policy.base import Batch, Cycle, DraftPolicy, Scope
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.marginal import MarginalPolicy
from heterospec_vllm.policy.survival import NodeFeatures
from heterospec_vllm.replay.trace import Trace
from heterospec_vllm.tree.pool import CandidatePool

NOTHING_PAYS = 1e12  # tokens per second: no draft earns so much


@dataclass
class Replayed:
    """What a replay added up to."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    nodes: int = 0
    levels: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Replay:
    """A trace prepared for replays: levels, and which candidates the target's answer went through."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        depths = trace.depths
        present = trace.log_probs > -np.inf
        # Every draft was expanded alike, so a column has one depth.
        self.depths = np.where(present, depths, 0).max(axis=0)
        self.max_depth = int(self.depths.max(initial=1))
        self.top_k = int((self.depths == 1).sum())
        self.accepted = trace.accepted()
        self._row = {
            (int(r), int(p)): i
            for i, (r, p) in enumerate(zip(trace.request, trace.position, strict=True))
        }
        lengths = np.diff(trace.text_start)
        # The root of the first draft is the first answer token; the last token needs no draft.
        self.first = trace.answer_start.astype(np.int64)
        self.last = lengths - 1

    @property
    def num_requests(self) -> int:
        return self.first.size

    def rows(self, requests: Ints, positions: Ints) -> Ints:
        """[num_reqs] the draft of each request at a position, -1 where none was recorded."""
        pairs = zip(requests.tolist(), positions.tolist(), strict=True)
        return np.array([self._row.get(pair, -1) for pair in pairs])

    def columns(self, depth: int) -> slice:
        at = np.flatnonzero(self.depths == depth)
        return slice(int(at[0]), int(at[-1]) + 1)


def replay(
    recorded: Replay,
    make: Callable[[], DraftPolicy],
    costs: StepCosts,
    batch_size: int,
    *,
    max_requests: int | None = None,
) -> Replayed:
    """Decode every request of the trace in batches of ``batch_size`` under one policy."""
    policy = make()
    outcome = Replayed()
    total = recorded.num_requests if max_requests is None else max_requests
    for start in range(0, total, batch_size):
        requests = np.arange(start, min(start + batch_size, total))
        _replay_batch(recorded, policy, costs, requests, outcome)
    return outcome


def _replay_batch(
    recorded: Replay, policy: DraftPolicy, costs: StepCosts, requests: Ints, outcome: Replayed
) -> None:
    positions = recorded.first[requests].copy()
    while True:
        live = positions < recorded.last[requests]
        requests, positions = requests[live], positions[live]
        if not requests.size:
            return
        num_reqs, context = requests.size, float(positions.sum())
        accepted = np.zeros(num_reqs, dtype=np.int64)
        seconds, nodes = 0.0, 0
        scope = policy.scope(num_reqs, context)
        if scope in ("all", "probe"):
            drafted = _draft(recorded, policy, scope, costs, requests, positions, context)
            accepted, nodes, seconds = drafted.accepted, drafted.nodes, drafted.seconds
            outcome.levels += drafted.levels
        step = costs.step(num_reqs + nodes, num_reqs, context)
        policy.observe_step(num_reqs + nodes, num_reqs, context, step)
        left = recorded.last[requests] - positions
        advanced = np.minimum(accepted + 1, left)
        positions = positions + advanced
        speculated = policy.drafts_for_all(scope, num_reqs)
        if speculated or scope != "probe":
            policy.observe_cycle(
                Cycle(speculated, num_reqs, context, int(advanced.sum()), step + seconds)
            )
        outcome.tokens += int(advanced.sum())
        outcome.seconds += step + seconds
        outcome.steps += 1
        outcome.nodes += nodes


@dataclass
class _Drafted:
    accepted: Ints  # [num_reqs]
    nodes: int
    seconds: float
    levels: int


def _draft(
    recorded: Replay,
    policy: DraftPolicy,
    scope: Scope,
    costs: StepCosts,
    requests: Ints,
    positions: Ints,
    context: float,
) -> _Drafted:
    rows = recorded.rows(requests, positions)
    num_reqs = requests.size
    batch = Batch(
        num_reqs=num_reqs,
        context=context,
        kinds=recorded.trace.sampled[requests].astype(np.int64),
        limits=np.where(rows >= 0, policy.shape.num_nodes * 2, 0),
    )
    plan = policy.plan(batch, scope)
    head = RecordedHead(recorded, rows)
    ledger = _PricedLevels(policy, costs, num_reqs)
    growth = grow(policy, plan, head, ledger)
    ranked = growth.pool.ranked(64)
    num_nodes = plan.propose(ranked.survivals, ledger.seconds)
    num_nodes = plan.keep(ranked.survivals, num_nodes, num_reqs, num_reqs, context)
    chosen = np.arange(ranked.columns.shape[1]) < num_nodes[:, None]
    truth = np.take_along_axis(head.accepted(), ranked.columns, axis=1)
    hit = truth & chosen
    if policy.learns:
        _teach(policy, batch, growth.pool, head.depths(), ranked.columns, chosen, hit)
    return _Drafted(hit.sum(axis=1), int(num_nodes.sum()), ledger.seconds, len(growth.rows))


def _teach(
    policy: DraftPolicy,
    batch: Batch,
    pool: CandidatePool,
    depths: Ints,  # [pool_size]
    order: Ints,  # [num_reqs, width] columns, best first
    chosen: Bools,  # [num_reqs, width]
    hit: Bools,  # [num_reqs, width]
) -> None:
    reqs, places = np.nonzero(chosen)
    columns = order[reqs, places]
    policy.observe_nodes(
        NodeFeatures(
            log_probs=pool.log_probs[reqs, columns],
            depths=depths[columns],
            strata=pool.strata[reqs, columns],
            kinds=batch.kinds[reqs],
        ),
        hit[reqs, places].astype(np.float32),
    )


class _PricedLevels:
    """A draft's seconds from cost tables (``growth.DraftLedger``)."""

    def __init__(self, policy: DraftPolicy, costs: StepCosts, num_reqs: int) -> None:
        self._policy, self._costs, self._num_reqs = policy, costs, num_reqs
        self.seconds = 0.0

    def begin_level(self) -> None:
        """A table needs no stopwatch."""

    def end_level(self, depth: int, num_rows: int) -> None:
        if depth == 1:
            seconds = self._costs.first_pass.at(self._num_reqs)
            self._policy.observe_first_pass(self._num_reqs, seconds)
        else:
            seconds = self._costs.level.at(num_rows)
            self._policy.observe_level(num_rows, seconds)
        self.seconds += seconds


class RecordedHead:
    """The children that a trace holds (``growth.DraftHead``); only a node that was expanded then can be now."""

    def __init__(
        self,
        recorded: Replay,
        rows: Ints,  # [num_reqs] draft of each request, -1 where none was recorded
    ) -> None:
        self._recorded = recorded
        self._here = rows >= 0
        self._rows = np.maximum(rows, 0)
        # Of each level, the column of the trace that each candidate has; those of absent ones are any.
        self._columns: list[Ints] = []

    def children(self, frontier: Frontier) -> tuple[Ints, Floats]:
        trace, depth = self._recorded.trace, frontier.level + 1
        rows, here = self._rows[frontier.reqs], self._here[frontier.reqs]
        group, above = self._groups_of(frontier)
        first = self._recorded.columns(depth).start + group * self._recorded.top_k
        columns = first[:, None] + np.arange(self._recorded.top_k)
        parent_log_probs = 0.0 if frontier.level == 0 else trace.log_probs[rows, above][:, None]
        local = trace.log_probs[rows[:, None], columns] - parent_log_probs
        local[~here] = -np.inf
        padded = np.zeros((*frontier.rows.shape, self._recorded.top_k), dtype=np.int64)
        padded[frontier.rows >= 0] = columns
        self._columns.append(padded.reshape(frontier.rows.shape[0], -1))
        return trace.tokens[rows[:, None], columns].astype(np.int64), local.astype(np.float32)

    def _groups_of(self, frontier: Frontier) -> tuple[Ints, Ints]:
        """[num_rows] each: which group of children in the next level is a node's, and the node's own column."""
        if frontier.level == 0:
            return np.zeros(frontier.num_rows, dtype=np.int64), frontier.reqs
        first = sum(columns.shape[1] for columns in self._columns[:-1])
        places = frontier.parents.columns[frontier.rows >= 0] - first
        above = self._columns[-1][frontier.reqs, places]
        parents = self._parents(frontier.level + 1)[frontier.reqs]
        return (parents == above[:, None]).argmax(axis=1), above

    def _parents(self, depth: int) -> Ints:
        """[num_reqs, num_groups] column of the node whose children each group of a level holds."""
        columns = self._recorded.columns(depth)
        groups = slice(columns.start, columns.stop, self._recorded.top_k)
        return self._recorded.trace.parents[self._rows, groups].astype(np.int64)

    def within_reach(self, chosen: Bools, level_pool: CandidatePool) -> Bools:
        depth = len(self._columns)
        if depth == self._recorded.max_depth:
            return np.zeros_like(chosen)
        # What was not expanded when the trace was taken cannot be expanded now.
        expanded = np.zeros((self._rows.size, self._recorded.depths.size), dtype=np.bool_)
        parents = self._parents(depth + 1)
        np.put_along_axis(expanded, np.maximum(parents, 0), True, axis=1)
        return chosen & np.take_along_axis(expanded, self._columns[-1], axis=1)

    def accepted(self) -> Bools:
        """[num_reqs, pool_size] candidates on the answer's own path."""
        columns = np.concatenate(self._columns, axis=1)
        truth = np.take_along_axis(self._recorded.accepted[self._rows], columns, axis=1)
        return truth & self._here[:, None]

    def depths(self) -> Ints:
        """[pool_size] depth of each candidate."""
        sizes = [columns.shape[1] for columns in self._columns]
        return np.repeat(np.arange(1, len(sizes) + 1), sizes)


def oracle(
    recorded: Replay,
    policy: MarginalPolicy,
    costs: StepCosts,
    batch_size: int,
    *,
    max_requests: int | None = None,
) -> Replayed:
    """The best stop level and the best prefix of the nodes sorted by survival, in hindsight.

    For a batch the choice is made for each request at the price of time that the oracle itself achieves.
    """
    total = recorded.num_requests if max_requests is None else max_requests
    best = Replayed()
    price: float | None = NOTHING_PAYS
    for _ in range(5):  # first nothing is drafted; then the price of time is the rate it leads to
        outcome = Replayed()
        for start in range(0, total, batch_size):
            requests = np.arange(start, min(start + batch_size, total))
            _oracle_batch(recorded, policy, costs, requests, price, outcome)
        best = max(best, outcome, key=lambda o: o.tokens_per_second)
        price = outcome.tokens_per_second
    return best


def _oracle_batch(
    recorded: Replay,
    policy,
    costs: StepCosts,
    requests: Ints,
    price: float | None,
    outcome: Replayed,
) -> None:
    positions = recorded.first[requests].copy()
    while True:
        live = positions < recorded.last[requests]
        requests, positions = requests[live], positions[live]
        num_reqs = requests.size
        if not num_reqs:
            return
        context = float(positions.sum())
        plain = costs.step(num_reqs, num_reqs, context)
        rate = price or num_reqs / plain
        best = _hindsight(recorded, policy, costs, requests, positions, context, rate)
        left = recorded.last[requests] - positions
        advanced = np.minimum(best.accepted + 1, left)
        positions = positions + advanced
        outcome.tokens += int(advanced.sum())
        outcome.seconds += best.seconds
        outcome.steps += 1
        outcome.nodes += best.nodes
        outcome.levels += best.levels


def _hindsight(
    recorded: Replay,
    policy,
    costs: StepCosts,
    requests: Ints,
    positions: Ints,
    context: float,
    rate: float,
) -> _Drafted:
    """The draft of one step with the highest tokens minus price x seconds; nothing drafted is one of them."""
    num_reqs = requests.size
    rows = recorded.rows(requests, positions)
    here = rows >= 0
    rows = np.maximum(rows, 0)
    trace = recorded.trace
    none = np.zeros(num_reqs, dtype=np.int64)
    plain = costs.step(num_reqs, num_reqs, context)
    best = _Drafted(none, 0, plain, 0)
    best_value = num_reqs - rate * plain
    probability = np.exp(np.where(here[:, None], trace.log_probs[rows], -np.inf))
    seconds = costs.first_pass.at(num_reqs)
    for depth in range(1, recorded.max_depth + 1):
        stop = recorded.columns(depth).stop
        if depth > 1:
            parents = trace.parents[rows, recorded.columns(depth)]
            useful = np.unique(parents[here], axis=None)
            seconds += costs.level.at(min(useful.size, recorded.top_k) * int(here.sum()))
        ranked = np.argsort(-probability[:, :stop], axis=1, kind="stable")
        hits = np.take_along_axis(recorded.accepted[rows][:, :stop], ranked, axis=1) & here[:, None]
        # The shortest prefix with m hits ends at the m-th hit: only those lengths can be best.
        gains = np.cumsum(hits, axis=1)
        node = costs.verify.slope(num_reqs, 4.0 * num_reqs)
        value = np.where(hits, gains - rate * node * (np.arange(stop) + 1), -np.inf)
        at = value.argmax(axis=1)
        worth = value[np.arange(num_reqs), at] > 0
        count = np.where(worth, at + 1, 0)
        accepted = np.where(worth, gains[np.arange(num_reqs), at], 0)
        total = int(count.sum())
        cost = seconds + costs.step(num_reqs + total, num_reqs, context)
        gain = num_reqs + int(accepted.sum()) - rate * cost
        if gain > best_value:
            best_value = gain
            best = _Drafted(accepted, total, cost, depth - 1)
    return best
