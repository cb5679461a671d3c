# SPDX-License-Identifier: Apache-2.0
"""`heterospec simulate`: the bounds that its options may have."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from heterospec_vllm.cli.main import app
from heterospec_vllm.cli.simulate import OPTIONS
from heterospec_vllm.config import HeteroSpecConfig, allowed_values


def invoke(*arguments) -> tuple[int, str]:
    """Exit code and output in one line: the box of a message is drawn over several."""
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--nodes", 100, "an integer from 1 to 63"),
        ("--nodes", 0, "an integer from 1 to 63"),
        ("--depth", 20, "an integer from 1 to 16"),
        ("--depth", -1, "an integer from 1 to 16"),
    ],
)
def test_a_bound_that_our_config_refuses_is_named(tmp_path, option, value, allowed):
    code, output = invoke(tmp_path / "t.npz", "--profile", tmp_path / "p.json", f"{option}={value}")
    assert code == 2
    assert f"Invalid value for {option}: found {value}, allowed: {allowed}" in output


def test_the_help_says_what_our_config_allows():
    _, output = invoke("--help")
    for key, option in OPTIONS.items():
        low, high = allowed_values(HeteroSpecConfig, key).split(" from ")[1].split(" to ")
        told = output.split(option)[1].split("--")[0]
        assert f"{low}..{high}" in told


def test_a_trace_that_is_none_is_named_after_the_bounds(tmp_path):
    code, output = invoke(
        tmp_path / "t.npz", "--profile", tmp_path / "p.json", "--nodes=63", "--depth=16"
    )
    assert code == 2 and "p.json" in output
