# SPDX-License-Identifier: Apache-2.0
"""The cost of growth: options, trees, which points are measured, and what is written; with a fake engine."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_drafter import draft
from pydantic import ValidationError
from rich.console import Console

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.growth import run_growth
from heterospec_vllm.bench.growth_points import (
    Fixed,
    GrowthSpec,
    Limits,
    Measured,
    Point,
    points_of,
    tokens_of,
    tree_bounds,
    why_left_out,
)
from heterospec_vllm.policy.base import Batch, FixedPolicy
from heterospec_vllm.policy.decisions import TreeShape

ENVIRONMENT = rows.Environment(commit="c", versions={}, machine="m", threads="", command="test")
SMALL = GrowthSpec(
    nodes=[1, 8], requests=[1, 2], context=[32], fixed=Fixed(nodes=4, requests=2, context=64)
)
ROOMY = Limits(max_model_len=8192, kv_blocks=4096, block_size=128)


class FakeEngine:
    """Measures what is asked for, at once."""

    threads = "one"

    def __init__(self, limits: Limits = ROOMY, **changes: Any) -> None:
        self.limits, self._changes = limits, changes
        self.points: list[Point] = []
        self.closed = False

    def measure(self, point: Point) -> Measured:
        self.points.append(point)
        measured = Measured(
            ms_per_step=2.0,
            ms_plain=1.0,
            spans_ms={"target forward": 0.5},
            nodes=point.nodes,
            requests=point.requests,
            attention_ms=0.1,
            vllm_attention_ms=0.2,
        )
        return replace(measured, **self._changes)

    def close(self) -> None:
        self.closed = True


def _run(folder: Path, engine: FakeEngine, spec: GrowthSpec = SMALL, name: str = "tiny") -> str:
    console = Console(file=io.StringIO(), width=300)
    run_growth("target", name, "head", spec, folder, ENVIRONMENT, console, start=lambda *_: engine)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _written(folder: Path) -> list[rows.GrowthRow]:
    return list(rows.read(folder / rows.GROWTH, rows.GrowthRow))


@pytest.mark.parametrize(
    ("given", "where", "allowed"),
    [
        ({"nodes": [4, 64]}, "nodes.1", "found 64, allowed: a whole number from 1 to 63"),
        ({"nodes": [0]}, "nodes.0", "from 1 to 63"),
        ({"nodes": [True]}, "nodes.0", "found True, allowed: a whole number from 1 to 63"),
        ({"requests": [0]}, "requests.0", "found 0, allowed: a whole number >= 1"),
        ({"context": [15]}, "context.0", "found 15, allowed: a whole number >= 16"),
        ({"context": ["128"]}, "context.0", "found '128', allowed: a whole number >= 16"),
        ({"fixed": {"nodes": 70}}, "fixed.nodes", "from 1 to 63"),
        ({"fixed": {"context": 4}}, "fixed.context", ">= 16"),
        ({"steps": 0}, "steps", ">= 1"),
        ({"rounds": 0}, "rounds", ">= 1"),
    ],
)
def test_faults_name_the_field_and_what_is_allowed(
    given: dict[str, Any], where: str, allowed: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        GrowthSpec.model_validate(given)
    [fault] = caught.value.errors()
    assert ".".join(map(str, fault["loc"])) == where
    assert allowed in fault["msg"]


@pytest.mark.parametrize("given", [{"node": [1]}, {"fixed": {"batch": 1}}])
def test_unknown_options_are_rejected(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="extra"):
        GrowthSpec.model_validate(given)


def test_each_sweep_changes_one_thing() -> None:
    spec = GrowthSpec()
    points = points_of(spec)
    assert len(points) == 7 + 7 + 6
    fixed = spec.fixed.model_dump()
    for point in points:
        assert all(getattr(point, name) == fixed[name] for name in fixed if name != point.sweep)
        assert point.value == getattr(point, point.sweep)


def test_a_value_named_twice_is_one_point() -> None:
    assert len(points_of(GrowthSpec(nodes=[4, 4], requests=[], context=[]))) == 1


def _drafted(nodes: int, log_probs_of: Callable[[int], Any]) -> int:
    """Candidates that the policy ``static`` finds for one request within the bounds of ``tree_bounds``."""
    bounds = tree_bounds(nodes)
    shape = TreeShape(bounds.num_speculative_tokens, bounds.max_depth, bounds.top_k)
    batch = Batch(1, 0.0, np.zeros(1, dtype=np.int64), np.full(1, nodes))
    drafted = draft(FixedPolicy(shape), batch, lambda req, depth: np.exp(log_probs_of(shape.top_k)))
    return int(drafted.trees.num_nodes[0])


@pytest.mark.parametrize("nodes", range(1, 64))
@pytest.mark.parametrize("peaked", [False, True])
def test_every_tree_gets_its_nodes(nodes: int, peaked: bool) -> None:
    bounds = tree_bounds(nodes)
    assert bounds.num_speculative_tokens == nodes <= bounds.capacity
    assert 1 <= bounds.top_k <= 16 and 1 <= bounds.max_depth <= 16
    assert _drafted(nodes, lambda k: -(20.0 if peaked else 0.1) * np.arange(k) / k) == nodes


def test_the_widest_tree_has_room_for_all() -> None:
    capacities = [tree_bounds(nodes).capacity for nodes in range(2, 64)]
    assert capacities == sorted(capacities)


def test_rows_are_complete(tmp_path: Path) -> None:
    engine = FakeEngine()
    out = _run(tmp_path / "new folder", engine)
    written = _written(tmp_path / "new folder")
    assert [(row.sweep, row.value, row.nodes, row.requests, row.context) for row in written] == [
        ("nodes", 1, 1, 2, 64),
        ("nodes", 8, 8, 2, 64),
        ("requests", 1, 4, 1, 64),
        ("requests", 2, 4, 2, 64),
        ("context", 32, 4, 2, 32),
    ]
    first = written[0]
    assert (first.target, first.ms_per_step, first.ms_plain) == ("tiny", 2.0, 1.0)
    assert (first.attention_ms, first.vllm_attention_ms) == (0.1, 0.2)
    assert first.environment.threads == "one"
    assert engine.closed and "left out" not in out


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _run(tmp_path, FakeEngine(), GrowthSpec(nodes=[1], requests=[], context=[], fixed=SMALL.fixed))
    engine = FakeEngine()
    _run(tmp_path, engine)
    assert [str(point) for point in engine.points] == [
        "nodes 8", "requests 1", "requests 2", "context 32",
    ]  # fmt: skip
    again = FakeEngine()
    assert "measured already" in _run(tmp_path, again)
    assert again.points == [] and len(_written(tmp_path)) == 5


def test_another_target_and_other_fixed_values_are_other_points(tmp_path: Path) -> None:
    spec = GrowthSpec(nodes=[1], requests=[], context=[])
    _run(tmp_path, FakeEngine(), spec)
    for name, other in (
        ("second", spec),
        ("tiny", spec.model_copy(update={"fixed": Fixed(context=64)})),
    ):
        engine = FakeEngine()
        _run(tmp_path, engine, other, name)
        assert len(engine.points) == 1
    assert len(_written(tmp_path)) == 3


def test_an_engine_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    class Dying(FakeEngine):
        def measure(self, point: Point) -> Measured:
            if len(self.points) == 2:
                raise RuntimeError("growth: the engine's process ended")
            return super().measure(point)

    engine = Dying()
    with pytest.raises(RuntimeError, match="ended"):
        _run(tmp_path, engine)
    assert engine.closed and len(_written(tmp_path)) == 2


def test_points_beyond_the_model_length_are_left_out_aloud(tmp_path: Path) -> None:
    spec = GrowthSpec(nodes=[], requests=[], context=[128, 1024], fixed=Fixed(nodes=4, requests=1))
    engine = FakeEngine(Limits(max_model_len=1024, kv_blocks=100, block_size=128))
    out = _run(tmp_path, engine, spec)
    assert (
        [row.context for row in _written(tmp_path)] == [128] == [p.context for p in engine.points]
    )
    assert "tiny, context 1024: left out, it needs" in out and "the target takes 1024" in out


def test_the_longest_point_that_fits_is_measured() -> None:
    point, spec = Point("context", 4, 1, 512), GrowthSpec()
    length = tokens_of(point, spec)
    for spare, fits in ((0, True), (-1, False)):
        reason = why_left_out(point, spec, Limits(length + spare, 100, 128))
        assert (reason is None) == fits


def test_points_beyond_the_kv_cache_are_left_out_aloud(tmp_path: Path) -> None:
    engine = FakeEngine(Limits(max_model_len=8192, kv_blocks=4, block_size=128))
    out = _run(tmp_path, engine)
    assert [row.requests for row in _written(tmp_path)] == [1]
    assert "requests 2: left out, its keys and values need 4 blocks" in out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nodes": 2.5}, "2.5 instead of 8 nodes a request and step were verified"),
        ({"requests": 1}, "1 of 2 requests decoded in a step"),
    ],
)
def test_a_point_that_is_not_what_was_asked_is_not_written(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    spec = GrowthSpec(nodes=[8], requests=[], context=[], fixed=SMALL.fixed)
    out = _run(tmp_path, FakeEngine(**changes), spec)
    assert _written(tmp_path) == []
    assert f"nodes 8: left out, {reason}" in out
