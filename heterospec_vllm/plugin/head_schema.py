# SPDX-License-Identifier: Apache-2.0
"""The schema of a head's config.json: every key that vLLM or we read, its type and what it may hold."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_QWEN3 = ("Eagle3Qwen3ForCausalLM", "Qwen3ForCausalLM")
_NUM_DEFAULT_AUX = 3


def _words(allowed: str) -> dict[str, Any]:
    return {"allowed": allowed}


def _size(default: Any = ..., most: int = 2**31 - 1) -> Any:
    return Field(default, ge=1, le=most, json_schema_extra=_words(f"an integer from 1 to {most}"))


def _positive(default: Any = None) -> Any:
    return Field(default, gt=0, allow_inf_nan=False, json_schema_extra=_words("a number above 0"))


def _share() -> Any:
    return Field(None, gt=0, le=1, json_schema_extra=_words("a number above 0, at most 1"))


def _told(allowed: str, default: Any = None) -> Any:
    return Field(default, json_schema_extra=_words(allowed))


_FLAG = "true, false"
_Number = Annotated[float, Field(allow_inf_nan=False)]
_LAYERS = "a list of layer numbers"
_RopeType = Literal[
    "default", "linear", "dynamic", "ntk", "yarn", "llama3", "longrope", "su", "mrope",
    "proportional", "deepseek_yarn", "deepseek_llama_scaling", "bailing_mrope", "openpangu",
    "mllama4",
]  # fmt: skip
_Dtype = Literal[
    "bfloat16", "float16", "float32", "float64", "half", "float", "double",
    "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
# Fields without which vLLM cannot build the rotary embedding of a type.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor",),
    "deepseek_yarn": ("factor", "original_max_position_embeddings"),
    "deepseek_llama_scaling": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),
}


# Types whose table ends where the scaled context does.
_OWN_TABLES = ("yarn", "deepseek_yarn", "deepseek_llama_scaling")
# What transformers takes for max_position_embeddings that is missing, and as many as a table can have.
_DEFAULT_POSITIONS, _MOST_POSITIONS = 2048, 2**24


class _Strict(BaseModel):
    """Keys that are not declared are none of ours; those that are must have their type."""

    model_config = ConfigDict(frozen=True, strict=True)


class _AuxConfig(_Strict):
    """The `eagle_config` of a head's config.json."""

    use_aux_hidden_state: bool = _told(_FLAG, True)
    eagle_aux_hidden_state_layer_ids: list[int] | None = _told(_LAYERS)
    norm_before_fc: bool | None = _told(_FLAG)


class _Rope(_Strict):
    """The `rope_scaling` or `rope_parameters` of a head's config.json."""

    rope_type: _RopeType | None = None
    type: _RopeType | None = None
    rope_theta: float = _positive()
    partial_rotary_factor: float | None = _share()
    factor: float | None = Field(
        None, ge=1, allow_inf_nan=False, json_schema_extra=_words("a number from 1")
    )
    alpha: float | None = _positive()
    low_freq_factor: float | None = _positive()
    high_freq_factor: float | None = _positive()
    original_max_position_embeddings: int | None = _size(None, most=_MOST_POSITIONS)
    short_factor: list[_Number] | None = _told("a list of numbers")
    long_factor: list[_Number] | None = _told("a list of numbers")

    @property
    def kind(self) -> str | None:
        return self.rope_type or self.type

    def num_positions(self, default: int) -> int | None:
        """Rows of the rotary table that vLLM makes, None where they are as many as the target has positions."""
        if self.kind not in _OWN_TABLES or self.factor is None:
            return None
        return int((self.original_max_position_embeddings or default) * self.factor)

    def missing(self) -> str | None:
        """A field without which vLLM cannot build it, or None."""
        if self.kind == "dynamic" and self.alpha is None:
            return "factor" if self.factor is None else None
        fields = _ROPE_FIELDS.get(self.kind or "", ())
        return next((field for field in fields if getattr(self, field) is None), None)


