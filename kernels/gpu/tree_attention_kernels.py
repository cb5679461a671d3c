# SPDX-License-Identifier: Apache-2.0
"""Device code of tree attention over a paged KV cache (Triton).

    output[i] = sum over visible j of softmax_j(cap(scale * q_i . k_j)) v_j,   cap(x) = c tanh(x / c)

Row i of a request sees its context, slots 0..context - 1, and of the step's own rows, slots context + j, those whose
bit j is set in its ancestor mask. One program owns a tile of one request's rows, all query heads of one KV head packed
into it (packed row m = row m // group, head m % group), and one share of the context; share 0 also takes the tree. With
more than one share a second launch adds the shares up. Shares are cut on the device from `seq_lens`, so the grid
depends on capacities only: no host reads, no data-dependent shapes, safe to capture in a CUDA graph. Scores and weights
are never materialised beyond one [BLOCK_M, BLOCK_N] tile. The context loop has no tree mask in it: it would cost a
64-bit shift per score.

A slot that a row does not see cannot reach it, whatever it holds. Slots outside the request are not loaded. A tree
slot that only some rows see is loaded for all: its score is masked before the exponential and what is not finite in its
value is zeroed (0 * NaN is NaN) and turned into a NaN score for those who do see it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _popcount(x):
    """Bits set in each int64, as int32."""
    x = x.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 0x7F).to(tl.int32)


@triton.jit
def _widened(x, dtype: tl.constexpr):
    """KV values in the dtype of the dot product; uint8 are the bits of e4m3fn, decoded where hardware cannot."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        # As float16 the exponent's bias is 15 instead of 7: 2^8 too small, subnormals included.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        wide = half.to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), wide).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def _attend_slots(
    # [BLOCK_M, HEAD_PADDED]
    q,
    # of this KV head
    key_ptr,
    value_ptr,
    # [max_blocks], of this request
    blocks_ptr,
    # [BLOCK_N] position of each slot in its request
    slots,
    # [BLOCK_N]
    present,
    # [BLOCK_M, BLOCK_N]
    visible,
    key_block_stride,
    key_token_stride,
    key_feature_stride,
    value_block_stride,
    value_token_stride,
    value_feature_stride,
    score_scale,
    soft_cap,
    # [BLOCK_M, HEAD_PADDED], float32
    acc,
    # [BLOCK_M], float32: highest score so far, in powers of two
    high,
    # [BLOCK_M], float32: weights so far
    total,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IN_TREE: tl.constexpr,
):
    """Online softmax over one tile of slots: (acc, high, total) with its keys added."""
    features = tl.arange(0, q.shape[1])
    inside = features < HEAD_SIZE
    blocks = tl.load(blocks_ptr + slots // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    within = (slots % BLOCK_SIZE).to(tl.int64)
    key_at = blocks * key_block_stride + within * key_token_stride
    value_at = blocks * value_block_stride + within * value_token_stride
    k_ptrs = key_ptr + key_at[None, :] + (features * key_feature_stride)[:, None]
    v_ptrs = value_ptr + value_at[:, None] + (features * value_feature_stride)[None, :]
    k = _widened(tl.load(k_ptrs, mask=present[None, :] & inside[:, None], other=0.0), q.dtype)
    v = _widened(tl.load(v_ptrs, mask=present[:, None] & inside[None, :], other=0.0), q.dtype)
    scores = tl.dot(q, k, input_precision="ieee") * score_scale
    if HAS_SOFT_CAP:
        scores = (soft_cap * LOG2_E) * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
    if IN_TREE:
        wide = v.to(tl.float32)
        finite = tl.abs(wide) < float("inf")
        spoilt = tl.min(finite.to(tl.int32), axis=1) == 0
        v = tl.where(finite, wide, 0.0).to(v.dtype)
        scores = tl.where(spoilt[None, :], float("nan"), scores)
    scores = tl.where(visible, scores, float("-inf"))
    new_high = tl.maximum(high, tl.max(scores, axis=1))
    # A row that has seen nothing yet: -inf - -inf is NaN.
    base = tl.where(new_high == float("-inf"), 0.0, new_high)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(high - base)
    total = total * kept + tl.sum(weights, axis=1)
    added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc * kept[:, None] + added, new_high, total


@triton.jit
def _sees(
    # [BLOCK_M], int64: of the tile's rows
    ancestors,
    # [max_rows], of this request
    masks_ptr,
    # [BLOCK_N] rows of this request
    other,
    # [BLOCK_N]
    present,
    context,
    # [BLOCK_M] oldest position each row sees
    oldest,
    SLIDING_WINDOW: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] which of the request's rows each row of the tile sees."""
    # Shifting an int64 by 64 or more is undefined.
    shift = tl.where(present, other, 0).to(tl.int64)
    visible = (((ancestors[:, None] >> shift[None, :]) & 1) != 0) & present[None, :]
    if SLIDING_WINDOW:
        depth = _popcount(tl.load(masks_ptr + other, mask=present, other=1)) - 1
        visible = visible & ((context + depth)[None, :] >= oldest[:, None])
    return visible


@triton.jit
def _share_of(
    context,
    split,
    NUM_SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
):
    """The slots of the context that a split attends to, [begin, end); shares are whole tiles."""
    # The root sees furthest back.
    lowest = tl.maximum(context + 1 - SLIDING_WINDOW, 0) if SLIDING_WINDOW else 0
    share = tl.cdiv(tl.cdiv(context - lowest, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = lowest + split * tl.maximum(share, MIN_SHARE)
    return begin, tl.minimum(begin + tl.maximum(share, MIN_SHARE), context)


@triton.jit
def _mean(acc, total, v_scale_ptr, HAS_KV_SCALES: tl.constexpr):
    """[BLOCK_M, HEAD_PADDED] the weighted means of a tile's values."""
    # Packed rows beyond the request saw nothing.
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if HAS_KV_SCALES:
        mean *= tl.load(v_scale_ptr)
    return mean


@triton.jit
def _store_share(
    partial_ptr,
    lse_ptr,
    # [BLOCK_M], int64
    at,
    # [HEAD_PADDED]
    features,
    # [BLOCK_M]
    real,
    acc,
    high,
    total,
):
    """Writes a tile's weighted mean and the log2 of its weights; of an empty share only the latter, -inf."""
    seen = total != 0.0
    safe = tl.where(seen, total, 1.0)
    tl.store(lse_ptr + at, tl.where(seen, high + tl.log2(safe), float("-inf")), mask=real)
    offsets = at[:, None] * acc.shape[1] + features[None, :]
    tl.store(partial_ptr + offsets, acc / safe[:, None], mask=(real & seen)[:, None])


@triton.jit
def tree_attention_kernel(
    # [num_tokens, num_heads, HEAD_SIZE]
    query_ptr,
    # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_SIZE]
    key_ptr,
    # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_SIZE]
    value_ptr,
    # [num_tokens, num_heads, HEAD_SIZE], written if NUM_SPLITS is 1
    output_ptr,
    # [num_tokens, num_heads, NUM_SPLITS, HEAD_PADDED], float32, written otherwise
    partial_ptr,
    # [num_tokens, num_heads, NUM_SPLITS], float32, written otherwise
    lse_ptr,
    # [num_reqs + 1], int32
    query_start_loc_ptr,
    # [num_reqs], int32
    seq_lens_ptr,
    # [num_reqs, max_blocks], int32
    block_table_ptr,
    # [num_tokens] or [num_reqs, max_rows], int64
    ancestor_mask_ptr,
    # [1], float32
    k_scale_ptr,
    # [1], float32
    v_scale_ptr,
    scale,
    soft_cap,
    max_rows,
    num_tiles,
    num_heads,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    key_feature_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    value_feature_stride,
    block_table_stride,
    mask_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_KV_SCALES: tl.constexpr,
    MASK_BY_REQUEST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (num_reqs * num_tiles, num_kv_heads, NUM_SPLITS); programs beyond a request's rows end at once."""
    req = tl.program_id(0) // num_tiles
    packed = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first = tl.load(query_start_loc_ptr + req)
    num_rows = tl.load(query_start_loc_ptr + req + 1) - first
    if (tl.program_id(0) % num_tiles * BLOCK_M >= num_rows * GROUP) | (num_rows > max_rows):
        return
    context = tl.load(seq_lens_ptr + req) - num_rows
    blocks_ptr = block_table_ptr + req.to(tl.int64) * block_table_stride
    masks_ptr = ancestor_mask_ptr + (req.to(tl.int64) * mask_stride if MASK_BY_REQUEST else first)
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    row = packed // GROUP
    token = (first + row).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    features = tl.arange(0, HEAD_PADDED)
    inside = (row < num_rows)[:, None] & (features < HEAD_SIZE)[None, :]
    at = (token * query_token_stride + head * query_head_stride)[:, None] + features[None, :]
    q = tl.load(query_ptr + at, mask=inside, other=0)
    q = q.to(tl.float32) if WIDEN else q
    ancestors = tl.load(masks_ptr + row, mask=row < num_rows, other=0)
    score_scale = scale * tl.load(k_scale_ptr) if HAS_KV_SCALES else scale
    score_scale = score_scale / soft_cap if HAS_SOFT_CAP else score_scale * LOG2_E
    # The oldest position each row sees.
    oldest = context + _popcount(ancestors) - SLIDING_WINDOW if SLIDING_WINDOW else row
    begin, end = _share_of(context, split, NUM_SPLITS, MIN_SHARE, BLOCK_N, SLIDING_WINDOW)
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], dtype=tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        present = slots < end
        recent = slots[None, :] >= oldest[:, None] if SLIDING_WINDOW else present[None, :]
        acc, high, total = _attend_slots(
            q, key_ptr, value_ptr, blocks_ptr, slots, present, present[None, :] & recent,
            key_block_stride, key_token_stride, key_feature_stride, value_block_stride, value_token_stride,
            value_feature_stride, score_scale, soft_cap, acc, high, total,
            HEAD_SIZE, BLOCK_SIZE, HAS_SOFT_CAP, IN_TREE=False,
        )  # fmt: skip
    for start in range(0, tl.where(split == 0, num_rows, 0), BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        present = other < num_rows
        visible = _sees(ancestors, masks_ptr, other, present, context, oldest, SLIDING_WINDOW)
        acc, high, total = _attend_slots(
            q, key_ptr, value_ptr, blocks_ptr, context + other, present, visible,
            key_block_stride, key_token_stride, key_feature_stride, value_block_stride, value_token_stride,
            value_feature_stride, score_scale, soft_cap, acc, high, total,
            HEAD_SIZE, BLOCK_SIZE, HAS_SOFT_CAP, IN_TREE=True,
        )  # fmt: skip
    if NUM_SPLITS == 1:
        to = (token * output_token_stride + head * output_head_stride)[:, None] + features[None, :]
        out = _mean(acc, total, v_scale_ptr, HAS_KV_SCALES).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + to, out, mask=inside)
    else:
        _store_share(
            partial_ptr, lse_ptr, (token * num_heads + head) * NUM_SPLITS + split, features,
            row < num_rows, acc, high, total,
        )  # fmt: skip


@triton.jit
def tree_attention_sum_kernel(
    # [num_tokens, num_heads, NUM_SPLITS, HEAD_PADDED], float32
    partial_ptr,
    # [num_tokens, num_heads, NUM_SPLITS], float32
    lse_ptr,
    # [num_tokens, num_heads, HEAD_SIZE], written
    output_ptr,
    # [num_reqs + 1], int32
    query_start_loc_ptr,
    # [1], float32
    v_scale_ptr,
    max_rows,
    num_heads,
    output_token_stride,
    output_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_KV_SCALES: tl.constexpr,
):
    """Grid (num_reqs * max_rows, num_heads): one output row, its shares weighted by their sums."""
    req = tl.program_id(0) // max_rows
    row = tl.program_id(0) % max_rows
    head = tl.program_id(1)
    first = tl.load(query_start_loc_ptr + req)
    num_rows = tl.load(query_start_loc_ptr + req + 1) - first
    if (row >= num_rows) | (num_rows > max_rows):
        return
    token = (first + row).to(tl.int64)
    at = (token * num_heads + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    lse = tl.load(lse_ptr + at)
    # Share 0 holds the row itself, so the highest is a number; NaN has to come through.
    present = lse != float("-inf")
    weights = tl.where(present, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    features = tl.arange(0, HEAD_PADDED)
    offsets = at[:, None] * HEAD_PADDED + features[None, :]
    partial = tl.load(partial_ptr + offsets, mask=present[:, None], other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    if HAS_KV_SCALES:
        out *= tl.load(v_scale_ptr)
    to = output_ptr + token * output_token_stride + head * output_head_stride + features
    tl.store(to, out.to(output_ptr.dtype.element_ty), mask=features < HEAD_SIZE)
