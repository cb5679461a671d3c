# SPDX-License-Identifier: Apache-2.0
"""Tree rows inside a GPU attention backend: which rows go where, and what is done once a step. No kernel runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heterospec_vllm.layers import attention_gpu
from heterospec_vllm.layers.attention_gpu import TreeImpl, TreeMetadata


class Base:
    """A backend of vLLM that notes what it is given."""

    head_size, scale = 4, 0.5

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *args) -> torch.Tensor:
        self.rows.append(query.shape[0])
        return output


class Impl(TreeImpl, Base):
    pass


def metadata(rest: Any) -> TreeMetadata:
    none = torch.empty(0)
    return TreeMetadata(
        3, none, none, none, none, plan=SimpleNamespace(), workspace=None, rest=rest
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(rows, checked) of each call of the kernel."""
    found: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        attention_gpu,
        "tree_attention",
        lambda query, *_, checked, **__: found.append((query.shape[0], checked)),
    )
    return found


def forward(impl: Impl, step: Any) -> None:
    query = torch.zeros(5, 2, 4)
    impl.forward(None, query, None, None, torch.zeros(1, 2, 16, 8), step, torch.zeros_like(query))


def test_the_first_layer_of_a_step_is_checked_and_no_other(calls) -> None:
    impl = Impl()
    for _ in range(2):
        step = metadata(rest=None)
        for _ in range(3):
            forward(impl, step)
    assert calls == 2 * [(3, False), (3, True), (3, True)]
    assert impl.rows == []


def test_a_refused_layer_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("tree_attention: query.dtype")

    monkeypatch.setattr(attention_gpu, "tree_attention", refuse)
    step = metadata(rest=None)
    with pytest.raises(ValueError, match="query.dtype"):
        forward(Impl(), step)
    assert not step.checked


def test_other_rows_and_other_steps_are_vllms(calls) -> None:
    impl = Impl()
    forward(impl, metadata(rest="vllm's"))
    assert calls == [(3, False)] and impl.rows == [2]
    forward(impl, "a step without trees")
    assert len(calls) == 1 and impl.rows == [2, 5]
