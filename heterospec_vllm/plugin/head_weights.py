# SPDX-License-Identifier: Apache-2.0
"""Which weights a head may have: what vLLM's EAGLE-3 classes load, in the shapes that its config.json says.

Known before any weight is loaded, from the headers of its files. vLLM loads a head after the target, stops at a name or
shape that it does not know, and leaves a matrix that is missing as memory was. Our kernels follow `d2t` unchecked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heterospec_vllm.errors import shown
from heterospec_vllm.plugin.checks import TargetFacts
from heterospec_vllm.plugin.head import FIELD
from heterospec_vllm.plugin.head_schema import HeadConfig
from heterospec_vllm.plugin.weights_header import StoredTensor, is_number_type, stored_tensors

# Formats in which vLLM reads the files that `stored_tensors` does.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
# The speculators library trains beside frozen copies of the target's weights, and some exports keep them.
_VERIFIERS = "verifier_"
# Parts of names that vLLM passes over.
_IGNORED = (
    "t2d",
    "mask_hidden",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
_FLOATS = ("F64", "F32", "F16", "BF16")

Shape = tuple[int | None, ...]  # None where config.json leaves a size open


def misfit_reason(folder: Path, head: HeadConfig, target: TargetFacts) -> str | None:
    """Why vLLM or our kernels cannot use the weights in a head's folder, or None where they can."""
    # NVIDIA's ModelOpt describes its weights in a file of its own.
    quantized = bool(head.quantization_config) or (folder / "hf_quant_config.json").exists()
    try:
        stored = stored_tensors(folder)
    except ValueError as error:
        return f"{FIELD}: {error}"
    return misfit_of(stored, head, target, quantized)


def misfit_of(
    stored: Mapping[str, StoredTensor], head: HeadConfig, target: TargetFacts, quantized: bool
) -> str | None:
    """As `misfit_reason`, of tensors by their names in the files."""
    reason = next(_misfits(stored, head, target, quantized), None)
    return reason and f"{FIELD}: {reason}"


def is_verifiers_copy(name: str) -> bool:
    """Whether a weight is the target's, which vLLM's classes do not know and nobody needs."""
    return name.startswith(_VERIFIERS)


def _misfits(
    stored: Mapping[str, StoredTensor], head: HeadConfig, target: TargetFacts, quantized: bool
) -> Iterator[str]:
    matrices, norms = dict(_matrices(head)), dict(_norms(head))
    found = {}
    for name, tensor in stored.items():
        if _is_ignored(name, head):
            continue
        if "d2t" in name:
            yield from _draft_ids_misfits(name, tensor, head, target)
            continue
        known = name.replace("midlayer.", "layers.0.", 1) if "lm_head" not in name else name
        found[known] = tensor
        module = known.removesuffix(".weight")
        if known != module and module in (matrices if not quantized else norms) | norms:
            yield from _shape_misfits(name, tensor, (matrices | norms)[module])
        elif known.removesuffix(".bias") in (_biases(head) if not quantized else ()):
            shape = matrices[known.removesuffix(".bias")]
            yield from _shape_misfits(name, tensor, shape[:1])
        elif not _is_taken(known, {**matrices, **norms}, quantized):
            yield _unknown(name, tensor)
    if not quantized:
        yield from _missing(found, stored, head, target)


def _is_ignored(name: str, head: HeadConfig) -> bool:
    if is_verifiers_copy(name) or any(part in name for part in _IGNORED):
        return True
    return not _norms_before_fc(head) and "input_norm." in name


def _is_taken(known: str, modules: Mapping[str, Shape], quantized: bool) -> bool:
    """Whether vLLM takes or passes over a name that is no plain weight of a module."""
    parent, _, last = known.rpartition(".")
    if last == "bias":
        return parent in modules or any(name.startswith(f"{parent}.") for name in modules if parent)
    # Scales, zero points, packed weights: every method has its own.
    return quantized and (
        any(known.startswith(f"{name}.") for name in modules) or known.startswith("layers.")
    )


def _unknown(name: str, tensor: StoredTensor) -> str:
    return (
        f"found the weight {shown(name)} in {tensor.file}, allowed: "
        "those that vLLM's EAGLE-3 class loads for this config.json"
    )


def _shape_misfits(name: str, tensor: StoredTensor, shape: Shape) -> Iterator[str]:
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        allowed = " x ".join("any" if size is None else str(size) for size in shape)
        yield (
            f"found {shown(name)} of {' x '.join(map(str, tensor.shape)) or 'one number'} "
            f"in {tensor.file}, allowed: {allowed}, as config.json says"
        )
    if tensor.dtype not in _FLOATS:
        yield (
            f"found {shown(name)} in {shown(tensor.dtype)} in {tensor.file}, "
            f"allowed: {', '.join(_FLOATS)}, for config.json names no quantization"
        )


