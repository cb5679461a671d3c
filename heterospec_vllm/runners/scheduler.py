# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler for drafts that are trees: it hands them to the worker whole.

vLLM's takes a draft for one path. It cuts a draft at the first token that the grammar does not allow after the one
before, and it fills the masks of the path's later tokens. In a tree the token before is often a sibling. So the worker,
which knows the trees, masks their nodes (``grammars.py``), and the engine masks what it alone can judge: the next token
of each request. Its grammar still advances by emitted tokens only.
"""

from __future__ import annotations

import weakref
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from heterospec_vllm.config import REASONING_ARGUMENT
from heterospec_vllm.engine.step import without_speculation

# The engine's manager where its worker lives in the same process: grammars are compiled once.
_managers: weakref.WeakSet[StructuredOutputManager] = weakref.WeakSet()


def manager_of_engine(vllm_config: Any) -> StructuredOutputManager | None:
    """The manager of the engine with this config, where it is in this process."""
    for manager in _managers:
        if manager.vllm_config.instance_id == vllm_config.instance_id:
            return manager
    return None


class HeteroSpecScheduler(Scheduler):
    """vLLM's, with drafts that no grammar cuts."""

    structured_output_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager: StructuredOutputManager = self.structured_output_manager
        # One mask a request and no rollback: what a backend needs for plain decoding.
        manager.vllm_config = without_speculation(manager.vllm_config)
        _managers.add(manager)
        self.structured_output_manager = _WholeDrafts(manager)

    def add_request(self, request: Request) -> None:
        """The worker parses the reasoning, too, and is told the arguments of the chat template."""
        structured, params = request.structured_output_request, request.sampling_params
        if structured is not None and params is not None:
            ended, arguments = structured.reasoning_ended, structured.reasoning_parser_kwargs
            if ended is not None or arguments:
                told = {"ended": ended, "arguments": arguments}
                params.extra_args = {**(params.extra_args or {}), REASONING_ARGUMENT: told}
        super().add_request(request)


class _WholeDrafts:
    """The engine's manager as the scheduler sees it: it says nothing of draft tokens."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def validate_tokens(self, request: Request, spec_tokens: list[int]) -> list[int]:
        return spec_tokens

    def grammar_bitmask(
        self,
        requests: dict[str, Request],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> Any:
        """[num_reqs, num_words] int32: the mask of each request's next token."""
        return self._manager.grammar_bitmask(requests, structured_output_request_ids, {})
