# SPDX-License-Identifier: Apache-2.0
"""Times one layer's call of our CPU tree attention against vLLM's causal op: same queries, same pages.

The rows are text, so that both ops compute the same thing (checked). Calls walk over several copies of the KV
cache, larger than the last-level cache together, as the layers of a model do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig

from heterospec_vllm.kernels.cpu.tree_attention import (
    MAX_ROWS,
    LayerPages,
    TreeAttentionInputs,
    TreeRows,
    tree_attention_cpu,
)
from heterospec_vllm.layers.attention_cpu import MaskedRows
from heterospec_vllm.tree.trees import DraftTrees

BLOCK_SIZE = 128  # vLLM's default on CPU
CACHED_BYTES = 64 << 20  # the copies of the KV cache together: twice a large last-level cache
MAX_COPIES = 30
MIN_ROUNDS, MAX_ROUNDS, SECONDS_PER_CASE = 5, 200, 0.4


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Heads:
        """Those of a target's layers."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        return cls(
            model.get_num_attention_heads(parallel),
            model.get_num_kv_heads(parallel),
            model.get_head_size(),
        )


@dataclass(frozen=True)
class Case:
    """One call: every request has ``rows`` queries behind ``context`` tokens."""

    context: int
    rows: int
    requests: int

    @property
    def seq_len(self) -> int:
        return self.context + self.rows

    @property
    def num_tokens(self) -> int:
        return self.requests * self.rows


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, medians over rounds in which the ops take turns."""

    vllm: float
    ours: float

    @property
    def ratio(self) -> float:
        """Our seconds over vLLM's."""
        return self.ours / self.vllm


@dataclass(frozen=True)
class Calls:
    """One call a copy of the KV cache, of each op."""

    vllm: list[Callable[[], None]]
    ours: list[Callable[[], None]]


@dataclass(frozen=True)
class _Batch:
    """What the calls of a case share."""

    query: torch.Tensor  # [num_tokens, num_heads, head_size]
    starts: torch.Tensor  # [requests + 1] int32
    seq_lens: torch.Tensor  # [requests] int32
    table: torch.Tensor  # [requests, blocks of a request] int32
    rows: TreeRows  # as our op takes them

    @classmethod
    def of(cls, case: Case, heads: Heads, dtype: torch.dtype, piece_rows: int) -> _Batch:
        blocks = -(-case.seq_len // BLOCK_SIZE)
        table = torch.randperm(case.requests * blocks, dtype=torch.int32)
        table = table.view(case.requests, blocks)
        trees = DraftTrees.empty(case.requests)
        starts = np.arange(0, case.num_tokens + 1, case.rows)
        context_lens = np.full(case.requests, case.context)
        placed = trees.placed(context_lens, starts, piece_rows)
        return cls(
            query=torch.randn(case.num_tokens, heads.num_heads, heads.head_size).to(dtype),
            starts=torch.from_numpy(starts).int(),
            seq_lens=torch.full((case.requests,), case.seq_len, dtype=torch.int32),
            table=table,
            rows=MaskedRows.of(placed, table).rows,
        )


def measure(
    case: Case,
    heads: Heads,
    dtype: torch.dtype,
    seconds: float = SECONDS_PER_CASE,
    *,
    piece_rows: int = MAX_ROWS,
    copies: int = MAX_COPIES,
    isa: str = "vec",
    check: bool = True,
) -> Timing:
    """Times both ops for about ``seconds``, and at least ``MIN_ROUNDS`` rounds.

    ``piece_rows``: most rows of a request that our op takes in one piece. ``copies``: most of the KV cache.
    ``isa``: vLLM's name of the pages' layout.
    """
    calls = build_calls(
        case, heads, dtype, piece_rows=piece_rows, copies=copies, isa=isa, check=check
    )
    vllm: list[float] = []
    ours: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(ours) < MAX_ROUNDS and (len(ours) < MIN_ROUNDS or time.perf_counter() < deadline):
        vllm.append(_time_round(calls.vllm))
        ours.append(_time_round(calls.ours))
    return Timing(vllm=statistics.median(vllm), ours=statistics.median(ours))


def build_calls(
    case: Case,
    heads: Heads,
    dtype: torch.dtype,
    *,
    piece_rows: int,
    copies: int,
    isa: str = "vec",
    check: bool,
) -> Calls:
    """Both ops over as many copies of the KV cache as do not fit in the caches; may check that the outputs agree."""
    batch = _Batch.of(case, heads, dtype, piece_rows)
    shape = (batch.table.numel(), heads.num_kv_heads, 2 * BLOCK_SIZE, heads.head_size)
    cache_bytes = torch.Size(shape).numel() * dtype.itemsize
    if isa == "amx":
        torch.cpu._init_amx()  # a process must ask for tiles once, and oneDNN may not have done so yet
    metadata = _vllm_metadata(batch, heads, isa)
    calls = Calls([], [])
    for _ in range(max(1, min(copies, CACHED_BYTES // cache_bytes))):
        keys, values = torch.empty(shape, dtype=dtype).normal_().chunk(2, dim=2)
        out_vllm, out_ours = torch.empty_like(batch.query), torch.empty_like(batch.query)
        call_vllm = _vllm_call(batch, keys, values, out_vllm, metadata)
        call_ours = _our_call(batch, keys, values, out_ours, isa)
        call_vllm()
        call_ours()
        if check:
            torch.testing.assert_close(out_ours, out_vllm, atol=1e-2, rtol=2e-2)
        calls.vllm.append(call_vllm)
        calls.ours.append(call_ours)
    return calls


def _vllm_metadata(batch: _Batch, heads: Heads, isa: str) -> torch.Tensor:
    return ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch.seq_lens.shape[0],
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_size,
        seq_lens=batch.seq_lens,
        dtype=batch.query.dtype,
        query_start_loc=batch.starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )


def _vllm_call(
    batch: _Batch,
    keys: torch.Tensor,  # [num_blocks, num_kv_heads, BLOCK_SIZE, head_size], as values
    values: torch.Tensor,
    out: torch.Tensor,  # [num_tokens, num_heads, head_size]
    metadata: torch.Tensor,
) -> Callable[[], None]:
    scale = batch.query.shape[-1] ** -0.5

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            batch.query, keys, values, out, batch.starts, batch.seq_lens, scale, True, None, -1,
            batch.table, 0.0, metadata, None,
        )  # fmt: skip

    return call


def _our_call(
    batch: _Batch,
    keys: torch.Tensor,  # [num_blocks, num_kv_heads, BLOCK_SIZE, head_size], as values
    values: torch.Tensor,
    out: torch.Tensor,  # [num_tokens, num_heads, head_size]
    isa: str,
) -> Callable[[], None]:
    _, num_heads, head_size = batch.query.shape
    pages = LayerPages(keys, values, num_heads, head_size**-0.5, isa)
    inputs = TreeAttentionInputs(pages, batch.rows, batch.query)
    return lambda: tree_attention_cpu(inputs, out)


def _time_round(calls: list[Callable[[], None]]) -> float:
    """Seconds of one call, the mean over the copies."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)
