# SPDX-License-Identifier: Apache-2.0
"""What is looked at before weights are loaded into a running engine: vLLM stops at a fault with the model half loaded.

What only vLLM's loader can know, whether a model takes every name, is left to it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import get_parameter_for_reload

from heterospec_vllm.errors import shown, shown_message
from heterospec_vllm.plugin.head_weights import LOAD_FORMATS
from heterospec_vllm.plugin.weights_header import StoredTensor, read_header, weight_files

_FIELD = "heterospec: reload_weights"


def require_weights(vllm_config: VllmConfig, weights_path: str | None) -> None:
    """Raises ValueError where vLLM could not load the target's weights from a path (None: from where they are).

    The path may be a Hugging Face id: its files are downloaded.
    """
    load_config, model_config = vllm_config.load_config, vllm_config.model_config
    if load_config.load_format not in LOAD_FORMATS:
        return
    path = weights_path or model_config.model
    if not os.path.isdir(path):
        _download(vllm_config, path)
        return
    try:
        found = _checkpoint(Path(path))
    except ValueError as error:
        raise ValueError(f"{_FIELD}.weights_path: {error}") from None
    if os.path.isdir(model_config.model) and path != model_config.model:
        _require_same_shapes(found, model_config, path)


def _download(vllm_config: VllmConfig, path: str) -> None:
    if os.path.isabs(path) or path.startswith("."):
        raise ValueError(f"{_FIELD}.weights_path: found no folder at {path}, allowed: one")
    wanted = copy.copy(vllm_config.model_config)
    if path != wanted.model:
        wanted.model, wanted.revision = path, None
    try:
        get_model_loader(vllm_config.load_config).download_model(wanted)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{_FIELD}.weights_path: found {path}, which is no folder, nor a Hugging Face id that "
            f"can be read from here ({shown_message(error)}), allowed: a model's weights"
        ) from None


def _checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name; none where torch wrote the files, which would all be read."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            tensors.update(read_header(file))
    return tensors


def _require_same_shapes(
    found: dict[str, StoredTensor], model_config: ModelConfig, path: str
) -> None:
    try:
        present = _checkpoint(Path(model_config.model))
    except ValueError:  # moved away since
        return
    for name in sorted(found.keys() & present.keys()):
        if found[name].shape != present[name].shape:
            raise ValueError(
                f"{_FIELD}.weights_path: found {shown(name)} of {_sizes(found[name].shape)} in "
                f"{found[name].file}, allowed: {_sizes(present[name].shape)}, as in {model_config.model}"
            )
    if found and present and not found.keys() & present.keys():
        raise ValueError(
            f"{_FIELD}.weights_path: found no weight of this model in {path}, "
            f"allowed: names as in {model_config.model}"
        )


def checked_kernel_weights(
    model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    """Weights in the layout in which this engine holds them.

    Raises ValueError where the model has no such parameter or another shape for it.
    """
    weights = list(weights)
    for name, tensor in weights:
        try:
            parameter = get_parameter_for_reload(model, name)
        except AttributeError:
            raise ValueError(
                f"{_FIELD}.weights_iterator: found the weight {shown(name)}, allowed with "
                "is_checkpoint_format=False: the model's own parameters"
            ) from None
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{_FIELD}.weights_iterator: found {shown(name)} of {_sizes(tensor.shape)}, allowed "
                f"with is_checkpoint_format=False: {_sizes(parameter.shape)}, as this engine holds it"
            )
    return weights


def _sizes(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
