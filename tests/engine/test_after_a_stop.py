# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a request or a session's turn, nothing is left behind that plain decoding does not leave."""

import random
from pathlib import Path
from typing import Any

import pytest
from harness import run_engine
from tiny_model import make_head, make_target, make_tokenizer

pytestmark = pytest.mark.engine

VOCAB, BLOCK = 32, 32
TREE = {"num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
DRIVER = Path(__file__).with_name("session_driver.py")
NUM_BLOCKS = 48  # all scenes fit but the two that are crowded
STOPS = {
    "length": {"max_tokens": 23},
    "stop token": {"max_tokens": 60, "stop_token_ids": [5, 11]},
    "stop string": {"max_tokens": 60, "stop": ["<5>", "<11>"]},
    "abort": {"max_tokens": 60},
}
SESSION = "session turn"
CROWDED = "preemption"


def _request(rng: random.Random, index: int, longest: int, **sampling: Any) -> dict[str, Any]:
    """Seeded ones and greedy ones in turns."""
    seeded = {"temperature": 1.0, "seed": 100 + index} if index % 2 else {"temperature": 0.0}
    prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, longest))]
    return {"prompt": prompt, "sampling": {"ignore_eos": True, **seeded, **sampling}}


def _scene(name: str, **sampling: Any) -> dict[str, Any]:
    rng = random.Random(name)
    others = [_request(rng, i, 60, **sampling) for i in range(8)]
    return {"name": name, "sessions": [], "others": others}


def _sessions(name: str, num_sessions: int, num_others: int) -> dict[str, Any]:
    rng = random.Random(name)
    stop = {"max_tokens": 30, "stop_token_ids": [5, 11]}
    sessions = [[_request(rng, i, 60, **stop) for _ in range(3)] for i in range(num_sessions)]
    others = [_request(rng, i, 60, max_tokens=100) for i in range(num_others)]
    return {"name": name, "sessions": sessions, "others": others}


SCENES = [
    *(_scene(name, **sampling) for name, sampling in STOPS.items()),
    _sessions(SESSION, 4, 0),
    _sessions(CROWDED, 4, 14),
]
SCENES[3]["abort_after"] = 17
# What the aborted requests would have gone on to say.
WHOLE = {**SCENES[3], "name": "whole", "abort_after": None}
KEPT = ("num_tokens", "num_computed_tokens", "spec_token_ids", "draws")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stops")
    target = make_tokenizer(make_target(folder / "target", VOCAB), VOCAB)
    head = make_head(folder / "head", target)
    engine = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 320,
        "max_num_seqs": 32,
        "block_size": BLOCK,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    }
    speculative = {"method": "heterospec", "model": str(head), "policy": "static", **TREE}
    ours = {"engine": {**engine, "speculative_config": speculative}, "scenes": SCENES}
    plain = {"engine": engine, "scenes": [*SCENES, WHOLE]}
    return {
        "plain": run_engine(plain, folder / "plain", driver=DRIVER),
        "ours": run_engine(ours, folder / "ours", driver=DRIVER),
    }


def _ended(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests and turns."""
    return [*scene["others"], *(turn for session in scene["sessions"] for turn in session)]


NAMES = [scene["name"] for scene in SCENES]


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(played, name: str) -> None:
    plain, ours = (_ended(played[kind][name]) for kind in ("plain", "ours"))
    for expected, got in zip(plain, ours, strict=True):
        if name == "abort":
            width = min(len(expected["token_ids"]), len(got["token_ids"]))
            assert got["token_ids"][:width] == expected["token_ids"][:width]
        else:
            assert got["token_ids"] == expected["token_ids"]
            assert got["finish_reason"] == expected["finish_reason"]
    counters = played["ours"][name]["counters"]
    assert counters["fallbacks"] == {} and counters["max_accepted_depth"] >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_schedulers_request_and_the_generator(played, name: str) -> None:
    """As in plain where the engine stops a request; else whole: computed but for the last token, one seed a token."""
    plain, ours = (_ended(played[kind][name]) for kind in ("plain", "ours"))
    for expected, got in zip(plain, ours, strict=True):
        assert got["held"] == expected["held"]
        assert got["spec_token_ids"] == [] or not got["held"]
        if name in (
            "stop string",
            "abort",
        ):  # found by the front end, when the engine may be further
            assert 0 <= got["num_tokens"] - expected["num_tokens"] <= TREE["max_depth"]
            assert got["num_computed_tokens"] == got["num_tokens"] - 1
            assert got["draws"] in (None, got["num_output_tokens"])
        else:
            assert {k: got[k] for k in KEPT} == {k: expected[k] for k in KEPT}


def test_a_preempted_request_keeps_nothing(played) -> None:
    preempted = played["ours"][CROWDED]["preempted"]
    assert all(kept == [0, []] for _, *kept in preempted)
    # Sessions among them, in one of their turns.
    assert {"session", "other"} == {req_id.split()[1] for req_id, *_ in preempted}


@pytest.mark.parametrize("kind", ["cached_blocks", "stored_blocks"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != CROWDED])
def test_cached_blocks_and_kv_events_are_of_the_text(played, name: str, kind: str) -> None:
    """Plain's blocks, but for one that is full only behind the root of a request's last step."""
    plain = set(played["plain"]["whole" if name == "abort" else name][kind])
    ours = played["ours"][name][kind]
    assert ours and len(set(ours)) == len(ours)
    assert set(ours) <= plain
    if name != "abort":
        num_requests = len(played["ours"][name]["others"]) + len(played["ours"][name]["sessions"])
        assert len(plain) - len(ours) <= num_requests // 2


def test_all_blocks_come_back(played) -> None:
    for scenes in played.values():
        assert {scene["free_blocks"] for scene in scenes.values()} == {NUM_BLOCKS - 1}
