# SPDX-License-Identifier: Apache-2.0
"""What the draft head has seen of each request, and the tap states of what it has not.

While nothing is drafted the head does not run. The tokens that pass it by are kept with their tap states, and one
batched pass brings the head up to date when drafting resumes. The memory is bounded: requests whose oldest kept tokens
had to go can never catch up and decode plainly to their end.

The same record answers whether a prefix-cache hit can be used: a block that was filled without the head is marked, and
a request that starts on such a block decodes plainly.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from heterospec_vllm.policy import Bools
from heterospec_vllm.tree import Ints
from heterospec_vllm.true_tokens import TrueTokens, blocks_of

UNSEEN_PREFIX = "prefix_unseen_by_head"
SKIPPED_TOO_LONG = "skipped_too_long"
MAX_KEPT_BYTES = 256 * 2**20


@dataclass
class _Kept:
    """The tokens of one step that passed the head by."""

    first_row: dict[str, tuple[int, int]]  # request -> rows [start, stop)
    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    features: torch.Tensor  # [num_tokens, num_taps * hidden_size]

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
        return _Kept(where, self.token_ids[index], self.positions[index], self.features[index])


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
        self._lost: dict[str, str] = {}  # requests that cannot be followed, and why

    def pending(self, req_id: str) -> int:
        """Tokens that the head has to catch up on before it can draft for a request."""
        return self._pending.get(req_id, 0)

    def lost(self, req_id: str) -> str | None:
        """Why the head cannot follow a request any more, or None."""
        return self._lost.get(req_id)

    def follow(
        self,
        req_ids: list[str],
        tokens: TrueTokens,
        fed: Bools,  # [num_reqs] requests whose tokens the head will get in this step, if it can follow them
    ) -> None:
        """Meet the step's requests: new ones with their prefix, and those that were preempted and start over."""
        ends = np.cumsum(tokens.num_tokens)
        first = tokens.positions.cpu().numpy()[ends - tokens.num_tokens].tolist()
        starting = {
            req_id
            for req_id, position in zip(req_ids, first, strict=True)
            if self._next.get(req_id) != position and req_id not in self._lost
        }
        if starting:
            self._meet(starting, req_ids, tokens, first, fed)
        for req_id, position, count in zip(req_ids, first, tokens.num_tokens.tolist(), strict=True):
            self._next[req_id] = position + count

    def _meet(
        self, starting: set[str], req_ids: list[str], tokens: TrueTokens, first: list[int], fed
    ) -> None:
        """Judges those who start by what the head will have seen after this step.

        vLLM hands out blocks as a prefix in the step that fills them. Whoever fills one begins before it, so requests
        are taken in the order of their first tokens.
        """
        ends = np.cumsum(tokens.num_tokens).tolist()
        blocks = blocks_of(tokens, self._block_size).cpu().numpy()
        for i in sorted(range(len(req_ids)), key=first.__getitem__):
            if req_ids[i] in starting:
                self._start_over(req_ids[i], first[i], tokens.block_table[i])
            own = blocks[ends[i] - int(tokens.num_tokens[i]) : ends[i]]
            self._seen_blocks[own] = bool(fed[i]) and req_ids[i] not in self._lost

    def _start_over(self, req_id: str, position: int, blocks: torch.Tensor) -> None:
        self._let_go(req_id)
        num_blocks = -(-position // self._block_size)
        prefix = blocks[:num_blocks].cpu().numpy()
        if not self._seen_blocks[prefix].all():
            self._lost[req_id] = UNSEEN_PREFIX

    def advance(
        self,
        req_ids: list[str],
        tokens: TrueTokens,  # of the step, every request
        feed: Bools,  # [num_reqs] requests whose tokens go to the head now
        keep: Bools,  # [num_reqs] others whose tokens are kept for later
    ) -> TrueTokens | None:
        """What the head must process for the requests to feed, their kept tokens first; None where there are none."""
        ends = np.cumsum(tokens.num_tokens)
        starts = ends - tokens.num_tokens
        fed = np.flatnonzero(feed)
        chosen = [req_ids[i] for i in fed]
        # First, as keeping others' tokens may push the oldest out.
        pieces = self._kept_of([r for r in chosen if r in self._pending])
        if not feed.all():
            self._skip(req_ids, tokens, starts, ends, feed, keep)
        if not chosen:
            return None
        if pieces or not feed.all():
            tokens = _gather(chosen, tokens, fed, starts, ends, pieces)
        self._mark(tokens, seen=True)
        return tokens

    def _skip(self, req_ids, tokens: TrueTokens, starts: Ints, ends: Ints, feed, keep) -> None:
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
        if kept.all():  # the step's own tensors are copies already
            record = _Kept(where, tokens.token_ids, tokens.positions, tokens.features)
        else:
            index = torch.from_numpy(rows)
            record = _Kept(
                where, tokens.token_ids[index], tokens.positions[index], tokens.features[index]
            )
        self._kept.append(record)
        self._kept_bytes += record.features.nbytes
        while self._kept_bytes > self._max_bytes:
            self._forget(self._kept.popleft())

    def _forget(self, record: _Kept) -> None:
        self._kept_bytes -= record.features.nbytes
        for req_id in record.first_row:
            self._lost[req_id] = SKIPPED_TOO_LONG
            self._let_go(req_id)

    def _let_go(self, req_id: str) -> None:
        """Drops the kept tokens of a request."""
        if self._pending.pop(req_id, None) is not None:
            for record in self._kept:
                record.first_row.pop(req_id, None)
            self._drop_empty()

    def _kept_of(
        self, req_ids: list[str]
    ) -> dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Takes the kept tokens of some requests out of the record."""
        pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
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

    def _mark(self, tokens: TrueTokens, *, seen: bool, rows: Bools | None = None) -> None:
        blocks = blocks_of(tokens, self._block_size).cpu().numpy()
        self._seen_blocks[blocks if rows is None else blocks[rows]] = seen

    def remove(self, req_id: str) -> None:
        """A request has left the engine."""
        self._next.pop(req_id, None)
        self._lost.pop(req_id, None)
        self._let_go(req_id)


def _gather(
    req_ids: list[str],
    tokens: TrueTokens,
    fed: Ints,  # [num_fed] places in the step
    starts: Ints,
    ends: Ints,
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
) -> TrueTokens:
    """The tokens of some requests of the step, each after its kept pieces."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    counts = []
    for req_id, place in zip(req_ids, fed.tolist(), strict=True):
        rows = slice(int(starts[place]), int(ends[place]))
        own = tokens.token_ids[rows], tokens.positions[rows], tokens.features[rows]
        mine = [*pieces.get(req_id, ()), own]
        parts += mine
        counts.append(sum(len(part[0]) for part in mine))
    token_ids, positions, features = (torch.cat(column) for column in zip(*parts, strict=True))
    index = torch.from_numpy(fed)
    return TrueTokens(
        token_ids=token_ids,
        positions=positions,
        features=features,
        num_tokens=np.array(counts),
        next_token_ids=tokens.next_token_ids[index],
        block_table=tokens.block_table[index],
    )
