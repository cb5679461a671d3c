# SPDX-License-Identifier: Apache-2.0
"""vLLM's holder of thinking budgets where every request has one row of logits, in the order of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.config.reasoning import ReasoningConfig
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class RowBudgets(ThinkingBudgetStateHolder):
    """Requests with a budget are never drafted for, so the holder needs no draft counts.

    Built with them it takes a request's row to be the sum of the counts before it.
    """

    def __init__(
        self, reasoning_config: ReasoningConfig, max_num_seqs: int, device: torch.device
    ) -> None:
        super().__init__(reasoning_config, max_num_seqs, 0, device, PIN_MEMORY)

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """vLLM does not name a request as removed where another moves to its row, and keeps its budget there."""
        if batch_update is not None:
            refilled = [
                to
                for _, to, direction in batch_update.moved
                if direction == MoveDirectionality.UNIDIRECTIONAL
            ]
            batch_update = replace(batch_update, removed=[*batch_update.removed, *refilled])
        super().sync_batch(batch_update)
