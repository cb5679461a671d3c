# SPDX-License-Identifier: Apache-2.0
"""Requests with features of their own, mixed at random: each gets what plain vLLM gives it alone."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from mixed_plans import MAX_PROMPT, plans
from stepping import SteppingEngine
from tiny_model import make_head, make_target
from tiny_tokenizer import VOCAB, save_tokenizer

pytestmark = pytest.mark.engine

# Ours reads prompts in pieces, which stock vLLM on CPU cannot do where a request has a seed, and preempts requests.
ROOMS = {
    "roomy": {"max_num_batched_tokens": MAX_PROMPT + 16},
    "tight": {
        "max_num_batched_tokens": MAX_PROMPT + 16,
        "block_size": 32,
        "num_gpu_blocks_override": 10,
    },
}
# float32 sums in another order.
LOGPROB_GAP = 1e-3


class Pair:
    """Our engine and a plain one that answers every request alone, once."""

    def __init__(self, plain: SteppingEngine, ours: SteppingEngine) -> None:
        self._plain, self._ours = plain, ours
        self._known: dict[str, dict[str, Any]] = {}
        self.counters: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def alone(self, request: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps([request["prompt"], request["sampling"]])
        if key not in self._known:
            plan = {"requests": [{**request, "joins": 0, "steps": None}], "switches": []}
            [self._known[key]] = self._plain.play(plan)["answers"]
        return self._known[key]

    def check(self, plan: dict[str, Any]) -> None:
        played = self._ours.play(plan)
        for request, answer in zip(plan["requests"], played["answers"], strict=True):
            check_answer(self.alone(request), answer, cut=request["steps"] is not None)
        self.counters["preemptions"] += played["preemptions"]
        counters = played["counters"]
        self.fallbacks.update(counters["fallbacks"])
        for name in ("accepted_nodes", "tree_steps", "accepted_non_first_child"):
            self.counters[name] += counters[name]


def check_answer(plain: dict[str, Any], ours: dict[str, Any], cut: bool) -> None:
    """cut: the request may have been aborted, so that ours may be a beginning of plain's."""
    if not cut:
        assert ours["completions"].keys() == plain["completions"].keys()
    for index, got in ours["completions"].items():
        expected = plain["completions"][index]
        if cut and got["finish_reason"] in (None, "abort"):
            count = len(got["token_ids"])
            assert got["token_ids"] == expected["token_ids"][:count]
        else:
            for field in ("token_ids", "text", "finish_reason", "stop_reason"):
                assert got[field] == expected[field], (field, got, expected)
        check_logprobs(expected["logprobs"], got["logprobs"])
    if not cut or ours["completions"]:
        check_logprobs(plain["prompt_logprobs"], ours["prompt_logprobs"])


def check_logprobs(plain: list | None, ours: list | None) -> None:
    """ours may be shorter. Among tokens that a grammar forbids the best are arbitrary."""
    assert (plain is None) == (ours is None)
    for expected, got in zip(plain or (), ours or (), strict=False):
        assert (expected is None) == (got is None)
        assert _possible(got) == pytest.approx(_possible(expected), abs=LOGPROB_GAP)


def _possible(logprobs: dict[str, float] | None) -> dict[str, float]:
    return {token: value for token, value in (logprobs or {}).items() if value > -math.inf}


@pytest.fixture(scope="module", params=["roomy", pytest.param("tight", marks=pytest.mark.full)])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("mixed")
    target = save_tokenizer(make_target(folder / "target", VOCAB))
    engine = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 6,  # fewer than a plan may have
        "scheduling_policy": "priority",
        "reasoning_parser": "deepseek_r1",
    }
    speculative = {
        "method": "heterospec",
        "model": str(make_head(folder / "head", target)),
        "policy": "static",
        "num_speculative_tokens": 12,
        "max_depth": 4,
        "top_k": 4,
    }
    engines = [
        SteppingEngine(engine, folder / "plain"),
        SteppingEngine(
            {**engine, **ROOMS[request.param], "speculative_config": speculative},
            folder / "ours",
        ),
    ]
    yield Pair(*engines)
    for each in engines:
        each.close()


RULES = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@seed(0)
@settings(max_examples=12, phases=[Phase.generate], **RULES)
@given(plan=plans())
def _some_plans(pair: Pair, plan: dict[str, Any]) -> None:
    pair.check(plan)


def test_a_few_mixed_batches(pair: Pair) -> None:
    _some_plans(pair)
    assert pair.counters["accepted_nodes"] > 0 and pair.counters["tree_steps"] > 0, pair.counters
    assert pair.fallbacks.keys() == {"switched_off"}, pair.fallbacks


@pytest.mark.full
@settings(max_examples=300, **RULES)
@given(plan=plans())
def test_mixed_batches(pair: Pair, plan: dict[str, Any]) -> None:
    pair.check(plan)
