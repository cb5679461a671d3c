# SPDX-License-Identifier: Apache-2.0
"""What a decode step costs as nodes, requests and context grow, one at a time, beside plain steps of the same engine.

    python benchmarks/bench_growth.py --target TARGET [--head HEAD] [--json FILE]

Blocks of steps with a fixed tree of two levels and blocks of plain steps take turns on the same requests. Prompts are
random tokens, so little is accepted; a point whose trees had other nodes, by the engine's counters, is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIXED = {"nodes": 8, "requests": 4, "context": 256}
DEPTH = 2
ROUNDS = 3
UNMEASURED = 2  # steps of a block: the first still verifies, or not yet, what was drafted before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="folder or hub id")
    parser.add_argument("--head", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 63])
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=8, help="of each block")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, help="write every span of every point here")
    args = parser.parse_args()
    sweeps = [(name, value) for name in FIXED for value in getattr(args, name)]
    points = [{**FIXED, name: value} for name, value in sweeps]
    llm = engine(args, points)
    results = []
    for sweep, point in zip(sweeps, points, strict=True):
        results.append({"sweep": sweep[0], **point, **measured(llm, point, args.steps)})
        print(
            f"{sweep[0]} {sweep[1]}: {results[-1]['ms']:.2f} ms, plain {results[-1]['plain_ms']:.2f}"
        )
    show(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


def tokens_of(point: dict[str, int], steps: int) -> int:
    """Most tokens of a request: its prompt, an answer that accepts every draft, and a tree."""
    prefill = 1 + point["requests"] * point["context"] // 1024
    decoding = 2 * ROUNDS * (steps + UNMEASURED)
    return point["context"] + (prefill + decoding) * (DEPTH + 1) + point["nodes"] + 2


def shape(nodes: int) -> dict[str, Any]:
    """The narrowest tree of two levels that always has that many nodes."""
    width = next(k for k in range(2, 17) if k + min(k, nodes) * k >= nodes)
    return {"num_speculative_tokens": nodes, "max_depth": DEPTH, "top_k": width}


def engine(args: argparse.Namespace, points: list[dict[str, int]]) -> Any:
    """Wide and long enough for every point."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM

    return LLM(
        args.target,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=max(tokens_of(point, args.steps) for point in points),
        max_num_seqs=max(2, *(point["requests"] for point in points)),
        max_num_batched_tokens=max(2048, *(2 * p["requests"] * (p["nodes"] + 1) for p in points)),
        speculative_config={
            "method": "heterospec",
            "model": args.head,
            "policy": "static",
            **shape(max(point["nodes"] for point in points)),
        },
    )


def measured(llm: Any, point: dict[str, int], steps: int) -> dict[str, Any]:
    """Median milliseconds of steps with trees and of plain ones, by part, and of one layer's attention."""
    from vllm import SamplingParams

    core, size = llm.llm_engine, llm.llm_engine.vllm_config.model_config.get_vocab_size()
    length = tokens_of(point, steps) - point["context"] - point["nodes"] - 2
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    ids = [f"{point} {number}" for number in range(point["requests"])]
    rng = random.Random(0)
    llm.collective_rpc("set_heterospec_policy", args=("static",), kwargs=shape(point["nodes"]))
    for one in ids:
        prompt = rng.choices(range(size), k=point["context"])
        core.add_request(one, {"prompt_token_ids": prompt}, params.clone())
    waiting = set(ids)
    while waiting:
        waiting -= {output.request_id for output in core.step()}
    trees: list[dict[str, float]] = []
    plain: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        for blocks, policy in ((trees, "static"), (plain, "plain")):
            kwargs = shape(point["nodes"]) if policy == "static" else {}
            llm.collective_rpc("set_heterospec_policy", args=(policy,), kwargs=kwargs)
            blocks += block(llm, steps, policy == "static" and point)
    core.abort_request(ids)
    while core.has_unfinished_requests():
        core.step()
    names = {name for step in trees for name in step if name != "step"}
    spans = {n: statistics.median(s.get(n, 0.0) for s in trees) for n in sorted(names)}
    return {
        "ms": statistics.median(step["step"] for step in trees),
        "plain_ms": statistics.median(step["step"] for step in plain),
        "spans_ms": spans,
        **attention(llm, point),
    }


def block(llm: Any, steps: int, point: Any) -> list[dict[str, float]]:
    """Milliseconds of some steps, by part; with a point, its trees are counted."""
    for _ in range(UNMEASURED):
        llm.llm_engine.step()
    llm.collective_rpc("heterospec_counters", kwargs={"reset": True})
    llm.collective_rpc("heterospec_clock", args=(True,))
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        llm.llm_engine.step()
        seconds = time.perf_counter() - start
        spans = llm.collective_rpc("heterospec_clock", args=(True,))[0]
        found.append({"step": 1e3 * seconds, **{n: 1e3 * s for n, (s, _) in spans.items()}})
    llm.collective_rpc("heterospec_clock", args=(False,))
    nodes = llm.collective_rpc("heterospec_counters")[0]["verified_nodes"]
    wanted = steps * point["requests"] * point["nodes"] if point else 0
    if nodes != wanted:
        raise SystemExit(f"{point or 'plain'}: {nodes} nodes were verified, not {wanted}")
    return found


def attention(llm: Any, point: dict[str, int]) -> dict[str, float]:
    """One layer's call of our op and of vLLM's, the queries as a chain; nothing without our kernel."""
    from heterospec_vllm.kernels.cpu.library import is_available
    from heterospec_vllm.layers.op_timing import Case, Heads, measure

    if not is_available():
        return {}
    config = llm.llm_engine.vllm_config
    case = Case(point["context"], point["nodes"] + 1, point["requests"])
    timing = measure(case, Heads.of(config), config.model_config.dtype)
    return {"attention_ms": 1e3 * timing.ours, "vllm_attention_ms": 1e3 * timing.vllm}


def show(results: list[dict[str, Any]]) -> None:
    parts = ["target forward", "tree attention", "draft: accepted tokens", "draft: levels", "draft"]
    table = Table(title="milliseconds a step; one layer's attention, ours and vLLM's")
    numbers = ["ms", "plain_ms", "attention_ms", "vllm_attention_ms"]
    for name in ("sweep", *FIXED, *numbers, *parts):
        table.add_column(name, justify="right")
    for one in results:
        values = [one.get(name, 0.0) for name in numbers]
        values += [one["spans_ms"].get(part, 0.0) for part in parts]
        fixed = [str(one[name]) for name in FIXED]
        table.add_row(one["sweep"], *fixed, *(f"{value:.2f}" for value in values))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
