# SPDX-License-Identifier: Apache-2.0
"""The cost of growth on a tiny engine: real steps, real counters, two points a sweep."""

import io
import os
from pathlib import Path

import pytest
from harness import ENVIRONMENT
from rich.console import Console
from tiny_model import make_head, make_target

from heterospec_vllm.bench import rows
from heterospec_vllm.bench.growth import run_growth
from heterospec_vllm.bench.growth_points import Fixed, GrowthSpec

pytestmark = pytest.mark.engine

VOCAB = 32
SPEC = GrowthSpec(
    nodes=[1, 12],
    requests=[1, 5],
    context=[16, 300, 4000],
    fixed=Fixed(nodes=6, requests=3, context=150),
    steps=6,
    rounds=2,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of results and what was printed."""
    folder = tmp_path_factory.mktemp("growth")
    target = make_target(folder / "target", VOCAB)
    head = make_head(folder / "head", target)
    console = Console(file=io.StringIO(), width=300)
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setitem(os.environ, name, value)
    try:
        run_growth(
            str(target),
            "tiny",
            str(head),
            SPEC,
            folder,
            rows.Environment(commit="", versions={}, machine="", threads="", command=""),
            console,
            engine_arguments={
                "dtype": "float32",
                "enforce_eager": True,
                "skip_tokenizer_init": True,
            },
        )
    finally:
        patch.undo()
    assert isinstance(console.file, io.StringIO)
    return folder, console.file.getvalue()


def test_every_possible_point_has_a_row(out: tuple[Path, str]) -> None:
    written = list(rows.read(out[0] / rows.GROWTH, rows.GrowthRow))
    # A point whose trees had other nodes, by the engine's counters, would have no row.
    assert [(row.sweep, row.value) for row in written] == [
        ("nodes", 1), ("nodes", 12), ("requests", 1), ("requests", 5),
        ("context", 16), ("context", 300),
    ], out[1]  # fmt: skip


def test_the_point_beyond_the_model_is_named(out: tuple[Path, str]) -> None:
    [line] = [line for line in out[1].splitlines() if "left out" in line]
    assert "tiny, context 4000: left out" in line and "the target takes 2048" in line


def test_times_are_of_decoding_steps(out: tuple[Path, str]) -> None:
    for row in rows.read(out[0] / rows.GROWTH, rows.GrowthRow):
        assert 0 < row.ms_plain < row.ms_per_step < 1000
        assert row.spans_ms["target forward"] < row.spans_ms["execute_model"] < row.ms_per_step * 2
        assert row.spans_ms["draft: levels"] > 0
        assert row.attention_ms is not None and row.attention_ms > 0
        assert row.vllm_attention_ms is not None and row.vllm_attention_ms > 0
        assert "OpenMP threads" in row.environment.threads
