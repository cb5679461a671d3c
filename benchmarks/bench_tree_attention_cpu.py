# SPDX-License-Identifier: Apache-2.0
"""Times our CPU tree attention against vLLM's causal op on the same queries and the same pages.

    python benchmarks/bench_tree_attention_cpu.py [--json results.json] [--quick]

Chain-shaped trees, so that both ops compute the same thing (checked). Rounds of the two ops
alternate; a figure is the median over rounds (``heterospec_vllm/layers/op_timing.py``).
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from heterospec_vllm.kernels.cpu.library import instruction_set
from heterospec_vllm.kernels.cpu.tree_attention import ISA_CODES
from heterospec_vllm.layers.op_timing import Case, Heads, measure

TARGET_RATIO = 1.10
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = {3: Heads(9, 3, 64), 4: Heads(16, 4, 128), 8: Heads(16, 2, 128)}


@dataclass(frozen=True)
class Result:
    queries_per_kv: int
    context: int
    rows: int
    requests: int
    vllm_us: float
    ours_us: float
    ratio: float


def measure_case(queries_per_kv: int, case: Case, dtype: torch.dtype, isa: str) -> Result:
    timing = measure(case, HEADS[queries_per_kv], dtype, isa=isa)
    return Result(
        queries_per_kv=queries_per_kv,
        **asdict(case),
        vllm_us=timing.vllm * 1e6,
        ours_us=timing.ours * 1e6,
        ratio=timing.ratio,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--queries-per-kv", type=int, nargs="+", choices=HEADS, default=list(HEADS), metavar="N"
    )
    parser.add_argument("--isa", choices=ISA_CODES, default="vec", help="layout of the pages")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    args = parser.parse_args()
    torch.manual_seed(0)
    contexts = [128, 1024, 4096] if args.quick else [128, 512, 1024, 2048, 4096]
    rows = [4, 16] if args.quick else [4, 8, 16, 32, 64]
    requests = [1, 4] if args.quick else [1, 4, 16]
    header = f"{'q/kv':>5}{'context':>9}{'rows':>6}{'requests':>10}"
    print(f"{args.dtype}, isa {args.isa}, {torch.get_num_threads()} threads, {instruction_set()}")
    print(f"{header}{'vLLM us':>11}{'ours us':>11}{'ratio':>8}")
    results = []
    shapes = itertools.product(args.queries_per_kv, contexts, rows, requests)
    for queries_per_kv, *shape in shapes:
        result = measure_case(queries_per_kv, Case(*shape), DTYPES[args.dtype], args.isa)
        results.append(result)
        print(
            f"{result.queries_per_kv:>5}{result.context:>9}{result.rows:>6}{result.requests:>10}"
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
