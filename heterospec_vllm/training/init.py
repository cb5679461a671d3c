# SPDX-License-Identifier: Apache-2.0
"""Start of a head: draft vocabulary and weights taken from the target."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from heterospec_vllm.training.data import Target
from heterospec_vllm.training.model import Eagle3Head, HeadShape


def load_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The named tensors of a Hugging Face folder (one file or an indexed set of them)."""
    index = folder / "model.safetensors.index.json"
    where = dict.fromkeys(names, "model.safetensors")
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
    found = {}
    for name in names:
        with safe_open(folder / where[name], "pt") as file:
            found[name] = file.get_tensor(name)
    return found


def special_tokens(config: dict) -> list[int]:
    """Ids of bos and eos in a ``config.json``: each a number, a list of them, null or absent."""
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id"):
        ids = config.get(name)
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found


def draft_vocabulary(counts: Counter[int], special: list[int], size: int, vocab: int) -> Tensor:
    """The ``size`` most frequent answer tokens and the special ones, as sorted target ids."""
    order = [token for token, _ in counts.most_common()]
    # Tokens never seen fill up the rest in id order: tokenisers number frequent words first.
    chosen = list(dict.fromkeys([*special, *order, *range(vocab)]))[:size]
    return torch.tensor(sorted(chosen))


def load_target(
    folder: Path, config: dict, draft_ids: Tensor, device: torch.device | str = "cpu"
) -> Target:
    """The target's tensors that the trainer reads; ``config`` is its ``config.json``."""
    head_name = (
        "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    )
    names = ["model.embed_tokens.weight", "model.norm.weight", head_name]
    tensors = load_tensors(folder, list(dict.fromkeys(names)))
    to_draft = torch.full((config["vocab_size"],), -1, dtype=torch.long)
    to_draft[draft_ids] = torch.arange(len(draft_ids))
    return Target(
        embed=tensors["model.embed_tokens.weight"].float().to(device),
        draft_head=tensors[head_name][draft_ids].to(device, torch.bfloat16),
        norm=tensors["model.norm.weight"].float().to(device),
        eps=config["rms_norm_eps"],
        to_draft=to_draft.to(device),
    )


@torch.no_grad()
def init_from_target(
    head: Eagle3Head, folder: Path, target: Target, layer: int, quiet: float
) -> None:
    """Copies decoder layer ``layer``, the final norm and the draft vocabulary's output rows.

    The layer's q, k and v read the embedding half and the hidden half with the same weights
    (halved), and the fc passes the mean of the taps.
    """
    c = head.config
    prefix = f"model.layers.{layer}."
    parts = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    tensors = load_tensors(folder, [f"{prefix}{p}.weight" for p in [*parts, *qkv, *norms]])
    mid = head.midlayer
    for name in [*parts, "post_attention_layernorm"]:
        mine = mid.get_parameter(f"{name}.weight")
        theirs = tensors[f"{prefix}{name}.weight"]
        if mine.shape == theirs.shape:
            mine.copy_(theirs)
    for name in qkv:
        mine = mid.get_parameter(f"{name}.weight")
        theirs = tensors[f"{prefix}{name}.weight"].float()
        if name != "self_attn.q_proj" and mine.shape[0] != theirs.shape[0]:
            repeat = mine.shape[0] // theirs.shape[0]
            theirs = theirs.view(-1, c.head_dim, c.hidden_size).repeat_interleave(repeat, 0)
            theirs = theirs.reshape(mine.shape[0], -1)
        mine.copy_(torch.cat([theirs, theirs], dim=1) * 0.5)
    head.norm.weight.copy_(target.norm)
    head.lm_head.weight.copy_(target.draft_head)
    # The target's layer adds to a stream whose RMS is ~30; ours starts at the fc's guess, of RMS 1
    # (see fit_fc). Unscaled, its additions would drown the guess.
    mid.self_attn.o_proj.weight.mul_(quiet)
    mid.mlp.down_proj.weight.mul_(quiet)


@torch.no_grad()
def fit_fc(head: Eagle3Head, features: Tensor, goal: Tensor, ridge: float = 1e-2) -> None:
    """Least-squares start of the fc: from the taps at a position to the next final hidden state.

    features: [n, taps * hidden_size] at positions i; goal: [n, hidden_size], the residual stream
    after the last layer at i + 1. With it the head starts as the best linear guess of what its
    output has to be.
    """
    if head.fc_norm is not None:
        parts = features.float().chunk(len(head.config.taps), dim=-1)
        features = torch.cat([norm(x) for norm, x in zip(head.fc_norm, parts, strict=True)], -1)
    x = features.float()
    y = torch.nn.functional.rms_norm(goal.float(), goal.shape[-1:])
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    head.fc.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)


def head_config(target: dict, taps: tuple[int, ...], draft_vocab: int, **changes) -> HeadShape:
    heads = target["num_attention_heads"]
    rope = target.get("rope_parameters") or {}  # where transformers 5 writes it
    fields = dict(
        hidden_size=target["hidden_size"],
        intermediate_size=target["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=target.get("num_key_value_heads", heads),
        head_dim=target.get("head_dim") or target["hidden_size"] // heads,
        vocab_size=target["vocab_size"],
        draft_vocab_size=draft_vocab,
        rms_norm_eps=target["rms_norm_eps"],
        rope_theta=target.get("rope_theta") or rope.get("rope_theta", 10000.0),
        max_position_embeddings=target["max_position_embeddings"],
        taps=taps,
        fc_norm=True,
    )
    return HeadShape(**{**fields, **changes})
