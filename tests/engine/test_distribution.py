# SPDX-License-Identifier: Apache-2.0
"""Unseeded sampling: what the engine emits has the target's distribution (chi-square)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_engine
from scipy.stats import chisquare
from tiny_model import make_head, make_target
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.engine

VOCAB, LENGTH, PROMPT = 8, 4, [2, 3, 5, 4]
# A true null hypothesis fails once in 10^4 runs of the suite.
LEAST_P_VALUE = 1e-4


def _expected(target: Path, temperature: float) -> np.ndarray:
    """[VOCAB ** LENGTH] probability of every continuation, by transformers in float32."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    inputs = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
    with torch.inference_mode():
        logits = torch.cat([model(part).logits for part in inputs.split(512)])
    log_probs = (logits[:, len(PROMPT) - 1 : -1] / temperature).log_softmax(-1)
    return log_probs.gather(2, texts[:, :, None]).sum((1, 2)).exp().double().numpy()


def _observed(folder: Path, target: Path, head: Path, temperature: float, count: int):
    """Counts of every continuation, and the run's counters."""
    run = {
        "name": "samples",
        "prompts": [PROMPT] * (count // 500),
        "sampling": {
            "temperature": temperature,
            "n": 500,
            "max_tokens": LENGTH,
            "ignore_eos": True,
            "detokenize": False,
        },
    }
    engine = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 250,
        "speculative_config": {
            "method": "heterospec",
            "model": str(head),
            "policy": "static",
            "num_speculative_tokens": 10,
            "max_depth": 3,
            "top_k": 4,
        },
    }
    result = run_engine({"engine": engine, "runs": [run]}, folder)["samples"]
    place = VOCAB ** np.arange(LENGTH - 1, -1, -1)
    indices = [
        int(np.dot(c["token_ids"], place)) for [*answers] in result["answers"] for c in answers
    ]
    return np.bincount(indices, minlength=VOCAB**LENGTH), result["counters"]


@pytest.mark.parametrize(
    ("temperature", "count"),
    [
        (1.0, 20_000),
        *(pytest.param(t, 100_000, marks=pytest.mark.full) for t in (0.5, 1.0, 1.5)),
    ],
)
def test_unseeded_samples_have_the_targets_distribution(tmp_path, temperature, count) -> None:
    target = make_target(tmp_path / "target", VOCAB, spread=1.5)
    head = make_head(tmp_path / "head", target)
    expected = _expected(target, temperature) * count
    observed, counters = _observed(tmp_path / "run", target, head, temperature, count)
    # Pool what is expected fewer than 5 times, as the test's approximation asks for.
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert expected.size > 50
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > LEAST_P_VALUE
    assert counters["tree_steps"] > 0.9 * counters["eligible_steps"], counters
    assert counters["accepted_nodes"] > count / 4, counters
    assert counters["accepted_non_first_child"] > count / 50, counters
    assert counters["fallbacks"] == {}
