# SPDX-License-Identifier: Apache-2.0
"""One setting for every load: `marginal` against plain decoding, the best chain and the best fixed tree.

Every batch size of a ladder, systems in turns, medians of rounds; the best chain is the best of
stock vLLM's `eagle3` with several k. A sign test over (prompt set, round) pairs says whether
`marginal` beats the better of plain and best chain by more than chance.

    python benchmarks/bench_policies.py TARGET HEAD PROMPTS... --output FILE.jsonl
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from engines import Load, Run
from rich.console import Console
from rich.table import Table
from runs import System, chat_ids, interleave, load_engines, measure, prompts

OURS: dict[str, dict[str, Any]] = {
    "off": {"policy": "plain"},
    "marginal": {"policy": "marginal"},
    "static 6 nodes": {
        "policy": "static", "num_speculative_tokens": 6, "max_depth": 2, "top_k": 4,
    },
    "static 8 nodes": {
        "policy": "static", "num_speculative_tokens": 8, "max_depth": 3, "top_k": 4,
    },
    "paper": {"policy": "paper", "num_speculative_tokens": 8, "max_depth": 3, "top_k": 4},
}  # fmt: skip


REPETITIVE = (
    "Count from 1 to 60, separated by commas.",
    "Write the word 'hello' forty times.",
    "List the numbers from 100 down to 50.",
    "Repeat this sentence twenty times: The quick brown fox jumps over the lazy dog.",
    "Write out the multiplication table of seven, from 7 x 1 to 7 x 30.",
    "Write the alphabet ten times, one letter after the other.",
    "List all months of the years 2020 to 2024, each with its year.",
    "Print the powers of two from 2^1 to 2^40.",
)


def systems(chains: list[int], ours: list[str]) -> list[System]:
    theirs: list[System] = [(f"eagle3 k={k}", f"eagle3 k={k}", None) for k in chains]
    return [("plain", "plain", None), *theirs, *((name, "ours", OURS[name]) for name in ours)]


def main(
    target: Annotated[str, typer.Argument(help="Target folder.")],
    head: Annotated[str, typer.Argument(help="EAGLE-3 head folder.")],
    prompt_files: Annotated[list[Path], typer.Argument(help="JSONL with `prompt` or `turns`.")],
    output: Annotated[Path, typer.Option(help="Rows are appended here, one a run.")],
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16,64",
    chains: Annotated[str, typer.Option(help="k of vLLM's eagle3, comma-separated.")] = "1,2,3,5",
    ours: Annotated[str, typer.Option(help=f"Of: {', '.join(OURS)}.")] = "off,marginal",
    at_one: Annotated[str, typer.Option(help="Further ones at batch 1.")] = (
        "static 6 nodes,static 8 nodes,paper"
    ),
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 64,
    per_file: Annotated[int, typer.Option(help="Prompts of each file in a batch-1 run.")] = 1,
    temperature: Annotated[float, typer.Option(help="Above 0: seeded sampling.")] = 0.0,
    loads: Annotated[
        str, typer.Option(help="Further loads: mixed, prefill, rising; comma-separated or empty.")
    ] = "",
    profile: Annotated[Path | None, typer.Option(help="Calibration profile of the pair.")] = None,
) -> None:
    console = Console(width=140)
    sizes = [int(size) for size in batches.split(",")]
    ks = [int(k) for k in chains.split(",")]
    files = prompts(target, prompt_files)
    config = {} if profile is None else {"profile": str(profile)}
    loaded = load_engines(target, head, ks, max(sizes), config)
    best: list[tuple[int, dict[str, list[float]]]] = []
    try:
        for size in sizes:
            names = ours.split(",") + (at_one.split(",") if size == 1 and at_one else [])
            what = systems(ks, names)
            if size == 1:
                # a run for each file, so that no file can hide behind another
                for path, one in zip(prompt_files, files, strict=True):
                    load = Load(one[:per_file], 1, tokens, temperature=temperature)
                    label = f"{path.stem}, T={temperature}"
                    runs = measure(console, loaded, load, rounds, output, what, label)
                    best.append((size, _speeds(runs)))
            else:
                load = Load(interleave(files, size), size, tokens, temperature=temperature)
                runs = measure(console, loaded, load, rounds, output, what, f"T={temperature}")
                best.append((size, _speeds(runs)))
            _summary(console, best)
        what = systems(ks, ours.split(","))
        for name in filter(None, loads.split(",")):
            load = further_load(name, target, files, max(sizes), tokens, temperature)
            runs = measure(console, loaded, load, rounds, output, what, f"{name}, T={temperature}")
            best.append((load.batch, _speeds(runs)))
            _summary(console, best)
    finally:
        for engine in loaded.values():
            engine.close()


def further_load(
    name: str, target: str, files: list[list[list[int]]], most: int, tokens: int, temperature: float
) -> Load:
    """mixed: half repetitive, half open-ended, batch 8. prefill: long prompts, 8 tokens, batch 16. rising: 1 to most
    and back to 1."""
    if name == "mixed":
        repetitive = chat_ids(target, list(REPETITIVE))
        chosen = interleave([repetitive, interleave(files, 8)], 16)
        return Load(chosen, 8, tokens, temperature=temperature)
    if name == "prefill":
        long = interleave([sorted(one, key=len, reverse=True)[:4] for one in files], 16)
        return Load(long, 16, 8, temperature=temperature)
    if name == "rising":
        up = [size for size in (1, 4, 16, 64) if size <= most]
        phases = (*up, *up[-2::-1])
        return Load(interleave(files, most), most, tokens, phases, temperature)
    raise typer.BadParameter(f"found '{name}', allowed: mixed, prefill, rising")


def _speeds(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    return {name: [run.tokens_per_second for run in done] for name, done in runs.items()}


def _summary(console: Console, best: list[tuple[int, dict[str, list[float]]]]) -> None:
    """`marginal` over the better of plain and best chain: a row for each load, and the sign test."""
    from scipy.stats import binomtest

    table = Table(title="marginal against max(plain, best chain)")
    for column in ("batch", "x plain", "best chain", "x best chain", "x max", "rounds won"):
        table.add_column(column, justify="right")
    wins = pairs = 0
    ratios = []
    for size, speeds in best:
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        chain = max((n for n in medians if n.startswith("eagle3")), key=lambda n: medians[n])
        rival = max(("plain", chain), key=lambda n: medians[n])
        won = sum(a > b for a, b in zip(speeds["marginal"], speeds[rival], strict=True))
        wins, pairs = wins + won, pairs + len(speeds[rival])
        ratio = medians["marginal"] / medians[rival]
        ratios.append(ratio)
        table.add_row(
            str(size),
            f"{medians['marginal'] / medians['plain']:.3f}",
            chain,
            f"{medians['marginal'] / medians[chain]:.3f}",
            f"{ratio:.3f}",
            f"{won} of {len(speeds[rival])}",
        )
    console.print(table)
    p = binomtest(wins, pairs).pvalue
    console.print(
        f"geometric mean {statistics.geometric_mean(ratios):.3f}; {wins} of {pairs} rounds won, "
        f"two-sided sign test p = {p:.3g}"
    )


if __name__ == "__main__":
    typer.run(main)
