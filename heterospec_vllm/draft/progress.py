# SPDX-License-Identifier: Apache-2.0
"""What the draft head has seen of each request, and the aux hidden states of what it has not.

While nothing is drafted the head does not run. The tokens that pass it by are kept with their aux hidden states. One
batched pass brings the head up to date when drafting resumes. The memory is bounded, and blocks of the prefix cache
may have been filled without the head. In both cases its context of a request begins late: at the first block behind
all that it has not seen. Drafts get worse by what it misses, answers do not change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from heterospec_vllm.arrays import Bools, Ints
from heterospec_vllm.draft.accepted_tokens import (
    AcceptedTokens,
    host_blocks_of,
    with_context_starts,
)

MAX_KEPT_BYTES = 256 * 2**20
Piece = tuple[torch.Tensor, ...]  # token ids, positions and features of consecutive tokens


@dataclass
class _Kept:
    """The tokens of one step that passed the head by."""

    first_row: dict[str, tuple[int, int]]  # request -> rows [start, stop)
    nexts: dict[str, int]  # request -> position after its last row
    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    features: torch.Tensor  # [num_tokens, num_aux * hidden_size]

    def closed_up(self) -> _Kept:
        """Without the rows that no request waits for, if they are more than half."""
        live = sum(stop - start for start, stop in self.first_row.values())
        if 2 * live >= len(self.token_ids):
            return self
        index = torch.cat([torch.arange(*span) for span in self.first_row.values()])
        where, start = {}, 0
        for req_id, (first, stop) in self.first_row.items():
            where[req_id] = (start, start + stop - first)
            start += stop - first
        index = index.to(self.token_ids.device)
        columns = self.token_ids[index], self.positions[index], self.features[index]
        return _Kept(where, self.nexts, *columns)


class HeadProgress:
    """Follows every request's tokens past the head; owns which of them are in its KV."""

    def __init__(self, num_blocks: int, block_size: int, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._block_size = block_size
        self._max_bytes = max_bytes
        self._seen_blocks = np.ones(num_blocks, dtype=np.bool_)
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._next: dict[str, int] = {}  # position of the next token of each followed request
        self._pending: dict[str, int] = {}  # kept tokens of each request
        # Where the head's context begins, at a block's start, of requests whose first tokens it has not seen.
        self._starts: dict[str, int] = {}
        self._late: set[str] = set()  # those of them that were fed
        self.num_late = 0  # of them since they were last counted

    def pending(self, req_id: str) -> int:
        """Kept tokens of a request: what the head has to catch up on before it can draft for it."""
        return self._pending.get(req_id, 0)

    def take_late(self) -> int:
        """Requests fed without their first tokens since the last call."""
        count, self.num_late = self.num_late, 0
        return count

    def context_start(self, req_id: str) -> int:
        """The position at which the head's context of a request begins."""
        return self._starts.get(req_id, 0)

    def follow(
        self,
        req_ids: list[str],
        tokens: AcceptedTokens,
        fed: Bools,  # [num_reqs] requests whose tokens the head will get in this step
    ) -> Bools:
        """Meet the step's requests: new ones with their prefix, and those that were preempted and start over.

        [num_reqs] whether the head's context of a request has begun by the end of the step; until then there is
        nothing to feed or keep.
        """
        first = tokens.first_positions.tolist()
        starting = {
            req_id
            for req_id, position in zip(req_ids, first, strict=True)
            if self._next.get(req_id) != position
        }
        if starting:
            self._meet(starting, req_ids, tokens, first, fed)
        for req_id, position, count in zip(req_ids, first, tokens.num_tokens.tolist(), strict=True):
            self._next[req_id] = position + count
        if not self._starts:
            return np.ones(len(req_ids), dtype=np.bool_)
        return np.array([self._next[req_id] > self.context_start(req_id) for req_id in req_ids])

    def _meet(
        self, starting: set[str], req_ids: list[str], tokens: AcceptedTokens, first: list[int], fed
    ) -> None:
        """Judges those who start by what the head will have seen after this step.

        vLLM hands out blocks as a prefix in the step that fills them. Whoever fills one begins before it, so requests
        are taken in the order of their first tokens.
        """
        ends = tokens.ends.tolist()
        blocks = host_blocks_of(tokens, self._block_size)
        for i in sorted(range(len(req_ids)), key=first.__getitem__):
            if req_ids[i] in starting:
                self._start_over(req_ids[i], first[i], tokens.block_table[i])
            own = blocks[ends[i] - int(tokens.num_tokens[i]) : ends[i]]
            unread = max(0, self.context_start(req_ids[i]) - first[i])
            self._seen_blocks[own] = bool(fed[i])
            self._seen_blocks[own[:unread]] = False

    def _start_over(self, req_id: str, position: int, blocks: torch.Tensor) -> None:
        self._let_go(req_id)
        self._starts.pop(req_id, None)
        num_blocks = -(-position // self._block_size)
        unseen = np.flatnonzero(~self._seen_blocks[blocks[:num_blocks].cpu().numpy()])
        if unseen.size:
            self._starts[req_id] = (int(unseen[-1]) + 1) * self._block_size

    def advance(
        self,
        req_ids: list[str],
        tokens: AcceptedTokens,  # of the step, every request
        feed: Bools,  # [num_reqs] requests whose tokens go to the head now
        keep: Bools,  # [num_reqs] others whose tokens are kept for later
    ) -> AcceptedTokens | None:
        """What the head must process for the requests to feed, their kept tokens first; None where there are none."""
        if not self._pending and not self._starts and feed.all():  # most steps
            self._mark(tokens, seen=True)
            return tokens
        ends = tokens.ends
        starts = ends - tokens.num_tokens
        fed = np.flatnonzero(feed)
        chosen = [req_ids[i] for i in fed]
        # First, as keeping others' tokens may push the oldest out.
        pieces = self._kept_of([r for r in chosen if r in self._pending])
        context_starts = np.array([self.context_start(r) for r in chosen])
        if not feed.all():
            self._skip(req_ids, tokens, starts, ends, feed, keep)
        if not chosen:
            return None
        nexts = np.array([self._next[r] for r in chosen])
        self._count_late(chosen)
        if pieces or not feed.all() or (nexts - tokens.num_tokens < context_starts).any():
            tokens = _gather(chosen, tokens, fed, starts, ends, pieces, nexts, context_starts)
        self._mark(tokens, seen=True)
        return with_context_starts(tokens, context_starts, self._block_size)

    def _skip(self, req_ids, tokens: AcceptedTokens, starts: Ints, ends: Ints, feed, keep) -> None:
        self._mark(tokens, seen=False, rows=np.repeat(~feed, tokens.num_tokens))
        kept = keep & ~feed
        if not kept.any():
            return
        rows = np.repeat(kept, tokens.num_tokens)
        counts = tokens.num_tokens[kept]
        first = np.cumsum(counts) - counts
        names = [req_ids[i] for i in np.flatnonzero(kept)]
        where = {
            name: (start, start + count)
            for name, start, count in zip(names, first.tolist(), counts.tolist(), strict=True)
        }
        for name, (start, stop) in where.items():
            self._pending[name] = self._pending.get(name, 0) + stop - start
        columns: Piece = tokens.token_ids, tokens.positions, tokens.features  # copies already
        if not kept.all():
            index = torch.from_numpy(rows)
            columns = tuple(column[index] for column in columns)
        record = _Kept(where, {name: self._next[name] for name in where}, *columns)
        self._kept.append(record)
        self._kept_bytes += record.features.nbytes
        while self._kept_bytes > self._max_bytes:
            self._forget(self._kept.popleft())

    def _count_late(self, req_ids: list[str]) -> None:
        new = self._starts.keys() & set(req_ids) - self._late
        self.num_late += len(new)
        self._late |= new

    def _forget(self, record: _Kept) -> None:
        """The head's context of the record's requests will begin in the block after it."""
        self._kept_bytes -= record.features.nbytes
        for req_id, (first, stop) in record.first_row.items():
            num_blocks = -(-record.nexts[req_id] // self._block_size)
            self._starts[req_id] = num_blocks * self._block_size
            self._pending[req_id] -= stop - first
            if not self._pending[req_id]:
                del self._pending[req_id]

    def _let_go(self, req_id: str) -> None:
        """Drops the kept tokens of a request."""
        if self._pending.pop(req_id, None) is not None:
            for record in self._kept:
                record.first_row.pop(req_id, None)
            self._drop_empty()

    def _kept_of(self, req_ids: list[str]) -> dict[str, list[Piece]]:
        """Takes the kept tokens of some requests out of the record."""
        pieces: dict[str, list[Piece]] = {}
        if not req_ids:
            return pieces
        for record in self._kept:
            for req_id in req_ids:
                span = record.first_row.pop(req_id, None)
                if span is not None:
                    rows = slice(*span)
                    piece = record.token_ids[rows], record.positions[rows], record.features[rows]
                    pieces.setdefault(req_id, []).append(piece)
        for req_id in req_ids:
            self._pending.pop(req_id, None)
        self._drop_empty()
        return pieces

    def _drop_empty(self) -> None:
        """Lets go of records without requests, and of the rows of others once they are the larger part."""
        self._kept = deque(record.closed_up() for record in self._kept if record.first_row)
        self._kept_bytes = sum(record.features.nbytes for record in self._kept)

    def _mark(self, tokens: AcceptedTokens, *, seen: bool, rows: Bools | None = None) -> None:
        blocks = host_blocks_of(tokens, self._block_size)
        self._seen_blocks[blocks if rows is None else blocks[rows]] = seen

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
        self._next.pop(req_id, None)
        self._starts.pop(req_id, None)
        self._late.discard(req_id)
        self._let_go(req_id)


def _gather(
    req_ids: list[str],
    tokens: AcceptedTokens,
    fed: Ints,  # [num_fed] places in the step
    starts: Ints,
    ends: Ints,
    pieces: dict[str, list[Piece]],
    nexts: Ints,  # [num_fed] position after each request's last token
    context_starts: Ints,  # [num_fed]
) -> AcceptedTokens:
    """The tokens of some requests of the step, each after its kept pieces, none from before its context starts."""
    parts: list[Piece] = []
    counts = []
    for req_id, place, end, begin in zip(req_ids, fed.tolist(), nexts, context_starts, strict=True):
        rows = slice(int(starts[place]), int(ends[place]))
        own = tokens.token_ids[rows], tokens.positions[rows], tokens.features[rows]
        mine = [*pieces.get(req_id, ()), own]
        count = sum(len(part[0]) for part in mine)
        skip = max(0, int(begin - (end - count)))
        counts.append(count - skip)
        for part in mine:
            parts.append(tuple(column[skip:] for column in part))
            skip = max(0, skip - len(part[0]))
    token_ids, positions, features = (torch.cat(column) for column in zip(*parts, strict=True))
    index = torch.from_numpy(fed)
    return AcceptedTokens(
        token_ids=token_ids,
        positions=positions,
        features=features,
        num_tokens=np.array(counts),
        next_token_ids=tokens.next_token_ids[index],
        block_table=tokens.block_table[index],
        context_starts=np.zeros_like(fed),
    )
