# SPDX-License-Identifier: Apache-2.0
"""The benchmark's YAML: systems, prompt sets, groups of cells. Every option is declared here once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from heterospec_vllm.bench.rows import Cell, LoadName
from heterospec_vllm.config import HeteroSpecConfig
from heterospec_vllm.errors import clauses_of

MIX = "mix"
# Options of each kind of system with their defaults; None: the option must be given.
KINDS: dict[str, dict[str, int | None]] = {
    "plain": {},
    "eagle3": {"k": None},
    "eagle3 tuned": {},
    "ngram": {"k": 4},
    "off": {},
    "chain": {"k": None},
    "static": {"nodes": 6, "depth": 2, "top": 4},
    "paper": {"nodes": 8, "depth": 3, "top": 4},
    "marginal": {"nodes": 16, "depth": 6, "top": 8},
}
# The fields of our config that an option sets; a chain of k is k nodes at k levels.
FIELDS = {
    "k": ("num_speculative_tokens", "max_depth"),
    "nodes": ("num_speculative_tokens",),
    "depth": ("max_depth",),
    "top": ("top_k",),
}
# vLLM declares no limit for its own chains; its rejection sampler stops at 128 tokens (MAX_SPEC_LEN).
LONGEST_OF_VLLM = 99
PLAIN, OURS, TUNED = "plain", "ours", "eagle3 tuned"
# Nats that separate numeric noise from another answer: a few units in the last place of a logit of about 20.
NEAR_TIES = {"bfloat16": 0.5, "float16": 0.1, "float32": 1e-3}


@dataclass(frozen=True)
class System:
    """One column of the table: an engine and, in ours, the policy it is switched to."""

    name: str
    engine: str
    # of vLLM's config, without the head; `ours` gets its own from all its systems
    speculative_config: dict[str, Any] | None = field(default=None, hash=False)
    policy: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def needs_head(self) -> bool:
        return self.speculative_config is not None and "model" in self.speculative_config


def system_of(name: str) -> System:
    """The system that a name like `static nodes=6 depth=2` stands for; ValueError for an unknown one."""
    words = name.split()
    kind = " ".join(word for word in words if "=" not in word)
    if kind not in KINDS:
        raise ValueError(f"systems: found '{name}', allowed: {', '.join(_shown())}")
    options = dict(KINDS[kind])
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            continue
        number = int(value) if re.fullmatch("[0-9]{1,4}", value) else None
        if key not in options or number not in _range(kind, key):
            allowed = ", ".join(_allowed(kind, option) for option in options) or "no options"
            raise ValueError(f"systems: '{name}': found '{word}', allowed: {allowed}")
        options[key] = number
    missing = [key for key, value in options.items() if value is None]
    if missing:
        raise ValueError(f"systems: '{name}': missing {_allowed(kind, missing[0])}")
    return _build(name, kind, {key: int(value or 0) for key, value in options.items()})


def _range(kind: str, option: str) -> range:
    """What our config allows for an option, or vLLM for one of its own systems."""
    if kind in ("eagle3", "ngram"):
        return range(1, LONGEST_OF_VLLM + 1)
    bounds = [b for f in FIELDS[option] for b in HeteroSpecConfig.model_fields[f].metadata]
    low = max(bound.ge for bound in bounds if hasattr(bound, "ge"))
    high = min(bound.le for bound in bounds if hasattr(bound, "le"))
    return range(low, high + 1)


def _allowed(kind: str, option: str) -> str:
    allowed = _range(kind, option)
    return f"{option}={allowed[0]}..{allowed[-1]}"


def _shown() -> list[str]:
    return [" ".join([kind, *(f"{o}=N" for o in options)]) for kind, options in KINDS.items()]


def _build(name: str, kind: str, options: dict[str, int]) -> System:
    if kind == "plain":
        return System(name, PLAIN)
    if kind in ("eagle3", TUNED):
        config = {"method": "eagle3", "model": "", "num_speculative_tokens": options.get("k", 0)}
        return System(name, name, config)
    if kind == "ngram":
        config = {
            "method": "ngram",
            "num_speculative_tokens": options["k"],
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
        return System(name, name, config)
    ours = {"method": "heterospec", "model": ""}
    if kind == "off":
        return System(name, OURS, ours, {"policy": "plain"})
    if kind == "chain":
        shape = {"num_speculative_tokens": options["k"], "max_depth": options["k"], "top_k": 1}
    else:
        shape = {
            "num_speculative_tokens": options["nodes"],
            "max_depth": options["depth"],
            "top_k": options["top"],
        }
    return System(name, OURS, ours, {"policy": kind, **shape})


def engine_config(engine: str, systems: list[System], head: str) -> dict[str, Any] | None:
    """The speculative config of an engine that serves some systems; of ours, the widest of its policies."""
    config = next(s.speculative_config for s in systems if s.engine == engine)
    if config is None:
        return None
    config = {**config, "model": head} if "model" in config else dict(config)
    if engine != OURS:
        return config
    policies = [s.policy for s in systems if s.engine == OURS and s.policy is not None]
    for name in ("num_speculative_tokens", "max_depth", "top_k"):
        config[name] = max((p.get(name, 1) for p in policies), default=1)
    return config


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Dataset(_Spec):
    """Prompts of one of vLLM's own benchmark datasets."""

    dataset: str  # as `vllm bench serve --dataset-name`
    arguments: list[str] = []  # further ones of `vllm bench serve`, e.g. --random-input-len
    num_prompts: int = Field(16, ge=1)


