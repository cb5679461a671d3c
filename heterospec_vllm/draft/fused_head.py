# SPDX-License-Identifier: Apache-2.0
"""The draft head in two C++ calls a level where it is the usual one: a single Llama layer on CPU.

vLLM runs the head as one of its models: metadata, a compiled graph and ten small matrix products with their own
overhead, for a few rows. And it computes every row whole, though of a prompt's tokens only the last one's output is
looked at: of the others, one layer needs keys and values, a quarter of the work. Everything else (other architectures,
quantized weights, larger batches, no compiler) goes through vLLM's model; the two differ in rounding only, which
changes drafts but never an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM, LlamaDecoderLayer

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.draft.aux_fusion import AuxFusion
from heterospec_vllm.kernels.cpu import aux_fusion, packed_linear, top_tokens
from heterospec_vllm.kernels.cpu.head_layer import HeadLayerWeights, head_layer_cpu
from heterospec_vllm.kernels.cpu.library import unavailable_reason
from heterospec_vllm.layers.linears_cpu import packed_weight
from heterospec_vllm.tree.masks import TokenMasks

logger = init_logger(__name__)

# With more rows vLLM's matrix products are as good, and its overhead is small beside them.
MAX_ROWS = 64


class FusedHead:
    """A draft head's weights as the kernels read them."""

    def __init__(self, model: Any, max_model_len: int) -> None:
        """Raises ValueError with the reason where the kernels cannot compute this head."""
        reason = unavailable_reason() or next(_misfits(model, max_model_len), None)
        if reason is not None:
            raise ValueError(reason)
        self._weights = _layer_weights(model)
        self._vocab_size = model.logits_processor.org_vocab_size
        self._logits_weight = _logits_weight(model.lm_head.weight.data, self._vocab_size)
        taps = AuxFusion(model)
        self._norms, self._epsilon = taps.norms, taps.epsilon
        depth = model.model.fc_input_size
        self._fc = _packed_weight(model.model.fc, depth, self._weights.embedding.dtype)
        reason = self._weights.misfit() or aux_fusion.misfit(self._norms, self._fc)
        if reason is not None:
            raise ValueError(reason)
        # Prompts are read with torch's product, the faster one on AMX tiles where rows are many.
        self._of_keys = key_columns(self._weights)
        self._offsets = model.draft_id_to_target_id
        self._attention = model.model.layers[0].self_attn.attn

    def fuse_aux(self, features: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_aux * hidden_size] to [num_tokens, hidden_size]."""
        return aux_fusion.aux_fusion_cpu(features, self._norms, self._fc, self._epsilon)

    def forward(self, **rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`head_layer_cpu` with this head's weights and pages: (normed output, output)."""
        attention = self._attention
        pages = attention.impl.pages_of(attention.kv_cache, attention.isa)
        return head_layer_cpu(
            self._weights,
            key_cache=pages.key_cache,
            value_cache=pages.value_cache,
            isa=pages.isa,
            **rows,
        )

    def store_keys(
        self,
        token_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        hidden: torch.Tensor,  # [num_tokens, hidden_size]
        slots: torch.Tensor,  # [num_tokens] int64
    ) -> None:
        """Puts the keys and values of any number of tokens into the pages and computes nothing else of them."""
        attention = self._attention
        keys, values = keys_and_values(self._weights, self._of_keys, token_ids, positions, hidden)
        attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)

    def top_tokens(
        self, normed: torch.Tensor, top_k: int, masks: TokenMasks | None = None
    ) -> tuple[Ints, Floats]:
        """[num_rows, top_k] each: the likeliest allowed next tokens (target ids) and their log-probabilities."""
        allowed = () if masks is None else map(torch.from_numpy, (masks.bits, masks.of_row))
        tokens, log_probs = top_tokens.top_tokens_cpu(
            normed, self._logits_weight, self._vocab_size, self._offsets, top_k, *allowed
        )
        return tokens.numpy(), log_probs.numpy()


def fused_head(model: Any, max_model_len: int) -> FusedHead | None:
    """The head of a loaded model, or None with the reason in the log."""
    try:
        return FusedHead(model, max_model_len)
    except ValueError as reason:
        logger.info("heterospec: the draft head runs as vLLM's model: %s", reason)
        return None


