# SPDX-License-Identifier: Apache-2.0
"""EagleDrafterV2: the drafter of Model Runner V2, vLLM's own EAGLE-3 speculator with trees.

Tree nodes are fed to the head through the lookahead slots behind a request's accepted tokens, all levels so far in one
pass: the one-layer head costs its weights, not its rows, and one kernel serves the target and the head. The next step's
first pass writes accepted tokens over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from heterospec_vllm.arrays import Floats, Ints, Ints32
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.draft.growth import Frontier
from heterospec_vllm.draft.masks import without_forbidden
from heterospec_vllm.draft.tree_drafter import HeadContext, TreeDrafter
from heterospec_vllm.kernels.gpu.topk_entropy import topk_entropy
from heterospec_vllm.kernels.gpu.tree_attention_plan import MAX_ROWS
from heterospec_vllm.layers.attention_gpu import StepTrees, TreeBuilder
from heterospec_vllm.policy.base import DraftPlan
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.masks import TokenMasks

# (batch, aux hidden states of the step's tokens, whether drafts can be used) -> nothing: the runner's side of a draft
OnPropose = Callable[[InputBatch, list[torch.Tensor], bool], None]


@dataclass(frozen=True)
class _Expanded:
    """The nodes of one level that were expanded, in the order of the batch."""

    reqs: Ints  # [num_rows]
    tail: Ints32  # [num_rows, level] rows of the node's ancestors and its own, over all levels
    tokens: torch.Tensor  # [num_rows]
    hidden: torch.Tensor  # [num_rows, hidden_size] output for their parents


class EagleDrafterV2(TreeDrafter, EagleSpeculator):
    """Drafts trees with vLLM's own EAGLE-3 speculator: its loading, weight sharing and buffers."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.num_speculative_tokens = self.num_speculative_steps
        self.on_propose: OnPropose | None = None
        self._levels: list[_Expanded] = []
        self.start_drafting()

    # ---- vLLM's speculator

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Without CUDA graphs: the rows of a draft pass differ from step to step."""
        super().init_cudagraph_manager(CUDAGraphMode.NONE)

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hands a real batch to the runner; the tokens it returns are the host's, so vLLM gets none."""
        if not kwargs.get("dummy_run"):
            assert self.on_propose is not None
            aux_hidden_states = args[3]
            # vLLM 0.33 asks for none where every request ends with this step or is still read.
            wanted = kwargs.get("num_speculative_tokens") != 0
            self.on_propose(input_batch, aux_hidden_states, wanted)
        elif not self._silent:
            # Two passes show what memory a draft takes.
            kwargs["num_speculative_tokens"] = min(2, self.num_speculative_steps)
            super().propose(input_batch, *args, **kwargs)
        return self.draft_tokens[: input_batch.num_reqs]

    # ---- passes of the head

    @property
    def kv_cache_gid(self) -> int:
        """The KV cache group of the head's layers."""
        return next(i for i, groups in enumerate(self.attn_groups) if groups)

    def tree_reason(self) -> str | None:
        """Why the head's layers cannot attend over trees, or None."""
        return tree_reason_of(self.attn_groups)

    @property
    def _head_inputs(self) -> InputBuffers:
        return self.input_buffers

    def _head_block_size(self) -> int:
        return self.block_tables.block_sizes[self.kv_cache_gid]

    def _most_expanded(self, plan: DraftPlan, num_reqs: int) -> int:
        """All levels lie in one pass, behind the context, under one mask."""
        levels = max(1, plan.max_depth - 1)
        rows = min(self.num_speculative_steps, MAX_ROWS, self.max_num_tokens // num_reqs)
        return min(plan.beam, rows // levels)

    def max_context(self) -> int:
        """Accepted tokens behind which a tree of any shape still fits into a request's slots."""
        return self.max_model_len - self.num_speculative_steps

    def _first_pass_of(self, tokens: AcceptedTokens) -> HeadContext:
        common = self._accepted_token_metadata(tokens)
        num_tokens = common.num_actual_tokens
        buffers = self.input_buffers
        last = common.query_start_loc[1:].long() - 1
        # The head reads each position's feature with the token that followed.
        buffers.input_ids[: num_tokens - 1] = tokens.token_ids[1:]
        buffers.input_ids[last] = tokens.next_token_ids
        buffers.positions[:num_tokens] = tokens.positions
        self.hidden_states[:num_tokens] = self._fuse_aux(tokens.features)
        normed, hidden = self._run_head(num_tokens, *self._attention(common, None))
        return HeadContext(
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            normed=normed[last],
            hidden=hidden[last],
            positions=tokens.positions[last],
        )

    def _attention(
        self, common: CommonAttentionMetadata, trees: StepTrees | None
    ) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        """(metadata, slots) by layer of the head."""
        layer_metadata: dict[str, object] = {}
        for group in self.attn_groups[self.kv_cache_gid]:
            builder = group.get_metadata_builder(0)
            if trees is not None:
                builder.step_trees = trees
            try:
                metadata = group.build_metadata(common, 0)
            finally:
                if trees is not None:
                    builder.step_trees = None
            layer_metadata |= dict.fromkeys(group.layer_names, metadata)
        return layer_metadata, dict.fromkeys(layer_metadata, common.slot_mapping)

    def _top_children(
        self, normed: torch.Tensor, top_k: int, masks: TokenMasks | None = None
    ) -> tuple[Ints, Floats]:
        with CLOCK.span("head logits"):
            logits = self.model.logits_processor(self.model.lm_head, normed)
        offsets = self.model.draft_id_to_target_id
        if masks is not None:
            logits = without_forbidden(logits, masks, offsets)
        with CLOCK.span("head top-k"):
            best = topk_entropy(logits, torch.zeros(len(logits), device=logits.device), top_k)
        tokens = best.indices if offsets is None else best.indices + offsets[best.indices]
        return tokens.cpu().numpy(), best.log_probs.cpu().numpy()

    # ---- levels

    def _begin_levels(self, num_rows: int) -> None:
        self._levels = []

    def _forward_level(
        self, frontier: Frontier, hidden: torch.Tensor, context: HeadContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(frontier.tokens)
        self._levels.append(_Expanded(frontier.reqs, frontier.tail, tokens, hidden))
        rows = rows_by_request(
            [(held.reqs, held.tail) for held in self._levels], context.seq_lens.shape[0]
        )
        num_rows, order = rows.order.size, torch.from_numpy(rows.order)
        buffers = self.input_buffers
        buffers.input_ids[:num_rows] = torch.cat([held.tokens for held in self._levels])[order].to(
            self.device
        )
        self.hidden_states[:num_rows] = torch.cat([held.hidden for held in self._levels])[order]
        positions = context.positions[self._to_device(rows.reqs)] + self._to_device(rows.levels)
        buffers.positions[:num_rows] = positions
        common = self._level_metadata(rows, context)
        trees = None
        if not rows.is_chain:
            trees = StepTrees(
                num_reqs=common.num_reqs,
                num_tokens=num_rows,
                max_rows=common.max_query_len,
                ancestor_mask=self._to_device(rows.ancestor_mask),
            )
        normed, hidden = self._run_head(num_rows, *self._attention(common, trees))
        latest = torch.from_numpy(rows.place[frontier.first_row :])
        return normed[latest], hidden[latest]

    def _level_metadata(self, rows: RowsByRequest, context: HeadContext) -> CommonAttentionMetadata:
        """The tree's rows behind each request's accepted tokens."""
        start = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32)
        query_start_loc = torch.from_numpy(start)
        counts = self._to_device(rows.counts.astype(np.int32))
        local = np.arange(rows.order.size) - np.repeat(start[:-1], rows.counts)
        reqs = self._to_device(rows.reqs)
        at = context.seq_lens[reqs] + self._to_device(local)
        block_size = self._head_block_size()
        blocks = context.block_table[reqs, at // block_size].long()
        seq_lens = (context.seq_lens + counts).int()
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(self.device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens.cpu(),
            num_reqs=rows.counts.size,
            num_actual_tokens=rows.order.size,
            max_query_len=int(rows.counts.max()),
            max_seq_len=self.max_model_len,
            block_table_tensor=context.block_table,
            slot_mapping=blocks * block_size + at % block_size,
            causal=True,
        )

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


@dataclass(frozen=True)
class RowsByRequest:
    """The expanded nodes of all levels, request by request; within one, level by level."""

    order: Ints  # [num_rows] row, counted over all levels
    place: Ints  # [num_rows] where each of those rows went
    reqs: Ints  # [num_rows]
    levels: Ints  # [num_rows] depth of the node, 1 for children of the root
    counts: Ints  # [num_reqs]
    ancestor_mask: Ints  # [num_rows] bit j: sees row j of its own request

    @property
    def is_chain(self) -> bool:
        """Whether every row sees all rows before it, as causal attention does."""
        first = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        local = np.arange(self.order.size) - np.repeat(first, self.counts)
        causal = (np.uint64(2) << local.astype(np.uint64)) - np.uint64(1)
        return bool((self.ancestor_mask.view(np.uint64) == causal).all())


def rows_by_request(levels: list[tuple[Ints, Ints32]], num_reqs: int) -> RowsByRequest:
    """levels: of each, requests [num_rows] and rows [num_rows, level] of the ancestors and the node itself."""
    reqs = np.concatenate([level_reqs for level_reqs, _ in levels])
    order = np.argsort(reqs, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    counts = np.bincount(reqs, minlength=num_reqs)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    masks, depths = [], []
    for level_reqs, tail in levels:
        local = place[tail] - first[level_reqs][:, None]
        masks.append((np.uint64(1) << local.astype(np.uint64)).sum(axis=1, dtype=np.uint64))
        depths.append(np.full(len(tail), tail.shape[1]))
    return RowsByRequest(
        order=order,
        place=place,
        reqs=reqs[order],
        levels=np.concatenate(depths)[order],
        counts=counts,
        ancestor_mask=np.concatenate(masks)[order].view(np.int64),
    )


def tree_reason_of(attn_groups: list[list[Any]]) -> str | None:
    """Why some layers cannot attend over trees, or None."""
    for groups in attn_groups:
        for group in groups:
            builder = group.get_metadata_builder(0)
            if not isinstance(builder, TreeBuilder):
                return (
                    f"attention backend {group.backend.get_name()}, allowed: FLASH_ATTN, "
                    "TRITON_ATTN (--attention-backend)"
                )
            reason = builder.tree_reason()
            if reason is not None:
                return reason
    return None
