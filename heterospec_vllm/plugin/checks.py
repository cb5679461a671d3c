# SPDX-License-Identifier: Apache-2.0
"""Which targets and engines the plugin can serve: a pure function over small records.

It runs while the engine config is built, so before any weight is loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Names that model configs have for a layer that attends to the whole context.
FULL_ATTENTION = ("full_attention", "attention")
PLATFORMS = ("cpu", "cuda", "rocm")
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TargetFacts:
    """A target model, as its config and its vLLM model class describe it."""

    architecture: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    head_size: int
    exposes_aux_hidden_states: bool = True
    generates: bool = True
    hybrid: bool = False
    attention_free: bool = False
    mla: bool = False
    mrope: bool = False
    alibi: bool = False
    encoder_decoder: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_sinks: bool = False
    soft_cap: float | None = None
    prompt_embeds: bool = False
    logits_processors: bool = False


@dataclass(frozen=True)
class EngineFacts:
    """What an engine was asked to do with a target."""

    target: TargetFacts
    platform: str = "cpu"
    worker_cls: str = "auto"
    kv_cache_dtype: str = "auto"
    checkpoint_kv_cache_dtype: str = "auto"  # what `auto` means for the target's checkpoint
    async_scheduling: bool | None = None
    lora: bool = False
    kv_connector: bool = False
    watermark: bool = False
    # Options of vLLM's GPU model runner that a tree's sampler does not know, by name.
    gpu_options: Mapping[str, bool] = field(default_factory=dict)
    parallel_sizes: Mapping[str, int] = field(default_factory=dict)


def unsupported_reason(facts: EngineFacts) -> str | None:
    """Why trees cannot be verified on this engine, as one sentence, or None where they can."""
    return next(_engine_reasons(facts), None) or next(
        _target_reasons(facts.target, facts.platform), None
    )


def _engine_reasons(facts: EngineFacts) -> Iterator[str]:
    if facts.platform not in PLATFORMS:
        yield f"device: found the platform {facts.platform}, allowed: {', '.join(PLATFORMS)}"
    if facts.platform != "cpu":
        for name, on in facts.gpu_options.items():
            if on:
                yield f"{name}: found True, allowed: False"
    if facts.worker_cls != "auto":
        yield f"worker_cls: found '{facts.worker_cls}', allowed: none, the plugin brings its own"
    for name, size in facts.parallel_sizes.items():
        if size != 1:
            yield f"{name}: found {size}, allowed: 1"
    if facts.kv_cache_dtype not in KV_CACHE_DTYPES:
        yield (
            f"kv_cache_dtype: found '{facts.kv_cache_dtype}', allowed: {', '.join(KV_CACHE_DTYPES)}"
        )
    elif facts.kv_cache_dtype == "auto" and facts.checkpoint_kv_cache_dtype not in KV_CACHE_DTYPES:
        yield (
            f"kv_cache_dtype: found 'auto', which is '{facts.checkpoint_kv_cache_dtype}' for the target's "
            f"checkpoint (its quantization names a KV cache type), allowed: {', '.join(KV_CACHE_DTYPES)}, "
            "so start with --kv-cache-dtype bfloat16"
        )
    if facts.async_scheduling:
        yield (
            "async_scheduling: found True, allowed: False or unset, "
            "for it fixes the draft length before the tree is known"
        )
    if facts.lora:
        yield "enable_lora: found True, allowed: False"
    if facts.kv_connector:
        yield "kv_transfer_config or kv_offloading_size: found a KV connector, allowed: none"
    if facts.watermark:
        yield "watermark_config: found one, allowed: none"


def has_kv_cache_scheme(quantization: Any) -> bool:
    """Whether a checkpoint's `quantization_config` makes vLLM keep its layers' KV in fp8 by default."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "compressed-tensors"
        and quantization.get("kv_cache_scheme") is not None
    )


def head_size_reason(head_size: int, platform: str) -> tuple[str, str] | None:
    """(found, allowed) of a size that is refused, or None.

    On GPUs a size without a tree kernel means chains, decided when the layers are known.
    """
    from heterospec_vllm.kernels import (
        head_sizes,  # not at the top: every vLLM process imports this module
    )

    if platform != "cpu" or head_size in head_sizes.CPU:
        return None
    return f"head size {head_size}", ", ".join(map(str, head_sizes.CPU))


def _target_reasons(target: TargetFacts, platform: str) -> Iterator[str]:
    model = f"target {target.architecture}"
    if not target.generates:
        yield f"{model}: found a pooling runner, allowed: text generation"
    if target.encoder_decoder:
        yield f"{model}: found an encoder-decoder, allowed: a decoder-only model"
    if target.hybrid or target.attention_free:
        yield (
            f"{model}: found layers with a recurrent state (hybrid or attention-free), "
            "allowed: attention in every layer, for such a state cannot branch"
        )
    if target.mla:
        yield f"{model}: found multi-head latent attention (MLA), allowed: MHA, MQA or GQA"
    if target.mrope:
        yield f"{model}: found M-RoPE positions, allowed: one position a token"
    if target.alibi:
        yield f"{model}: found ALiBi, allowed: rotary or learned positions"
    if target.attention_sinks:
        yield f"{model}: found attention sinks, allowed: none"
    if target.soft_cap:
        yield f"{model}: found an attention soft cap of {target.soft_cap}, allowed: none"
    if target.sliding_window is not None:
        yield (
            f"{model}: found a sliding window of {target.sliding_window}, "
            "allowed: full attention (--disable-sliding-window caps the context instead)"
        )
    other_layers = [kind for kind in target.layer_types if kind not in FULL_ATTENTION]
    if other_layers:
        yield f"{model}: found layers of type {', '.join(other_layers)}, allowed: full_attention"
    fault = head_size_reason(target.head_size, platform)
    if fault is not None:
        yield f"{model}: found {fault[0]}, allowed on CPU: {fault[1]}"
    if target.prompt_embeds:
        yield "enable_prompt_embeds: found True, allowed: False"
    if target.logits_processors:
        yield "logits_processors: found custom ones, allowed: none"
    if not target.exposes_aux_hidden_states:
        yield (
            f"{model}: found no aux hidden states, allowed: a model class with vLLM's "
            "SupportsEagle3 interface"
        )
