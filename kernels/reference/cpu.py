# SPDX-License-Identifier: Apache-2.0
"""The truth that every tree attention kernel is tested against: plain PyTorch in float64."""

import torch

from ..cpu.head_layer import HeadLayerWeights
from ..cpu.packed_linear import unpack_weight
from ..cpu.tree_attention import TreeAttentionInputs


def paged_keys_values(
    # [num_blocks, num_kv_heads, block_size, head_size], `vec` layout
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [max_blocks], int32
    blocks: torch.Tensor,
    seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers one request's keys and values, each [num_kv_heads, seq_len, head_size], float64."""
    _, num_kv_heads, block_size, head_size = key_cache.shape
    used = blocks[: -(-seq_len // block_size)].long()
    # The memory of a block's keys is [head_size, block_size], whatever the tensor's shape says.
    keys = key_cache[used].reshape(-1, num_kv_heads, head_size, block_size)
    keys = keys.permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_size)
    values = value_cache[used].permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_size)
    return keys[:, :seq_len].double(), values[:, :seq_len].double()


def tree_attention(
    inputs: TreeAttentionInputs,
    # [num_tokens, num_heads, head_size], written
    output: torch.Tensor,
) -> None:
    """What `tree_attention_cpu` computes (same arguments, pages in `vec` layout), one row at a time.

    Each row takes only the keys it sees, so nothing a hidden slot holds can reach it.
    """
    pages, rows, query = inputs.pages, inputs.rows, inputs.query
    group = query.shape[1] // pages.key_cache.shape[1]
    starts = rows.query_start_loc.tolist()
    for req, seq_len in enumerate(rows.seq_lens.tolist()):
        first, end = starts[req], starts[req + 1]
        if first == end:
            continue
        blocks = rows.block_table[req]
        keys, values = paged_keys_values(pages.key_cache, pages.value_cache, blocks, seq_len)
        context = seq_len - (end - first)
        for row in range(first, end):
            tree = int(rows.ancestor_mask[row]) & (2**64 - 1)
            seen = [*range(context), *(context + j for j in range(end - first) if tree >> j & 1)]
            row_keys = keys[:, seen].repeat_interleave(group, dim=0)
            row_values = values[:, seen].repeat_interleave(group, dim=0)
            scores = torch.einsum("hd,hkd->hk", query[row].double(), row_keys) * pages.scale
            weights = scores.softmax(dim=-1)
            output[row] = torch.einsum("hk,hkd->hd", weights, row_values).to(output.dtype)


def draft_attention(
    # [num_tokens, num_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], `vec` layout
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [num_tokens, num_heads, head_size], written
    output: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32
    context_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32
    block_table: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size]
    scratch_key: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size]
    scratch_value: torch.Tensor,
    # [num_tokens, max_tail], int32, -1 padded
    tail_index: torch.Tensor,
    scale: float,
) -> None:
    """What `draft_attention_cpu` computes (same arguments), one request at a time.

    Also what runs where the library cannot be built.
    """
    num_kv_heads = key_cache.shape[1]
    starts = query_start_loc.tolist()
    for req, context in enumerate(context_lens.tolist()):
        rows = slice(starts[req], starts[req + 1])
        keys, values = paged_keys_values(key_cache, value_cache, block_table[req], context)
        tail, num_rows = tail_index[rows], starts[req + 1] - starts[req]
        hidden = (tail < 0)[:, None, None, :]
        at = tail.clamp(min=0).long()
        # [num_rows, num_kv_heads, group, head_size]
        q = query[rows].double().unflatten(1, (num_kv_heads, -1))
        paged = torch.einsum("rngd,nkd->rngk", q, keys)
        beside = torch.einsum("rngd,rknd->rngk", q, scratch_key[at].double())
        beside = beside.masked_fill(hidden, -torch.inf)
        weights = (torch.cat([paged, beside], dim=-1) * scale).softmax(dim=-1)
        scratch = scratch_value[at].double().masked_fill((tail < 0)[:, :, None, None], 0)
        out = torch.einsum("rngk,nkd->rngd", weights[..., :context], values)
        out += torch.einsum("rngk,rknd->rngd", weights[..., context:], scratch)
        output[rows] = out.reshape(num_rows, -1, query.shape[2]).to(output.dtype)


