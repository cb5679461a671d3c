# SPDX-License-Identifier: Apache-2.0
"""Which CPU attention op takes rows of text, measured when an engine starts: ours or vLLM's.

Trees need ours. For text both compute the same but for rounding, so the faster one is taken: where a processor has no
instructions that vLLM's op was written for, ours takes half the time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from heterospec_vllm.layers.attention_cpu import PIECE_ROWS
from heterospec_vllm.layers.op_timing import Case, Heads, measure

logger = init_logger(__name__)

DECODES = Case(context=512, rows=1, requests=4)
PROMPTS = Case(context=128, rows=128, requests=1)
SECONDS = 0.15  # of timing a case
# Ours is taken below this share of vLLM's time: where they are alike, rows of text stay with the stock op.
WORTH = 0.95


@dataclass(frozen=True)
class OpChoice:
    """Whether our op takes the rows of requests without drafts."""

    decodes: bool  # one row
    prompts: bool  # more


VLLMS = OpChoice(decodes=False, prompts=False)


def choose_op(heads: Heads, dtype: torch.dtype, isa: str) -> OpChoice:
    """Times both ops on a layer of this shape, its pages laid out by ``isa``; one to three seconds in all."""
    start = time.perf_counter()
    decodes = measure(DECODES, heads, dtype, SECONDS, isa=isa, check=False).ratio
    # Products, not keys, are what takes time here, so the caches do not matter.
    prompts = measure(
        PROMPTS, heads, dtype, SECONDS, piece_rows=PIECE_ROWS, copies=4, isa=isa, check=False
    ).ratio
    choice = OpChoice(decodes=decodes < WORTH, prompts=prompts < WORTH)
    logger.info(
        "heterospec: our CPU attention takes %.2f of the time of vLLM's for decoded tokens (%s), "
        "%.2f for prompts (%s); measured in %.1f s",
        decodes,
        "used" if choice.decodes else "not used",
        prompts,
        "used" if choice.prompts else "not used",
        time.perf_counter() - start,
    )
    return choice
