# SPDX-License-Identifier: Apache-2.0
"""Which rows of text our attention takes in this process's engine (through ``LLM.collective_rpc``)."""

from typing import Any

from heterospec_vllm.layers.op_choice import OpChoice


def choose_rows(worker: Any, decodes: bool, prompts: bool) -> None:
    """Whatever was measured when the engine started."""
    worker.model_runner._op_choice = OpChoice(decodes, prompts)
