# SPDX-License-Identifier: Apache-2.0
"""Which weights a head may have, in which shapes, and where its draft tokens may point."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("vllm")

from head_folders import (
    DRAFT,
    HIDDEN,
    VOCAB,
    assert_refused,
    reason,
    rewrite_header,
    with_weights,
    write_head,
)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head")


def test_names_that_vllm_takes(head: Path) -> None:
    zeros = np.zeros(HIDDEN, dtype=np.float32)
    with_weights(
        head,
        # The target's, as exports of the speculators library may hold them.
        verifier_lm_head__weight=np.zeros((VOCAB, HIDDEN), dtype=np.float16),
        verifier_norm__weight=zeros,
        # What vLLM passes over.
        t2d=np.zeros(3),
        mask_hidden=zeros,
        input_norm__weight=zeros,
        midlayer__self_attn__rotary_emb__inv_freq=zeros,
        midlayer__self_attn__q_proj__bias=zeros,
        fc__bias=zeros,
        lm_head__bias=zeros,
        # Norms are ones without weights, and the target's embedding is taken.
        norm__weight=None,
        embed_tokens__weight=np.zeros((VOCAB, HIDDEN), dtype=np.float64),
    )
    assert reason(head) is None
    tensors = load_file(head / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): w for name, w in tensors.items()}
    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
    for parts, prefix, joined in (
        (("q_proj", "k_proj", "v_proj"), attention, "qkv_proj"),
        (("gate_proj", "up_proj"), mlp, "gate_up_proj"),
    ):
        rows = [renamed.pop(f"{prefix}{part}.weight") for part in parts]
        renamed[f"{prefix}{joined}.weight"] = np.concatenate(rows)
    save_file(renamed, head / "model.safetensors")
    assert reason(head) is None


@pytest.mark.parametrize(
    "name",
    [
        "unused",
        "lm_head_weight",
        "verifier.norm.weight",
        "model.norm.weight",
        "midlayer.self_attn.q_norm.weight",
        "midlayer.weight",
        "layers.1.mlp.up_proj.weight",
        "fc_norm.0.weight",
        "x.d2t",
        "draft_id_to_target_id",
        "bias",
        "nothing.bias",
        "norm.weight_scale",
        "a\nline",
        "\ud800",
        "x" * 100_000,
    ],
)
def test_names_that_nobody_takes(head: Path, name: str) -> None:
    def add(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for entry in header.values())
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    rewrite_header(head, add)
    assert_refused(head, "found the weight '", "allowed: those that vLLM's EAGLE-3 class loads")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"fc__weight": np.zeros((128, 256), np.float32)}, ["'fc.weight' of 128 x 256", "128 x 384"]),
        ({"lm_head__weight": np.zeros((512, 128), np.float32)}, ["of 512 x 128", "256 x 128"]),
        ({"embed_tokens__weight": np.zeros((256, 128), np.float32)}, ["256 x 128", "512 x 128"]),
        ({"norm__weight": np.zeros((128, 1), np.float32)}, ["128 x 1", "allowed: 128,"]),
        ({"norm__weight": np.float32(1)}, ["'norm.weight' of one number"]),
        ({"midlayer__self_attn__q_proj__weight": np.zeros((128, 128), np.float32)}, ["128 x 256"]),
        ({"midlayer__mlp__down_proj__weight": np.zeros((128, 255), np.float32)}, ["128 x 255"]),
        ({"norm__weight": np.zeros(128, np.int8)}, ["in 'I8'", "F64, F32, F16, BF16"]),
        ({"fc__weight": None}, ["found no 'fc.weight'"]),
        ({"lm_head__weight": None}, ["found no 'lm_head.weight'"]),
        ({"midlayer__self_attn__v_proj__weight": None}, ["no 'layers.0.self_attn.v_proj.weight'"]),
    ],
)  # fmt: skip
def test_shapes(head: Path, changes: dict[str, Any], parts: list[str]) -> None:
    assert_refused(with_weights(head, **changes), *parts)


def test_a_head_of_another_width_needs_its_own_embedding(tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", hidden_size=64, target_hidden_size=128)
    narrow = {
        name: w if w.ndim != 2 else np.zeros(_narrow(name, w.shape), np.float32)
        for name, w in load_file(head / "model.safetensors").items()
        if not name.endswith("norm.weight")
    }
    save_file(narrow, head / "model.safetensors")
    assert_refused(head, "found no 'embed_tokens.weight'")
    save_file(
        {**narrow, "embed_tokens.weight": np.zeros((512, 64), np.float32)},
        head / "model.safetensors",
    )
    assert reason(head) is None


def _narrow(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a head half as wide over taps of the same width."""
    outputs, inputs = shape
    if name == "fc.weight":
        return outputs // 2, inputs
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return outputs // 2, inputs
    return outputs, inputs // 2


