# SPDX-License-Identifier: Apache-2.0
"""Where a walk is cut: behind the token at which vLLM's scheduler stops the request, whatever stops it."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_trees import from_parents
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from heterospec_vllm.arrays import NO_ROW
from heterospec_vllm.engine.controller import Controller
from heterospec_vllm.policy.base import PlainPolicy
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify import stops as stops_module
from heterospec_vllm.verify.stops import Stops, num_kept, repeats
from heterospec_vllm.verify.walk import Walk, walk

VOCAB = 6
MAX_MODEL_LEN = 40


def _params(rng: random.Random) -> SamplingParams:
    """Any mixture of what stops a request, with the eos tokens of a generation config."""
    most = rng.choice([1, 2, 3, 5, 100])
    params = SamplingParams(
        max_tokens=most,
        min_tokens=rng.choice([0, 0, min(3, most)]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([None, [2], [2, 4]]),
        repetition_detection=rng.choice(
            [None, None, RepetitionDetectionParams(max_pattern_size=2, min_count=2)]
        ),
    )
    params.update_from_generation_config({"eos_token_id": [0, 1]}, rng.choice([None, 0]))
    return params


def _request(rng: random.Random, params: SamplingParams) -> Request:
    """A request that runs: none of its outputs stopped it."""
    prompt = [0] * rng.choice([3, MAX_MODEL_LEN - 4])
    request = Request("r", prompt, params, None)
    for _ in range(rng.randrange(4)):
        before = list(request.output_token_ids)
        token = rng.randrange(VOCAB)
        room = MAX_MODEL_LEN - request.num_tokens
        if room > 1 and num_kept(params, before, len(before), 3, [token], 100) is None:
            request.append_output_token_ids(token)
    return request


def _stops(requests: list[Request]) -> Stops:
    return Stops(
        params=[request.sampling_params for request in requests],
        num_outputs=np.array([request.num_output_tokens for request in requests]),
        num_tokens=np.array([request.num_tokens for request in requests]),
        max_model_len=MAX_MODEL_LEN,
        outputs_of=lambda req: list(requests[req].output_token_ids),
    )


def _walk(emitted: list[list[int]]) -> Walk:
    width = max(map(len, emitted))
    tokens = np.array([row + [NO_ROW] * (width - len(row)) for row in emitted])
    rows = np.where(tokens >= 0, np.arange(width), NO_ROW)
    return Walk(rows, tokens, np.array(list(map(len, emitted))))


def _chains(rng: random.Random, num_reqs: int, length: int = 4) -> DraftTrees:
    return from_parents(
        np.array([[rng.randrange(VOCAB) for _ in range(length)] for _ in range(num_reqs)]),
        np.tile(np.arange(length), (num_reqs, 1)),
        np.zeros((num_reqs, length), dtype=np.int64),
        np.full(num_reqs, length),
    )


def _scheduled(request: Request, emitted: list[int]) -> tuple[list[int], bool]:
    """What vLLM's scheduler keeps of a step's tokens, and whether the request stops."""
    scheduler: Any = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
    return Scheduler._update_request_with_output(scheduler, request, list(emitted))


def test_a_walk_is_cut_where_the_scheduler_stops() -> None:
    rng = random.Random(0)
    reasons, inside = set(), 0
    for _ in range(2000):
        requests = [_request(rng, _params(rng)) for _ in range(rng.randint(1, 4))]
        emitted = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))] for _ in requests]
        whole = _walk(emitted)
        cut = _stops(requests).cut(whole)
        for req, request in enumerate(requests):
            kept, stopped = _scheduled(request, emitted[req])
            assert cut.tokens[req, : cut.num_emitted[req]].tolist() == kept
            assert (cut.tokens[req, len(kept) :] == NO_ROW).all()
            assert (cut.rows[req] >= 0).sum() == len(kept)
            dropped = len(kept) < len(emitted[req])
            assert dropped == (cut.stopped is not None and bool(cut.stopped[req]))
            inside += dropped
            if stopped:
                reasons.add(request.status)
    assert inside > 500
    assert reasons == {
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    }


def test_a_walk_by_depth_ends_where_the_whole_one_is_cut() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        requests = [_request(rng, _params(rng)) for _ in range(3)]
        trees = _chains(rng, len(requests))
        says = np.array([[rng.randrange(VOCAB) for _ in range(5)] for _ in requests])
        accepted = np.array([[rng.random() < 0.8 for _ in range(4)] for _ in requests])
        says[:, :4] = np.where(accepted, trees.tokens, says[:, :4])
        asked: list[tuple[int, int]] = []

        def sample(reqs, rows, _, says=says, asked=asked):
            asked += zip(reqs.tolist(), rows.tolist(), strict=True)
            return says[reqs, rows]

        stops = _stops(requests)
        whole = stops.cut(walk(trees, sample))
        asked.clear()
        ours = walk(trees, sample, stops.have_stopped)
        np.testing.assert_array_equal(ours.tokens, whole.tokens)
        np.testing.assert_array_equal(ours.num_emitted, whole.num_emitted)
        np.testing.assert_array_equal(
            ours.stopped, np.zeros(3, bool) if whole.stopped is None else whole.stopped
        )
        # Nothing was drawn behind a stop.
        assert len(asked) == whole.num_emitted.sum()


def test_most_steps_look_at_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that stops where its path ends anyway."""
    requests = [
        Request("r", [0] * 3, SamplingParams(max_tokens=30, stop_token_ids=[5]), None)
        for _ in range(3)
    ]
    monkeypatch.setattr(stops_module, "num_kept", None)
    whole = _walk([[1, 2, 3], [1, 2, 5], [4]])
    assert _stops(requests).cut(whole) is whole


def test_what_lies_behind_a_stop_teaches_nothing() -> None:
    """Of two like walks, one cut behind its second token: its deeper nodes were neither accepted nor rejected."""
    trees = _chains(random.Random(2), 2)
    whole = walk(trees, lambda reqs, rows, _: np.append(trees.tokens, [[0], [0]], 1)[reqs, rows])
    cut = whole.cut(np.array([2, 5]))
    seen: list[Any] = []
    policy = PlainPolicy(TreeShape(4, 4, 1))
    policy.learns = True
    policy.observe_nodes = lambda nodes, accepted: seen.append((nodes.depths, accepted))  # type: ignore[method-assign]
    controller = Controller(None, policy)  # type: ignore[arg-type] - nothing is drafted
    for walked in (whole, cut):
        controller.learn(trees, walked, np.zeros(2, dtype=np.int64))
    (depths, accepted), (fewer, still) = seen
    assert depths.tolist() == [1, 2, 3, 4] * 2 and accepted.all()
    assert fewer.tolist() == [1, 1, 2, 3, 4] and still.all()


@pytest.mark.parametrize(
    ("outputs", "min_tokens", "expected"),
    [
        ([], 0, False),
        ([1, 2, 1, 3], 0, False),
        ([3, 1, 2, 1, 2], 0, True),
        ([3, 1, 2, 1, 2], 6, False),
    ],
)
def test_who_repeats_himself(outputs: list[int], min_tokens: int, expected: bool) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=2)
    params = SamplingParams(max_tokens=100, min_tokens=min_tokens, repetition_detection=detection)
    assert repeats(params, outputs) == expected
    assert not repeats(SamplingParams(max_tokens=100), outputs)
    assert not repeats(None, outputs)
