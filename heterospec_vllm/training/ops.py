# SPDX-License-Identifier: Apache-2.0
"""Tensor functions of the trainer: rotary positions, the fused loss, attention of the unroll."""

from __future__ import annotations

import torch
from torch import Tensor


def lower(x: Tensor) -> Tensor:
    """To autocast's dtype, once for all the matmuls that read ``x`` (each would cast it itself)."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def rope_table(head_dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin of shape [length, head_dim], in the half-split order of Llama."""
    inverse = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
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
    def forward(
        ctx, hidden: Tensor, weight: Tensor, log_p: Tensor, rows: Tensor, truth: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        # hidden: [n, hidden_size]; weight: [draft_vocab, hidden_size]
        # log_p: [targets, draft_vocab]; rows, truth (draft id or -1), w: [n]
        low = log_p.dtype
        hidden_low, weight_low = hidden.to(low), weight.to(low)
        grad_weight = torch.zeros_like(weight)
        grad_hidden = torch.empty_like(hidden_low)
        rank = torch.empty_like(truth)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = 512 if hidden.device.type == "cpu" else 8192
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
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
    def backward(ctx, grad_loss: Tensor, _: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None


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
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril_()
    causal = causal.repeat_interleave(groups, 0)
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
