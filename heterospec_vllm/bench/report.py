# SPDX-License-Identifier: Apache-2.0
"""Folders of benchmark rows to a Markdown summary, and to one page of the same text with plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from heterospec_vllm.bench import details, plots, words
from heterospec_vllm.bench.page import bullets, picture, table, to_html
from heterospec_vllm.bench.rows import SPEC
from heterospec_vllm.bench.tables import (
    CHAIN_PREFIX,
    PLAIN,
    CellSummary,
    Frame,
    by_load,
    by_place,
    load,
    mean_against,
    speedups,
    summarise,
    systems_of,
    timed,
    verdict,
)
from heterospec_vllm.bench.words import bold

PAGE, SUMMARY = "report.html", "summary.md"
HOW_TO_READ = (
    "Of plain decoding: its speed and, in brackets, how far its own rounds lie apart, (max - min) / median. Of the "
    "others: times plain / times the best chain (of an `eagle3` only the first); tokens a step and request; rounds "
    "won against plain. `n/a`: no round has both. Below 1 is bold; ≈ is within plain's own spread. The best chain is "
    "the fastest `eagle3` of a cell, chosen with hindsight. `mean`: geometric, over the prompt sets."
)
LATENCIES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2el_p50", "e2el_p99")
SERVED = (
    "Medians over rounds of what `vllm bench serve` measured, latencies in milliseconds. TTFT: time to the first "
    "token, TPOT: time per output token after it, E2EL: end to end; ratios above are of its median."
)


def write_report(folders: Sequence[Path], output: Path, title: str) -> None:
    """Writes the page, its plots and the summary. Raises ValueError for what cannot be read."""
    rows = load(folders)
    output.mkdir(parents=True, exist_ok=True)
    summary = summary_of(rows, title)
    (output / SUMMARY).write_text(summary, encoding="utf-8")
    files = {str(p): p.read_text(encoding="utf-8") for f in folders if (p := f / SPEC).is_file()}
    page = "\n\n".join([summary, "## Plots", *drawn(rows, output)])
    (output / PAGE).write_text(to_html(title, page, files), encoding="utf-8")


def summary_of(rows: Frame, title: str) -> str:
    offline, served = summarise(rows), summarise(rows, "serving")
    parts = [f"# {title}", *in_words(rows, offline, served)]
    for heading, cells in (("## Speed", offline), ("## Servers", served)):
        if cells:
            parts += [heading, HOW_TO_READ]
        for (target, temperature), here in by_place(cells).items():
            parts += [f"{target}, T={temperature:g}:", main_table(here)]
    if served:
        parts += [SERVED, latencies(details.serving(rows, served))]
    parts += ["## How it was made", *made(rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def in_words(rows: Frame, offline: list[CellSummary], served: list[CellSummary]) -> list[str]:
    everything = [*offline, *served]
    lines = [f"Loss: {text}" for text in words.losses(everything)]
    lines += words.without_timing(everything)
    sentences = words.headlines(offline) + words.headlines(served, "serving")
    return [*sentences, words.gates(rows), bullets(lines)]


def main_table(cells: list[CellSummary]) -> str:
    """Systems downwards, loads to the right; where a load has several prompt sets, their mean comes first."""
    columns: dict[str, list[CellSummary]] = {}
    for label, group in by_load(cells).items():
        several = len({one.cell.prompt_set for one in group}) > 1
        columns[f"{label}: mean" if several else label] = group
        for one in group if several else []:
            columns.setdefault(f"{label}: {one.cell.prompt_set}", []).append(one)
    lines = [
        [f"`{system}`", *(_result(group, system) for group in columns.values())]
        for system in systems_of(cells)
    ]
    return table(["system", *columns], lines)


def _result(group: list[CellSummary], system: str) -> str:
    entries = [one.entries[system] for one in group if system in one.entries]
    if reason := words.no_timing(entries):
        return reason
    noise = max((one.noise for one in group if one.noise is not None), default=None)
    if system == PLAIN and entries:
        spread = "one round" if noise is None else f"spread {100 * noise:.1f} %"
        return f"{words.speed(group[0], PLAIN)} ({spread})" if len(group) == 1 else spread
    ratio = mean_against(group, system, PLAIN)
    if ratio is None:
        return "n/a" if entries else ""
    parts = [bold(ratio) + (" ≈" if verdict(ratio, noise) == "noise" else "")]
    if not system.startswith(CHAIN_PREFIX):
        parts[0] += f" / {bold(mean_against(group, system, 'best chain'))}"
    kept = pd.concat([entry.timed for entry in entries])
    for length in details.step_counters(kept, ["system"])["tokens_per_step"].dropna():
        parts.append(f"{length:.2f}")
    pairs = [pair for one in group if (pair := one.against(system, PLAIN))]
    won, lost = sum(pair.won for pair in pairs), sum(pair.lost for pair in pairs)
    return "; ".join([*parts, f"{won}/{won + lost}"])


def latencies(frame: Frame) -> str:
    numbers = {name: name.upper().replace("_", " ") for name in LATENCIES}
    numbers |= {"request_throughput": "requests/s", "goodput": "goodput", "failed": "failed"}
    lines = []
    for _, row in frame.iterrows():
        values = ("" if row[name] != row[name] else f"{row[name]:.2f}" for name in numbers)
        lines.append([row["label"], row["system"], *values])
    return table(["cell", "system", *numbers.values()], lines)


def made(rows: Frame) -> list[str]:
    """Machine, threads, commit, command and versions of the rows, and what a cell's runs are."""
    found: dict[str, int] = Counter()
    for env in rows["environment"]:
        versions = ", ".join(f"{name} {version}" for name, version in env.versions.items())
        text = f"{env.machine}; {env.threads}; commit {env.commit}; `{env.command}`; {versions}"
        found[text] += 1
    cells = [f"{cell.label}: {cell.num_prompts} x {cell.lengths} tokens" for cell in rows["cell"]]
    environments = [f"{count} rows: {text}" for text, count in found.items()]
    told = "Cells (requests x tokens of an answer):"
    return [bullets(environments), told, bullets([*dict.fromkeys(cells)])]


def drawn(rows: Frame, output: Path) -> list[str]:
    """Draws what the rows hold into a folder; the pictures as text of the page."""
    figures = []
    ratios = speedups(summarise(rows))
    if ratios[ratios["system"] != PLAIN]["ratio"].notna().any():
        caption = "Times plain decoding; grey: how far plain's own rounds lie apart."
        figures.append(("speedup.png", caption, plots.speedup, ratios))
    steady = timed(rows[(rows["mode"] == "offline") & (rows["load"] == "steady")])
    counted = details.step_counters(steady)
    if len(counted):
        caption = "Accepted length, draft nodes and parts of a step; steps without a draft count."
        figures.append(("steps.png", caption, plots.steps, counted))
    served = details.serving(rows, summarise(rows, "serving"))
    for number, (target, part) in enumerate(served.groupby("target") if len(served) else (), 1):
        caption = f"{target}: what servers took, by load."
        figures.append((f"serving-{number}.png", caption, plots.serving, part))
    for name, _, draw, frame in figures:
        plots.save(partial(draw, frame), output / name)
    return [picture(output / name, caption) for name, caption, _, _ in figures]
