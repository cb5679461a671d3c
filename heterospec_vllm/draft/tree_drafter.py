# SPDX-License-Identifier: Apache-2.0
"""TreeDrafter: how an EAGLE-3 head drafts token trees for a whole batch, one forward pass a level, on any runner.

The first pass feeds the head accepted tokens (target features and the token that followed each), so its KV pages hold
accepted tokens only. Every further level expands the nodes that the policy names. How a pass is run is the business of
the model runner: ``eagle_v1.py`` for V1, ``eagle_v2.py`` for V2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.draft.accepted_tokens import (
    AcceptedTokens,
    context_offsets,
    gather_rows,
    parts_of,
    requests_of,
    slots_of,
    without_start,
)
from heterospec_vllm.draft.aux_fusion import AuxFusion
from heterospec_vllm.draft.base import Draft, Drafted, StepOutput
from heterospec_vllm.draft.growth import Frontier, grow
from heterospec_vllm.draft.progress import HeadProgress
from heterospec_vllm.draft.reading import HeadReader
from heterospec_vllm.policy.base import Batch, DraftPlan, DraftPolicy, Scope
from heterospec_vllm.policy.decisions import in_beam
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.masks import Constraints, Path, TokenMasks, put_only_tokens
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees


class HeadInputs(Protocol):
    """Buffers of one scheduler budget of tokens."""

    input_ids: torch.Tensor  # [max_num_tokens]
    positions: torch.Tensor  # [max_num_tokens]


class TreeDrafter:
    """Grows trees level by level. A subclass, which is also vLLM's proposer or speculator, says how a pass is run."""

    num_speculative_tokens: int
    max_num_tokens: int
    max_model_len: int
    model: Any
    device: torch.device
    vllm_config: VllmConfig
    hidden_states: torch.Tensor  # [max_num_tokens, hidden_size]

    def start_drafting(self) -> None:
        """To be called once by the subclass's constructor."""
        self._silent = False
        self.reader: HeadReader | None = None  # once the size of the KV cache is known

    # ---- what a model runner's side provides

    def _first_pass_of(self, tokens: AcceptedTokens) -> HeadContext:
        """Run the head over accepted tokens that fit its buffers, their KV into its pages."""
        raise NotImplementedError

    @property
    def _head_inputs(self) -> HeadInputs:
        """vLLM's buffers that a pass of the head reads, beside ``hidden_states``."""
        raise NotImplementedError

    def _head_block_size(self) -> int:
        """Tokens of a KV block of the head."""
        raise NotImplementedError

    def _most_expanded(self, plan: DraftPlan, num_reqs: int) -> int:
        """Most nodes of a request that are expanded in one level."""
        raise NotImplementedError

    def _begin_levels(self, num_rows: int) -> None:
        """A new tree: at most so many nodes will be expanded for the batch."""
        raise NotImplementedError

    def _forward_level(
        self,
        frontier: Frontier,
        hidden: torch.Tensor,  # [num_rows, hidden_size] output for the parents
        context: HeadContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the head over a frontier: (normed output, output)."""
        raise NotImplementedError

    def _top_children(
        self,
        normed: torch.Tensor,  # [num_rows, hidden_size]
        top_k: int,
        masks: TokenMasks | None = None,
    ) -> tuple[Ints, Floats]:
        """The ``top_k`` likeliest allowed next tokens of each row (target ids) and their log-probabilities."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What the first draft would otherwise have to wait for; called at the engine's start."""

    def weights_changed(self) -> None:
        """Weights of the head, or of the target that it shares, were loaded again: copies are made anew."""
        self.__dict__.pop("_fuse_aux", None)

    @property
    def most_children(self) -> int:
        """Tokens that the head chooses from: no node can have more children."""
        return self.model.logits_processor.org_vocab_size

    def time_pass(self, num_rows: int) -> None:
        """What a level of so many rows takes, on dummy inputs and without attention."""
        normed, _ = self._run_head(num_rows, None, {})
        self._top_children(normed, min(8, self.most_children))

    # ---- a draft

    def _run_head(
        self,
        num_tokens: int,
        layer_metadata: dict[str, object] | None,  # None: a dummy pass without attention
        slots: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One head pass over the input buffers: (normed output for the logits, output fed to the next level)."""
        inputs = self._head_inputs
        with (
            CLOCK.span("head forward"),
            set_forward_context(
                layer_metadata, self.vllm_config, num_tokens=num_tokens, slot_mapping=slots
            ),
        ):
            return self.model(
                input_ids=inputs.input_ids[:num_tokens],
                positions=inputs.positions[:num_tokens],
                hidden_states=self.hidden_states[:num_tokens],
                inputs_embeds=None,
            )

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Dummy runs of the target leave the head out: they are timed."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def start_reading(self, num_blocks: int, block_size: int) -> None:
        """To be called when the KV cache is there: the head has read nothing of it."""
        self.reader = HeadReader(HeadProgress(num_blocks, block_size))

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
        if self.reader is not None:
            self.reader.progress.remove(req_id)

    @torch.inference_mode()
    def propose_trees(self, policy: DraftPolicy, scope: Scope, step: StepOutput) -> Drafted:
        """Bring the head's KV up to date with the step's tokens, then draft a tree for some of the requests."""
        assert self.reader is not None
        feed = self.reader.feed(policy, scope, step)
        tokens = feed.tokens
        if tokens is None:
            return Drafted(feed.reading)
        drafting = np.flatnonzero(feed.limits > 0)  # among those that are read
        ledger = PassLedger(policy, len(tokens.token_ids), tokens.num_tokens.size)
        with CLOCK.span("draft: accepted tokens"):
            context = self._first_pass(tokens)
        ledger.end_first_pass()
        if not drafting.size:
            if self.device.type == "cpu":  # elsewhere the pass was launched, not timed
                ledger.teach_reading()
            return Drafted(feed.reading, head_passes=1)
        if drafting.size < context.seq_lens.shape[0]:
            context = context.take(torch.from_numpy(drafting))
        places = feed.places[drafting]
        batch = Batch(
            num_reqs=len(step.req_ids),
            context=step.tokens.context,
            kinds=step.kinds[places],
            limits=feed.limits[drafting],
        )
        plan = policy.plan(batch, scope)
        with CLOCK.span("draft: levels"):
            head = _Levels(self, plan, context, _paths_of(step, places))
            growth = grow(policy, plan, head, ledger)
        with CLOCK.span("draft: cut the tree"):
            ranked = growth.pool.ranked(self.num_speculative_tokens)
            seconds = ledger.seconds()
        with CLOCK.span("policy"):
            num_nodes = plan.propose(ranked.survivals, seconds)
        with CLOCK.span("draft: cut the tree"):
            trees = DraftTrees.from_pool(growth.pool, num_nodes, ranked)
        draft = Draft(
            plan=plan,
            places=places,
            pool=growth.pool,
            num_candidates=ranked.num_present,
            trees=trees,
            num_levels=len(growth.rows),
            seconds=seconds,
            tokens=tokens,
            drafting=drafting,
        )
        return Drafted(feed.reading, draft, head_passes=1 + draft.num_levels)

    def _first_pass(self, tokens: AcceptedTokens) -> HeadContext:
        fits = len(tokens.token_ids) <= self.max_num_tokens
        return self._first_pass_of(tokens) if fits else self._in_parts(tokens)

    def _in_parts(self, tokens: AcceptedTokens) -> HeadContext:
        """The first pass over more tokens than the head's buffers hold."""
        tokens = self._shortened(tokens)
        parts = parts_of(tokens.num_tokens, self.max_num_tokens)
        contexts = [self._first_pass_of(requests_of(tokens, part)) for part in parts]
        return HeadContext(
            *(torch.cat([getattr(c, f.name) for c in contexts]) for f in fields(HeadContext))
        )

    def _shortened(self, tokens: AcceptedTokens) -> AcceptedTokens:
        """Runs the head over the starts of requests that are longer than its buffers and returns what is left."""
        most = self.max_num_tokens
        for req in np.flatnonzero(tokens.num_tokens > most).tolist():
            alone = requests_of(tokens, slice(req, req + 1))
            for start in range(0, int(tokens.num_tokens[req]) - most, most):
                rows = slice(start, start + most)
                self._first_pass_of(
                    AcceptedTokens(
                        token_ids=alone.token_ids[rows],
                        positions=alone.positions[rows],
                        features=alone.features[rows],
                        num_tokens=np.array([most]),
                        next_token_ids=alone.token_ids[rows.stop : rows.stop + 1].int(),
                        block_table=alone.block_table,
                        context_starts=alone.context_starts,
                    )
                )
            tokens = without_start(tokens, req, rows.stop)
        return tokens

    @cached_property
    def _fuse_aux(self) -> AuxFusion:
        return AuxFusion(self.model)

    def _accepted_token_metadata(self, tokens: AcceptedTokens) -> CommonAttentionMetadata:
        """Causal metadata over the accepted tokens behind their requests' contexts."""
        num_tokens = tokens.num_tokens
        start = np.concatenate([[0], tokens.ends])
        query_start_loc = torch.from_numpy(start).int()
        seq_lens = (context_offsets(tokens)[torch.from_numpy(start[1:] - 1)] + 1).int()
        seq_lens_cpu = seq_lens.cpu()
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(self.device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=num_tokens.size,
            num_actual_tokens=int(start[-1]),
            max_query_len=int(num_tokens.max()),
            max_seq_len=int(seq_lens_cpu.max()),
            block_table_tensor=tokens.block_table,
            slot_mapping=slots_of(tokens, self._head_block_size()),
            causal=True,
        )


class _Paths:
    """The path of every row of the latest level, where some request has a grammar."""

    def __init__(self, constraints: Constraints, req_ids: list[str]) -> None:
        self._constraints = constraints
        self._req_ids = req_ids  # [num_drafting]
        self._paths: list[Path] = [()] * len(req_ids)  # [num_rows]

    def masks_of(self, frontier: Frontier) -> TokenMasks | None:
        """What may follow the rows of a frontier, one level below the one before."""
        if frontier.level > 0:
            rows = zip(frontier.parent_rows.tolist(), frontier.tokens.tolist(), strict=True)
            self._paths = [(*self._paths[parent], token) for parent, token in rows]
        req_ids = [self._req_ids[req] for req in frontier.reqs.tolist()]
        return self._constraints.masks_behind(req_ids, self._paths)


def _paths_of(step: StepOutput, places: Ints) -> _Paths | None:
    if step.constraints is None:
        return None
    return _Paths(step.constraints, [step.req_ids[place] for place in places.tolist()])


class _Levels:
    """The head of one draft: the children of a frontier's rows (``growth.DraftHead``)."""

    def __init__(
        self, drafter: TreeDrafter, plan: DraftPlan, context: HeadContext, paths: _Paths | None
    ) -> None:
        self._drafter = drafter
        self._plan = plan
        self._context = context
        self._paths = paths
        # [num_rows, hidden_size] output for the rows of the latest pass
        self._hidden = context.hidden
        self._num_reqs = context.seq_lens.shape[0]
        self._most = drafter._most_expanded(plan, self._num_reqs)

    def children(self, frontier: Frontier) -> tuple[Ints, Floats]:
        normed = self._context.normed
        if frontier.level > 0:
            if frontier.level == 1:
                levels = self._plan.max_depth - 1
                self._drafter._begin_levels(self._num_reqs * self._most * levels)
            above = gather_rows([self._hidden], frontier.parent_rows)
            normed, self._hidden = self._drafter._forward_level(frontier, above, self._context)
        masks = None if self._paths is None else self._paths.masks_of(frontier)
        tokens, log_probs = self._drafter._top_children(normed, self._plan.top_k, masks)
        if masks is not None:
            put_only_tokens(masks, tokens, log_probs)
        return tokens, log_probs

    def within_reach(self, chosen: Bools, level_pool: CandidatePool) -> Bools:
        """The likeliest ones, as many as the buffers of a pass hold."""
        if chosen.shape[1] <= self._most or chosen.sum(axis=1).max() <= self._most:
            return chosen
        return chosen & in_beam(np.where(chosen, level_pool.log_probs, -np.inf), self._most)


class PassLedger:
    """Times the head's passes of one draft and tells the policy what they took (``growth.DraftLedger``)."""

    def __init__(self, policy: DraftPolicy, num_tokens: int, num_reqs: int) -> None:
        """The first pass begins, over ``num_tokens`` tokens of ``num_reqs`` requests."""
        self._policy = policy
        self._num_tokens, self._num_reqs = num_tokens, num_reqs
        self._start = self._level_start = time.perf_counter()
        self._first_pass_seconds = 0.0

    def end_first_pass(self) -> None:
        """The tokens are read; their logits are not computed yet."""
        self._level_start = time.perf_counter()
        self._first_pass_seconds = self._level_start - self._start

    def teach_reading(self) -> None:
        """Nobody is drafted for after the first pass."""
        self._policy.observe_reading(self._num_tokens, self._num_reqs, self._first_pass_seconds)

    def begin_level(self) -> None:
        self._level_start = time.perf_counter()

    def end_level(self, depth: int, num_rows: int) -> None:
        seconds = time.perf_counter() - self._level_start
        if depth > 1:
            self._policy.observe_level(num_rows, seconds)
            return
        self._first_pass_seconds += seconds
        self._policy.observe_first_pass(self._num_tokens, self._first_pass_seconds)
        self.teach_reading()

    def seconds(self) -> float:
        """Seconds since the draft began."""
        return time.perf_counter() - self._start


@dataclass(frozen=True)
class HeadContext:
    """What the first pass leaves for the levels: the prefix in the pages and the root's output."""

    seq_lens: torch.Tensor  # [num_reqs] int32, accepted tokens in the head's context
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32, from where it begins
    normed: torch.Tensor  # [num_reqs, hidden_size] for the logits of level 1
    hidden: torch.Tensor  # [num_reqs, hidden_size] fed back into level 1
    positions: torch.Tensor  # [num_reqs] of each request's last accepted token

    def take(self, reqs: torch.Tensor) -> HeadContext:
        """The context of some requests."""
        return HeadContext(*(getattr(self, f.name)[reqs] for f in fields(self)))
