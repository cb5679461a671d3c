# SPDX-License-Identifier: Apache-2.0
"""The decoder layer of an EAGLE-3 head over a few rows on CPU, in one call (C++, csrc/)."""

import functools
from dataclasses import dataclass

import torch

from ..head_sizes import CPU_KERNELS
from .library import DTYPE_CODES, c_entry
from .packed_linear import size_of
from .structs import STRUCTS
from .tree_attention import (
    BLOCK_SIZE_MULTIPLE,
    NO_ROWS,
    pack_layer,
    pack_requests,
    tail_of,
)

_PACK_WEIGHTS = STRUCTS["HeadWeights"].pack
_PACK = STRUCTS["HeadInputs"].pack


@dataclass(frozen=True)
class HeadLayerWeights:
    """The layer's weights: contiguous, linear ones packed, all of one dtype but ``cos_sin``."""

    embedding: torch.Tensor  # [vocab_size, hidden_size]
    embed_norm: torch.Tensor  # [hidden_size]
    hidden_norm: torch.Tensor  # [hidden_size]
    qkv: torch.Tensor  # packed [(num_heads + 2 * num_kv_heads) * head_size, 2 * hidden_size]
    attention_output: torch.Tensor  # packed [hidden_size, num_heads * head_size]
    post_norm: torch.Tensor  # [hidden_size]
    gate_up: torch.Tensor  # packed [2 * intermediate_size, hidden_size]
    down: torch.Tensor  # packed [hidden_size, intermediate_size]
    final_norm: torch.Tensor  # [hidden_size]
    cos_sin: torch.Tensor  # [max_positions, rotary_size] float32, cosines and then sines
    head_size: int
    epsilon: float  # of every norm
    scale: float  # of attention scores
    norm_before_residual: bool  # the residual is the normed hidden state
    norm_output: bool  # the output is the final norm's

    @property
    def num_heads(self) -> int:
        _, query_size = size_of(self.attention_output)
        return query_size // self.head_size

    @property
    def num_kv_heads(self) -> int:
        columns, _ = size_of(self.qkv)
        return (columns // self.head_size - self.num_heads) // 2

    def misfit(self) -> str | None:
        """Why the kernel cannot compute this layer, or None where it can."""
        hidden = self.embedding.shape[1]
        query = self.num_heads * self.head_size
        both = query + 2 * self.num_kv_heads * self.head_size
        _, width = size_of(self.down)
        norms = dict.fromkeys(("embed_norm", "hidden_norm", "post_norm", "final_norm"), (hidden,))
        linears = {
            "qkv": (both, 2 * hidden),
            "attention_output": (hidden, query),
            "gate_up": (2 * width, hidden),
            "down": (hidden, width),
        }
        for name, shape in {"embedding": self.embedding.shape, **norms, **linears}.items():
            tensor: torch.Tensor = getattr(self, name)
            found = size_of(tensor) if name in linears else tuple(tensor.shape)
            if found != shape or not tensor.is_contiguous():
                return f"{name} is {found}, allowed: contiguous {shape}"
            if tensor.dtype != self.embedding.dtype or tensor.dtype not in DTYPE_CODES:
                return f"{name} is {tensor.dtype}, allowed: one of {list(DTYPE_CODES)} for all"
        if self.head_size not in CPU_KERNELS:
            return f"head_size is {self.head_size}, allowed: {list(CPU_KERNELS)}"
        if self.cos_sin.dtype != torch.float32 or not self.cos_sin.is_contiguous():
            return f"cos_sin is {self.cos_sin.dtype}, allowed: contiguous torch.float32"
        if self.cos_sin.shape[1] % 2 or self.cos_sin.shape[1] > self.head_size:
            return f"rotary_size is {self.cos_sin.shape[1]}, allowed: even, at most the head size"
        return None

    @functools.cached_property
    def packed(self) -> bytes:
        """Raises ValueError where :meth:`misfit` has a reason."""
        reason = self.misfit()
        if reason is not None:
            raise ValueError(f"head_layer_cpu: {reason}")
        return _PACK_WEIGHTS(
            self.embedding.shape[1],
            size_of(self.down)[1],
            self.cos_sin.shape[1],
            self.norm_before_residual,
            self.norm_output,
            self.epsilon,
            self.embedding.data_ptr(),
            self.embed_norm.data_ptr(),
            self.hidden_norm.data_ptr(),
            self.qkv.data_ptr(),
            self.attention_output.data_ptr(),
            self.post_norm.data_ptr(),
            self.gate_up.data_ptr(),
            self.down.data_ptr(),
            self.final_norm.data_ptr(),
            self.cos_sin.data_ptr(),
        )


def head_layer_cpu(
    weights: HeadLayerWeights,
    # [num_rows], int64
    token_ids: torch.Tensor,
    # [num_rows], int64
    positions: torch.Tensor,
    # [num_rows, hidden_size], contiguous
    hidden: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]: vLLM's key half of a cache
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32, >= 1: paged keys, seen by every row of the request
    context_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32; rows may be strided
    block_table: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size], contiguous
    scratch_key: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size], contiguous
    scratch_value: torch.Tensor,
    # scratch row of the first row's key; the others follow
    first_row: int,
    # [num_rows, max_tail], int32: scratch rows that a row sees, its own too, packed in front, -1 padded
    tail_index: torch.Tensor,
    # [num_rows], int64: pages that take the keys and values, too
    slots: torch.Tensor | None = None,
    *,
    isa: str = "vec",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed output for the logits, output for the next level), each [num_rows, hidden_size].

    Writes keys and values of its rows into the scratch and, with ``slots``, into the pages. The pages are laid out as
    for `tree_attention_cpu` (`isa`), attention is that of `draft_attention_cpu`. Called once a level, so only what
    would be read wrongly without a trace is checked.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
        ValueError: the weights do not fit the kernel.
    """
    num_rows = token_ids.shape[0]
    assert token_ids.dtype == positions.dtype == torch.int64
    assert hidden.is_contiguous() and hidden.shape == (num_rows, weights.embedding.shape[1])
    assert positions.shape[0] == tail_index.shape[0] == num_rows
    assert first_row + num_rows <= scratch_key.shape[0]
    assert key_cache.dtype == hidden.dtype and key_cache.shape[2] % BLOCK_SIZE_MULTIPLE == 0
    normed, output = torch.empty_like(hidden), torch.empty_like(hidden)
    row_bytes = scratch_key.stride(0) * scratch_key.element_size()
    arguments = _PACK(
        num_rows,
        token_ids.data_ptr(),
        positions.data_ptr(),
        hidden.data_ptr(),
        scratch_key.data_ptr() + first_row * row_bytes,
        scratch_value.data_ptr() + first_row * row_bytes,
        0 if slots is None else slots.data_ptr(),
        normed.data_ptr(),
        output.data_ptr(),
    )
    tail = tail_of(scratch_key, scratch_value, tail_index)
    w = weights
    layer = pack_layer(key_cache, value_cache, w.num_heads, w.head_size, w.scale, isa=isa)
    requests = pack_requests(query_start_loc, context_lens, block_table, 0, tail=tail)
    attention = layer + requests + NO_ROWS
    failed = c_entry("heterospec_head_layer")(weights.packed + arguments + attention)
    assert not failed, f"{hidden.dtype} with isa {isa}"
    return normed, output
