# SPDX-License-Identifier: Apache-2.0
"""Tree attention for vLLM's CPU backend: the same KV pages, the same layers, one more kind of row.

vLLM ignores every backend name but CPU_ATTN on CPU, so these classes stand in for its CPU_ATTN (registered by our
worker only). Our op attends by a mask, and text is a tree without branches: where it is the faster one
(``op_choice.py``), it takes rows of text, too. The runner puts the requests that it takes first, vLLM's op takes the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from heterospec_vllm.kernels.cpu.draft_attention import draft_attention_cpu
from heterospec_vllm.kernels.cpu.library import is_available
from heterospec_vllm.kernels.cpu.tree_attention import launch, pack_layer, pack_requests
from heterospec_vllm.kernels.reference import cpu as reference
from heterospec_vllm.layers.batch_split import requests_from
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.rows import PlacedRows

# Rows of a piece of text: few, so that there is something to do for every thread; the mask has room for 64.
PIECE_ROWS = 32


@dataclass
class MaskedRows:
    """The target's rows that our op takes, those of the first requests of the batch, in pieces (``PlacedRows``).

    A piece may have others as its context, because all keys are stored before a layer attends.
    """

    num_reqs: int
    query_start_loc: torch.Tensor  # [num_pieces + 1] int32
    seq_lens: torch.Tensor  # [num_pieces] int32, context + rows of the piece
    block_table: torch.Tensor  # [num_pieces, max_blocks] int32
    ancestor_mask: torch.Tensor  # [num_tokens] int64, bit j: sees row j of its own piece

    @classmethod
    def of(
        cls,
        placed: PlacedRows,
        block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    ) -> MaskedRows:
        num_reqs = block_table.shape[0]
        if placed.reqs.size != num_reqs:
            block_table = block_table[torch.from_numpy(placed.reqs)]
        return cls(
            num_reqs=num_reqs,
            query_start_loc=torch.from_numpy(placed.query_start_loc),
            seq_lens=torch.from_numpy(placed.seq_lens),
            block_table=block_table,
            ancestor_mask=torch.from_numpy(placed.ancestor_mask),
        )

    @property
    def num_tokens(self) -> int:
        return self.ancestor_mask.shape[0]

    @cached_property
    def packed(self) -> bytes:
        """For the kernel; the same in every layer."""
        mask = self.ancestor_mask.data_ptr()
        return pack_requests(self.query_start_loc, self.seq_lens, self.block_table, mask)


@dataclass
class MaskedAttentionMetadata:
    """Attention metadata of a step of which our op takes some rows."""

    masked: MaskedRows
    rest: CPUAttentionMetadata | None  # the other requests, None where there are none


@dataclass
class DraftLevelMetadata:
    """Attention metadata of one draft level: tree nodes see the head's pages and their ancestors in a scratch."""

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    context_lens: torch.Tensor  # [num_reqs] int32, true tokens in the head's pages
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    tail_index: (
        torch.Tensor
    )  # [num_tokens, level] int32, scratch rows of the ancestors and the node itself
    scratch_rows: slice  # where this level's keys and values go
    # layer name -> (keys, values), each [num_scratch_rows, num_kv_heads, head_size]
    scratch: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


class HeteroSpecCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[HeteroSpecCPUAttentionImpl]:
        return HeteroSpecCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HeteroSpecCPUAttentionMetadataBuilder]:
        return HeteroSpecCPUAttentionMetadataBuilder


class HeteroSpecCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder with a place for the rows that our op takes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.isa: str
        if self.isa == "amx" and not is_available():
            # Without a compiler drafts attend in PyTorch, which reads vec's plain layout.
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)
        self.masked_rows: MaskedRows | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata | MaskedAttentionMetadata:
        masked = self.masked_rows
        if masked is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        rest = requests_from(common_attn_metadata, masked.num_reqs, masked.num_tokens)
        if rest is None:
            return MaskedAttentionMetadata(masked, None)
        return MaskedAttentionMetadata(masked, super().build(common_prefix_len, rest, fast_build))


@dataclass
class _Pages:
    """What a layer's calls have in common."""

    kv_cache: torch.Tensor
    keys: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_size]
    values: torch.Tensor  # likewise
    packed: bytes | None = None  # for our op, once it is called


class HeteroSpecCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._pages: _Pages | None = None

    def _pages_of(self, kv_cache: torch.Tensor) -> _Pages:
        """The layer's pages as vLLM's own impl views them, made once per cache tensor."""
        if self._pages is None or self._pages.kv_cache is not kv_cache:
            num_blocks, num_kv_heads, block_size, _ = kv_cache.size()
            pages = kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))
            keys, values = pages.chunk(2, dim=2)
            self._pages = _Pages(kv_cache, keys, values)
        return self._pages

    def key_value_pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's K and V pages."""
        pages = self._pages_of(kv_cache)
        return pages.keys, pages.values

    def _packed_layer(self, kv_cache: torch.Tensor, isa: str) -> bytes:
        """The layer's pages and heads for the kernel."""
        pages = self._pages_of(kv_cache)
        if pages.packed is None:
            pages.packed = pack_layer(
                pages.keys, pages.values, self.num_heads, self.head_size, self.scale, isa=isa
            )
        return pages.packed

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: CPUAttentionMetadata | MaskedAttentionMetadata | DraftLevelMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, MaskedAttentionMetadata):
            with CLOCK.span("tree attention"):
                return self._forward_masked(
                    layer, query, key, value, kv_cache, attn_metadata, output
                )
        if isinstance(attn_metadata, DraftLevelMetadata):
            return self._forward_draft_level(
                layer, query, key, value, kv_cache, attn_metadata, output
            )
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )

    def _forward_masked(
        self, layer, query, key, value, kv_cache, metadata: MaskedAttentionMetadata, output
    ) -> torch.Tensor:
        rows = metadata.masked
        assert query.dtype == kv_cache.dtype
        launch(self._packed_layer(kv_cache, layer.isa), rows.packed, query, output)
        if metadata.rest is not None:
            num_tokens = rows.num_tokens
            super().forward(
                layer,
                query[num_tokens:],
                key[num_tokens:],
                value[num_tokens:],
                kv_cache,
                metadata.rest,
                output[num_tokens:],
            )
        return output

    def _forward_draft_level(
        self, layer, query, key, value, kv_cache, metadata: DraftLevelMetadata, output
    ) -> torch.Tensor:
        scratch_key, scratch_value = metadata.scratch[layer.layer_name]
        scratch_key[metadata.scratch_rows] = key
        scratch_value[metadata.scratch_rows] = value
        key_pages, value_pages = self.key_value_pages(kv_cache)
        arguments = (
            query,
            key_pages,
            value_pages,
            output,
            metadata.query_start_loc,
            metadata.context_lens,
            metadata.block_table,
            scratch_key,
            scratch_value,
            metadata.tail_index,
            self.scale,
        )
        if is_available():
            draft_attention_cpu(*arguments, isa=layer.isa)
        else:
            # Chains are drafted then, whose levels have one row a request.
            reference.draft_attention(*arguments)
        return output
