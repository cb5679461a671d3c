# SPDX-License-Identifier: Apache-2.0
"""Model folders for all that happens before weights load: a target without usable ones, a head of zeros."""

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
    return _write(folder, {**TARGET, **changes}, {"unused": np.zeros(1, dtype=np.float32)})


def write_head(folder: Path, **changes: Any) -> Path:
    """An EAGLE-3 head for that target."""
    config = {**HEAD, **changes}
    draft_vocab, num_aux = config["draft_vocab_size"], config.get("num_aux_hidden_states", 3)
    if not isinstance(draft_vocab, int):
        draft_vocab = TARGET["vocab_size"]
    return _write(folder, config, head_tensors(draft_vocab, num_aux))


def head_tensors(draft_vocab: int = 256, num_aux: int = 3) -> dict[str, np.ndarray]:
    """By the names and in the shapes that vLLM's EAGLE-3 Llama class loads for `HEAD`."""
    shapes = {
        "midlayer.self_attn.q_proj": (128, 256),
        "midlayer.self_attn.k_proj": (64, 256),
        "midlayer.self_attn.v_proj": (64, 256),
        "midlayer.self_attn.o_proj": (128, 128),
        "midlayer.mlp.gate_proj": (256, 128),
        "midlayer.mlp.up_proj": (256, 128),
        "midlayer.mlp.down_proj": (128, 256),
        "midlayer.hidden_norm": (128,),
        "midlayer.input_layernorm": (128,),
        "midlayer.post_attention_layernorm": (128,),
        "norm": (128,),
        "fc": (128, 128 * num_aux),
        "lm_head": (draft_vocab, 128),
    }
    tensors: dict[str, np.ndarray] = {
        f"{name}.weight": np.zeros(shape, dtype=np.float16) for name, shape in shapes.items()
    }
    if draft_vocab < TARGET["vocab_size"]:
        tensors["d2t"] = np.arange(draft_vocab)  # every other token of the target
        tensors["t2d"] = np.arange(TARGET["vocab_size"]) % 2 == 0
    return tensors


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    save_file(tensors, folder / "model.safetensors")
    return folder
