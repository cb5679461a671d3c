# SPDX-License-Identifier: Apache-2.0
"""The options of the plugin, without vLLM: defaults, limits, paths, what travels to vLLM."""

import argparse
import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from heterospec_vllm.config import (
    BUILTIN_HEAD,
    CONFIG_FILE_KEY,
    MAX_NODES,
    METHOD,
    POLICIES,
    ConfigCarrier,
    ConfigSource,
    HeteroSpecConfig,
    RequestOptions,
    allowed_values,
    find_source,
    from_vllm_config,
    parse,
    recognise_path,
)

ROOT = Path(__file__).parents[2]
NO_FLAGS: dict[str, Any] = {"method": None, "model": None, "num_speculative_tokens": None}


def parsed(file: Path | None = None, **options: Any) -> HeteroSpecConfig:
    return parse(ConfigSource({"method": METHOD, "model": "org/head", **options}, file))


def test_defaults_are_valid_and_frozen() -> None:
    config = parsed()
    assert HeteroSpecConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError):
        config.top_k = 1  # type: ignore[misc]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_accepted(policy: str) -> None:
    assert parsed(policy=policy).policy == policy


@given(nodes=st.integers(1, MAX_NODES), depth=st.integers(1, 16), top_k=st.integers(1, 16))
def test_lookahead_covers_the_largest_tree(nodes: int, depth: int, top_k: int) -> None:
    """A tree that outgrows its lookahead would write past its KV slots."""
    frontier, largest = 1, 0
    for _ in range(depth):
        largest += frontier * top_k
        frontier = min(frontier * top_k, top_k)
    config = parsed(num_speculative_tokens=nodes, max_depth=depth, top_k=top_k)
    assert config.num_lookahead_tokens == min(nodes, largest)


def test_options_written_with_dashes() -> None:
    source = find_source({"method": METHOD, "model": "x", "top-k": 2}, NO_FLAGS)
    assert source is not None
    assert parse(source).top_k == 2


def refusal(options: Any, **flags: Any) -> str:
    """The message, of one line, with which options are refused."""
    with pytest.raises(ValueError) as raised:
        source = find_source(options, {**NO_FLAGS, **flags})
        assert source is not None
        parse(source)
    words = str(raised.value)
    assert words.startswith("speculative_config") and words.isprintable(), words
    assert "found " in words and ", allowed: " in words and len(words) < 800
    return words


def test_two_spellings_of_one_key(tmp_path: Path) -> None:
    options = {"method": METHOD, "model": "x", "top-k": 1, "top_k": 2}
    assert refusal(options).startswith("speculative_config.top_k: found it twice")
    file = tmp_path / "heterospec.json"
    file.write_text(json.dumps(options))
    assert str(file) in refusal({CONFIG_FILE_KEY: str(file)})
    # Who asked for another method is none of our business.
    assert find_source({**options, "method": "ngram"}, NO_FLAGS) is None


ODD_KEYS: dict[str, Any] = {
    "surrogate": "\ud800",
    "line break": "a\nb",
    "1 MB": "k" * 2**20,
    "integer": 5,
    "null": None,
    "tuple": ("a", 1),
    "5000 digits": 10**5000,
}


@pytest.mark.parametrize("key", ODD_KEYS.values(), ids=ODD_KEYS)
def test_odd_keys(key: Any) -> None:
    words = refusal({"method": METHOD, "model": "x", key: 1})
    assert "the unknown key '" in words and "allowed: method, model, policy" in words


@pytest.mark.parametrize("key", ["model", "profile"])
@pytest.mark.parametrize(
    "value", ["~nobodyatall/x", "x" * 256, "a/" * 3000, 5, True, ["x"], b"x", Path("x" * 300)]
)
def test_paths_that_cannot_be(key: str, value: Any) -> None:
    words = refusal({"method": METHOD, "model": "x", key: value})
    assert words.startswith(f"speculative_config.{key}: found ")
    assert "\\ud800" in refusal({"method": METHOD, "model": "\ud800"})


