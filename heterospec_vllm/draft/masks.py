# SPDX-License-Identifier: Apache-2.0
"""Masks of tokens on logits, where no kernel reads them packed."""

from __future__ import annotations

import numpy as np
import torch

from heterospec_vllm.tree.masks import TokenMasks


def without_forbidden(
    logits: torch.Tensor,  # [num_rows, num_columns]
    masks: TokenMasks,
    offsets: torch.Tensor | None,  # [num_columns] what is added to a column to get its token
) -> torch.Tensor:
    """[num_rows, num_columns] a copy in which the logits of forbidden tokens are minus infinity."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    if offsets is not None:
        tokens = tokens + offsets
    full = np.concatenate([masks.bits, np.full((1, masks.bits.shape[1]), -1, np.int32)])
    words = torch.from_numpy(full[masks.of_row]).to(
        logits.device
    )  # a row without a mask takes the last
    return logits.masked_fill((words[:, tokens // 32] >> (tokens % 32)) & 1 == 0, -torch.inf)
