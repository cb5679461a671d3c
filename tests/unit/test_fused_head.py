# SPDX-License-Identifier: Apache-2.0
"""Which heads run in C++ calls; what they compute is tested in kernels/ and engine/."""

from types import SimpleNamespace

import pytest
import torch

from heterospec_vllm import fused_head

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
    got = fused_head._weight_of(linear, HIDDEN, dtype)
    assert got.is_contiguous() and torch.equal(got, weight)
