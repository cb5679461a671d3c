# SPDX-License-Identifier: Apache-2.0
"""A draft head's logits and the likeliest tokens of each row, in one call on CPU (C++, csrc/)."""

import torch

from .library import DTYPE_CODES, c_entry
from .packed_linear import LANES, size_of
from .structs import STRUCTS

_PACK = STRUCTS["TopArguments"].pack


def top_tokens_cpu(
    # [num_rows, hidden_size], contiguous
    rows: torch.Tensor,
    # packed; columns beyond the vocabulary fill the last panel and are no tokens
    packed: torch.Tensor,
    draft_vocab_size: int,
    # [draft_vocab_size], int64: what is added to a column to get its token
    offsets: torch.Tensor | None,
    top_k: int,
    # [num_masks, num_words], int32, packed: bit 1 for tokens that are allowed; with mask_of_row
    masks: torch.Tensor | None = None,
    # [num_rows], int32: -1 where all tokens are allowed
    mask_of_row: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64, log-probabilities float32), each [num_rows, top_k], the likeliest first, of equals the first.

    A row with a NaN or infinite logit has log-probabilities of NaN and some tokens, and so has one that allows no token
    of the draft vocabulary. Places for which no allowed token is left have log-probabilities of minus infinity.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_columns, depth = size_of(packed)
    assert rows.dtype == packed.dtype and rows.is_contiguous() and packed.is_contiguous()
    assert rows.shape[1] == depth and 1 <= top_k <= draft_vocab_size
    assert num_columns - LANES < draft_vocab_size <= num_columns
    assert offsets is None or offsets.dtype == torch.int64
    num_rows = rows.shape[0]
    if masks is not None:
        assert mask_of_row is not None and mask_of_row.shape == (num_rows,)
        assert masks.dtype == mask_of_row.dtype == torch.int32
        assert masks.is_contiguous() and mask_of_row.is_contiguous()
    tokens = torch.empty((num_rows, top_k), dtype=torch.int64)
    log_probs = torch.empty((num_rows, top_k), dtype=torch.float32)
    failed = c_entry("heterospec_top_tokens")(
        _PACK(
            DTYPE_CODES[rows.dtype],
            num_rows,
            depth,
            draft_vocab_size,
            top_k,
            rows.data_ptr(),
            packed.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            0 if masks is None else masks.data_ptr(),
            0 if mask_of_row is None else mask_of_row.data_ptr(),
            tokens.data_ptr(),
            log_probs.data_ptr(),
            0 if masks is None else masks.shape[1],
        )
    )
    assert not failed
    return tokens, log_probs
