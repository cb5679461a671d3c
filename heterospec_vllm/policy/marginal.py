# SPDX-License-Identifier: Apache-2.0
"""The ``marginal`` policy: survival and cost learned from every step, and one price of time (docs/design.md)."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from statistics import median_low

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.policy.base import Batch, Cycle, DraftPolicy, Level, Scope
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
    MAX_DEPTH,
    NUM_TEMPERATURES,
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
    ) -> None:
        super().__init__(shape)
        self.costs = costs
        self.tables = tables or SurvivalTables()
        self.strata = strata
        self.switch = Switch(deepcopy(costs).plain_step, self.probe_requests)
        self._speedup = 1.0  # expected rate relative to plain decoding, smoothed
        self._nodes_a_req = 4.0
        self._levels = 1.0  # levels beyond the first, and rows of such a level, per request
        self._rows = 2.0
        self._num_levels = 0  # of the current draft; with a depth of 1 nothing is ever expanded
        self._num_rows = 0
        self._scope: Scope = "all"
        self._age, self._gain_reqs = 0, -1
        self._predicted = 1.0
        self._draft_seconds = 0.0
        self._readings: deque[float] = deque(maxlen=5)  # seconds of a prompt's token, by the head
        self._read_trust = 1.0  # in them
        self._num_reqs = 0  # for which the latest draft was chosen as the best; 0 for a probe
        ranks = np.arange(shape.top_k)
        # How much of a node's survival each child inherits, by temperature, depth, stratum and rank.
        self._continuation = np.broadcast_to(
            0.45 * 0.4**ranks, (NUM_TEMPERATURES, MAX_DEPTH + 1, NUM_STRATA, shape.top_k)
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
        self._scope = self.switch.scope(num_reqs, self._predicted)
        self.expected_gain = self.switch.gain(num_reqs, self._predicted)
        return self._scope

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

    def prices(self, batch: Batch) -> tuple[float, float]:
        nodes = self._nodes_a_req * batch.num_reqs
        slope = self.costs.verify.slope(batch.num_reqs + 0.5 * nodes, max(4.0, nodes))
        return self.price(batch.num_reqs, batch.context), slope

    def price(self, num_reqs: int, context: float) -> float:
        """Tokens per second that a second is worth: plain decoding's rate times the speedup achieved lately."""
        plain = self.costs.plain_step(num_reqs, context)
        return max(1.0, self._speedup) * num_reqs / plain

    # ---- a draft

    def survivals(self, batch, depth, log_probs, strata, parent_survivals) -> Floats:
        return self.tables.of_level(log_probs, depth, strata, batch.temperatures, parent_survivals)

    def expand(self, batch: Batch, level: Level) -> Bools:
        if level.depth == 1:
            self._smooth(self.first_level_curve, level.survivals)
            self._num_levels = 0
            self._num_rows = 0
        if level.depth >= self.shape.max_depth:
            return np.zeros(level.log_probs.shape, dtype=np.bool_)
        rows = batch.limits.size * self.beam
        price, node_seconds = self.prices(batch)
        depth = min(level.depth, MAX_DEPTH)
        chosen = nodes_worth_expanding(
            level.survivals,
            level.strata,
            batch.temperatures,
            self._continuation[:, depth],
            price=price,
            node_seconds=node_seconds,
            row_seconds=self.costs.level.slope(1, max(1, rows - 1)),
            level_seconds=self.costs.level.at(1),
            beam=self.beam,
        )
        count = int(np.count_nonzero(chosen))
        self._num_levels += count > 0
        self._num_rows += count
        return chosen

    def observe_children(self, batch, depth, strata, survivals, children) -> None:
        """What children inherited, weighted by how much the parent mattered: teaches :meth:`expand`."""
        depth = min(depth, MAX_DEPTH)
        inherit(self._continuation, batch.temperatures, depth, strata, survivals, children)

    def propose(self, batch: Batch, survivals: Floats, draft_seconds: float) -> Ints:
        """The best choice for a step without prefill; the step itself may only verify fewer."""
        limits = self.within(batch, survivals, self.shape.num_nodes)
        width = min(survivals.shape[1], self.shape.num_nodes)
        top = survivals[:, :width]
        self._smooth(self.curve, top)
        if batch.limits.size and self._scope != "probe":
            self._levels += 0.1 * (self._num_levels - self._levels)
            rows = self._num_rows / max(1, self._num_levels) / batch.limits.size
            self._rows += 0.1 * (rows - self._rows) * (self._num_levels > 0)
        # A draft behind a prompt is dear once; it is no measure of what drafting costs from now on.
        usual = self.costs.first_pass.at(2 * batch.num_reqs)
        usual += self._num_levels * self.costs.level.at(max(1, self._num_rows))
        self._draft_seconds = min(draft_seconds, 2.0 * usual)
        chosen = self._choose(top, limits, batch.num_reqs, batch.num_reqs, batch.context)
        if self._scope == "probe":
            self._num_reqs = 0
            return np.minimum(np.maximum(chosen.num_nodes, self.probe_nodes), limits)
        self._num_reqs = batch.num_reqs
        plain = batch.num_reqs / self.costs.plain_step(batch.num_reqs, batch.context)
        self._speedup += 0.1 * (chosen.rate / plain - self._speedup)
        nodes = chosen.total / max(1, batch.num_reqs)
        self._nodes_a_req += 0.1 * (nodes - self._nodes_a_req)
        return chosen.num_nodes

    def keep(self, survivals, num_nodes, other_tokens, num_reqs, context) -> Ints:
        as_planned = other_tokens == num_reqs == self._num_reqs
        if self._scope == "probe" or as_planned:
            return num_nodes
        return self._choose(survivals, num_nodes, other_tokens, num_reqs, context).num_nodes

    def _choose(
        self, survivals: Floats, limits: Ints, other_tokens: int, num_reqs: int, context: float
    ) -> NodeChoice:
        most = int(limits.sum())
        cost = self.costs.cycles(other_tokens, most, num_reqs, context, self._draft_seconds)
        others = max(0, num_reqs - survivals.shape[0])
        self.choice = choose_nodes(survivals, limits, cost, others)
        return self.choice

    # ---- learning

    def observe_nodes(self, nodes: NodeFeatures, accepted: Floats) -> None:
        self.tables.observe(nodes, accepted)

    def observe_step(self, num_tokens: int, num_reqs: int, context: float, seconds: float) -> None:
        if self._scope == "pause":
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

    def _smooth(self, curve: Floats, survivals: Floats) -> None:
        """Moves a mean curve towards this draft's, per request (a probe speaks for more)."""
        if survivals.shape[0]:
            smooth(curve, survivals, 0.3 if self._scope == "probe" else 0.05)
