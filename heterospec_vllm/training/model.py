# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 head as it is trained: one decoder layer, unrolled over its own outputs.

Sources: EAGLE-3 (arXiv 2503.01840) for the head and training-time test, vLLM 0.32's
``LlamaForCausalLMEagle3`` for the checkpoint's names and norms.

A *query* is a position ``i`` whose feature ``g_i`` and next token ``x_{i+1}`` are given and whose
draft starts there. At step ``j`` it sees token ``x_{i+1+j}`` and the layer's own output of step
``j - 1`` (step 0: the fused taps), and predicts ``x_{i+2+j}``. Its keys are the step-0 keys of
positions ``<= i`` and its own keys of steps ``1..j``, each turned to its own position: exactly the
KV cache it will see when it drafts a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterospec_vllm.training.ops import SoftCrossEntropy, attend, lower, rope_table, rotate


@dataclass(frozen=True)
class HeadShape:
    """Shapes of the head; field names are the Hugging Face Llama ones."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    taps: tuple[int, ...]
    fc_norm: bool
    norm_output: bool = False


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class Attention(nn.Module):
    def __init__(self, c: HeadShape) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = c.head_dim, c.num_key_value_heads
        wide, q = 2 * c.hidden_size, c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(wide, q, bias=False)
        self.k_proj = nn.Linear(wide, kv, bias=False)
        self.v_proj = nn.Linear(wide, kv, bias=False)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)


class MLP(nn.Module):
    def __init__(self, c: HeadShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = lower(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MidLayer(nn.Module):
    def __init__(self, c: HeadShape) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)


@dataclass(frozen=True)
class TrainingBatch:
    """Sequences side by side, padded to one length (right; padding is never a key or a query).

    ids: [batch, length + 1] token ids; features: [batch, length, taps * hidden_size], any dtype;
    first: [batch] first query; rows: [batch] rows that have features and a target;
    log_p: [batch * length, draft_vocab] log-softmax of the target over the draft vocabulary
    (uninitialised before ``first + 1``); truth: [batch, length + 1] ids in the draft vocabulary,
    -1 for other words. ids has length + 1 columns too: the token after the last row.
    """

    ids: Tensor
    features: Tensor
    first: Tensor
    rows: Tensor
    log_p: Tensor
    truth: Tensor


@dataclass(frozen=True)
class StepResult:
    """One step: summed loss; queries of step 0; queries that took part; hits.

    hits: [queries] bool, every draft up to this step is the true token.
    """

    loss: Tensor
    queries: int
    kept: int
    hits: Tensor


class Eagle3Head(nn.Module):
    embed: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: HeadShape, embed: Tensor) -> None:
        super().__init__()
        self.config = config
        width = len(config.taps) * config.hidden_size
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.fc_norm = (
            nn.ModuleList(RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in config.taps)
            if config.fc_norm
            else None
        )
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        # The target's embedding, frozen and not part of the checkpoint: vLLM shares it.
        self.register_buffer("embed", embed, persistent=False)
        cos, sin = rope_table(
            config.head_dim, config.rope_theta, config.max_position_embeddings + 16
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def fuse(self, features: Tensor) -> Tensor:
        """[..., taps * hidden_size] to [..., hidden_size], vLLM's ``combine_hidden_states``."""
        if self.fc_norm is not None:
            parts = features.chunk(len(self.config.taps), dim=-1)
            features = torch.cat(
                [norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], dim=-1
            )
        return self.fc(features)

    def _wide(self, ids: Tensor, hidden: Tensor) -> Tensor:
        embeds = self.midlayer.input_layernorm(F.embedding(ids, self.embed))
        return torch.cat([lower(embeds), lower(self.midlayer.hidden_norm(hidden))], dim=-1)

    def _keys(self, wide: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.midlayer.self_attn
        shape = (*wide.shape[:-1], attn.kv_heads, attn.head_dim)
        key = rotate(attn.k_proj(wide).view(shape), self.cos[position], self.sin[position])
        return key, attn.v_proj(wide).view(shape)

    def forward(
        self, batch: TrainingBatch, steps: int, *, decay: float, keep_rank: int
    ) -> tuple[Tensor, list[StepResult]]:
        """Mean loss per query and the results of each step.

        A query takes part in step ``j + 1`` only where step ``j`` ranked the true token among its
        first ``keep_rank``: later steps are spent where a chain or tree can get to.
        """
        c, layer = self.config, self.midlayer
        groups = c.num_attention_heads // c.num_key_value_heads
        size, length = batch.features.shape[:2]
        device = batch.features.device
        steps_of = torch.arange(length, device=device)
        fused = self.fuse(batch.features)
        wide = self._wide(batch.ids[:, 1:], fused)  # position i sees x_{i+1}
        key, value = self._keys(wide, steps_of)
        # [batch, kv_heads, length, head_dim]
        key, value = key.transpose(1, 2), value.transpose(1, 2)

        query_mask = (steps_of >= batch.first[:, None]) & (steps_of < batch.rows[:, None] - 1)
        b, i = query_mask.nonzero(as_tuple=True)
        index = torch.arange(len(b), device=device)
        hits = torch.ones(len(b), dtype=torch.bool, device=device)
        hidden, wide = fused[b, i], wide[b, i]
        own: list[tuple[Tensor, Tensor]] = []
        results: list[StepResult] = []
        total = torch.zeros((), device=device)
        for j in range(steps):
            if j:
                wide = self._wide(batch.ids[b, i + 1 + j], hidden)
                own.append(self._keys(wide, i + j))
            position = i + j
            query = layer.self_attn.q_proj(wide).view(len(b), -1, c.head_dim)
            query = rotate(query, self.cos[position], self.sin[position])
            mixed = attend(query, key, value, own, b, i, groups)
            hidden = hidden + layer.self_attn.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            normed = self.norm(hidden)
            target = b * length + i + 1 + j
            truth = batch.truth[b, i + 2 + j]
            # Where the true token is no draft word the restricted softmax would teach the head to
            # be sure of a wrong one.
            weight = (truth >= 0).float() * decay**j
            loss, rank = SoftCrossEntropy.apply(
                normed, self.lm_head.weight, batch.log_p, target, truth, weight
            )
            total = total + loss
            hits = hits.clone()
            step_hit = torch.zeros_like(hits)
            step_hit[index] = rank == 0
            hits &= step_hit
            results.append(StepResult(loss.detach() / decay**j, len(hits), len(b), hits))
            keep = (rank < keep_rank) & (i + 2 + j < batch.rows[b])
            if c.norm_output:
                hidden = normed
            b, i, index, hidden = b[keep], i[keep], index[keep], hidden[keep]
            own = [(k[keep], v[keep]) for k, v in own]
            if not len(b):
                break
        return total / max(1, results[0].queries), results
