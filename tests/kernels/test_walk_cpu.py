# SPDX-License-Identifier: Apache-2.0
"""The walk in C++ against PyTorch, to the token. No tolerances: both pick indices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.cpu.walk import walk_cpu
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One request, root -> 1 -> 2 and root -> 3: parents of the root's row and of the nodes' rows.
PARENTS = torch.tensor([[-1, 0, 1, 0]])
TOKENS = torch.tensor([[4, 5, 6]])


def walks(logits: torch.Tensor, *rest) -> list[list]:
    got = walk_cpu(logits, *rest)
    for ours, truth in zip(got, reference.walk(logits, *rest), strict=True):
        assert torch.equal(ours, truth)
    return [values.tolist() for values in got]


def picking(tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits whose row i picks the i-th token."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 7).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.integers(1, 70),
    nodes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    levels=st.sampled_from([1, 2, 50]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(dtype, columns, nodes, levels, seed) -> None:
    """Random trees with few tokens, so that walks go deep; few levels of logits make ties likely."""
    generator = torch.Generator().manual_seed(seed)
    width, num_reqs = max(nodes), len(nodes)
    parents = torch.full((num_reqs, width + 1), -1)
    tokens = torch.full((num_reqs, width), -1)
    depths = torch.zeros((num_reqs, width + 1), dtype=torch.int64)
    for req, count in enumerate(nodes):
        for row in range(1, count + 1):
            parents[req, row] = torch.randint(0, row, (), generator=generator)
            depths[req, row] = depths[req, parents[req, row]] + 1
            tokens[req, row - 1] = torch.randint(0, min(columns, 4), (), generator=generator)
    starts = torch.tensor([0, *(count + 1 for count in nodes)]).cumsum(0)
    logits = torch.randint(-levels, 1, (int(starts[-1]), columns + 3), generator=generator)
    walks(logits.to(dtype)[:, :columns], starts[:-1], parents, tokens, int(depths.max()) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("picked", "rows", "emitted"),
    [
        ([4, 5, 0, 0], [0, 1, 2], [4, 5, 0]),  # all accepted
        ([6, 0, 0, 2], [0, 3, -1], [6, 2, -1]),  # the second branch
        ([4, 6, 0, 0], [0, 1, -1], [4, 6, -1]),  # a token that only the root's child carries
        ([5, 4, 0, 0], [0, -1, -1], [5, -1, -1]),  # all rejected
    ],
)
def test_by_hand(dtype, picked, rows, emitted) -> None:
    root = torch.zeros(1, dtype=torch.int64)
    got = walks(picking(picked, dtype), root, PARENTS, TOKENS, 3)
    assert got == [[rows], [emitted], [sum(row >= 0 for row in rows)]]


def test_empty_trees_and_no_request() -> None:
    none = torch.empty((2, 0), dtype=torch.int64)
    got = walks(picking([3, 1]), torch.tensor([1, 0]), torch.full((2, 1), -1), none, 1)
    assert got == [[[0], [0]], [[1], [3]], [1, 1]]
    got = walks(picking([3]), none[0], torch.empty((0, 1), dtype=torch.int64), none[:0], 1)
    assert got == [[], [], []]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_ties(dtype) -> None:
    """NaN is the largest and such a row picks its column; rows that are not visited may hold anything."""
    root = torch.zeros(1, dtype=torch.int64)
    logits = torch.full((4, 7), -math.inf, dtype=dtype)
    logits[0, 4] = logits[0, 5] = 1.0  # the first of equals
    logits[1, 5] = math.nan
    logits[3] = math.nan
    assert walks(logits, root, PARENTS, TOKENS, 3)[1] == [[4, 5, 0]]
    logits[0] = -math.inf
    assert walks(logits, root, PARENTS, TOKENS, 3)[1] == [[0, -1, -1]]


def test_more_room_than_depth() -> None:
    root = torch.zeros(1, dtype=torch.int64)
    assert walks(picking([4, 5, 1, 0]), root, PARENTS, TOKENS, 6)[2] == [3]


def sampled(
    logits: torch.Tensor,
    temperature: float,
    seeds: torch.Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """[num_rows] what the kernel draws from each row, each a request without a tree; as the reference does."""
    num_reqs = logits.shape[0]
    empty = torch.full((num_reqs, 1), -1), torch.empty((num_reqs, 0), dtype=torch.int64)
    filters = (
        None if top_k is None else torch.full((num_reqs,), top_k, dtype=torch.int32),
        None if top_p is None else torch.full((num_reqs,), top_p),
    )
    temperatures = torch.full((num_reqs,), temperature)
    _, emitted, _ = walks(
        logits, torch.arange(num_reqs), *empty, 1, temperatures, seeds[:, None], *filters
    )
    return torch.tensor(emitted)[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.sampled_from([1, 2, 127, 128, 129, 300, 1000]),
    temperature=st.sampled_from([1e-4, 0.01, 0.3, 1.0, 1.7, 50.0]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_samples_equal_the_reference(dtype, columns, temperature, spread, absent, seed) -> None:
    """Flat and peaked rows, with and without tokens of logit -inf, whole vectors of tokens and rests."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn((5, columns), generator=generator)
    logits[torch.rand((5, columns), generator=generator) < absent] = -math.inf
    logits[0] = spread * torch.randn(columns, generator=generator)
    seeds = torch.randint(0, 2**31, (5,), generator=generator)
    sampled(logits.to(dtype), temperature, seeds)


