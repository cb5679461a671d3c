# SPDX-License-Identifier: Apache-2.0
"""HeteroSpecProposer: an EAGLE-3 head that drafts token trees for a whole batch, one forward pass a level.

The first pass feeds the head the true tokens of the step (target features and the token that followed each), so
its KV pages hold true tokens only. Every further level expands tree nodes whose keys and values live in a scratch
outside the pages: nothing of a tree ever has to be undone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from heterospec_vllm.attention.cpu import DraftLevelMetadata
from heterospec_vllm.policy import TreeShape
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree import NO_ROW, CandidatePool, DraftTrees, Ints


@dataclass(frozen=True)
class TrueTokens:
    """The tokens of a step that are now part of their requests' text, request by request, in text order."""

    token_rows: torch.Tensor  # [num_tokens] int64, their rows in the target's step
    num_tokens: Ints  # [num_reqs]
    next_token_ids: torch.Tensor  # [num_reqs] int32, the token that follows each request's last one


@dataclass
class _Frontier:
    """The nodes of one level that are expanded next; column ``w`` of request ``r`` is head row ``r * width + w``."""

    columns: Ints  # [num_reqs, width] their pool columns
    tokens: torch.Tensor  # [num_reqs, width]
    scores: torch.Tensor  # [num_reqs, width] cumulative log-probability
    hidden: torch.Tensor  # [num_reqs * width, hidden_size] the parents' head output
    tail: torch.Tensor  # [num_reqs, width, level - 1] scratch rows of their ancestors


