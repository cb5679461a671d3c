# SPDX-License-Identifier: Apache-2.0
"""The target's aux hidden states on their way into the draft head."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm


class AuxFusion:
    """``combine_hidden_states`` of vLLM's EAGLE-3 head.

    A head that norms each tap on its own does so in about forty small operations, half a millisecond of a step; here
    all taps are normed at once. Every other kind of head goes through the model's own function.
    """

    def __init__(self, model: Any) -> None:
        self._combine = model.combine_hidden_states
        inner = getattr(model, "model", None)
        norms = list(getattr(inner, "fc_norm", None) or [])
        # `norm_before_fc` is another norm in front of these.
        plain = bool(norms) and not getattr(inner, "norm_before_fc", False)
        self.norms: torch.Tensor | None = None  # [num_aux, hidden_size]
        self.epsilon = 0.0
        if plain and all(_is_plain(norm, norms[0]) for norm in norms):
            self.norms = torch.stack([norm.weight.data for norm in norms])
            self.epsilon = float(norms[0].variance_epsilon)
            self._fc = inner.fc  # type: ignore[union-attr]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_aux * hidden_size] to [num_tokens, hidden_size]."""
        weight = self.norms
        if weight is None:
            return self._combine(features)
        taps = features.view(features.shape[0], *weight.shape)
        normed = rms_norm(taps, weight.shape[1:], eps=self.epsilon) * weight
        return self._fc(normed.view(features.shape))


def _is_plain(norm: Any, first: Any) -> bool:
    """An RMSNorm over its whole input with a weight, like the first one."""
    return (
        getattr(norm, "has_weight", True)
        and getattr(norm, "variance_size_override", None) is None
        and norm.weight.shape == first.weight.shape
        and norm.variance_epsilon == first.variance_epsilon
    )
