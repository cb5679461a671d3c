# SPDX-License-Identifier: Apache-2.0
"""Loads other weights into a running engine's target (through ``LLM.collective_rpc``)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# vLLM's own way and, beside it, what any other path through its layerwise loading comes down to.
WAYS = ("path", "iterator", "layerwise", "kernel format")


def reload(worker: Any, way: str, folder: str | None = None) -> str | None:
    """The message with which it was refused, or None."""
    try:
        with torch.inference_mode():
            _reload(worker, way, folder)
    except ValueError as error:
        return str(error)
    return None


def _reload(worker: Any, way: str, folder: str | None) -> None:
    if way == "path":
        return worker.reload_weights(weights_path=folder)
    assert folder is not None
    weights = load_file(Path(folder) / "model.safetensors")
    if way == "layerwise":
        return _layerwise(worker, weights)
    return worker.reload_weights(
        weights_iterator=iter(weights.items()), is_checkpoint_format=way == "iterator"
    )


def _layerwise(worker: Any, weights: dict[str, torch.Tensor]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import reload as layers

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        layers.initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        layers.finalize_layerwise_reload(model, worker.model_config)
