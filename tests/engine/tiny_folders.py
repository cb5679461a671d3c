# SPDX-License-Identifier: Apache-2.0
"""Model folders with a config and no usable weights: enough for all that happens before loading."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
HEAD = {
    **TARGET,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 256,
    "tie_word_embeddings": False,
}


def write_target(folder: Path, **changes: Any) -> Path:
    """A Llama of 8 layers, with changes to its config; a key set to None is left out."""
    return _write(folder, {**TARGET, **changes})


def write_head(folder: Path, **changes: Any) -> Path:
    """An EAGLE-3 head for that target."""
    return _write(folder, {**HEAD, **changes})


def _write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    save_file({"unused": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    return folder
