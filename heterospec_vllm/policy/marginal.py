# SPDX-License-Identifier: Apache-2.0
"""The ``marginal`` policy: survival and cost learned from every step, and one price of time (docs/design.md)."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from statistics import median_low

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.policy.base import (
    Batch,
    Cycle,
    DraftPlan,
    DraftPolicy,
    FixedPlan,
    Level,
    Scope,
)
from heterospec_vllm.policy.cost import StepCosts
from heterospec_vllm.policy.decisions import (
    NodeChoice,
    TreeShape,
    choose_nodes,
    expected_rate,
    inherit,
    nodes_worth_expanding,
    smooth,
)
from heterospec_vllm.policy.strata import DEFAULT_STRATA, NUM_STRATA, Strata
from heterospec_vllm.policy.survival import (
    NUM_KINDS,
    TABLE_DEPTH,
    NodeFeatures,
    SurvivalTables,
)
from heterospec_vllm.policy.switch import Switch


class MarginalPolicy(DraftPolicy):
    """Takes what earns more than the price of time: levels, nodes, and speculation itself."""

    learns = True
    probe_nodes = 2
    pause_share = (
        0.1  # what a plain step between speculative ones counts for in the costs, at least
    )
    # Steps between two looks at whether speculation pays, while the batch stays as it is.
    gain_every = 8
    # Tokens that the head reads without a question, and the fewest whose reading says what a token takes.
    read_anyway, read_measured = 16, 128
    # What is left of the price of reading with every step in which it was too high: it may have been measured badly.
    read_doubt = 0.99

    def __init__(
        self,
        shape: TreeShape,
        costs: StepCosts,
        *,
        tables: SurvivalTables | None = None,
        strata: Strata = DEFAULT_STRATA,
        switch: Switch | None = None,
    ) -> None:
        super().__init__(shape)
        self.costs = costs
        self.tables = tables or SurvivalTables()
        self.strata = strata
        self.switch = switch or Switch(deepcopy(costs).plain_step, self.probe_requests)
        self._speedup = 1.0  # expected rate relative to plain decoding, smoothed
        self._nodes_a_req = 4.0
        self._levels = 1.0  # levels beyond the first, and rows of such a level, per request
        self._rows = 2.0
        self.latest_scope: Scope = "all"
        self._age, self._gain_reqs = 0, -1
        self._predicted = 1.0
        self._readings: deque[float] = deque(maxlen=5)  # seconds of a prompt's token, by the head
        self._read_trust = 1.0  # in them
        ranks = np.arange(shape.top_k)
        # How much of a node's survival each child inherits, by kind, depth, stratum and rank.
        self._continuation = np.broadcast_to(
            0.45 * 0.4**ranks, (NUM_KINDS, TABLE_DEPTH + 1, NUM_STRATA, shape.top_k)
        ).copy()
        # Mean survival of the i-th best node: of whole trees, and of the root's children alone.
        guess = 0.5 * 0.6 ** np.arange(shape.num_nodes)
        self.curve = guess.copy()
        self.first_level_curve = guess[: shape.top_k].copy()

    # ---- speculation on or off

    def scope(self, num_reqs: int, context: float) -> Scope:
        """Compares what recent trees would earn in this batch with plain decoding."""
        self._age += 1
        if num_reqs != self._gain_reqs or self._age >= self.gain_every:
            self._age, self._gain_reqs = 0, num_reqs
            self._predicted = self.gain(num_reqs, context)
        self.latest_scope = self.switch.scope(num_reqs, self._predicted)
        self.expected_gain = self.switch.gain(num_reqs, self._predicted)
        return self.latest_scope

    def is_worth_reading(self, num_unread, tokens_left, num_reqs, context) -> Bools:
        """A long prompt before a short answer costs more to read than its drafts could save."""
        worth = num_unread <= self.read_anyway
        if worth.all():
            return worth
        gain = max(self.switch.start, self.expected_gain)
        saved = self.costs.plain_step(num_reqs, context) / num_reqs * (1.0 - 1.0 / gain)
        price = self._read_trust * median_low(self._readings) if self._readings else 0.0
        worth |= num_unread * price <= tokens_left * saved
        if not worth.all():
            self._read_trust *= self.read_doubt
        return worth

    def gain(self, num_reqs: int, context: float) -> float:
        """Expected rate with speculation relative to plain decoding for a batch of this size."""
        plain = self.costs.plain_step(num_reqs, context)
        first = self.costs.first_pass.at(num_reqs)
        rows = max(1.0, num_reqs * self._rows)
        rates = []
        for curve, levels in ((self.curve, self._levels), (self.first_level_curve, 0.0)):
            counts = num_reqs * np.arange(1, curve.size + 2)
            cost = self.costs.steps(counts, num_reqs, context) + first
            rates.append(expected_rate(curve, num_reqs, cost + levels * self.costs.level.at(rows)))
        return max(rates) * plain / num_reqs

    def price(self, num_reqs: int, context: float) -> float:
        """Tokens per second that a second is worth: plain decoding's rate times the speedup achieved lately."""
        plain = self.costs.plain_step(num_reqs, context)
        return max(1.0, self._speedup) * num_reqs / plain

    def node_seconds(self, num_reqs: int) -> float:
        """Seconds of one more verified node, around the nodes that were verified lately."""
        nodes = self._nodes_a_req * num_reqs
        return self.costs.verify.slope(num_reqs + 0.5 * nodes, max(4.0, nodes))

    def plan(self, batch: Batch, scope: Scope = "all") -> DraftPlan:
        return MarginalPlan(batch, self, scope)

    # ---- what a plan tells of itself

    def first_level(self, survivals: Floats, scope: Scope) -> None:
        self._smooth(self.first_level_curve, survivals, scope)

    def planned(
        self,
        survivals: Floats,  # [num_drafting, at most max_nodes] sorted, falling
        num_levels: int,  # expanded beyond the first
        num_rows: int,  # nodes expanded in them
        scope: Scope,
    ) -> None:
        """How far a draft went and what its best nodes looked like."""
        self._smooth(self.curve, survivals, scope)
        num_drafting = survivals.shape[0]
        if num_drafting and scope != "probe":
            self._levels += 0.1 * (num_levels - self._levels)
            rows = num_rows / max(1, num_levels) / num_drafting
            self._rows += 0.1 * (rows - self._rows) * (num_levels > 0)

    def chosen(self, choice: NodeChoice, batch: Batch) -> None:
        """What a draft that was no probe is expected to earn."""
        plain = batch.num_reqs / self.costs.plain_step(batch.num_reqs, batch.context)
        self._speedup += 0.1 * (choice.rate / plain - self._speedup)
        nodes = choice.total / max(1, batch.num_reqs)
        self._nodes_a_req += 0.1 * (nodes - self._nodes_a_req)

    def continuation(self, depth: int) -> Floats:
        """[num_kinds, num_strata, top_k] share of a node's survival that each child inherits."""
        return self._continuation[:, min(depth, TABLE_DEPTH)]

    # ---- learning

    def observe_children(self, batch, depth, strata, survivals, children) -> None:
        """What children inherited, weighted by how much the parent mattered."""
        depth = min(depth, TABLE_DEPTH)
        inherit(self._continuation, batch.kinds, depth, strata, survivals, children)

    def observe_nodes(self, nodes: NodeFeatures, accepted: Floats) -> None:
        self.tables.observe(nodes, accepted)

    def observe_step(self, num_tokens: int, num_reqs: int, context: float, seconds: float) -> None:
        if self.latest_scope == "pause":
            self.costs.observe_step(num_tokens, num_reqs, context, seconds, self.pause_share)
        else:
            self.costs.observe_step(num_tokens, num_reqs, context, seconds)

    def observe_cycle(self, cycle: Cycle) -> None:
        self.switch.observe(cycle)

    def observe_first_pass(self, num_tokens: int, seconds: float) -> None:
        self.costs.first_pass.observe(num_tokens, seconds)

    def observe_reading(self, num_tokens: int, num_reqs: int, seconds: float) -> None:
        read = num_tokens - num_reqs  # each request's last token is computed whole, read or not
        if read >= self.read_measured:
            self._readings.append(max(0.0, seconds - self.costs.first_pass.at(num_reqs)) / read)
            self._read_trust = 1.0

    def observe_level(self, num_rows: int, seconds: float) -> None:
        self.costs.level.observe(num_rows, seconds)

    def _smooth(self, curve: Floats, survivals: Floats, scope: Scope) -> None:
        """Moves a mean curve towards this draft's, per request (a probe speaks for more)."""
        if survivals.shape[0]:
            smooth(curve, survivals, 0.3 if scope == "probe" else 0.05)


