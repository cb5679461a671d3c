# SPDX-License-Identifier: Apache-2.0
"""What a drafter is: the records that a step hands it and gets back, and the members that callers use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from heterospec_vllm.arrays import Ints
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.policy.base import Demand, DraftPlan, DraftPolicy, Scope
from heterospec_vllm.tree.masks import Constraints
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves for drafting, request by request in the order of the batch."""

    req_ids: list[str]
    tokens: AcceptedTokens  # accepted tokens and prompt tokens of the step
    demand: Demand
    kinds: Ints  # [num_reqs] below NUM_KINDS (policy/survival.py)
    constraints: Constraints | None = None  # None: no request has a grammar


@dataclass(frozen=True)
class Reading:
    """What the head read in a step, or kept for later."""

    caught_up: int = 0  # tokens of earlier steps that it read now
    late_contexts: int = 0  # requests of which it read only the later tokens
    unread: int = 0  # requests that were not worth reading
    possible: bool = False  # whether some request could be drafted for


@dataclass(frozen=True)
class Draft:
    """What one draft produced: the candidates, the trees cut out of them, and how far it went."""

    plan: DraftPlan
    places: Ints  # [num_drafting] whose trees these are, among the step's requests
    pool: CandidatePool
    num_candidates: int  # in the pool
    trees: DraftTrees  # [num_drafting]
    num_levels: int  # beyond the first
    seconds: float
    tokens: AcceptedTokens  # what the source read before
    drafting: Ints  # [num_drafting] whose trees these are, among the requests of those tokens


@dataclass(frozen=True)
class Drafted:
    """What a drafter did after a step."""

    reading: Reading
    draft: Draft | None = None
    head_passes: int = 0


class Drafter(Protocol):
    """Where drafts come from. Both model runners have one; the controller and the cost measurement call it."""

    max_num_tokens: int  # of one pass

    @property
    def most_children(self) -> int:
        """Tokens that the source chooses from: no node can have more children."""

    def propose_trees(self, policy: DraftPolicy, scope: Scope, step: StepOutput) -> Drafted:
        """Bring the source up to date with a step's tokens, then draft a tree for whom ``scope`` says."""

    def prepare(self) -> None:
        """What the first draft would otherwise have to wait for; called at the engine's start."""

    def time_pass(self, num_rows: int) -> None:
        """What a level of so many rows takes, on dummy inputs."""

    def silent(self) -> AbstractContextManager[None]:
        """Dummy runs of the target leave the drafter out: they are timed."""

    def weights_changed(self) -> None:
        """Weights of the source, or of the target that it shares, were loaded again: copies are made anew."""

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
