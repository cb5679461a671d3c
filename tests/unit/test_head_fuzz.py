# SPDX-License-Identifier: Apache-2.0
"""Whatever a head's folder holds: at once one sentence with field, found and allowed, or it works."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

pytest.importorskip("vllm")

from head_folders import (
    HEAD,
    SPECULATORS,
    head_tensors,
    reason,
    rewrite_header,
    torch_head,
    torch_tensors,
    write_head,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heterospec_vllm.plugin.head_schema import HeadConfig

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["llama", "default", "linear", "float32", "full_attention", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
_OTHERS = ("rope_type", "anything", "self", "__class__", "use_cache", "id2label")
_KEYS = st.sampled_from([*HeadConfig.model_fields, *HEAD, *SPECULATORS, *_OTHERS])
_FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head(tmp_path_factory.mktemp("fuzz") / "head")


@_FUZZ
@given(changes=st.dictionaries(_KEYS, _JSON, min_size=1, max_size=3), speculators=st.booleans())
def test_any_config(fuzzed: Path, changes: dict[str, Any], speculators: bool) -> None:
    base = SPECULATORS if speculators else HEAD
    (fuzzed / "config.json").write_text(json.dumps({**base, **changes}))
    reason(fuzzed)


@_FUZZ
@given(
    name=st.sampled_from(sorted(head_tensors())) | st.text(max_size=20),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
    value=_JSON | st.lists(st.integers(0, 2**64), max_size=3),
)
def test_anyrewrite_header(fuzzed: Path, name: str, field: str, value: Any) -> None:
    (fuzzed / "config.json").write_text(json.dumps(HEAD))
    save_file(head_tensors(), fuzzed / "model.safetensors")
    rewrite_header(fuzzed, lambda header: header.setdefault(name, {}).update({field: value}))
    reason(fuzzed)


@_FUZZ
@given(data=st.data(), bin_file=st.booleans())
def test_any_bytes(fuzzed: Path, data: st.DataObject, bin_file: bool) -> None:
    """Cut, with other bytes written over some, or nothing but such bytes."""
    (fuzzed / "config.json").write_text(json.dumps(HEAD))
    file = fuzzed / "model.safetensors"
    if bin_file:
        file = torch_head(fuzzed, torch_tensors()) / "pytorch_model.bin"
    else:
        save_file(head_tensors(), file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content), 4096)) | st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    file.write_bytes(bytes(content[:cut]))
    try:
        reason(fuzzed)
    finally:
        file.unlink()