class MarginalPlan(FixedPlan):
    """Levels and nodes that earn more than the price of time."""

    def __init__(self, batch: Batch, policy: MarginalPolicy, scope: Scope) -> None:
        super().__init__(batch, policy.shape)
        self.strata = policy.strata
        self._policy = policy
        self._scope = scope
        self._num_levels = 0  # expanded; with a depth of 1 nothing ever is
        self._num_rows = 0
        self._draft_seconds = 0.0
        self._num_reqs = 0  # for which the nodes were chosen as the best; 0 for a probe

    def survivals(
        self, depth: int, log_probs: Floats, strata: Ints, parent_survivals: Floats
    ) -> Floats:
        return self._policy.tables.of_level(
            log_probs, depth, strata, self.batch.kinds, parent_survivals
        )

    def expand(self, level: Level) -> Bools:
        policy, batch = self._policy, self.batch
        if level.depth == 1:
            policy.first_level(level.survivals, self._scope)
        if level.depth >= self.shape.max_depth:
            return np.zeros(level.log_probs.shape, dtype=np.bool_)
        rows = batch.limits.size * self.beam
        price, node_seconds = self.prices()
        chosen = nodes_worth_expanding(
            level.survivals,
            level.strata,
            batch.kinds,
            policy.continuation(level.depth),
            price=price,
            node_seconds=node_seconds,
            row_seconds=policy.costs.level.slope(1, max(1, rows - 1)),
            level_seconds=policy.costs.level.at(1),
            beam=self.beam,
        )
        count = int(np.count_nonzero(chosen))
        self._num_levels += count > 0
        self._num_rows += count
        return chosen

    def propose(self, survivals: Floats, draft_seconds: float) -> Ints:
        """The best choice for a step without prefill; the step itself may only verify fewer."""
        policy, batch = self._policy, self.batch
        limits = self.within(survivals, self.shape.num_nodes)
        top = survivals[:, : min(survivals.shape[1], self.shape.num_nodes)]
        policy.planned(top, self._num_levels, self._num_rows, self._scope)
        # A draft behind a prompt is dear once; it is no measure of what drafting costs from now on.
        usual = policy.costs.first_pass.at(2 * batch.num_reqs)
        usual += self._num_levels * policy.costs.level.at(max(1, self._num_rows))
        self._draft_seconds = min(draft_seconds, 2.0 * usual)
        chosen = self._choose(top, limits, batch.num_reqs, batch.num_reqs, batch.context)
        if self._scope == "probe":
            return np.minimum(np.maximum(chosen.num_nodes, policy.probe_nodes), limits)
        self._num_reqs = batch.num_reqs
        policy.chosen(chosen, batch)
        return chosen.num_nodes

    def keep(
        self, survivals: Floats, num_nodes: Ints, other_tokens: int, num_reqs: int, context: float
    ) -> Ints:
        is_probe = self._scope == "probe" == self._policy.latest_scope
        if is_probe or other_tokens == num_reqs == self._num_reqs:  # as planned
            return num_nodes
        return self._choose(survivals, num_nodes, other_tokens, num_reqs, context).num_nodes

    def prices(self) -> tuple[float, float]:
        batch = self.batch
        price = self._policy.price(batch.num_reqs, batch.context)
        return price, self._policy.node_seconds(batch.num_reqs)

    def _choose(
        self, survivals: Floats, limits: Ints, other_tokens: int, num_reqs: int, context: float
    ) -> NodeChoice:
        costs = self._policy.costs
        cost = costs.cycles(other_tokens, int(limits.sum()), num_reqs, context, self._draft_seconds)
        others = max(0, num_reqs - survivals.shape[0])
        self.choice = choose_nodes(survivals, limits, cost, others)
        return self.choice
