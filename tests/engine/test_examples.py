# SPDX-License-Identifier: Apache-2.0
"""The examples: each says what it takes, and those without a server run on the tiny pair."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT
from tiny_model import make_head, make_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 59


def _run(example: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name the tiny target, with a tokenizer of one byte a token, and its head."""
    folder = tmp_path_factory.mktemp("pair")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    target = make_target(folder / "target", len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(target)
    head = make_head(folder / "head", target)
    names = ["--model", str(target), "--head", str(head)]
    return [*names, "--dtype", "float32", "--max-tokens", "48", "--enforce-eager"]


def test_examples_are_short() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == {
        "calibrate_then_serve.sh", "offline.py", "per_request.py", "serve_and_ask.py",
    }  # fmt: skip
    assert all(len(path.read_text().splitlines()) <= MOST_LINES for path in EXAMPLES.glob("*.*"))


def test_the_server_example_says_what_it_takes() -> None:
    assert "--model MODEL" in _run("serve_and_ask.py", "--help")


def test_shell_examples_are_sound() -> None:
    for script in EXAMPLES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK)


@pytest.mark.engine
@pytest.mark.full  # the next one starts the same engine
def test_offline_accepts_drafts(pair: list[str]) -> None:
    out = _run("offline.py", *pair)
    assert out.count("\n> ") == 4
    tokens, nodes = map(float, re.findall(r"([\d.]+) (?:tokens a pass|draft nodes)", out))
    assert 1 < tokens < 8 and nodes >= 1


@pytest.mark.engine
def test_per_request_settings_are_obeyed(pair: list[str]) -> None:
    out = _run("per_request.py", *pair)
    rows = re.findall(r": (\d+) steps, (\d+) nodes, same answer", out)
    (steps, nodes), (plain_steps, no_nodes), (few_steps, few_nodes) = (
        map(int, row) for row in rows
    )
    assert steps < plain_steps and nodes > 2 * steps
    assert no_nodes == 0
    assert 0 < few_nodes <= 2 * few_steps
