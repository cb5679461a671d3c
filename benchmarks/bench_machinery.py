# SPDX-License-Identifier: Apache-2.0
"""The price of the machinery: plain vLLM, its `eagle3` chains, and ours, in turns.

Answers three questions for every batch size: what the loaded plugin costs while it does not
speculate ("off"), whether our chain is as fast as vLLM's own of the same length, and whether the
best tree of a small sweep beats the best chain.

    python benchmarks/bench_machinery.py TARGET HEAD PROMPTS... --output FILE.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from engines import Load
from rich.console import Console
from runs import System, interleave, load_engines, measure, prompts

CHAINS = (1, 2, 3, 5)
# (nodes, depth, top_k)
TREES = ((4, 2, 4), (6, 2, 4), (6, 3, 4), (8, 2, 8), (8, 3, 4), (10, 3, 8), (12, 4, 8))


def systems() -> list[System]:
    ours: list[System] = [
        ("off", "ours", {"policy": "plain"}),
        *(
            (
                f"chain k={k}",
                "ours",
                {"policy": "chain", "num_speculative_tokens": k, "max_depth": k},
            )
            for k in CHAINS
        ),
        *(
            (
                f"tree {n} nodes, depth {d}, top {k}",
                "ours",
                {"policy": "static", "num_speculative_tokens": n, "max_depth": d, "top_k": k},
            )
            for n, d, k in TREES
        ),
    ]
    theirs: list[System] = [(f"eagle3 k={k}", f"eagle3 k={k}", None) for k in CHAINS]
    return [("plain", "plain", None), *theirs, *ours]


def main(
    target: Annotated[str, typer.Argument(help="Target folder.")],
    head: Annotated[str, typer.Argument(help="EAGLE-3 head folder.")],
    prompt_files: Annotated[list[Path], typer.Argument(help="JSONL with `prompt` or `turns`.")],
    output: Annotated[Path, typer.Option(help="Rows are appended here, one a run.")],
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 64,
    per_file: Annotated[int, typer.Option(help="Prompts of each file in a batch-1 run.")] = 1,
) -> None:
    console = Console()
    sizes = [int(size) for size in batches.split(",")]
    token_ids = prompts(target, prompt_files)
    widest = {"policy": "static", "num_speculative_tokens": 16, "max_depth": 5, "top_k": 8}
    loaded = load_engines(target, head, CHAINS, max(sizes), widest)
    try:
        for size in sizes:
            chosen = interleave(token_ids, max(size, per_file * len(prompt_files)))
            measure(console, loaded, Load(chosen, size, tokens), rounds, output, systems())
        long = interleave([[p for p in f if len(p) > 500] for f in token_ids], 16)
        if long:
            only = [s for s in systems() if s[0] in ("plain", "off")]
            measure(console, loaded, Load(long, 16, 8), rounds, output, only, "prefill-heavy")
    finally:
        for engine in loaded.values():
            engine.close()


if __name__ == "__main__":
    typer.run(main)