def _off(names: Any) -> Any:
    """YAML reads an unquoted ``off`` as false."""
    return ["off" if n is False else n for n in names] if isinstance(names, list) else names


M = TypeVar("M", bound=BaseModel)
Names = Annotated[list[str], BeforeValidator(_off)]


class CellGroup(_Spec):
    """Cells that differ in prompt set, load, concurrency, rate and temperature."""

    mode: Literal["offline", "serving"] = "offline"
    prompts: Literal["each", "mix"] | list[str] = "mix"
    load: LoadName = "steady"
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    # arrivals a second; null: a closed loop
    request_rate: list[Annotated[float, Field(gt=0)] | None] = Field([None], min_length=1)
    temperature: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        [0.0], min_length=1
    )
    output_len: int = Field(64, ge=1)
    range_ratio: float = Field(0.0, ge=0, lt=1)  # how far answers are shorter or longer than that
    num_prompts: int = Field(1, ge=1)  # a run; at least as many as are decoded at once
    rounds: int | None = Field(None, ge=1)  # instead of the spec's
    systems: Names | None = None  # instead of all

    @field_validator("range_ratio")
    @classmethod
    def _lengths_are_ours(cls, ratio: float, info: ValidationInfo) -> float:
        if info.data.get("mode") == "serving" and ratio:
            raise ValueError(f"found {ratio}, allowed: only 0, or `mode: offline`")
        return ratio

    @field_validator("request_rate")
    @classmethod
    def _rates_need_a_server(
        cls, rates: list[float | None], info: ValidationInfo
    ) -> list[float | None]:
        mode = info.data.get("mode", "serving")  # absent where it is wrong itself
        if mode != "serving" and any(rate is not None for rate in rates):
            raise ValueError(f"found {rates}, allowed: only null, or `mode: serving`")
        return rates


class BenchSpec(_Spec):
    """One benchmark: `heterospec bench SPEC.yaml`."""

    target: str | None = None  # folder or hub id; default: the embedded model
    target_name: str | None = None  # in tables; default: the folder's name
    head: str | None = None  # default: the shipped head
    profile: str | None = None  # of our engine; default: the one that fits the pair
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int = Field(2048, ge=64)
    systems: Names
    # path, `builtin`, `builtin:repetitive`, `builtin:long`, or a dataset of vLLM
    prompts: dict[str, str | Dataset]
    # name: sets whose prompts are sent in turn; `mix` is all of them unless it is named here
    mixes: dict[str, list[str]] = {}
    cells: list[CellGroup] = []
    rounds: int = Field(3, ge=1)
    warmup_tokens: int = Field(16, ge=1)
    # nats; a first difference within is numeric noise; default: by dtype, see NEAR_TIES
    near_tie: float | None = Field(None, ge=0)
    # of `eagle3 tuned`, as vLLM's num_speculative_tokens_per_batch_size; default: from this folder's rows
    schedule: list[tuple[int, int, int]] | None = None
    goodput: dict[Literal["ttft", "tpot", "e2el"], float] | None = None  # milliseconds
    max_engines: int | None = Field(None, ge=2)  # loaded at once; default: what fits in memory
    kv_cache_gib: int = Field(2, ge=1)  # of each engine
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)  # of each engine, on GPUs only

    @property
    def margin(self) -> float:
        return NEAR_TIES[self.dtype] if self.near_tie is None else self.near_tie

    @field_validator("systems")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            system_of(name)
        if "plain" not in names:
            raise ValueError(f"found {names}, but `plain` must be among them: all ratios are to it")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"found '{twice[0]}' named twice, allowed: every system once")
        return names

    @model_validator(mode="after")
    def _names_exist(self) -> BenchSpec:
        for number, group in enumerate(self.cells):
            where = f"cells.{number}"
            unknown = [s for s in group.systems or [] if s not in self.systems]
            if unknown:
                raise ValueError(
                    f"{where}.systems: found '{unknown[0]}', allowed: {', '.join(self.systems)}"
                )
            if isinstance(group.prompts, list):
                known = [*self.prompts, MIX, *self.mixes]
                missing = [p for p in group.prompts if p not in known]
                if missing:
                    raise ValueError(
                        f"{where}.prompts: found '{missing[0]}', allowed: {', '.join(known)}"
                    )
        if MIX in self.prompts:
            raise ValueError(
                f"prompts: found the name `{MIX}`, allowed: any other, it means all sets together"
            )
        for name, sets in self.mixes.items():
            unknown = [s for s in sets if s not in self.prompts]
            if unknown or not sets or name in self.prompts:
                raise ValueError(
                    f"mixes.{name}: found {sets}, allowed: a list of {', '.join(self.prompts)}, "
                    "under a name that no set has"
                )
        self.mixes.setdefault(MIX, list(self.prompts))
        return self


