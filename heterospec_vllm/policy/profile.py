# SPDX-License-Identifier: Apache-2.0
"""Calibration profiles: what ``heterospec calibrate`` learned of a (target, head) pair, in one versioned JSON file.

Strata and survivals belong to the pair and travel; costs belong to the machine they were measured on. Imports neither
vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from heterospec_vllm import input_files
from heterospec_vllm.arrays import Floats
from heterospec_vllm.config import MAX_DEPTH
from heterospec_vllm.errors import Fault, faults_of, shown, shown_name, shown_path
from heterospec_vllm.kernels import private_files
from heterospec_vllm.policy.strata import NUM_STRATA, Strata
from heterospec_vllm.policy.survival import PROFILE_SHAPE

VERSION = 1
FIELD = "speculative_config.profile"
SHIPPED = Path(__file__).parents[1] / "configs" / "profiles"


def _rising(edges: list[float]) -> list[float]:
    if len(edges) > NUM_STRATA - 1:
        raise ValueError(f"at most {NUM_STRATA - 1} edges are allowed")
    if any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError("edges must rise")
    return edges


_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
Edges = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], AfterValidator(_rising)]


MOST = 2**31 - 1  # tokens, requests or nodes
Seconds = Annotated[float, Field(ge=0, le=3600)]  # of one pass


class CostTableData(BaseModel):
    """Seconds at rising counts, never falling."""

    model_config = _STRICT

    knots: list[Annotated[int, Field(ge=1, le=MOST)]]
    seconds: list[Annotated[float, Field(gt=0, le=3600)]]

    def model_post_init(self, _: Any) -> None:
        if len(self.knots) != len(self.seconds) or len(self.knots) < 2:
            raise ValueError("as many seconds as knots are needed, at least 2")
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError("knots must rise")
        if any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ValueError("seconds must not fall: more tokens never cost less")


class CostData(BaseModel):
    """``cost.StepCosts`` as a file holds it."""

    model_config = _STRICT

    verify: CostTableData
    first_pass: CostTableData
    level: CostTableData
    request_seconds: Seconds
    context_seconds: Seconds


class Profile(BaseModel):
    """One calibrated pair."""

    model_config = _STRICT

    version: Literal[1]
    target: str = Field(min_length=1)  # fingerprint of the target's weights
    head: str = Field(min_length=1)
    machine: str = Field(
        min_length=1
    )  # where the costs were measured; on others they are measured anew
    dtype: str = ""  # in which the costs were measured
    created: str = ""
    versions: dict[str, str] = {}
    num_prompts: int = Field(default=0, ge=0, le=MOST)
    num_nodes: int = Field(default=0, ge=0, le=MOST)  # labelled nodes behind the survivals
    edges: list[Edges] = Field(min_length=1)  # strata by depth of the path
    paper_depth: int = Field(
        ge=1, le=MAX_DEPTH
    )  # default depth that the paper's edges were fitted at
    paper_edges: Edges
    survivals: list[list[list[list[Annotated[float, Field(ge=0, le=1)]]]]]
    costs: CostData
    held_out: dict[str, float] = {}  # the calibration's check of itself

    @field_validator("survivals")
    @classmethod
    def _have_the_shape(cls, survivals: list) -> list:
        try:
            shape = list(np.asarray(survivals, dtype=np.float64).shape)
        except ValueError:
            shape = []
        if shape != list(PROFILE_SHAPE):
            found = f"the shape {shape}" if shape else "lists of unequal lengths"
            raise PydanticCustomError("shape", f"the shape {list(PROFILE_SHAPE)}", {"found": found})
        return survivals

    @property
    def strata(self) -> Strata:
        return Strata(tuple(tuple(edges) for edges in self.edges))

    @property
    def survival_table(self) -> Floats:
        return np.asarray(self.survivals, dtype=np.float64)

    def has_costs_of(self, machine: str, dtype: str) -> bool:
        """Whether its costs were measured on such a machine with the target in this dtype."""
        return (self.machine, self.dtype) == (machine, dtype)

    def save(self, path: Path) -> None:
        """Writes the file atomically; it is private."""
        private_files.write(path, json.dumps(self.model_dump()).encode() + b"\n")


def load_profile(path: Path) -> Profile:
    """The profile in a file. Raises ValueError naming the key, what was found and what is allowed."""
    content = input_files.read_object(path, FIELD)
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{FIELD}: found the profile version {shown(version)} in {shown_path(path)}, "
            f"allowed: {VERSION} (make it anew with `heterospec calibrate`)"
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = faults_of(error, Profile, content)[0]
        raise ValueError(f"{FIELD}: {_words(first, shown_path(path))}") from None


def _words(fault: Fault, path: str) -> str:
    """A fault of a profile: what was found for which key, and what is allowed."""
    key = fault.key or "the profile"
    if fault.is_unknown_key:
        return f"found the unknown key {key} in {path}, allowed: {fault.allowed}"
    found = f"the key {fault.found}" if fault.is_key else fault.found
    return f"found {found} for {key} in {path}, allowed: {fault.allowed}"


def misfit_reason(profile: Profile, target: str, head: str) -> str | None:
    """Why a profile is not for this pair, as one sentence, or None where it is."""
    for name, found, wanted in (
        ("target", profile.target, fingerprint(target)),
        ("head", profile.head, fingerprint(head, "speculative_config.model")),
    ):
        if found != wanted:
            return (
                f"{FIELD}: found a profile made for another {name} ({shown_name(found)}), allowed: one for "
                f"{wanted} (make it with `heterospec calibrate`, or leave the key out)"
            )
    return None


def shipped_profile(target: str, head: str) -> Path | None:
    """The profile of this pair among those that come with the package, or None."""
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            profile = load_profile(path)
        except ValueError:
            continue
        if misfit_reason(profile, target, head) is None:
            return path
    return None


def fingerprint(model: str, field: str = "model") -> str:
    """Names the weights of a model: sizes and beginnings of its weight files; of a model that is not here, its name.

    Raises ValueError with the field where a file of weights cannot be read.
    """
    folder = _local_folder(model)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) if folder else []
    if not files:
        return f"name:{model}"
    digest = hashlib.sha256()
    try:
        for path in files:
            with input_files.opened(path, "a file of weights") as (file, length):
                digest.update(f"{path.name}:{length}".encode())
                digest.update(input_files.read_bytes(file, path, 0, min(length, 2**20)))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return "sha256:" + digest.hexdigest()[:32]


def _local_folder(model: str) -> Path | None:
    if os.path.isdir(model):
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
