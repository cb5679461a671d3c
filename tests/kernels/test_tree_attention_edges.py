# SPDX-License-Identifier: Apache-2.0
"""What tree attention must leave alone, and what it refuses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tree_attention_inputs import (
    NAN,
    RAGGED,
    Model,
    Request,
    ancestor_masks,
    assert_matches,
    assert_near,
    build,
    chain,
    random_tree,
    star,
)

from heterospec_vllm.kernels.gpu import tree_attention as launcher
from heterospec_vllm.kernels.gpu.tree_attention import tree_attention
from heterospec_vllm.kernels.gpu.tree_attention_plan import (
    FP8,
    TreeAttentionPlan,
    splits_for,
    unsupported_reason,
)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_broken_row_reaches_those_who_see_it_only(
    device: torch.device, bad: float, where: str, num_splits: int
) -> None:
    """A draft token whose key or value overflowed must not touch the accepted path beside it."""
    request = Request(37, (-1, 0, 0, 1, 2))
    inputs = build(device, Model(), [request], num_splits=num_splits)
    expected = inputs.expected()
    if where in ("key", "both"):
        inputs.slot(inputs.key_cache, 0, 37 + 1).fill_(bad)
    if where in ("value", "both"):
        inputs.slot(inputs.value_cache, 0, 37 + 1).fill_(bad)
    output = inputs.run()
    unaffected = [0, 2, 4]
    assert_near(output[unaffected], expected[unaffected])
    if where != "key" or math.isnan(bad):
        assert output[[1, 3]].isnan().all()


def test_rows_beyond_the_requests_are_untouched(device: torch.device) -> None:
    """Padding of a captured graph: rows of no request, and requests without rows at the end."""
    inputs = build(device, Model(), RAGGED[:3], num_splits=2)
    expected, num_rows = inputs.expected(), inputs.query.shape[0]
    pad = torch.full_like(inputs.query[:5], NAN)
    inputs.query = torch.cat([inputs.query, pad])
    inputs.ancestor_mask = torch.nn.functional.pad(inputs.ancestor_mask, (0, 5))
    last = inputs.query_start_loc[-1:]
    inputs.query_start_loc = torch.cat([inputs.query_start_loc, last, last])
    inputs.seq_lens = torch.nn.functional.pad(inputs.seq_lens, (0, 2))
    inputs.block_table = torch.nn.functional.pad(inputs.block_table, (0, 0, 0, 2), value=-(2**30))
    output = inputs.run()
    assert_near(output[:num_rows], expected)
    assert output[num_rows:].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_requests_with_more_rows_are_anothers(device: torch.device, num_splits: int) -> None:
    """A prefill in the middle of the batch keeps what the user's backend wrote."""
    requests = [Request(20, chain(3)), Request(0, chain(30)), Request(40, star(5))]
    inputs = build(device, Model(), requests, max_rows=8, num_splits=num_splits)
    expected, output = inputs.expected(), inputs.run()
    ours = [*range(3), *range(33, 38)]
    assert_near(output[ours], expected[ours])
    assert output[3:33].isnan().all()


def test_part_of_a_batch(device: torch.device) -> None:
    """`query_start_loc` need not begin at 0: other requests' rows come first."""
    inputs = build(device, Model(), RAGGED, num_splits=2)
    expected = inputs.expected()
    part = replace(
        inputs,
        query_start_loc=inputs.query_start_loc[2:],
        seq_lens=inputs.seq_lens[2:],
        block_table=inputs.block_table[2:],
    )
    start = int(inputs.query_start_loc[2])
    output = part.run()
    assert_near(output[start:], expected[start:])
    assert output[:start].isnan().all()


def test_masks_by_request(device: torch.device) -> None:
    """As `strata_mask` leaves them: [num_reqs, max_rows], rows strided."""
    inputs = build(device, Model(), RAGGED, sliding_window=6)
    expected = inputs.expected()
    sizes = inputs.query_start_loc.diff().tolist()
    wide = torch.full((len(sizes), inputs.plan.max_rows + 3), -1, device=device)
    masks = wide[:, : inputs.plan.max_rows]
    for req, rows in enumerate(inputs.ancestor_mask.split(sizes)):
        masks[req, : len(rows)] = rows
    inputs.ancestor_mask = masks
    assert torch.equal(inputs.expected(), expected)
    assert_near(inputs.run(), expected)


def test_no_requests_and_no_rows(device: torch.device) -> None:
    assert build(device, Model(), []).run().shape[0] == 0
    inputs = build(device, Model(), [Request(9, ()), Request(40, chain(3)), Request(0, ())])
    assert_matches(inputs)


def test_rows_of_a_fused_projection(device: torch.device) -> None:
    inputs = build(device, Model(), [Request(50, random_tree(6))])
    num_tokens, num_heads, head_size = inputs.query.shape
    fused = torch.full((num_tokens, num_heads + 4, head_size), NAN, device=device)
    fused[:, :num_heads] = inputs.query
    inputs.query = fused[:, :num_heads]
    wide = torch.full((num_tokens, num_heads + 1, head_size), NAN, device=device)
    tree_attention(output=wide[:, 1:], plan=inputs.plan, **inputs.tensors())
    assert_near(wide[:, 1:], inputs.expected())
    assert wide[:, 0].isnan().all()


