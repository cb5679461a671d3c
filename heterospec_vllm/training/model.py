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


@dataclass(frozen=True)
class HeadConfig:
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


def lower(x: Tensor) -> Tensor:
    """To autocast's dtype, once for all the matmuls that read ``x`` (each would cast it itself)."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


class Attention(nn.Module):
    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = c.head_dim, c.num_key_value_heads
        wide, q = 2 * c.hidden_size, c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(wide, q, bias=False)
        self.k_proj = nn.Linear(wide, kv, bias=False)
        self.v_proj = nn.Linear(wide, kv, bias=False)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)


class MLP(nn.Module):
    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = lower(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MidLayer(nn.Module):
    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def rope_table(c: HeadConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin of shape [length, head_dim], in the half-split order of Llama."""
    inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    angles = torch.arange(length).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # x: [..., heads, head_dim]; cos, sin: [..., head_dim]
    low, high = x.float().chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat([-high, low], dim=-1) * sin[..., None, :]


class SoftCrossEntropy(torch.autograd.Function):
    """Cross entropy to the target's softmax over the draft vocabulary, in chunks of rows.

    Logits of 8192 words for thousands of rows are never held at once, and their gradient is formed
    where they are: ``softmax(draft) - softmax(target)``.

    Returns (loss, rank): the weighted sum of the cross entropies and, per row, how many words the
    head likes better than the true one (0: the head's first choice is right).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, log_p: Tensor, rows: Tensor, truth: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        # hidden: [n, hidden_size]; weight: [draft_vocab, hidden_size]
        # log_p: [targets, draft_vocab]; rows, truth (draft id or -1), w: [n]
        low = log_p.dtype
        hidden_low, weight_low = hidden.to(low), weight.to(low)
        grad_weight = torch.zeros_like(weight)
        grad_hidden = torch.empty_like(hidden_low)
        rank = torch.empty_like(truth)
        loss = torch.zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), 512):
            part = slice(start, start + 512)
            h = hidden_low[part]
            logits = (h @ weight_low.T).float()
            at_truth = logits.gather(1, truth[part].clamp(min=0)[:, None])
            rank[part] = (logits > at_truth).sum(1)
            log_q = logits.log_softmax(-1)
            p = log_p[rows[part]].float().exp_()
            loss -= (w[part] * (p * log_q).sum(-1)).sum()
            grad = ((log_q.exp_() - p) * w[part, None]).to(low)
            grad_hidden[part] = grad @ weight_low
            grad_weight += grad.T @ h
        rank[truth < 0] = weight.shape[0]
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        ctx.mark_non_differentiable(rank)
        return loss, rank

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None


@dataclass(frozen=True)
class Batch:
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
    def __init__(self, config: HeadConfig, embed: Tensor) -> None:
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
        cos, sin = rope_table(config, config.max_position_embeddings + 16)
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
        self, batch: Batch, steps: int, *, decay: float, keep_rank: int
    ) -> tuple[Tensor, list[StepResult]]:
        """Mean loss per query and the results of each step.

        A query takes part in step ``j + 1`` only where step ``j`` ranked the true token among its
        first ``keep_rank``: later steps are spent where a chain or tree can get to.
        """
        c, layer = self.config, self.midlayer
        groups = c.num_attention_heads // c.num_key_value_heads
        size, length = batch.features.shape[:2]
        steps_of = torch.arange(length)
        fused = self.fuse(batch.features)
        wide = self._wide(batch.ids[:, 1:], fused)  # position i sees x_{i+1}
        key, value = self._keys(wide, steps_of)
        # [batch, kv_heads, length, head_dim]
        key, value = key.transpose(1, 2), value.transpose(1, 2)

        query_mask = (steps_of >= batch.first[:, None]) & (steps_of < batch.rows[:, None] - 1)
        b, i = query_mask.nonzero(as_tuple=True)
        index = torch.arange(len(b))
        hits = torch.ones(len(b), dtype=torch.bool)
        hidden, wide = fused[b, i], wide[b, i]
        own: list[tuple[Tensor, Tensor]] = []
        results: list[StepResult] = []
        total = torch.zeros(())
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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: list[tuple[Tensor, Tensor]],
    b: Tensor,
    i: Tensor,
    groups: int,
) -> Tensor:
    """Attention of queries over the step-0 keys at positions <= i and their own later keys.

    query: [n, heads, head_dim]; key, value: [batch, kv_heads, length, head_dim];
    own: per later step ([n, kv_heads, head_dim], same); b, i: [n] sequence and position.
    Returns [n, heads * head_dim].
    """
    n, heads, dim = query.shape
    size, kv_heads, length, _ = key.shape
    # Queries go back to a grid: one matmul per sequence and KV head, no ragged loops.
    grid = query.new_zeros(size, length, heads, dim).index_put((b, i), query)
    grid = grid.view(size, length, kv_heads, groups, dim).permute(0, 2, 1, 3, 4)
    grid = grid.reshape(size, kv_heads, length * groups, dim)
    scores = (grid @ key.to(grid.dtype).transpose(-1, -2)).float() * dim**-0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril_().repeat_interleave(groups, 0)
    scores = scores.masked_fill(~causal, -torch.inf)
    if not own:
        mixed = scores.softmax(-1).to(grid.dtype) @ value.to(grid.dtype)
    else:
        q = query.view(n, kv_heads, groups, dim)
        extra = [(q * k[:, :, None]).sum(-1).float() * dim**-0.5 for k, _ in own]
        late = scores.new_zeros(size, length, kv_heads, groups, len(own))
        late = late.index_put((b, i), torch.stack(extra, dim=-1))
        late = late.permute(0, 2, 1, 3, 4).reshape(size, kv_heads, length * groups, len(own))
        weights = torch.cat([scores, late], dim=-1).softmax(-1)
        mixed = weights[..., :length].to(grid.dtype) @ value.to(grid.dtype)
        late = weights[..., length:].view(size, kv_heads, length, groups, len(own))
        late = late.permute(0, 2, 1, 3, 4)[b, i]
        # late: [n, kv_heads, groups, steps]
    mixed = mixed.view(size, kv_heads, length, groups, dim).permute(0, 2, 1, 3, 4)[b, i]
    if own:
        for step, (_, v) in enumerate(own):
            mixed = mixed + late[..., step, None] * v[:, :, None]
    return mixed.reshape(n, heads * dim)
