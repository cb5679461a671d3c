# SPDX-License-Identifier: Apache-2.0
"""Inputs of the tree attention tests: models, requests, paged caches full of NaN, and the comparison."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from heterospec_vllm.kernels.gpu.tree_attention import tree_attention
from heterospec_vllm.kernels.gpu.tree_attention_plan import TreeAttentionPlan
from heterospec_vllm.kernels.reference.tree_attention import tree_attention_reference

# rtol: one unit in the last place of the output (the interpreter truncates, a GPU rounds). atol: values are below 4
# here; on a GPU bfloat16 and float16 also round each softmax weight by half a unit before it meets the values, float32
# sums some thousand terms in another order than the reference.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
NAN = math.nan
TENSORS = (
    "query",
    "key_cache",
    "value_cache",
    "query_start_loc",
    "seq_lens",
    "block_table",
    "ancestor_mask",
)


@dataclass(frozen=True)
class Model:
    group: int = 2  # query heads a KV head
    num_kv_heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    block_size: int = 16
    # Memory order of (block, kv_head, slot, K and V features side by side).
    memory_order: tuple[int, int, int, int] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Request:
    context: int
    parents: tuple[int, ...]  # of each row; -1: the row is a root


@dataclass
class Inputs:
    """One call's tensors; `expected` and `run` use the same ones."""

    model: Model
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    ancestor_mask: torch.Tensor
    plan: TreeAttentionPlan
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TENSORS} | {"scale": self.scale}

    @property
    def scale(self) -> float:
        return self.model.head_size**-0.5

    def poisoned_output(self) -> torch.Tensor:
        return torch.full_like(self.query, NAN)

    def expected(self) -> torch.Tensor:
        output = self.poisoned_output()
        tree_attention_reference(output=output, **self.tensors(), **self.options)
        return output

    def run(self) -> torch.Tensor:
        output = self.poisoned_output()
        workspace = self.plan.workspace(self.query.shape[0], self.query.device)
        if workspace is not None:
            workspace.partial.fill_(NAN)
            workspace.lse.fill_(NAN)
        options = {"workspace": workspace, **self.options}
        tree_attention(output=output, plan=self.plan, **self.tensors(), **options)
        return output

    def slot(self, cache: torch.Tensor, req: int, slot: int) -> torch.Tensor:
        """A view of one stored key or value, [num_kv_heads, head_size]."""
        block_size = self.model.block_size
        return cache[int(self.block_table[req, slot // block_size]), :, slot % block_size]


def chain(rows: int) -> tuple[int, ...]:
    return tuple(range(-1, rows - 1))


def star(rows: int) -> tuple[int, ...]:
    return (-1, *(0 for _ in range(rows - 1)))


def random_tree(rows: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(row) if row else -1 for row in range(rows))


def ancestor_masks(parents: tuple[int, ...]) -> list[int]:
    masks: list[int] = []
    for row, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << row)
    return [mask - 2**64 if mask >= 2**63 else mask for mask in masks]  # as int64


def empty_caches(
    model: Model, num_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value views [num_blocks, num_kv_heads, block_size, head_size] of one fused cache full of NaN."""
    logical = (num_blocks, model.num_kv_heads, model.block_size, 2 * model.head_size)
    stored = torch.full([logical[axis] for axis in model.memory_order], NAN, device=device)
    stored = stored.to(model.kv_dtype or model.dtype)
    inverse = [model.memory_order.index(axis) for axis in range(4)]
    keys, values = stored.permute(inverse).split(model.head_size, dim=3)
    return keys, values


def build(
    device: torch.device,
    model: Model,
    requests: list[Request],
    *,
    seed: int = 0,
    num_splits: int = 1,
    max_rows: int | None = None,
    **options: Any,
) -> Inputs:
    """Random inputs; every slot that no request has filled holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).clamp_(-3.9, 3.9).to(model.dtype)

    lens = [request.context + len(request.parents) for request in requests]
    counts = [-(-length // model.block_size) for length in lens]
    num_blocks = sum(counts) + 2
    key_cache, value_cache = empty_caches(model, num_blocks, device)
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    # Unused entries name no block: reading through one would crash or fetch garbage.
    wide_table = torch.full((len(requests), max(counts, default=0) + 3), -(2**30)).int()
    table = wide_table[:, : max(counts, default=0)]
    for req, length in enumerate(lens):
        at = slice(sum(counts[:req]), sum(counts[: req + 1]))
        table[req, : counts[req]] = order[at]
        for cache in (key_cache, value_cache):
            rows = randn(length, model.num_kv_heads, model.head_size).to(cache.dtype)
            for index, block in enumerate(order[at].tolist()):
                part = rows[index * model.block_size : (index + 1) * model.block_size]
                cache[block, :, : len(part)] = part.transpose(0, 1).to(device)
    sizes = [len(request.parents) for request in requests]
    starts = [sum(sizes[:req]) for req in range(len(sizes) + 1)]
    masks = [mask for request in requests for mask in ancestor_masks(request.parents)]
    num_heads = model.num_kv_heads * model.group
    plan = TreeAttentionPlan.of(
        num_reqs=len(requests),
        max_rows=max_rows or max(sizes, default=1) or 1,
        max_seq_len=max(lens, default=1),
        num_heads=num_heads,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        block_size=model.block_size,
        dtype=model.dtype,
        device=device,
        num_splits=num_splits,
    )
    return Inputs(
        model=model,
        query=randn(starts[-1], num_heads, model.head_size).to(device),
        key_cache=key_cache,
        value_cache=value_cache,
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_table=wide_table.to(device)[:, : table.shape[1]],
        ancestor_mask=torch.tensor(masks, dtype=torch.int64, device=device),
        plan=plan,
        options=options,
    )


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: dict[str, float] | None = None
) -> None:
    tolerance = tolerance or TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, **tolerance)


def assert_matches(inputs: Inputs, tolerance: dict[str, float] | None = None) -> None:
    expected = inputs.expected()
    assert expected.isfinite().all()
    assert_near(inputs.run(), expected, tolerance)


RAGGED = [
    Request(context, random_tree(rows, seed=rows))
    for context, rows in [(0, 1), (1, 7), (15, 2), (16, 5), (17, 12), (70, 3)]
]
