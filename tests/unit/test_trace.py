# SPDX-License-Identifier: Apache-2.0
"""Traces: which candidates lie on the answer, the file and its faults, what recorders note."""

import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_drafter import batch_of, depths_of, draft

from heterospec_vllm.arrays import NO_ROW
from heterospec_vllm.draft.accepted_tokens import AcceptedTokens
from heterospec_vllm.policy.decisions import TreeShape
from heterospec_vllm.replay import trace as trace_module
from heterospec_vllm.replay.recorders import CostRecorder, TracePolicy, TraceRecorder
from heterospec_vllm.replay.trace import Trace
from heterospec_vllm.tree.pool import CandidatePool

NONE = -np.inf


def trace(**changes: Any) -> Trace:
    """Two requests, prompt [5, 6, 7] with answer [1, 2, 3] and prompt [1] with answer [1, 1].

    Columns: two children of the root, two of the first of them, one of the second, one of the third.
    """
    columns = {
        "request": np.array([0, 0, 1]),
        "position": np.array([2, 4, 1]),
        "tokens": np.array([[1, 9, 2, 8, 2, 3], [3, 1, 1, 1, 1, 1], [1, 2, 1, 1, 1, 1]]),
        "log_probs": np.full((3, 6), -1.0, dtype=np.float32),
        "entropies": np.zeros((3, 6), dtype=np.float32),
        "parents": np.array([[NO_ROW, NO_ROW, 0, 0, 1, 2]] * 3, dtype=np.int16),
        "ranks": np.array([[0, 1, 0, 1, 0, 0]] * 3, dtype=np.int8),
        "text": np.array([5, 6, 7, 1, 2, 3, 1, 1, 1]),
        "text_start": np.array([0, 6, 9]),
        "answer_start": np.array([3, 1]),
        "sampled": np.array([0, 1]),
        **changes,
    }
    return Trace(**columns)


def test_the_documented_columns_are_those_of_the_file() -> None:
    lists = (trace_module.__doc__ or "").partition("Columns of the file")[2].split("\n* ")[1:]
    named = [name for one in lists for name in re.findall("``([a-z_]+)``", one)]
    assert sorted(named) == sorted(Trace.__dataclass_fields__)


def test_depths_follow_the_parents() -> None:
    assert trace().depths.tolist() == [[1, 1, 2, 2, 2, 3]] * 3


def test_accepted_candidates_are_the_answer_s_own_path() -> None:
    assert trace().accepted().tolist() == [
        # After 7 come 1, 2, 3; the 2 behind the wrong 9 does not count.
        [True, False, True, False, False, True],
        # After 2 comes 3 and the answer ends; the next request's text does not go on with it.
        [True, False, False, False, False, False],
        # The last token of all is right, what would come after it is nothing.
        [True, False, False, False, False, False],
    ]


def test_candidates_that_were_not_proposed_are_not_accepted() -> None:
    log_probs = np.full((3, 6), -1.0, dtype=np.float32)
    log_probs[0, 2] = NONE
    assert trace(log_probs=log_probs).accepted()[0].tolist() == [True] + [False] * 5


# ---- the file


def test_a_trace_survives_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    made = trace()
    made.save(file)
    again = Trace.load(file)
    for name, column in made.__dict__.items():
        assert getattr(again, name).dtype == column.dtype
        assert getattr(again, name).tolist() == column.tolist()


def test_a_saved_trace_is_private_and_follows_no_link(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "trace.npz"
    victim.write_text("precious")
    file.symlink_to(victim)
    trace().save(file)
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600 and Trace.load(file).request.size == 3


def _damaged(file: Path) -> None:
    trace(text=np.arange(5000)).save(file)
    held = bytearray(file.read_bytes())
    held[60:90] = bytes(30)
    file.write_bytes(held)


def _of_another_kind(file: Path) -> None:
    with open(file, "wb") as opened:
        np.save(opened, np.zeros(3))


BROKEN = {
    "missing": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("{}"),
    "cut short": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(50)),
    "damaged": _damaged,
    "one array": _of_another_kind,
    "other columns": lambda file: np.savez(file, request=np.zeros(1)),
    "a folder": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_trace_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    BROKEN[kind](file)
    with pytest.raises(ValueError, match="trace: found no readable trace at .*trace.npz"):
        Trace.load(file)


# ---- recording


def pool(width: int, first: int = 0) -> CandidatePool:
    columns = np.arange(first, first + 2 * width).reshape(2, width)
    floats = columns.astype(np.float32)
    return CandidatePool(columns, -floats, floats, columns, floats, columns - 1, columns % 3)


def accepted_tokens(counts: list[int], positions: list[int]) -> AcceptedTokens:
    total = sum(counts)
    return AcceptedTokens(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.tensor(positions),
        features=torch.zeros(total, 1),
        num_tokens=np.array(counts),
        next_token_ids=torch.zeros(len(counts), dtype=torch.int32),
        block_table=torch.zeros(len(counts), 1, dtype=torch.int32),
        context_starts=np.zeros(len(counts), dtype=np.int64),
    )


def test_recorded_drafts_are_padded_to_the_widest() -> None:
    recorder = TraceRecorder()
    # Three requests were fed, the first and the last drafted for.
    fed = accepted_tokens([2, 1, 3], [4, 5, 9, 0, 1, 2])
    recorder.record(["a", "b"], pool(2), fed, np.array([0, 2]))
    recorder.record(
        ["a", "b"], pool(3, first=10), accepted_tokens([1, 1], [6, 3]), np.array([0, 1])
    )
    found = recorder.arrays()
    assert found["names"] == ["a", "b", "a", "b"]
    assert found["position"].tolist() == [6, 3, 7, 4], "the root follows the last accepted token"
    assert found["tokens"].tolist() == [[0, 1, 0], [2, 3, 0], [10, 11, 12], [13, 14, 15]]
    assert found["log_probs"][:2, 2].tolist() == [NONE, NONE]
    assert found["parents"].tolist() == [[-1, 0, -1], [1, 2, -1], [9, 10, 11], [12, 13, 14]]
    assert found["entropies"].shape == found["ranks"].shape == (4, 3)


def test_nothing_recorded_is_an_empty_trace() -> None:
    found = TraceRecorder().arrays()
    assert found["names"] == [] and found["tokens"].shape == (0, 0)


def test_the_policy_of_a_trace_drafts_all_and_verifies_nothing() -> None:
    policy = TracePolicy(TreeShape(num_nodes=1, max_depth=3, top_k=4))
    drafted = draft(policy, batch_of(2), lambda req, depth: np.array([0.4, 0.3, 0.2, 0.1]))
    assert drafted.trees.num_nodes.tolist() == [0, 0]
    assert depths_of(drafted) == [3, 3]
    assert [int(chosen.sum()) for chosen in drafted.expanded] == [8, 8]


def test_cost_recorders_note_every_time() -> None:
    policy = CostRecorder([TreeShape(4, 2, 2), None, TreeShape(1, 1, 1)])
    policy.observe_step(5, 2, 100.0, 0.1)
    policy.observe_first_pass(3, 0.2)
    policy.observe_level(4, 0.3)
    expected = {"steps": [(5, 2, 100.0, 0.1)], "first_passes": [(3, 0.2)], "levels": [(4, 0.3)]}
    assert policy.samples() == expected
    turns = [
        (policy.scope(1, 0.0), policy.shape.num_nodes, policy.shape.max_depth) for _ in range(4)
    ]
    assert turns == [("all", 4, 2), ("pause", 4, 2), ("all", 1, 1), ("all", 4, 2)]