def test_a_walk_draws_a_seed_a_depth_and_greedy_requests_none() -> None:
    """Two requests with the same tree, logits and seeds; the second is greedy."""
    generator = torch.Generator().manual_seed(0)
    twice = (
        torch.tensor([0, 0]),
        PARENTS.expand(2, 4).contiguous(),
        TOKENS.expand(2, 3).contiguous(),
    )
    temperatures = torch.tensor([1.0, 0.0])
    lengths = set()
    for _ in range(200):
        logits = torch.randn((4, 7), generator=generator)
        logits[0, 4] += 2.0
        seeds = torch.randint(0, 2**31, (1, 3), generator=generator).expand(2, 3).contiguous()
        rows, emitted, num_emitted = walks(logits, *twice, 3, temperatures, seeds)
        assert emitted[1][0] == int(logits[0].argmax())
        lengths.add(num_emitted[0])
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_follow_the_softmax(dtype) -> None:
    """Chi-square over 40,000 seeds: 29 degrees of freedom stay below 70 with probability 1 - 3e-5 (seeds are fixed)."""
    logits = torch.linspace(-3.0, 3.0, 30).to(dtype)
    draws = 40_000
    got = sampled(logits.expand(draws, 30).contiguous(), 1.3, torch.arange(draws) * 7919)
    expected = (logits.float() / 1.3).softmax(0) * draws
    counts = torch.bincount(got, minlength=30)
    assert ((counts - expected) ** 2 / expected).sum() < 70.0


def test_more_draws_than_columns_reach_every_token_of_a_flat_row() -> None:
    got = sampled(torch.zeros((3000, 130)), 1.0, torch.arange(3000))
    assert got.unique().numel() == 130


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.sampled_from([1, 2, 63, 64, 65, 300, 1000]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    spread=st.sampled_from([0.0, 1.0, 8.0, 60.0]),
    absent=st.sampled_from([0.0, 0.5]),
    # A share at which no sum of equal probabilities ends.
    top_p=st.sampled_from([None, 1.0, 0.99937, 0.90731, 0.3713, 1e-6]),
    top_k=st.sampled_from([None, 1, 2, 20, 64, 1000]),
    seed=st.integers(0, 2**31),
)
def test_the_best_tokens_equal_the_reference(
    dtype, columns, temperature, spread, absent, top_p, top_k, seed
) -> None:
    """Ties at the edge (flat rows, 16-bit logits), tokens of logit -inf, more asked for than there are."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn((6, columns), generator=generator)
    logits[torch.rand((6, columns), generator=generator) < absent] = -math.inf
    logits[0] = spread * torch.randn(columns, generator=generator)
    seeds = torch.randint(0, 2**31, (6,), generator=generator)
    sampled(logits.to(dtype), temperature, seeds, top_k and min(top_k, columns), top_p)


def test_only_the_best_tokens_are_drawn() -> None:
    """Of probabilities 0.4, 0.3, 0.2, 0.1: the first two at top-p 0.6, all that equal the third at top-k 3."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(500, 4).contiguous()
    seeds = torch.arange(500)
    assert sampled(logits, 1.0, seeds, top_p=0.6).unique().tolist() == [1, 3]
    assert sampled(logits, 1.0, seeds, top_k=3).unique().tolist() == [1, 2, 3]
    assert sampled(logits, 1.0, seeds, top_k=3, top_p=0.7).unique().tolist() == [1, 3]
    assert sampled(torch.zeros((500, 4)), 1.0, seeds, top_k=2).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("filters", [(None, None), (2, None), (None, 0.5)])
def test_rows_that_are_no_distribution_do_no_harm(filters) -> None:
    """NaN, infinity, nothing at all: some token of the vocabulary, and the next request's is right."""
    logits = torch.zeros((5, 100))
    logits[0, 7] = math.nan
    logits[1, :] = math.nan
    logits[2, 50] = math.inf
    logits[3, :] = -math.inf
    logits[4, 33] = 90.0
    empty = torch.full((5, 1), -1), torch.empty((5, 0), dtype=torch.int64)
    given_filters = (
        filters[0] and torch.full((5,), filters[0], dtype=torch.int32),
        filters[1] and torch.full((5,), filters[1]),
    )
    ones, seeds = torch.ones(5), torch.arange(5)[:, None]
    got = walk_cpu(logits, torch.arange(5), *empty, 1, ones, seeds, *given_filters)[1][:, 0]
    assert ((got >= 0) & (got < 100)).all()
    assert got[2:].tolist() == [50, 0, 33]
