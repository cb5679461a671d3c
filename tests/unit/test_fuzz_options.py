# SPDX-License-Identifier: Apache-2.0
"""Whatever a config, a profile or a request says: it is taken, or one line at once says field, found and allowed."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_profile import content

from heterospec_vllm.config import (
    CONFIG_FILE_KEY,
    METHOD,
    HeteroSpecConfig,
    RequestOptions,
    find_source,
    parse,
)
from heterospec_vllm.input_files import read_object
from heterospec_vllm.policy.profile import Profile, load_profile

NO_FLAGS = {"method": None, "model": None, "num_speculative_tokens": None}
_FUZZ = settings(
    max_examples=150,
    deadline=None,  # one_line_or_none holds it: a first call imports
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_ODD_TEXT = st.sampled_from(
    ["\ud800", "a\nb", "\0", "~nobodyatall/x", "k" * 10**5, "x" * 300, "1", "nan"]
)
_TEXT = st.text(max_size=12) | _ODD_TEXT
_ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers(-(2**70), 2**70)
    | st.just(10**400)
    | st.floats()
    | _TEXT
)
_JSON = st.recursive(
    _ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


def one_line_or_none(taken: Any) -> str | None:
    """The message with which a call refuses, None where it does not; both come at once."""
    start = time.process_time()
    try:
        taken()
        words = None
    except ValueError as error:
        words = str(error)
    assert time.process_time() - start < 1
    return words


def assert_form(words: str | None, begins: str) -> None:
    for line in () if words is None else words.split("\n"):
        assert line.startswith(begins) and line.isprintable(), line
        assert "found " in line and ", allowed: " in line and len(line) < 1500, line


_FIELDS = list(HeteroSpecConfig.model_fields)
_KEYS = st.sampled_from([*_FIELDS, *(key.replace("_", "-") for key in _FIELDS)]) | _TEXT


@_FUZZ
@given(changes=st.dictionaries(_KEYS, _JSON, max_size=4), as_file=st.booleans())
def test_any_config(
    changes: dict[str, Any], as_file: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options: dict[str, Any] = {"method": METHOD, "model": "org/head", **changes}
    if as_file:
        file = tmp_path_factory.getbasetemp() / "fuzz.json"
        file.write_text(json.dumps(options))
        options = {CONFIG_FILE_KEY: str(file)}

    def read() -> None:
        source = find_source(options, NO_FLAGS)
        if source is not None:
            parse(source)

    words = one_line_or_none(read)
    if words is not None and words.startswith("and "):
        return
    assert_form(words, "speculative_config")


@_FUZZ
@given(data=st.data())
def test_any_bytes_of_a_config(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = json.dumps({"method": METHOD, "model": "org/head", "top_k": 4}).encode()
    place = data.draw(st.integers(0, len(whole)))
    middle = data.draw(
        st.binary(max_size=8) | st.sampled_from([b"[" * 9999, b"{", b'"', b",", b"1e999"])
    )
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(whole[:place] + middle + whole[place + data.draw(st.integers(0, 3)) :])
    assert_form(
        one_line_or_none(lambda: read_object(file, "speculative_config")), "speculative_config"
    )


WHOLE = content()


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to a profile's values; of long lists the first two entries."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 2)))
        for key in keys:
            found += _places(value[key], (*path, key))
    return found


@_FUZZ
@given(place=st.sampled_from(_places(WHOLE)), value=_JSON, key=st.none() | _TEXT)
def test_any_profile(
    place: tuple, value: Any, key: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A value replaced or a key added: refused, or a profile whose numbers are of use."""
    broken = copy.deepcopy(WHOLE)
    holder: Any = broken
    for part in place[:-1]:
        holder = holder[part]
    if key is not None and isinstance(holder, dict):
        holder[key] = value
    else:
        holder[place[-1]] = value
    file: Path = tmp_path_factory.getbasetemp() / "profile.json"
    file.write_text(json.dumps(broken))
    loaded: list[Profile] = []
    words = one_line_or_none(lambda: loaded.append(load_profile(file)))
    assert_form(words, "speculative_config.profile: found ")
    assert words is None or str(file) in words
    for profile in loaded:
        tables = (profile.costs.verify, profile.costs.first_pass, profile.costs.level)
        assert all(0 < s <= 3600 for table in tables for s in table.seconds)
        assert profile.survival_table.min() >= 0 and profile.survival_table.max() <= 1
        assert type(profile.version) is int and 0 <= profile.num_prompts < 2**31


_OPTIONS = st.sampled_from(list(RequestOptions.model_fields)) | _TEXT | st.integers() | st.none()


@_FUZZ
@given(extra_args=st.dictionaries(_OPTIONS, _JSON, max_size=3) | _JSON)
def test_any_request(extra_args: Any) -> None:
    words = one_line_or_none(lambda: RequestOptions.from_extra_args(extra_args))
    assert_form(words, "vllm_xargs")
