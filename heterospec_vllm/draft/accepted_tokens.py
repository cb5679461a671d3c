# SPDX-License-Identifier: Apache-2.0
"""Accepted tokens on their way to the draft head: the record and how it is cut into parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from heterospec_vllm.arrays import NO_ROW, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.kernels.cpu.gather_rows import gather_rows_cpu
from heterospec_vllm.kernels.cpu.library import is_available


@compiled("Tuple((i8[::1], f8))(i8[:], i8[:])")
def firsts_and_context(
    num_tokens,  # [num_reqs]
    positions,  # [num_tokens]
):
    """[num_reqs] position of each request's first token; the sum of those of the last ones."""
    firsts = np.empty(num_tokens.size, np.int64)
    context = 0.0
    start = 0
    for req in range(num_tokens.size):
        firsts[req] = positions[start]
        start += num_tokens[req]
        context += positions[start - 1]
    return firsts, context


@compiled("i8(i4[:,:], i8, i8, i8)")
def _block(block_table, req, offset, block_size):
    """KV block of a request's token."""
    column = offset // block_size
    assert column < block_table.shape[1]  # compiled code would read on
    return block_table[req, column]


@compiled("i8[::1](i8[:], i8[:], i4[:,:], i8)")
def true_blocks(
    num_tokens,  # [num_reqs]
    offsets,  # [num_tokens] from the start of the head's context
    block_table,  # [num_reqs, max_blocks] from there
    block_size,
):
    """[num_tokens] KV block of each."""
    blocks = np.empty(offsets.size, np.int64)
    row = 0
    for req in range(num_tokens.size):
        for _ in range(num_tokens[req]):
            blocks[row] = _block(block_table, req, offsets[row], block_size)
            row += 1
    return blocks


@compiled(
    "Tuple((i4[::1], i4[::1], i4[:,::1], i8[::1], i8[::1], i4[::1]))"
    "(i8[::1], i8[::1], i4[:,:], i8, i4[:], i4[:])"
)
def accepted_rows(
    num_tokens,  # [num_reqs]
    offsets,  # [num_tokens] from the start of the head's context, rising by one within a request
    block_table,  # [num_reqs, max_blocks] from there
    block_size,
    token_ids,  # [num_tokens]
    next_token_ids,  # [num_reqs] that follow each request's last one
):
    """Accepted tokens as rows of a level that is a chain: each with the token that followed it.

    [num_reqs + 1] where each request's rows start; [num_reqs] keys before them; [num_tokens, longest] rows of the
    same request up to each one (NO_ROW padded); [num_tokens] slot in the pages and next token; [num_reqs] keys of the
    request with its rows.
    """
    num_reqs = num_tokens.size
    start = np.zeros(num_reqs + 1, np.int32)
    context_lens = np.empty(num_reqs, np.int32)
    seq_lens = np.empty(num_reqs, np.int32)
    longest = 0
    for req in range(num_reqs):
        start[req + 1] = start[req] + num_tokens[req]
        longest = max(longest, num_tokens[req])
        context_lens[req] = offsets[start[req]]
        seq_lens[req] = context_lens[req] + num_tokens[req]
    before = np.full((start[num_reqs], longest), NO_ROW, np.int32)
    slots = np.empty(start[num_reqs], np.int64)
    following = np.empty(start[num_reqs], np.int64)
    for req in range(num_reqs):
        last = start[req + 1] - 1
        for row in range(start[req], start[req + 1]):
            for i in range(row - start[req] + 1):
                before[row, i] = start[req] + i
            block = _block(block_table, req, offsets[row], block_size)
            slots[row] = block * block_size + offsets[row] % block_size
            following[row] = next_token_ids[req] if row == last else token_ids[row + 1]
    return start, context_lens, before, slots, following, seq_lens


@dataclass(frozen=True)
class AcceptedTokens:
    """Tokens of their requests' text that the head has not seen, request by request, in text order."""

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens] int64, rising by one within a request
    features: torch.Tensor  # [num_tokens, num_aux * hidden_size], the target's aux hidden states
    num_tokens: Ints  # [num_reqs], >= 1
    next_token_ids: torch.Tensor  # [num_reqs] int32, the token that follows each request's last one
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32, from where the head's context begins
    # [num_reqs] the position at which it begins, a block's first; most often 0.
    context_starts: Ints

    @cached_property
    def ends(self) -> Ints:
        """[num_reqs] where each request's tokens end."""
        return np.cumsum(self.num_tokens)

    @cached_property
    def host_positions(self) -> Ints:
        """[num_tokens] ``positions`` on the host."""
        return self.positions.cpu().numpy()

    @cached_property
    def _firsts_and_context(self) -> tuple[Ints, float]:
        return firsts_and_context(self.num_tokens, self.host_positions)

    @property
    def first_positions(self) -> Ints:
        """[num_reqs] position of each request's first token."""
        return self._firsts_and_context[0]

    @property
    def context(self) -> float:
        """Tokens of context of all requests: the positions of their last tokens."""
        return self._firsts_and_context[1]


