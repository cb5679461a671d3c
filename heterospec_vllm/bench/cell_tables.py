# SPDX-License-Identifier: Apache-2.0
"""The page's tables of every cell: systems downwards, cells to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heterospec_vllm.bench.page import Section, Table, TableCell
from heterospec_vllm.bench.tables import PLAIN, CellSummary, Entry, system_order, verdict
from heterospec_vllm.bench.words import differ, p_value, times


def every_cell(cells: Sequence[CellSummary]) -> Section:
    """A table for each target, temperature and load, one request at a time apart from several."""
    section = Section("Every cell")
    rounds = [len(e.speeds) for one in cells for e in one.entries.values() if len(e.speeds)]
    section.sentences.append(
        "Ratio of the medians to plain decoding's; below it median tokens a second, their least and greatest round, "
        "rounds won against plain and the p of a two-sided sign test. Green: faster, red: slower than plain, by more "
        "than plain's own rounds lie apart ((max - min) / median); grey: within that. Framed in blue: the best chain, "
        "the fastest `eagle3` of the cell, chosen with hindsight. A ratio is taken over rounds of engines that were "
        "loaded together."
    )
    if rounds:
        least = min(1.0, 2 ** (1 - max(rounds)))
        section.sentences.append(
            f"With at most {max(rounds)} rounds a cell, no sign test can give a p below {p_value(least)}."
        )
    groups: dict[tuple[Any, ...], list[CellSummary]] = {}
    for one in cells:
        cell = one.cell
        key = (cell.target, cell.temperature, cell.load, cell.concurrency == 1)
        groups.setdefault(key, []).append(one)
    section.tables += [_group_table(group) for group in groups.values()]
    return section


def _group_table(group: Sequence[CellSummary]) -> Table:
    first = group[0].cell
    load = "" if first.load == "steady" else f", {first.load} load"
    alone = ", one request at a time" if first.concurrency == 1 else ""
    systems = sorted({name for one in group for name in one.entries}, key=system_order)
    rows = [
        (
            TableCell((system,), "name"),
            *(_entry_cell(one, one.entries.get(system)) for one in group),
        )
        for system in systems
    ]
    return Table(
        f"{first.target}, T={first.temperature:g}{load}{alone}",
        (TableCell(("system",)), *(_cell_header(one) for one in group)),
        tuple(rows),
    )


def _cell_header(one: CellSummary) -> TableCell:
    cell = one.cell
    name = cell.prompt_set if cell.concurrency == 1 else f"{cell.concurrency} at once"
    which = [] if cell.concurrency == 1 or cell.prompt_set == "mix" else [cell.prompt_set]
    noise = "plain: one round" if one.noise is None else f"plain's spread {100 * one.noise:.1f} %"
    return TableCell((name, *which, f"{cell.num_prompts} x {cell.lengths} tokens", noise))


def _entry_cell(one: CellSummary, entry: Entry | None) -> TableCell:
    if entry is None:
        return TableCell(("",))
    if entry.status == "different":
        return TableCell((differ(entry),), "bad")
    if entry.speed is None:
        return TableCell((f"failed: {'; '.join(entry.reasons)}",), "bad")
    lines = [
        f"{entry.speed:.1f} tok/s",
        f"{entry.speeds.min():.1f}..{entry.speeds.max():.1f}",
    ]
    if entry.reasons:
        lines.append("a round failed")
    if entry.system == PLAIN:
        return TableCell(("1", *lines))
    pair = one.against(entry.system, PLAIN)
    if pair is None:
        return TableCell(("n/a", *lines))
    won = f"{pair.won}/{pair.won + pair.lost} won, p {p_value(pair.p)}"
    kind: str = verdict(pair.ratio, one.noise)
    if entry.system == one.best_chain:
        kind, lines = f"{kind} best", [*lines, "best chain"]
    return TableCell((times(pair.ratio), *lines[:2], won, *lines[2:]), kind)