def test_other_kinds_of_heads(tmp_path: Path) -> None:
    norm = np.zeros(64, np.float32)
    qwen = write_head(
        tmp_path / "qwen", architectures=["Eagle3Qwen3ForCausalLM"], model_type="qwen3"
    )
    with_weights(qwen, midlayer__self_attn__q_norm__weight=norm)
    assert reason(qwen) is None
    biased = write_head(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    with_weights(biased, midlayer__self_attn__k_proj__bias=norm)
    assert reason(biased) is None
    with_weights(biased, midlayer__self_attn__k_proj__bias=np.zeros(128, np.float32))
    assert_refused(biased, "k_proj.bias' of 128", "allowed: 64")
    normed = write_head(tmp_path / "normed", fc_norm=True, norm_before_fc=True)
    with_weights(normed, fc_norm__2__weight=np.zeros(128, np.float32))
    with_weights(normed, input_norm__weight=np.zeros(384, np.float32))
    assert reason(normed) is None
    with_weights(normed, fc_norm__3__weight=np.zeros(128, np.float32))
    assert_refused(normed, "the weight 'fc_norm.3.weight'")


def test_a_quantized_head_has_names_of_its_method(tmp_path: Path) -> None:
    method = {"quant_method": "gptq", "bits": 4}
    head = write_head(tmp_path / "head", quantization_config=method)
    with_weights(
        head,
        midlayer__self_attn__q_proj__weight=None,
        midlayer__self_attn__q_proj__qweight=np.zeros((32, 128), np.int32),
        fc__weight=np.zeros((128, 48), np.int8),
    )
    assert reason(head) is None
    assert_refused(with_weights(head, rubbish__qweight=np.zeros(1)), "the weight 'rubbish.qweight'")
    with_weights(head, rubbish__qweight=None, d2t=np.full(DRAFT, VOCAB))
    assert_refused(head, "in 'd2t'")


# ---- draft tokens


@pytest.mark.parametrize(
    ("d2t", "parts"),
    [
        (np.arange(DRAFT) + 49152, ["found 49152 for token 0", "allowed: 0 to 511"]),
        (np.arange(DRAFT) + 10**12, ["found 1000000000000 for token 0"]),
        (np.full(DRAFT, np.iinfo(np.int64).max), ["found 9223372036854775807 for token 0"]),
        (np.full(DRAFT, np.iinfo(np.int64).min), ["found -9223372036854775808 for token 0"]),
        (np.full(DRAFT, 2**64 - 1, np.uint64), ["found 18446744073709551615 for token 0"]),
        (-np.arange(DRAFT) - 1, ["found -1 for token 0"]),
        (np.arange(DRAFT)[::-1].copy(), ["found the target's token 255 for the tokens 0 and 1"]),
        (np.append(np.arange(DRAFT - 1), 257), ["found 257 for token 255", "-255 to 256"]),
        (np.full(DRAFT, np.nan, np.float32), ["found nan for token 0"]),
        (np.full(DRAFT, 0.5, np.float32), ["found 0.5 for token 0"]),
        (np.arange(DRAFT - 1), ["'d2t' of 255", "allowed: 256"]),
        (np.arange(DRAFT)[None], ["'d2t' of 1 x 256", "allowed: 256"]),
        (np.zeros(DRAFT, np.bool_), ["'d2t' in 'BOOL'", "allowed: integers"]),
    ],
)
def test_draft_tokens(head: Path, d2t: np.ndarray, parts: list[str]) -> None:
    assert_refused(with_weights(head, d2t=d2t), *parts)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int16, np.float32, np.float64])
def test_draft_tokens_of_other_types(head: Path, dtype: Any) -> None:
    assert reason(with_weights(head, d2t=np.arange(DRAFT).astype(dtype))) is None
    assert reason(with_weights(head, d2t=np.zeros(DRAFT, dtype))) is None
    assert reason(with_weights(head, d2t=None)) is None


def test_a_whole_vocabulary_needs_no_draft_tokens(tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", draft_vocab_size=VOCAB)
    assert reason(head) is None
    assert_refused(
        with_weights(head, d2t=np.zeros(VOCAB, np.int64)), "found 'd2t'", "allowed: none"
    )


def test_top_k_is_at_most_the_draft_vocabulary(tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", draft_vocab_size=8)
    assert reason(head, top_k=8) is None
    found = reason(head, top_k=16)
    assert found and found.startswith("speculative_config.top_k: found 16, allowed: at most 8, ")