def gather_rows(
    sources: list[torch.Tensor],  # each [num_source_rows, columns]
    rows: Ints,
) -> torch.Tensor:
    """[rows.size, columns of all sources]: those rows of each, side by side."""
    index = torch.from_numpy(rows)
    if sources[0].device.type == "cpu" and is_available():
        return gather_rows_cpu(sources, index)
    parts = [source[index] for source in sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def context_offsets(tokens: AcceptedTokens) -> torch.Tensor:
    """[num_tokens] int64 how far each token lies behind the start of the head's context."""
    if not tokens.context_starts.any():
        return tokens.positions
    starts = torch.from_numpy(np.repeat(tokens.context_starts, tokens.num_tokens))
    return tokens.positions - starts.to(tokens.positions.device)


def blocks_of(tokens: AcceptedTokens, block_size: int) -> torch.Tensor:
    """[num_tokens] int64 KV block of each token."""
    if tokens.positions.device.type == "cpu":
        return torch.from_numpy(host_blocks_of(tokens, block_size))
    offsets = context_offsets(tokens)
    reqs = torch.from_numpy(np.repeat(np.arange(tokens.num_tokens.size), tokens.num_tokens))
    return tokens.block_table[reqs.to(offsets.device), offsets // block_size].long()


def host_blocks_of(tokens: AcceptedTokens, block_size: int) -> Ints:
    """[num_tokens] KV block of each token, on the host."""
    if tokens.positions.device.type != "cpu":
        return blocks_of(tokens, block_size).cpu().numpy()
    return true_blocks(
        tokens.num_tokens,
        context_offsets(tokens).numpy(),
        tokens.block_table.numpy(),
        block_size,
    )


def slots_of(tokens: AcceptedTokens, block_size: int) -> torch.Tensor:
    """[num_tokens] int64 KV slot of each token."""
    return blocks_of(tokens, block_size) * block_size + tokens.positions % block_size


def with_context_starts(tokens: AcceptedTokens, starts: Ints, block_size: int) -> AcceptedTokens:
    """The tokens with block tables that begin at ``starts`` ([num_reqs], multiples of the block size)."""
    if not starts.any():
        return tokens
    table = tokens.block_table
    shift = torch.from_numpy(starts // block_size).to(table.device)
    columns = torch.arange(table.shape[1], device=table.device) + shift[:, None]
    # What moves in from behind is never reached.
    table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
    return replace(tokens, block_table=table, context_starts=starts)


def parts_of(num_tokens: Ints, most: int) -> list[slice]:
    """Consecutive requests of at most ``most`` tokens together (a single one may have that many)."""
    parts, start, total = [], 0, 0
    for req, count in enumerate(num_tokens.tolist()):
        if total and total + count > most:
            parts.append(slice(start, req))
            start, total = req, 0
        total += count
    return [*parts, slice(start, num_tokens.size)]


def requests_of(tokens: AcceptedTokens, part: slice) -> AcceptedTokens:
    if part.start == 0 and part.stop == tokens.num_tokens.size:
        return tokens
    ends = np.concatenate([[0], tokens.ends])
    rows = slice(int(ends[part.start]), int(ends[part.stop]))
    return AcceptedTokens(
        token_ids=tokens.token_ids[rows],
        positions=tokens.positions[rows],
        features=tokens.features[rows],
        num_tokens=tokens.num_tokens[part],
        next_token_ids=tokens.next_token_ids[part],
        block_table=tokens.block_table[part],
        context_starts=tokens.context_starts[part],
    )


def split_last(tokens: AcceptedTokens) -> tuple[torch.Tensor, AcceptedTokens]:
    """([num_earlier] int64 the places of all but each request's last token, those last tokens)."""
    last = torch.from_numpy(tokens.ends - 1)
    earlier = torch.ones(len(tokens.token_ids), dtype=torch.bool)
    earlier[last] = False
    return earlier.nonzero()[:, 0], replace(
        tokens,
        token_ids=tokens.token_ids[last],
        positions=tokens.positions[last],
        features=tokens.features[last],
        num_tokens=np.ones_like(tokens.num_tokens),
    )


def without_start(tokens: AcceptedTokens, req: int, count: int) -> AcceptedTokens:
    """The tokens without the first ``count`` of one request."""
    first = int(tokens.num_tokens[:req].sum())
    keep = torch.ones(len(tokens.token_ids), dtype=torch.bool)
    keep[first : first + count] = False
    num_tokens = tokens.num_tokens.copy()
    num_tokens[req] -= count
    return replace(
        tokens,
        token_ids=tokens.token_ids[keep],
        positions=tokens.positions[keep],
        features=tokens.features[keep],
        num_tokens=num_tokens,
    )
