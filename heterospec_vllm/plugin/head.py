# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 head as its config.json describes it, and whether it fits a target."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from heterospec_vllm.config import read_json_object
from heterospec_vllm.plugin.checks import CPU_HEAD_SIZES, EngineFacts, head_size_allowed

# Heads that are one vLLM EAGLE-3 decoder over tap states of the target.
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM")
# Early EAGLE-3 heads carry their decoder's plain name; the draft vocabulary tells them apart.
_UNMARKED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
# Keys that a config of the speculators library holds outside its decoder's config.
_SPECULATORS_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids")
_NUM_DEFAULT_TAPS = 3
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FIELD = "speculative_config.model"


class _TapConfig(BaseModel):
    """The `eagle_config` of a head's config.json."""

    use_aux_hidden_state: bool = True
    eagle_aux_hidden_state_layer_ids: list[int] | None = None


class HeadConfig(BaseModel):
    """The keys of a head's config.json that must fit the target, under vLLM's names."""

    model_config = ConfigDict(frozen=True)

    architectures: list[str] = []
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    num_attention_heads: PositiveInt
    head_dim: PositiveInt | None = None
    draft_vocab_size: PositiveInt | None = None
    target_hidden_size: PositiveInt | None = None
    num_aux_hidden_states: PositiveInt | None = None
    layer_types: list[str] | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    eagle_config: _TapConfig = _TapConfig()


def load(model: str) -> HeadConfig:
    """The config of a head in a local folder or, through transformers, on the hub.

    Raises ValueError where there is none, it is no EAGLE-3 head, or the folder has no weights.
    """
    if not os.path.isdir(model):
        return parse(_hub_config(model))
    folder = Path(model)
    head = parse(read_json_object(folder / "config.json", _FIELD))
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(
            f"{_FIELD}: found no weights in {folder}, allowed: a folder with *.safetensors or *.bin"
        )
    return head


def parse(config: Mapping[str, Any]) -> HeadConfig:
    """A head from its `config.json`, in vLLM's own or in the speculators library's format.

    vLLM knows the latter by its key `speculators_config`.

    Raises ValueError where it is no EAGLE-3 head, or a key is missing or of the wrong type.
    """
    kind = config.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise ValueError(f"{_FIELD}: found a speculators head of type {kind!r}, allowed: 'eagle3'")
    if kind == "eagle3" and isinstance(config.get("speculators_config"), Mapping):
        decoder = config.get("transformer_layer_config")
        outside = {key: config[key] for key in _SPECULATORS_KEYS if key in config}
        config = {**(decoder if isinstance(decoder, Mapping) else {}), **outside}
    elif not _is_eagle3(config):
        raise ValueError(
            f"{_FIELD}: found the architectures {config.get('architectures')}, "
            f"allowed: {', '.join(ARCHITECTURES)} or a speculators eagle3 head"
        )
    try:
        return HeadConfig.model_validate(config)
    except ValidationError as error:
        raise ValueError("\n".join(map(_sentence, error.errors()))) from None


def misfit_reason(head: HeadConfig, facts: EngineFacts) -> str | None:
    """Why a head cannot draft for an engine's target, as one sentence, or None where it can."""
    reason = next(_misfits(head, facts), None)
    return reason and f"{_FIELD}: {reason}"


def _hub_config(model: str) -> dict[str, Any]:
    if not _HUB_ID.fullmatch(model):
        raise ValueError(f"{_FIELD}: found no folder at '{model}', allowed: an EAGLE-3 head")
    import huggingface_hub
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(
            model, local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE
        )
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{_FIELD}: found '{model}', which is no folder, nor a Hugging Face id that can be "
            f"read from here ({first_line}), allowed: an EAGLE-3 head"
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


def _sentence(fault: Any) -> str:
    key = ".".join(map(str, fault["loc"]))
    found = "nothing" if fault["type"] == "missing" else repr(fault["input"])
    return f"{_FIELD}: found {found} for {key} in the head's config.json: {fault['msg'].lower()}"


def _misfits(head: HeadConfig, facts: EngineFacts) -> Iterator[str]:
    target = facts.target
    tap_size = head.target_hidden_size or head.hidden_size
    if tap_size != target.hidden_size:
        yield (
            f"found a head for hidden size {tap_size}, allowed: {target.hidden_size}, the target's"
        )
    if head.vocab_size != target.vocab_size:
        yield (
            f"found a head for a vocabulary of {head.vocab_size}, "
            f"allowed: {target.vocab_size}, the target's"
        )
    if head.draft_vocab_size and head.draft_vocab_size > target.vocab_size:
        yield (
            f"found a head with a draft vocabulary of {head.draft_vocab_size}, "
            f"allowed: at most {target.vocab_size}, the target's"
        )
    head_size = head.head_dim or head.hidden_size // head.num_attention_heads
    if not head_size_allowed(head_size, facts.platform):
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        yield f"found a head with head size {head_size}, allowed on CPU: {sizes}"
    partial = sorted({kind for kind in head.layer_types or () if kind != "full_attention"})
    if partial:
        # vLLM would give such a head KV blocks of its own.
        yield f"found a head with layers of {', '.join(partial)}, allowed: full_attention"
    if not head.eagle_config.use_aux_hidden_state:
        yield "found use_aux_hidden_state false, allowed: a head that reads tap states"
    yield from _tap_misfits(head, target.num_hidden_layers)


def _tap_misfits(head: HeadConfig, num_layers: int) -> Iterator[str]:
    nested = head.eagle_config.eagle_aux_hidden_state_layer_ids
    # Without a list vLLM takes these of a target that names no layers of its own.
    default = [2, num_layers // 2, num_layers - 3]
    taps = head.eagle_aux_hidden_state_layer_ids or nested or default
    # The head's input is this many hidden states wide, whatever layers are listed.
    expected = head.num_aux_hidden_states or (len(nested) if nested else _NUM_DEFAULT_TAPS)
    if len(taps) != expected:
        yield f"found the tap layers {taps}, allowed: {expected} layers"
    # vLLM taps in layer order, so another order would swap the head's inputs.
    if taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] > num_layers:
        yield (
            f"found the tap layers {taps}, "
            f"allowed: rising layers from 0 to {num_layers}, the target's"
        )