def _misfits(model: Any, max_model_len: int) -> Iterator[str]:
    """Why the kernels compute something else than vLLM's model."""
    if type(model) is not Eagle3LlamaForCausalLM or len(model.model.layers) != 1:
        yield f"it is a {type(model).__name__} or has several layers, not one Llama layer"
        return
    inner, logits = model.model, model.logits_processor
    layer = inner.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    if type(layer) is not LlamaDecoderLayer or type(attention) is not LlamaAttention:
        yield f"its layer is a {type(layer).__name__} with {type(attention).__name__}"
    if inner.norm_before_fc or (inner.fc_norm is not None and AuxFusion(model).norms is None):
        yield "its taps are normed in another way"
    linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj, inner.fc
    for linear in linears:
        if type(linear.quant_method) is not UnquantizedLinearMethod or linear.bias is not None:
            yield "a linear layer is quantized or has a bias"
    if attention.qkv_proj.tp_size != 1:
        yield "it is spread over several workers"
    if type(model.lm_head.quant_method) is not UnquantizedEmbeddingMethod:
        yield "its output weight is quantized"
    if logits.scale != 1.0 or logits.soft_cap is not None:
        yield "its logits are scaled"
    rotary = attention.rotary_emb
    if (
        not rotary.is_neox_style
        or type(rotary).forward_native is not RotaryEmbedding.forward_native
    ):
        yield f"its rotary embedding is {type(rotary).__name__}"
    if rotary.cos_sin_cache.shape[0] < max_model_len:
        yield f"its rotary table ends at {rotary.cos_sin_cache.shape[0]}, before max_model_len"
    norms = _norms(model)
    if any(type(norm) is not RMSNorm or norm.variance_size_override for norm in norms):
        yield "a norm is no plain RMSNorm"
    if len({norm.variance_epsilon for norm in norms}) != 1:
        yield "its norms have several epsilons"


def _norms(model: Any) -> tuple[Any, ...]:
    layer = model.model.layers[0]
    return (
        layer.input_layernorm,
        layer.hidden_norm,
        layer.post_attention_layernorm,
        model.model.norm,
    )


def key_columns(weights: HeadLayerWeights) -> torch.Tensor:
    """[2 * num_kv_heads * head_size, 2 * hidden_size] of the QKV weight, as checkpoints hold it."""
    first = weights.num_heads * weights.head_size // packed_linear.LANES
    return packed_linear.unpack_weight(weights.qkv[first:])


def keys_and_values(
    weights: HeadLayerWeights,
    of_keys: torch.Tensor,  # as `key_columns` gives it
    token_ids: torch.Tensor,  # [num_tokens]
    positions: torch.Tensor,  # [num_tokens]
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_tokens, num_kv_heads, head_size] each: what the layer's attention would store of these tokens."""
    w, shape = weights, hidden.shape[1:]
    embedded = F.rms_norm(w.embedding[token_ids], shape, w.embed_norm, w.epsilon)
    normed = F.rms_norm(hidden, shape, w.hidden_norm, w.epsilon)
    heads = F.linear(torch.cat([embedded, normed], dim=-1), of_keys)
    keys, values = heads.unflatten(1, (2, w.num_kv_heads, w.head_size)).unbind(1)
    cosines, sines = w.cos_sin[positions, None].chunk(2, dim=-1)
    x, y, rest = keys.float().split(
        (cosines.shape[-1], cosines.shape[-1], w.head_size - 2 * cosines.shape[-1]), dim=-1
    )
    rotated = torch.cat([x * cosines - y * sines, y * cosines + x * sines, rest], dim=-1)
    return rotated.to(keys.dtype), values


def _layer_weights(model: Any) -> HeadLayerWeights:
    inner = model.model
    layer = inner.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    embed_norm, hidden_norm, post_norm, final_norm = (norm.weight.data for norm in _norms(model))
    embedding = inner.embed_tokens.weight.data
    hidden_size, dtype = embedding.shape[1], embedding.dtype
    return HeadLayerWeights(
        embedding=embedding,
        embed_norm=embed_norm,
        hidden_norm=hidden_norm,
        qkv=_packed_weight(attention.qkv_proj, 2 * hidden_size, dtype),
        attention_output=_packed_weight(attention.o_proj, attention.q_size, dtype),
        post_norm=post_norm,
        gate_up=_packed_weight(mlp.gate_up_proj, hidden_size, dtype),
        down=_packed_weight(mlp.down_proj, mlp.down_proj.input_size, dtype),
        final_norm=final_norm,
        cos_sin=attention.rotary_emb.cos_sin_cache.float().contiguous(),
        head_size=attention.head_dim,
        epsilon=_norms(model)[0].variance_epsilon,
        scale=attention.scaling,
        norm_before_residual=layer._residual_norm == layer._norm_before_residual,
        norm_output=inner.norm_output,
    )


def _logits_weight(weight: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Packed, whole panels of it: vLLM pads the rows of a small vocabulary."""
    lanes = packed_linear.LANES
    return _packed(weight[: -(-vocab_size // lanes) * lanes])


def _packed_weight(linear: Any, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a linear layer, packed: as it goes through our product, or read back from vLLM's with unit vectors.

    vLLM frees the checkpoint's layout after packing in its own way. Products with one are exact in every dtype.
    """
    packed = packed_weight(linear)
    if packed is not None:
        return packed
    return _packed(linear.quant_method.apply(linear, torch.eye(depth, dtype=dtype), None).T)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    reason = packed_linear.misfit(weight)
    if reason is not None:
        raise ValueError(reason)
    return packed_linear.pack_weight(weight)
