# SPDX-License-Identifier: Apache-2.0
"""How V2's drafter lays the expanded nodes of all levels behind their requests: against a walk along the parents."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heterospec_vllm.draft.eagle_v2 import rows_by_request


@st.composite
def expansions(draw):
    """(levels as the drafter grows them, number of requests): a node's parent is one of the level before."""
    num_reqs = draw(st.integers(1, 4))
    levels, total = [], 0
    frontier = [(req, []) for req in range(num_reqs)]
    for _ in range(draw(st.integers(1, 4))):
        chosen = [
            parent for parent in frontier for _ in range(draw(st.integers(0, 2 if levels else 3)))
        ]
        if not chosen:
            break
        rows = [(req, [*tail, total + i]) for i, (req, tail) in enumerate(chosen)]
        total += len(rows)
        tails = np.array([tail for _, tail in rows])
        levels.append((np.array([req for req, _ in rows]), tails))
        frontier = rows
    return levels, num_reqs


@given(expansions())
def test_rows_by_request(grown) -> None:
    levels, num_reqs = grown
    if not levels:
        return
    rows = rows_by_request(levels, num_reqs)
    owner = [int(req) for reqs, _ in levels for req in reqs]
    ancestors = [set(tail.tolist()) for _, tails in levels for tail in tails]
    assert sorted(rows.order.tolist()) == list(range(len(owner)))
    assert (rows.place[rows.order] == np.arange(len(owner))).all()
    assert rows.counts.tolist() == [owner.count(req) for req in range(num_reqs)]
    start = 0
    for req, count in enumerate(rows.counts.tolist()):
        local = rows.order[start : start + count].tolist()
        for i, row in enumerate(local):
            assert owner[row] == rows.reqs[start + i] == req
            seen = {local[j] for j in range(count) if int(rows.ancestor_mask[start + i]) >> j & 1}
            assert seen == ancestors[row]
            assert rows.levels[start + i] == len(ancestors[row])
        start += count
    causal = all(
        int(rows.ancestor_mask[i]) == 2 ** (i - first + 1) - 1
        for first, count in zip(np.cumsum(rows.counts) - rows.counts, rows.counts, strict=True)
        for i in range(first, first + count)
    )
    assert rows.is_chain == causal


def test_sixty_four_rows_fit_the_mask() -> None:
    levels = [(np.array([0]), np.arange(depth + 1)[None]) for depth in range(64)]
    rows = rows_by_request(levels, 1)
    assert rows.is_chain
    assert rows.ancestor_mask[-1] == -1
