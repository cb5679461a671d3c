# SPDX-License-Identifier: Apache-2.0
"""On a tiny float32 target: the engine's answers are plain vLLM's, token for token."""

import random
from typing import Any

import pytest
from harness import assert_speculated, divergences, run_engine
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

VOCAB = 32
TREE = {"num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}


def _prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(2, VOCAB) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]


def _sampled(count: int, **params: Any) -> list[dict[str, Any]]:
    return [{"seed": 100 + i, **params} for i in range(count)]


GREEDY = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
MANY = _prompts(24, 1, 150)
RUNS: list[dict[str, Any]] = [
    {"name": "one at a time", "prompts": MANY[:6], "sampling": GREEDY, "batch": 1},
    {"name": "batch", "prompts": MANY, "sampling": GREEDY},
    {"name": "eos", "prompts": MANY, "sampling": {**GREEDY, "ignore_eos": False}},
    {"name": "stop token", "prompts": MANY, "sampling": {**GREEDY, "stop_token_ids": [5]}},
    {"name": "short answers", "prompts": MANY, "sampling": {**GREEDY, "max_tokens": 2}},
    {
        "name": "seeded",
        "prompts": MANY,
        "sampling": _sampled(24, temperature=1.0, max_tokens=40, ignore_eos=True),
    },
    {
        "name": "seeded top-p top-k",
        "prompts": MANY,
        "sampling": _sampled(
            24, temperature=0.7, top_p=0.9, top_k=8, max_tokens=40, ignore_eos=True
        ),
    },
    {
        "name": "seeded min-p and bias",
        "prompts": MANY,
        "sampling": [
            {**s, **({"min_p": 0.1} if i % 2 else {"logit_bias": {"3": 2.0, "7": -100.0}})}
            for i, s in enumerate(_sampled(24, temperature=1.0, max_tokens=40, ignore_eos=True))
        ],
    },
    {
        "name": "greedy and seeded together",
        "prompts": MANY,
        "sampling": [
            GREEDY if i % 3 else {**s, "max_tokens": 40}
            for i, s in enumerate(_sampled(24, temperature=1.0, ignore_eos=True))
        ],
    },
    {
        "name": "n=4",
        "prompts": MANY[:6],
        "sampling": _sampled(6, temperature=1.0, n=4, max_tokens=40, ignore_eos=True),
    },
    {
        "name": "greedy logprobs",
        "prompts": MANY[:8],
        "sampling": {**GREEDY, "logprobs": 3, "max_tokens": 30},
    },
    {
        "name": "seeded logprobs",
        "prompts": MANY[:8],
        "sampling": _sampled(8, temperature=1.0, logprobs=2, max_tokens=30, ignore_eos=True),
    },
    {
        "name": "allowed tokens",
        "prompts": MANY[:8],
        "sampling": {**GREEDY, "allowed_token_ids": list(range(2, 12))},
    },
]
FALLBACK_RUNS = {
    "penalties": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.5},
    "switched_off": {"extra_args": {"heterospec": "off"}},
}


