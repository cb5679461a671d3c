# SPDX-License-Identifier: Apache-2.0
"""The CPU tree attention op against the float64 reference, and against vLLM's op for chains."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cpu_tree_attention_checks import check_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.cpu.tree_attention import (
    LayerPages,
    TreeAttentionInputs,
    TreeRows,
    tree_attention_cpu,
)
from heterospec_vllm.kernels.reference import cpu as reference

# rtol: one unit in the last place of the output. atol: values are below 4 here; bfloat16 also
# rounds the softmax weights to 2^-9 (half a unit) before they meet the values, float16 rounds only
# the output, float32 sums some thousand terms in another order than the reference.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
NAN = math.nan


@dataclass(frozen=True)
class Model:
    group: int = 3  # query heads a KV head
    num_kv_heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    block_size: int = 32


@dataclass(frozen=True)
class Request:
    context: int
    parents: tuple[int, ...]  # of each row; -1: the row is a root


@dataclass
class Inputs(TreeAttentionInputs):
    output: torch.Tensor

    def put(self, field: str, value: Any) -> None:
        """Sets a field of this record or of one of its two."""
        for part in ("pages", "rows"):
            if hasattr(getattr(self, part), field):
                return setattr(self, part, replace(getattr(self, part), **{field: value}))
        return setattr(self, field, value)

    def expected(self) -> torch.Tensor:
        output = torch.zeros_like(self.output)
        reference.tree_attention(self, output)
        return output

    def run(self, num_threads: int = 0) -> torch.Tensor:
        check_inputs(self, self.output)
        self.output.fill_(NAN)
        self.put("num_threads", num_threads)
        tree_attention_cpu(self, self.output)
        return self.output

    def key(self, req: int, slot: int) -> torch.Tensor:
        """A view of one stored key, [num_kv_heads, head_size]."""
        block_size, head_size = self.pages.key_cache.shape[2:]
        block = self.pages.key_cache[int(self.rows.block_table[req, slot // block_size])]
        return block.view(-1, head_size, block_size)[:, :, slot % block_size]

    def value(self, req: int, slot: int) -> torch.Tensor:
        block_size = self.pages.value_cache.shape[2]
        block = self.pages.value_cache[int(self.rows.block_table[req, slot // block_size])]
        return block[:, slot % block_size]


def chain(rows: int) -> tuple[int, ...]:
    return tuple(range(-1, rows - 1))


def star(rows: int) -> tuple[int, ...]:
    return (-1, *(0 for _ in range(rows - 1)))


def random_tree(rows: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(row) if row else -1 for row in range(rows))


def ancestor_masks(parents: tuple[int, ...]) -> list[int]:
    masks: list[int] = []
    for row, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << row)
    return [mask - 2**64 if mask >= 2**63 else mask for mask in masks]  # as int64


def build(model: Model, requests: list[Request], seed: int = 0) -> Inputs:
    """Random inputs; every slot that no request has filled holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).clamp_(-3.9, 3.9).to(model.dtype)

    lens = [request.context + len(request.parents) for request in requests]
    counts = [-(-length // model.block_size) for length in lens]
    num_blocks = sum(counts) + 2
    shape = (num_blocks, model.num_kv_heads, 2 * model.block_size, model.head_size)
    cache = torch.full(shape, NAN, dtype=model.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    # Unused entries name no block: reading through one would crash or fetch garbage.
    wide_table = torch.full((len(requests), max(counts, default=0) + 3), -(2**20)).int()
    table = wide_table[:, : max(counts, default=0)]
    for req, count in enumerate(counts):
        table[req, :count] = order[sum(counts[:req]) : sum(counts[:req]) + count]
    num_heads = model.num_kv_heads * model.group
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + len(request.parents))
    masks = [mask for request in requests for mask in ancestor_masks(request.parents)]
    inputs = Inputs(
        pages=LayerPages(key_cache, value_cache, num_heads, model.head_size**-0.5),
        rows=TreeRows(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_table=table,
            ancestor_mask=torch.tensor(masks, dtype=torch.int64),
        ),
        query=randn(starts[-1], num_heads, model.head_size),
        output=torch.full((starts[-1], num_heads, model.head_size), NAN, dtype=model.dtype),
    )
    for req, length in enumerate(lens):
        keys, values = (randn(length, model.num_kv_heads, model.head_size) for _ in range(2))
        for index, block in enumerate(table[req, : counts[req]].tolist()):
            part = slice(index * model.block_size, (index + 1) * model.block_size)
            size = len(keys[part])
            by_dim = key_cache[block].view(model.num_kv_heads, model.head_size, model.block_size)
            by_dim[:, :, :size] = keys[part].permute(1, 2, 0)
            value_cache[block, :, :size] = values[part].transpose(0, 1)
    return inputs


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


def assert_matches(inputs: Inputs, num_threads: int = 2) -> None:
    expected = inputs.expected()
    assert expected.isfinite().all()
    assert_near(inputs.run(num_threads), expected)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The reference's many small operations are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def variant(cpu_build: str) -> str:
    """Every test runs each build of the library."""
    return cpu_build


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_ragged_batch(dtype: torch.dtype, head_size: int, group: int) -> None:
    requests = [
        Request(context, random_tree(rows, seed=rows))
        for context, rows in [(0, 1), (1, 7), (31, 2), (32, 5), (33, 12), (127, 3), (300, 9)]
    ]
    model = Model(group=group, head_size=head_size, dtype=dtype)
    assert_matches(build(model, requests))


@pytest.mark.parametrize("block_size", [16, 32, 48, 128, 144, 256])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    requests = [
        Request(block_size - 1, random_tree(20, 1)),
        Request(block_size, random_tree(20, 2)),
        Request(3 * block_size + 5, random_tree(20, 3)),
    ]
    assert_matches(build(Model(dtype=dtype, block_size=block_size), requests))


@pytest.mark.parametrize("head_size", [32, 160, 192, 224, 256])
def test_other_head_sizes(head_size: int) -> None:
    assert_matches(build(Model(head_size=head_size), [Request(70, random_tree(6, 1))]))


@pytest.mark.parametrize("context", [0, 1, 63, 64, 65, 127, 128, 129, 2999])
@pytest.mark.parametrize(
    "parents",
    [chain(1), chain(2), chain(64), star(2), star(64), random_tree(64, 5), (-1,) * 5],
    ids=["single", "chain2", "chain64", "star2", "star64", "tree64", "forest"],
)
def test_tree_shapes(parents: tuple[int, ...], context: int) -> None:
    model = Model(group=1, num_kv_heads=1, dtype=torch.bfloat16, block_size=128)
    assert_matches(build(model, [Request(context, parents)]))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 8]),
    dtype=st.sampled_from(list(TOLERANCES)),
    block_size=st.sampled_from([16, 32, 64, 128]),
    sizes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 64)), max_size=5),
    num_threads=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_random_batches(
    group: int,
    dtype: torch.dtype,
    block_size: int,
    sizes: list[tuple[int, int]],
    num_threads: int,
    seed: int,
) -> None:
    model = Model(group=group, num_kv_heads=1, dtype=dtype, block_size=block_size)
    requests = [Request(context, random_tree(rows, seed)) for context, rows in sizes]
    assert_matches(build(model, requests, seed), num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_work_is_cut_anywhere(num_threads: int) -> None:
    """Long contexts of one KV head: most threads get a middle part of a sequence."""
    model = Model(group=4, num_kv_heads=1, block_size=64)
    requests = [Request(3000, random_tree(8, 1)), Request(10, chain(2)), Request(1500, star(5))]
    assert_matches(build(model, requests), num_threads)


def test_no_requests() -> None:
    assert build(Model(), []).run().shape[0] == 0


def test_request_without_rows() -> None:
    assert_matches(build(Model(), [Request(9, ()), Request(40, chain(3)), Request(0, ())]))


def test_row_that_nobody_sees_may_hold_nan() -> None:
    """A NaN key and value reaches exactly the rows that see it."""
    inputs = build(Model(), [Request(37, (-1, 0, 0, 1, 2))])
    expected = inputs.expected()
    inputs.key(0, 37 + 1).fill_(NAN)
    inputs.value(0, 37 + 1).fill_(math.inf)
    output = inputs.run()
    unaffected = [0, 2, 4]
    assert_near(output[unaffected], expected[unaffected])
    assert output[[1, 3]].isnan().all()


def test_rows_of_a_fused_projection() -> None:
    inputs = build(Model(), [Request(50, random_tree(6, 1))])
    num_tokens, num_heads, head_size = inputs.query.shape
    fused = torch.full((num_tokens, num_heads + 4, head_size), NAN)
    fused[:, :num_heads] = inputs.query
    inputs.query = fused[:, :num_heads]
    wide = torch.full((num_tokens, num_heads + 1, head_size), NAN)
    inputs.output = wide[:, 1:]
    assert_matches(inputs)
    assert wide[:, 0].isnan().all()


def test_ties_give_the_mean() -> None:
    inputs = build(Model(), [Request(5, chain(3))])
    for slot in range(8):
        inputs.key(0, slot).copy_(inputs.key(0, 0))
    for row, output in enumerate(inputs.run()):
        mean = torch.stack([inputs.value(0, slot) for slot in range(6 + row)]).mean(0)
        torch.testing.assert_close(output.view(2, 3, -1)[:, 0], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores of some thousands: each row's weight is on one key, so the output is its value."""
    inputs = build(Model(dtype=dtype), [Request(200, chain(4))])
    inputs.query.mul_(64)
    inputs.put("scale", 4.0)
    assert_matches(inputs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_chain_equals_vllm(dtype: torch.dtype, group: int) -> None:
    """vLLM writes the pages and attends causally; both ops read the same memory."""
    ops = pytest.importorskip("vllm._custom_ops")
    rows, context, block_size, num_kv_heads, head_size = 6, 150, 128, 2, 64
    length, num_heads = context + rows, group * num_kv_heads
    inputs = build(
        Model(group, num_kv_heads, head_size, dtype, block_size), [Request(context, chain(rows))]
    )
    pages, attending = inputs.pages, inputs.rows
    pages.key_cache.fill_(NAN)
    pages.value_cache.fill_(NAN)
    keys, values = (torch.randn(length, num_kv_heads, head_size).to(dtype) for _ in range(2))
    slots = torch.arange(length)
    slots = attending.block_table[0].long()[slots // block_size] * block_size + slots % block_size
    ops.cpu_attn_reshape_and_cache(keys, values, pages.key_cache, pages.value_cache, slots, "vec")
    torch.testing.assert_close(inputs.key(0, context + 1), keys[context + 1], rtol=0, atol=0)
    torch.testing.assert_close(inputs.value(0, 130), values[130], rtol=0, atol=0)
    for cache in (pages.key_cache, pages.value_cache):  # vLLM's op multiplies stale slots by 0
        cache.nan_to_num_(0.0)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=attending.seq_lens,
        dtype=dtype,
        query_start_loc=attending.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
    )
    expected = torch.empty_like(inputs.output)
    ops.cpu_attention_with_kv_cache(
        inputs.query,
        pages.key_cache,
        pages.value_cache,
        expected,
        attending.query_start_loc,
        attending.seq_lens,
        pages.scale,
        True,
        None,
        -1,
        attending.block_table,
        0.0,
        metadata,
        None,
    )
    assert_near(inputs.run(), expected)


@pytest.mark.parametrize(
    ("field", "broken", "message"),
    [
        ("query", lambda x: x.query.double(), "query.dtype is torch.float64"),
        ("query", lambda x: x.query.transpose(1, 2), r"query.stride\(-1\)"),
        ("key_cache", lambda x: x.pages.key_cache.half(), "key_cache.dtype is torch.float16"),
        ("value_cache", lambda x: x.pages.value_cache.clone()[:, :, ::2], "value_cache is"),
        ("output", lambda x: x.output[:1], "output.shape is"),
        (
            "query_start_loc",
            lambda x: x.rows.query_start_loc.long(),
            "query_start_loc is torch.int64",
        ),
        ("seq_lens", lambda x: x.rows.seq_lens + 1000, r"seq_lens\[0\] is 1043, allowed: 3..64"),
        ("block_table", lambda x: x.rows.block_table + 999, r"block_table\[0\] is"),
        ("block_table", lambda x: x.rows.block_table.long(), "block_table is torch.int64"),
        ("ancestor_mask", lambda x: x.rows.ancestor_mask * 0, r"ancestor_mask\[0\] is 0b0"),
        ("ancestor_mask", lambda x: x.rows.ancestor_mask + 8, r"ancestor_mask\[0\] is 0b1001"),
        ("scale", lambda x: 0.0, "scale is 0.0, allowed: > 0"),
    ],
)
def test_check_inputs_names_the_field(field: str, broken, message: str) -> None:
    inputs = build(Model(), [Request(40, chain(3))])
    check_inputs(inputs, inputs.output)
    inputs.put(field, broken(inputs))
    with pytest.raises(ValueError, match=message):
        check_inputs(inputs, inputs.output)
