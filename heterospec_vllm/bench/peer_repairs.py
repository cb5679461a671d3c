# SPDX-License-Identifier: Apache-2.0
"""What stock vLLM does wrong in a system we compare with, put right before it is timed: a peer is timed at its best.

Only in the benchmark's own engine processes; the plugin changes nothing of these functions.
"""

from __future__ import annotations

import torch

MODULE, NAME = "vllm.utils.cpu_triton_utils", "_expand_kernel_impl"
WHY = (
    "stock vLLM on CPUs drops the temperatures, top-k and top-p that its rejection sampler spreads "
    "over draft tokens (the result goes to a copy), so it samples with memory that nobody wrote "
    "and accepts no draft at temperatures above 0"
)
REMOVE_WHEN = "vLLM's expand_kernel on CPUs returns what it was given (its pull request 42638)"


def repair_sampling_on_cpu() -> None:
    """Before vLLM registers its CPU kernels, that is before ``LLM`` is imported."""
    from vllm.utils import cpu_triton_utils

    setattr(cpu_triton_utils, NAME, expand)


def expand(
    output: torch.Tensor,  # [num_tokens]
    input_val: torch.Tensor,  # [batch_size]
    cu_num_tokens: torch.Tensor,  # [batch_size]
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # of the Triton kernel
) -> None:
    """A request's value for each of its draft tokens, one value replaced by another."""
    values = torch.where(input_val == replace_from, replace_to, input_val)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))