# Which rows of text our attention takes is measured at start; answers must not depend on it.
OUR_ROWS = {
    (f"{policy}, decodes {decodes}, prompts {prompts}", policy): {
        "decodes": decodes,
        "prompts": prompts,
    }
    for policy in ("plain", "static")
    for decodes in (False, True)
    for prompts in (False, True)
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    target = make_target(folder / "target", VOCAB)
    return {"target": str(target), "head": str(make_head(folder / "head", target))}


def _engine(models: dict[str, str], speculate: bool, **arguments: Any) -> dict[str, Any]:
    engine = {
        "model": models["target"],
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        **arguments,
    }
    if speculate:
        engine["speculative_config"] = {
            "method": "heterospec",
            "model": models["head"],
            "policy": "static",
            **TREE,
        }
    return engine


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    mixed = {
        "name": "fallbacks beside trees",
        "prompts": MANY[:12],
        "sampling": [
            {**GREEDY, **list(FALLBACK_RUNS.values())[i % 3]} if i < 6 else GREEDY
            for i in range(12)
        ],
    }
    to_limit = {
        "name": "model length",
        "prompts": _prompts(6, 200, 250, seed=3),
        "sampling": {**GREEDY, "max_tokens": 200},
    }
    runs = [*RUNS, mixed, to_limit]
    ours = [
        *runs,
        {**RUNS[1], "name": "chain", "policy": {"policy": "chain"}},
        {**RUNS[1], "name": "plain", "policy": {"policy": "plain"}},
        {**RUNS[1], "name": "static again", "policy": {"policy": "static"}},
        *(
            {**RUNS[1], "name": name, "policy": {"policy": policy}, "our_rows": rows}
            for (name, policy), rows in OUR_ROWS.items()
        ),
    ]
    return {
        "plain": run_engine({"engine": _engine(models, False), "runs": runs}, folder / "plain"),
        "ours": run_engine({"engine": _engine(models, True), "runs": ours}, folder / "ours"),
    }


@pytest.mark.parametrize("name", [run["name"] for run in RUNS])
def test_same_tokens(answers, name: str) -> None:
    assert divergences(answers["plain"][name], answers["ours"][name]) == []
    if name not in ("short answers", "allowed tokens"):
        assert_speculated(answers["ours"][name]["counters"], min_depth=2)


def test_depth_three_is_reached(answers) -> None:
    assert_speculated(answers["ours"]["batch"]["counters"])


def test_same_finish_reasons(answers) -> None:
    for run in RUNS:
        for expected, got in zip(
            answers["plain"][run["name"]]["answers"],
            answers["ours"][run["name"]]["answers"],
            strict=True,
        ):
            assert [c["finish_reason"] for c in expected] == [c["finish_reason"] for c in got]


@pytest.mark.parametrize("name", ["greedy logprobs", "seeded logprobs"])
def test_same_logprobs(answers, name: str) -> None:
    for expected, got in zip(
        answers["plain"][name]["answers"], answers["ours"][name]["answers"], strict=True
    ):
        for a, b in zip(expected, got, strict=True):
            assert len(a["logprobs"]) == len(b["logprobs"]) == len(b["token_ids"])
            for at, bt in zip(a["logprobs"], b["logprobs"], strict=True):
                assert at.keys() == bt.keys()
                assert all(abs(at[t] - bt[t]) < 1e-3 for t in at)


def test_model_length_reached_inside_a_tree(answers) -> None:
    name = "model length"
    assert divergences(answers["plain"][name], answers["ours"][name]) == []
    assert all(c["finish_reason"] == "length" for [c] in answers["ours"][name]["answers"])
    assert answers["ours"][name]["counters"]["accepted_nodes"] > 0


def test_fallbacks_are_plain_and_counted(answers) -> None:
    name = "fallbacks beside trees"
    assert divergences(answers["plain"][name], answers["ours"][name]) == []
    counters = answers["ours"][name]["counters"]
    assert counters["fallbacks"] == {"switched_off": 2}
    assert counters["accepted_nodes"] > 0


def test_policy_switches_at_run_time(answers) -> None:
    ours = answers["ours"]
    for name in ("chain", "plain", "static again"):
        assert divergences(answers["plain"]["batch"], ours[name]) == []
    assert ours["chain"]["counters"]["tree_steps"] == 0
    assert ours["chain"]["counters"]["accepted_nodes"] > 0
    assert ours["plain"]["counters"]["eligible_steps"] == 0
    assert_speculated(ours["static again"]["counters"])


@pytest.mark.parametrize("name", [name for name, _ in OUR_ROWS])
def test_same_tokens_whichever_rows_our_attention_takes(answers, name: str) -> None:
    assert divergences(answers["plain"]["batch"], answers["ours"][name]) == []


def test_all_blocks_return(answers) -> None:
    free = {run["free_blocks"] for run in answers["ours"].values()}
    assert len(free) == 1, free


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("chunked prefill", {"max_num_batched_tokens": 96, "max_num_seqs": 8}),
        ("preemption", {"num_gpu_blocks_override": 9, "max_num_seqs": 8}),
        ("no prefix caching", {"enable_prefix_caching": False}),
    ],
)
def test_same_tokens_under_pressure(models, tmp_path, name: str, arguments) -> None:
    """Greedy only where prefills are cut: stock vLLM on CPU dies on a seed with a partial prefill."""
    runs = [
        {"name": name, "prompts": MANY, "sampling": {**GREEDY, "max_tokens": 100}, "our_rows": rows}
        for name, rows in {
            "greedy": {"decodes": True, "prompts": True},
            "again": {"decodes": False, "prompts": False},
        }.items()
    ]
    plain = run_engine(
        {"engine": _engine(models, False, **arguments), "runs": runs}, tmp_path / "plain"
    )
    ours = run_engine(
        {"engine": _engine(models, True, **arguments), "runs": runs}, tmp_path / "ours"
    )
    for run in ("greedy", "again"):
        assert divergences(plain[run], ours[run]) == []
        assert_speculated(ours[run]["counters"])
    if name == "preemption":
        assert ours["greedy"]["preemptions"] > 0
