# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions: turns that stop inside an accepted path leave no more behind than plain decoding does."""

import random
from pathlib import Path
from typing import Any

import pytest
from harness import run_engine
from tiny_model import make_head, make_target

pytestmark = pytest.mark.engine

VOCAB = 32
BLOCK = 32
TREE = {"num_speculative_tokens": 12, "max_depth": 4, "top_k": 4}
DRIVER = Path(__file__).with_name("session_driver.py")

GREEDY = {"temperature": 0.0, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "ignore_eos": True}
STOPS = {
    "length": {},
    "stop token": {"stop_token_ids": [5, 11, 17, 23], "max_tokens": 40},
    "eos": {"ignore_eos": False, "max_tokens": 60, "logit_bias": {1: 3.0}},
    "min tokens": {"stop_token_ids": [5, 11, 17, 23], "min_tokens": 4, "max_tokens": 40},
    "repetition": {
        "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
        "max_tokens": 60,
    },
    "logprobs": {"stop_token_ids": [5, 11, 17, 23], "logprobs": 1, "max_tokens": 40},
}


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, VOCAB) for _ in range(count)]


def _scene(name: str, stop: str, inputs: list[int], **more: Any) -> dict[str, Any]:
    """Sessions of one prompt and some inputs, half of them seeded, beside ordinary requests."""
    rng = random.Random(name)
    sessions = []
    for i in range(8):
        sampling = {**(SEEDED if i % 2 else GREEDY), **STOPS[stop]}
        if i % 2:
            sampling["seed"] = 100 + i
        lengths = [rng.randint(45, 62), *(inputs[(i // 2 + k) % len(inputs)] for k in range(2))]
        sessions.append(
            [
                {"prompt": _tokens(rng, n), "sampling": {"max_tokens": 2 + (i + k) % 5, **sampling}}
                for k, n in enumerate(lengths)
            ]
        )
    others = [
        {
            "prompt": _tokens(rng, 20 + i),
            "sampling": {**(SEEDED | {"seed": i} if i % 2 else GREEDY), "max_tokens": 50},
        }
        for i in range(4)
    ]
    return {"name": name, "sessions": sessions, "others": others, **more}


SCENES = [
    *(_scene(f"{stop}, inputs of 9", stop, [9]) for stop in STOPS),
    _scene("length, queued", "length", [9], queued=True),
    _scene("stop token, queued", "stop token", [9], queued=True),
    *(_scene(f"{stop}, short inputs", stop, [1, 2]) for stop in ("length", "stop token")),
]
NAMES = [scene["name"] for scene in SCENES]


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
        "block_size": BLOCK,
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
        **arguments,
    }
    if speculate:
        config = {"method": "heterospec", "model": models["head"], "policy": "static", **TREE}
        engine["speculative_config"] = config
    return engine


def _runs(models, folder: Path, scenes, **arguments: Any) -> dict[str, dict[str, Any]]:
    return {
        kind: run_engine(
            {"engine": _engine(models, kind == "ours", **arguments), "scenes": scenes},
            folder / kind,
            driver=DRIVER,
        )
        for kind in ("plain", "ours")
    }


@pytest.fixture(scope="module")
def played(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    return _runs(models, tmp_path_factory.mktemp("runs"), SCENES)


def _turns(scene: dict[str, Any]) -> list[list[list[int]]]:
    return [[turn["token_ids"] for turn in session] for session in scene["sessions"]]


@pytest.mark.parametrize("name", NAMES)
def test_sessions_answer_as_in_plain(played, name: str) -> None:
    plain, ours = (played[kind][name] for kind in ("plain", "ours"))
    assert _turns(ours) == _turns(plain)
    for expected, got in zip(plain["sessions"], ours["sessions"], strict=True):
        for key in ("finish_reason", "stop_reason"):
            assert [t[key] for t in got] == [t[key] for t in expected]
    assert ours["counters"]["fallbacks"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_requests_beside_sessions_are_not_touched(played, name: str) -> None:
    plain, ours = (played[kind][name] for kind in ("plain", "ours"))
    assert [o["token_ids"] for o in ours["others"]] == [o["token_ids"] for o in plain["others"]]


@pytest.mark.parametrize("name", NAMES)
def test_cached_blocks_of_a_session_hold_its_text(played, name: str) -> None:
    """Who hits them gets the first logprobs that it would get without a cache."""
    plain, ours = (played[kind][name] for kind in ("plain", "ours"))
    for expected, got in zip(plain["later"], ours["later"], strict=True):
        assert got["text"] == expected["text"]
        # A block that is full only behind the last step's root is not cached any more.
        cached = got["warm"]["cached"]
        assert 0 < cached <= expected["warm"]["cached"] <= cached + BLOCK
        assert got["cold"]["cached"] == 0
        for kind in ("cold", "warm"):
            first, right = got[kind]["first"], expected["cold"]["first"]
            assert first.keys() == right.keys()
            assert all(abs(first[t] - right[t]) < 1e-3 for t in right), (first, right)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind_a_turn(played, name: str) -> None:
    """The scheduler's request and the generator are where plain decoding leaves them."""
    plain, ours = (played[kind][name] for kind in ("plain", "ours"))
    keys = ("num_tokens", "num_computed_tokens", "spec_token_ids", "draws")
    for expected, got in zip(plain["sessions"], ours["sessions"], strict=True):
        for a, b in zip(expected, got, strict=True):
            assert {k: b[k] for k in keys} == {k: a[k] for k in keys}
    assert ours["free_blocks"] == played["ours"][NAMES[0]]["free_blocks"]


def test_turns_stopped_inside_accepted_paths(played) -> None:
    """Else the tests above would say nothing."""
    for name in NAMES:
        counters = played["ours"][name]["counters"]
        assert counters["max_accepted_depth"] >= 2, (name, counters)
    assert played["ours"][NAMES[-1]]["counters"]["accepted_nodes"] > 500
