# SPDX-License-Identifier: Apache-2.0
"""A draft head in two C++ calls a level drafts what vLLM's own model of it drafts."""

from typing import Any

import pytest
from harness import assert_speculated, divergences, run_engine
from test_identity_tiny import GREEDY, MANY, _engine, _prompts, models  # noqa: F401

pytestmark = pytest.mark.engine

STATIC = {"policy": "static", "num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
BATCHES = {"all": None, "one at a time": 1}
PROMPTS = [*MANY, [3]]  # nothing comes before the only token of the last
# A block of each is in the prefix cache; of the last, only the token after it is not.
LONG = [*_prompts(6, 140, 190), _prompts(1, 129, 129)[0]]


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    """float32, so that both heads order the candidates alike."""
    job = [
        {
            "name": f"{name}, {'fused' if fused else 'vllm'}",
            "prompts": PROMPTS,
            "sampling": GREEDY,
            "batch": batch,
            "policy": STATIC,
            "fused_head": fused,
        }
        for name, batch in BATCHES.items()
        for fused in (True, False)
    ]
    # The head is not there when their prefixes are filled, so its contexts begin behind them.
    late = {"prompts": LONG, "sampling": GREEDY}
    job += [
        {"name": "late, plain", **late, "policy": {"policy": "plain"}},
        {"name": "late, fused", **late, "policy": STATIC, "fused_head": True},
        {"name": "late, vllm", **late, "policy": STATIC, "fused_head": False},
    ]
    return run_engine(
        {"engine": _engine(models, True), "runs": job}, tmp_path_factory.mktemp("fused")
    )


def assert_same_trees(fused: dict[str, Any], as_model: dict[str, Any]) -> None:
    assert divergences(as_model, fused) == []
    assert_speculated(fused["counters"])
    for counter in ("steps", "drafted_nodes", "verified_nodes", "accepted_nodes", "moved_kv_rows"):
        assert fused["counters"][counter] == as_model["counters"][counter], counter


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_trees(runs, name: str) -> None:
    fused, as_model = runs[f"{name}, fused"], runs[f"{name}, vllm"]
    assert_same_trees(fused, as_model)


def test_the_same_trees_in_contexts_that_begin_late(runs) -> None:
    fused, as_model = runs["late, fused"], runs["late, vllm"]
    assert divergences(runs["late, plain"], fused) == []
    assert_same_trees(fused, as_model)
    assert fused["counters"]["late_contexts"] == as_model["counters"]["late_contexts"] == len(LONG)
