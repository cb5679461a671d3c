# SPDX-License-Identifier: Apache-2.0
"""What a policy is told: draft-side numbers, and of the target only which verified nodes the walk reached."""

from dataclasses import fields

import numpy as np
import pytest
from made_up_trees import from_parents

from heterospec_vllm.engine.controller import Controller
from heterospec_vllm.policy.base import Batch, DraftPolicy, Level
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.policy.survival import NodeFeatures
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import walk


class Listener(DraftPolicy):
    learns = True

    def __init__(self) -> None:
        super().__init__(TreeShape(8, 3, 2))
        self.heard: list[tuple[NodeFeatures, np.ndarray]] = []

    def observe_nodes(self, nodes: NodeFeatures, accepted: np.ndarray) -> None:
        self.heard.append((nodes, accepted))


def _trees() -> DraftTrees:
    # root -> 7 -> 8, root -> 9 -> 8, root -> 5
    return from_parents(
        tokens=np.array([[7, 8, 9, 8, 5]]),
        node_parents=np.array([[0, 1, 0, 3, 0]]),
        node_ranks=np.array([[0, 0, 1, 0, 2]]),
        num_nodes=np.array([5]),
        log_probs=np.log(np.array([[0.5, 0.4, 0.3, 0.1, 0.05]])),
        survivals=np.array([[0.5, 0.4, 0.3, 0.1, 0.05]]),
        strata=np.zeros((1, 5), dtype=np.int64),
    )


@pytest.mark.parametrize("unvisited", [7, 8, 9, 1234])
def test_answers_at_unvisited_rows_reach_nothing(unvisited: int) -> None:
    """The target would emit 9 at the root, 8 below it, then 4; what it would emit elsewhere varies."""
    emitted = np.array([9, unvisited, unvisited, 8, 4, unvisited])
    asked: list[int] = []

    def sample(reqs, rows, depth):
        asked.extend(rows.tolist())
        return emitted[rows]

    listener = Listener()
    controller = Controller(None, listener)  # type: ignore[arg-type] - nothing is drafted
    trees = _trees()
    walked = walk(trees, sample)
    controller.learn(trees, walked, np.array([0]))
    assert asked == [0, 3, 4]
    ((nodes, accepted),) = listener.heard
    assert accepted.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert nodes.depths.tolist() == [1, 2, 1, 2, 1]


def test_records_hold_no_target_numbers() -> None:
    """A new field has to be argued for here: is it known before the target's forward pass of the step?"""
    known_before = {
        Batch: {"num_reqs", "context", "kinds", "limits"},
        Level: {"depth", "log_probs", "entropies", "survivals", "strata", "meta_entropies"},
        NodeFeatures: {"log_probs", "depths", "strata", "kinds"},
    }
    for record, names in known_before.items():
        assert {field.name for field in fields(record)} == names
