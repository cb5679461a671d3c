# SPDX-License-Identifier: Apache-2.0
"""Where commands write is checked before they work."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from heterospec_vllm.cli.files import check_output
from heterospec_vllm.cli.main import app


def test_a_file_in_a_folder_is_fine(tmp_path: Path) -> None:
    check_output(None, "--trace", ".npz")
    check_output(tmp_path / "a.npz", "--trace", ".npz")
    check_output(tmp_path / "a", "--output")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t", "found 't', allowed: a file name that ends in .npz"),
        ("nowhere/t.npz", "found no folder .*nowhere, allowed: a file in a folder that exists"),
        ("folder.npz", "found the folder .*folder.npz, allowed: a file"),
    ],
)
def test_others_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(typer.BadParameter, match=said) as refused:
        check_output(tmp_path / name, "--trace", ".npz")
    assert refused.value.param_hint == "--trace"


PAIR = ["--target", "anything", "--head", "anything"]


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", *PAIR, "--output", "nowhere/p.json"],
        ["calibrate", *PAIR, "--picture", "nowhere/p.png"],
        ["calibrate", *PAIR, "--trace", "trace"],
        ["explain", "why?", *PAIR, "--svg", "nowhere/x.svg"],
        ["explain", "why?", *PAIR, "--png", "x.jpeg"],
        ["step-table", *PAIR, "--tokens", "2047"],
        ["step-table", *PAIR, "--batch", "0"],
    ],
)
def test_commands_say_so_before_they_load_a_model(command: list[str]) -> None:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert command[-2] in done.output and "Traceback" not in done.output
