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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64, log-probabilities float32), each [num_rows, top_k], the likeliest first, of equals the first.

    A row with a NaN or infinite logit has log-probabilities of NaN and some tokens.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_columns, depth = size_of(packed)
    assert rows.dtype == packed.dtype and rows.is_contiguous() and packed.is_contiguous()
    assert rows.shape[1] == depth and 1 <= top_k <= draft_vocab_size
    assert num_columns - LANES < draft_vocab_size <= num_columns
    assert offsets is None or offsets.dtype == torch.int64
    num_rows = rows.shape[0]
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
            tokens.data_ptr(),
            log_probs.data_ptr(),
        )
    )
    assert not failed
    return tokens, log_probs