class HeteroSpecProposer(EagleProposer):
    """Drafts trees with vLLM's own EAGLE-3 proposer: its loading, weight sharing, buffers and first pass."""

    num_speculative_tokens: int

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._scratch: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Warm up with two passes instead of one per speculative token."""
        num_speculative_tokens = self.num_speculative_tokens
        self.num_speculative_tokens = min(2, num_speculative_tokens)
        try:
            super().dummy_run(num_tokens, *args, **kwargs)
        finally:
            self.num_speculative_tokens = num_speculative_tokens

    @torch.inference_mode()
    def propose_trees(
        self,
        shape: TreeShape,
        max_nodes: Ints,  # [num_reqs] most nodes of each request, 0 = none
        true_tokens: TrueTokens,
        target_token_ids: torch.Tensor,  # [num_step_tokens]
        target_positions: torch.Tensor,  # [num_step_tokens]
        aux_hidden_states: list[torch.Tensor],  # taps, each [num_step_tokens, hidden_size]
        common_attn_metadata: CommonAttentionMetadata,  # of the target's step
    ) -> DraftTrees:
        """Bring the head's KV up to date with the step's true tokens, then draft a tree for every request."""
        with CLOCK.span("draft: true tokens"):
            context = self._first_pass(
                true_tokens,
                target_token_ids,
                target_positions,
                aux_hidden_states,
                common_attn_metadata,
            )
        wanted = np.flatnonzero(max_nodes)
        if not wanted.size:
            return DraftTrees.empty(max_nodes.size)
        if wanted.size < max_nodes.size:
            context = context.take(torch.from_numpy(wanted))
        with CLOCK.span("draft: levels"):
            pool = self._expand(shape, context)
        with CLOCK.span("draft: cut the tree"):
            trees = DraftTrees.from_pool(pool, np.minimum(max_nodes[wanted], shape.num_nodes))
            if wanted.size == max_nodes.size:
                return trees
            place = np.zeros_like(max_nodes)
            place[wanted] = np.arange(wanted.size)
            return trees.take(place, np.where(max_nodes > 0, trees.num_nodes[place], 0))

    def _first_pass(
        self,
        true_tokens,
        target_token_ids,
        target_positions,
        aux_hidden_states,
        common_attn_metadata,
    ) -> _HeadContext:
        rows = true_tokens.token_rows
        features = torch.cat([hidden[rows] for hidden in aux_hidden_states], dim=-1)
        cad = self._true_token_metadata(true_tokens, common_attn_metadata)
        num_tokens, last_rows, cad = self.set_inputs_first_pass(
            target_token_ids=target_token_ids[rows],
            next_token_ids=true_tokens.next_token_ids,
            target_positions=target_positions[rows],
            target_hidden_states=self.model.combine_hidden_states(features),
            token_indices_to_sample=None,
            cad=cad,
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

    def _true_token_metadata(
        self, true_tokens: TrueTokens, cad: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The step's metadata cut to its true tokens, which occupy the FIRST slots of each request's rows."""
        query_start = cad.query_start_loc_cpu.numpy().astype(np.int64)
        num_tokens = true_tokens.num_tokens
        start = np.zeros(num_tokens.size + 1, dtype=np.int64)
        np.cumsum(num_tokens, out=start[1:])
        dropped = np.diff(query_start) - num_tokens
        seq_lens = cad.seq_lens_cpu_upper_bound - torch.from_numpy(dropped).int()
        slot_rows = np.arange(start[-1]) + np.repeat(query_start[:-1] - start[:-1], num_tokens)
        query_start_loc = torch.from_numpy(start).int()
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(self.device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=num_tokens.size,
            num_actual_tokens=int(start[-1]),
            max_query_len=int(num_tokens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=cad.block_table_tensor,
            slot_mapping=cad.slot_mapping[torch.from_numpy(slot_rows)],
            causal=True,
        )

    def _run_head(
        self, num_tokens: int, layer_metadata: dict[str, object], slots: dict[str, torch.Tensor]
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

    def _expand(self, shape: TreeShape, context: _HeadContext) -> CandidatePool:
        """Grow the candidate pool level by level; the ``beam`` best nodes of a level are expanded next."""
        num_reqs = context.seq_lens.shape[0]
        # vLLM's head buffers hold one scheduler budget of tokens.
        beam = min(shape.top_k, shape.num_nodes, self.max_num_tokens // num_reqs)
        tokens, scores = self._top_children(context.normed, shape.top_k)
        ranks = np.tile(np.arange(shape.top_k), (num_reqs, 1))
        pool = [CandidatePool(tokens.numpy(), scores.numpy(), np.full_like(ranks, NO_ROW), ranks)]
        frontier = _Frontier(
            columns=ranks[:, :beam],
            tokens=tokens[:, :beam],
            scores=scores[:, :beam],
            hidden=context.hidden.repeat_interleave(beam, dim=0),
            tail=torch.empty((num_reqs, beam, 0), dtype=torch.int64),
        )
        pool_size = shape.top_k
        for level in range(1, shape.max_depth):
            hidden, normed, tail = self._forward_level(level, shape.max_depth, frontier, context)
            child_tokens, child_scores = self._top_children(normed, shape.top_k)
            child_scores = (frontier.scores.reshape(-1, 1) + child_scores).view(num_reqs, -1)
            child_tokens = child_tokens.view(num_reqs, -1)
            width = frontier.columns.shape[1]
            pool.append(
                CandidatePool(
                    child_tokens.numpy(),
                    child_scores.numpy(),
                    np.repeat(frontier.columns, shape.top_k, axis=1),
                    np.tile(np.arange(shape.top_k), (num_reqs, width)),
                )
            )
            if level + 1 < shape.max_depth:
                best_scores, best = child_scores.topk(beam, dim=1)
                parent = best // shape.top_k
                rows = (torch.arange(num_reqs)[:, None] * width + parent).flatten()
                frontier = _Frontier(
                    columns=pool_size + best.numpy(),
                    tokens=child_tokens.gather(1, best),
                    scores=best_scores,
                    hidden=hidden[rows],
                    tail=tail.gather(1, parent[:, :, None].expand(-1, -1, level)),
                )
            pool_size += child_tokens.shape[1]
        return CandidatePool(
            tokens=np.concatenate([part.tokens for part in pool], axis=1),
            scores=np.concatenate([part.scores for part in pool], axis=1),
            parents=np.concatenate([part.parents for part in pool], axis=1),
            ranks=np.concatenate([part.ranks for part in pool], axis=1),
        )

    def _top_children(
        self,
        normed: torch.Tensor,  # [num_rows, hidden_size]
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``top_k`` likeliest next tokens of each row and their log-probabilities, in draft-vocabulary space."""
        with CLOCK.span("head logits"):
            logits = self.model.logits_processor(self.model.lm_head, normed)
        with CLOCK.span("head top-k"):
            log_probs, draft_ids = logits.float().log_softmax(dim=-1).topk(top_k, dim=-1)
        offsets = self.model.draft_id_to_target_id
        return (draft_ids if offsets is None else draft_ids + offsets[draft_ids]), log_probs

    def _forward_level(
        self, level: int, max_depth: int, frontier: _Frontier, context: _HeadContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the head over a frontier: (output, normed output, scratch rows of each node and its ancestors)."""
        num_reqs, width = frontier.tokens.shape
        num_tokens = num_reqs * width
        first_row = (level - 1) * num_tokens
        own = torch.arange(first_row, first_row + num_tokens).view(num_reqs, width, 1)
        tail = torch.cat([frontier.tail, own], dim=2)
        # The rotary table ends at the model's length; a draft beyond it is never scheduled.
        positions = (context.positions + level).clamp(max=self.max_model_len - 1)
        self.input_ids[:num_tokens] = frontier.tokens.flatten()
        self.positions[:num_tokens] = positions.repeat_interleave(width)
        self.hidden_states[:num_tokens] = frontier.hidden
        metadata = DraftLevelMetadata(
            query_start_loc=torch.arange(0, num_tokens + 1, width, dtype=torch.int32),
            context_lens=context.seq_lens,
            block_table=context.block_table,
            tail_index=tail.view(num_tokens, level).int(),
            scratch_rows=slice(first_row, first_row + num_tokens),
            scratch=self._scratch_for(num_tokens * (max_depth - 1)),
        )
        layer_metadata: dict[str, object] = dict.fromkeys(self._draft_attn_layer_names, metadata)
        normed, hidden = self._run_head(num_tokens, layer_metadata, slots={})
        return hidden, normed, tail

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