def test_a_checked_call_is_not_checked_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = build(device, Model(), [Request(50, random_tree(6)), Request(3, chain(2))])
    expected = inputs.run()

    def refuse(*_: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(launcher, "check_arguments", refuse)
    with pytest.raises(AssertionError, match="checked"):
        inputs.run()
    inputs.options["checked"] = True
    assert_near(inputs.run(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_graph_replay_follows_the_device_tensors() -> None:
    """A captured launch reads counts, lengths, tables and masks anew."""
    device = torch.device("cuda")
    long = build(device, Model(dtype=torch.bfloat16), [Request(600, random_tree(20))] * 2, num_splits=2)  # fmt: skip
    workspace = long.plan.workspace(40, device)
    output = long.poisoned_output()
    arguments = {"plan": long.plan, "workspace": workspace, **long.tensors()}
    tree_attention(output=output, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_attention(output=output, **arguments)
    long.seq_lens.copy_(torch.tensor([300 + 4, 500 + 9]))
    long.query_start_loc.copy_(torch.tensor([0, 4, 13]))
    long.ancestor_mask[:13] = torch.tensor(
        ancestor_masks(star(4)) + ancestor_masks(chain(9)), device=device
    )
    output.fill_(NAN)
    graph.replay()
    assert_near(output[:13], long.expected()[:13])
    assert output[13:].isnan().all()


@pytest.mark.parametrize(
    ("tiles", "max_seq_len", "wanted", "expected"),
    [(8, 100_000, 264, 16), (8, 500, 264, 2), (8, 200, 264, 1), (512, 100_000, 264, 1), (60, 9000, 264, 4)],
)  # fmt: skip
def test_number_of_splits(tiles: int, max_seq_len: int, wanted: int, expected: int) -> None:
    """Few requests with a long context are split, short contexts and full devices are not."""
    assert splits_for(tiles, max_seq_len, wanted) == expected


def test_unsupported_models_are_named() -> None:
    bf16 = torch.bfloat16
    assert unsupported_reason(128, 16, bf16, bf16, 32, 8) is None
    assert unsupported_reason(128, 48, bf16, FP8, 32, 8) is None
    for name, arguments in {
        "head size 80": (80, 16, bf16, bf16, 32, 8),
        "block size 8": (128, 8, bf16, bf16, 32, 8),
        "query dtype": (128, 16, torch.float64, bf16, 32, 8),
        "KV cache dtype": (128, 16, bf16, torch.float8_e5m2, 32, 8),
        "multiples of 8": (128, 16, bf16, bf16, 30, 8),
    }.items():
        assert name in str(unsupported_reason(*arguments))


BAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "query.shape": {"query": torch.zeros(30, 4, 80)},
    "query.dtype": {"query": torch.zeros(30, 4, 64, dtype=torch.float64)},
    "output.shape": {"output": torch.zeros(29, 4, 64)},
    "output.dtype": {"output": torch.zeros(30, 4, 64, dtype=torch.bfloat16)},
    "output.stride": {"output": torch.zeros(30, 64, 4).transpose(1, 2)},
    "key_cache.shape": {"key_cache": torch.zeros(9, 2, 32, 64)},
    "key_cache.dtype": {"key_cache": torch.zeros(9, 2, 16, 64, dtype=torch.int8)},
    "value_cache.dtype": {"value_cache": torch.zeros(9, 2, 16, 64).to(FP8)},
    "seq_lens.dtype": {"seq_lens": torch.zeros(6, dtype=torch.int64)},
    "query_start_loc.shape": {"query_start_loc": torch.zeros(6, dtype=torch.int32)},
    "query_start_loc.stride": {"query_start_loc": torch.zeros(14, dtype=torch.int32)[::2]},
    "block_table is": {"block_table": torch.zeros(5, 9, dtype=torch.int32)},
    "block_table.dtype": {"block_table": torch.zeros(6, 9, dtype=torch.int64)},
    "ancestor_mask.dtype": {"ancestor_mask": torch.zeros(30, dtype=torch.int32)},
    "ancestor_mask.shape": {"ancestor_mask": torch.zeros(29, dtype=torch.int64)},
    "k_scale": {"k_scale": torch.ones(1)},
    "workspace is": {"workspace": None},
    "sliding_window": {"sliding_window": -1},
    "soft_cap": {"soft_cap": -1.0},
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(device: torch.device, move, name: str) -> None:
    inputs = build(device, Model(), RAGGED, num_splits=2)
    assert inputs.query.shape[0] == 30
    arguments = {
        "output": inputs.poisoned_output(),
        "plan": inputs.plan,
        "workspace": inputs.plan.workspace(30, device),
        **inputs.tensors(),
    }
    changed = {
        key: move(value) if isinstance(value, torch.Tensor) else value
        for key, value in BAD_ARGUMENTS[name].items()
    }
    with pytest.raises(ValueError, match=f"tree_attention: {name}"):
        tree_attention(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("name", "changed"),
    [("max_rows", {"max_rows": 65}), ("num_splits", {"num_splits": 3}), ("plan", {"head_size": 80})],
)  # fmt: skip
def test_bad_capacities_are_named(name: str, changed: dict[str, int]) -> None:
    capacities: dict[str, Any] = {
        "num_reqs": 1, "max_rows": 8, "max_seq_len": 99, "num_heads": 4, "num_kv_heads": 2,
        "head_size": 64, "block_size": 16, "dtype": torch.float32, "device": torch.device("cpu"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"tree_attention: {name}"):
        TreeAttentionPlan.of(**{**capacities, **changed})
