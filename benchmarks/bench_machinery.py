# SPDX-License-Identifier: Apache-2.0
"""The price of the machinery: plain vLLM, its `eagle3` chains, and ours, in turns.

Answers three questions for every batch size: what the loaded plugin costs while it does not
speculate ("off"), whether our chain is as fast as vLLM's own of the same length, and whether the
best tree of a small sweep beats the best chain.

    python benchmarks/bench_machinery.py TARGET HEAD PROMPTS... --output FILE.jsonl
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from engines import Engine, Load, Run
from rich.console import Console
from rich.table import Table

from heterospec_vllm.prompts import texts_of

CHAINS = (1, 2, 3, 5)
# (nodes, depth, top_k)
TREES = ((4, 2, 4), (6, 2, 4), (6, 3, 4), (8, 2, 8), (8, 3, 4), (10, 3, 8), (12, 4, 8))
MAX_MODEL_LEN = 2048

System = tuple[str, str, dict[str, Any] | None]  # name, engine, policy


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


def engines(target: str, head: str, max_batch: int) -> dict[str, Engine]:
    common = {
        "model": target,
        "dtype": "bfloat16",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(2, max_batch),
    }
    built = {}

    def build(name: str, config: dict[str, Any] | None) -> None:
        # one after the other: compiling takes both cores
        built[name] = Engine(name, **common, speculative_config=config)
        built[name].wait_until_loaded()

    build("plain", None)
    for k in CHAINS:
        build(f"eagle3 k={k}", {"method": "eagle3", "model": head, "num_speculative_tokens": k})
    widest = {"num_speculative_tokens": 16, "max_depth": 5, "top_k": 8}
    build("ours", {"method": "heterospec", "model": head, "policy": "static", **widest})
    return built


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
    token_ids = _prompts(target, prompt_files)
    loaded = engines(target, head, max(sizes))
    try:
        for size in sizes:
            chosen = _interleave(token_ids, max(size, per_file * len(prompt_files)))
            _measure(console, loaded, Load(chosen, size, tokens), rounds, output, systems())
        long = _interleave([[p for p in f if len(p) > 500] for f in token_ids], 16)
        if long:
            only = [s for s in systems() if s[0] in ("plain", "off")]
            _measure(console, loaded, Load(long, 16, 8), rounds, output, only, "prefill-heavy")
    finally:
        for engine in loaded.values():
            engine.close()


def _prompts(target: str, files: list[Path]) -> list[list[list[int]]]:
    """Chat-formatted token ids, a list for each file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)

    def ids(text: str) -> list[int]:
        message = {"role": "user", "content": text}
        return tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=False
        )[: MAX_MODEL_LEN - 256]

    return [[ids(text) for text in texts_of(f)[:16]] for f in files]


def _interleave(files: list[list[list[int]]], count: int) -> list[list[int]]:
    """The first prompts of each file in turn."""
    longest = max(map(len, files), default=0)
    return [f[i] for i in range(longest) for f in files if i < len(f)][:count]


def _measure(
    console: Console,
    loaded: dict[str, Engine],
    load: Load,
    rounds: int,
    output: Path,
    what: list[System],
    label: str = "decode",
) -> None:
    runs: dict[str, list[Run]] = {name: [] for name, _, _ in what}
    for _, engine, policy in what:  # warm-up, not counted
        loaded[engine].run(Load(load.prompts[: load.batch], load.batch, 16), policy)
    for number in range(rounds):
        for name, engine, policy in what:
            run = loaded[engine].run(load, policy)
            runs[name].append(run)
            _append(output, name, policy, load, label, number, run)
        console.print(f"{label}, batch {load.batch}: round {number + 1} of {rounds} done")
    _print(console, runs, load, label)


def _append(output: Path, name, policy, load: Load, label: str, number: int, run: Run) -> None:
    row = {
        "system": name,
        "policy": policy,
        "load": label,
        "batch": load.batch,
        "num_prompts": len(load.prompts),
        "max_tokens": load.max_tokens,
        "round": number,
        **{key: value for key, value in asdict(run).items() if key != "token_ids"},
        "tokens_per_second": run.tokens_per_second,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv[:1]),
        "commit": _commit(),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _commit() -> str:
    shown = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()


def _print(console: Console, runs: dict[str, list[Run]], load: Load, label: str) -> None:
    plain = runs["plain"]
    base = statistics.median(run.tokens_per_second for run in plain)
    table = Table(
        title=f"{label}, batch {load.batch}, {len(load.prompts)} prompts, {load.max_tokens} tokens"
    )
    for column in ("system", "tok/s", "min..max", "x plain", "tokens a step", "same as plain"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, done in runs.items():
        speeds = [run.tokens_per_second for run in done]
        counters = done[-1].counters
        # Steps of a batch emit several requests' tokens: per request and step.
        a_step = "" if counters is None else f"{_tokens_a_step(counters):.2f}"
        pairs = zip(plain[0].token_ids, done[0].token_ids, strict=True)
        same = sum(a == b for a, b in pairs)
        table.add_row(
            name,
            f"{statistics.median(speeds):.1f}",
            f"{min(speeds):.1f}..{max(speeds):.1f}",
            f"{statistics.median(speeds) / base:.3f}",
            a_step,
            f"{same}/{len(load.prompts)}",
        )
    console.print(table)


def _tokens_a_step(counters: dict[str, Any]) -> float:
    trees = counters["drafted_trees"]
    return 1.0 + counters["accepted_nodes"] / trees if trees else 1.0


if __name__ == "__main__":
    typer.run(main)
