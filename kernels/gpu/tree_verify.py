# SPDX-License-Identifier: Apache-2.0
"""Sample-then-match verification of draft trees on the device (Triton).

Every row of a tree gets the token that plain decoding would emit there:

    token(row) = argmax_j (x_j / T + g_j),  g_j = -log(-log1p(-u_j)),  u_j = hash(seed, position, j)
    token(row) = argmax_j x_j               where T is 0

and each request is walked from its root: emit the row's token; if a child carries it go there, else stop.

Launch 1, `_sample_rows_kernel`: one program reads one part of one row's vocabulary, once, and leaves
its best score and token. Launch 2, `_walk_kernel`: one program per request merges the parts of the rows
it visits, and of no others, and writes the results. Noise and scores are never materialised.

The noise is keyed as vLLM 0.32's Model Runner V2 keys it (v1/worker/gpu/sample/gumbel.py): MurmurHash3
of the request's 64-bit seed, the low half of the row's position and the token, as a float32 in (0, 1).
A node at depth d has position `root + d`, exactly the position at which plain decoding would emit
there, so a seeded request's tokens equal plain decoding's, whatever the tree.

Of vLLM's sampling steps these are inside: temperature (if `apply_temperature`), Gumbel noise, argmax.
These must have been applied to the logits before, in vLLM's order, row by row: logit bias, penalties,
bad words, grammar masks, custom processors, temperature (then pass `apply_temperature=False`), min-p,
top-k, top-p. Temperature may be left to the kernel only where none of the last three is in use, since
they act on scaled logits. float64 noise (`use_fp64_gumbel`) and fused samplers of other libraries are
not reproduced; vLLM uses the latter only for batches without seeds.
"""

from dataclasses import fields

import torch
import triton
import triton.language as tl

from ..reference.tree_verify import SamplingKeys, TreeBatch, TreeWalks
from .aot_registry import AotConfig

MAX_NODES = 63
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BLOCK = 1024
_PART = 8192  # vocabulary entries a program reads


@triton.jit
def _hash_round(state, word):
    """One body round of MurmurHash3 x86_32 over uint32."""
    word = word * 0xCC9E2D51
    word = ((word << 15) | (word >> 17)) * 0x1B873593
    state = state ^ word
    return ((state << 13) | (state >> 19)) * 5 + 0xE6546B64


