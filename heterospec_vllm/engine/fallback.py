# SPDX-License-Identifier: Apache-2.0
"""Which requests decode plainly inside a speculating batch, and why (`observe/reasons.py`)."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, Protocol

from vllm.sampling_params import SamplingParams

from heterospec_vllm.config import MAX_NODES, RequestOptions


class Request(Protocol):
    """A request as vLLM's model runners keep it (V1: ``CachedRequestState``, V2: ``NewRequestData``)."""

    sampling_params: SamplingParams | None
    prompt_embeds: Any
    mm_features: list[Any]


def fallback_reason(request: Request, unsupported: Collection[str]) -> str | None:
    """Why a request is never drafted for, None where it is; ``unsupported``: reasons of the runner's own."""
    params = request.sampling_params
    if params is None:
        return "pooling"
    if request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.mm_features:
        return "multimodal"
    if RequestOptions.from_extra_args(params.extra_args).heterospec == "off":
        return "switched_off"
    if params.structured_outputs is not None and "structured_output" in unsupported:
        return "structured_output"
    return None


def most_nodes(request: Request) -> int:
    """The draft nodes a request asks for at most (``heterospec_max_nodes``)."""
    params = request.sampling_params
    assert params is not None
    asked = RequestOptions.from_extra_args(params.extra_args).heterospec_max_nodes
    return MAX_NODES if asked is None else asked


def is_worth_drafting(params: SamplingParams, num_outputs: int, last_token: int | None) -> bool:
    """Whether a request that emitted so many tokens, the last one known or not, could use a draft in its next step."""
    if tokens_left(params, num_outputs) <= 1:
        return False  # the target's own next token is the last one
    return last_token is None or not (
        last_token == params.eos_token_id or last_token in (params.stop_token_ids or ())
    )


def tokens_left(params: SamplingParams, num_outputs: int) -> int:
    """The most tokens that a request may still emit after so many."""
    return sys.maxsize if params.max_tokens is None else params.max_tokens - num_outputs
