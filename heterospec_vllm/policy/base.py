# SPDX-License-Identifier: Apache-2.0
"""The policies with what they hold between steps; every decision is a pure function of ``policy/decisions.py``.

The proposer asks a policy after each level which nodes to expand, the runner asks it how many nodes to verify. Both
tell it afterwards what was accepted and how long things took. ``plain``, ``chain`` and ``static`` learn nothing,
``paper`` needs fitted strata, ``marginal`` learns survivals and costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.config import MetaPathReading
from heterospec_vllm.policy.decisions import NodeChoice, TreeShape, in_beam, within
from heterospec_vllm.policy.strata import DEFAULT_STRATA, Strata
from heterospec_vllm.policy.survival import NodeFeatures, along_paths

# Whom a step drafts for: nobody, a few to measure (speculation is off), nobody to measure (it is on), everybody.
Scope = Literal["none", "probe", "pause", "all"]


@dataclass(frozen=True)
class Batch:
    """What a policy knows of the batch when it plans a draft."""

    num_reqs: int  # requests that decode in the next step, speculating or not
    context: float  # their tokens of context
    temperatures: Ints  # [num_drafting] 0 greedy, 1 sampled
    limits: Ints  # [num_drafting] most nodes of each request


@dataclass(frozen=True)
class Demand:
    """What the requests of a step could use."""

    followed: Bools  # [num_reqs] False for one that decodes plainly for good
    limits: Ints  # [num_reqs] most nodes of its next tree, 0 where a draft is of no use
    tokens_left: Ints  # [num_reqs] the most it may still emit
    prompt_left: Ints  # [num_reqs] tokens of its prompt that later steps read

    def only(self, reqs: Bools) -> Demand:
        """Without drafts for the others."""
        return replace(self, limits=np.where(reqs, self.limits, 0))


@dataclass(frozen=True)
class Cycle:
    """A step of decodes alone, with the draft it verified: what a batch got for its time."""

    speculated: bool
    num_reqs: int
    context: float  # their tokens of context
    num_tokens: int  # emitted
    seconds: float  # the draft's and the step's


@dataclass(frozen=True)
class Level:
    """One level of a draft after its nodes were proposed; absent candidates have log-probability -inf."""

    depth: int  # of these nodes, 1 for the root's children
    log_probs: Floats  # [num_drafting, num_candidates] cumulative
    entropies: Floats  # [num_drafting, num_candidates] cumulative along the node's path
    survivals: Floats  # [num_drafting, num_candidates] 0 where absent
    strata: Ints  # [num_drafting, num_candidates]
    meta_entropies: Floats  # [num_drafting] of the meta-path so far


class DraftPolicy:
    """A fixed tree: EAGLE-2's beam, the same bounds for every request (``static``, ``chain``)."""

    learns = False
    probe_requests = 4  # requests that a probe drafts for
    strata: Strata = DEFAULT_STRATA
    reading: MetaPathReading = "A"
    follows_meta_path = False  # whether Level.meta_entropies is needed
    choice: NodeChoice | None = None  # the latest one, of a policy that weighs rates
    expected_gain = 0.0  # rate with speculation over that of plain decoding, of such a policy

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        self.max_depth = shape.max_depth  # most levels a draft can reach

    def scope(self, num_reqs: int, context: float) -> Scope:
        """For whom to draft after this step."""
        return "all"

    def drafts_for_all(self, scope: Scope, num_reqs: int) -> bool:
        """Whether every request of the batch gets a draft that can."""
        return scope == "all" or (scope == "probe" and num_reqs <= self.probe_requests)

    def is_worth_reading(
        self,
        num_unread: Ints,  # [num_reqs] tokens that the head would have to read of each request, now and later
        tokens_left: Ints,  # [num_reqs] the most that it may still emit
        num_reqs: int,
        context: float,
    ) -> Bools:
        """[num_reqs] whether the head should know a request; the others decode plainly and are asked for again."""
        return np.ones(num_unread.size, dtype=np.bool_)

    def survivals(
        self,
        batch: Batch,
        depth: int,
        log_probs: Floats,  # [num_drafting, num_candidates]
        strata: Ints,  # [num_drafting, num_candidates]
        parent_survivals: Floats,  # [num_drafting, num_candidates]
    ) -> Floats:
        """[num_drafting, num_candidates] what nodes are ranked by, non-increasing along a path; 0 where absent."""
        probability = np.exp(np.fmax(log_probs, -np.inf))  # NaN counts as absent
        return along_paths(probability, parent_survivals)

    def expand(self, batch: Batch, level: Level) -> Bools:
        """[num_drafting, num_candidates] the nodes whose children are drafted next."""
        if level.depth >= self.shape.max_depth:
            return np.zeros(level.log_probs.shape, dtype=np.bool_)
        return self.best_of(level)

    def best_of(self, level: Level) -> Bools:
        """[num_drafting, num_candidates] EAGLE-2's beam: the likeliest nodes of a level."""
        return in_beam(np.where(level.survivals > 0, level.log_probs, -np.inf), self.beam)

    @property
    def beam(self) -> int:
        return min(self.shape.top_k, self.shape.num_nodes)

    def propose(
        self,
        batch: Batch,
        survivals: Floats,  # [num_drafting, num_candidates] sorted, falling
        draft_seconds: float,
    ) -> Ints:
        """[num_drafting] the most nodes handed to the scheduler."""
        return self.within(batch, survivals, self.shape.num_nodes)

    @staticmethod
    def within(batch: Batch, survivals: Floats, wanted: int) -> Ints:
        """[num_drafting] the nodes wanted, as far as the request allows and the draft has them."""
        return within(survivals, batch.limits, wanted)

    def keep(
        self,
        survivals: Floats,  # [num_reqs, max_nodes] of the scheduled nodes, 0 beyond
        num_nodes: Ints,  # [num_reqs] scheduled
        other_tokens: int,  # tokens of the step that are not draft nodes
        num_reqs: int,
        context: float,
    ) -> Ints:
        """[num_reqs] nodes verified, a prefix of those scheduled; prefill chunks and admissions are known now."""
        return num_nodes

    def prices(self, batch: Batch) -> tuple[float, float]:
        """(tokens per second that a second is worth, seconds of one more verified node); 0 where not used."""
        return 0.0, 0.0

    def observe_children(
        self,
        batch: Batch,
        depth: int,  # of the expanded nodes
        strata: Ints,  # [num_drafting, width] of the expanded nodes
        survivals: Floats,  # [num_drafting, width] of the expanded nodes, 0 where there is none
        children: Floats,  # [num_drafting, width, top_k] survivals of their children
    ) -> None:
        """A level's children were proposed."""

    def observe_nodes(self, nodes: NodeFeatures, accepted: Floats) -> None:
        """Verified nodes (flat) and whether the walk reached each."""

    def observe_step(self, num_tokens: int, num_reqs: int, context: float, seconds: float) -> None:
        """A target step of decodes, or one of very many tokens, and its seconds, drafting not included."""

    def observe_cycle(self, cycle: Cycle) -> None:
        """A step that speculated for everybody or for nobody, without prompts and catching up."""

    def observe_first_pass(self, num_tokens: int, seconds: float) -> None:
        """The head's pass over true tokens, its logits included."""

    def observe_reading(self, num_tokens: int, num_reqs: int, seconds: float) -> None:
        """The same pass, or one after which nobody was drafted for (without logits), by its requests, too."""

    def observe_level(self, num_rows: int, seconds: float) -> None:
        """One draft level that expanded ``num_rows`` nodes."""


class PlainPolicy(DraftPolicy):
    """No speculation."""

    def scope(self, num_reqs: int, context: float) -> Scope:
        return "none"