class HeadConfig(_Strict):
    """What vLLM and we read of a head's config.json, under vLLM's names."""

    # Where it was read, for messages: a path or a hub id.
    source: str = ""

    architectures: list[str] = _told("a list of names", [])
    model_type: str | None = _told("a name")
    hidden_size: int = _size()
    vocab_size: int = _size()
    num_attention_heads: int = _size()
    num_hidden_layers: int = _size(most=64)
    num_key_value_heads: int | None = _size(None)
    head_dim: int | None = _size(None)
    intermediate_size: int = _size(None)
    max_position_embeddings: int = _size(None, most=_MOST_POSITIONS)
    draft_vocab_size: int | None = _size(None)
    target_hidden_size: int = _size(None)
    num_aux_hidden_states: int | None = _size(None, most=1024)
    num_aux_layers: int | None = _size(None, most=1024)
    layer_types: list[str] | None = _told("a list of names")
    eagle_aux_hidden_state_layer_ids: list[int] | None = _told(_LAYERS)
    eagle_config: _AuxConfig = _told("an object", _AuxConfig())

    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = _positive()
    rope_theta: float = _positive()
    partial_rotary_factor: float | None = _share()
    rope_scaling: _Rope | None = _told("an object")
    rope_parameters: _Rope | None = _told("an object")
    logit_scale: float = _positive()
    attention_bias: bool | None = _told(_FLAG)
    mlp_bias: bool | None = _told(_FLAG)
    tie_word_embeddings: bool | None = _told(_FLAG)
    norm_before_residual: bool | None = _told(_FLAG)
    norm_before_fc: bool | None = _told(_FLAG)
    fc_norm: bool | None = _told(_FLAG)
    norm_output: bool | None = _told(_FLAG)
    dtype: _Dtype | None = None
    torch_dtype: _Dtype | None = None
    quantization_config: dict[str, Any] | None = _told("an object")
    auto_map: dict[str, Any] | None = _told("an object")

    @property
    def is_qwen3(self) -> bool:
        """Whether vLLM runs it by its Qwen3 class, which norms queries and keys."""
        return any(name in _QWEN3 for name in self.architectures[:1])

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_positions(self) -> int | None:
        """Where its rotary table ends, None where vLLM makes it as long as the target's positions."""
        rope = self.rope_scaling or self.rope_parameters
        positions = self.max_position_embeddings or _DEFAULT_POSITIONS
        return None if rope is None else rope.num_positions(positions)

    @property
    def aux_size(self) -> int:
        """Of the target's hidden states."""
        return self.target_hidden_size or self.hidden_size

    @property
    def num_aux(self) -> int:
        """Hidden states that the head reads, side by side; whatever layers are listed."""
        nested = self.eagle_config.eagle_aux_hidden_state_layer_ids
        stated = self.num_aux_hidden_states
        if self.is_qwen3:
            stated = self.num_aux_layers or stated
            nested = self.eagle_aux_hidden_state_layer_ids or nested
        return stated or (len(nested) if nested else _NUM_DEFAULT_AUX)


def contradictions(head: HeadConfig) -> Iterator[tuple[str, str]]:
    """(found, allowed) of keys that do not go together."""
    heads, kv_heads = head.num_attention_heads, head.num_key_value_heads
    if head.hidden_size % heads and head.head_dim is None:
        yield f"{heads} for num_attention_heads", f"a divisor of hidden_size {head.hidden_size}"
    if kv_heads is not None and heads % kv_heads:
        yield f"{kv_heads} for num_key_value_heads", f"a divisor of num_attention_heads {heads}"
    types = head.layer_types
    if types is not None and len(types) != head.num_hidden_layers:
        yield f"{len(types)} layer_types", f"{head.num_hidden_layers}, its num_hidden_layers"
    for key in ("rope_scaling", "rope_parameters"):
        rope = getattr(head, key)
        missing = rope and rope.missing()
        if missing:
            yield f"{key} of type '{rope.kind}' without {missing}", "one that has it"
        positions = head.max_position_embeddings or _DEFAULT_POSITIONS
        if (
            rope
            and (rope.original_max_position_embeddings or positions) * (rope.factor or 1)
            > _MOST_POSITIONS
        ):
            yield f"{key}.factor {rope.factor}", f"at most {_MOST_POSITIONS} positions in all"
