# SPDX-License-Identifier: Apache-2.0
"""The trees that `benchmarks/bench_growth.py` asks for have the nodes that it says."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_drafter import packed

from heterospec_vllm.draft.growth import Parents, children_of, level_of
from heterospec_vllm.policy.base import Batch, DraftPolicy
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.tree.pool import CandidatePool

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_growth.py"
shape_of = runpy.run_path(str(SCRIPT))["shape"]


def _drafted(nodes: int, log_probs_of: Callable[[int], Any]) -> int:
    """Candidates that the policy ``static`` finds for one request within the bounds of ``shape``."""
    shape = TreeShape(*shape_of(nodes).values())
    policy = DraftPolicy(shape)
    batch = Batch(1, 0.0, np.zeros(1, dtype=np.int64), np.full(1, nodes))
    parents, head_rows, width = Parents.roots(1), np.zeros((1, 1), dtype=np.int64), 1
    levels: list[CandidatePool] = []
    for depth in range(1, shape.max_depth + 1):
        tokens = np.tile(np.arange(shape.top_k), (width, 1))
        local = np.tile(log_probs_of(shape.top_k), (width, 1)).astype(np.float32)
        level = children_of(policy, batch, depth, parents, head_rows, tokens, local)
        chosen = policy.expand(batch, level_of(policy, depth, level, parents, np.zeros(1)))
        first_column = sum(one.tokens.shape[1] for one in levels)
        levels.append(level)
        parents, head_rows = packed(chosen, head_rows, level, first_column)
        width = head_rows.shape[1]
    survivals = CandidatePool.concatenate(levels).survivals
    return int(policy.propose(batch, -np.sort(-survivals, axis=1), 0.0)[0])


@pytest.mark.parametrize("nodes", range(1, 64))
@pytest.mark.parametrize("peaked", [False, True])
def test_every_tree_gets_its_nodes(nodes: int, peaked: bool) -> None:
    shape = shape_of(nodes)
    assert list(shape) == ["num_speculative_tokens", "max_depth", "top_k"]
    assert shape["top_k"] <= 16
    assert _drafted(nodes, lambda k: -(20.0 if peaked else 0.1) * np.arange(k) / k) == nodes
