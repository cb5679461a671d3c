# SPDX-License-Identifier: Apache-2.0
"""The benchmark's spec: names of systems, bad values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from heterospec_vllm.bench.prompt_sets import check_files
from heterospec_vllm.bench.spec import (
    BenchSpec,
    CellGroup,
    engine_config,
    load_spec,
    read_yaml,
    system_of,
    with_prompt_files,
)
from heterospec_vllm.bench.thresholds import Threshold, Thresholds
from heterospec_vllm.config import HeteroSpecConfig


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eagle4 k=1", "allowed: plain, eagle3 k=N"),
        ("eagle3", "missing k"),
        ("eagle3 k=0", "found 'k=0'"),
        ("static node=3", "found 'node=3', allowed: nodes=1..63, depth=1..16, top=1..16"),
        ("static nodes=64", "found 'nodes=64', allowed: nodes=1..63"),
        ("paper depth=17", "found 'depth=17', allowed: .* depth=1..16"),
        ("marginal top=17", "found 'top=17', allowed: .* top=1..16"),
        ("chain k=17", "found 'k=17', allowed: k=1..16$"),
        ("chain k=03x", "found 'k=03x', allowed: k=1..16$"),
        ("chain", "missing k=1..16"),
        ("eagle3 k=100", "found 'k=100', allowed: k=1..99"),
        ("plain k=1", "no options"),
    ],
)
def test_unknown_systems_are_named(name, words):
    with pytest.raises(ValueError, match=words):
        system_of(name)


@pytest.mark.parametrize(
    "name", ["static nodes=63 depth=16 top=16", "chain k=16", "paper nodes=1 depth=1 top=1"]
)
def test_what_a_system_may_be_our_config_takes(name):
    system = system_of(name)
    HeteroSpecConfig.model_validate({**engine_config("ours", [system], "HEAD"), **system.policy})


def test_vllm_s_own_chains_may_be_longer_than_ours():
    for name in ("eagle3 k=20", "ngram k=20"):
        assert system_of(name).speculative_config["num_speculative_tokens"] == 20


def test_our_systems_share_one_engine_that_is_wide_enough():
    systems = [system_of(n) for n in ("off", "chain k=5", "static nodes=12 depth=4", "marginal")]
    assert {s.engine for s in systems} == {"ours"}
    config = engine_config("ours", systems, "HEAD")
    assert config == {
        "method": "heterospec", "model": "HEAD",
        "num_speculative_tokens": 16, "max_depth": 6, "top_k": 8,
    }  # fmt: skip
    assert engine_config("eagle3 k=3", [system_of("eagle3 k=3")], "HEAD") == {
        "method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3,
    }  # fmt: skip


def refused(tmp_path, **changes) -> str:
    path = tmp_path / "spec.yaml"
    values = {"systems": ["plain", "marginal"], "prompts": {"ours": "builtin"}, **changes}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as raised:
        load_spec(path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"systems": ["eagle3 k=1"]}, "`plain` must be among"),
        ({"systems": ["plain", "plain"]}, "found 'plain' named twice"),
        (
            {"systems": ["plain", "chain k=20"]},
            "yaml: systems: 'chain k=20': found 'k=20', allowed",
        ),
        ({"systems": "plain"}, "systems: found 'plain', allowed: a list, each entry a text$"),
        ({"systems": None}, "systems: found null, allowed: a list"),
        ({"system": []}, "system: unknown key, allowed: target"),
        ({"dtype": "fp8"}, "dtype: found 'fp8', allowed: 'bfloat16', 'float16', 'float32'$"),
        ({"rounds": 0}, "yaml: rounds: found 0, allowed: a whole number >= 1$"),
        ({"rounds": "three"}, "rounds: found 'three', allowed: a whole number >= 1$"),
        ({"max_engines": 1}, "max_engines: found 1, allowed: a whole number >= 2 or null$"),
        (
            {"gpu_memory_utilization": 2},
            "gpu_memory_utilization: found 2, allowed: a number > 0 and <= 1$",
        ),
        (
            {"goodput": {"foo": 1}},
            "goodput: found the key 'foo', allowed: 'ttft', 'tpot' or 'e2el'$",
        ),
        ({"goodput": {"ttft": "x"}}, "goodput.ttft: found 'x', allowed: a number$"),
        ({"schedule": [[1, 2]]}, "schedule.0.2: found nothing, allowed: a whole number$"),
        ({"prompts": {"ours": 3}}, "yaml: prompts.ours: found 3, allowed: a text or a mapping$"),
        (
            {"prompts": {"ours": {"dataset": "random", "num": 3}}},
            "yaml: prompts.ours.num: unknown key, allowed: dataset, arguments, num_prompts$",
        ),
        (
            {"prompts": {"ours": {"num_prompts": 3}}},
            "yaml: prompts.ours.dataset: found nothing, allowed: a text$",
        ),
        ({"cells": [{"concurrency": [1], "prompts": ["theirs"]}]}, "found 'theirs', allowed: ours"),
        ({"cells": [{"concurrency": [1], "systems": ["paper"]}]}, "found 'paper', allowed: plain"),
        ({"prompts": {"mix": "builtin"}}, "all sets together"),
        ({"mixes": {"some": ["theirs"]}}, "mixes.some: found .'theirs'., allowed: a list of ours"),
        ({"mixes": {"ours": ["ours"]}}, "under a name that no set has"),
    ],
)
def test_a_bad_spec_names_the_field(tmp_path, changes, words):
    message = refused(tmp_path, **changes)
    assert re.search(words, message), message
    assert "\n" not in message and "nput should be" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"concurency": [1]},
            "cells.0.concurency: unknown key, allowed: mode, prompts, load, conc",
        ),
        ({"concurrency": [4, 0]}, "cells.0.concurrency.1: found 0, allowed: a whole number >= 1$"),
        ({"concurrency": 4}, "cells.0.concurrency: found 4, allowed: a list of at least 1, each"),
        ({"concurrency": []}, "cells.0.concurrency: found \\[\\], allowed: a list of at least 1"),
        ({"temperature": [-1.0]}, "cells.0.temperature.0: found -1.0, allowed: a number >= 0$"),
        ({"temperature": [float("inf")]}, "cells.0.temperature.0: found inf, allowed: a number >="),
        (
            {"request_rate": [2.0]},
            "cells.0.request_rate: found .2.0., allowed: only null, or `mode: serving`$",
        ),
        (
            {"mode": "serving", "request_rate": [0.0]},
            "cells.0.request_rate.0: found 0.0, allowed: a number > 0 or null$",
        ),
        ({"request_rate": []}, "cells.0.request_rate: found \\[\\], allowed: a list of at least 1"),
        (
            {"prompts": "every"},
            "cells.0.prompts: found 'every', allowed: 'each', 'mix' or a list, each entry a text$",
        ),
        ({"prompts": [3]}, "cells.0.prompts.0: found 3, allowed: a text$"),
        ({"mode": "online"}, "yaml: cells.0.mode: found 'online', allowed: 'offline', 'serving'$"),
    ],
)
def test_a_bad_group_of_cells_names_the_field(tmp_path, changes, words):
    message = refused(tmp_path, cells=[{"concurrency": [1], **changes}])
    assert re.search(words, message), message


def test_thresholds_are_refused_alike(tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_text("thresholds: []")
    with pytest.raises(ValueError, match="thresholds: found .., allowed: a list of at least 1"):
        read_yaml(path, Thresholds)
    path.write_text("thresholds: [{system: marginal, rivals: plain, concurrency: 1, least: 1}]")
    with pytest.raises(ValueError) as raised:
        read_yaml(path, Thresholds)
    assert str(raised.value) == (
        f"{path}: thresholds.0.rival: found nothing, allowed: 'plain', 'best chain'; "
        "thresholds.0.rivals: unknown key, allowed: system, rival, concurrency, least"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"systems: [plain", "found no valid YAML .*line 1"),
        (b"\xff\xfe\x00", "bytes that are not UTF-8"),
        (b"- plain", "found list, allowed: a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        load_spec(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [BenchSpec, CellGroup, Threshold])
def test_every_key_is_explained(kind):
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for key in kind.model_fields:
        assert re.search(rf"^\|[^|]*`{key}`[^|]*\|", page, re.M), key


def test_the_defaults_of_cells_are_explained():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for key, value in (("output_len", 64), ("temperature", "`[0.0]`")):
        assert re.search(rf"^\| `{key}` \|.*\| {re.escape(str(value))} \|$", page, re.M), key
    assert CellGroup(concurrency=[1]).output_len == 64


def test_every_shipped_spec_is_listed():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "benchmarks.md").read_text()
    for path in (root / "benchmarks").glob("*.yaml"):
        if path.stem != "thresholds":
            assert re.search(rf"^\|[^|]*`{path.stem}`[^|]*\|", page, re.M), path.stem


def test_anyone_can_run_every_shipped_spec():
    for path in (Path(__file__).parents[2] / "benchmarks").glob("*.yaml"):
        if path.stem != "thresholds":
            spec = load_spec(path)
            check_files(spec.prompts)
            assert all(str(source).startswith("builtin") for source in spec.prompts.values())
            assert spec.target is None and spec.profile is None


def test_prompt_files_take_the_place_of_what_is_built_in(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    spec = BenchSpec(
        systems=["plain", "marginal"],
        prompts={"ours": "builtin", "again": "builtin:repetitive"},
        mixes={"half": ["again", "ours"]},
        cells=[{"concurrency": [1], "prompts": ["ours", "half"]}, {"concurrency": [2]}],
    )
    found = with_prompt_files(spec, tmp_path)
    assert found.prompts == {
        "a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl"), "again": "builtin:repetitive",
    }  # fmt: skip
    assert found.mixes == {"half": ["again", "a", "b"], "mix": ["a", "b", "again"]}
    assert [group.prompts for group in found.cells] == [["a", "b", "half"], "mix"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "found no .*jsonl in "),
        (["again"], "found a file 'again.jsonl', allowed: .* again, mix"),
    ],
)
def test_a_folder_of_prompts_that_will_not_do_is_named(tmp_path, files, words):
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    prompts = {"ours": "builtin", "again": "builtin:repetitive"}
    spec = BenchSpec(systems=["plain"], prompts=prompts)
    with pytest.raises(ValueError, match=words):
        with_prompt_files(spec, tmp_path)
