# SPDX-License-Identifier: Apache-2.0
"""The cost of growth: what a step costs as nodes, requests and context length grow, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.growth_engine import GrowthEngine
from heterospec_vllm.bench.growth_points import (
    GrowthSpec,
    Limits,
    Measured,
    Point,
    points_of,
    remaining,
    why_left_out,
    why_unfit,
)


class _Engine(Protocol):
    limits: Limits
    threads: str  # how they are bound, for the environment of a row

    def measure(self, point: Point) -> Measured: ...

    def close(self) -> None: ...


def run_growth(
    target: str,
    target_name: str,
    head: str,
    spec: GrowthSpec,
    output: Path,
    environment: rows.Environment,
    console: Console,
    *,
    engine_arguments: dict[str, Any] | None = None,  # further ones of vLLM's `LLM`, e.g. dtype
    start: Callable[..., _Engine] = GrowthEngine,
) -> None:
    """Measures the points that ``output`` does not hold yet and appends each as it is complete.

    Raises RuntimeError where the engine does not start or dies; what was measured until then is kept.
    """
    path = output / rows.GROWTH
    points = remaining(points_of(spec), rows.read(path, rows.GrowthRow), target_name)
    if not points:
        console.print(f"{target_name}: every point of growth is measured already.")
        return
    output.mkdir(mode=0o700, parents=True, exist_ok=True)
    console.print(f"{target_name}: loading an engine for {len(points)} points of growth ...")
    engine = start(target, head, points, spec, engine_arguments or {})
    environment = environment.model_copy(update={"threads": engine.threads})
    try:
        with _progress(console) as progress:
            task = progress.add_task("growth", total=sum(_work(p, spec) for p in points))
            for point in points:
                progress.update(task, description=f"growth: {point}")
                measured = _measured(engine, point, spec)
                if isinstance(measured, str):
                    console.print(f"{target_name}, {point}: left out, {measured}.")
                else:
                    rows.append(path, _row(point, target_name, measured, environment))
                progress.advance(task, _work(point, spec))
    finally:
        engine.close()


def _measured(engine: _Engine, point: Point, spec: GrowthSpec) -> Measured | str:
    """What was measured, or why the point is left out."""
    reason = why_left_out(point, spec, engine.limits)
    if reason is not None:
        return reason
    measured = engine.measure(point)
    return why_unfit(point, measured) or measured


def _work(point: Point, spec: GrowthSpec) -> int:
    """Tokens that the target processes, to share out the time left."""
    return point.requests * (point.context + spec.steps * (point.nodes + 2))


def _progress(console: Console) -> Progress:
    left = TextColumn("left:")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), left)
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _row(
    point: Point, target_name: str, measured: Measured, environment: rows.Environment
) -> rows.GrowthRow:
    return rows.GrowthRow(
        target=target_name,
        sweep=point.sweep,
        value=point.value,
        nodes=point.nodes,
        requests=point.requests,
        context=point.context,
        ms_per_step=measured.ms_per_step,
        ms_plain=measured.ms_plain,
        spans_ms=measured.spans_ms,
        attention_ms=measured.attention_ms,
        vllm_attention_ms=measured.vllm_attention_ms,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        environment=environment,
    )
