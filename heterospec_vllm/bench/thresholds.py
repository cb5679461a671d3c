# SPDX-License-Identifier: Apache-2.0
"""The regression guard: ratios that a benchmark's rows must reach, kept in one YAML file."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from heterospec_vllm.bench.rows import ROWS, Row, read
from heterospec_vllm.bench.spec import PLAIN

BEST_CHAIN = "best chain"


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
        rows = list(read(folder / ROWS, Row))
        results = [_judge(threshold, rows, console) for threshold in self.thresholds]
        return all(results)


def load_thresholds(path: Path) -> Thresholds:
    """Raises ValueError with the field that is wrong."""
    if not path.is_file():
        raise ValueError(f"thresholds: found no file {path}, allowed: a YAML file")
    try:
        return Thresholds.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from error


def _judge(threshold: Threshold, rows: list[Row], console: Console) -> bool:
    ratios = []
    cells = {r.cell for r in rows if r.cell.concurrency == threshold.concurrency}
    for cell in cells:
        medians = _medians([r for r in rows if r.cell == cell])
        rival = _rival(threshold.rival, medians)
        if threshold.system in medians and rival is not None:
            ratios.append(medians[threshold.system] / rival)
    what = f"{threshold.system} at {threshold.concurrency}: x {threshold.rival}"
    if not ratios:
        console.print(f"[red]not measured[/]: {what}, least {threshold.least:g}")
        return False
    mean = statistics.geometric_mean(ratios)
    good = mean >= threshold.least
    mark = "[green]reached[/]" if good else "[red]missed[/]"
    console.print(f"{mark}: {what} {mean:.3f}, least {threshold.least:g}, {len(ratios)} cell(s)")
    return good


def _medians(rows: list[Row]) -> dict[str, float]:
    """Tokens a second by system."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        if row.tokens_per_second is not None:
            speeds.setdefault(row.system, []).append(row.tokens_per_second)
    return {system: statistics.median(values) for system, values in speeds.items()}


def _rival(name: str, medians: dict[str, float]) -> float | None:
    if name == PLAIN:
        return medians.get(PLAIN)
    return max((v for s, v in medians.items() if s.startswith("eagle3")), default=None)