@dataclass(frozen=True)
class Planned:
    """A cell with what the group says about its runs."""

    cell: Cell
    rounds: int
    systems: tuple[System, ...]


def planned_cells(spec: BenchSpec, target_name: str) -> Iterator[Planned]:
    for group in spec.cells:
        names = group.systems or spec.systems
        systems = tuple(system_of(name) for name in spec.systems if name in {"plain", *names})
        sets = [MIX] if group.prompts == "mix" else group.prompts
        for temperature in group.temperature:
            for concurrency in group.concurrency:
                for rate in group.request_rate:
                    for prompt_set in list(spec.prompts) if sets == "each" else sets:
                        cell = Cell(
                            mode=group.mode,
                            target=target_name,
                            prompt_set=prompt_set,
                            load=group.load,
                            concurrency=concurrency,
                            request_rate=rate,
                            temperature=temperature,
                            output_len=group.output_len,
                            range_ratio=group.range_ratio,
                            num_prompts=max(group.num_prompts, concurrency),
                        )
                        yield Planned(cell, group.rounds or spec.rounds, systems)


def load_spec(path: Path, dtype: str | None = None) -> BenchSpec:
    """Reads and checks a spec; relative prompt paths are relative to its folder. Raises ValueError.

    ``dtype``: instead of the spec's.
    """
    spec = read_yaml(path, BenchSpec, {} if dtype is None else {"dtype": dtype})
    for name, source in spec.prompts.items():
        if isinstance(source, str) and not source.startswith("builtin"):
            spec.prompts[name] = str(path.parent / Path(source).expanduser())
    return spec


def with_prompt_files(spec: BenchSpec, folder: Path) -> BenchSpec:
    """Every `builtin` set is replaced by the folder's JSONL files, each a set under its name. Raises ValueError."""
    files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
    kept = {name: source for name, source in spec.prompts.items() if source != "builtin"}
    taken = [name for name in files if name in kept or name in spec.mixes]
    if not files or taken:
        found = f"a file '{taken[0]}.jsonl'" if taken else f"no *.jsonl in {folder}"
        raise ValueError(
            f"prompts: found {found}, allowed: a folder of JSONL files with other names than "
            f"{', '.join([*kept, *spec.mixes])}"
        )

    def renamed(names: list[str]) -> list[str]:
        builtin = set(spec.prompts) - set(kept)
        return [n for name in names for n in (files if name in builtin else [name])]

    values = spec.model_dump()
    values["prompts"] = {**files, **kept}
    values["mixes"] = {name: _once(renamed(sets)) for name, sets in spec.mixes.items()}
    for group in values["cells"]:
        if isinstance(group["prompts"], list):
            group["prompts"] = _once(renamed(group["prompts"]))
    return BenchSpec.model_validate(values)


def _once(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def read_yaml(path: Path, kind: type[M], changes: Mapping[str, Any] | None = None) -> M:
    """A checked YAML file, with some values changed.

    Raises ValueError with the file and the fields that are wrong.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"found no file {path}, allowed: a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: found no readable file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found bytes that are not UTF-8, allowed: YAML") from error
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: found no valid YAML ({words}), allowed: a mapping") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {type(values).__name__}, allowed: a mapping")
    values.update(changes or {})
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {clauses_of(error, kind, values)}") from error
