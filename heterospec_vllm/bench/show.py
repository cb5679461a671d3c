# SPDX-License-Identifier: Apache-2.0
"""A cell's result in the terminal."""

from __future__ import annotations

import statistics

from rich.table import Table

from heterospec_vllm.bench.rows import Cell, Gate, Row
from heterospec_vllm.bench.spec import PLAIN


def cell_table(cell: Cell, rows: list[Row]) -> Table:
    """Medians of one cell's rounds; a system whose answers differ has no timing."""
    table = Table(title=f"{cell.label}, {cell.num_prompts} prompts, {cell.lengths} tokens")
    for column in ("system", "tok/s", "min..max", "x plain", "tokens a step", "same as plain"):
        table.add_column(column, justify="left" if column == "system" else "right")
    systems = dict.fromkeys(row.system for row in rows)
    speeds = {
        name: [s for r in rows if r.system == name and (s := r.tokens_per_second) is not None]
        for name in systems
    }
    base = statistics.median(speeds[PLAIN]) if speeds.get(PLAIN) else None
    for name, values in speeds.items():
        last = [row for row in rows if row.system == name][-1]
        if not values:
            table.add_row(name, "", "", "", "", f"[red]{last.reason}[/]")
            continue
        median = statistics.median(values)
        table.add_row(
            name,
            f"{median:.1f}",
            f"{min(values):.1f}..{max(values):.1f}",
            "" if base is None else f"{median / base:.3f}",
            tokens_a_step(last),
            _shown(last.gate),
        )
    return table


def tokens_a_step(row: Row) -> str:
    """Tokens of a request and step, the target's own included; steps without a draft count."""
    counters = row.counters or {}
    accepted = counters.get("accepted_nodes", counters.get("num_accepted_tokens"))
    if accepted is None or not row.num_tokens:
        return ""
    return f"{row.num_tokens / (row.num_tokens - accepted):.2f}"


def _shown(gate: Gate | None) -> str:
    if gate is None:
        return ""
    ties = f", {gate.near_ties} near-ties" if gate.near_ties else ""
    return f"{gate.same}/{gate.same + gate.near_ties + gate.different}{ties}"
