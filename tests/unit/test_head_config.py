# SPDX-License-Identifier: Apache-2.0
"""What a head's config.json may say."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from head_folders import (
    SPECULATORS,
    assert_refused,
    reason,
    with_config,
    write_head,
)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head")


WRONG: dict[str, list[Any]] = {
    "intermediate_size": [0, -1, 2**63, "256", 256.0, True, None],
    "num_key_value_heads": [0, -1, 3, "1", True],
    "num_hidden_layers": [-1, 0, 10**6, "1", 1.0, True, None, 2],
    "num_attention_heads": [0, -2, "2", True, 3],
    "hidden_size": ["128", 128.0, True, -1, 0, 2**63, 10**400],
    "vocab_size": ["512", 512.0, False],
    "head_dim": ["64", 64.0, -64],
    "draft_vocab_size": ["256", 256.0, True, -1, 2**40],
    "max_position_embeddings": [2**31 - 1, 0, -1, "256", None, True],
    "rope_theta": [0, -1, "x", float("nan"), float("inf"), None, True],
    "rms_norm_eps": [float("nan"), 0, -1e-5, "1e-5", None, True],
    "hidden_act": ["nonsense", "gelu", 5, None],
    "dtype": [5, "float999", "torch.bfloat16", True],
    "torch_dtype": [5, "float999"],
    "rope_scaling": [
        5, [], "linear", {"rope_type": 7}, {"type": "linear"}, {"rope_type": "llama3", "factor": 2.0},
        {"rope_type": "yarn", "factor": "x"}, {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": 0.5}, {"rope_type": "linear", "factor": 1e300},
        {"rope_type": "nonsense"}, {"rope_type": "dynamic"}, {"rope_theta": None},
        {"full_attention": {"rope_type": "default"}}, {"rope_type": "longrope"},
    ],
    "rope_parameters": [5, {"rope_theta": "x"}, {"rope_theta": 0}],
    "partial_rotary_factor": [0, 2, "x"],
    "logit_scale": ["x", 0, None, float("nan")],
    "quantization_config": [5, [], "gptq"],
    "auto_map": [5, "x.Y", []],
    "layer_types": [5, "full_attention", ["full_attention"] * 2, [5]],
    "architectures": [5, None, [], "LlamaForCausalLMEagle3", [5], {}],
    "model_type": [5, ["llama"]],
    "eagle_config": [5, [], {"use_aux_hidden_state": "x"}, {"use_aux_hidden_state": None},
                     {"eagle_aux_hidden_state_layer_ids": ["1", 2, 3]}],
    "eagle_aux_hidden_state_layer_ids": [5, "123", [True, 2, 4], [1.0, 2, 4]],
    "num_aux_hidden_states": [0, "3", 10**9],
    "target_hidden_size": [None, 0, "128"],
    "fc_norm": [1, "yes"],
    "norm_output": [1, "no"],
    "norm_before_residual": [0],
    "norm_before_fc": ["x"],
    "attention_bias": ["x", None],
    "tie_word_embeddings": ["x", 0],
    # Keys that only transformers reads.
    "use_cache": [5],
    "initializer_range": ["x"],
    "attention_dropout": ["x"],
    "pad_token_id": ["x"],
    "speculators_model_type": [5, "peagle"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_config_field(head: Path, key: str, value: Any) -> None:
    assert_refused(with_config(head, **{key: value}), key.split("_")[-1].split(".")[0], str(head))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000}, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": None}},
        {"head_dim": None}, {"num_key_value_heads": 1, "eagle_config": None},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": None, "use_aux_hidden_state": True}},
        {"dtype": None, "torch_dtype": "bfloat16"}, {"quantization_config": None, "auto_map": None},
        {"auto_map": {"AutoModel": "x.Y"}}, {"layer_types": ["full_attention"]},
        {"source": 5, "anything": [[[]]], "norm_output": None, "num_aux_hidden_states": None},
        {"model_type": "vllms_own"},
    ],
)  # fmt: skip
def test_configs_that_work(head: Path, changes: dict[str, Any]) -> None:
    assert reason(with_config(head, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, None),
        ({"norm_before_fc": True, "fc_norm": False}, None),
        ({"transformer_layer_config": 5}, ["found 5 for transformer_layer_config"]),
        ({"transformer_layer_config": {"model_type": ["x"]}}, ["model_type ['x']", "'qwen3'"]),
        ({"norm_output": "x"}, ["'x' (str) for norm_output", "true, false"]),
        ({"draft_vocab_size": "256"}, ["'256' (str) for draft_vocab_size"]),
        ({"transformer_layer_config": {}}, ["found nothing for hidden_size"]),
    ],
)
def test_speculators_config(head: Path, changes: dict[str, Any], parts: list[str] | None) -> None:
    (head / "config.json").write_text(json.dumps({**SPECULATORS, **changes}))
    if parts is None:
        assert reason(head) is None
    else:
        assert_refused(head, *parts)


@pytest.mark.parametrize("kind", ["yarn", "deepseek_yarn"])
def test_a_rotary_table_that_ends_before_the_engines_requests(head: Path, kind: str) -> None:
    """Others are as long as the target's positions, whatever max_position_embeddings says."""
    rope = {"rope_type": kind, "factor": 1.5, "original_max_position_embeddings": 64}
    with_config(head, rope_scaling=rope)
    found = reason(head, max_model_len=97)
    assert found and "found rotary positions up to 96 in" in found
    assert found.endswith("allowed: up to max_model_len 97")
    assert reason(head, max_model_len=96) is None
    with_config(head, rope_scaling=None, max_position_embeddings=64)
    assert reason(head, max_model_len=97) is None
