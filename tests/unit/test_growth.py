# SPDX-License-Identifier: Apache-2.0
"""The trees that `benchmarks/bench_growth.py` asks for have the nodes that it says."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_drafter import draft

from heterospec_vllm.policy.base import Batch, FixedPolicy
from heterospec_vllm.policy.decisions import TreeShape

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_growth.py"
shape_of = runpy.run_path(str(SCRIPT))["shape"]


def _drafted(nodes: int, log_probs_of: Callable[[int], Any]) -> int:
    """Candidates that the policy ``static`` finds for one request within the bounds of ``shape``."""
    shape = TreeShape(*shape_of(nodes).values())
    batch = Batch(1, 0.0, np.zeros(1, dtype=np.int64), np.full(1, nodes))
    drafted = draft(FixedPolicy(shape), batch, lambda req, depth: np.exp(log_probs_of(shape.top_k)))
    return int(drafted.trees.num_nodes[0])


@pytest.mark.parametrize("nodes", range(1, 64))
@pytest.mark.parametrize("peaked", [False, True])
def test_every_tree_gets_its_nodes(nodes: int, peaked: bool) -> None:
    shape = shape_of(nodes)
    assert list(shape) == ["num_speculative_tokens", "max_depth", "top_k"]
    assert shape["top_k"] <= 16
    assert _drafted(nodes, lambda k: -(20.0 if peaked else 0.1) * np.arange(k) / k) == nodes
