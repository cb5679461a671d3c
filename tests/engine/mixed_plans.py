# SPDX-License-Identifier: Apache-2.0
"""Batches in which every request has features of its own, as hypothesis draws them.

A plan is `{"requests": [...], "switches": [{"step", "policy"}]}`, a request `{"prompt", "sampling", "joins" (the step),
"steps" (until it is aborted, None: never), "priority"}`.
"""

import random
from typing import Any

from hypothesis import strategies as st
from tiny_tokenizer import CHARACTERS, END_THINK, SPECIAL, THINK, VOCAB

POLICIES = ("static", "random", "static", "random", "chain", "plain")
MAX_PROMPT = 80
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["no", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_LETTERS = st.text(CHARACTERS[:26], min_size=1, max_size=2)
_TOKEN = st.integers(len(SPECIAL), VOCAB - 1)


def _given(**strategies: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(strategies)


# Each a few parameters that belong together; `thinks` says how the prompt stands to a thought.
_FEATURES: list[st.SearchStrategy[dict[str, Any]]] = [
    _given(thinking_token_budget=st.sampled_from([0, 1, 3, 8, 20, 60]), thinks=st.just("inside")),
    _given(thinking_token_budget=st.integers(0, 9), thinks=st.sampled_from(["no", "ended"])),
    _given(json=st.just(_SCHEMA), thinks=st.just("ended")),
    _given(regex=st.sampled_from(["[a-z]{3,30}", "(ab|cd)+[0-9]{2}"]), thinks=st.just("ended")),
    _given(choice=st.just(["yes", "no", "perhaps"]), thinks=st.just("ended")),
    _given(repetition_penalty=st.sampled_from([0.8, 1.3])),
    _given(presence_penalty=st.sampled_from([-1.0, 1.0]), frequency_penalty=st.just(0.5)),
    _given(bad_words=st.lists(_LETTERS, min_size=1, max_size=3)),
    _given(min_tokens=st.integers(1, 20), stop_token_ids=st.lists(_TOKEN, max_size=20)),
    _given(logprobs=st.integers(0, 4)),
    _given(prompt_logprobs=st.integers(0, 2)),
    _given(
        stop=st.lists(_LETTERS, min_size=1, max_size=4), include_stop_str_in_output=st.booleans()
    ),
    _given(stop_token_ids=st.lists(_TOKEN, min_size=1, max_size=8)),
    _given(n=st.integers(2, 3)),
    _given(allowed_token_ids=st.lists(_TOKEN, min_size=12, max_size=20, unique=True)),
    _given(logit_bias=st.dictionaries(_TOKEN.map(str), st.sampled_from([-100.0, 4.0]), min_size=1)),
    _given(min_p=st.sampled_from([0.02, 0.3])),
    _given(top_p=st.sampled_from([0.3, 0.9]), top_k=st.sampled_from([0, 5])),
    _given(repetition_detection=st.just({"max_pattern_size": 3, "min_count": 2})),
    _given(extra_args=st.just({"heterospec": "off"})),
    _given(extra_args=st.integers(0, 6).map(lambda most: {"heterospec_max_nodes": most})),
]
_DRAWS = st.one_of(
    st.just({"temperature": 0}),
    _given(temperature=st.sampled_from([0.7, 1.0]), seed=st.integers(0, 99)),
)
_GRAMMARS = ("json", "regex", "choice")


@st.composite
def _requests(draw: st.DrawFn) -> dict[str, Any]:
    given = {
        "max_tokens": draw(st.integers(1, 40)),
        "ignore_eos": draw(st.booleans()),
        **draw(_DRAWS),
    }
    thinks = draw(st.sampled_from(["no", "no", "inside", "ended"]))
    grammar = None
    for feature in draw(st.lists(st.sampled_from(_FEATURES), max_size=3)):
        given |= draw(feature)
        thinks = given.pop("thinks", thinks)
        # The latest grammar counts.
        latest = next((kind for kind in _GRAMMARS if kind in given and kind != grammar), None)
        if latest is not None and grammar is not None:
            del given[grammar]
        grammar = latest or grammar
    return {
        "prompt": _prompt(draw(st.integers(1, MAX_PROMPT)), draw(st.integers(0, 999)), thinks),
        "sampling": _that_go_together(given),
        "joins": draw(st.integers(0, 12)),
        "steps": draw(st.sampled_from([None, None, None, 1, 2, 5, 12])),
        "priority": draw(st.integers(0, 2)),
    }


def _prompt(length: int, seed: int, thinks: str) -> list[int]:
    rng = random.Random(seed)
    tokens = [rng.randrange(len(SPECIAL), VOCAB) for _ in range(length)]
    if thinks != "no":
        tokens.insert(rng.randint(0, length), SPECIAL.index(THINK))
    if thinks == "ended":
        tokens.append(SPECIAL.index(END_THINK))
    return tokens


def _that_go_together(given: dict[str, Any]) -> dict[str, Any]:
    """Without what vLLM refuses, and without a row in which no token is left."""
    if given["temperature"] == 0:
        given.pop("n", None)
    if any(kind in given for kind in _GRAMMARS):
        given.pop("allowed_token_ids", None)
        given.pop("bad_words", None)
    if "min_tokens" in given:
        given["min_tokens"] = min(given["min_tokens"], given["max_tokens"])
    return given


@st.composite
def plans(draw: st.DrawFn, most_requests: int = 12) -> dict[str, Any]:
    """The first policy stands from the first step on."""
    count = draw(st.integers(1, most_requests))
    steps = [0, *draw(st.lists(st.integers(1, 40), max_size=3, unique=True))]
    return {
        "requests": [draw(_requests()) for _ in range(count)],
        "switches": [{"step": step, "policy": draw(st.sampled_from(POLICIES))} for step in steps],
    }
