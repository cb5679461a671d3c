# SPDX-License-Identifier: Apache-2.0
"""Timed runs of several systems in turns: prompts, rounds, rows on disk, a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines import Engine, Load, Run
from rich.console import Console
from rich.table import Table

from heterospec_vllm.prompts import chat_token_ids, texts_of

MAX_MODEL_LEN = 2048

System = tuple[str, str, dict[str, Any] | None]  # name, engine, policy


def prompts(target: str, files: list[Path]) -> list[list[list[int]]]:
    """Chat-formatted token ids, a list for each file."""
    return [chat_ids(target, texts_of(f)[:16]) for f in files]


def chat_ids(target: str, texts: list[str]) -> list[list[int]]:
    """Token ids of user messages."""
    from transformers import AutoTokenizer

    return chat_token_ids(AutoTokenizer.from_pretrained(target), texts, MAX_MODEL_LEN - 256)


def load_engines(
    target: str,
    head: str,
    chains: Iterable[int],  # k of vLLM's eagle3, an engine each
    max_batch: int,
    ours: dict[str, Any],  # our config beside method and model
) -> dict[str, Engine]:
    """The engines `plain`, `eagle3 k=...` and `ours`, all loaded."""
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
    for k in chains:
        build(f"eagle3 k={k}", {"method": "eagle3", "model": head, "num_speculative_tokens": k})
    build("ours", {"method": "heterospec", "model": head, **ours})
    return built


def interleave(files: list[list[list[int]]], count: int) -> list[list[int]]:
    """The first prompts of each file in turn."""
    longest = max(map(len, files), default=0)
    return [f[i] for i in range(longest) for f in files if i < len(f)][:count]


def measure(
    console: Console,
    loaded: dict[str, Engine],
    load: Load,
    rounds: int,
    output: Path,
    what: list[System],
    label: str = "decode",
) -> dict[str, list[Run]]:
    """Every system once a round, in turns; rows are appended to ``output``, a table is printed."""
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
    return runs


def _append(output: Path, name, policy, load: Load, label: str, number: int, run: Run) -> None:
    row = {
        "system": name,
        "policy": policy,
        "load": label,
        "batch": load.batch,
        "num_prompts": len(load.prompts),
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
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
