# SPDX-License-Identifier: Apache-2.0
"""A thinking budget ends the thought of its own request, whatever stands beside it in the batch."""

import random
from typing import Any

import pytest
from harness import divergences, run_engine
from tiny_model import make_head, make_target
from tiny_tokenizer import SPECIAL, THINK, VOCAB, save_tokenizer

pytestmark = pytest.mark.engine

INSIDE = SPECIAL.index(THINK)
BUDGETS = [None, 0, 3, None, 20, None, None, 9, 1, None, 35, None]
END = "so.</think>"  # of several tokens; in `test_mixed.py` it is one


def _request(rng: random.Random, number: int, budget: int | None) -> dict[str, Any]:
    """Every third is sampled; of those without a budget every second thinks, too."""
    inside = budget is not None or number % 2 == 0
    words = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 60))]
    params: dict[str, Any] = {"max_tokens": rng.randint(8, 50), "ignore_eos": True}
    params |= {"temperature": 1.0, "seed": 100 + number} if number % 3 == 0 else {"temperature": 0}
    if budget is not None:
        params["thinking_token_budget"] = budget
    at = rng.randint(0, len(words)) if number % 4 else len(words)
    return {
        "prompt": [*words[:at], INSIDE, *words[at:]] if inside else words,
        "sampling": params,
    }


def _run(seed: int) -> dict[str, Any]:
    """More requests than run at once, in another order for every seed: some join while others leave."""
    rng = random.Random(seed)
    budgets = [*BUDGETS, *BUDGETS]
    rng.shuffle(budgets)
    requests = [_request(rng, i, budget) for i, budget in enumerate(budgets)]
    return {
        "name": f"order {seed}",
        "prompts": [request["prompt"] for request in requests],
        "sampling": [request["sampling"] for request in requests],
    }


# The smallest cases: nothing is drafted beside the budgets, then a tree. Requests stand in the order of the batch.
PAIRS = [
    {
        "name": name,
        "prompts": [[INSIDE, 5, 6, 7]] * len(sampling),
        "sampling": [
            {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **s} for s in sampling
        ],
    }
    for name, sampling in {
        "off, none, 0": [{"extra_args": {"heterospec": "off"}}, {"thinking_token_budget": 0}],
        "none, 0": [{}, {"thinking_token_budget": 0}],
        "none, 0, 5, none": [{}, {"thinking_token_budget": 0}, {"thinking_token_budget": 5}, {}],
        "5, none, 0": [{"thinking_token_budget": 5}, {}, {"thinking_token_budget": 0}],
        # The last one moves up to where the first one was.
        "20 ends, none": [{"thinking_token_budget": 20, "max_tokens": 6}, {"max_tokens": 40}],
        "20 ends, off": [
            {"thinking_token_budget": 20, "max_tokens": 6},
            {"max_tokens": 40, "extra_args": {"heterospec": "off"}},
        ],
    }.items()
]
RUNS = [*PAIRS, *map(_run, range(2))]
NAMES = [run["name"] for run in RUNS]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("thinking")
    target = save_tokenizer(make_target(folder / "target", VOCAB))
    engine = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "reasoning_config": {
            "reasoning_start_str": THINK,
            "reasoning_end_str": END,
        },
    }
    speculative = {
        "method": "heterospec",
        "model": str(make_head(folder / "head", target)),
        "policy": "static",
        "num_speculative_tokens": 12,
        "max_depth": 4,
        "top_k": 4,
    }
    alone = [{**run, "batch": 1} for run in RUNS]
    again = [
        {**run, "name": f"random: {run['name']}", "random_policy": {"seed": i}}
        for i, run in enumerate(RUNS)
    ]
    ours = {**engine, "speculative_config": speculative}
    return {
        "plain": run_engine({"engine": engine, "runs": alone}, folder / "plain"),
        "ours": run_engine({"engine": ours, "runs": [*RUNS, *again]}, folder / "ours"),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["", "random: "])
def test_same_tokens(answers, how: str, name: str) -> None:
    assert divergences(answers["plain"][name], answers["ours"][how + name]) == []


def test_budgets_end_thoughts_beside_trees(answers) -> None:
    """The comparison looked at something."""
    plain, ours = answers["plain"], answers["ours"]
    [[free], [bound]] = plain["none, 0"]["answers"]
    assert free["token_ids"] != bound["token_ids"]
    for name in NAMES[len(PAIRS) :]:
        counters = ours[name]["counters"]
        assert counters["accepted_nodes"] > 0 and counters["tree_steps"] > 0, counters
        assert counters["fallbacks"] == {}, counters
