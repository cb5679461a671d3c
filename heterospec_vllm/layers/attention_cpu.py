# SPDX-License-Identifier: Apache-2.0
"""Tree attention for vLLM's CPU backend: the same KV pages, the same layers, one more kind of row.

vLLM ignores every backend name but CPU_ATTN on CPU, so these classes stand in for its CPU_ATTN (registered by our
worker only). Our op attends by a mask, and text is a tree without branches: where it is the faster one
(``op_choice.py``), it takes rows of text, too. The runner puts the requests that it takes first, vLLM's op takes the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
from heterospec_vllm.kernels.cpu.tree_attention import LayerPages, TreeRows, launch
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
    rows: TreeRows  # with a piece as a request

    @classmethod
    def of(
        cls,
        placed: PlacedRows,
        block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    ) -> MaskedRows:
        num_reqs = block_table.shape[0]
        if placed.reqs.size != num_reqs:
            block_table = block_table[torch.from_numpy(placed.reqs)]
        rows = TreeRows(
            query_start_loc=torch.from_numpy(placed.query_start_loc),
            seq_lens=torch.from_numpy(placed.seq_lens),
            block_table=block_table,
            ancestor_mask=torch.from_numpy(placed.ancestor_mask),
        )
        return cls(num_reqs, rows)

    @property
    def num_tokens(self) -> int:
        return self.rows.ancestor_mask.shape[0]


@dataclass
class MaskedAttentionMetadata:
    """Attention metadata of a step of which our op takes some rows."""

    masked: MaskedRows
    rest: CPUAttentionMetadata | None  # the other requests, None where there are none


@dataclass
class DraftLevelMetadata:
    """Attention metadata of one draft level: tree nodes see the head's pages and their ancestors in a scratch."""

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    context_lens: torch.Tensor  # [num_reqs] int32, accepted tokens in the head's pages
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


class HeteroSpecCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._pages: tuple[torch.Tensor, LayerPages] | None = None  # of that cache tensor

    def pages_of(self, kv_cache: torch.Tensor, isa: str) -> LayerPages:
        """The layer's pages as vLLM's own impl views them, made once per cache tensor."""
        if self._pages is None or self._pages[0] is not kv_cache:
            num_blocks, num_kv_heads, block_size, _ = kv_cache.size()
            pages = kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))
            keys, values = pages.chunk(2, dim=2)
            layer = LayerPages(keys, values, self.num_heads, self.scale, isa)
            self._pages = kv_cache, layer
        return self._pages[1]

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
        assert query.dtype == kv_cache.dtype
        pages = self.pages_of(kv_cache, layer.isa)
        launch(pages.packed, metadata.masked.rows.packed, query, output)
        if metadata.rest is not None:
            num_tokens = metadata.masked.num_tokens
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
        pages = self.pages_of(kv_cache, layer.isa)
        arguments = (
            query,
            pages.key_cache,
            pages.value_cache,
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
