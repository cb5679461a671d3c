# SPDX-License-Identifier: Apache-2.0
"""The regression guard: ratios that a benchmark's rows must reach, kept in one YAML file."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from heterospec_vllm.bench.tables import CellSummary, load, summarise


class Threshold(BaseModel):
    """``system`` against ``rival`` at one concurrency: geometric mean over the cells that hold both."""

    model_config = ConfigDict(extra="forbid")

    system: str
    rival: Literal["plain", "best chain"]
    concurrency: int = Field(ge=1)
    least: float = Field(gt=0)


class Thresholds(BaseModel):
    model_config = ConfigDict(extra="forbid")

    thresholds: list[Threshold] = Field(min_length=1)

    def reached(self, folder: Path, console: Console) -> bool:
        """Prints a line for each; False where one is missed or cannot be judged."""
        rows = load([folder])
        cells = [*summarise(rows), *summarise(rows, "serving")]
        results = [_judge(threshold, cells, console) for threshold in self.thresholds]
        return all(results)


def _judge(threshold: Threshold, cells: list[CellSummary], console: Console) -> bool:
    pairs = [
        one.against(threshold.system, threshold.rival)
        for one in cells
        if one.cell.concurrency == threshold.concurrency
    ]
    ratios = [pair.ratio for pair in pairs if pair is not None]
    what = f"{threshold.system} at {threshold.concurrency}: x {threshold.rival}"
    if not ratios:
        console.print(f"[red]not measured[/]: {what}, least {threshold.least:g}")
        return False
    mean = statistics.geometric_mean(ratios)
    good = mean >= threshold.least
    mark = "[green]reached[/]" if good else "[red]missed[/]"
    console.print(f"{mark}: {what} {mean:.3f}, least {threshold.least:g}, {len(ratios)} cell(s)")
    return good
