# SPDX-License-Identifier: Apache-2.0
"""The table of what cannot be served, one changed fact at a time."""

from dataclasses import fields, replace
from typing import Any

import pytest

from heterospec_vllm.plugin.checks import EngineFacts, TargetFacts, unsupported_reason

TARGET = TargetFacts(
    architecture="LlamaForCausalLM",
    hidden_size=576,
    vocab_size=49152,
    num_hidden_layers=30,
    head_size=64,
    layer_types=("full_attention",),
)
ENGINE = EngineFacts(target=TARGET, parallel_sizes={"tensor_parallel_size": 1})

TARGET_FAULTS: dict[str, tuple[Any, str]] = {
    "head_size": (80, "head size 80, allowed on CPU: 64, 96, 128"),
    "exposes_aux_hidden_states": (
        False,
        "no aux hidden states, allowed: a model class with vLLM's SupportsEagle3",
    ),
    "generates": (False, "a pooling runner"),
    "hybrid": (True, "a recurrent state"),
    "attention_free": (True, "a recurrent state"),
    "mla": (True, "(MLA)"),
    "mrope": (True, "M-RoPE"),
    "alibi": (True, "ALiBi"),
    "encoder_decoder": (True, "an encoder-decoder"),
    "sliding_window": (4096, "a sliding window of 4096"),
    "layer_types": (("chunked_attention", "full_attention"), "layers of type chunked_attention"),
    "attention_sinks": (True, "attention sinks"),
    "soft_cap": (50.0, "an attention soft cap of 50.0"),
    "prompt_embeds": (True, "enable_prompt_embeds: found True"),
    "logits_processors": (True, "logits_processors: found custom ones"),
}
ENGINE_FAULTS: dict[str, tuple[Any, str]] = {
    "platform": ("tpu", "device: found the platform tpu, allowed: cpu, cuda, rocm"),
    "worker_cls": ("my.Worker", "worker_cls: found 'my.Worker', allowed: none"),
    "kv_cache_dtype": ("fp8_e5m2", "kv_cache_dtype: found 'fp8_e5m2', allowed: auto, bfloat16"),
    "checkpoint_kv_cache_dtype": (
        "fp8",
        "kv_cache_dtype: found 'auto', which is 'fp8' for the target's checkpoint",
    ),
    "async_scheduling": (True, "async_scheduling: found True"),
    "lora": (True, "enable_lora: found True"),
    "kv_connector": (True, "a KV connector"),
    "watermark": (True, "watermark_config: found one"),
    "parallel_sizes": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: found 2"),
}


def test_supported() -> None:
    assert unsupported_reason(ENGINE) is None
    # A model of ours may be of any shape that its head shares.
    other = replace(TARGET, hidden_size=4096, vocab_size=128256, head_size=128)
    assert unsupported_reason(replace(ENGINE, target=other)) is None


@pytest.mark.parametrize("name", TARGET_FAULTS)
def test_target_fault(name: str) -> None:
    value, expected = TARGET_FAULTS[name]
    reason = unsupported_reason(replace(ENGINE, target=replace(TARGET, **{name: value})))
    assert reason is not None and expected in reason and "allowed" in reason


@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_engine_fault(name: str) -> None:
    value, expected = ENGINE_FAULTS[name]
    reason = unsupported_reason(replace(ENGINE, **{name: value}))
    assert reason is not None and expected in reason and "allowed" in reason


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_plain_kv_dtypes_pass(dtype: str) -> None:
    assert unsupported_reason(replace(ENGINE, kv_cache_dtype=dtype)) is None


def test_every_fact_is_in_a_table() -> None:
    shapes = {"architecture", "hidden_size", "vocab_size", "num_hidden_layers"}
    assert {field.name for field in fields(TargetFacts)} == shapes | set(TARGET_FAULTS)
    found = {field.name for field in fields(EngineFacts)}
    assert found == {"target", "gpu_options", *ENGINE_FAULTS}


def test_options_of_the_gpu_runner_are_refused_on_gpus_only() -> None:
    facts = replace(ENGINE, gpu_options={"enable_dbo": True, "use_fp64_gumbel": False})
    assert unsupported_reason(facts) is None
    reason = unsupported_reason(replace(facts, platform="cuda"))
    assert reason == "enable_dbo: found True, allowed: False"


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_head_sizes_are_left_to_the_backend_on_gpus(platform: str) -> None:
    other = replace(ENGINE, platform=platform, target=replace(TARGET, head_size=80))
    assert unsupported_reason(other) is None
