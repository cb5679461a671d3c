# SPDX-License-Identifier: Apache-2.0
"""TreeDrafter: how an EAGLE-3 head drafts token trees for a whole batch, one forward pass a level, on any runner.

The first pass feeds the head true tokens (target features and the token that followed each), so its KV pages hold true
tokens only. Every further level expands the nodes that the policy names. How a pass is run is the business of the
model runner: ``draft/eagle_v1.py`` for V1, ``draft/eagle_v2.py`` for V2.
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

from heterospec_vllm.arrays import Bools, Floats, Ints, Ints32
from heterospec_vllm.draft.growth import Parents, children_of, frontier, level_of
from heterospec_vllm.draft.taps import TapFusion
from heterospec_vllm.draft.true_tokens import (
    TrueTokens,
    context_offsets,
    gather_rows,
    parts_of,
    requests_of,
    slots_of,
    without_start,
)
from heterospec_vllm.policy.base import Batch, DraftPolicy
from heterospec_vllm.policy.decisions import in_beam
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees


@dataclass(frozen=True)
class Draft:
    """What one draft produced: the candidates, the trees cut out of them, and how far it went."""

    pool: CandidatePool
    num_candidates: int  # in the pool
    trees: DraftTrees
    num_levels: int  # beyond the first
    seconds: float


@dataclass
class Frontier:
    """The nodes of one level that are expanded next, and the head's rows that stand for them, request by request."""

    parents: Parents  # [num_reqs, width] the nodes as their children need them
    rows: Ints  # [num_reqs, width] their row in the head's batch, NO_ROW padded
    reqs: Ints  # [num_rows] request of each row
    tokens: torch.Tensor  # [num_rows]
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    hidden: torch.Tensor  # [num_rows, hidden_size] output for their parents
    tail: Ints32  # [num_rows, level] rows, over all levels, of their ancestors and of themselves

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]


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
        self.first_pass_seconds = 0.0  # of the latest first pass
        self._first_pass_size = 0, 0  # its tokens and requests
        self._silent = False

    # ---- what a model runner's side provides

    def _first_pass_of(self, tokens: TrueTokens) -> HeadContext:
        """Run the head over true tokens that fit its buffers, their KV into its pages."""
        raise NotImplementedError

    @property
    def _head_inputs(self) -> HeadInputs:
        """vLLM's buffers that a pass of the head reads, beside ``hidden_states``."""
        raise NotImplementedError

    def _head_block_size(self) -> int:
        """Tokens of a KV block of the head."""
        raise NotImplementedError

    def _most_expanded(self, policy: DraftPolicy, num_reqs: int) -> int:
        """Most nodes of a request that are expanded in one level."""
        raise NotImplementedError

    def _begin_levels(self, num_rows: int) -> None:
        """A new tree: at most so many nodes will be expanded for the batch."""
        raise NotImplementedError

    def _forward_level(
        self, level: int, first_row: int, frontier: Frontier, context: HeadContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the head over a frontier: (normed output, output).

        first_row: nodes expanded in the levels before, which are the first rows.
        """
        raise NotImplementedError

    def _top_children(
        self,
        normed: torch.Tensor,  # [num_rows, hidden_size]
        top_k: int,
    ) -> tuple[Ints, Floats]:
        """The ``top_k`` likeliest next tokens of each row (target ids) and their log-probabilities."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What the first draft would otherwise have to wait for; called at the engine's start."""

    def time_pass(self, num_rows: int) -> None:
        """What a level of so many rows takes, on dummy inputs and without attention."""
        normed, _ = self._run_head(num_rows, None, {})
        self._top_children(normed, 8)

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

    @torch.inference_mode()
    def propose_trees(
        self,
        policy: DraftPolicy,
        batch: Batch,  # the requests to draft for
        drafting: Ints,  # [num_drafting] their places among those of ``true_tokens``
        true_tokens: TrueTokens,
    ) -> Draft | None:
        """Bring the head's KV up to date with the true tokens, then draft a tree for some of the requests."""
        with CLOCK.span("draft: true tokens"):
            context = self._first_pass(true_tokens)
        if not drafting.size:
            if self.device.type == "cpu":  # elsewhere the pass was launched, not timed
                policy.observe_reading(*self._first_pass_size, self.first_pass_seconds)
            return None
        if drafting.size < context.seq_lens.shape[0]:
            context = context.take(torch.from_numpy(drafting))
        start = time.perf_counter() - self.first_pass_seconds
        with CLOCK.span("draft: levels"):
            levels = self._expand(policy, batch, context)
        with CLOCK.span("draft: cut the tree"):
            pool = CandidatePool.concatenate(levels)
            ranked = pool.ranked(self.num_speculative_tokens)
            seconds = time.perf_counter() - start
        with CLOCK.span("policy"):
            num_nodes = policy.propose(batch, ranked.survivals, seconds)
        with CLOCK.span("draft: cut the tree"):
            trees = DraftTrees.from_pool(pool, num_nodes, ranked)
        return Draft(pool, ranked.num_present, trees, len(levels) - 1, seconds)

    def _first_pass(self, tokens: TrueTokens) -> HeadContext:
        start = time.perf_counter()
        self._first_pass_size = len(tokens.token_ids), tokens.num_tokens.size
        fits = len(tokens.token_ids) <= self.max_num_tokens
        context = self._first_pass_of(tokens) if fits else self._in_parts(tokens)
        self.first_pass_seconds = time.perf_counter() - start
        return context

    def _in_parts(self, tokens: TrueTokens) -> HeadContext:
        """The first pass over more tokens than the head's buffers hold."""
        tokens = self._shortened(tokens)
        parts = parts_of(tokens.num_tokens, self.max_num_tokens)
        contexts = [self._first_pass_of(requests_of(tokens, part)) for part in parts]
        return HeadContext(
            *(torch.cat([getattr(c, f.name) for c in contexts]) for f in fields(HeadContext))
        )

    def _shortened(self, tokens: TrueTokens) -> TrueTokens:
        """Runs the head over the starts of requests that are longer than its buffers and returns what is left."""
        most = self.max_num_tokens
        for req in np.flatnonzero(tokens.num_tokens > most).tolist():
            alone = requests_of(tokens, slice(req, req + 1))
            for start in range(0, int(tokens.num_tokens[req]) - most, most):
                rows = slice(start, start + most)
                self._first_pass_of(
                    TrueTokens(
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
    def _fuse_taps(self) -> TapFusion:
        return TapFusion(self.model)

    def _true_token_metadata(self, tokens: TrueTokens) -> CommonAttentionMetadata:
        """Causal metadata over the true tokens behind their requests' contexts."""
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

    def _expand(
        self, policy: DraftPolicy, batch: Batch, context: HeadContext
    ) -> list[CandidatePool]:
        """Grow the candidates level by level, from the nodes that the policy finds worth it."""
        num_reqs, top_k = context.seq_lens.shape[0], policy.shape.top_k
        parent = Parents.roots(num_reqs)
        rows = np.arange(num_reqs)[:, None]
        normed, hidden = context.normed, context.hidden
        tail = np.empty((num_reqs, 0), dtype=np.int32)
        most = self._most_expanded(policy, num_reqs)
        pools: list[CandidatePool] = []
        meta_entropies = np.zeros(num_reqs, dtype=np.float32)
        pool_size, first_row, depth, start = 0, 0, 0, 0.0
        while True:
            depth += 1
            if depth == 1:
                start = time.perf_counter()
            tokens, local = self._top_children(normed, top_k)
            with CLOCK.span("policy"):
                level_pool = children_of(policy, batch, depth, parent, rows, tokens, local)
            pools.append(level_pool)
            seconds = time.perf_counter() - start
            if depth == 1:
                self.first_pass_seconds += seconds
                policy.observe_first_pass(self._first_pass_size[0], self.first_pass_seconds)
                policy.observe_reading(*self._first_pass_size, self.first_pass_seconds)
            else:
                policy.observe_level(len(normed), seconds)
                shape = (*rows.shape, top_k)
                policy.observe_children(
                    batch, depth - 1, parent.strata, parent.survivals,
                    level_pool.survivals.reshape(shape),
                )  # fmt: skip
            if depth >= policy.max_depth:
                break
            start = time.perf_counter()
            with CLOCK.span("policy"):
                level = level_of(policy, depth, level_pool, parent, meta_entropies)
                chosen = policy.expand(batch, level)
            frontier = self._frontier(
                chosen, level_pool, pool_size, rows, hidden, tail, first_row, most
            )
            if not frontier.num_rows:
                break
            if not first_row:
                self._begin_levels(num_reqs * most * (policy.max_depth - 1))
            normed, hidden = self._forward_level(depth, first_row, frontier, context)
            tail = frontier.tail
            first_row += frontier.num_rows
            parent, rows = frontier.parents, frontier.rows
            pool_size += level_pool.tokens.shape[1]
        return pools

    def _frontier(
        self,
        chosen: Bools,  # [num_reqs, num_candidates]
        level_pool: CandidatePool,
        first_column: int,  # of the level in the pool
        rows: Ints,  # [num_reqs, width] head rows of the level's parents
        hidden: torch.Tensor,  # [num_parent_rows, hidden_size]
        tail: Ints32,  # [num_parent_rows, level - 1]
        first_row: int,
        most: int,  # nodes of a request
    ) -> Frontier:
        """The chosen candidates packed to the left, with what the head needs of their parents."""
        if chosen.shape[1] > most and chosen.sum(axis=1).max() > most:
            chosen = chosen & in_beam(np.where(chosen, level_pool.log_probs, -np.inf), most)
        *of_parents, own_rows, reqs, above, tokens, start, new_tail = frontier(
            chosen,
            rows,
            level_pool.tokens,
            level_pool.log_probs,
            level_pool.survivals,
            level_pool.entropies,
            level_pool.strata,
            first_column,
            tail,
            first_row,
        )
        return Frontier(
            parents=Parents(*of_parents),
            rows=own_rows,
            reqs=reqs,
            tokens=torch.from_numpy(tokens),
            query_start_loc=torch.from_numpy(start),
            hidden=gather_rows([hidden], above),
            tail=new_tail,
        )


@dataclass(frozen=True)
class HeadContext:
    """What the first pass leaves for the levels: the prefix in the pages and the root's output."""

    seq_lens: torch.Tensor  # [num_reqs] int32, true tokens in the head's context
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32, from where it begins
    normed: torch.Tensor  # [num_reqs, hidden_size] for the logits of level 1
    hidden: torch.Tensor  # [num_reqs, hidden_size] fed back into level 1
    positions: torch.Tensor  # [num_reqs] of each request's last true token

    def take(self, reqs: torch.Tensor) -> HeadContext:
        """The context of some requests."""
        return HeadContext(*(getattr(self, f.name)[reqs] for f in fields(self)))
