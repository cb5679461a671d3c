# SPDX-License-Identifier: Apache-2.0
"""What stands between a head's files and vLLM's EAGLE-3 classes while our runners load it.

Copies of the target's weights are left out. A head that came from the hub after the engine's config was built is
checked here, before anything of it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig

from heterospec_vllm.patching import Wrap
from heterospec_vllm.plugin import compat, head, head_weights
from heterospec_vllm.plugin.checks import TargetFacts
from heterospec_vllm.plugin.head_schema import HeadConfig
from heterospec_vllm.plugin.weights_header import StoredTensor, torch_dtype_name

_Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Loading:
    """The head that is being loaded now."""

    model: str
    config: HeadConfig
    target: TargetFacts

    def misfit_reason(self, weights: _Weights, quantized: bool) -> str | None:
        # Where its files lie is known to vLLM's loader only.
        file = Path(self.model, "*")
        stored = {
            name: StoredTensor(
                file, torch_dtype_name(tensor.dtype), tuple(tensor.shape), _reader(tensor)
            )
            for name, tensor in weights
        }
        return head_weights.misfit_of(stored, self.config, self.target, quantized)


_loading: _Loading | None = None


def _reader(tensor: torch.Tensor) -> Callable[[], Any]:
    return lambda: tensor.cpu().numpy()


@contextlib.contextmanager
def loading_head(model: str, target_config: ModelConfig) -> Iterator[None]:
    """For the time in which vLLM loads a head and its target."""
    global _loading
    with contextlib.ExitStack() as stack:
        for wrap in LOADS:
            stack.enter_context(wrap.while_loading())
        _loading = _Loading(model, head.load(model), compat.target_facts(target_config))
        try:
            yield
        finally:
            _loading = None


def _wrap_load_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_weights(self: Any, weights: _Weights) -> Any:
        kept = [
            (name, tensor) for name, tensor in weights if not head_weights.is_verifiers_copy(name)
        ]
        quantized = getattr(self.model, "quant_config", None) is not None
        reason = None if _loading is None else _loading.misfit_reason(kept, quantized)
        if reason is not None:
            raise ValueError(f"heterospec: {reason}")
        return original(self, kept)

    return load_weights


# Applied while our runners load their models only.
LOADS = tuple(
    Wrap(
        module=f"vllm.model_executor.models.{module}",
        owner=owner,
        name="load_weights",
        parameters=("self", "weights"),
        why="It stops at copies of the target's weights that an export may hold, after the target has loaded, and "
        "takes any d2t, by which our kernels read.",
        remove_when="vLLM skips weights of the verifier and checks d2t.",
        make=_wrap_load_weights,
    )
    for module, owner in (
        ("llama_eagle3", "Eagle3LlamaForCausalLM"),
        ("qwen3_eagle3", "Eagle3Qwen3ForCausalLM"),
    )
)