def _draft_ids_misfits(
    name: str, tensor: StoredTensor, head: HeadConfig, target: TargetFacts
) -> Iterator[str]:
    """`d2t` holds what is added to a draft token to get the target's."""
    count = head.draft_vocab_size or head.vocab_size
    if name != "d2t":
        yield _unknown(name, tensor)
    elif count == target.vocab_size:
        yield (
            f"found 'd2t' in {tensor.file}, allowed: none, "
            f"for its draft vocabulary is the target's {count} tokens"
        )
    elif tensor.shape != (count,):
        yield (
            f"found 'd2t' of {' x '.join(map(str, tensor.shape)) or 'one number'} "
            f"in {tensor.file}, allowed: {count}, the draft vocabulary"
        )
    elif not is_number_type(tensor.dtype):
        yield f"found 'd2t' in {shown(tensor.dtype)} in {tensor.file}, allowed: integers"
    else:
        yield from _index_misfits(tensor, count, target.vocab_size)


def _index_misfits(tensor: StoredTensor, count: int, vocab_size: int) -> Iterator[str]:
    import numpy as np  # not at the top: vLLM's plugins are imported by every process

    offsets = tensor.read()
    # Compared before they are added, for the sum of a draft token and any int64 may wrap.
    inside = (offsets >= -count) & (offsets < vocab_size)
    whole = np.where(inside, offsets, 0).astype(np.int64)
    tokens = whole + np.arange(count)
    inside &= (tokens >= 0) & (tokens < vocab_size) & (whole == offsets)
    if not inside.all():
        wrong = int(np.argmin(inside))
        yield (
            f"found {shown(offsets[wrong].item())} for token {wrong} in 'd2t' of {tensor.file}, "
            f"allowed: {-wrong} to {vocab_size - 1 - wrong}, a token of the target's"
        )
        return
    order = np.argsort(tokens, kind="stable")
    twice = np.flatnonzero(np.diff(tokens[order]) == 0)
    if twice.size:
        first, second = (int(i) for i in order[twice[0] : twice[0] + 2])
        yield (
            f"found the target's token {int(tokens[first])} for the tokens {first} and {second} "
            f"in 'd2t' of {tensor.file}, allowed: another one for each"
        )


def _missing(
    found: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    head: HeadConfig,
    target: TargetFacts,
) -> Iterator[str]:
    needed = [f"layers.{i}.{name}" for i in range(head.num_hidden_layers) for name in _IN_LAYER]
    needed.append("fc")
    if head.hidden_size != target.hidden_size:
        needed.append("embed_tokens")  # else the target's is taken
    if "d2t" in stored:
        needed.append("lm_head")  # the target's has another order
    for module in needed:
        parent, _, name = module.rpartition(".")
        fused = f"{parent}.{_FUSED[name]}.weight" if name in _FUSED else ""
        if f"{module}.weight" not in found and fused not in found:
            folder = next((tensor.file.parent for tensor in stored.values()), "its files")
            yield f"found no '{module}.weight' in {folder}, allowed: a head that has it"


# Matrices that vLLM joins, and the name under which a file may hold them joined.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
_IN_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)


def _matrices(head: HeadConfig) -> Iterator[tuple[str, Shape]]:
    """Every matrix of vLLM's EAGLE-3 Llama and Qwen3 classes, [outputs, inputs]."""
    hidden, dim, inner = head.hidden_size, head.head_size, head.intermediate_size
    queries = head.num_attention_heads * dim
    keys = (head.num_key_value_heads or head.num_attention_heads) * dim
    both = None if inner is None else 2 * inner
    for i in range(head.num_hidden_layers):
        inputs = hidden if i else 2 * hidden  # the first reads the token beside the hidden state
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        yield f"{attention}q_proj", (queries, inputs)
        yield f"{attention}k_proj", (keys, inputs)
        yield f"{attention}v_proj", (keys, inputs)
        yield f"{attention}qkv_proj", (queries + 2 * keys, inputs)
        yield f"{attention}o_proj", (hidden, queries)
        yield f"{mlp}gate_proj", (inner, hidden)
        yield f"{mlp}up_proj", (inner, hidden)
        yield f"{mlp}gate_up_proj", (both, hidden)
        yield f"{mlp}down_proj", (hidden, inner)
    yield "fc", (hidden, head.num_aux * head.aux_size)
    yield "embed_tokens", (head.vocab_size, hidden)
    yield "lm_head", (head.draft_vocab_size or head.vocab_size, hidden)


def _norms(head: HeadConfig) -> Iterator[tuple[str, Shape]]:
    for i in range(head.num_hidden_layers):
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            yield f"layers.{i}.{name}", (head.hidden_size,)
        if head.is_qwen3:
            yield f"layers.{i}.self_attn.q_norm", (head.head_size,)
            yield f"layers.{i}.self_attn.k_norm", (head.head_size,)
    yield "norm", (head.hidden_size,)
    if head.fc_norm:
        for i in range(head.num_aux):
            yield f"fc_norm.{i}", (head.aux_size,)
    if _norms_before_fc(head):
        yield "input_norm", (head.num_aux * head.aux_size,)


def _norms_before_fc(head: HeadConfig) -> bool:
    nested = head.eagle_config.norm_before_fc
    given = "norm_before_fc" in head.eagle_config.model_fields_set
    return bool(nested if given else head.norm_before_fc)


def _biases(head: HeadConfig) -> set[str]:
    """Matrices with a bias; vLLM passes over those of others."""
    names = []
    if head.attention_bias:
        names += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")]
        names += [] if head.is_qwen3 else ["self_attn.o_proj"]
    if head.mlp_bias and not head.is_qwen3:
        names += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")]
    return {f"layers.{i}.{name}" for i in range(head.num_hidden_layers) for name in names}
