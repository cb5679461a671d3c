# SPDX-License-Identifier: Apache-2.0
"""`heterospec bench`: what is checked before any engine is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from heterospec_vllm.cli import bench as command
from heterospec_vllm.cli.main import app


def spec_file(folder: Path, **changes) -> Path:
    path = folder / "spec.yaml"
    values = {
        "systems": ["plain", "marginal"],
        "prompts": {"ours": "builtin"},
        "cells": [{"concurrency": [1, 4]}],
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def invoke(*arguments) -> tuple[int, str]:
    """Exit code and output in one line: the box of a message is drawn over several."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_a_dry_run_lists_the_cells_and_needs_no_output(tmp_path):
    code, output = invoke(spec_file(tmp_path), "--dry-run")
    assert code == 0, output
    assert output.count("3 rounds of plain, marginal") == 2


def test_a_real_run_needs_an_output(tmp_path):
    code, output = invoke(spec_file(tmp_path))
    assert code == 2
    assert "Invalid value for --output: found nothing, allowed: a folder" in output


def test_a_dry_run_refuses_what_our_engine_would(tmp_path):
    code, output = invoke(spec_file(tmp_path, systems=["plain", "chain k=20"]), "--dry-run")
    assert code == 2
    assert "Invalid value for SPEC.yaml: " in output
    assert "systems: 'chain k=20': found 'k=20', allowed: k=1..16" in output


def test_dtype_and_prompts_are_arguments(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_run", lambda spec, *_: seen.append(spec) or 0)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "mine.jsonl").write_text('{"prompt": "x"}\n')
    arguments = [
        "--dtype",
        "float32",
        "--prompts",
        tmp_path / "prompts",
        "--output",
        tmp_path / "out",
    ]
    code, output = invoke(spec_file(tmp_path), *arguments)
    assert code == 0, output
    assert seen[0].dtype == "float32" and list(seen[0].prompts) == ["mine"]
    code, output = invoke(spec_file(tmp_path), "--dry-run", "--dtype", "fp8")
    assert code == 2 and "dtype: found 'fp8', allowed: 'bfloat16', 'float16', 'float32'" in output


@pytest.mark.parametrize(
    ("source", "content", "words"),
    [
        ("mine.jsonl", None, "prompts.mine: found no file "),
        ("mine.jsonl", "", "prompts.mine: "),
        ("mine.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "mine.jsonl, line 2: found "),
        (
            "builtin:other",
            None,
            "found 'builtin:other', allowed: builtin, builtin:repetitive, builtin:long",
        ),
    ],
)
@pytest.mark.parametrize("options", [["--dry-run"], ["--output"]])
def test_prompt_files_are_read_before_anything_is_loaded(
    tmp_path, monkeypatch, source, content, words, options
):
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("an engine would be loaded"))
    if content is not None:
        (tmp_path / source).write_text(content)
    path = spec_file(tmp_path, prompts={"mine": source})
    folder = [tmp_path / "out"] if options == ["--output"] else []
    code, output = invoke(path, *options, *folder)
    assert code == 2
    assert words in output and "prompts.mine: prompts:" not in output


def test_a_prompt_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "x"}\n')

    def denied(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("heterospec_vllm.bench.prompt_sets.texts_of", denied)
    code, output = invoke(spec_file(tmp_path, prompts={"mine": "mine.jsonl"}), "--dry-run")
    assert code == 2
    assert "prompts.mine: found no readable file" in output and "(Permission denied)" in output


def test_a_missing_profile_is_told_at_once(tmp_path):
    code, output = invoke(spec_file(tmp_path, profile=str(tmp_path / "PROFILE")), "--dry-run")
    assert code == 2
    assert "SPEC.yaml: profile: found no readable file" in output and "PROFILE" in output


def test_a_wrong_thresholds_file_names_its_option(tmp_path):
    (tmp_path / "limits.yaml").write_text("thresholds: []")
    limits = ["--thresholds", tmp_path / "limits.yaml"]
    code, output = invoke(spec_file(tmp_path), "--dry-run", *limits)
    assert code == 2
    assert "Invalid value for --thresholds: " in output and "thresholds: found []" in output


@pytest.mark.parametrize("kind", ["missing folder", "folder without a tokenizer", "hub id"])
def test_a_target_without_tokenizer_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    target = {"missing folder": str(tmp_path / "none"), "hub id": "TARGET"}.get(
        kind, str(tmp_path / "empty")
    )
    code, output = invoke(spec_file(tmp_path, target=target), "--output", tmp_path / "out")
    assert code == 2
    assert f"target: found no model with a tokenizer at '{target}' (" in output
    assert "allowed: a folder, relative to the working directory, or a hub id" in output
    assert not (tmp_path / "out").exists()
