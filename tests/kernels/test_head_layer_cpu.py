# SPDX-License-Identifier: Apache-2.0
"""A draft head's layer in one call: C++ against the float64 reference."""

import math
from dataclasses import replace

import pytest
import torch

from heterospec_vllm.kernels.cpu.head_layer import HeadLayerWeights, head_layer_cpu
from heterospec_vllm.kernels.cpu.packed_linear import pack_weight
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

# float32 sums in another order; the others round their inputs to every product once more than float64 does.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
BLOCK = 16


def _weights(dtype, hidden=96, heads=3, kv_heads=1, head_size=32, width=160, rotary=32, **flags):
    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / math.sqrt(shape[-1])).to(dtype)

    def linear(*shape: int) -> torch.Tensor:
        return pack_weight(drawn(*shape))

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(hidden)).to(dtype)

    angles = torch.arange(600)[:, None] * 100.0 ** -torch.linspace(0, 1, rotary // 2)
    return HeadLayerWeights(
        embedding=torch.randn(50, hidden).to(dtype),
        embed_norm=norm(),
        hidden_norm=norm(),
        qkv=linear((heads + 2 * kv_heads) * head_size, 2 * hidden),
        attention_output=linear(hidden, heads * head_size),
        post_norm=norm(),
        gate_up=linear(2 * width, hidden),
        down=linear(hidden, width),
        final_norm=norm(),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        head_size=head_size,
        epsilon=1e-5,
        scale=head_size**-0.5,
        norm_before_residual=flags.get("norm_before_residual", False),
        norm_output=flags.get("norm_output", False),
    )


def _case(weights: HeadLayerWeights, contexts: list[int], width: int, max_tail: int, paged: bool):
    """Requests with ``width`` rows each; what nothing may read holds NaN."""
    dtype, kv_heads, dim = weights.embedding.dtype, weights.num_kv_heads, weights.head_size
    num_rows = len(contexts) * width
    per_req = (max(contexts) + width) // BLOCK + 1
    kv = torch.full((len(contexts) * per_req + 1, kv_heads, 2 * BLOCK, dim), math.nan).to(dtype)
    key_cache, value_cache = kv.chunk(2, dim=2)
    table = torch.arange(1, len(contexts) * per_req + 1, dtype=torch.int32).view(-1, per_req)
    for req, context in enumerate(contexts):
        for position in range(context):
            block, inside = int(table[req, position // BLOCK]), position % BLOCK
            for h in range(kv_heads):
                key_cache[block, h].view(dim, BLOCK)[:, inside] = torch.randn(dim).to(dtype)
                value_cache[block, h, inside] = torch.randn(dim).to(dtype)
    first_row = 5
    scratch = torch.randn(2, first_row + num_rows, kv_heads, dim).to(dtype)
    scratch[:, first_row:] = math.nan  # written by the layer
    tail = torch.full((num_rows, max_tail), -1, dtype=torch.int32)
    positions, slots = [], []
    for row in range(num_rows):
        req, inside = divmod(row, width)
        ancestors = torch.randperm(first_row)[: row % max_tail].tolist()
        tail[row, : row % max_tail + 1] = torch.tensor([*ancestors, first_row + row])
        position = contexts[req] + inside
        positions.append(position)
        slots.append(int(table[req, position // BLOCK]) * BLOCK + position % BLOCK)
    return {
        "token_ids": torch.randint(0, 50, (num_rows,)),
        "positions": torch.tensor(positions),
        "hidden": torch.randn(num_rows, weights.embedding.shape[1]).to(dtype),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "query_start_loc": torch.arange(0, num_rows + 1, width, dtype=torch.int32),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "block_table": table,
        "scratch_key": scratch[0],
        "scratch_value": scratch[1],
        "first_row": first_row,
        "tail_index": tail,
        "slots": torch.tensor(slots) if paged else None,
    }


def _assert_equal(weights: HeadLayerWeights, case: dict) -> None:
    tolerance = TOLERANCES[weights.embedding.dtype]
    pages = torch.stack([case["key_cache"], case["value_cache"]])
    scratch = torch.stack([case["scratch_key"], case["scratch_value"]])
    mine = {**case, "key_cache": pages[0].clone(), "value_cache": pages[1].clone()}
    mine |= {"scratch_key": scratch[0].clone(), "scratch_value": scratch[1].clone()}
    got = head_layer_cpu(weights, **mine)
    theirs = {**mine, "key_cache": pages[0].clone(), "value_cache": pages[1].clone()}
    theirs |= {"scratch_key": scratch[0].clone(), "scratch_value": scratch[1].clone()}
    expected = reference.head_layer(weights, **theirs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name in ("key_cache", "value_cache", "scratch_key", "scratch_value"):
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("paged", [False, True], ids=["level", "accepted tokens"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    ("contexts", "width", "max_tail"),
    [([1], 1, 1), ([15, 16, 17], 1, 2), ([300], 7, 3), ([1, 127, 128, 129, 500], 13, 4)],
)
def test_equals_the_reference(dtype, contexts, width, max_tail, paged) -> None:
    torch.manual_seed(0)
    weights = _weights(dtype)
    _assert_equal(weights, _case(weights, contexts, width, max_tail, paged))


@pytest.mark.parametrize(
    "shape",
    [
        {"norm_before_residual": True},
        {"norm_output": True},
        {"rotary": 8},
        {"hidden": 576, "heads": 9, "kv_heads": 3, "head_size": 64, "width": 1536, "rotary": 64},
        {"hidden": 32, "heads": 8, "kv_heads": 8, "head_size": 128, "width": 32},
    ],
    ids=lambda shape: ",".join(shape),
)
def test_kinds_of_heads(shape) -> None:
    torch.manual_seed(1)
    weights = _weights(torch.bfloat16, **shape)
    _assert_equal(weights, _case(weights, [40, 3], 3, 2, paged=True))


def test_rows_do_not_touch_each_other() -> None:
    """What a row gives alone it gives in a batch, though a neighbour is NaN."""
    torch.manual_seed(2)
    weights = _weights(torch.float32)
    case = _case(weights, [20, 20, 20], 1, 1, paged=False)
    case["hidden"][1] = math.nan
    normed, output = head_layer_cpu(weights, **case)
    assert normed[1].isnan().all() and output[1].isnan().all()
    assert normed[[0, 2]].isfinite().all() and output[[0, 2]].isfinite().all()


def test_weights_that_do_not_fit_are_named() -> None:
    weights = _weights(torch.bfloat16)
    assert weights.misfit() is None
    for changed, said in [
        ({"qkv": weights.qkv[:, :-1]}, "qkv is"),
        ({"down": weights.down.float()}, "down is torch.float32"),
        ({"cos_sin": weights.cos_sin.bfloat16()}, "cos_sin is"),
        ({"head_size": 48}, "allowed"),
    ]:
        misfit = replace(weights, **changed)
        assert said in str(misfit.misfit())
        with pytest.raises(ValueError, match="head_layer_cpu: "):
            _ = misfit.packed
