# SPDX-License-Identifier: Apache-2.0
"""Hidden states computed when a batch needs them, by the target itself through transformers.

On a GPU a forward pass of the target costs less than reading its hidden states from disk, and needs
no store: only the answers. vLLM is not needed either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterospec_vllm.training.data import Sequence, padded_ids


class LiveFeatures:
    """The residual stream entering ``layers`` (the number of layers: leaving the last one)."""

    def __init__(
        self, target: Path, layers: list[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        from transformers import AutoModel

        self.layers = layers
        self._model = AutoModel.from_pretrained(target, dtype=dtype).to(device).eval()
        self._device = device
        self._seen: dict[int, Tensor] = {}
        decoders = self._model.layers
        for layer in layers:
            # What enters the final norm is what leaves the last layer.
            module = decoders[layer] if layer < len(decoders) else self._model.norm
            module.register_forward_pre_hook(self._keep(layer), with_kwargs=True)

    def _keep(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self._seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def of(self, group: list[Sequence]) -> Tensor:
        ids = padded_ids(group, max(s.rows for s in group))
        # Padding stands on the right, where causal attention never looks.
        self._model(ids.to(self._device), use_cache=False)
        return torch.stack([self._seen[layer] for layer in self.layers], dim=2).bfloat16()
