# SPDX-License-Identifier: Apache-2.0
"""The options of the plugin, each declared once: its type, default, meaning and check.

`HeteroSpecConfig` is what a user writes after `--speculative-config`; `RequestOptions` is what a
client may send in `vllm_xargs`. Both reject unknown keys by name. This module imports neither vLLM
nor torch, so that the plugin stays light to load.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heterospec_vllm import errors, input_files
from heterospec_vllm.errors import shown, shown_name, shown_path
from heterospec_vllm.input_files import read_object

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
    paper_first_index: Annotated[Literal[0, 1], errors.WHOLE] = Field(
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
        json_schema_extra={"allowed": f"an integer from 0 to {MAX_NODES}"},
    )

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Reads the keys that start with `heterospec` and ignores everybody else's.

        Raises ValueError, one sentence a fault, for an unknown key or a wrong value.
        """
        if not isinstance(extra_args, Mapping | None):
            found = f"{shown(extra_args)} ({type(extra_args).__name__})"
            raise ValueError(f"vllm_xargs: found {found}, allowed: options by their names")
        for key in extra_args or ():
            if not isinstance(key, str):
                found = f"{shown(key)} ({type(key).__name__})"
                raise ValueError(f"vllm_xargs: found the key {found}, allowed: a text")
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
        found = f"{shown(speculative_config)} ({type(speculative_config).__name__})"
        raise ValueError(
            f"speculative_config: found {found}, allowed: a JSON object or the path of a JSON file"
        )
    options, file = dict(speculative_config), None
    if CONFIG_FILE_KEY in options:
        file = _config_file(options.pop(CONFIG_FILE_KEY))
        if options:
            # vLLM merges the config of a speculators checkpoint given as MODEL into ours.
            raise ValueError(
                f"speculative_config: found the file {shown_path(file)} for a MODEL that is itself a draft "
                "head, allowed: the target as MODEL and the head as 'model' in that file"
            )
        options = read_object(file, "speculative_config")
    elif METHOD not in (options.get("method"), flags.get("method")):
        return None
    options = _by_field(options, file)
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
            options[key] = _local_path(key, options[key], source.file)
    return _validated(HeteroSpecConfig, options, "speculative_config", source.file)


def recognise_path(parse_json: Callable[[str], Any], text: str) -> Any:
    """The value of a `--speculative-config` argument: a path is only marked, not read.

    Reading waits until the engine config is built. What is no path goes to vLLM's own parser.
    """
    is_json = text.lstrip()[:1] in ("", "{", "[", '"')
    if not is_json and (text.endswith(".json") or os.sep in text or os.path.exists(text)):
        return {CONFIG_FILE_KEY: os.path.abspath(os.path.expanduser(text))}
    try:
        value = parse_json(text)
        if isinstance(value, dict) and value.get("method") == METHOD:
            value = input_files.parse(text)  # which sees what is wrong with it, too
    except RecursionError:
        raise argparse.ArgumentTypeError(
            "found brackets nested too deeply, allowed: JSON"
        ) from None
    except input_files.NoJson as error:
        raise argparse.ArgumentTypeError(f"found {error}, allowed: a JSON object") from None
    return value


def allowed_values(model: type[BaseModel], key: str) -> str:
    """What a key may hold, in words, from the field that declares it."""
    return errors.allowed_at(model, (key,))


def _validated(
    model: type[_Options], options: dict[str, Any], where: str, file: Path | None = None
) -> _Options:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        faults = errors.faults_of(error, model, options)
        lines = (f"{_sentence(fault, where)}{_in(file)}" for fault in faults)
        raise ValueError(errors.joined(lines, "\n")) from None


def _sentence(fault: errors.Fault, where: str) -> str:
    if fault.is_unknown_key:
        found = f"the unknown key '{shown_name(fault.path[-1])}'{fault.hint}"
        return f"{where}: found {found}, allowed: {fault.allowed}"
    return f"{where}.{fault.key}: found {fault.found_with_type}, allowed: {fault.allowed}"


def _in(file: Path | None) -> str:
    return f" (in {shown_path(file)})" if file else ""


def _config_file(value: Any) -> Path:
    if not isinstance(value, str):
        found = f"{shown(value)} ({type(value).__name__})"
        raise ValueError(f"speculative_config: found {found}, allowed: the path of a JSON file")
    return Path(value)


def _by_field(written: Mapping[Any, Any], file: Path | None) -> dict[Any, Any]:
    """Options by the names of their fields. Raises ValueError for one that is written in two spellings."""
    options: dict[Any, Any] = {}
    for key, value in written.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name in options:
            raise ValueError(
                f"speculative_config.{shown_name(name)}: found it twice, with dashes and without, "
                f"allowed: one of them{_in(file)}"
            )
        options[name] = value
    return options


def _local_path(key: str, value: str, file: Path | None) -> str:
    """An existing path made absolute; anything else (a Hugging Face id) as it is."""
    if value == BUILTIN_HEAD:
        return str(_ASSETS / "head")
    try:
        path = Path(value).expanduser()
        candidates = [file.parent / path, path] if file else [path]
        found = next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else errors.shown_message(error)
        allowed = allowed_values(HeteroSpecConfig, key)
        raise ValueError(
            f"speculative_config.{key}: found {shown(value)}, which no file can be called ({reason}), "
            f"allowed: {allowed}{_in(file)}"
        ) from None
    return os.path.abspath(found) if found else value
