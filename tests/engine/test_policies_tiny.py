# SPDX-License-Identifier: Apache-2.0
"""On a tiny float32 target: adaptive policies, and one that decides at random, change no token."""

from typing import Any

import pytest
from harness import divergences, run_engine
from test_identity_tiny import GREEDY, MANY, _engine, _sampled, models  # noqa: F401

pytestmark = pytest.mark.engine

MARGINAL = {"policy": "marginal", "num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
PAPER = {"policy": "paper", "num_speculative_tokens": 8, "max_depth": 2, "top_k": 4}
SEEDED = _sampled(24, temperature=1.0, top_p=0.95, max_tokens=40, ignore_eos=True)
RUNS: list[dict[str, Any]] = [
    {"name": "greedy", "prompts": MANY, "sampling": GREEDY},
    {"name": "one at a time", "prompts": MANY[:6], "sampling": GREEDY, "batch": 1},
    {"name": "seeded", "prompts": MANY, "sampling": SEEDED},
]
HOW: dict[str, list[dict[str, Any]]] = {
    "marginal": [{"policy": MARGINAL}, {}, {}],
    "random": [{"random_policy": {"seed": 1}}, {"random_policy": {"seed": 2}}, {}],
    "paper": [{"policy": PAPER}, {}, {}],
    "plain, then marginal": [{"policy": {"policy": "plain"}}, {"policy": MARGINAL}, {}],
    # Last, as the engine keeps little from then on.
    "random, little kept": [
        {"random_policy": {"seed": 3, "kept_bytes": 100_000}},
        {"random_policy": {"seed": 4, "kept_bytes": 100_000}},
        {},
    ],
}
# Little room: prompts arrive in chunks, requests are preempted and start over.
TIGHT = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 9, "max_num_seqs": 8}


def _runs(how: str) -> list[dict[str, Any]]:
    return [
        {**run, **change, "name": f"{how}: {run['name']}"}
        for run, change in zip(RUNS, HOW[how], strict=True)
    ]


@pytest.fixture(scope="module", params=["roomy", "tight"])
def answers(request, models, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path_factory.mktemp(request.param)
    room = TIGHT if request.param == "tight" else {}
    runs = RUNS[:2] if request.param == "tight" else RUNS  # seeds and chunks: no plain reference
    ours = [
        run
        for how in HOW
        for run in _runs(how)
        if run["name"].split(": ")[1] != "seeded" or not room
    ]
    return {
        "room": request.param,
        "plain": run_engine({"engine": _engine(models, False, **room), "runs": runs}, folder / "p"),
        "ours": run_engine({"engine": _engine(models, True, **room), "runs": ours}, folder / "o"),
    }


@pytest.mark.parametrize("how", HOW)
def test_same_tokens(answers, how: str) -> None:
    for name, plain in answers["plain"].items():
        assert divergences(plain, answers["ours"][f"{how}: {name}"]) == [], name


@pytest.mark.parametrize("how", ["marginal", "random", "random, little kept", "paper"])
def test_it_speculated(answers, how: str) -> None:
    counters = answers["ours"][f"{how}: greedy"]["counters"]
    assert counters["tree_steps"] > 0 and counters["accepted_nodes"] > 0, counters
    assert counters["accepted_non_first_child"] > 0, counters
    if how.startswith("random"):
        assert counters["caught_up_tokens"] > 0 and counters["seconds_off"] > 0, counters
        assert counters["unread_requests"] > 0, counters
    if how == "random, little kept":
        assert counters["late_contexts"] > 0, counters


def test_blocks_return(answers) -> None:
    free = {run["free_blocks"] for run in answers["ours"].values()}
    assert len(free) == 1, free


def test_tight_room_preempts(answers) -> None:
    if answers["room"] == "roomy":
        pytest.skip("only the tight engine preempts")
    assert answers["ours"]["random: greedy"]["preemptions"] > 0
    assert answers["ours"]["marginal: greedy"]["preemptions"] > 0
