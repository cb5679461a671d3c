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

from heterospec_vllm.arrays import Ints
from heterospec_vllm.draft.growth import update_meta_entropies
from heterospec_vllm.policy.base import Batch, Cycle, DraftPolicy, Level
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.marginal import MarginalPolicy
from heterospec_vllm.policy.survival import NodeFeatures
from heterospec_vllm.replay.trace import Trace
from heterospec_vllm.tree.pool import CandidatePool

NOTHING_PAYS = 1e12  # tokens per second: no draft earns so much


@dataclass
class Outcome:
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
) -> Outcome:
    """Decode every request of the trace in batches of ``batch_size`` under one policy."""
    policy = make()
    outcome = Outcome()
    total = recorded.num_requests if max_requests is None else max_requests
    for start in range(0, total, batch_size):
        requests = np.arange(start, min(start + batch_size, total))
        _replay_batch(recorded, policy, costs, requests, outcome)
    return outcome


def _replay_batch(
    recorded: Replay, policy: DraftPolicy, costs: StepCosts, requests: Ints, outcome: Outcome
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
            drafted = _draft(recorded, policy, costs, requests, positions, context)
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
        temperatures=recorded.trace.sampled[requests].astype(np.int64),
        limits=np.where(rows >= 0, policy.shape.num_nodes * 2, 0),
    )
    seconds = costs.first_pass.at(num_reqs)
    policy.observe_first_pass(num_reqs, seconds)
    pool, level_rows = expand(recorded, policy, batch, np.maximum(rows, 0), rows >= 0)
    for count in level_rows:
        level = costs.level.at(count)
        policy.observe_level(count, level)
        seconds += level
    ranked = pool.ranked(64)
    order = ranked.columns
    num_nodes = policy.propose(batch, ranked.survivals, seconds)
    num_nodes = policy.keep(ranked.survivals, num_nodes, num_reqs, num_reqs, context)
    chosen = np.arange(order.shape[1]) < num_nodes[:, None]
    width = pool.tokens.shape[1]
    truth = recorded.accepted[np.maximum(rows, 0)][:, :width]
    hit = np.take_along_axis(truth, order, axis=1) & chosen
    if policy.learns:
        _teach(recorded, policy, batch, pool, order, chosen, hit)
    return _Drafted(hit.sum(axis=1), int(num_nodes.sum()), seconds, len(level_rows))


def _teach(recorded: Replay, policy, batch: Batch, pool: CandidatePool, order, chosen, hit) -> None:
    reqs, places = np.nonzero(chosen)
    columns = order[reqs, places]
    policy.observe_nodes(
        NodeFeatures(
            log_probs=pool.log_probs[reqs, columns],
            depths=recorded.depths[columns],
            strata=pool.strata[reqs, columns],
            temperatures=batch.temperatures[reqs],
        ),
        hit[reqs, places].astype(np.float32),
    )


def expand(
    recorded: Replay, policy: DraftPolicy, batch: Batch, rows: Ints, present: np.ndarray
) -> tuple[CandidatePool, list[int]]:
    """The pool that a policy would have drafted, and the nodes expanded in each level beyond the first.

    A node can be expanded only if it was in the recording.
    """
    trace = recorded.trace
    num_reqs = rows.size
    levels: list[CandidatePool] = []
    level_rows: list[int] = []
    meta = np.zeros(num_reqs, dtype=np.float32)
    survivals = np.zeros((num_reqs, recorded.depths.size))
    expanded = np.zeros((num_reqs, recorded.depths.size), dtype=np.bool_)
    for depth in range(1, recorded.max_depth + 1):
        columns = recorded.columns(depth)
        parents = trace.parents[rows, columns].astype(np.int64)
        log_probs = trace.log_probs[rows, columns].copy()
        above = np.maximum(parents, 0)
        known = np.where(
            parents >= 0, np.take_along_axis(expanded, above, axis=1), present[:, None]
        )
        log_probs[~known] = -np.inf
        parent_survivals = np.where(parents >= 0, np.take_along_axis(survivals, above, axis=1), 1.0)
        entropies = trace.entropies[rows, columns]
        strata = policy.strata.of(depth, entropies)
        survivals[:, columns] = policy.survivals(batch, depth, log_probs, strata, parent_survivals)
        level = CandidatePool(
            tokens=trace.tokens[rows, columns].astype(np.int64),
            log_probs=log_probs,
            survivals=survivals[:, columns],
            strata=strata,
            entropies=entropies,
            parents=parents,
            ranks=trace.ranks[rows, columns].astype(np.int64),
        )
        levels.append(level)
        if depth > 1:
            _observe_children(policy, batch, depth, level, levels[-2], recorded)
        if depth >= policy.max_depth:
            break
        if policy.follows_meta_path:
            parent_log_probs = np.where(
                parents >= 0, np.take_along_axis(trace.log_probs[rows], above, axis=1), 0
            )
            update_meta_entropies(policy, depth, level, parent_log_probs, meta)
        chosen = policy.expand(
            batch, Level(depth, log_probs, entropies, level.survivals, strata, meta)
        )
        if depth == recorded.max_depth:
            break
        # What was not expanded when the trace was taken cannot be expanded now.
        has_children = np.zeros(expanded.shape, dtype=np.bool_)
        following = trace.parents[rows, recorded.columns(depth + 1)].astype(np.int64)
        np.put_along_axis(has_children, np.maximum(following, 0), True, axis=1)
        chosen = chosen & has_children[:, columns]
        if not chosen.any():
            break
        expanded[:, columns] = chosen
        level_rows.append(int(chosen.sum()))
    return CandidatePool.concatenate(levels), level_rows


def _observe_children(
    policy: DraftPolicy,
    batch: Batch,
    depth: int,
    level: CandidatePool,
    above: CandidatePool,
    recorded,
) -> None:
    """Children come in groups of ``top_k``, a group for each node that was expanded in the recording."""
    top_k = recorded.top_k
    first = recorded.columns(depth - 1).start
    parents = level.parents[:, ::top_k] - first
    inside = np.clip(parents, 0, above.survivals.shape[1] - 1)
    children = level.survivals.reshape(parents.shape[0], -1, top_k)
    drafted = children.max(axis=2) > 0
    policy.observe_children(
        batch,
        depth - 1,
        np.take_along_axis(above.strata, inside, axis=1),
        np.where(drafted, np.take_along_axis(above.survivals, inside, axis=1), 0.0),
        children,
    )


def oracle(
    recorded: Replay,
    policy: MarginalPolicy,
    costs: StepCosts,
    batch_size: int,
    *,
    max_requests: int | None = None,
) -> Outcome:
    """The best stop level and the best prefix of the nodes sorted by survival, in hindsight.

    For a batch the choice is made for each request at the price of time that the oracle itself achieves.
    """
    total = recorded.num_requests if max_requests is None else max_requests
    best = Outcome()
    price: float | None = NOTHING_PAYS
    for _ in range(5):  # first nothing is drafted; then the price of time is the rate it leads to
        outcome = Outcome()
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
    outcome: Outcome,
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
