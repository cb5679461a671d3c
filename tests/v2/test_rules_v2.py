# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2: grammars, penalties, bad words and minimum lengths beside trees; long under the interpreter."""

from pathlib import Path

import pytest
from harness import assert_speculated, divergences, run_engine
from test_identity_v2 import DRIVER, GREEDY, TREE, _engine, _prompts
from tiny_model import make_head, make_target
from tiny_tokenizer import VOCAB, save_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.full]

SEEDED = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True}
RULES = [
    {"regex": "[a-z]{4,20}"},
    {"regex": "(ab|cd)+[0-9]{2}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"presence_penalty": -1.0, "bad_words": ["a", "e", "ab"]},
    {"min_tokens": 6, "stop_token_ids": list(range(4, 40)), "repetition_penalty": 0.8},
]


def test_same_tokens(tmp_path: Path) -> None:
    target = save_tokenizer(make_target(tmp_path / "target", VOCAB, num_layers=2))
    head = make_head(tmp_path / "head", target, taps=(0, 1, 2))
    engine = _engine(target, skip_tokenizer_init=False, max_num_seqs=3)
    prompts = _prompts([3, 9, 20, 5, 12, 7])
    runs = [
        {
            "name": name,
            "prompts": prompts,
            "sampling": [{**drawn, "seed": i, **rules} for i, rules in enumerate(RULES)],
        }
        for name, drawn in (("greedy", {**GREEDY, "max_tokens": 10}), ("seeded", SEEDED))
    ]
    speculative = {"method": "heterospec", "model": str(head), "policy": "static", **TREE}
    plain = run_engine({"engine": engine, "runs": runs}, tmp_path / "plain", 3600, DRIVER)
    ours = run_engine(
        {"engine": {**engine, "speculative_config": speculative}, "runs": runs},
        tmp_path / "ours",
        3600,
        DRIVER,
    )
    for name in ("greedy", "seeded"):
        assert divergences(plain[name], ours[name]) == []
        assert_speculated(ours[name]["counters"], min_depth=1)
