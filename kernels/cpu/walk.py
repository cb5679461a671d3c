# SPDX-License-Identifier: Apache-2.0
"""Walk of a batch of draft trees on CPU, greedy or sampled, logits read in their own dtype (C++, csrc/)."""

import ctypes

import torch

from .library import DTYPE_CODES, c_entry
from .structs import STRUCTS

_PACK = STRUCTS["WalkArguments"].pack


def num_words_of(vocab_size: int) -> int:
    """int32 words of a packed mask over a vocabulary."""
    return -(-vocab_size // 32)


def _address(data: bytes) -> int:
    """Where an object's bytes lie; it must outlive the use."""
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    return address


def walk_cpu(
    # [num_logits, vocab_size], columns adjacent; float32, bfloat16 or float16
    logits: torch.Tensor,
    # [num_reqs], int64: the root's row; those of the nodes follow
    first_row: torch.Tensor,
    # [num_reqs, max_nodes + 1], int64: parent row, lower than the row itself; -1 for the root and beyond
    parents: torch.Tensor,
    # [num_reqs, max_nodes], int64: token of each node
    tokens: torch.Tensor,
    # at least the deepest node's depth + 1
    max_emitted: int,
    # [num_reqs], float32: below 1e-5 a request is greedy; None: all are
    temperatures: torch.Tensor | None = None,
    # [num_reqs, max_emitted], int64: of the noise at each depth of each request; with temperatures
    seeds: torch.Tensor | None = None,
    # [num_reqs], int32: only the best so many tokens; vocab_size for all
    top_k: torch.Tensor | None = None,
    # [num_reqs], float32: only the best of that probability together; 1 for all
    top_p: torch.Tensor | None = None,
    # [num_reqs] `RowRules` (structs.py), one after the other; what they point to must outlive the call
    rules: bytes | None = None,
    # [num_masks, num_words], int32, packed: bit 1 for tokens that a grammar allows; with mask_of_row
    masks: torch.Tensor | None = None,
    # [num_logits], int32: the mask of each row, -1 where all tokens are allowed
    mask_of_row: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From each root: emit the row's token, go to the child that carries it, until there is none.

    (visited rows, emitted tokens), each [num_reqs, max_emitted] int64 with -1 beyond [num_reqs] int64, their number.
    Greedy: argmax as in `argmax_rows_cpu`, the first of equals, a NaN is the largest. Otherwise the token that vLLM's
    CPU op `fused_gumbel_argmax` draws from `logits.float() / temperature` and the seed: the largest of logit + Gumbel
    noise, where the noise of a token is a hash of seed and token. top_k (which keeps all that equal the last) and then
    top_p (of equal logits at its edge, higher tokens first) leave tokens out as vLLM's `apply_top_k_top_p` does, but
    for sums that round to the other side of `top_p`. Only visited rows are read. Before that, masks and rules change a
    row in float32, as vLLM's sampler does (csrc/row_rules.hpp).

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_reqs, max_nodes = tokens.shape
    assert logits.dtype in DTYPE_CODES and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert first_row.shape == (num_reqs,) and parents.shape == (num_reqs, max_nodes + 1)
    assert max_emitted >= 1
    for given in (first_row, parents, tokens):
        assert given.dtype == torch.int64 and given.is_contiguous()
    if temperatures is not None:
        assert seeds is not None and seeds.shape == (num_reqs, max_emitted)
        assert seeds.dtype == torch.int64 and seeds.is_contiguous()
    for one, dtype in ((temperatures, torch.float32), (top_k, torch.int32), (top_p, torch.float32)):
        if one is not None:
            assert one.shape == (num_reqs,) and one.dtype == dtype and one.is_contiguous()
    if rules is not None:
        assert len(rules) == num_reqs * STRUCTS["RowRules"].size
    if masks is not None:
        assert mask_of_row is not None and mask_of_row.shape == (logits.shape[0],)
        assert masks.shape[1] == num_words_of(logits.shape[1])
        for mask in (masks, mask_of_row):
            assert mask.dtype == torch.int32 and mask.is_contiguous()
    rows = torch.empty((num_reqs, max_emitted), dtype=torch.int64)
    emitted, num_emitted = torch.empty_like(rows), torch.empty_like(first_row)
    failed = c_entry("heterospec_walk")(
        _PACK(
            DTYPE_CODES[logits.dtype],
            num_reqs,
            max_nodes,
            max_emitted,
            logits.shape[1],
            logits.stride(0),
            logits.data_ptr(),
            first_row.data_ptr(),
            parents.data_ptr(),
            tokens.data_ptr(),
            *(0 if one is None else one.data_ptr() for one in (temperatures, top_k, top_p, seeds)),
            rows.data_ptr(),
            emitted.data_ptr(),
            num_emitted.data_ptr(),
            0 if rules is None else _address(rules),
            0 if masks is None else masks.data_ptr(),
            0 if mask_of_row is None else mask_of_row.data_ptr(),
            num_words_of(logits.shape[1]),
        )
    )
    assert not failed
    return rows, emitted, num_emitted
