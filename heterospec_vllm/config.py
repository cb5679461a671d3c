# SPDX-License-Identifier: Apache-2.0
"""The options of the plugin, each declared once: its type, default, meaning and check.

`HeteroSpecConfig` is what a user writes after `--speculative-config`; `RequestOptions` is what a
client may send in `vllm_xargs`. Both reject unknown keys by name. This module imports neither vLLM
nor torch, so that the plugin stays light to load.
"""

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PolicyName = Literal["plain", "chain", "static", "paper", "marginal"]
POLICIES: tuple[PolicyName, ...] = ("plain", "chain", "static", "paper", "marginal")

# Which node ends the meta-path: "A" the deepest one of highest path probability, "B" the deepest one whose own
# (local) probability is highest, as the paper's formula is printed.
MetaPathReading = Literal["A", "B"]

METHOD = "heterospec"
# `model` value that means the head shipped with the package for the embedded demo target.
BUILTIN_HEAD = "builtin:smollm2-135m"
MAX_NODES = 63
MAX_DEPTH = 16  # most levels that `max_depth` may ask for
MOST_LEVELS = MAX_DEPTH + MAX_DEPTH // 2  # `paper` goes on for up to half as many more
# Where the scheduler tells the worker how a request's reasoning is parsed, among `SamplingParams.extra_args`.
REASONING_ARGUMENT = "_heterospec_reasoning"
# The scheduler that this plugin names to vLLM: drafts of requests with a grammar stay whole.
WHOLE_DRAFTS_SCHEDULER = "heterospec_vllm.runners.scheduler.HeteroSpecScheduler"
# What the command line puts in place of a file's content until the engine config is built.
CONFIG_FILE_KEY = "heterospec_config_file"

_Options = TypeVar("_Options", bound=BaseModel)

_ASSETS = Path(__file__).parent / "assets"