def kv_compact(
    # layers, each [num_blocks, num_kv_heads, block_size, 2 * head_size], `vec` layout
    kv_caches: list[torch.Tensor],
    # [num_moves], int64
    sources: torch.Tensor,
    # [num_moves], int64
    targets: torch.Tensor,
) -> None:
    """What `kv_compact_cpu` does (same arguments), one move at a time."""
    for cache in kv_caches:
        num_blocks, num_kv_heads, block_size, both = cache.shape
        head_size = both // 2
        halves = cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
        keys = halves[:, :, 0].unflatten(-1, (head_size, block_size))
        values = halves[:, :, 1].unflatten(-1, (block_size, head_size))
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            from_block, from_row = divmod(source, block_size)
            to_block, to_row = divmod(target, block_size)
            keys[to_block, :, :, to_row] = keys[from_block, :, :, from_row].clone()
            values[to_block, :, to_row] = values[from_block, :, from_row].clone()


def gather_rows(
    # each [num_source_rows, columns]
    sources: list[torch.Tensor],
    # [num_rows], int64
    rows: torch.Tensor,
) -> torch.Tensor:
    """[num_rows, columns of all sources]: rows of several matrices side by side."""
    return torch.cat([source[rows] for source in sources], dim=1)


def argmax_rows(
    # [num_values_rows, num_columns]
    values: torch.Tensor,
    # [num_rows], int64
    rows: torch.Tensor,
) -> torch.Tensor:
    """What `argmax_rows_cpu` computes (same arguments); also what runs without the library."""
    return values[rows].float().argmax(dim=-1)


