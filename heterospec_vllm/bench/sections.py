# SPDX-License-Identifier: Apache-2.0
"""The sections of the report. Each function returns one, or None where the rows hold nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from heterospec_vllm.bench import details, plots, words
from heterospec_vllm.bench.cell_tables import every_cell
from heterospec_vllm.bench.page import Section, Sheet, Table, TableCell, text_table
from heterospec_vllm.bench.rows import Cell
from heterospec_vllm.bench.tables import (
    PLAIN,
    CellSummary,
    Entry,
    Frame,
    Results,
    speedups,
    summarise,
    system_order,
    verdict,
)
from heterospec_vllm.bench.words import differ, p_value, times

# What the report may hold, and what to run where it holds nothing.
NEEDS = {
    "Speed-up over plain decoding": "`heterospec bench SPEC.yaml` with `plain`, other systems and steady offline cells",
    "Every cell": "`heterospec bench SPEC.yaml` with offline cells",
    "Acceptance and work a step": "`heterospec bench SPEC.yaml` with speculating systems in steady cells",
    "Where a step goes": "`heterospec bench SPEC.yaml` with systems of ours (`off`, `chain`, `marginal`, ...)",
    "Share of the oracle": "`heterospec simulate TRACE --profile PROFILE --json > sim.json`, then this report with "
    "`--simulation sim.json`",
    "Low and high entropy": "`heterospec bench SPEC.yaml` with greedy cells of concurrency 1 and `prompts: each`",
    "Serving": "`heterospec bench SPEC.yaml` with cells of `mode: serving`",
    "Cost of growth": "`heterospec bench SPEC.yaml` with a section `growth`",
}


@dataclass(frozen=True)
class Material:
    """The rows and what several sections make of them."""

    results: Results
    simulation: dict[str, Any] | None

    @cached_property
    def cells(self) -> list[CellSummary]:
        return summarise(self.results.rows)

    @cached_property
    def served(self) -> list[CellSummary]:
        return summarise(self.results.rows, "serving")

    @cached_property
    def speedups(self) -> Frame:
        return speedups(self.cells)


def headlines(material: Material) -> Section:
    rows, everything = material.results.rows, [*material.cells, *material.served]
    different = words.without_timing(everything, "different")
    failed = words.without_timing(everything, "failed")
    section = Section("In words", words.headlines(rows, material.cells))
    section.sentences += words.headlines(rows, material.served, "serving")
    section.sentences.append(words.gates(rows, len(different)))
    section.bullets += [f"Loss: {text}" for text in words.losses(everything)]
    section.bullets += [f"Answers differ, no timing: {line}" for line in different]
    section.bullets += [f"Failed: {line}" for line in failed]
    return section


def speedup(material: Material, sheet: Sheet) -> Section | None:
    frame = material.speedups
    if frame[frame["system"] != PLAIN]["ratio"].isna().all():
        return None
    section = Section("Speed-up over plain decoding")
    caption = (
        "Times plain decoding, by requests at once; geometric mean where there are several prompt sets. Bars: the "
        "least and the greatest round of `marginal`."
    )
    section.plots.append(sheet.plot("speedup", caption, lambda: plots.speedup(frame)))
    missing = frame[frame["ratio"].isna()]
    if len(missing):
        listed = "; ".join(
            f"{row.system} ({row.target}, T={row.temperature:g}, {row.concurrency} at once)"
            for row in missing.itertuples()
        )
        section.sentences.append(f"Not drawn, for want of a timing in every prompt set: {listed}.")
    return section


def all_cells(material: Material, sheet: Sheet) -> Section | None:
    return every_cell(material.cells) if material.cells else None


# ---- what explains it


def acceptance(material: Material, sheet: Sheet) -> Section | None:
    frame = details.step_counters(material.results.rows)
    if frame.empty:
        return None
    section = Section("Acceptance and work a step")
    caption = (
        "Tokens that a request gets a step, draft nodes that are verified for it, and the head's passes in a step that "
        "drafts. Steps without a draft count in the first two."
    )
    section.plots.append(sheet.plot("counters", caption, lambda: plots.counters(frame)))
    columns = {
        "tokens_per_step": "tokens a step and request",
        "nodes": "nodes a step and request",
        "batch_nodes": "nodes a step, whole batch",
        "levels": "head passes a drafting step",
    }
    rows = [
        [
            f"{row['target']}, T={row['temperature']:g}, {row['concurrency']} at once",
            row["system"],
            *(_number(row[name], 2) for name in columns),
            "" if row["off"] != row["off"] else f"{100 * row['off']:.0f} %",
        ]
        for _, row in frame.iterrows()
    ]
    header = ["steady cells", "system", *columns.values(), "time with speculation off"]
    section.tables.append(text_table("The same in numbers", header, rows))
    return section


def step_split(material: Material, sheet: Sheet) -> Section | None:
    frame = details.step_counters(material.results.rows)
    frame = frame[frame["ms_target"].notna()]
    if frame.empty:
        return None
    section = Section("Where a step goes")
    places = sorted(set(zip(frame["target"], frame["temperature"], strict=True)))
    for number, place in enumerate(places, 1):
        caption = f"{place[0]}, T={place[1]:g}: milliseconds a step by part, and their shares."
        section.plots.append(
            sheet.plot(f"step-split-{number}", caption, partial(plots.step_split, frame, place))
        )
    return section


def oracle(material: Material, sheet: Sheet) -> Section | None:
    if not material.simulation:
        return None
    frame = details.simulated(material.simulation, material.speedups)
    section = Section("Share of the oracle")
    section.sentences.append(
        "From a recorded trace: what would have been accepted is exact, what it would have cost comes from "
        "the profile. The oracle knows in hindsight how far to draft and how much to verify."
    )
    caption = "Simulated speed as a share of the oracle's."
    section.plots.append(sheet.plot("oracle", caption, lambda: plots.oracle(frame)))
    known = frame[frame["measured"].notna() & (frame["policy"] != PLAIN)]
    if known.empty:
        section.sentences.append("No policy and batch size is both simulated and measured (T=0).")
    else:
        caption = "Times plain: simulated (bar) and measured at T=0 (a point a target)."
        section.plots.append(sheet.plot("simulated", caption, lambda: plots.simulated(frame)))
    rows = [
        [
            f"{row.batch} at once",
            row.policy,
            f"{100 * row.share:.0f} %",
            _number(row.simulated, 3),
            "" if row.target != row.target else row.target,
            _number(row.measured, 3),
            _number(row.measured / row.simulated, 3),
        ]
        for row in frame.itertuples()
    ]
    header = ["batch", "policy", "of the oracle", "simulated x plain", "target", "measured x plain"]
    section.tables.append(
        text_table("Simulated against measured", [*header, "measured / simulated"], rows)
    )
    return section


def entropy(material: Material, sheet: Sheet) -> Section | None:
    each = details.by_entropy(material.results.rows, material.results.prompts)
    if each.empty:
        return None
    halves = details.entropy_halves(each)
    section = Section("Low and high entropy")
    section.sentences.append(
        "Prompts decoded one at a time, split at the median of the target's mean entropy along plain decoding's greedy "
        "answer; the geometric mean of the prompts' ratios to plain."
    )
    for row in details.entropy_trend(each).itertuples():
        section.sentences.append(
            f"{row.target}, T={row.temperature:g}: rank correlation of entropy and `marginal`'s speed-up over "
            f"{row.prompts} prompts: {row.rho:.2f} (Spearman, p = {p_value(row.p)})."
        )
    if {"low", "high"} <= set(halves.columns):
        caption = "Filled: the half with low entropy; open: the half with high entropy."
        section.plots.append(
            sheet.plot("entropy-halves", caption, lambda: plots.entropy_halves(halves))
        )
        section.tables.append(_halves_table(halves))
    if (each["system"] == words.MARGINAL).any():
        caption = "`marginal`'s speed-up of each prompt; below the line is a loss."
        section.plots.append(
            sheet.plot("entropy-scatter", caption, lambda: plots.entropy_scatter(each))
        )
    return section


def _halves_table(halves: Frame) -> Table:
    ordered = halves.sort_values("system", key=lambda names: names.map(system_order), kind="stable")
    ordered = ordered.sort_values(["target", "temperature"], kind="stable")
    rows = [
        [
            f"{row['target']}, T={row['temperature']:g}",
            row["system"],
            *(_number(row[name], 3) for name in ("low", "high")),
            f"{row['num_low']:.0f} / {row['num_high']:.0f}",
        ]
        for _, row in ordered.iterrows()
    ]
    header = ["", "system", "low entropy, x plain", "high entropy, x plain", "prompts"]
    return text_table("Halves", header, rows)


# ---- servers and growth

_LATENCIES = [
    f"{name}_{which}" for name in ("ttft", "tpot", "itl", "e2el") for which in ("p50", "p99")
]


def serving(material: Material, sheet: Sheet) -> Section | None:
    if not material.served:
        return None
    frame = details.serving(material.results.rows, material.served)
    section = Section("Serving")
    section.sentences.append(
        "`vllm bench serve` against `vllm serve`; medians over rounds, latencies in milliseconds. TTFT: time to the "
        "first token, TPOT: time per output token after it, ITL: between two tokens, E2EL: end to end. Coloured as "
        "above, by the ratio of plain's median E2EL to the system's: above 1 is faster."
    )
    groups = frame.groupby(["target", "temperature", "prompt_set"]) if len(frame) else ()
    for number, (place, part) in enumerate(groups, 1):
        for by, loop in (("concurrency", "closed"), ("request_rate", "open")):
            chosen = part[part["request_rate"].isna() == (loop == "closed")]
            if len(chosen):
                caption = f"{place[0]}, T={place[1]:g}, {place[2]}: {loop} loop."
                section.plots.append(
                    sheet.plot(
                        f"serving-{number}-{loop}",
                        caption,
                        partial(plots.serving, chosen, by),
                    )
                )
    section.tables.append(_serving_table(material.served, frame))
    return section


def _serving_table(served: Sequence[CellSummary], frame: Frame) -> Table:
    header = ["cell", "system", "x plain", *(n.upper().replace("_", " ") for n in _LATENCIES)]
    header += ["requests/s", "goodput", "requests failed"]
    measured = {(row["cell"], row["system"]): row for _, row in frame.iterrows()}
    rows = [
        _serving_row(one, entry, measured.get((one.cell, entry.system)), len(header))
        for one in served
        for entry in one.entries.values()
    ]
    return Table("Servers", tuple(TableCell((name,)) for name in header), tuple(rows))


def _serving_row(one: CellSummary, entry: Entry, row: Any, width: int) -> tuple[TableCell, ...]:
    names = (TableCell((_short(one.cell),), "name"), TableCell((entry.system,), "name"))
    if row is None:
        text = differ(entry) if entry.status == "different" else "; ".join(entry.reasons)
        empty = (TableCell(("",)),) * (width - 3)
        return (*names, TableCell((text or "nothing was timed",), "bad"), *empty)
    kind: str = "" if entry.system == PLAIN else verdict(row["ratio"], one.noise)
    ratio = "n/a" if row["ratio"] != row["ratio"] else times(row["ratio"])
    numbers = [_number(row[name], 1) for name in _LATENCIES]
    numbers += [_number(row["request_throughput"], 2), _number(row["goodput"], 2)]
    numbers.append(f"{row['failed']:.0f}")
    return (*names, TableCell((ratio,), kind), *(TableCell((text,)) for text in numbers))


def _short(cell: Cell) -> str:
    return cell.label.replace(", serving", "")


def growth(material: Material, sheet: Sheet) -> Section | None:
    points = material.results.growth
    if points.empty:
        return None
    parts = details.growth_parts(points)
    section = Section("Cost of growth")
    section.sentences.append(
        "The median step of our engine as one thing grows, by part, and a plain step of the same engine with the same "
        "requests beside it. `vLLM's own work` is what no span of ours names: scheduler, input preparation, sampling."
    )
    caption = "Milliseconds a step by part; hatched: a plain step."
    section.plots.append(sheet.plot("growth", caption, lambda: plots.growth(points, parts)))
    shares = (points["attention_ms"] / points["vllm_attention_ms"]).dropna()
    if len(shares):
        section.sentences.append(
            f"A layer's tree attention takes {shares.min():.2f} to {shares.max():.2f} times what vLLM's op takes on a "
            f"chain of as many tokens (median {shares.median():.2f}, {len(shares)} points)."
        )
        caption = "One layer's attention, milliseconds: our tree op and vLLM's op on a chain of the same length."
        section.plots.append(sheet.plot("attention", caption, lambda: plots.attention(points)))
    rows = [
        [
            f"{row['target']}: {row['sweep']} {row['value']}",
            f"{row['nodes']} / {row['requests']} / {row['context']}",
            _number(row["ms_per_step"], 2),
            _number(row["ms_plain"], 2),
            *(_number(parts.loc[index, part], 2) for part in parts.columns),
            *(_number(row[name], 4) for name in ("attention_ms", "vllm_attention_ms")),
        ]
        for index, row in points.iterrows()
    ]
    header = ["sweep", "nodes / requests / context", "ms a step", "plain", *parts.columns]
    header += ["attention, ours", "attention, vLLM's"]
    section.tables.append(text_table("Milliseconds", header, rows))
    return section


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"