def test_links_that_lead_nowhere_are_found_where_they_are_read(tmp_path: Path) -> None:
    for name, target in (("dangling", "nowhere"), ("own", "own")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert parsed(model=str(tmp_path / name)).model == str(tmp_path / name)


@pytest.mark.parametrize("value", [True, False, "0", 1.0, 0.0, None, 2])
def test_the_first_index_is_an_integer(value: Any) -> None:
    words = refusal({"method": METHOD, "model": "x", "paper_first_index": value})
    assert f"speculative_config.paper_first_index: found {value!r}" in words
    assert words.endswith("allowed: 0, 1")


def test_a_config_file_that_is_no_path() -> None:
    assert "found 5 (int), allowed: the path" in refusal({CONFIG_FILE_KEY: 5})


def test_json_on_the_command_line_that_hides_something() -> None:
    text = '{"method": "heterospec", "model": "x", "top_k": 1, "top_k": 2}'
    with pytest.raises(argparse.ArgumentTypeError, match="the key 'top_k' twice, allowed"):
        recognise_path(json.loads, text)
    with pytest.raises(argparse.ArgumentTypeError, match="nested too deeply"):
        recognise_path(json.loads, "[" * 100_000)
    ours, others = '{"method": "heterospec"}', '{"method": "ngram", "x": 1, "x": 2}'
    assert recognise_path(json.loads, ours) == {"method": METHOD}
    assert recognise_path(json.loads, others) == {"method": "ngram", "x": 2}


@pytest.mark.parametrize(
    "given_config",
    [None, {}, {"method": "ngram"}, {"model": "x", "num_speculative_tokens": 2}],
)
def test_other_methods_are_not_ours(given_config: dict[str, Any] | None) -> None:
    before = copy.deepcopy(given_config)
    assert find_source(given_config, {**NO_FLAGS, "model": "x", "method": "eagle3"}) is None
    assert given_config == before


def test_flags_complete_the_config() -> None:
    options = {"method": METHOD}
    source = find_source(options, {**NO_FLAGS, "model": "x", "num_speculative_tokens": 3})
    assert source is not None
    assert parse(source).num_speculative_tokens == 3
    assert options == {"method": METHOD}


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("heterospec.json", True),
        ("configs/static", True),
        ('{"model": "a/b.json"}', False),
        (' {"method": "ngram"}', False),
        ("[1]", False),
        ('"a/b"', False),
        ("", False),
        ("None", False),
        ("null", False),
    ],
)
def test_paths_are_told_from_json(
    text: str, is_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value = recognise_path(lambda given_text: ("json", given_text), text)
    expected = {CONFIG_FILE_KEY: str(tmp_path / text)} if is_path else ("json", text)
    assert value == expected


def test_an_existing_file_of_any_name_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").touch()
    assert recognise_path(json.loads, "settings") == {CONFIG_FILE_KEY: str(tmp_path / "settings")}


def test_model_is_looked_up_beside_the_file_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "both", here / "both", here / "only_here"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    file = beside / "heterospec.json"
    assert parsed(file, model="both").model == str(beside / "both")
    assert parsed(file, model="only_here").model == str(here / "only_here")
    assert parsed(file, model="org/head").model == "org/head"
    assert parsed(None, model="both").model == str(here / "both")
    assert parsed(None, model=Path("both")).model == str(here / "both")


def test_builtin_head_is_a_folder_of_the_package() -> None:
    model = Path(parsed(model=BUILTIN_HEAD).model)
    assert model == ROOT / "heterospec_vllm" / "assets" / "head"


def test_shipped_config_is_valid_and_names_every_key() -> None:
    content = json.loads((ROOT / "configs" / "heterospec.json").read_text())
    assert list(content) == list(HeteroSpecConfig.model_fields)
    config = parse(ConfigSource(content, None))
    defaults = parsed(model=BUILTIN_HEAD)
    assert config == defaults


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_carrier_travels_and_hides_from_json(travel: Any) -> None:
    config = parsed(top_k=2)
    carried = travel({METHOD: ConfigCarrier(config), "mine": 1})
    text = f"{METHOD} with packed linears"
    assert json.dumps(carried) == json.dumps({METHOD: text, "mine": 1})
    assert from_vllm_config(SimpleNamespace(additional_config=carried)) == config


def test_what_changes_the_compiled_graph_shows_in_its_cache_key() -> None:
    assert ConfigCarrier(parsed(packed_linears=False)) == METHOD
    assert ConfigCarrier(parsed(policy="plain")) == ConfigCarrier(parsed()) != METHOD


@pytest.mark.parametrize(
    "additional_config", [{}, {METHOD: METHOD}, {METHOD: {"top_k": 2}}, object()]
)
def test_engines_of_others_carry_no_config(additional_config: Any) -> None:
    assert from_vllm_config(SimpleNamespace(additional_config=additional_config)) is None


def test_request_options() -> None:
    assert RequestOptions.from_extra_args(None) == RequestOptions()
    options = RequestOptions.from_extra_args({"heterospec_max_nodes": 0, "other": object()})
    assert (options.heterospec, options.heterospec_max_nodes) == ("on", 0)
    with pytest.raises(ValueError, match="vllm_xargs: found the unknown key 'heterospec-off'"):
        RequestOptions.from_extra_args({"heterospec-off": 1})
    for wrong, found in (
        ({5: 1}, r"the key 5 \(int\)"),
        ({None: 1}, "the key None"),
        ([1], r"\[1\]"),
    ):
        with pytest.raises(ValueError, match=f"vllm_xargs: found {found}.*, allowed: "):
            RequestOptions.from_extra_args(wrong)
    for value in (True, "5", 4.0, -1, 64, 10**400):
        with pytest.raises(ValueError, match="heterospec_max_nodes: found .* from 0 to 63"):
            RequestOptions.from_extra_args({"heterospec_max_nodes": value})


def test_allowed_values_come_from_the_fields() -> None:
    assert allowed_values(HeteroSpecConfig, "top_k") == "an integer from 1 to 16"
    policies = allowed_values(HeteroSpecConfig, "policy")
    assert policies == "'plain', 'chain', 'static', 'paper', 'marginal'"
    # Unquoted: the string '0' is refused.
    assert allowed_values(HeteroSpecConfig, "paper_first_index") == "0, 1"
    assert allowed_values(RequestOptions, "heterospec_max_nodes") == "an integer from 0 to 63"


def documented_tables() -> dict[str, dict[str, list[str]]]:
    """The tables of docs/configuration.md by the heading above, their rows by the first cell."""
    tables: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tables.setdefault(heading, {})[cells[0].strip("| `")] = cells[1:]
    return tables


@pytest.mark.parametrize(
    ("heading", "model"),
    [("The speculative config", HeteroSpecConfig), ("Per request", RequestOptions)],
)
def test_documentation_matches_the_fields(heading: str, model: Any) -> None:
    expected = {}
    for key, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        expected[key] = [allowed_values(model, key), default, field.description]
    assert documented_tables()[heading] == expected