class HeteroSpecConfig(BaseModel):
    """The speculative config of the method `heterospec`; immutable, picklable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["heterospec"] = Field(description="Selects this plugin.")
    model: Annotated[str, Field(min_length=1)] = Field(
        description="The EAGLE-3 head that drafts. A relative path is looked up beside the config "
        f"file first, then in the working directory; `{BUILTIN_HEAD}` is the head shipped with "
        "the package for the demo target.",
        json_schema_extra={"allowed": "the folder or the Hugging Face id of an EAGLE-3 head"},
    )
    policy: PolicyName = Field(
        default="marginal",
        description="What decides the tree of each request: `plain` drafts nothing, `chain` one "
        "path of `max_depth` tokens, `static` the same tree bounds for every request, `paper` "
        "HeteroSpec's formulas, `marginal` whatever earns the most tokens a second now.",
    )
    num_speculative_tokens: int = Field(
        default=16,
        ge=1,
        le=MAX_NODES,
        description="Most draft nodes verified for one request in one step.",
    )
    max_depth: int = Field(
        default=6,
        ge=1,
        le=MAX_DEPTH,
        description="Most draft levels, so the longest path of a tree; `paper` goes on for up to "
        "half as many more where the draft is certain.",
    )
    top_k: int = Field(
        default=8,
        ge=1,
        le=16,
        description="Children considered for each expanded node, and nodes expanded in a level.",
    )
    profile: str | None = Field(
        default=None,
        description="Calibration profile of this (target, head) pair, written by `heterospec "
        "calibrate`. A relative path is looked up like `model`. Without one a profile that comes "
        "with the package is used if it fits; otherwise `marginal` learns from its own steps.",
        json_schema_extra={"allowed": "the path of a profile, or null"},
    )
    packed_linears: bool = Field(
        default=True,
        description="CPU only: the target's linear layers go through our matmul kernel where it is "
        "the faster one; `false` leaves them to vLLM. Both round in their own ways.",
    )
    paper_first_index: Literal[0, 1] = Field(
        default=0,
        description="`paper` only: the number of the lowest stratum in its formulas, which the "
        "paper leaves open.",
    )
    meta_path: Literal["A", "B"] = Field(
        default="A",
        description="`paper` only: the meta-path ends in the deepest node of highest path "
        "probability (`A`) or of highest own probability (`B`).",
    )

    @property
    def num_lookahead_tokens(self) -> int:
        """The `num_speculative_tokens` handed to vLLM: KV slots past the root, one per node.

        It does not depend on the policy, which may change while the engine runs. A tree of depth
        d over a frontier of k nodes with k children each has at most k + (d - 1) * k * k nodes.
        """
        most_nodes = self.top_k + (self.max_depth - 1) * self.top_k**2
        return min(self.num_speculative_tokens, most_nodes)


class RequestOptions(BaseModel):
    """What one request may ask for in `vllm_xargs` (`SamplingParams.extra_args` in Python)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    heterospec: Literal["on", "off"] = Field(
        default="on", description="`off` decodes this request without speculation."
    )
    heterospec_max_nodes: Annotated[int, Field(ge=0, le=MAX_NODES)] | None = Field(
        default=None,
        description="Most draft nodes verified for this request in one step; it can only lower "
        "the engine's own limit.",
    )

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Reads the keys that start with `heterospec` and ignores everybody else's.

        Raises ValueError, one sentence a fault, for an unknown key or a wrong value.
        """
        ours = {k: v for k, v in (extra_args or {}).items() if k.startswith(METHOD)}
        return _validated(cls, ours, "vllm_xargs")


class ConfigCarrier(str):
    """Our config as a value of vLLM's `additional_config`.

    vLLM hashes that dict as JSON into its compile cache key. As a string that names only what changes
    the compiled graph, all policies share one compilation, while whatever else the user put there
    keeps its effect.
    """

    config: HeteroSpecConfig

    metrics_folder: str | None  # where the worker writes its metrics

    def __new__(
        cls, config: HeteroSpecConfig, metrics_folder: str | None = None
    ) -> "ConfigCarrier":
        text = f"{METHOD} with packed linears" if config.packed_linears else METHOD
        carrier = super().__new__(cls, text)
        carrier.config = config
        carrier.metrics_folder = metrics_folder
        return carrier

    def __getnewargs__(self) -> tuple[HeteroSpecConfig, str | None]:  # type: ignore[override]
        return (self.config, self.metrics_folder)


def from_vllm_config(vllm_config: Any) -> HeteroSpecConfig | None:
    """Our config of an engine, or None where it runs without this plugin."""
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, Mapping):
        return None
    carrier = additional_config.get(METHOD)
    return carrier.config if isinstance(carrier, ConfigCarrier) else None


def metrics_folder_of(vllm_config: Any) -> Path | None:
    """Where the worker writes its metrics, or None for an engine without metrics."""
    carrier = vllm_config.additional_config.get(METHOD)
    return Path(carrier.metrics_folder) if carrier is not None and carrier.metrics_folder else None


@dataclass(frozen=True)
class ConfigSource:
    """Options as the user wrote them, before validation."""

    options: dict[str, Any]
    file: Path | None  # where they were read, for relative paths and for messages


def find_source(speculative_config: Any, spec_flags: Mapping[str, Any]) -> ConfigSource | None:
    """The options given for our method, or None where another method or none was asked for.

    Args:
        speculative_config: what vLLM holds after its argument parser: a dict, ours with
            `CONFIG_FILE_KEY` where a path was given, or None. It is not changed.
        spec_flags: vLLM's `--spec-*` flags by the key that each sets; None where not given.

    Raises ValueError for an unusable file, a value that is not an object, or a key set twice.
    """
    flags = {key: value for key, value in spec_flags.items() if value is not None}
    if speculative_config is None:
        speculative_config = {}
    if not isinstance(speculative_config, Mapping):
        raise ValueError(
            f"speculative_config: found {_shown(speculative_config)}, "
            "allowed: a JSON object or the path of a JSON file"
        )
    options = {str(key).replace("-", "_"): value for key, value in speculative_config.items()}
    file = None
    if CONFIG_FILE_KEY in options:
        file = Path(options.pop(CONFIG_FILE_KEY))
        if options:
            # vLLM merges the config of a speculators checkpoint given as MODEL into ours.
            raise ValueError(
                f"speculative_config: found the file {file} for a MODEL that is itself a draft "
                "head, allowed: the target as MODEL and the head as 'model' in that file"
            )
        content = read_json_object(file, "speculative_config")
        options = {key.replace("-", "_"): value for key, value in content.items()}
    elif METHOD not in (options.get("method"), flags.get("method")):
        return None
    for key, value in flags.items():
        if key in options:
            raise ValueError(
                f"speculative_config.{key}: found it twice, here and as a --spec-* flag, "
                "allowed: one of them"
            )
        options[key] = value
    return ConfigSource(options, file)


def parse(source: ConfigSource) -> HeteroSpecConfig:
    """Validates options; local paths in the result are absolute.

    Raises ValueError: for each fault one sentence with the key, what was found, what is allowed.
    """
    options = dict(source.options)
    for key in ("model", "profile"):
        if isinstance(options.get(key), os.PathLike):
            options[key] = os.fspath(options[key])
        if isinstance(options.get(key), str) and options[key]:
            options[key] = _local_path(options[key], source.file)
    return _validated(HeteroSpecConfig, options, "speculative_config", source.file)


def read_json_object(path: Path, field: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the field, the file and its fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except OSError as error:
        found = f"no readable file ({error.strerror})"
    except UnicodeDecodeError:
        found = "bytes that are not UTF-8 text"
    except json.JSONDecodeError as error:
        found = f"invalid JSON ({error})"
    except RecursionError:
        found = "brackets nested too deeply"
    except ValueError as error:
        found = str(error)
    else:
        if isinstance(content, dict):
            return content
        found = _shown(content)
    raise ValueError(f"{field}: found {found} at {path}, allowed: a file with a JSON object")


def recognise_path(parse_json: Callable[[str], Any], text: str) -> Any:
    """The value of a `--speculative-config` argument: a path is only marked, not read.

    argparse drops the message of a type that raises, so reading waits until the engine config
    is built. What is no path goes to vLLM's own parser.
    """
    is_json = text.lstrip()[:1] in ("", "{", "[", '"')
    if not is_json and (text.endswith(".json") or os.sep in text or os.path.exists(text)):
        return {CONFIG_FILE_KEY: os.path.abspath(os.path.expanduser(text))}
    return parse_json(text)


def allowed_values(model: type[BaseModel], key: str) -> str:
    """What a key may hold, in words, from the field that declares it."""
    field = model.model_fields[key]
    if isinstance(field.json_schema_extra, dict) and "allowed" in field.json_schema_extra:
        return str(field.json_schema_extra["allowed"])
    kind, bounds = field.annotation, field.metadata
    for member in get_args(kind):  # Optional[Annotated[int, ...]]
        if get_origin(member) is Annotated:
            kind, bounds = get_args(member)[0], get_args(member)[1].metadata
    if get_origin(kind) is Literal:
        return ", ".join(repr(value) for value in get_args(kind))
    if kind is bool:
        return "true, false"
    assert kind is int, f"{key} has no words for what it allows"
    low = next(bound.ge for bound in bounds if hasattr(bound, "ge"))
    high = next(bound.le for bound in bounds if hasattr(bound, "le"))
    return f"an integer from {low} to {high}"


def _validated(
    model: type[_Options], options: dict[str, Any], where: str, file: Path | None = None
) -> _Options:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        suffix = f" (in {file})" if file else ""
        faults = [_sentence(model, fault, where) for fault in error.errors()]
        raise ValueError("\n".join(f"{fault}{suffix}" for fault in faults)) from None


def _sentence(model: type[BaseModel], fault: Any, where: str) -> str:
    key = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        keys = list(model.model_fields)
        close = difflib.get_close_matches(key, keys, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        return f"{where}: found the unknown key '{key}'{hint}, allowed: {', '.join(keys)}"
    found = "nothing" if fault["type"] == "missing" else _shown(fault["input"])
    return f"{where}.{key}: found {found}, allowed: {allowed_values(model, key)}"


def _shown(value: Any) -> str:
    """A value with its type, short enough for one line of a message."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _local_path(value: str, file: Path | None) -> str:
    """An existing path made absolute; anything else (a Hugging Face id) as it is."""
    if value == BUILTIN_HEAD:
        return str(_ASSETS / "head")
    path = Path(value).expanduser()
    candidates = [file.parent / path, path] if file else [path]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    return os.path.abspath(found) if found else value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' twice")
    return content
