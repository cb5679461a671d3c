# SPDX-License-Identifier: Apache-2.0
"""A steady load: the next request is sent when one ends, and answers keep the order of their prompts."""

from dataclasses import dataclass, field
from typing import Any

from heterospec_vllm.bench.engines import _answers
from heterospec_vllm.bench.rows import Cell


@dataclass
class _Output:
    request_id: str
    prompt: int
    finished: bool


@dataclass
class _Engine:
    """Every step ends the latest request and shows that the others go on."""

    running: list[_Output] = field(default_factory=list)
    most: int = 0

    def add_request(self, request_id: str, prompt: int, params: str) -> None:
        assert params == f"of {prompt}"
        self.running.append(_Output(request_id, prompt, False))
        self.most = max(self.most, len(self.running))

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[_Output]:
        done = self.running.pop()
        return [*self.running, _Output(done.request_id, done.prompt, True)]


@dataclass
class _LLM:
    llm_engine: Any


def test_as_many_at_once_as_asked_and_every_prompt_answered_in_order():
    engine = _Engine()
    prompts = [*range(10, 21)]
    outputs = _answers(_LLM(engine), prompts, [f"of {p}" for p in prompts], 4)
    assert [output.prompt for output in outputs] == prompts
    assert all(output.finished for output in outputs)
    assert engine.most == 4


def test_lengths_are_spread_evenly_around_the_one_asked_for():
    cell = Cell(
        target="t", prompt_set="mix", concurrency=16, temperature=0, output_len=48, num_prompts=90,
    )  # fmt: skip
    assert cell.output_lens() == [48] * 90
    lengths = cell.model_copy(update={"range_ratio": 0.5}).output_lens()
    assert min(lengths) == 24 and max(lengths) == 72
    assert abs(sum(lengths) / 90 - 48) < 1
    assert abs(sum(lengths[:8]) / 8 - 48) < 5  # of those that begin together, too
