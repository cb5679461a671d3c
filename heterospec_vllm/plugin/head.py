# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 head as its config.json describes it, and whether it fits a target."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from heterospec_vllm.errors import faults_of, shown, shown_message, shown_path
from heterospec_vllm.input_files import read_object
from heterospec_vllm.plugin.checks import EngineFacts, has_kv_cache_scheme, head_size_reason
from heterospec_vllm.plugin.head_schema import HeadConfig, contradictions
from heterospec_vllm.plugin.weights_header import weight_files

# Heads that are one vLLM EAGLE-3 decoder over aux hidden states of the target.
# vLLM maps P-EAGLE's names to the same classes, but those heads draft all tokens in one pass.
ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
    "Eagle3Qwen3ForCausalLM",
)
# Early EAGLE-3 heads carry their decoder's plain name; the draft vocabulary tells them apart.
_UNMARKED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
# Keys that a config of the speculators library holds outside its decoder's config.
_SPECULATORS_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids")
# Those of its flags that vLLM takes from there only, and their defaults.
_SPECULATORS_FLAGS = {
    "norm_before_residual": True,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}
_SPECULATORS_ARCHITECTURES = {
    "llama": "Eagle3LlamaForCausalLM",
    "qwen3": "Eagle3Qwen3ForCausalLM",
}
# What transformers takes for a key that is missing.
_DEFAULTS = {
    "llama": {"intermediate_size": 11008},
    "qwen3": {"intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
FIELD = "speculative_config.model"


def load(model: str) -> HeadConfig:
    """The config of a head in a local folder or, through transformers, on the hub.

    Raises ValueError where there is none, it is no EAGLE-3 head, or vLLM could not read it.
    """
    if not os.path.isdir(model):
        return parse(_hub_config(model), model)
    path = Path(model) / "config.json"
    return parse(read_object(path, FIELD), str(path))


def parse(config: Mapping[str, Any], source: str = "the head's config.json") -> HeadConfig:
    """A head from its `config.json`, in vLLM's own or in the speculators library's format.

    vLLM knows the latter by its key `speculators_config`.

    Raises ValueError where it is no EAGLE-3 head, or a key is missing, of the wrong type or out of range.
    """
    kind = config.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise _fault(f"a speculators head of type {shown(kind)}", source, "'eagle3'")
    if kind == "eagle3" and isinstance(config.get("speculators_config"), Mapping):
        content = _of_speculators(config, source)
    elif _is_eagle3(config):
        content = {**_defaults(config), **config}
    else:
        allowed = f"{', '.join(ARCHITECTURES)} or a speculators eagle3 head"
        raise _fault(f"the architectures {shown(config.get('architectures'))}", source, allowed)
    kept = {key: value for key, value in content.items() if key in HeadConfig.model_fields}
    for rope in (kept.get("rope_scaling"), kept.get("rope_parameters")):
        if isinstance(rope, Mapping) and any(isinstance(v, dict) for v in rope.values()):
            raise _fault("rope parameters by layer type", source, "one for all layers")
        if isinstance(rope, Mapping) and "rope_theta" in rope:
            kept.pop("rope_theta", None)  # transformers does not look at it then
    if kept.get("eagle_config", 0) is None:
        del kept["eagle_config"]
    try:
        head = HeadConfig.model_validate({**kept, "source": source})
    except ValidationError as error:
        first = faults_of(error, HeadConfig, kept)[0]
        raise _fault(f"{first.found_with_type} for {first.key}", source, first.allowed) from None
    fault = next(contradictions(head), None)
    if fault is not None:
        raise _fault(fault[0], source, fault[1])
    if kind is None:
        _require_readable(config, source)
    return head


def misfit_reason(head: HeadConfig, facts: EngineFacts) -> str | None:
    """Why a head cannot draft for an engine's target, as one sentence, or None where it can."""
    fault = next(_misfits(head, facts), None)
    return None if fault is None else str(_fault(fault[0], head.source, fault[1]))


def folder_of(model: str) -> Path | None:
    """Where the weights of a head lie on this machine, or None where the hub has to be asked."""
    if os.path.isdir(model):
        return Path(model)
    if not _HUB_ID.fullmatch(model):
        return None
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        weight_files(folder)
    except ValueError:  # not all of them are here yet
        return None
    return folder


def top_k_reason(head: HeadConfig, top_k: int) -> str | None:
    """Why a head has too few tokens for a tree's children, or None."""
    most = head.draft_vocab_size or head.vocab_size
    if top_k <= most:
        return None
    return (
        f"speculative_config.top_k: found {top_k}, "
        f"allowed: at most {most}, the draft vocabulary of {head.source}"
    )


def positions_reason(head: HeadConfig, max_model_len: int) -> str | None:
    """Why positions of a request would lie behind the head's rotary table, which is read unchecked, or None."""
    found = head.num_positions
    if found is None or found >= max_model_len:
        return None
    return str(
        _fault(
            f"rotary positions up to {found}", head.source, f"up to max_model_len {max_model_len}"
        )
    )


def _fault(found: str, source: str, allowed: str) -> ValueError:
    return ValueError(f"{FIELD}: found {found} in {shown_path(source)}, allowed: {allowed}")


def _hub_config(model: str) -> dict[str, Any]:
    if not _HUB_ID.fullmatch(model):
        raise ValueError(f"{FIELD}: found no folder at {shown(model)}, allowed: an EAGLE-3 head")
    import huggingface_hub
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(
            model, local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE
        )
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{FIELD}: found {shown(model)}, which is no folder, nor a Hugging Face id that can be "
            f"read from here ({shown_message(error)}), allowed: an EAGLE-3 head"
        ) from error
    return config


def _is_eagle3(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if any(name in ARCHITECTURES for name in names):
        return True
    return any(name in _UNMARKED_ARCHITECTURES for name in names) and bool(
        config.get("draft_vocab_size")
    )


def _of_speculators(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What vLLM makes of the speculators library's config."""
    decoder = config.get("transformer_layer_config")
    if not isinstance(decoder, Mapping):
        raise _fault(f"{shown(decoder)} for transformer_layer_config", source, "an object")
    model_type = decoder.get("model_type", "llama")
    if model_type not in tuple(_SPECULATORS_ARCHITECTURES):
        raise _fault(f"the model_type {shown(model_type)}", source, "'llama', 'qwen3'")
    outside = {key: config[key] for key in _SPECULATORS_KEYS if config.get(key) is not None}
    flags = {key: config.get(key, default) for key, default in _SPECULATORS_FLAGS.items()}
    architectures = [_SPECULATORS_ARCHITECTURES[model_type]]
    return {**decoder, **outside, **flags, "architectures": architectures}


def _defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    model_type = config.get("model_type")
    return _DEFAULTS.get(model_type, {}) if isinstance(model_type, str) else {}


def _require_readable(config: Mapping[str, Any], source: str) -> None:
    """Builds what transformers makes of a config, for it checks keys that nobody here reads.

    Raises ValueError with the file where vLLM's own attempt would fail with a message that names none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type is None or model_type not in CONFIG_MAPPING:  # vLLM has some of its own
        return
    content = {key: value for key, value in config.items() if key != "model_type"}
    try:
        CONFIG_MAPPING[model_type](**copy.deepcopy(content))
    except (
        StrictDataclassError, ArithmeticError, AttributeError, LookupError, RecursionError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        found = repr(" ".join(str(error).split())[:200])
        raise _fault(found, source, "what transformers can read") from None


def _misfits(head: HeadConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    """(found, allowed) of what does not fit the target."""
    target = facts.target
    if head.aux_size != target.hidden_size:
        yield f"a head for hidden size {head.aux_size}", f"{target.hidden_size}, the target's"
    if head.vocab_size != target.vocab_size:
        yield (
            f"a head for a vocabulary of {head.vocab_size}",
            f"{target.vocab_size}, the target's",
        )
    if head.draft_vocab_size and head.draft_vocab_size > target.vocab_size:
        yield (
            f"a head with a draft vocabulary of {head.draft_vocab_size}",
            f"at most {target.vocab_size}, the target's",
        )
    fault = head_size_reason(head.head_size, facts.platform)
    if fault is not None:
        yield f"a head with {fault[0]}", f"on CPU {fault[1]}"
    partial = sorted({kind for kind in head.layer_types or () if kind != "full_attention"})
    if partial:
        # vLLM would give such a head KV blocks of its own.
        yield f"a head with layers of {shown(', '.join(partial))}", "full_attention"
    if facts.kv_cache_dtype == "auto" and has_kv_cache_scheme(head.quantization_config):
        yield "a kv_cache_scheme, which means fp8", "none, or --kv-cache-dtype bfloat16"
    if not head.eagle_config.use_aux_hidden_state:
        yield "use_aux_hidden_state false", "a head that reads aux hidden states"
    yield from _aux_misfits(head, target.num_hidden_layers)


def _aux_misfits(head: HeadConfig, num_layers: int) -> Iterator[tuple[str, str]]:
    nested = head.eagle_config.eagle_aux_hidden_state_layer_ids
    # Without a list vLLM takes these of a target that names no layers of its own.
    default = [2, num_layers // 2, num_layers - 3]
    taps = head.eagle_aux_hidden_state_layer_ids or nested or default
    if len(taps) != head.num_aux:
        yield f"the aux layers {shown(taps)}", f"{head.num_aux} layers"
    # vLLM taps in layer order, so another order would swap the head's inputs.
    if taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] > num_layers:
        yield (
            f"the aux layers {shown(taps)}",
            f"rising layers from 0 to {num_layers}, the target's",
        )
