# SPDX-License-Identifier: Apache-2.0
"""For which requests a draft can still be of use."""

import pytest
from vllm import SamplingParams

from heterospec_vllm.engine.fallback import is_worth_drafting


def params(eos: int | None = 2, **given) -> SamplingParams:
    made = SamplingParams(**{"max_tokens": 10, "stop_token_ids": [7], **given})
    # What vLLM's engine does with every request.
    made.update_from_generation_config({}, eos)
    return made


@pytest.mark.parametrize(
    ("num_outputs", "last", "given", "expected"),
    [
        (1, 5, {}, True),
        (8, 5, {}, True),
        (9, 5, {}, False),  # the next token is the last
        (10, 5, {}, False),
        (0, None, {"max_tokens": 1}, False),
        (500, 5, {"max_tokens": None}, True),
        (3, 2, {}, False),  # it has ended
        (3, 7, {}, False),
        (3, 2, {"ignore_eos": True}, True),
        (3, None, {}, True),
        (3, 5, {"min_tokens": 4}, True),
        (4, 5, {"min_tokens": 4}, True),
    ],
)
def test_worth(num_outputs: int, last: int | None, given: dict, expected: bool) -> None:
    assert is_worth_drafting(params(**given), num_outputs, last) is expected
