# SPDX-License-Identifier: Apache-2.0
"""The head on disk: vLLM's EAGLE-3 checkpoint, and the trainer's own resumable state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heterospec_vllm.kernels import private_files
from heterospec_vllm.training.inputs import InputError
from heterospec_vllm.training.model import Eagle3Head, HeadShape

STATE = "state.pt"


def vllm_config(c: HeadShape) -> dict[str, Any]:
    """``config.json`` of a ``method: eagle3`` head (vLLM 0.32's ``LlamaForCausalLMEagle3``)."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": list(c.taps),
        "num_aux_hidden_states": len(c.taps),
    }
    names = """hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim
    vocab_size draft_vocab_size rms_norm_eps rope_theta max_position_embeddings fc_norm
    norm_output"""
    return {**config, **{name: getattr(c, name) for name in names.split()}}


def export(weights: dict[str, Tensor], config: HeadShape, draft_ids: Tensor, folder: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` (bf16) into ``folder``, atomically.

    draft_ids: [draft_vocab_size] sorted target ids. ``d2t`` holds target id minus draft id,
    ``t2d`` marks the target ids that are draft words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()
    }
    tensors["d2t"] = draft_ids - torch.arange(len(draft_ids))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
    tensors["t2d"][draft_ids] = True
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vllm_config(config), indent=1) + "\n")


def load(folder: Path, embed: Tensor) -> tuple[Eagle3Head, Tensor]:
    """A head in our format (as ``export`` writes it) and its draft ids; ``embed`` is the target's."""
    found = json.loads((folder / "config.json").read_text())
    names = HeadShape.__dataclass_fields__.keys() - {"taps"}
    fields = {name: found[name] for name in names if name in found}
    taps = tuple(found["eagle_aux_hidden_state_layer_ids"])
    config = HeadShape(**{"fc_norm": False, **fields}, taps=taps)
    tensors = load_file(folder / "model.safetensors")
    draft_ids = tensors.pop("d2t") + torch.arange(config.draft_vocab_size)
    del tensors["t2d"]
    head = Eagle3Head(config, embed)
    head.load_state_dict({name: w.float() for name, w in tensors.items()})
    return head, draft_ids


def save_state(folder: Path, state: dict[str, Any]) -> None:
    with private_files.beside(folder / STATE) as part:
        torch.save(state, part)


def require_state(folder: Path) -> None:
    path = folder / STATE
    if not path.is_file():
        raise InputError(
            "--resume", f"found no {path}, allowed: the --work folder of a run that saved one"
        )


def load_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / STATE, weights_only=True, map_location="cpu")
