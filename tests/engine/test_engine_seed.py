# SPDX-License-Identifier: Apache-2.0
"""Sampled answers without a seed of their own follow from the engine's seed and the order of arrival alone."""

from typing import Any

import pytest
from harness import divergences, run_engine
from test_identity_tiny import MANY, VOCAB, _engine
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

UNSEEDED = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True}
# What the walk samples in one call, and what goes through vLLM's sampler.
SAMPLING = [
    {**UNSEEDED, **({}, {"top_p": 0.9}, {"min_p": 0.05}, {"seed": 3}, {"temperature": 0.0})[i % 5]}
    for i in range(18)
]
LOGPROBS = {**UNSEEDED, "logprobs": 1}
PROMPTS = [*MANY[:15], *MANY[:3]]


def _runs(**policy: Any) -> list[dict[str, Any]]:
    return [
        {"name": "mixed", "prompts": PROMPTS, "sampling": SAMPLING, **policy},
        {"name": "logprobs", "prompts": PROMPTS, "sampling": LOGPROBS, **policy},
        {"name": "several", "prompts": PROMPTS[:4], "sampling": {**UNSEEDED, "n": 3}, **policy},
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict[str, Any]]:
    """Of three engines: with random trees, with other random trees, and without drafts."""
    folder = tmp_path_factory.mktemp("seed")
    target = make_target(folder / "target", VOCAB)
    models = {"target": str(target), "head": str(make_head(folder / "head", target))}
    engine = _engine(models, True, seed=7)
    policies: list[dict[str, Any]] = [
        {"random_policy": {"seed": 0}},
        {"random_policy": {"seed": 1}},
        {"policy": {"policy": "plain"}},
    ]
    return [
        run_engine({"engine": engine, "runs": _runs(**policy)}, folder / str(i))
        for i, policy in enumerate(policies)
    ]


@pytest.mark.parametrize("name", ["mixed", "logprobs", "several"])
def test_answers_do_not_depend_on_the_trees(answers, name: str) -> None:
    first, *others = (one[name] for one in answers)
    for other in others:
        assert divergences(first, other) == []
    assert first["counters"]["accepted_nodes"] > 0


def test_requests_that_are_alike_are_answered_apart(answers) -> None:
    given = [answer[0]["token_ids"] for answer in answers[0]["logprobs"]["answers"]]
    assert len({tuple(tokens) for tokens in given}) == len(given)