@triton.jit
def _gumbel_noise(seed, position, tokens):
    """float32 Gumbel noise of each token: MurmurHash3 of four 32-bit words, then the inverse CDF."""
    seed = seed.to(tl.int64)
    state = _hash_round((seed ^ seed).to(tl.uint32), (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _hash_round(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _hash_round(state, (position & 0xFFFFFFFF).to(tl.uint32))
    state = _hash_round(state, tokens.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    # (state + 1/2) / 2^32 from two halves, each of which float32 holds exactly.
    high = (state >> 16).to(tl.int32).to(tl.float32) * 1.52587890625e-05
    uniform = high + ((state & 0xFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # -log1p(-u): the winning tail is u -> 0, where 1 - u has lost what distinguishes the tokens, so
    # small u take eight terms of the series. Order and constants as in vLLM: bits must agree.
    series = 1.0 / 7.0 + uniform * (1.0 / 8.0)
    series = 1.0 / 6.0 + uniform * series
    series = 1.0 / 5.0 + uniform * series
    series = 1.0 / 4.0 + uniform * series
    series = 1.0 / 3.0 + uniform * series
    series = 1.0 / 2.0 + uniform * series
    series = 1.0 + uniform * series
    direct = tl.log(tl.maximum(1.0 - uniform, 5.960464477539063e-08))
    return -tl.log(-tl.where(uniform < 0.25, -uniform * series, direct))


@triton.jit
def _sample_rows_kernel(
    # [num_rows, vocab_size]
    logits_ptr,
    logits_stride,
    # [num_rows]
    expanded_idx_mapping_ptr,
    # [num_rows]
    positions_ptr,
    # [max_num_reqs]
    temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_rows, num_parts]
    part_score_ptr,
    # [num_rows, num_parts]
    part_token_ptr,
    vocab_size,
    APPLY_TEMPERATURE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    state = tl.load(expanded_idx_mapping_ptr + row).to(tl.int64)
    if state >= 0:
        temperature = tl.load(temperature_ptr + state)
        seed = tl.load(seeds_ptr + state)
        position = tl.load(positions_ptr + row)
        lanes = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_token = part * PART + lanes
        for start in range(0, PART, BLOCK):
            tokens = part * PART + start + lanes
            in_vocab = tokens < vocab_size
            scores = tl.load(
                logits_ptr + row * logits_stride + tokens, mask=in_vocab, other=float("-inf")
            ).to(tl.float32)
            scores = tl.where(scores == scores, scores, float("-inf"))
            if temperature != 0.0:
                if APPLY_TEMPERATURE:
                    scores = scores / temperature
                scores = scores + _gumbel_noise(seed, position, tokens)
            # Strictly greater: the first of equals wins, as in an argmax.
            better = scores > best
            best_token = tl.where(better, tokens, best_token)
            best = tl.where(better, scores, best)
        score = tl.max(best, axis=0)
        token = tl.min(tl.where(best == score, best_token, 0x7FFFFFFF), axis=0)
        out = row * tl.num_programs(1) + part
        tl.store(part_score_ptr + out, score)
        tl.store(part_token_ptr + out, token)


@triton.jit
def _walk_kernel(
    # [num_rows, num_parts]
    part_score_ptr,
    # [num_rows, num_parts]
    part_token_ptr,
    # [num_reqs + 1]
    cu_num_logits_ptr,
    # [num_reqs, max_nodes]
    tokens_ptr,
    tokens_stride,
    # [num_reqs, max_nodes + 1]
    parents_ptr,
    parents_stride,
    # [num_reqs]
    num_nodes_ptr,
    # [num_reqs, max_emitted]
    sampled_ptr,
    # [num_reqs, max_emitted]
    rows_ptr,
    # [num_reqs, max_emitted]
    logits_rows_ptr,
    # [num_reqs]
    num_sampled_ptr,
    # [num_reqs]
    last_sampled_ptr,
    num_parts,
    max_emitted,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_num_logits_ptr + req)
    num_rows = tl.load(cu_num_logits_ptr + req + 1) - first
    nodes = tl.arange(0, BLOCK_ROWS)
    num_nodes = tl.minimum(tl.load(num_nodes_ptr + req), num_rows - 1)
    is_node = (nodes >= 1) & (nodes <= num_nodes)
    parents = tl.load(parents_ptr + req * parents_stride + nodes, mask=is_node, other=-1)
    drafted = tl.load(tokens_ptr + req * tokens_stride + nodes - 1, mask=is_node, other=-1)
    parts = tl.arange(0, BLOCK_PARTS)

    row = tl.where(num_rows > 0, 0, -1)
    depth = 0
    last = tl.full([], -1, tl.int64)
    out = req * max_emitted
    while (row >= 0) & (depth < max_emitted):
        at = (first + row).to(tl.int64) * num_parts + parts
        # Below -inf there is nothing, so absent parts must lose ties by their token.
        scores = tl.load(part_score_ptr + at, mask=parts < num_parts, other=float("-inf"))
        tokens = tl.load(part_token_ptr + at, mask=parts < num_parts, other=0x7FFFFFFF)
        best = tl.max(scores, axis=0)
        last = tl.min(tl.where(scores == best, tokens, 0x7FFFFFFF), axis=0).to(tl.int64)
        tl.store(sampled_ptr + out + depth, last)
        tl.store(rows_ptr + out + depth, row)
        tl.store(logits_rows_ptr + out + depth, first + row)
        child = tl.min(
            tl.where(is_node & (parents == row) & (drafted == last), nodes, BLOCK_ROWS), axis=0
        )
        # A parent comes before its children; a corrupt tree must not walk in circles.
        row = tl.where((child < BLOCK_ROWS) & (child > row), child, -1)
        depth += 1
    tl.store(num_sampled_ptr + req, depth)
    tl.store(last_sampled_ptr + req, last)
    while depth < max_emitted:
        tl.store(sampled_ptr + out + depth, -1)
        tl.store(rows_ptr + out + depth, -1)
        tl.store(logits_rows_ptr + out + depth, -1)
        depth += 1


def _require(name: str, tensor: torch.Tensor, shape: tuple, dtype: torch.dtype, like) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} of {tensor.dtype}, needed: {shape} of {dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, needed: {like.device}")
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: the last dimension has stride {tensor.stride(-1)}, allowed: 1")


def _check(logits: torch.Tensor, trees: TreeBatch, keys: SamplingKeys, out: TreeWalks) -> None:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits: dtype {logits.dtype}, allowed: {[*_DTYPES]}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, needed: [num_rows, vocab_size]")
    num_rows, vocab_size = logits.shape
    _require("logits", logits, (num_rows, vocab_size), logits.dtype, logits)
    num_reqs, max_nodes = trees.tokens.shape
    if max_nodes > MAX_NODES:
        raise ValueError(f"trees.tokens: {max_nodes} nodes a tree, allowed: {MAX_NODES}")
    max_num_reqs = keys.temperature.shape[0]
    max_emitted = out.sampled.shape[1]
    int32, int64 = torch.int32, torch.int64
    for name, tensor, shape, dtype in (
        ("trees.cu_num_logits", trees.cu_num_logits, (num_reqs + 1,), int32),
        ("trees.tokens", trees.tokens, (num_reqs, max_nodes), int64),
        ("trees.parents", trees.parents, (num_reqs, max_nodes + 1), int32),
        ("trees.num_nodes", trees.num_nodes, (num_reqs,), int32),
        ("keys.expanded_idx_mapping", keys.expanded_idx_mapping, (num_rows,), int32),
        ("keys.positions", keys.positions, (num_rows,), int64),
        ("keys.temperature", keys.temperature, (max_num_reqs,), torch.float32),
        ("keys.seeds", keys.seeds, (max_num_reqs,), int64),
        ("out.sampled", out.sampled, (num_reqs, max_emitted), int64),
        ("out.rows", out.rows, (num_reqs, max_emitted), int32),
        ("out.logits_rows", out.logits_rows, (num_reqs, max_emitted), int32),
        ("out.num_sampled", out.num_sampled, (num_reqs,), int32),
        ("out.last_sampled", out.last_sampled, (num_reqs,), int64),
    ):
        _require(name, tensor, shape, dtype, logits)
    for field in fields(out):
        if not getattr(out, field.name).is_contiguous():
            raise ValueError(f"out.{field.name}: must be contiguous")


def tree_verify(
    # [num_rows, vocab_size] float32, bfloat16 or float16; any row stride, entries adjacent
    logits: torch.Tensor,
    trees: TreeBatch,
    keys: SamplingKeys,
    out: TreeWalks,
    *,
    apply_temperature: bool,
) -> TreeWalks:
    """Samples every row and walks every tree; fills and returns `out`.

    Two launches of fixed shape, no host read: all counts are read on the device. A walk ends at the
    capacity of `out`, so a tree may be deeper than it. NaN logits count as -inf; a row without a
    finite entry emits token 0, as vLLM does.

    Raises:
        ValueError: a shape, dtype, stride or device is not as documented on the records, or a tree
            may have more than 63 nodes; the message names the argument.
    """
    _check(logits, trees, keys, out)
    num_rows, vocab_size = logits.shape
    num_reqs, max_nodes = trees.tokens.shape
    if num_reqs == 0:
        return out
    num_parts = triton.cdiv(vocab_size, _PART)
    part_score = torch.empty(num_rows, num_parts, device=logits.device)
    part_token = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    if num_rows:
        _sample_rows_kernel[(num_rows, num_parts)](
            logits,
            logits.stride(0),
            keys.expanded_idx_mapping,
            keys.positions,
            keys.temperature,
            keys.seeds,
            part_score,
            part_token,
            vocab_size,
            APPLY_TEMPERATURE=apply_temperature,
            PART=min(_PART, triton.cdiv(vocab_size, _BLOCK) * _BLOCK),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    _walk_kernel[(num_reqs,)](
        part_score,
        part_token,
        trees.cu_num_logits,
        trees.tokens,
        trees.tokens.stride(0),
        trees.parents,
        trees.parents.stride(0),
        trees.num_nodes,
        *(getattr(out, field.name) for field in fields(out)),
        num_parts,
        out.sampled.shape[1],
        BLOCK_PARTS=triton.next_power_of_2(num_parts),
        BLOCK_ROWS=triton.next_power_of_2(max_nodes + 1),
        num_warps=1,
    )
    return out


_PARTS = {"part_score_ptr": "*fp32:16", "part_token_ptr": "*i32:16"}
AOT_CONFIGS = (
    *(
        AotConfig(
            _sample_rows_kernel,
            name,
            {
                "logits_ptr": f"*{dtype}:16",
                "logits_stride": "i64",
                "expanded_idx_mapping_ptr": "*i32:16",
                "positions_ptr": "*i64:16",
                "temperature_ptr": "*fp32:16",
                "seeds_ptr": "*i64:16",
                **_PARTS,
                "vocab_size": "i32",
            },
            {"APPLY_TEMPERATURE": scale, "PART": _PART, "BLOCK": _BLOCK},
        )
        for name, dtype, scale in (("bf16", "bf16", True), ("processed_fp32", "fp32", False))
    ),
    AotConfig(
        _walk_kernel,
        "63_nodes",
        {
            **_PARTS,
            "cu_num_logits_ptr": "*i32:16",
            "tokens_ptr": "*i64:16",
            "tokens_stride": "i64",
            "parents_ptr": "*i32:16",
            "parents_stride": "i64",
            "num_nodes_ptr": "*i32:16",
            "sampled_ptr": "*i64:16",
            "rows_ptr": "*i32:16",
            "logits_rows_ptr": "*i32:16",
            "num_sampled_ptr": "*i32:16",
            "last_sampled_ptr": "*i64:16",
            "num_parts": "i32",
            "max_emitted": "i32",
        },
        {"BLOCK_PARTS": 32, "BLOCK_ROWS": 64},
        num_warps=1,
    ),
)
