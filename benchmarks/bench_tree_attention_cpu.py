# SPDX-License-Identifier: Apache-2.0
"""Times our CPU tree attention against vLLM's causal op on the same queries and the same pages.

    python benchmarks/bench_tree_attention_cpu.py [--json results.json] [--quick]

Chain-shaped trees, so that both ops compute the same thing (checked). Calls walk over several
copies of the KV cache, larger than the last-level cache together, as the layers of a model do.
Rounds of the two ops alternate; a figure is the median over rounds.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from vllm import _custom_ops as ops

from heterospec_vllm.kernels import tree_attention_cpu as kernel

TARGET_RATIO = 1.10
BLOCK_SIZE = 128  # vLLM's default on CPU
CACHED_BYTES = 64 << 20  # the copies of the KV cache together: twice a large last-level cache
MAX_COPIES = 30
MIN_ROUNDS, MAX_ROUNDS, SECONDS_PER_CASE = 5, 200, 0.4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_size: int


HEADS = {3: Heads(9, 3, 64), 4: Heads(16, 4, 128), 8: Heads(16, 2, 128)}


@dataclass(frozen=True)
class Case:
    queries_per_kv: int
    context: int
    rows: int
    requests: int


@dataclass(frozen=True)
class Result:
    queries_per_kv: int
    context: int
    rows: int
    requests: int
    vllm_us: float
    ours_us: float
    ratio: float


def build_calls(
    case: Case, dtype: torch.dtype
) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
    """One call a copy of the KV cache, of each op; checks that the outputs agree."""
    heads = HEADS[case.queries_per_kv]
    seq_len = case.context + case.rows
    blocks = -(-seq_len // BLOCK_SIZE)
    shape = (case.requests * blocks, heads.num_kv_heads, 2 * BLOCK_SIZE, heads.head_size)
    cache_bytes = torch.Size(shape).numel() * dtype.itemsize
    copies = max(1, min(MAX_COPIES, CACHED_BYTES // cache_bytes))
    num_tokens = case.requests * case.rows
    starts = torch.arange(0, num_tokens + 1, case.rows, dtype=torch.int32)
    seq_lens = torch.full((case.requests,), seq_len, dtype=torch.int32)
    table = torch.randperm(case.requests * blocks, dtype=torch.int32).view(case.requests, blocks)
    chain = [-1 if row == 63 else (2 << row) - 1 for row in range(case.rows)]
    masks = torch.tensor(chain * case.requests, dtype=torch.int64)
    scale = heads.head_size**-0.5
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.requests,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_size,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
    )
    query = torch.randn(num_tokens, heads.num_heads, heads.head_size).to(dtype)
    theirs: list[Callable[[], None]] = []
    ours: list[Callable[[], None]] = []
    for _ in range(copies):
        cache = torch.empty(shape, dtype=dtype).normal_()
        keys, values = cache.chunk(2, dim=2)
        out_theirs, out_ours = torch.empty_like(query), torch.empty_like(query)

        def call_theirs(keys=keys, values=values, out=out_theirs) -> None:
            ops.cpu_attention_with_kv_cache(
                query, keys, values, out, starts, seq_lens, scale, True, None, -1, table, 0.0,
                metadata, None,
            )  # fmt: skip

        def call_ours(keys=keys, values=values, out=out_ours) -> None:
            kernel.tree_attention_cpu(
                query, keys, values, out, starts, seq_lens, table, masks, scale
            )

        call_theirs()
        call_ours()
        torch.testing.assert_close(out_ours, out_theirs, atol=1e-2, rtol=2e-2)
        theirs.append(call_theirs)
        ours.append(call_ours)
    return theirs, ours


def time_round(calls: list[Callable[[], None]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def measure(case: Case, dtype: torch.dtype) -> Result:
    theirs, ours = build_calls(case, dtype)
    times_theirs: list[float] = []
    times_ours: list[float] = []
    deadline = time.perf_counter() + SECONDS_PER_CASE
    while len(times_ours) < MAX_ROUNDS and (
        len(times_ours) < MIN_ROUNDS or time.perf_counter() < deadline
    ):
        times_theirs.append(time_round(theirs))
        times_ours.append(time_round(ours))
    vllm_us = statistics.median(times_theirs) * 1e6
    ours_us = statistics.median(times_ours) * 1e6
    return Result(**asdict(case), vllm_us=vllm_us, ours_us=ours_us, ratio=ours_us / vllm_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--queries-per-kv", type=int, nargs="+", choices=HEADS, default=list(HEADS), metavar="N"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases")
    args = parser.parse_args()
    torch.manual_seed(0)
    kernel.ensure_built()
    contexts = [128, 1024, 4096] if args.quick else [128, 512, 1024, 2048, 4096]
    rows = [4, 16] if args.quick else [4, 8, 16, 32, 64]
    requests = [1, 4] if args.quick else [1, 4, 16]
    header = f"{'q/kv':>5}{'context':>9}{'rows':>6}{'requests':>10}"
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {kernel.instruction_set()}")
    print(f"{header}{'vLLM us':>11}{'ours us':>11}{'ratio':>8}")
    results = []
    shapes = itertools.product(args.queries_per_kv, contexts, rows, requests)
    for case in itertools.starmap(Case, shapes):
        result = measure(case, DTYPES[args.dtype])
        results.append(result)
        print(
            f"{case.queries_per_kv:>5}{case.context:>9}{case.rows:>6}{case.requests:>10}"
            f"{result.vllm_us:>11.1f}{result.ours_us:>11.1f}{result.ratio:>8.2f}",
            flush=True,
        )
    ratios = [result.ratio for result in results]
    above = sum(ratio > TARGET_RATIO for ratio in ratios)
    print(
        f"ours / vLLM: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f};"
        f" {above} of {len(ratios)} cases above {TARGET_RATIO}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
