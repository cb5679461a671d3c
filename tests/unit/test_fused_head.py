# SPDX-License-Identifier: Apache-2.0
"""Which heads run in C++ calls; what they compute is tested in kernels/ and engine/."""

from types import SimpleNamespace

import pytest
import torch

from heterospec_vllm.draft import fused_head
from heterospec_vllm.kernels.cpu.head_layer import HeadLayerWeights
from heterospec_vllm.kernels.cpu.packed_linear import pack_weight, unpack_weight
from heterospec_vllm.kernels.reference import cpu as reference
from heterospec_vllm.layers import linears_cpu

HIDDEN = 64


def test_other_models_are_left_to_vllm() -> None:
    model = SimpleNamespace(model=SimpleNamespace(layers=[object()]))
    with pytest.raises(ValueError, match="it is a SimpleNamespace"):
        fused_head.FusedHead(model, 100)
    assert fused_head.fused_head(model, 100) is None


def test_without_a_compiler_vllm_runs_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "unavailable_reason", lambda: "no C++ compiler")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        fused_head.FusedHead(SimpleNamespace(), 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_weight_is_read_back_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(48, HIDDEN).to(dtype)

    class Packed:
        def apply(self, layer, x, bias):
            assert layer is linear and bias is None
            return torch.nn.functional.linear(x, weight)

    linear = SimpleNamespace(quant_method=Packed())
    got = fused_head._packed_weight(linear, HIDDEN, dtype)
    assert got.is_contiguous() and torch.equal(unpack_weight(got), weight)


def test_a_weight_of_our_products_is_taken_as_it_is() -> None:
    packed = torch.nn.Parameter(pack_weight(torch.randn(48, HIDDEN)), requires_grad=False)
    linear = SimpleNamespace(weight=packed, cpu_linear=linears_cpu._packed_linear)
    got = fused_head._packed_weight(linear, HIDDEN, torch.float32)
    assert got.data_ptr() == packed.data_ptr()


def test_a_weight_that_cannot_be_packed_is_left_to_vllm() -> None:
    with pytest.raises(ValueError, match="24 x 64"):
        fused_head._logits_weight(torch.zeros(24, HIDDEN), 23)
    assert fused_head._logits_weight(torch.zeros(64, HIDDEN), 23).shape == (2, HIDDEN, 16)


# The products are float32 sums in another order than float64 ones; bfloat16 is rounded after every norm, too.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-5)], ids=str
)
@pytest.mark.parametrize("rotary", [8, 16])
def test_keys_and_values_are_the_layers(dtype: torch.dtype, tolerance: float, rotary: int) -> None:
    torch.manual_seed(0)
    num_tokens, heads, kv_heads, dim = 33, 4, 2, 16

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

    def linear(*shape: int) -> torch.Tensor:
        return pack_weight(drawn(*shape))

    angles = torch.arange(60)[:, None] * 100.0 ** -torch.linspace(0, 1, rotary // 2)
    weights = HeadLayerWeights(
        embedding=torch.randn(50, HIDDEN).to(dtype),
        embed_norm=1 + drawn(HIDDEN),
        hidden_norm=1 + drawn(HIDDEN),
        qkv=linear((heads + 2 * kv_heads) * dim, 2 * HIDDEN),
        attention_output=linear(HIDDEN, heads * dim),
        post_norm=1 + drawn(HIDDEN),
        gate_up=linear(64, HIDDEN),
        down=linear(HIDDEN, 32),
        final_norm=1 + drawn(HIDDEN),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        head_size=dim,
        epsilon=1e-5,
        scale=dim**-0.5,
        norm_before_residual=False,
        norm_output=False,
    )
    token_ids = torch.randint(0, 50, (num_tokens,))
    positions = torch.randperm(60)[:num_tokens]
    hidden = torch.randn(num_tokens, HIDDEN).to(dtype)
    pages = torch.zeros(1, kv_heads, 16, dim, dtype=dtype)
    stored = torch.zeros(2, num_tokens, kv_heads, dim, dtype=dtype)
    reference.head_layer(
        weights, token_ids, positions, hidden, pages, pages,
        query_start_loc=torch.arange(num_tokens + 1, dtype=torch.int32),
        context_lens=torch.ones(num_tokens, dtype=torch.int32),
        block_table=torch.zeros(num_tokens, 1, dtype=torch.int32),
        scratch_key=stored[0], scratch_value=stored[1], first_row=0,
        tail_index=torch.arange(num_tokens, dtype=torch.int32)[:, None],
    )  # fmt: skip
    got = fused_head.keys_and_values(
        weights, fused_head.key_columns(weights), token_ids, positions, hidden
    )
    torch.testing.assert_close(torch.stack(got), stored, rtol=tolerance, atol=tolerance)
