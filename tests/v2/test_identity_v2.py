# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2: answers are plain V2's, token for token. On a GPU where there is one, else under the interpreter.

Under the interpreter everything but the GPU runs: vLLM's GPU runner, its Triton backend, its builder and KV layout, and
all our kernels of a step.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_speculated, divergences, run_engine
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

VOCAB = 32
TREE = {"num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
ON_GPU = torch.cuda.is_available()
DRIVER = None if ON_GPU else Path(__file__).with_name("driver_v2.py")
# float32 has no other backend with paged KV.
BACKEND = {"attention_backend": "TRITON_ATTN"} if ON_GPU else {}
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def _prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


def _sampled(count: int, **params: Any) -> list[dict[str, Any]]:
    given = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, **params}
    return [{"seed": 100 + i, **given} for i in range(count)]


# More requests than run at once, prompts longer than a step's budget: chunks of prompts beside trees.
RAGGED = _prompts([1, 5, 44, 17, 12])
RUNS: list[dict[str, Any]] = [
    {
        "name": "greedy",
        "prompts": RAGGED,
        "sampling": [{**GREEDY, "max_tokens": 8 + 3 * i} for i in range(5)],
    },
    {"name": "seeded", "prompts": RAGGED[:3], "sampling": _sampled(3)},
    {
        "name": "seeded top-p top-k",
        "prompts": RAGGED[3:],
        "sampling": [
            {**s, "min_p": 0.05} if i else s
            for i, s in enumerate(_sampled(2, temperature=0.7, top_p=0.9, top_k=8))
        ],
    },
    {
        "name": "logprobs",
        "prompts": RAGGED[:2] + RAGGED[4:],
        "sampling": [
            {**GREEDY, "logprobs": 3},
            {**_sampled(1)[0], "logprobs": 1},
            {**GREEDY, "max_tokens": 6},
        ],
    },
    {"name": "model length", "prompts": _prompts([50, 56], seed=3), "sampling": GREEDY},
    {
        "name": "fallbacks",
        "prompts": RAGGED[:2] + RAGGED[4:],
        "sampling": [
            {**GREEDY, "repetition_penalty": 1.3},
            {**GREEDY, "extra_args": {"heterospec": "off"}},
            GREEDY,
        ],
    },
]
SWITCHED = [
    {"name": "chain", "policy": {"policy": "chain"}},
    {"name": "plain", "policy": {"policy": "plain"}},
    {"name": "marginal", "policy": {"policy": "marginal"}},
    {"name": "random", "random_policy": {"seed": 1}},
]
SWITCHED_RUN = {"prompts": RAGGED[3:], "sampling": GREEDY}


def make_pair(folder: Path) -> tuple[Path, Path]:
    """(target, head), as small as they can be."""
    target = make_target(folder / "target", VOCAB, num_layers=2)
    return target, make_head(folder / "head", target, taps=(0, 1, 2))


def _engine(target: Path, **arguments: Any) -> dict[str, Any]:
    return {
        "model": str(target),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 16,  # prompts of later runs start with blocks of earlier ones
        **BACKEND,
        **arguments,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("v2")
    target, head = make_pair(folder)
    speculative = {"method": "heterospec", "model": str(head), "policy": "static", **TREE}
    plain = {
        "engine": _engine(target),
        "runs": [*RUNS, {"name": "switched", **SWITCHED_RUN}],
    }
    ours = {
        "engine": _engine(target, speculative_config=speculative),
        "runs": [*RUNS, *({**SWITCHED_RUN, **run} for run in SWITCHED)],
    }
    return {
        "plain": run_engine(plain, folder / "plain", driver=DRIVER),
        "ours": run_engine(ours, folder / "ours", driver=DRIVER),
    }


@pytest.mark.parametrize("name", [run["name"] for run in RUNS])
def test_same_tokens(answers, name: str) -> None:
    assert divergences(answers["plain"][name], answers["ours"][name]) == []


def test_trees_were_used(answers) -> None:
    assert_speculated(answers["ours"]["greedy"]["counters"])
    assert_speculated(answers["ours"]["seeded"]["counters"], min_depth=2)


def test_same_logprobs(answers) -> None:
    for [a], [b] in zip(
        answers["plain"]["logprobs"]["answers"],
        answers["ours"]["logprobs"]["answers"],
        strict=True,
    ):
        assert (a["logprobs"] is None) == (b["logprobs"] is None)
        for at, bt in zip(a["logprobs"] or (), b["logprobs"] or (), strict=True):
            assert at.keys() == bt.keys()
            # float32 sums in another order
            assert all(abs(at[t] - bt[t]) < 1e-3 for t in at)


def test_fallbacks_are_plain_and_counted(answers) -> None:
    counters = answers["ours"]["fallbacks"]["counters"]
    assert counters["fallbacks"] == {"switched_off": 1}
    assert counters["accepted_nodes"] > 0


@pytest.mark.parametrize("name", [run["name"] for run in SWITCHED])
def test_policies_switch_at_run_time(answers, name: str) -> None:
    assert divergences(answers["plain"]["switched"], answers["ours"][name]) == []
    counters = answers["ours"][name]["counters"]
    if name == "plain":
        assert counters["verified_nodes"] == 0
    if name in ("chain", "random"):
        assert counters["accepted_nodes"] > 0


def test_all_blocks_come_back(answers) -> None:
    free = {run["free_blocks"] for run in answers["ours"].values()}
    assert len(free) == 1
