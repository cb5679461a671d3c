# SPDX-License-Identifier: Apache-2.0
"""HeteroSpecProposer: an EAGLE-3 head that drafts token trees for a whole batch, one forward pass a level.

The first pass feeds the head true tokens (target features and the token that followed each), so its KV pages hold true
tokens only. Every further level expands the nodes that the policy names; their keys and values live in a scratch
outside the pages: nothing of a tree ever has to be undone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from heterospec_vllm import level_loops
from heterospec_vllm.attention.cpu import DraftLevelMetadata
from heterospec_vllm.growth import Parents, children_of, level_of
from heterospec_vllm.policies import Batch, DraftPolicy
from heterospec_vllm.policy import Bools, in_beam
from heterospec_vllm.taps import TapFusion
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree import CandidatePool, DraftTrees, Floats, Ints
from heterospec_vllm.true_tokens import (
    TrueTokens,
    parts_of,
    requests_of,
    slots_of,
    without_start,
)


@dataclass(frozen=True)
class Draft:
    """What one draft produced: the candidates, the trees cut out of them, and how far it went."""

    pool: CandidatePool
    trees: DraftTrees
    num_levels: int  # beyond the first
    seconds: float


@dataclass
class _Frontier:
    """The nodes of one level that are expanded next, and the head's rows that stand for them, request by request."""

    slots: Ints  # [num_reqs, width] their candidate column in the level, NO_ROW padded
    rows: Ints  # [num_reqs, width] their row in the head's batch, NO_ROW padded
    reqs: torch.Tensor  # [num_rows] request of each row
    tokens: torch.Tensor  # [num_rows]
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    hidden: torch.Tensor  # [num_rows, hidden_size] output for their parents
    tail: torch.Tensor  # [num_rows, level - 1] scratch rows of their ancestors

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]


