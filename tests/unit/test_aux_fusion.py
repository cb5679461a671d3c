# SPDX-License-Identifier: Apache-2.0
"""All taps normed at once are what vLLM's head makes of them one by one."""

from types import SimpleNamespace

import pytest
import torch

from heterospec_vllm.draft.aux_fusion import AuxFusion

TAPS, HIDDEN = 4, 48


class Norm(torch.nn.Module):
    """RMSNorm as vLLM's `forward_native` computes it."""

    def __init__(self, eps: float = 1e-5, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(HIDDEN).to(dtype))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return wide.to(x.dtype) * self.weight


def head(norms: list[Norm], dtype: torch.dtype, norm_before_fc: bool = False) -> SimpleNamespace:
    fc = torch.nn.Linear(TAPS * HIDDEN, HIDDEN, bias=False, dtype=dtype)

    def combine(features: torch.Tensor) -> torch.Tensor:
        chunks = features.chunk(TAPS, dim=-1)
        normed = torch.cat([n(c) for n, c in zip(norms, chunks, strict=True)], dim=-1)
        return fc(normed)

    inner = SimpleNamespace(fc_norm=norms or None, fc=fc, norm_before_fc=norm_before_fc)
    return SimpleNamespace(model=inner, combine_hidden_states=combine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 17])
@torch.inference_mode()
def test_equal_to_one_by_one(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    model = head([Norm(dtype=dtype) for _ in range(TAPS)], dtype)
    features = torch.randn(rows, TAPS * HIDDEN, dtype=dtype) * torch.logspace(-2, 2, rows)[:, None]
    features = features.to(dtype)
    fused = AuxFusion(model)
    assert fused.norms is not None
    # bfloat16: one rounding more or less before the product, 2**-8 of each term.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        fused(features), model.combine_hidden_states(features), atol=tolerance, rtol=tolerance
    )


def test_other_heads_keep_their_own_function() -> None:
    several = head([Norm(), Norm(1e-6), Norm(), Norm()], torch.bfloat16)
    assert AuxFusion(several).norms is None
    before = head([Norm() for _ in range(TAPS)], torch.bfloat16, norm_before_fc=True)
    assert AuxFusion(before).norms is None
    bare = SimpleNamespace(combine_hidden_states=lambda x: 2 * x)
    assert AuxFusion(bare)(torch.ones(1)).item() == 2