def walk(
    logits: torch.Tensor,
    first_row: torch.Tensor,
    parents: torch.Tensor,
    tokens: torch.Tensor,
    max_emitted: int,
    temperatures: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `walk_cpu` computes (same arguments)."""
    shape = tokens.shape[0], max_emitted
    rows, emitted = torch.full(shape, -1), torch.full(shape, -1)
    num_emitted = torch.zeros_like(first_row)
    for req in range(shape[0]):
        row: int | None = 0
        while row is not None and num_emitted[req] < max_emitted:
            at = int(num_emitted[req])
            scores = logits[first_row[req] + row].float()
            if temperatures is not None and seeds is not None and temperatures[req] >= 1e-5:
                noise = gumbel_noise(int(seeds[req, at]), scores.shape[0])
                scores = scores / temperatures[req]
                k = scores.shape[0] if top_k is None else int(top_k[req])
                p = 1.0 if top_p is None else float(top_p[req])
                scores = best_tokens(scores, k, p).double() + noise
            token = scores.argmax()
            rows[req, at], emitted[req, at] = row, token
            num_emitted[req] += 1
            children = (parents[req, 1:] == row) & (tokens[req] == token)
            row = int(children.nonzero()[0, 0]) + 1 if children.any() else None
    return rows, emitted, num_emitted


def best_tokens(
    # [vocab_size]
    logits: torch.Tensor,
    top_k: int,
    top_p: float,
) -> torch.Tensor:
    """The logits with -inf where top-k, then top-p leave a token out (vLLM's `apply_top_k_top_p`, in float64)."""
    ordered, tokens = logits.sort(stable=True)
    left_out = ordered < ordered[-top_k]
    mass = ordered.double().masked_fill(left_out, -torch.inf).softmax(dim=0).cumsum(dim=0)
    if top_p < 1.0:
        left_out |= mass <= 1.0 - top_p
    left_out[-1] = False
    return logits.masked_fill(torch.zeros_like(left_out).scatter(0, tokens, left_out), -torch.inf)


def gumbel_noise(seed: int, count: int) -> torch.Tensor:
    """[count] float64: the noise that vLLM's CPU op `fused_gumbel_argmax` adds to the logits of one row.

    Token i has the i-th output of a SplitMix64 stream whose state starts at a hash of the seed; 53 bits of it are
    the uniform variate (vLLM issue 59786 says why).
    """

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:  # unsigned
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    def hashed(z: torch.Tensor) -> torch.Tensor:
        z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
        z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
        return z ^ shifted(z, 31)

    tokens = torch.arange(1, count + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    hashes = hashed(hashed(torch.tensor([seed])) + tokens)
    uniform = (shifted(hashes, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def head_layer(
    weights: HeadLayerWeights,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    first_row: int,
    tail_index: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `head_layer_cpu` computes (same arguments), in float64 but for what it stores."""
    w, num_rows, dim = weights, token_ids.shape[0], weights.head_size
    num_heads, num_kv_heads = w.num_heads, w.num_kv_heads

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.epsilon)
        return x * scale * weight.double()

    def linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return x @ unpack_weight(packed).double().T

    before = hidden.double()
    normed_hidden = norm(before, w.hidden_norm)
    residual = normed_hidden if w.norm_before_residual else before
    embedded = norm(w.embedding[token_ids].double(), w.embed_norm)
    heads = linear(torch.cat([embedded, normed_hidden], dim=-1), w.qkv)
    heads = heads.view(num_rows, -1, dim)
    half = w.cos_sin.shape[1] // 2
    cosines, sines = w.cos_sin[positions].double()[:, None].chunk(2, dim=-1)
    x, y = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    rotated = heads.clone()
    rotated[..., :half] = x * cosines - y * sines
    rotated[..., half : 2 * half] = y * cosines + x * sines
    query = rotated[:, :num_heads].to(hidden.dtype)
    key = rotated[:, num_heads : num_heads + num_kv_heads].to(hidden.dtype)
    value = heads[:, num_heads + num_kv_heads :].to(hidden.dtype)
    scratch_key[first_row : first_row + num_rows] = key
    scratch_value[first_row : first_row + num_rows] = value
    attended = torch.empty_like(query)
    draft_attention(
        query, key_cache, value_cache, attended, query_start_loc, context_lens, block_table,
        scratch_key, scratch_value, tail_index, w.scale,
    )  # fmt: skip
    for row, slot in enumerate([] if slots is None else slots.tolist()):
        block, inside = divmod(slot, key_cache.shape[2])
        for h in range(num_kv_heads):
            key_cache[block, h].view(dim, -1)[:, inside] = key[row, h]
            value_cache[block, h, inside] = value[row, h]
    residual = residual + linear(attended.double().flatten(1), w.attention_output)
    gate, up = linear(norm(residual, w.post_norm), w.gate_up).chunk(2, dim=-1)
    residual = residual + linear(torch.nn.functional.silu(gate) * up, w.down)
    normed = norm(residual, w.final_norm).to(hidden.dtype)
    return normed, normed.clone() if w.norm_output else residual.to(hidden.dtype)


def top_tokens(
    rows: torch.Tensor,
    # [draft_vocab_size, hidden_size], as checkpoints hold it
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    top_k: int,
    masks: torch.Tensor | None = None,
    mask_of_row: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `top_tokens_cpu` computes, in float64."""
    logits = rows.double() @ weight.double().T
    if masks is not None:
        assert mask_of_row is not None
        forbid(logits, masks, mask_of_row, offsets)
    log_probs, columns = logits.log_softmax(dim=-1).topk(top_k)
    tokens = columns if offsets is None else columns + offsets[columns]
    return tokens, log_probs.float()


def forbid(
    # [num_rows, num_columns], written
    logits: torch.Tensor,
    # [num_masks, num_words], int32, packed: bit 1 for tokens that are allowed
    masks: torch.Tensor,
    # [num_rows], int32: -1 where all tokens are allowed
    mask_of_row: torch.Tensor,
    # [num_columns], int64: what is added to a column to get its token
    offsets: torch.Tensor | None = None,
) -> None:
    """Makes the columns of forbidden tokens minus infinity, in place."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    if offsets is not None:
        tokens = tokens + offsets
    for row in torch.nonzero(mask_of_row >= 0).flatten().tolist():
        words = masks[int(mask_of_row[row])]
        logits[row, (words[tokens // 32] >> (tokens % 32)) & 1 == 0] = -torch.inf


def packed_linear(
    # [num_rows, depth]
    rows: torch.Tensor,
    # [num_columns, depth], as checkpoints hold it
    weight: torch.Tensor,
    # [num_columns]
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_rows, num_columns] float64: a linear layer."""
    out = rows.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def aux_fusion(
    features: torch.Tensor,
    norms: torch.Tensor | None,
    # [num_columns, num_aux * aux_size], as checkpoints hold it
    weight: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """What `aux_fusion_cpu` computes, in float64."""
    taps = features.double()
    if norms is not None:
        taps = taps.unflatten(1, tuple(norms.shape))
        taps = taps * torch.rsqrt(taps.pow(2).mean(-1, keepdim=True) + epsilon) * norms.double()
        taps = taps.flatten(1)
    return (taps @ weight.double().T).to(weight.dtype)
