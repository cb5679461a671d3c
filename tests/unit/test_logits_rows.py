# SPDX-License-Identifier: Apache-2.0
"""What vLLM finds by a request's place in the batch: rows of logits, where trees bring further ones, and budgets."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from heterospec_vllm.engine.step import Step
from heterospec_vllm.runners.thinking_budgets import RowBudgets
from heterospec_vllm.runners.v1 import HeteroSpecCPUModelRunner
from heterospec_vllm.tree.trees import DraftTrees


@pytest.mark.parametrize("num_nodes", [None, [0, 0, 0], [3, 0, 2]])
def test_nans_are_counted_for_the_request_that_has_them(num_nodes: list[int] | None) -> None:
    runner = object.__new__(HeteroSpecCPUModelRunner)
    runner.input_batch = SimpleNamespace(req_id_to_index={"a": 0, "b": 1, "c": 2})
    runner._step = Step()
    counts = [0, 0, 0] if num_nodes is None else num_nodes
    if num_nodes is not None:
        runner._step.trees = replace(DraftTrees.empty(3), num_nodes=np.array(num_nodes))
    logits = torch.zeros(3 + sum(counts), 5)
    logits[1 + counts[0], :2] = torch.nan  # b's row
    assert runner._get_nans_in_logits(logits) == {"a": 0, "b": 2, "c": 0}
    assert runner._get_nans_in_logits(None) == {"a": 0, "b": 0, "c": 0}


def _budgets() -> RowBudgets:
    """Tokens 2 and 3 enclose a thought; the first two requests of the batch have begun one."""
    config = ReasoningConfig()
    config._reasoning_start_token_ids, config._reasoning_end_token_ids = [2], [3]
    budgets = RowBudgets(config, 4, torch.device("cpu"))
    given = [SamplingParams(thinking_token_budget=budget) for budget in (0, 5, None)]
    added = [(i, params, [2, 9], []) for i, params in enumerate(given)]
    budgets.sync_batch(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
    return budgets


def _forced(budgets: RowBudgets, outputs: list[list[int]]) -> list[int]:
    """Rows whose next token is the end of a thought."""
    drafts = [[7] * (3 - i) for i in range(len(outputs))]
    budgets.update_state(outputs, [[] for _ in outputs])
    logits = budgets.apply_to_logits(torch.zeros(len(outputs), 10), False, drafts)
    return logits.argmax(-1).eq(3).nonzero().flatten().tolist()


def test_a_budget_binds_the_row_of_its_request_whatever_is_drafted() -> None:
    assert _forced(_budgets(), [[], [], []]) == [0]


@pytest.mark.parametrize(
    ("moved", "rows"),
    [
        ((0, 1, MoveDirectionality.SWAP), [1]),
        ((0, 2, MoveDirectionality.SWAP), [2]),
        ((2, 0, MoveDirectionality.UNIDIRECTIONAL), []),  # it has none, the one that left had
    ],
)
def test_budgets_move_with_their_requests(moved: tuple, rows: list[int]) -> None:
    budgets = _budgets()
    budgets.sync_batch(BatchUpdate(batch_size=3, removed=[], added=[], moved=[moved]))
    assert _forced(budgets, [[], [], []]) == rows
