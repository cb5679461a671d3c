# SPDX-License-Identifier: Apache-2.0
"""Which targets, engines and heads the plugin can serve: pure functions over small records.

They run while the engine config is built, so before any weight is loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Sizes that the CPU tree-attention op is compiled for.
CPU_HEAD_SIZES = (64, 96, 128)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")
# Heads that are one vLLM EAGLE-3 decoder over tap states of the target.
HEAD_ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Qwen3ForCausalLM",
)
# Early EAGLE-3 heads carry their decoder's plain name; the draft vocabulary tells them apart.
_UNMARKED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
_NUM_DEFAULT_TAPS = 3


@dataclass(frozen=True)
class TargetFacts:
    """A target model, as its config and its vLLM model class describe it."""

    architecture: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    head_size: int
    exposes_taps: bool = True
    generates: bool = True
    hybrid: bool = False
    attention_free: bool = False
    mla: bool = False
    mrope: bool = False
    alibi: bool = False
    encoder_decoder: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    soft_cap: float | None = None
    prompt_embeds: bool = False
    logits_processors: bool = False


@dataclass(frozen=True)
class EngineFacts:
    """What an engine was asked to do with a target."""

    target: TargetFacts
    on_cpu: bool = True
    worker_cls: str = "auto"
    kv_cache_dtype: str = "auto"
    async_scheduling: bool | None = None
    lora: bool = False
    kv_connector: bool = False
    parallel_sizes: Mapping[str, int] = field(default_factory=dict)


def unsupported_reason(facts: EngineFacts) -> str | None:
    """Why trees cannot be verified on this engine, as one sentence, or None where they can."""
    return next(_engine_reasons(facts), None) or next(_target_reasons(facts), None)


def _engine_reasons(facts: EngineFacts) -> Iterator[str]:
    if facts.worker_cls != "auto":
        yield f"worker_cls: found '{facts.worker_cls}', allowed: none, the plugin brings its own"
    for name, size in facts.parallel_sizes.items():
        if size != 1:
            yield f"{name}: found {size}, allowed: 1"
    if facts.kv_cache_dtype not in KV_CACHE_DTYPES:
        yield (
            f"kv_cache_dtype: found '{facts.kv_cache_dtype}', allowed: {', '.join(KV_CACHE_DTYPES)}"
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


def _target_reasons(facts: EngineFacts) -> Iterator[str]:
    target = facts.target
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
    if target.soft_cap:
        yield f"{model}: found an attention soft cap of {target.soft_cap}, allowed: none"
    if target.sliding_window is not None:
        yield (
            f"{model}: found a sliding window of {target.sliding_window}, "
            "allowed: full attention (--disable-sliding-window caps the context instead)"
        )
    other_layers = [kind for kind in target.layer_types if kind != "full_attention"]
    if other_layers:
        yield f"{model}: found layers of type {', '.join(other_layers)}, allowed: full_attention"
    if facts.on_cpu and target.head_size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        yield f"{model}: found head size {target.head_size}, allowed on CPU: {sizes}"
    if target.prompt_embeds:
        yield "enable_prompt_embeds: found True, allowed: False"
    if target.logits_processors:
        yield "logits_processors: found custom ones, allowed: none"
    if not target.exposes_taps:
        yield (
            f"{model}: found no tap states, allowed: a model class with vLLM's "
            "SupportsEagle3 interface"
        )


def head_reason(head: Mapping[str, Any], target: TargetFacts) -> str | None:
    """Why a head cannot draft for a target, as one sentence, or None where it can.

    Args:
        head: its `config.json`, in vLLM's own or in the speculators library's format.
    """
    if "speculators_model_type" in head:
        kind = head["speculators_model_type"]
        if kind != "eagle3":
            return f"model: found a speculators head of type '{kind}', allowed: 'eagle3'"
        layer_config = head.get("transformer_layer_config")
        if not isinstance(layer_config, Mapping):
            return "model: found a speculators head without transformer_layer_config"
        head = {**layer_config, **{key: head[key] for key in _SPECULATORS_KEYS if key in head}}
    else:
        found = list(head.get("architectures") or ())
        unmarked = head.get("draft_vocab_size") and set(found) & set(_UNMARKED_ARCHITECTURES)
        if not unmarked and not set(found) & set(HEAD_ARCHITECTURES):
            return (
                f"model: found the architectures {found}, "
                f"allowed: {', '.join(HEAD_ARCHITECTURES)} or a speculators eagle3 head"
            )
    return next(_misfits(head, target), None)


# Keys that a speculators config holds outside its decoder's config, under vLLM's names.
_SPECULATORS_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids")


def _misfits(head: Mapping[str, Any], target: TargetFacts) -> Iterator[str]:
    tap_size = head.get("target_hidden_size") or head.get("hidden_size")
    if tap_size != target.hidden_size:
        yield (
            f"model: found a head for hidden size {tap_size}, "
            f"allowed: {target.hidden_size}, the target's"
        )
    if head.get("vocab_size") != target.vocab_size:
        yield (
            f"model: found a head for a vocabulary of {head.get('vocab_size')}, "
            f"allowed: {target.vocab_size}, the target's"
        )
    draft_vocab_size = head.get("draft_vocab_size") or target.vocab_size
    if not isinstance(draft_vocab_size, int) or not 0 < draft_vocab_size <= target.vocab_size:
        yield (
            f"model: found draft_vocab_size {draft_vocab_size!r}, allowed: 1 to {target.vocab_size}"
        )
    reason = _tap_misfit(head, target.num_hidden_layers)
    if reason:
        yield reason


def _tap_misfit(head: Mapping[str, Any], num_layers: int) -> str | None:
    eagle_config = head.get("eagle_config") or {}
    if not eagle_config.get("use_aux_hidden_state", True):
        return "model: found use_aux_hidden_state false, allowed: a head that reads tap states"
    nested = eagle_config.get("eagle_aux_hidden_state_layer_ids")
    taps = head.get("eagle_aux_hidden_state_layer_ids") or nested
    if not taps:
        # vLLM's default for targets that name no layers of their own.
        taps = [2, num_layers // 2, num_layers - 3]
    # The head's input is this many hidden states wide, whatever layers are listed.
    expected = head.get("num_aux_hidden_states") or (len(nested) if nested else _NUM_DEFAULT_TAPS)
    if len(taps) != expected:
        return f"model: found {len(taps)} tap layers {list(taps)}, allowed: {expected} of them"
    in_range = all(isinstance(tap, int) and 0 <= tap <= num_layers for tap in taps)
    if not in_range or len(set(taps)) < len(taps):
        return (
            f"model: found the tap layers {list(taps)}, "
            f"allowed: different layers from 0 to {num_layers}, the target's"
        )
    return None
