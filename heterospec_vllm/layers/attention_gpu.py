# SPDX-License-Identifier: Apache-2.0
"""Tree attention for vLLM's GPU backends: the user's backend, its KV pages, and one more kind of row.

:func:`with_trees` derives a backend from one of vLLM's. In a step with trees our Triton kernel takes the rows of the
tree requests, which come first, and vLLM's own kernel the rest; a step without trees runs vLLM's code untouched. It
works for every backend whose KV cache is logically ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, keys
before values, in any order of memory (``flash_attn.py:1252`` and ``triton_attn.py:626`` in vLLM 0.32.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)

from heterospec_vllm.kernels.gpu.tree_attention import tree_attention
from heterospec_vllm.kernels.gpu.tree_attention_plan import (
    TreeAttentionPlan,
    TreeAttentionWorkspace,
    unsupported_reason,
)
from heterospec_vllm.layers.batch_split import requests_from
from heterospec_vllm.timing import CLOCK


@dataclass(frozen=True)
class StepTrees:
    """The rows of a step's tree requests, which come first; handed to the metadata builders."""

    num_reqs: int
    num_tokens: int
    max_rows: int  # of one request
    ancestor_mask: torch.Tensor  # [num_tokens] int64, bit j: sees row j of its own request


@dataclass
class TreeMetadata:
    """Attention metadata of a step in which some requests carry trees, for layers of one shape."""

    num_tokens: int
    query_start_loc: torch.Tensor  # [num_tree_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_tree_reqs] int32, context + rows of this step
    block_table: torch.Tensor  # [num_tree_reqs, max_blocks] int32
    ancestor_mask: torch.Tensor  # [num_tokens] int64
    plan: TreeAttentionPlan
    workspace: TreeAttentionWorkspace | None
    rest: Any  # vLLM's metadata of the other requests, None where there are none
    checked: bool = False  # the first layer's arguments were; the others' are alike


class TreeBuilder:
    """Mixed into a backend's metadata builder."""

    # Host policies choose ragged trees, so neither shapes nor grids of a tree step repeat: attention runs outside
    # of CUDA graphs, and vLLM resolves every full graph mode to a piecewise one.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    step_trees: StepTrees | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        trees = self.step_trees
        if trees is None:
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        plan = self._plan(trees, common.max_seq_len)
        rest = requests_from(common, trees.num_reqs, trees.num_tokens)
        return TreeMetadata(
            num_tokens=trees.num_tokens,
            query_start_loc=common.query_start_loc[: trees.num_reqs + 1],
            seq_lens=common.seq_lens[: trees.num_reqs],
            block_table=common.block_table_tensor[: trees.num_reqs],
            ancestor_mask=trees.ancestor_mask,
            plan=plan,
            workspace=plan.workspace(trees.num_tokens, trees.ancestor_mask.device),
            rest=None if rest is None else super().build(common_prefix_len, rest, fast_build),  # type: ignore[misc]
        )

    def _plan(self, trees: StepTrees, max_seq_len: int) -> TreeAttentionPlan:
        layer = self._layer()
        return TreeAttentionPlan.of(
            num_reqs=trees.num_reqs,
            max_rows=trees.max_rows,
            max_seq_len=max_seq_len,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            block_size=self.kv_cache_spec.block_size,  # type: ignore[attr-defined]
            dtype=self.vllm_config.model_config.dtype,  # type: ignore[attr-defined]
            device=trees.ancestor_mask.device,
        )

    def tree_reason(self) -> str | None:
        """Why these layers cannot attend over trees, or None; for start-up."""
        layer = self._layer()
        dtype = self.vllm_config.model_config.dtype  # type: ignore[attr-defined]
        spec = self.kv_cache_spec  # type: ignore[attr-defined]
        return unsupported_reason(
            layer.head_size, spec.block_size, dtype, spec.dtype, layer.num_heads, layer.num_kv_heads
        )

    def _layer(self) -> Any:
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        return context[self.layer_names[0]]  # type: ignore[attr-defined]


class TreeImpl:
    """Mixed into a backend's implementation."""

    head_size: int
    scale: float

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor | None,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor | None,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: Any,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, TreeMetadata):
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        first = attn_metadata.num_tokens
        keys, values = kv_cache.split(self.head_size, dim=-1)
        with CLOCK.span("tree attention"):
            tree_attention(
                query[:first],
                keys,
                values,
                output[:first],
                attn_metadata.query_start_loc,
                attn_metadata.seq_lens,
                attn_metadata.block_table,
                attn_metadata.ancestor_mask,
                self.scale,
                attn_metadata.plan,
                workspace=attn_metadata.workspace,
                checked=attn_metadata.checked,
            )
            attn_metadata.checked = True
        if attn_metadata.rest is not None:
            super().forward(  # type: ignore[misc]
                layer,
                query[first:],
                # None where a fused operation of vLLM 0.33 has stored them already.
                None if key is None else key[first:],
                None if value is None else value[first:],
                kv_cache,
                attn_metadata.rest,
                output[first:],
                *args,
                **kwargs,
            )
        return output


def with_trees(base: type[AttentionBackend], module: str, name: str) -> type[AttentionBackend]:
    """A backend that is ``base`` and attends over trees. module, name: where the caller keeps it."""
    builder = type(f"{name}MetadataBuilder", (TreeBuilder, base.get_builder_cls()), {})
    impl = type(f"{name}Impl", (TreeImpl, base.get_impl_cls()), {})
    members = {
        "get_builder_cls": staticmethod(lambda: builder),
        "get_impl_cls": staticmethod(lambda: impl),
        "__module__": module,
    }
    return type(name, (base,), members)
