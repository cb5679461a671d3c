# SPDX-License-Identifier: Apache-2.0
"""EagleDrafterV1: the drafter of Model Runner V1, vLLM's own EAGLE-3 proposer with trees.

Keys and values of tree nodes live in a scratch outside the head's pages: nothing of a tree ever has to be undone.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.spec_decode.eagle import EagleProposer

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.draft.accepted_tokens import (
    AcceptedTokens,
    accepted_rows,
    context_offsets,
    gather_rows,
    slots_of,
    split_last,
)
from heterospec_vllm.draft.fused_head import MAX_ROWS, FusedHead, fused_head
from heterospec_vllm.draft.growth import Frontier, level_positions
from heterospec_vllm.draft.masks import without_forbidden
from heterospec_vllm.draft.tree_drafter import HeadContext, TreeDrafter
from heterospec_vllm.layers.attention_cpu import DraftLevelMetadata
from heterospec_vllm.policy.base import DraftPlan
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.masks import TokenMasks

# Tokens whose keys are computed together: enough for the products, few enough for the caches.
KEY_ROWS = 512


class EagleDrafterV1(TreeDrafter, EagleProposer):
    """Drafts trees with vLLM's own EAGLE-3 proposer: its loading, weight sharing, buffers and first pass."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._scratch: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.start_drafting()

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

    @property
    def _head_inputs(self) -> EagleDrafterV1:
        return self

    def _head_block_size(self) -> int:
        return self.block_size

    def _most_expanded(self, plan: DraftPlan, num_reqs: int) -> int:
        # vLLM's head buffers hold one scheduler budget of tokens.
        return min(plan.beam, self.max_num_tokens // num_reqs)

    @cached_property
    def _fused(self) -> FusedHead | None:
        return fused_head(self.model, self.max_model_len)

    def prepare(self) -> None:
        """Reading a large head's weights back takes seconds, which the first cycle would be charged for."""
        if self._fused is not None:
            self.time_pass(1)

    def weights_changed(self) -> None:
        super().weights_changed()
        self.__dict__.pop("_fused", None)
        self.prepare()

    def _fused_for(self, num_rows: int) -> FusedHead | None:
        return self._fused if num_rows <= MAX_ROWS else None

    def _first_pass_of(self, tokens: AcceptedTokens) -> HeadContext:
        fused = self._fused
        if fused is not None:
            fits = _fits_kernel(tokens)
            if not fits:
                tokens = self._all_but_last_read(fused, tokens)
                fits = _fits_kernel(tokens)
            if fits:
                return self._fused_first_pass(fused, tokens)
        num_tokens, last_rows, cad = self.set_inputs_first_pass(
            target_token_ids=tokens.token_ids,
            next_token_ids=tokens.next_token_ids,
            target_positions=tokens.positions,
            target_hidden_states=self._fuse_aux(tokens.features),
            token_indices_to_sample=None,
            cad=self._accepted_token_metadata(tokens),
            num_rejected_tokens_gpu=None,
        )
        _, layer_metadata = self.build_per_group_and_layer_attn_metadata(cad)
        slots = self._get_slot_mapping(num_tokens, cad.slot_mapping)
        last_hidden, hidden = self._run_head(num_tokens, layer_metadata, slots)
        last = last_rows.long()
        return HeadContext(
            seq_lens=cad.seq_lens,
            block_table=cad.block_table_tensor,
            normed=last_hidden[last],
            hidden=hidden[last],
            positions=self.positions[last],
        )

    def _all_but_last_read(self, fused: FusedHead, tokens: AcceptedTokens) -> AcceptedTokens:
        """Each request's last token, the keys and values of those before it in the pages."""
        if len(tokens.token_ids) == tokens.num_tokens.size:
            return tokens
        earlier, last = split_last(tokens)
        slots = slots_of(tokens, self.block_size)
        with CLOCK.span("head keys"):
            for rows in earlier.split(KEY_ROWS):
                fused.store_keys(
                    token_ids=tokens.token_ids[rows + 1],
                    positions=tokens.positions[rows],
                    hidden=self._fuse_aux(tokens.features[rows]),
                    slots=slots[rows],
                )
        return last

    def _fused_first_pass(self, fused: FusedHead, tokens: AcceptedTokens) -> HeadContext:
        """As a level that is a chain, whose keys and values go into the pages, too."""
        # The head takes each token's features with the token that followed it.
        start, context_lens, before, slots, following, seq_lens = accepted_rows(
            tokens.num_tokens,
            context_offsets(tokens).numpy(),
            tokens.block_table.numpy(),
            self.block_size,
            tokens.token_ids.int().numpy(),
            tokens.next_token_ids.numpy(),
        )
        self._begin_levels(MAX_ROWS)
        with CLOCK.span("head forward"):
            features = fused.fuse_aux(tokens.features)
        normed, hidden = self._fused_forward(
            fused,
            token_ids=torch.from_numpy(following),
            positions=tokens.positions,
            hidden=features,
            query_start_loc=torch.from_numpy(start),
            context_lens=torch.from_numpy(context_lens),
            block_table=tokens.block_table,
            first_row=0,
            tail_index=torch.from_numpy(before),
            slots=torch.from_numpy(slots),
        )
        positions = tokens.positions
        if seq_lens.size < len(following):
            last = tokens.ends - 1
            normed, hidden = gather_rows([normed], last), gather_rows([hidden], last)
            positions = torch.from_numpy(positions.numpy()[last])
        return HeadContext(
            seq_lens=torch.from_numpy(seq_lens),
            block_table=tokens.block_table,
            normed=normed,
            hidden=hidden,
            positions=positions,
        )

    def _fused_forward(self, fused: FusedHead, **rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (scratch,) = self._scratch.values()
        with CLOCK.span("head forward"):
            return fused.forward(scratch_key=scratch[0], scratch_value=scratch[1], **rows)

    def time_pass(self, num_rows: int) -> None:
        """What a level of so many rows takes, on dummy inputs."""
        fused = self._fused_for(num_rows)
        if fused is None:
            return super().time_pass(num_rows)
        self._begin_levels(MAX_ROWS)
        rows = torch.arange(num_rows)
        normed, _ = self._fused_forward(
            fused,
            token_ids=torch.zeros_like(rows),
            positions=torch.ones_like(rows),
            hidden=self.hidden_states[:num_rows],
            query_start_loc=torch.tensor([0, num_rows], dtype=torch.int32),
            context_lens=torch.ones(1, dtype=torch.int32),
            block_table=torch.zeros((1, 1), dtype=torch.int32),
            first_row=0,
            tail_index=rows.int()[:, None],
        )
        self._top_children(normed, min(8, self.most_children))

    def _top_children(
        self,
        normed: torch.Tensor,  # [num_rows, hidden_size]
        top_k: int,
        masks: TokenMasks | None = None,
    ) -> tuple[Ints, Floats]:
        """The ``top_k`` likeliest allowed next tokens of each row (target ids) and their log-probabilities."""
        fused = self._fused_for(len(normed))
        if fused is not None:
            with CLOCK.span("head logits"):
                return fused.top_tokens(normed, top_k, masks)
        with CLOCK.span("head logits"):
            logits = self.model.logits_processor(self.model.lm_head, normed)
        offsets = self.model.draft_id_to_target_id
        if masks is not None:
            logits = without_forbidden(logits, masks, offsets)
        with CLOCK.span("head top-k"):
            log_probs, draft_ids = logits.float().log_softmax(dim=-1).topk(top_k, dim=-1)
        tokens = draft_ids if offsets is None else draft_ids + offsets[draft_ids]
        return tokens.numpy(), log_probs.numpy()

    def _forward_level(
        self, frontier: Frontier, hidden: torch.Tensor, context: HeadContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = frontier.num_rows
        tokens, tail = torch.from_numpy(frontier.tokens), torch.from_numpy(frontier.tail)
        query_start_loc = torch.from_numpy(frontier.query_start_loc)
        # The rotary table ends at the model's length; a draft beyond it is never scheduled.
        positions = torch.from_numpy(
            level_positions(
                context.positions.numpy(), frontier.reqs, frontier.level, self.max_model_len - 1
            )
        )
        fused = self._fused_for(num_tokens)
        if fused is not None:
            return self._fused_forward(
                fused,
                token_ids=tokens,
                positions=positions,
                hidden=hidden,
                query_start_loc=query_start_loc,
                context_lens=context.seq_lens,
                block_table=context.block_table,
                first_row=frontier.first_row,
                tail_index=tail,
            )
        self.input_ids[:num_tokens] = tokens
        self.positions[:num_tokens] = positions
        self.hidden_states[:num_tokens] = hidden
        metadata = DraftLevelMetadata(
            query_start_loc=query_start_loc,
            context_lens=context.seq_lens,
            block_table=context.block_table,
            tail_index=tail,
            scratch_rows=slice(frontier.first_row, frontier.first_row + num_tokens),
            scratch=self._scratch,
        )
        layer_metadata: dict[str, object] = dict.fromkeys(self._draft_attn_layer_names, metadata)
        return self._run_head(num_tokens, layer_metadata, slots={})

    def _begin_levels(self, num_rows: int) -> None:
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


def _fits_kernel(tokens: AcceptedTokens) -> bool:
    """Few rows, and something before each: the kernel looks back at pages at least."""
    if len(tokens.token_ids) > MAX_ROWS:
        return False
    return bool((tokens.first_positions > tokens.context_starts).all())
