# SPDX-License-Identifier: Apache-2.0
"""How the head of this process's engine runs (through ``LLM.collective_rpc``)."""

from typing import Any

from heterospec_vllm.draft.fused_head import FusedHead


def choose_head(worker: Any, fused: bool) -> None:
    """In two C++ calls a level, which must be possible, or as vLLM's model."""
    drafter = worker.model_runner.drafter
    head = FusedHead(drafter.model, drafter.max_model_len) if fused else None
    drafter.__dict__["_fused"] = head
