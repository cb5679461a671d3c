# SPDX-License-Identifier: Apache-2.0
"""What explains the ratios: accepted lengths, drafted nodes and the parts of a step, and what servers took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from heterospec_vllm.bench.rows import Serving
from heterospec_vllm.bench.tables import CellSummary, Frame, column_of, holding, timed
from heterospec_vllm.observe.counters import STEP_PARTS

PLACE = ["target", "temperature", "concurrency", "system"]
MEANS = ["tokens_per_step", "nodes", *(f"ms_{part}" for part in STEP_PARTS)]


def step_counters(kept: Frame, by: Sequence[str] = PLACE) -> Frame:
    """Counters summed over the timed rows that agree in `by`, turned into means.

    tokens_per_step: tokens a step and request; nodes: draft nodes a step and request. Both count steps without a draft:
    a request gets one token of the target a step, so its steps are its tokens less the accepted ones.
    ms_PART: milliseconds a step. NaN where a system does not count it.
    """
    kept = holding(kept, "counters", dict)
    kept = kept[kept["num_tokens"].notna()]
    records = []
    for place, part in kept.groupby(list(by), sort=False):
        means = _means(_total(part["counters"]), float(part["num_tokens"].sum()))
        records.append({**dict(zip(by, place, strict=True)), **means})
    frame = pd.DataFrame(records, columns=[*by, *MEANS])
    return frame.astype(dict.fromkeys(MEANS, float))


def _total(counters: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of the counters, summed; seconds by part as `seconds.PART`."""
    total: dict[str, float] = {}
    for one in counters:
        seconds = one.get("seconds") or {}
        flat = {**one, **{f"seconds.{part}": value for part, value in seconds.items()}}
        for name, value in flat.items():
            if isinstance(value, int | float):
                total[name] = total.get(name, 0.0) + value
    return total


def _means(total: Mapping[str, float], tokens: float) -> dict[str, float]:
    accepted = total.get("accepted_nodes", total.get("num_accepted_tokens", np.nan))
    nodes = total.get("verified_nodes", total.get("num_draft_tokens", np.nan))
    steps = total.get("steps", np.nan)
    seconds = {part: total.get(f"seconds.{part}", np.nan) for part in STEP_PARTS}
    return {
        "tokens_per_step": _over(tokens, tokens - accepted),
        "nodes": _over(nodes, tokens - accepted),
        **{f"ms_{part}": 1000 * _over(value, steps) for part, value in seconds.items()},
    }


def _over(value: float, count: float) -> float:
    return value / count if count > 0 else np.nan


def serving(rows: Frame, cells: Sequence[CellSummary]) -> Frame:
    """Medians over rounds of what `vllm bench serve` measured, by cell and system."""
    chosen = holding(timed(rows), "serving", Serving)
    records = []
    for one in cells:
        for system in one.entries:
            of = chosen[(chosen["cell"] == one.cell) & (chosen["system"] == system)]["serving"]
            if len(of):
                medians = pd.DataFrame([dict(s) for s in of]).astype(float).median()
                load = f"{column_of(one.cell)}, T={one.cell.temperature:g}".replace(" ", "\n")
                names = {"target": one.cell.target, "label": one.cell.label, "load": load}
                records.append({**names, "system": system, **medians})
    return pd.DataFrame(records)