class HeteroSpecProposer(EagleProposer):
    """Drafts trees with vLLM's own EAGLE-3 proposer: its loading, weight sharing, buffers and first pass."""

    num_speculative_tokens: int

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._scratch: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.first_pass_seconds = 0.0  # of the latest first pass
        self._first_pass_tokens = 0
        self._silent = False

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Warm up with two passes instead of one per speculative token."""
        if self._silent:
            return
        num_speculative_tokens = self.num_speculative_tokens
        self.num_speculative_tokens = min(2, num_speculative_tokens)
        try:
            super().dummy_run(num_tokens, *args, **kwargs)
        finally:
            self.num_speculative_tokens = num_speculative_tokens

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
            return None
        if drafting.size < context.seq_lens.shape[0]:
            context = context.take(torch.from_numpy(drafting))
        start = time.perf_counter() - self.first_pass_seconds
        with CLOCK.span("draft: levels"):
            levels = self._expand(policy, batch, context)
        with CLOCK.span("draft: cut the tree"):
            pool = CandidatePool.concatenate(levels) if len(levels) > 1 else levels[0]
            order = pool.order(self.num_speculative_tokens)
            survivals = pool.survivals[np.arange(order.shape[0])[:, None], order]
            seconds = time.perf_counter() - start
            num_nodes = policy.propose(batch, survivals, seconds)
            trees = DraftTrees.from_pool(pool, num_nodes, order)
        return Draft(pool, trees, len(levels) - 1, seconds)

    def _first_pass(self, tokens: TrueTokens) -> _HeadContext:
        """Runs over the true tokens in parts that fit the head's buffers."""
        start = time.perf_counter()
        self._first_pass_tokens = int(tokens.num_tokens.sum())
        tokens = self._shortened(tokens)
        parts = parts_of(tokens.num_tokens, self.max_num_tokens)
        contexts = [self._first_pass_of(requests_of(tokens, part)) for part in parts]
        self.first_pass_seconds = time.perf_counter() - start
        if len(contexts) == 1:
            return contexts[0]
        return _HeadContext(
            *(torch.cat([getattr(c, f.name) for c in contexts]) for f in fields(_HeadContext))
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
                    )
                )
            tokens = without_start(tokens, req, rows.stop)
        return tokens

    def _first_pass_of(self, tokens: TrueTokens) -> _HeadContext:
        num_tokens, last_rows, cad = self.set_inputs_first_pass(
            target_token_ids=tokens.token_ids,
            next_token_ids=tokens.next_token_ids,
            target_positions=tokens.positions,
            target_hidden_states=self._fuse_taps(tokens.features),
            token_indices_to_sample=None,
            cad=self._true_token_metadata(tokens),
            num_rejected_tokens_gpu=None,
        )
        _, layer_metadata = self.build_per_group_and_layer_attn_metadata(cad)
        slots = self._get_slot_mapping(num_tokens, cad.slot_mapping)
        last_hidden, hidden = self._run_head(num_tokens, layer_metadata, slots)
        last = last_rows.long()
        return _HeadContext(
            seq_lens=cad.seq_lens,
            block_table=cad.block_table_tensor,
            normed=last_hidden[last],
            hidden=hidden[last],
            positions=self.positions[last],
        )

    @cached_property
    def _fuse_taps(self) -> TapFusion:
        return TapFusion(self.model)

    def _true_token_metadata(self, tokens: TrueTokens) -> CommonAttentionMetadata:
        """Causal metadata over the true tokens; a token's slot follows from its position."""
        num_tokens = tokens.num_tokens
        start = np.zeros(num_tokens.size + 1, dtype=np.int64)
        np.cumsum(num_tokens, out=start[1:])
        query_start_loc = torch.from_numpy(start).int()
        seq_lens = (tokens.positions[torch.from_numpy(start[1:] - 1)] + 1).int()
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(self.device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens.cpu(),
            num_reqs=num_tokens.size,
            num_actual_tokens=int(start[-1]),
            max_query_len=int(num_tokens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=tokens.block_table,
            slot_mapping=slots_of(tokens, self.block_size),
            causal=True,
        )

    def _run_head(
        self,
        num_tokens: int,
        layer_metadata: dict[str, object] | None,  # None: a dummy pass without attention
        slots: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One head pass over the input buffers: (normed output for the logits, output fed to the next level)."""
        with (
            CLOCK.span("head forward"),
            set_forward_context(
                layer_metadata, self.vllm_config, num_tokens=num_tokens, slot_mapping=slots
            ),
        ):
            return self.model(
                input_ids=self.input_ids[:num_tokens],
                positions=self.positions[:num_tokens],
                hidden_states=self.hidden_states[:num_tokens],
                inputs_embeds=None,
            )

    def _expand(
        self, policy: DraftPolicy, batch: Batch, context: _HeadContext
    ) -> list[CandidatePool]:
        """Grow the candidates level by level, from the nodes that the policy finds worth it."""
        num_reqs, top_k = context.seq_lens.shape[0], policy.shape.top_k
        parent = Parents.roots(num_reqs)
        rows = np.arange(num_reqs)[:, None]
        normed, hidden = context.normed, context.hidden
        tail = torch.empty((num_reqs, 0), dtype=torch.int64)
        # vLLM's head buffers hold one scheduler budget of tokens.
        most = min(policy.beam, self.max_num_tokens // num_reqs)
        pools: list[CandidatePool] = []
        meta_entropies = np.zeros(num_reqs, dtype=np.float32)
        scratch = None
        pool_size, first_row, depth, start = 0, 0, 0, 0.0
        while True:
            depth += 1
            if depth == 1:
                start = time.perf_counter()
            tokens, local = self._top_children(normed, top_k)
            level_pool = children_of(policy, batch, depth, parent, rows, tokens, local)
            pools.append(level_pool)
            seconds = time.perf_counter() - start
            if depth == 1:
                self.first_pass_seconds += seconds
                policy.observe_first_pass(self._first_pass_tokens, self.first_pass_seconds)
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
            level = level_of(policy, depth, level_pool, parent, meta_entropies)
            chosen = policy.expand(batch, level)
            frontier = self._frontier(chosen, level_pool, rows, hidden, tail, most)
            if not frontier.num_rows:
                break
            if scratch is None:
                scratch = self._scratch_for(num_reqs * most * (policy.max_depth - 1))
            normed, hidden, tail = self._forward_level(depth, first_row, frontier, context, scratch)
            first_row += frontier.num_rows
            parent = Parents.of(frontier.slots, level_pool, pool_size)
            rows = frontier.rows
            pool_size += level_pool.tokens.shape[1]
        return pools

    def _frontier(
        self,
        chosen: Bools,  # [num_reqs, num_candidates]
        level_pool: CandidatePool,
        rows: Ints,  # [num_reqs, width] head rows of the level's parents
        hidden: torch.Tensor,  # [num_parent_rows, hidden_size]
        tail: torch.Tensor,  # [num_parent_rows, level - 1]
        most: int,  # nodes of a request
    ) -> _Frontier:
        """The chosen candidates packed to the left, with what the head needs of their parents."""
        if chosen.sum(axis=1).max() > most:
            chosen = chosen & in_beam(np.where(chosen, level_pool.log_probs, -np.inf), most)
        slots, own_rows, reqs, parents, tokens, start = level_loops.frontier(
            chosen, rows, level_pool.tokens
        )
        parent_rows = torch.from_numpy(parents)
        return _Frontier(
            slots=slots,
            rows=own_rows,
            reqs=torch.from_numpy(reqs),
            tokens=torch.from_numpy(tokens),
            query_start_loc=torch.from_numpy(start),
            hidden=hidden[parent_rows],
            tail=tail[parent_rows],
        )

    def _top_children(
        self,
        normed: torch.Tensor,  # [num_rows, hidden_size]
        top_k: int,
    ) -> tuple[Ints, Floats]:
        """The ``top_k`` likeliest next tokens of each row (target ids) and their log-probabilities."""
        with CLOCK.span("head logits"):
            logits = self.model.logits_processor(self.model.lm_head, normed)
        with CLOCK.span("head top-k"):
            log_probs, draft_ids = logits.float().log_softmax(dim=-1).topk(top_k, dim=-1)
        offsets = self.model.draft_id_to_target_id
        tokens = draft_ids if offsets is None else draft_ids + offsets[draft_ids]
        return tokens.numpy(), log_probs.numpy()

    def _forward_level(
        self,
        level: int,
        first_row: int,  # of the scratch
        frontier: _Frontier,
        context: _HeadContext,
        scratch: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the head over a frontier: (normed output, output, scratch rows of each node and its ancestors)."""
        num_tokens = frontier.num_rows
        own = torch.arange(first_row, first_row + num_tokens)[:, None]
        tail = torch.cat([frontier.tail, own], dim=1)
        # The rotary table ends at the model's length; a draft beyond it is never scheduled.
        positions = (context.positions + level).clamp(max=self.max_model_len - 1)
        self.input_ids[:num_tokens] = frontier.tokens
        self.positions[:num_tokens] = positions[frontier.reqs]
        self.hidden_states[:num_tokens] = frontier.hidden
        metadata = DraftLevelMetadata(
            query_start_loc=frontier.query_start_loc,
            context_lens=context.seq_lens,
            block_table=context.block_table,
            tail_index=tail.int(),
            scratch_rows=slice(first_row, first_row + num_tokens),
            scratch=scratch,
        )
        layer_metadata: dict[str, object] = dict.fromkeys(self._draft_attn_layer_names, metadata)
        normed, hidden = self._run_head(num_tokens, layer_metadata, slots={})
        return normed, hidden, tail

    def _scratch_for(self, num_rows: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Per head layer a key and a value scratch of at least ``num_rows`` rows; grows, never shrinks."""
        for name in self._draft_attn_layer_names:
            held = self._scratch.get(name)
            if held is None or held[0].shape[0] < num_rows:
                layer = self.vllm_config.compilation_config.static_forward_context[name]
                shape = (num_rows, layer.num_kv_heads, layer.head_size)
                dtype = layer.kv_cache.dtype
                self._scratch[name] = (
                    torch.zeros(shape, dtype=dtype),
                    torch.zeros(shape, dtype=dtype),
                )
        return self._scratch


@dataclass(frozen=True)
class _HeadContext:
    """What the first pass leaves for the levels: the prefix in the pages and the root's output."""

    seq_lens: torch.Tensor  # [num_reqs] int32, true tokens in the head's pages
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    normed: torch.Tensor  # [num_reqs, hidden_size] for the logits of level 1
    hidden: torch.Tensor  # [num_reqs, hidden_size] fed back into level 1
    positions: torch.Tensor  # [num_reqs] of each request's last true token

    def take(self, reqs: torch.Tensor) -> _HeadContext:
        """The context of some requests."""
        return _HeadContext(*(getattr(self, f.name)[reqs] for f in fields(self)))
