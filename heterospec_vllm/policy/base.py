# SPDX-License-Identifier: Apache-2.0
"""What a policy is: it plans drafts, and it learns from steps. Every decision is a pure function (``decisions.py``).

Order of a step's calls: :meth:`DraftPolicy.scope` says for whom to draft, :meth:`DraftPolicy.plan` makes the plan of
one draft. The plan is asked level by level and answers at the end how many nodes to verify. The ``observe_*`` methods
teach the policy afterwards; no decision waits for them. ``plain``, ``chain`` and ``static`` learn nothing, ``paper``
needs fitted strata, ``marginal`` learns survivals and costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

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
    kinds: Ints  # [num_drafting] below NUM_KINDS (survival.py)
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


class DraftPlan(Protocol):
    """One draft of a batch, from its first level to the nodes that are verified.

    Calls come in this order: for each level :meth:`survivals` and :meth:`expand`, then :meth:`propose` once, then
    :meth:`keep` in the step that verifies. :meth:`prices` may be read at any time.
    """

    batch: Batch
    max_depth: int  # most levels
    top_k: int  # children considered for each expanded node
    beam: int  # most nodes of a request that a level expands
    strata: Strata
    reading: MetaPathReading
    follows_meta_path: bool  # whether Level.meta_entropies is needed
    choice: NodeChoice | None  # the latest one, of a policy that weighs rates

    def survivals(
        self,
        depth: int,
        log_probs: Floats,  # [num_drafting, num_candidates]
        strata: Ints,  # [num_drafting, num_candidates]
        parent_survivals: Floats,  # [num_drafting, num_candidates]
    ) -> Floats:
        """[num_drafting, num_candidates] what nodes are ranked by, non-increasing along a path; 0 where absent."""

    def expand(self, level: Level) -> Bools:
        """[num_drafting, num_candidates] the nodes whose children are drafted next."""

    def propose(
        self,
        survivals: Floats,  # [num_drafting, num_candidates] sorted, falling
        draft_seconds: float,
    ) -> Ints:
        """[num_drafting] the most nodes handed to the scheduler."""

    def keep(
        self,
        survivals: Floats,  # [num_reqs, max_nodes] of the scheduled nodes, 0 beyond
        num_nodes: Ints,  # [num_reqs] scheduled
        other_tokens: int,  # tokens of the step that are not draft nodes
        num_reqs: int,
        context: float,
    ) -> Ints:
        """[num_reqs] nodes verified, a prefix of those scheduled; prefill chunks and admissions are known now."""

    def prices(self) -> tuple[float, float]:
        """(tokens per second that a second is worth, seconds of one more verified node); 0 where not used."""


class Learner:
    """What a policy may be taught; by default it learns nothing."""

    learns = False  # whether observe_nodes is worth calling

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
        """The head's pass over accepted tokens, its logits included."""

    def observe_reading(self, num_tokens: int, num_reqs: int, seconds: float) -> None:
        """Seconds of a head pass over ``num_tokens`` tokens of ``num_reqs`` requests, also when no draft followed."""

    def observe_level(self, num_rows: int, seconds: float) -> None:
        """One draft level that expanded ``num_rows`` nodes."""


class DraftPolicy(Learner):
    """Plans drafts for batches. A subclass says how one draft is planned; by default everybody is drafted for."""

    probe_requests = 4  # requests that a probe drafts for
    expected_gain = (
        0.0  # rate with speculation over that of plain decoding, of a policy that weighs rates
    )

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape

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

    def plan(self, batch: Batch, scope: Scope = "all") -> DraftPlan:
        """The plan of one draft, for the requests that ``scope`` named."""
        raise NotImplementedError


class FixedPlan:
    """EAGLE-2's beam: the same bounds for every request, nodes ranked by their path probability."""

    strata: Strata = DEFAULT_STRATA
    reading: MetaPathReading = "A"
    follows_meta_path = False
    choice: NodeChoice | None = None

    def __init__(self, batch: Batch, shape: TreeShape) -> None:
        self.batch = batch
        self.shape = shape
        self.max_depth = shape.max_depth
        self.top_k = shape.top_k
        self.beam = min(shape.top_k, shape.num_nodes)

    def survivals(
        self, depth: int, log_probs: Floats, strata: Ints, parent_survivals: Floats
    ) -> Floats:
        probability = np.exp(np.fmax(log_probs, -np.inf))  # NaN counts as absent
        return along_paths(probability, parent_survivals)

    def expand(self, level: Level) -> Bools:
        if level.depth >= self.shape.max_depth:
            return np.zeros(level.log_probs.shape, dtype=np.bool_)
        return self.best_of(level)

    def best_of(self, level: Level) -> Bools:
        """[num_drafting, num_candidates] EAGLE-2's beam: the likeliest nodes of a level."""
        return in_beam(np.where(level.survivals > 0, level.log_probs, -np.inf), self.beam)

    def propose(self, survivals: Floats, draft_seconds: float) -> Ints:
        return self.within(survivals, self.shape.num_nodes)

    def within(self, survivals: Floats, wanted: int) -> Ints:
        """[num_drafting] the nodes wanted, as far as the request allows and the draft has them."""
        return within(survivals, self.batch.limits, wanted)

    def keep(
        self, survivals: Floats, num_nodes: Ints, other_tokens: int, num_reqs: int, context: float
    ) -> Ints:
        return num_nodes

    def prices(self) -> tuple[float, float]:
        return 0.0, 0.0


class FixedPolicy(DraftPolicy):
    """The same tree for every request, always (``static``, ``chain``)."""

    def plan(self, batch: Batch, scope: Scope = "all") -> DraftPlan:
        return FixedPlan(batch, self.shape)


class PlainPolicy(FixedPolicy):
    """No speculation."""

    def scope(self, num_reqs: int, context: float) -> Scope:
        return "none"
