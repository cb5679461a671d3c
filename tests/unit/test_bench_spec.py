# SPDX-License-Identifier: Apache-2.0
"""The benchmark's spec: names of systems, bad values."""

from __future__ import annotations

import pytest
import yaml

from heterospec_vllm.bench.spec import (
    engine_config,
    load_spec,
    system_of,
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eagle4 k=1", "allowed: plain, eagle3 k=N"),
        ("eagle3", "missing k"),
        ("eagle3 k=0", "found 'k=0'"),
        ("static node=3", "allowed: nodes=1..99"),
        ("plain k=1", "no options"),
    ],
)
def test_unknown_systems_are_named(name, words):
    with pytest.raises(ValueError, match=words):
        system_of(name)


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"systems": ["eagle3 k=1"]}, "`plain` must be among"),
        ({"systems": ["plain", "plain"]}, "named twice"),
        ({"system": []}, "system: unknown key, allowed: target"),
        ({"cells": [{"concurrency": [0]}]}, "cells.0.concurrency: allowed"),
        ({"cells": [{"concurrency": [1], "prompts": ["theirs"]}]}, "found 'theirs', allowed: ours"),
        ({"cells": [{"concurrency": [1], "systems": ["paper"]}]}, "found 'paper', allowed: plain"),
        ({"cells": [{"concurrency": [1], "request_rate": [2.0]}]}, "mode: serving"),
        ({"rounds": 0}, "rounds"),
        ({"prompts": {"mix": "builtin"}}, "all sets together"),
        ({"mixes": {"some": ["theirs"]}}, "mixes.some: found .'theirs'., allowed: a list of ours"),
        ({"mixes": {"ours": ["ours"]}}, "under a name that no set has"),
    ],
)
def test_a_bad_spec_names_the_field(tmp_path, changes, words):
    path = tmp_path / "spec.yaml"
    values = {"systems": ["plain", "marginal"], "prompts": {"ours": "builtin"}, **changes}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=words):
        load_spec(path)
