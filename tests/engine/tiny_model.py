# SPDX-License-Identifier: Apache-2.0
"""A tiny target and an EAGLE-3 head that knows part of it, both made from formulas: engines start fast.

The target's next token depends mostly on its last token: every layer adds only `MIXING` of itself to
the embedding. The head attends to itself alone and outputs its token's embedding, so it proposes what
the target would say without its context: often right, several levels deep, and often second best.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HIDDEN, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS = 128, 64, 4, 2, 6
MIXING = 0.25


def make_target(
    folder: Path, vocab_size: int, spread: float = 4.0, num_layers: int = NUM_LAYERS
) -> Path:
    """A random Llama; `spread` is the standard deviation of its logits."""
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(vocab_size, HIDDEN)) * HIDDEN**0.5
    weights = {"model.embed_tokens.weight": embedding}
    for i in range(num_layers):
        weights |= _layer(f"model.layers.{i}.", HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = torch.randn(vocab_size, HIDDEN) * spread / HIDDEN**0.5
    return _save(folder, _config("LlamaForCausalLM", num_layers, vocab_size), weights)


def make_head(folder: Path, target: Path, taps: tuple[int, int, int] = (1, 2, 4)) -> Path:
    """A head in vLLM's eagle3 form with three taps and the target's vocabulary."""
    lm_head = load_file(target / "model.safetensors")["lm_head.weight"]
    weights = _layer("midlayer.", 2 * HIDDEN)
    eye, none = torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    # [token embedding | hidden state] -> embedding minus hidden state: added to the residual it leaves
    # the embedding. Query and key are the embedding, so that a token sees itself.
    weights["midlayer.self_attn.v_proj.weight"] = torch.cat([eye, -eye], dim=1)
    weights["midlayer.self_attn.k_proj.weight"] = torch.cat([2 * eye, none], dim=1)
    queries = torch.cat([eye[:64], none[:64], eye[64:], none[:64]])
    weights["midlayer.self_attn.q_proj.weight"] = torch.cat(
        [2 * queries, torch.zeros_like(queries)], dim=1
    )
    weights["midlayer.self_attn.o_proj.weight"] = queries.T.contiguous()
    weights["midlayer.mlp.down_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    weights["midlayer.hidden_norm.weight"] = torch.ones(HIDDEN)
    weights["norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = lm_head
    weights["fc.weight"] = torch.zeros(HIDDEN, 3 * HIDDEN)
    config = _config("LlamaForCausalLMEagle3", 1, lm_head.shape[0])
    config["draft_vocab_size"] = lm_head.shape[0]
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(taps)}
    return _save(folder, config, weights)


def make_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Beside a model: token 5 is the word `<5>`, so no token is a part of another."""
    words = {f"<{index}>": index for index in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<0>"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def _layer(prefix: str, qkv_input: int) -> dict[str, torch.Tensor]:
    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    return {
        f"{prefix}self_attn.q_proj.weight": random(NUM_HEADS * HEAD_SIZE, qkv_input),
        f"{prefix}self_attn.k_proj.weight": random(NUM_KV_HEADS * HEAD_SIZE, qkv_input),
        f"{prefix}self_attn.v_proj.weight": random(NUM_KV_HEADS * HEAD_SIZE, qkv_input),
        f"{prefix}self_attn.o_proj.weight": MIXING * random(HIDDEN, NUM_HEADS * HEAD_SIZE),
        f"{prefix}mlp.gate_proj.weight": random(2 * HIDDEN, HIDDEN),
        f"{prefix}mlp.up_proj.weight": random(2 * HIDDEN, HIDDEN),
        f"{prefix}mlp.down_proj.weight": MIXING * random(HIDDEN, 2 * HIDDEN),
        f"{prefix}input_layernorm.weight": torch.ones(HIDDEN),
        f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def _config(architecture: str, num_layers: int, vocab_size: int) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _save(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
