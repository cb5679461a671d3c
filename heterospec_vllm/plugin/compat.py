# SPDX-License-Identifier: Apache-2.0
"""The one version gate, and the one place that reads facts out of vLLM's config objects."""

from typing import Any

from heterospec_vllm.patching import vllm_version as vllm_version
from heterospec_vllm.plugin.checks import EngineFacts, TargetFacts, has_kv_cache_scheme

# The plugin overrides private methods of the model runner, so a version counts only when its
# sources were read. A local part such as "+cpu" does not matter.
TESTED_VERSIONS = ("0.32.0", "0.33.0")

# Config keys by which model classes of vLLM give their attention layers sinks.
_SINK_KEYS = (
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
    "swa_attention_sink_enabled",
)


def version_reason(version: str) -> str | None:
    """Why this vLLM cannot run the plugin, or None."""
    if version.split("+")[0] in TESTED_VERSIONS:
        return None
    return f"vllm: found version {version}, allowed: {' or '.join(TESTED_VERSIONS)}"


def target_facts(model_config: Any) -> TargetFacts:
    """What the target is, from vLLM's ModelConfig; imports its model class but loads no weights."""
    text_config = model_config.hf_text_config
    layer_types = getattr(text_config, "layer_types", None) or ()
    model_class, architecture = model_config.registry.resolve_model_cls(
        model_config.architectures, model_config
    )
    return TargetFacts(
        architecture=architecture,
        hidden_size=model_config.get_hidden_size(),
        vocab_size=model_config.get_vocab_size(),
        num_hidden_layers=model_config.get_total_num_hidden_layers(),
        head_size=model_config.get_head_size(),
        exposes_aux_hidden_states=bool(getattr(model_class, "supports_eagle3", False)),
        generates=model_config.runner_type == "generate",
        hybrid=model_config.is_hybrid or model_config.has_inner_state,
        attention_free=model_config.is_attention_free,
        mla=model_config.use_mla,
        mrope=model_config.uses_mrope,
        alibi=model_config.uses_alibi,
        encoder_decoder=model_config.is_encoder_decoder,
        sliding_window=model_config.get_sliding_window(),
        layer_types=tuple(sorted(set(layer_types))),
        attention_sinks=_has_sinks(text_config, bool(layer_types)),
        soft_cap=getattr(text_config, "attn_logit_softcapping", None),
        prompt_embeds=model_config.enable_prompt_embeds,
        logits_processors=bool(model_config.logits_processors),
    )


def _has_sinks(text_config: Any, has_layer_types: bool) -> bool:
    # Granite checkpoints that list layer types have sinks unless they say otherwise.
    default = has_layer_types and text_config.model_type.startswith("granite")
    return getattr(text_config, "attention_sinks", default) or any(
        getattr(text_config, key, False) for key in _SINK_KEYS
    )


def platform_name() -> str:
    """``cpu``, ``cuda``, ``rocm`` or what vLLM calls another one (it calls ROCm's devices cuda)."""
    from vllm.platforms import current_platform

    return "rocm" if current_platform.is_rocm() else current_platform.device_name


def _checkpoint_kv_cache_dtype(model_config: Any) -> str:
    """What the KV cache type `auto` means for a checkpoint."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    quantization = getattr(model_config.hf_config, "quantization_config", None)
    # For these the attention layers turn `auto` into fp8 themselves.
    if has_kv_cache_scheme(quantization):
        return "fp8"
    return resolve_kv_cache_dtype_string("auto", model_config)


def engine_facts(engine_args: Any, model_config: Any) -> EngineFacts:
    """What the engine was asked to do, from vLLM's EngineArgs."""
    return EngineFacts(
        target=target_facts(model_config),
        platform=platform_name(),
        worker_cls=engine_args.worker_cls,
        kv_cache_dtype=engine_args.kv_cache_dtype,
        checkpoint_kv_cache_dtype=_checkpoint_kv_cache_dtype(model_config),
        async_scheduling=engine_args.async_scheduling,
        lora=engine_args.enable_lora,
        kv_connector=(
            engine_args.kv_transfer_config is not None or engine_args.kv_offloading_size is not None
        ),
        watermark=engine_args.watermark_config is not None,
        gpu_options={
            "enable_dbo": engine_args.enable_dbo,
            "kv_sharing_fast_prefill": engine_args.kv_sharing_fast_prefill,
            "return_sampling_mask": model_config.return_sampling_mask,
            "use_fp64_gumbel": model_config.use_fp64_gumbel,
            "enable_trace_replay": model_config.enable_trace_replay,
        },
        parallel_sizes={
            name: getattr(engine_args, name)
            for name in (
                "pipeline_parallel_size",
                "tensor_parallel_size",
                "data_parallel_size",
                "decode_context_parallel_size",
                "prefill_context_parallel_size",
            )
        },
    )
